#!/usr/bin/env bash
# Random system calls of several processes, on a mount and on ext4 side by side: no difference (tests/model/).
# DFS_MODEL_OPERATIONS: how many for each seed; DFS_MODEL_SEEDS: which seeds.
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"
REFERENCE=$WORK/reference
mkdir "$REFERENCE"
at_end() { ! mountpoint -q "$REFERENCE" || umount "$REFERENCE"; }
if [[ $(stat -f -c %T "$WORK") != ext2/ext3 ]]; then
    truncate -s 512M "$WORK/ext4"
    mkfs.ext4 -q "$WORK/ext4"
    mount -o loop "$WORK/ext4" "$REFERENCE"
fi
up
for seed in ${DFS_MODEL_SEEDS:-1 2}; do
    mkdir -p "$MNT/seed$seed" "$REFERENCE/seed$seed"
    timeout 1800 dfs-model --mount "$MNT/seed$seed" --reference "$REFERENCE/seed$seed" \
        --operations "${DFS_MODEL_OPERATIONS:-20000}" --seed "$seed" || fail "seed $seed"
done
