#!/usr/bin/env bash
# Two of three masters are lost for good: the third becomes a group of one with what it has, and everything goes on.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --masters 3 --chunkds 3
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
KEY=(--cluster-key-file "$HOME_DIR/cluster.key")
WRITER=$ROOT/tests/cluster/writer.py
DATA=$HOME_DIR/data

status() { dfs status --json | python3 -c "import json, sys; s = json.load(sys.stdin); print($1)"; }
is() { [[ $(status "$1" 2>/dev/null) == "${2:-True}" ]]; }
clean() { dfs fsck "${KEY[@]}" --deep >"$WORK/fsck" 2>&1; }
whole='s["under_replicated"] == 0 and s["waiting_seal"] == 0 and s["repair"]["waiting"] + s["repair"]["copying"] == 0 and s["repair"]["flawed"] == 0'

: >"$WORK/sums"
python3 "$WRITER" "$MNT/w" 1 >"$WORK/sums" 2>"$WORK/writer" &
writer=$!
at_end() { kill "$writer" 2>/dev/null || true; }
more() { (($(wc -l <"$WORK/sums") >= $1)); }
wait_for 120 more 60 || fail "the writer does not get on"
kill -TERM $writer
wait $writer || { cat "$WORK/writer"; fail "the writer saw an error"; }
# What a follower may not have yet, it has in a moment.
applied=$(status 's["applied"]')
caught_up() { is "all(m['leader'] or m['matched'] >= $applied for m in s['masters'])"; }
wait_for 30 caught_up || fail "a follower stays behind: $(dfs status)"
leader=$(status '[m["id"] for m in s["masters"] if m["leader"]][0]')
survivor=$((leader % 3 + 1))
step "master $leader leads; of all masters $survivor, a follower, is left"
CONF=$HOME_DIR/conf/master-$survivor.toml
umount "$MNT"
refused 2 'others-are-lost' dfs-master recover --config "$CONF"
refused 1 'in use by another process' dfs-master recover --config "$CONF" --others-are-lost
crash master-1 master-2 master-3
mkdir "$WORK/lost"
for id in 1 2 3; do ((id == survivor)) || mv "$DATA/master-$id" "$WORK/lost"; done
refused 2 "no master's data" dfs-master recover --config "$HOME_DIR/conf/master-$leader.toml" --others-are-lost
[[ ! -e $DATA/master-$leader ]] || fail "a refused recovery made $DATA/master-$leader"
dfs-master recover --config "$CONF" --others-are-lost || fail "not recovered"
[[ -e $DATA/master-$survivor/before-recovery/IDENTITY ]] || fail "what was there before is gone"

up
is '[m["id"] for m in s["masters"]]' "[$survivor]" || fail "not a group of one: $(dfs status)"
sha256sum --quiet -c "$WORK/sums" || fail "a file is lost"
wait_for 90 is "$whole" || fail "not whole: $(dfs status)"
wait_for 60 clean || { cat "$WORK/fsck"; fail "fsck found something"; }
: >"$WORK/sums.after"
python3 "$WRITER" "$MNT/w" 2 >"$WORK/sums.after" 2>"$WORK/writer" &
writer=$!
again() { (($(wc -l <"$WORK/sums.after") >= 40)); }
wait_for 120 again || { cat "$WORK/writer"; fail "the writer does not get on"; }
kill -TERM $writer
wait $writer || { cat "$WORK/writer"; fail "the writer saw an error"; }

step "a lost master that comes back all the same is not heard"
back=$((6 - leader - survivor))
crash "master-$back"
rm -rf "$DATA/master-$back"
mv "$WORK/lost/master-$back" "$DATA"
up
told() { grep -q 'must be emptied' "$HOME_DIR"/log/master-*.log; }
wait_for 30 told || fail "nobody says that its directory must be emptied"
is '[m["id"] for m in s["masters"] if m["leader"]]' "[$survivor]" || fail "the survivor does not lead: $(dfs status)"
sha256sum --quiet -c "$WORK/sums" "$WORK/sums.after" || fail "a file is lost"
