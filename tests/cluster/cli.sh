#!/usr/bin/env bash
# The dfs command: files without a mount, seen at once by the mount; pipes, trees, errors, JSON.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
same() { [[ $1 == "$2" ]] || fail "'$1' instead of '$2'"; }

# The mount believes names and attributes for at most a second.
shows() { # FILE CONTENTS MODE
    matches() { [[ $(cat "$MNT/$1" 2>/dev/null) == "$2" && $(stat -c %a "$MNT/$1") == "$3" ]]; }
    wait_for 3 matches "$@" || fail "the mount shows '$(cat "$MNT/$1")', mode $(stat -c %a "$MNT/$1"), as $1"
}

step "put and get: a file over several chunks, a sparse one, pipes"
head -c 150M /dev/urandom >"$WORK/big"
dfs put "$WORK/big" /
cmp "$WORK/big" "$MNT/big" || fail "the mount shows other bytes"
dfs get /big "$WORK/back"
cmp "$WORK/big" "$WORK/back" || fail "get differs"
dfs put - /pipe <"$WORK/big"
dfs get /pipe - | cmp - "$WORK/big" || fail "pipes differ"
# Ends as if by SIGPIPE, without a word, like any tool.
statuses=$(set +o pipefail; dfs cat /pipe /pipe 2>"$WORK/said" | head -c 1 >/dev/null; echo "${PIPESTATUS[0]}")
[[ $statuses == 141 && ! -s $WORK/said ]] || fail "a reader that went is an error: $statuses $(cat "$WORK/said")"
truncate -s 10G "$WORK/sparse"
echo end | dd of="$WORK/sparse" bs=1 seek=$((5 << 30)) conv=notrunc status=none
dfs put "$WORK/sparse" /sparse
same "$(dfs stat --json /sparse | python3 -c 'import json, sys; s = json.load(sys.stdin)[0]; print(s["size"], s["blocks"] < 100000)')" "$((10 << 30)) True"
rm "$WORK/sparse"
dfs get /sparse "$WORK/sparse"
same "$(dd if="$WORK/sparse" bs=1 skip=$((5 << 30)) count=3 status=none)" end
same "$(stat -c %s "$WORK/sparse")" $((10 << 30))

step "put replaces whole files and keeps the mode"
echo one >"$MNT/mode"
chmod 640 "$MNT/mode"
echo two | dfs put - /mode
shows mode two 640
echo three | dfs put -n - /mode
same "$(dfs cat /mode)" two
[[ -z $(find "$MNT" -name '*.part') ]] || fail "temporary files stay"

step "append"
for i in 1 2 3; do echo "$i" | dfs append - /log; done
same "$(dfs cat /log)" $'1\n2\n3'
shows log $'1\n2\n3' 644

step "trees"
make_tree "$WORK/tree"
dfs put -rp "$WORK/tree" /
diff -r --no-dereference "$WORK/tree" "$MNT/tree" || fail "the tree differs"
dfs get -rp /tree "$WORK/tree2"
diff -r --no-dereference "$WORK/tree" "$WORK/tree2" || fail "the tree came back different"
(cd "$WORK/tree" && find . -type f -printf '%p %m %T@ %s\n' | sort) >"$WORK/a"
(cd "$WORK/tree2" && find . -type f -printf '%p %m %T@ %s\n' | sort) >"$WORK/b"
cmp "$WORK/a" "$WORK/b" || fail "-p lost modes or times"
same "$(dfs ls -R /tree/pkg1 | grep -c '^file0.rs$')" 10
same "$(dfs tree /tree | tail -n 1)" "220 directories, 4400 files"

step "set"
dfs mkdir -p /kept/below
dfs put "$0" /kept/below/before
dfs set -r --replicas 2 --chunk-size 1MiB /kept
dfs put "$0" /kept/below/after
for name in / /below /below/before /below/after; do
    dfs --json stat "/kept$name" | grep -q '"replicas": *2' || fail "/kept$name does not have 2 replicas"
done
copies() { dfs --json stat --chunks "/kept/below/$1" | python3 -c 'import json, sys; print(len(json.load(sys.stdin)[0]["slices"][0]["replicas"]))'; }
[[ $(copies after) == 2 ]] || fail "$(copies after) replicas of what was written since"
are() { [[ $(copies "$1") == "$2" ]]; }
wait_for 60 are before 2 || fail "$(copies before) replicas of what was written before"
dfs set --replicas default /kept/below/before
wait_for 60 are before 3 || fail "$(copies before) replicas, not as many as the default"
! dfs --json stat /kept/below/before | grep -q '"replicas": *2' || fail "the default does not come back"
refused 2 "1 to 9" dfs set --replicas 10 /kept
refused 2 "required" dfs set /kept
dfs rm -r /kept

step "mkdir, mv, ln, stat, rm"
dfs mkdir -p /a/b/c /a/b/c
ln -s b "$MNT/a/link"
dfs mv /log /a/link/
same "$(cat "$MNT/a/b/log" | wc -l)" 3
dfs mv /a/b/log /a/b/c/log2
same "$(dfs ls /a/link/c)" log2
same "$(dfs ls -l /a | awk '{ print $NF }' | sort | paste -sd ' ')" "b b"
dfs rm -r /a /tree
removed() { [[ ! -e $MNT/a && ! -e $MNT/tree ]]; }
wait_for 3 removed || fail "rm -r left something"
dfs rm -f /a || fail "rm -f of nothing"

step "the cluster's state"
same "$(dfs status --json | python3 -c 'import json, sys; s = json.load(sys.stdin); print(len(s["nodes"]), s["replicas"])')" "3 3"
# Under load a heartbeat may be late for a moment.
all_up() { [[ $(dfs node ls --json | python3 -c 'import json, sys; print({n["state"] for n in json.load(sys.stdin)})') == "{'up'}" ]]; }
wait_for 20 all_up || fail "not every chunk daemon is up"
dfs df >/dev/null
echo unsynced >"$MNT/s"
dfs sync "$MNT"
# Without a name it is every mount of this machine: what another one says is not ours to judge.
dfs sync --json >"$WORK/synced" 2>/dev/null || true
python3 -c 'import json, sys; sys.exit(sys.argv[1] not in json.load(open(sys.argv[2]))["synced"])' "$MNT" "$WORK/synced" ||
    fail "dfs sync leaves out the mount: $(cat "$WORK/synced")"
dfs status --sessions >"$WORK/status"
grep -q dfs-mount "$WORK/status" || fail "the mount's session is not shown"

step "bad input"
refused 1 "No such file or directory" dfs cat /nothing
refused 1 "No such file or directory" dfs put "$WORK/nothing" /
refused 1 "Is a directory" dfs put "$WORK/tree" /
refused 1 "File exists" dfs mkdir /big
refused 1 "refusing" dfs rm /
refused 1 "File name too long" dfs mkdir "/$(printf 'n%.0s' {1..256})"
refused 1 "no dfs is mounted" dfs sync /
refused 2 "colour" dfs ls --colour
refused 2 "bogus" dfs bogus
refused 2 "not an address" dfs --masters nonsense ls
refused 1 "127.0.0.1:1" dfs --masters 127.0.0.1:1 --timeout 1 ls
mkdir -p "$WORK/config/dfs"
echo 'colour = "red"' >"$WORK/config/dfs/config.toml"
refused 2 "colour" env XDG_CONFIG_HOME="$WORK/config" dfs ls
echo "masters = [\"${DFS_MASTERS%%,*}\"]" >"$WORK/config/dfs/config.toml"
env -u DFS_MASTERS XDG_CONFIG_HOME="$WORK/config" dfs ls / >/dev/null || fail "the user's settings are not read"

step "an interrupted put leaves nothing"
(sleep 3; true) | dfs put - /half &
putter=$!
started() { [[ $(dfs ls -a /) =~ (^|$'\n')\.half\.[^$'\n']*\.part($|$'\n') ]]; }
wait_for 20 started || fail "put does not begin"
kill -INT $putter
status=0
wait $putter || status=$?
((status == 130)) || fail "an interrupted put ended with $status"
[[ -z $(dfs ls -a / | grep half) ]] || fail "an interrupted put left something"
