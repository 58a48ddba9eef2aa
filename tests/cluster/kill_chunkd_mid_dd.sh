#!/usr/bin/env bash
# One chunk daemon is killed in the middle of a 1 GiB dd: dd succeeds and the data is right.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up
openssl enc -aes-128-ctr -nosalt -K 01 -iv 00 -in /dev/zero 2>/dev/null | head -c 1G >"$WORK/source" || true
dd if="$WORK/source" of="$MNT/copy" bs=1M status=none conv=fsync &
writer=$!
written() { [[ -e $MNT/copy ]] && (($(stat -c %s "$MNT/copy") > 200 << 20)); }
wait_for 60 written || fail "dd does not get on"
kill -0 $writer || fail "dd was done before the fault"
crash chunkd-2
step "killed chunkd-2 at $(stat -c %s "$MNT/copy") bytes"
wait $writer || fail "dd failed"
cmp "$WORK/source" "$MNT/copy" || fail "the copy differs"
step "read again by a fresh mount, and with the daemon back"
down
up
cmp "$WORK/source" "$MNT/copy" || fail "the copy differs after a restart"
