#!/usr/bin/env bash
# What docs/SEMANTICS.md promises (tests/posix/promises.py), on a disk of the cluster's own; then what takes a restart or
# a full disk to show.
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"
HOME_DIR=$WORK/disk/home
at_end() { ! mountpoint -q "$WORK/disk" || { "$ROOT/scripts/quickstart" --down --force --home "$HOME_DIR" >/dev/null 2>&1; umount "$WORK/disk"; }; }
truncate -s 3G "$WORK/disk.img"
mkfs.ext4 -q "$WORK/disk.img"
mkdir "$WORK/disk"
mount -o loop "$WORK/disk.img" "$WORK/disk"
up
chmod 755 "$WORK" "$MNT"
mkdir "$MNT/promises"
chmod 755 "$MNT/promises"
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
timeout 600 python3 "$ROOT/tests/posix/promises.py" "$MNT/promises" "$@" 2>"$WORK/promises.log" || { cat "$WORK/promises.log"; fail "a promise is broken"; }
step "$(grep -E '^Ran ' "$WORK/promises.log")"

step "an unlinked file and its lock outlive a master's restart"
cat >"$WORK/holder.py" <<'PY'
import fcntl, os, sys
fd = os.open(os.path.join(sys.argv[1], "held"), os.O_RDWR | os.O_CREAT)
other = os.open(os.path.join(sys.argv[1], "locked"), os.O_RDWR | os.O_CREAT)
os.write(fd, b"before")
os.unlink(os.path.join(sys.argv[1], "held"))
fcntl.flock(other, fcntl.LOCK_EX)
print("ready")
input()
assert os.pread(fd, 100, 0) == b"before", "lost"
os.pwrite(fd, b" and after", 6)
os.fsync(fd)
assert os.pread(fd, 100, 0) == b"before and after" and os.fstat(fd).st_nlink == 0
print("good")
PY
coproc HOLDER { python3 -u "$WORK/holder.py" "$MNT"; }
HOLDER_IN=${HOLDER[1]} HOLDER_OUT=${HOLDER[0]} HOLDER_ID=$HOLDER_PID
read -r -t 20 -u "$HOLDER_OUT" said && [[ $said == ready ]] || fail "the holder does not begin"
crash master-1
"$ROOT/scripts/quickstart" --home "$HOME_DIR" "$MNT" >"$WORK/again.log" 2>&1 || { cat "$WORK/again.log"; fail "the master does not come back"; }
if flock --nonblock "$MNT/locked" true; then fail "the lock was lost"; fi
echo >&"$HOLDER_IN"
read -r -t 60 -u "$HOLDER_OUT" said && [[ $said == good ]] || fail "the holder lost its file"
wait "$HOLDER_ID" || fail "the holder failed"
timeout 20 flock "$MNT/locked" true || fail "the lock outlives its holder"

step "a full cluster says so and loses nothing"
head -c 1M /dev/urandom >"$WORK/kept"
cp "$WORK/kept" "$MNT/kept"
if dd if=/dev/zero of="$MNT/filler" bs=1M count=3000 conv=fsync 2>"$WORK/dd.log"; then fail "more was written than there is room for"; fi
grep -q 'No space left on device' "$WORK/dd.log" || { cat "$WORK/dd.log"; fail "another error than ENOSPC"; }
cmp "$WORK/kept" "$MNT/kept"
rm "$MNT/filler"
