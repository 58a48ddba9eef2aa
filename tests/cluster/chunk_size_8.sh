#!/usr/bin/env bash
# Chunks of 8 bytes with 2 replicas: files across many chunks, one of the two daemons being killed on the way.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --chunkds 2 --replicas 2 --chunk-size 8

step "write, append, overwrite, truncate, read"
python3 - "$MNT" <<'PY'
import os, random, sys
top, rng = sys.argv[1], random.Random(8)
for i in range(20):
    data = bytearray(rng.randbytes(rng.randrange(1, 400)))
    path = f"{top}/a{i}"
    with open(path, "wb") as f: f.write(data)
    more = rng.randbytes(rng.randrange(1, 100))
    with open(path, "ab") as f: f.write(more)
    data += more
    at, patch = rng.randrange(len(data)), rng.randbytes(13)
    with open(path, "r+b") as f:
        f.seek(at); f.write(patch)
    data[at:at + 13] = patch
    with open(path, "rb") as f: assert f.read() == data, path
    with open(f"{top}/../want{i}", "wb") as f: f.write(data)
PY

step "one daemon dies"
crash chunkd-2
for i in $(seq 0 19); do cmp "$WORK/want$i" "$MNT/a$i" || fail "a$i"; done
for i in $(seq 0 9); do
    printf 'appended after the loss %d' "$i" | tee -a "$WORK/want$i" >>"$MNT/a$i"
    head -c 300 /dev/urandom | tee "$WORK/new$i" >"$MNT/b$i"
done
for i in $(seq 10 14); do rm "$MNT/a$i"; done
check() {
    for i in $(seq 0 9); do cmp "$WORK/want$i" "$MNT/a$i" && cmp "$WORK/new$i" "$MNT/b$i" || fail "file $i"; done
    for i in $(seq 10 14); do [[ ! -e $MNT/a$i ]] || fail "a$i is back"; done
}
check
step "down and up with both daemons"
down
up
check
