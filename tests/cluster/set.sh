#!/usr/bin/env bash
# Another number of replicas for what is already written (`dfs set`): repair makes them and removes them, also over kills of the master.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --masters 1 --chunkds 5 --replicas 3 --chunk-size 1MiB
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
KEY=(--cluster-key-file "$HOME_DIR/conf/cluster.key")
[[ -e ${KEY[1]} ]] || KEY=(--cluster-key-file "$(sed -n 's/^cluster_key_file = "\(.*\)"/\1/p' "$HOME_DIR/conf/chunkd-1.toml")")

status() { dfs status --json | python3 -c "import json, sys; s = json.load(sys.stdin); print($1)"; }
is() { [[ $(status "$1" 2>/dev/null) == "${2:-True}" ]]; }
right() { (cd "$MNT" && sha256sum --quiet -c "$WORK/sums"); }
sums() { (cd "$MNT" && find . -type f -exec sha256sum {} +) >"$WORK/sums"; }
clean() { dfs fsck "${KEY[@]}" "$@" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; fail "fsck found something"; }; }

# The replicas of the chunks under a directory, or of a file: what they are to have, what the master lists, what lies on the disks.
# With a number: whether all three are that everywhere. Without: the smallest and the greatest listed.
cat >"$WORK/replicas.py" <<'PY'
import collections, glob, json, os, subprocess, sys
home, top, path = sys.argv[1:4]
wanted = int(sys.argv[4]) if len(sys.argv) > 4 else None
on_disk = collections.Counter()
for file in glob.glob(f"{home}/data/chunkd-*/**/*.chunk", recursive=True):
    on_disk[int(os.path.basename(file)[:-len(".chunk")], 16)] += 1
names = [path] if os.path.isfile(top + path) else [
    os.path.join(dir, name)[len(top):] for dir, _, files in os.walk(top + path) for name in files]
chunks = {}
for at in range(0, len(names), 500):
    shown = subprocess.run(["dfs", "--json", "stat", "--chunks", *names[at:at + 500]], stdout=subprocess.PIPE, check=True)
    for file in json.loads(shown.stdout):
        for slice in file["slices"]:
            chunks[slice["chunk"]] = (slice["wanted_replicas"], len(slice["replicas"]), on_disk[slice["chunk"]])
assert chunks, "no chunks"
if wanted is None:
    listed = [chunk[1] for chunk in chunks.values()]
    print(min(listed), max(listed))
else:
    bad = {chunk: seen for chunk, seen in chunks.items() if seen != (wanted,) * 3}
    if bad: print(f"{len(bad)} of {len(chunks)} chunks, as {list(bad.items())[:4]}")
    sys.exit(bool(bad))
PY
replicas() { python3 "$WORK/replicas.py" "$HOME_DIR" "$MNT" "$@" 2>&1; }
has() { replicas "$@" >"$WORK/bad"; }
becomes() { # PATH NUMBER
    local begin=$SECONDS
    wait_for 180 has "$1" "$2" || fail "$1 has not $2 replicas: $(cat "$WORK/bad"); $(dfs status)"
    wait_for 30 is 's["reviews"]' 0 || fail "$(status 's["reviews"]') files are still looked at"
    echo "  $2 replicas of $1 after $((SECONDS - begin)) s"
}

step "a tree of small files that share chunks, larger ones, and one that shares bytes with another"
python3 - "$MNT" <<'PY'
import os, random, sys
top, rng = sys.argv[1], random.Random(9)
for d in range(6):
    os.makedirs(f"{top}/tree/d{d}")
    for i in range(40):
        with open(f"{top}/tree/d{d}/{i}", "wb") as f: f.write(rng.randbytes(rng.randrange(1, 30000)))
    with open(f"{top}/tree/d{d}/large", "wb") as f: f.write(rng.randbytes(10 << 20))
os.mkdir(f"{top}/other")
PY
# From sessions of their own: they share chunks with nobody.
head -c 5M /dev/urandom >"$WORK/bytes"
dfs put "$WORK/bytes" /other/file
dfs put "$WORK/bytes" /tree/shared
python3 - "$MNT" <<'PY'
import os, sys
with open(f"{sys.argv[1]}/tree/shared", "rb") as a, open(f"{sys.argv[1]}/other/clone", "wb") as b:
    while os.copy_file_range(a.fileno(), b.fileno(), 1 << 20): pass
PY
sums
dfs sync "$MNT"
has /tree 3 || fail "not 3 replicas to begin with: $(cat "$WORK/bad")"

step "more, while the mount has some of the chunks open"
dfs set -r --replicas 5 /tree
becomes /tree 5
right || fail "a file changed"

step "fewer: the surplus leaves the disks; what another file uses, too, keeps what that one wants"
echo "written with 5" >"$MNT/tree/late"
dfs sync "$MNT"
dfs set -r --replicas 2 /tree
for d in d0 d1 d2 d4 d5 late; do becomes "/tree/$d" 2; done
becomes /other/clone 3
has /tree/shared 3 || fail "shared with a file that wants 3: $(cat "$WORK/bad")"
right || fail "a file changed"
sums

step "one file alone"
dfs set --replicas 1 /other/file
becomes /other/file 1
dfs set --replicas default /other/file
becomes /other/file 3
setfattr -n user.dfs.replication -v 4 "$MNT/other/file"
becomes /other/file 4
dfs set --replicas 2 /other/clone
becomes /other/clone 2
becomes /tree 2
# Who removes the only one that wants more is noticed with the next wish.
dfs set --replicas 4 /other/clone
becomes /other/clone 4
rm "$MNT/other/clone"
wait_for 30 is 's["orphans"]' 0 || fail "the removed file is not freed"
dfs set --replicas 2 /tree/shared
becomes /tree 2
sums

step "the master is killed in the middle of it: when it has just been told, and when some chunks have their replicas"
dfs set -r --replicas 5 /tree
noted=$(status 's["reviews"]')
crash master-1
((noted > 0)) || fail "the master had looked at every file before it was killed"
echo 'repair_bandwidth = "2MiB"' >>"$HOME_DIR/conf/master-1.toml"
up
some() { [[ $(replicas /tree) == *5 ]]; }
wait_for 120 some || fail "nothing has 5 replicas: $(dfs status)"
between=$(replicas /tree)
crash master-1
[[ $between == [234]" 5" ]] || fail "the fewest and the most replicas of a chunk are $between: this is not the middle of it"
sed -i '/^repair_bandwidth/d' "$HOME_DIR/conf/master-1.toml"
up
echo "  $noted files were noted at the first kill; the fewest and the most replicas of a chunk at the second: $between"
becomes /tree 5
right || fail "a file changed"
dfs set -r --replicas 3 /
crash master-1
up
becomes / 3
right || fail "a file changed"

step "nothing is left to be done, and everything is right"
wait_for 60 is 's["surplus"] + s["under_replicated"] + s["reviews"] + s["repair"]["waiting"] + s["repair"]["copying"]' 0 || fail "$(dfs status)"
clean --deep
right || fail "a file changed"
