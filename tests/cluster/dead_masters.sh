#!/usr/bin/env bash
# A list of masters of which most are dead: refused, or nobody answers at all. Mounting and the way to a new leader stay quick. All of
# it in a network namespace of its own, in which a port can be made to answer nothing.
if [[ -z ${DFS_OWN_NETNS:-} ]]; then
    ((EUID == 0)) || { echo "FAIL: a network namespace needs root" >&2; exit 1; }
    DFS_OWN_NETNS=1 exec unshare --net -- "${BASH_SOURCE[0]}"
fi
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
need nft "package nftables"
SECOND=$WORK/second
mkdir "$SECOND"
at_end() { umount -l "$SECOND" 2>/dev/null || true; }
ip link set lo up
up --masters 3
. "$HOME_DIR/cluster.env"

# Ports 1001 to 1009 answer nothing, 1010 refuses.
nft -f - <<'NFT'
table inet dead {
    chain in { type filter hook input priority 0; tcp dport 1001-1009 counter drop; }
}
NFT
dead=127.0.0.1:1001,127.0.0.1:1002,127.0.0.1:1010,127.0.0.1:1003,127.0.0.1:1004
milliseconds() { # COMMAND…
    local began=${EPOCHREALTIME/./}
    "$@" || return
    echo $(((${EPOCHREALTIME/./} - began) / 1000))
}
for order in "$dead,$DFS_MASTERS" "127.0.0.1:1001,$DFS_MASTERS,127.0.0.1:1002"; do
    took=$(milliseconds timeout 60 dfs-mount -o timeout=20 --pid-file "$WORK/second.pid" --log-file "$WORK/second.log" --masters "$order" "$SECOND") || fail "no mount"
    ((took < 4000)) || fail "mounting took $took ms"
    step "$order: mounted after $took ms"
    echo "$took" >"$SECOND/file"
    process=$(cat "$WORK/second.pid")
    umount "$SECOND"
    wait_for 20 gone "$process" || fail "dfs-mount does not end"
done

step "the leader dies while most of the list is dead"
export DFS_MASTERS="$dead,$DFS_MASTERS"
timeout 60 dfs-mount -o timeout=30 --pid-file "$WORK/second.pid" --log-file "$WORK/second.log" "$SECOND" || fail "no mount"
leader() {
    timeout 20 dfs status --json | python3 -c '
import json, sys
print(next("master-%d" % m["id"] for m in json.load(sys.stdin)["masters"] if m["leader"]))'
}
for round in 1 2; do
    name=$(leader) || fail "no leader"
    echo before >"$SECOND/round$round"
    crash "$name"
    took=$(milliseconds mkdir "$SECOND/dir$round") || fail "an operation failed"
    ((took < 8000)) || { tail -n 20 "$WORK/second.log"; fail "an operation stood still for $took ms"; }
    step "round $round: $name killed, the next operation took $took ms"
    "$ROOT/scripts/quickstart" --home "$HOME_DIR" "$MNT" >"$WORK/up.log" 2>&1 || { cat "$WORK/up.log"; fail "quickstart"; }
done
(($(nft -j list table inet dead | python3 -c '
import json, sys
print(sum(e["counter"]["packets"] for i in json.load(sys.stdin)["nftables"] if "rule" in i for e in i["rule"]["expr"] if "counter" in e))') > 0)) ||
    fail "no dead address was tried"
