#!/usr/bin/env bash
# The network of a client is cut, for less and for longer than its session lives, while programs write, read, lock and change names on
# a soft mount and on a hard one, and another client changes the same files (cut.py).
# DFS_CUT_SECONDS: how long the long cuts last (30); DFS_SESSION_TTL: how long a session lives, in seconds (8). Needs root.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
((EUID == 0)) || fail "network namespaces need root"
for program in ip nsenter nft; do
    command -v "$program" >/dev/null || fail "$program is missing (packages iproute2, util-linux, nftables)"
done
mkdir "$WORK/cut"
child=
at_end() {
    [[ -z $child ]] || ! kill -TERM "$child" 2>/dev/null || wait "$child" || true
}
export PYTHONDONTWRITEBYTECODE=1
timeout --kill-after=60 900 python3 "$ROOT/tests/cluster/cut.py" "$WORK/cut" "${DFS_CUT_SECONDS:-30}" "${DFS_SESSION_TTL:-8}" &
child=$!
if ! wait "$child"; then
    child=
    for log in "$WORK"/cut/log/*.log; do
        echo "--- $log"
        grep -E 'WARN|ERROR|panic' "$log" | tail -n 12 || true
    done
    [[ -z ${DFS_KEEP:-} ]] || { cp -r "$WORK/cut/log" "$DFS_KEEP"; echo "logs: $DFS_KEEP"; }
    fail "cut"
fi
child=
