#!/usr/bin/env bash
# Everything is killed right after an fsync returned: every fsynced byte and name is there after the restart.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up

for round in 1 2 3; do
    step "round $round"
    python3 - "$MNT" "$round" "$(pid master-1)" "$(pid chunkd-1)" "$(pid chunkd-2)" "$(pid chunkd-3)" >"$WORK/sums.$round" <<'PY'
import hashlib, os, random, signal, sys
top, seed, pids = sys.argv[1], int(sys.argv[2]), [int(p) for p in sys.argv[3:]]
rng = random.Random(seed)
for i in range(40):
    path = f"{top}/r{seed}.{i}"
    data = rng.randbytes(rng.choice([1, 100, 4096, 70_000, 3_000_000]))
    fd = os.open(path + ".tmp", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(fd, data)
    os.fsync(fd)
    os.rename(path + ".tmp", path)
    print(hashlib.sha256(data).hexdigest(), path, flush=True)
    if i < 39:
        os.close(fd)
for pid in pids:
    os.kill(pid, signal.SIGKILL)
os._exit(0)  # the last file was never closed
PY
    for name in master-1 chunkd-1 chunkd-2 chunkd-3; do wait_for 10 gone "$(pid $name)" || fail "$name lives"; done
    up
    for sums in "$WORK"/sums.*; do sha256sum --quiet -c "$sums" || fail "fsynced bytes are gone"; done
    [[ -z $(find "$MNT" -name '*.tmp') ]] || fail "a renamed name came back"
done

step "a fresh mount sees the same"
down
up
for sums in "$WORK"/sums.*; do sha256sum --quiet -c "$sums" || fail "fsynced bytes are gone"; done
