#!/usr/bin/env bash
# The file system stressors of stress-ng with --verify: whatever passes on this machine's own file system passes here.
# STRESS_SECONDS: how long each runs.
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"
OWN=$WORK/own
mkdir "$OWN"
# Not about the file system under test: they work on /proc, /sys, /dev or on one that they mount themselves.
ELSEWHERE="binderfs bind-mount close dev efivar fd-fork handle-self procfs ramfs sysfs umount unshare tmpfs"
# Kernel features that no FUSE file system has; the stressor demands them.
#   fiemap  extents on a disk: there is none below a network file system
#   lease   F_SETLEASE on a FUSE file: the kernel refuses it (EINVAL) unless the file system has leases of its own
#   verity  fs-verity is a feature of ext4, f2fs and btrfs
NOT_ON_FUSE="fiemap verity"
up
chmod 755 "$WORK"
stress-ng --class filesystem? >/dev/null 2>&1 || true
mapfile -t all < <(stress-ng --class 'filesystem?' 2>&1 | sed -n "s/.*class 'filesystem' stressors: //p" | tr ' ' '\n' | grep .)
((${#all[@]} > 30)) || fail "stress-ng names ${#all[@]} stressors"
run() { # DIR STRESSOR
    (cd "$1" && timeout 120 stress-ng --temp-path "$1" --"$2" 2 --timeout "${STRESS_SECONDS:-2}s" --verify --oomable) \
        >"$WORK/stress.log" 2>&1
}
good=0 same=()
for stressor in "${all[@]}"; do
    [[ " $ELSEWHERE $NOT_ON_FUSE " != *" $stressor "* ]] || continue
    status=0
    run "$MNT" "$stressor" || status=$?
    if ((status == 0)); then
        good=$((good + 1))
        continue
    fi
    cp "$WORK/stress.log" "$WORK/stress.$stressor"
    if run "$OWN" "$stressor"; then
        cat "$WORK/stress.$stressor"
        BAD="${BAD:-} $stressor($status)"
    else
        same+=("$stressor")
    fi
done
step "$good stressors passed; as on this machine's own file system, these did not: ${same[*]:-none}"
[[ -z ${BAD:-} ]] || fail "only on dfs:$BAD"
((good > 25)) || fail "only $good stressors ran"
