#!/usr/bin/env bash
# Space comes back: chunks of which most was removed are compacted under readers and writers, and nothing that is left changes.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --chunkds 4 --replicas 3 --chunk-size 4MiB
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
KEY=(--cluster-key-file "$HOME_DIR/conf/cluster.key")
[[ -e ${KEY[1]} ]] || KEY=(--cluster-key-file "$(sed -n 's/^cluster_key_file = "\(.*\)"/\1/p' "$HOME_DIR/conf/chunkd-1.toml")")

status() { dfs status --json | python3 -c "import json, sys; s = json.load(sys.stdin); print($1)"; }
is() { [[ $(status "$1") == "${2:-True}" ]]; }
used() { status 'sum(n["used_bytes"] for n in s["nodes"])'; }
right() { (cd "$MNT" && sha256sum --quiet -c "$WORK/sums"); }
clean() { dfs fsck "${KEY[@]}" "$@" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; fail "fsck found something"; }; }
gc() { dfs gc "${KEY[@]}" --json "$@" | python3 -c "import json, sys; r = json.load(sys.stdin); print(r['half_dead_chunks'], r['half_dead_bytes'], r['dead_chunks'])"; }

step "many small files, copies of some by reference, and most of them removed again"
python3 - "$MNT" <<'PY'
import os, random, sys
top, rng = sys.argv[1], random.Random(5)
os.mkdir(f"{top}/d")
for i in range(2000):
    with open(f"{top}/d/{i}", "wb") as f: f.write(rng.randbytes(rng.randrange(1000, 40000)))
os.link(f"{top}/d/7", f"{top}/hard")
with open(f"{top}/d/14", "rb") as a, open(f"{top}/clone", "wb") as b:
    while os.copy_file_range(a.fileno(), b.fileno(), 1 << 20): pass
PY
dfs sync "$MNT"
umount "$MNT"   # its chunks are sealed
up --chunkds 4
before=$(used)
exec 9<"$MNT/d/21"
held=$(sha256sum <"$MNT/d/21")
python3 - "$MNT" <<'PY'
import os, sys
top = sys.argv[1]
for i in range(2000):
    if i % 7 or i == 21: os.remove(f"{top}/d/{i}")
PY
(cd "$MNT" && find . -type f -exec sha256sum {} +) >"$WORK/sums"
dfs sync "$MNT"
# What was removed is freed a moment later.
half_dead() { read -r chunks bytes _ < <(gc --dry-run) && ((chunks > 0 && bytes > before / 3)); }
wait_for 30 half_dead || fail "gc --dry-run sees $chunks half-dead chunks, $bytes bytes of $before"
dfs gc "${KEY[@]}" --dry-run
refused 1 'the proof is wrong' bash -c 'echo "the key of another cluster" >"$1"; exec dfs gc --cluster-key-file "$1"' _ "$WORK/other.key"

step "a program has files open and has read a little: this client knows where their bytes are now"
cat >"$WORK/holder.py" <<'PY'
import hashlib, mmap, os, sys
top, sums, ready = sys.argv[1:]
want = {name: sum for sum, name in (line.split() for line in open(sums)) if name.startswith("./d/")}
buffer = mmap.mmap(-1, 1 << 17)   # aligned, as O_DIRECT wants it
held = []
for name in sorted(want)[:100]:
    fd = os.open(os.path.join(top, name), os.O_RDONLY | os.O_DIRECT)
    os.preadv(fd, [memoryview(buffer)[:512]], 512)
    held.append((fd, name))
open(ready, "w").close()
sys.stdin.read()
for fd, name in held:
    data, count = b"", 0
    while count := os.preadv(fd, [buffer], len(data)): data += buffer[:count]
    assert hashlib.sha256(data).hexdigest() == want[name], name
PY
mkfifo "$WORK/go"
python3 "$WORK/holder.py" "$MNT" "$WORK/sums" "$WORK/ready" <"$WORK/go" &
holder=$!
exec 8>"$WORK/go"
wait_for 30 test -e "$WORK/ready" || fail "the files were not opened"

step "they are compacted while files are read and written"
read_on() { while [[ ! -e $WORK/stop ]]; do right || { touch "$WORK/wrong"; return; }; done; }
write_on() { local i=0; while [[ ! -e $WORK/stop ]]; do head -c 30000 /dev/urandom >"$MNT/w$((i++ % 5))" || touch "$WORK/wrong"; sleep 0.2; done; }
read_on &
reader=$!
write_on &
writer=$!
begin=$SECONDS
dfs gc "${KEY[@]}"
little() { (($(used) * 2 < before)); }
wait_for 150 little || fail "$(used) of $before bytes are still used: $(dfs status)"
echo "  $((SECONDS - begin)) s: $before -> $(used) bytes used, $(status '"%d chunks compacted, %d KiB moved" % (s["compaction"]["compacted"], s["compaction"]["moved_bytes"] >> 10)')"
touch "$WORK/stop"
wait "$reader" "$writer"
[[ ! -e $WORK/wrong ]] || fail "a file changed, or could not be read or written"
is 's["compaction"]["compacted"] > 0 and s["compaction"]["failed"] == 0' || fail "$(dfs status --json)"
[[ $(sha256sum <&9) == "$held" ]] || fail "a removed file that is open changed"
exec 9<&-
exec 8>&-
wait "$holder" || fail "a file that was open all the time changed, or could not be read"

step "everything that is left is right, also through a client that never saw the old chunks, and after a restart"
right || fail "a file changed"
umount "$MNT"
down
up --chunkds 4
right || fail "a file changed"
wait_for 60 is "sum(n['state'] == 'up' for n in s['nodes'])" 4 || fail "not all daemons are up"
whole='s["under_replicated"] == 0 and s["repair"]["waiting"] + s["repair"]["copying"] == 0'
wait_for 60 is "$whole" || fail "not whole: $(dfs status)"
clean --deep
grep 'replicas looked at' "$WORK/fsck"
