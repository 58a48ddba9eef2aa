#!/usr/bin/env bash
# Replicas that are lost, missing, damaged, superfluous or in the wrong place: what was lost is made anew, and files stay right.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --chunkds 5
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
KEY=(--cluster-key-file "$HOME_DIR/conf/cluster.key")
[[ -e ${KEY[1]} ]] || KEY=(--cluster-key-file "$(sed -n 's/^cluster_key_file = "\(.*\)"/\1/p' "$HOME_DIR/conf/chunkd-1.toml")")

# Something of the cluster's status, by an expression over it.
status() { dfs status --json | python3 -c "import json, sys; s = json.load(sys.stdin); print($1)"; }
is() { [[ $(status "$1") == "${2:-True}" ]]; }
data() { sed -n 's/^data = \["\(.*\)"\]/\1/p' "$HOME_DIR/conf/$1.toml"; }
node() { printf '%016x' "$(sed -n 's/^node = //p' "$(data "$1")/IDENTITY")"; }
files() { find "$(data "$1")/chunks" -name '*.chunk' | wc -l; }
start() { setsid "$DFS_BIN_DIR/dfs-chunkd" --config "$HOME_DIR/conf/$1.toml" >>"$HOME_DIR/log/$1.log" 2>&1 </dev/null & echo $! >"$HOME_DIR/run/$1.pid"; }
whole='s["under_replicated"] == 0 and s["repair"]["waiting"] + s["repair"]["copying"] == 0 and s["repair"]["flawed"] == 0'
removed() { dfs node remove "${KEY[@]}" "$1" 2>"$WORK/remove.err"; }
right() { (cd "$MNT" && sha256sum --quiet -c "$WORK/sums"); }

clean() { dfs fsck "${KEY[@]}" "$@" >"$WORK/fsck" 2>&1 || { cat "$WORK/fsck"; fail "fsck found something"; }; }

# One whose damage is to be found by others than its scrub.
crash chunkd-1
echo 'scrub_bandwidth = 0' >>"$HOME_DIR/conf/chunkd-1.toml"
start chunkd-1
wait_for 30 is "sum(n['state'] == 'up' for n in s['nodes'])" 5 || fail "not all daemons are up"

mkdir "$MNT/tree"
for i in {1..40}; do head -c $((i * 200000)) /dev/urandom >"$MNT/tree/$i"; done
head -c 300M /dev/urandom >"$MNT/big"
(cd "$MNT" && find . -type f -exec sha256sum {} +) >"$WORK/sums"
dfs sync "$MNT"
clean --deep
grep -E 'replicas looked at' "$WORK/fsck"
echo "some other cluster's key" >"$WORK/other.key"
refused 1 'the proof is wrong' dfs fsck --cluster-key-file "$WORK/other.key"

step "a daemon dies: its replicas are made anew on others"
lost=$(node chunkd-2)
refused 1 'is not dead: stop it first' dfs node remove "${KEY[@]}" "$lost"
crash chunkd-2
begin=$SECONDS
wait_for 60 removed "$lost" || { cat "$WORK/remove.err"; fail "its replicas were not made up for"; }
echo "  $((SECONDS - begin)) s after the kill, $(status '"%d MiB copied" % (s["repair"]["copied_bytes"] >> 20)')"
wait_for 30 is "$whole" || fail "not whole: $(dfs status)"
right || fail "a file changed"

step "it comes back with replicas that nobody needs any more: they are deleted"
start chunkd-2
wait_for 60 is "[n['chunks'] for n in s['nodes'] if n['node'] == '$lost']" '[0]' || fail "it keeps them: $(dfs node ls)"

# Byte 48 of a chunk file says whether it is sealed (docs/formats/chunk.md).
sealed() { while read -r file; do [[ $(od -An -tu1 -j48 -N1 "$file" | tr -d ' ') != 1 ]] || echo "$file"; done; }
step "replicas that are missing after a restart are made anew, also of chunks that are still open"
crash chunkd-3
find "$(data chunkd-3)/chunks" -name '*.chunk' | sort >"$WORK/chunks"
sealed <"$WORK/chunks" >"$WORK/sealed"
mapfile -t gone < <({ comm -23 "$WORK/chunks" "$WORK/sealed"; cat "$WORK/sealed"; } | head -n 4)
((${#gone[@]} == 4)) || fail "chunkd-3 has too few chunks to lose some"
rm "${gone[@]}"
start chunkd-3
# By whichever daemon.
made() {
    local file
    for file in "${gone[@]}"; do
        (($(find "$HOME_DIR"/data/chunkd-* -name "${file##*/}" | wc -l) == 3)) || return 1
    done
}
wait_for 60 made || fail "they are still missing: $(dfs status)"
wait_for 30 is "$whole" || fail "not whole: $(dfs status)"
right || fail "a file changed"

step "bytes that change on the disk are never shown, and are mended"
mapfile -t rotten < <(find "$(data chunkd-1)/chunks" -name '*.chunk' -size +1M | sealed | head -n 3)
((${#rotten[@]} > 0)) || fail "chunkd-1 has no sealed chunk"
for file in "${rotten[@]}"; do
    python3 - "$file" <<'PY'
import sys
with open(sys.argv[1], "r+b") as f:
    for at in range(4096, 1 << 20, 65536):
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 0x10]))
PY
done
# One may be made anew by another daemon.
sums() { sha256sum "${rotten[@]}" 2>/dev/null; }
sums >"$WORK/rotten"
clean
if dfs fsck "${KEY[@]}" --deep >"$WORK/fsck" 2>&1; then fail "fsck --deep saw no damage"; fi
(($(grep -c 'is damaged' "$WORK/fsck") == ${#rotten[@]})) || { cat "$WORK/fsck"; fail "not all damage was found"; }
mended() { [[ -z $(sums | grep -xFf "$WORK/rotten" || true) ]]; }
clean --deep --repair
mended || fail "fsck --repair did not wait until all was mended: $(dfs status)"
umount "$MNT"
up --chunkds 5
right || fail "a file changed"
wait_for 30 is "$whole" || fail "not whole: $(dfs status)"

step "a drained daemon is emptied, and used again afterwards"
dfs node drain "${KEY[@]}" --wait 90 "$(node chunkd-4)" || fail "not emptied: $(dfs node ls)"
[[ $(files chunkd-4) == 0 ]] || fail "$(files chunkd-4) files are left"
right || fail "a file changed"
clean
dfs node undrain "${KEY[@]}" "$(node chunkd-4)"
refused 1 'there is no chunk daemon 77' dfs node drain "${KEY[@]}" 77

step "a new daemon takes its share"
for i in 1 2 3 4 5; do
    crash "chunkd-$i"
    sed -i '1i capacity = "600MiB"' "$HOME_DIR/conf/chunkd-$i.toml"
    start "chunkd-$i"
done
mkdir "$HOME_DIR/data/chunkd-6"
sed 's/chunkd-1/chunkd-6/g; s/^listen = .*/listen = "127.0.0.1:0"/; /^advertise/d' "$HOME_DIR/conf/chunkd-1.toml" >"$HOME_DIR/conf/chunkd-6.toml"
start chunkd-6
# Not by what they said before they were killed.
told='len(s["nodes"]) == 6 and all(n["state"] == "up" and n["total_bytes"] <= 600 << 20 for n in s["nodes"])'
wait_for 30 is "$told" || fail "not all daemons are up: $(dfs node ls)"
fills() { status "$1(n['used_bytes'] * 1000 // n['total_bytes'] for n in s['nodes'] if n['state'] == 'up')"; }
even() { (($(fills max) <= $(fills min) + 150)); }
wait_for 90 even || fail "not even: $(dfs node ls)"
(($(files chunkd-6) >= 2)) || fail "chunkd-6 has $(files chunkd-6) chunks"
wait_for 30 is "$whole" || fail "not whole: $(dfs status)"
right || fail "a file changed"
clean

step "any two of five daemons may die at once"
crash chunkd-1 chunkd-5
# Before they count as dead and others have made up for them.
refused 1 'on chunk daemons that are away' bash -c 'dfs fsck "$@" | grep -v "looked at"; exit "${PIPESTATUS[0]}"' _ "${KEY[@]}"
umount "$MNT"
up_with_dead() { timeout 60 dfs-mount --pid-file "$HOME_DIR/run/mount.pid" --log-file "$HOME_DIR/log/mount.log" "$MNT"; }
up_with_dead || fail "not mounted"
right || fail "a file is lost"
