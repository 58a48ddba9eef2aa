#!/usr/bin/env bash
# Three masters and five chunk daemons in network namespaces of their own: killed, stopped, cut off in one direction or both, their
# disks filled, the client's network cut, while fsx, git, sqlite and a writer that keeps what was fsynced work on two mounts (chaos.py).
# No program sees an error; in the end everything that was fsynced is there, every chunk is whole and fsck finds nothing.
# DFS_SECONDS: for how long (60); DFS_CHAOS_SEED: the one of a run that failed. Needs root.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
need "ip nsenter nft fsx git" "packages iproute2, util-linux, nftables, git; crate fsx 0.3.2"
SEED=${DFS_CHAOS_SEED:-$((RANDOM * 32768 + RANDOM))}
step "seed $SEED (DFS_CHAOS_SEED=$SEED tests/cluster/chaos.sh chooses the same faults)"
in_namespaces $((${DFS_SECONDS:-60} + 900)) chaos "${DFS_SECONDS:-60}" "$SEED"
