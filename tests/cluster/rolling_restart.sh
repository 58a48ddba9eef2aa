#!/usr/bin/env bash
# Masters and chunk daemons are stopped and started again one after another while files are written: no program sees an error.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --masters 3 --chunkds 5
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
KEY=(--cluster-key-file "$HOME_DIR/cluster.key")
WRITER=$ROOT/tests/cluster/writer.py

for seed in 1 2; do
    python3 "$WRITER" "$MNT/w$seed" $seed >"$WORK/sums.$seed" 2>"$WORK/writer.$seed" &
    writers+=($!)
done
at_end() { kill "${writers[@]}" 2>/dev/null || true; }
written() { cat "$WORK"/sums.* | wc -l; }
more() { (($(written) >= $1)); }
writing() {
    local pid
    for pid in "${writers[@]}"; do kill -0 "$pid" 2>/dev/null || { cat "$WORK"/writer.*; fail "a writing program saw an error while $1"; }; done
}
wait_for 60 more 20 || fail "the writers do not get on"

for name in chunkd-{1..5} master-{1..3}; do
    old=$(pid "$name") before=$(written)
    kill -TERM "$old"
    wait_for 20 gone "$old" || fail "$name does not stop"
    writing "$name was away"
    # Something is written without it.
    wait_for 60 more $((before + 4)) || fail "nothing is written without $name"
    up
    [[ $(pid "$name") != "$old" ]] || fail "$name was not started again"
    wait_for 60 more $((before + 8)) || fail "nothing is written after $name came back"
    writing "$name came back"
    step "$name, $(written) files"
done

for pid in "${writers[@]}"; do kill -TERM "$pid"; done
for pid in "${writers[@]}"; do wait "$pid" || { cat "$WORK"/writer.*; fail "a writing program saw an error"; }; done
sed 's/^/  /' "$WORK"/writer.*
writers=()
sha256sum --quiet -c "$WORK"/sums.* || fail "a file is lost or wrong"
clean() { dfs fsck "${KEY[@]}" --deep >"$WORK/fsck" 2>&1; }
wait_for 90 clean || { cat "$WORK/fsck"; fail "fsck found something"; }
down
up
sha256sum --quiet -c "$WORK"/sums.* || fail "a file is lost or wrong after a restart of everything"
