#!/usr/bin/env bash
# Three masters and five chunk daemons in network namespaces of their own: killed, stopped, cut off in one direction or both, their
# disks filled, the client's network cut, while fsx, git, sqlite and a writer that keeps what was fsynced work on two mounts (chaos.py).
# No program sees an error; in the end everything that was fsynced is there, every chunk is whole and fsck finds nothing.
# DFS_SECONDS: for how long (60); DFS_CHAOS_SEED: the one of a run that failed. Needs root.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
((EUID == 0)) || fail "network namespaces and tmpfs need root"
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
for program in ip nsenter nft fsx git; do
    command -v "$program" >/dev/null || fail "$program is missing (packages iproute2, util-linux, nftables, git; crate fsx 0.3.2)"
done
SEED=${DFS_CHAOS_SEED:-$((RANDOM * 32768 + RANDOM))}
step "seed $SEED (DFS_CHAOS_SEED=$SEED tests/cluster/chaos.sh chooses the same faults)"
export PYTHONDONTWRITEBYTECODE=1
mkdir "$WORK/chaos"
child=
at_end() {
    [[ -z $child ]] || ! kill -TERM "$child" 2>/dev/null || wait "$child" || true
}
timeout --kill-after=60 $((${DFS_SECONDS:-60} + 900)) python3 "$ROOT/tests/cluster/chaos.py" "$WORK/chaos" "${DFS_SECONDS:-60}" "$SEED" &
child=$!
if ! wait "$child"; then
    child=
    for log in "$WORK"/chaos/log/*.log; do
        echo "--- $log"
        grep -E 'WARN|ERROR|panic' "$log" | tail -n 12 || true
    done
    [[ -z ${DFS_KEEP:-} ]] || { cp -r "$WORK/chaos/log" "$DFS_KEEP"; echo "logs: $DFS_KEEP"; }
    fail "seed $SEED"
fi
child=
