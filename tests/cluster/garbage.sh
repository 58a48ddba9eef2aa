#!/usr/bin/env bash
# Whatever a stranger sends to the ports, the daemons live, files stay usable, memory is bounded and the log is not filled.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
head -c 3000000 /dev/urandom >"$WORK/keep"
cp "$WORK/keep" "$MNT/keep"
listen() { sed -n 's/^listen = "\(.*\)"$/\1/p' "$HOME_DIR/conf/$1.toml"; }
rss() { awk '/^VmRSS/ {print $2}' "/proc/$(pid "$1")/status"; }
lines() { wc -l <"$HOME_DIR/log/$1.log"; }
# A daemon that is used ordinarily has some memory of its own.
for _ in 1 2 3; do cp "$WORK/keep" "$MNT/again"; cmp "$WORK/keep" "$MNT/again"; done

for name in master-1 chunkd-1; do
    kind=${name%-*} process=$(pid "$name") before=$(rss "$name") said=$(lines "$name") most=0 slowest=0
    python3 "$ROOT/tests/cluster/garbage.py" "$(listen "$name")" "$kind" >"$WORK/cases" 2>"$WORK/garbage.err" &
    sender=$!
    while kill -0 $sender 2>/dev/null; do
        now=$(rss "$name") || fail "$name died: $(tail -n 1 "$WORK/cases")"
        ((now <= most)) || most=$now
        begin=$(date +%s%N)
        cat "$MNT/keep" | cmp - "$WORK/keep" || fail "a file cannot be read during: $(tail -n 1 "$WORK/cases")"
        echo x >"$MNT/written" || fail "no file can be written during: $(tail -n 1 "$WORK/cases")"
        took=$((($(date +%s%N) - begin) / 1000000))
        ((took <= slowest)) || slowest=$took
        sleep 0.1
    done
    wait $sender || { cat "$WORK/garbage.err"; fail "the sender of garbage failed after: $(tail -n 1 "$WORK/cases")"; }
    [[ $(pid "$name") == "$process" ]] && ! gone "$process" || fail "$name did not live on"
    cases=$(wc -l <"$WORK/cases") after=$(rss "$name") told=$(($(lines "$name") - said))
    step "$name: $cases cases, VmRSS $before KiB before, $most at most, $after after; $told lines in its log; a file was read and written in $slowest ms at most"
    ((cases >= 24)) || fail "only $cases cases"
    ((most < before + 400000)) || fail "$name took $most KiB"
    ((after < before + 250000)) || fail "$name keeps $after KiB"
    ((told < 60)) || { tail -n "$told" "$HOME_DIR/log/$name.log" | head -n 40; fail "$told lines in the log of $name"; }
done
cmp "$WORK/keep" "$MNT/keep" || fail "a file has changed"
dfs fsck --cluster-key-file "$HOME_DIR/cluster.key" --deep || fail "fsck found something"
