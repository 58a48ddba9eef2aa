#!/usr/bin/env bash
# pjdfstest (https://crates.io/crates/pjdfstest) on a fresh mount, with one master and with three: nothing fails, and no
# more is skipped than on ext4.
#
# Skipped on any FUSE file system: link_count_max, as pathconf(_PC_LINK_MAX) of glibc does not know FUSE (the limit has a
# test of ours), and those that remount.
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"
mkdir "$WORK/other"
cat >"$WORK/pjdfstest.toml" <<TOML
[features]
secondary_fs = "$WORK/other"
posix_fallocate = {}
utimensat = {}
rename_ctime = {}
utime_now = {}

[settings]
naptime = 0.001
allow_remount = false

[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"], ["bin", "bin"]]
TOML
SKIPPED_MAX=15
for masters in 1 3; do
    up --masters "$masters"
    status=0
    # The programs that it runs as other users must reach the mount.
    chmod 755 "$WORK"
    chmod 755 "$MNT"
    timeout 600 pjdfstest -c "$WORK/pjdfstest.toml" -p "$MNT" >"$WORK/pjdfstest.log" 2>&1 || status=$?
    summary=$(grep '^Summary: ' "$WORK/pjdfstest.log" || true)
    failed=$(grep -oE '[0-9]+ failed' <<<"$summary" | grep -oE '[0-9]+' || echo none)
    skipped=$(grep -oE '[0-9]+ skipped' <<<"$summary" | grep -oE '[0-9]+' || echo none)
    passed=$(grep -oE '[0-9]+ passed' <<<"$summary" | grep -oE '[0-9]+' || echo none)
    step "$masters masters: $passed passed, $failed failed, $skipped skipped"
    if ((status != 0)) || [[ $failed != 0 || $skipped == none ]] || ((skipped > SKIPPED_MAX || passed < 300)); then
        grep -A12 -E 'FAILED|skipped' "$WORK/pjdfstest.log" | head -n 150
        fail "pjdfstest ended with $status"
    fi
    down
    rm -rf "$HOME_DIR"
done
