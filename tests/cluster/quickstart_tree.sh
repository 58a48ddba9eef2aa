#!/usr/bin/env bash
# What people do with a fresh mount: a source tree, git, sqlite, big, sparse and many files; all there after a restart.
# DFS_TEST_BIG_MIB: size of the big file (default 1024; the full check is 4096).
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
BIG=${DFS_TEST_BIG_MIB:-1024}
MANY=${DFS_TEST_MANY:-100000}

make_tree "$WORK/tree"
tar -C "$WORK/tree" --format=posix -cf "$WORK/tree.tar" .   # nanoseconds
up

step "untar, diff"
mkdir "$MNT/tree"
tar -C "$MNT/tree" -xpf "$WORK/tree.tar"

step "git"
git init -q "$MNT/repo"
cp -r "$WORK/tree/pkg1" "$WORK/tree/pkg2" "$MNT/repo/"
git -C "$MNT/repo" add -A
git -C "$MNT/repo" commit -qm first
git -C "$MNT/repo" rev-parse HEAD >"$WORK/head"

step "sqlite: 1,000 transactions"
python3 - "$MNT/t.db" <<'PY'
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("create table t(a integer primary key, b text)")
for i in range(1000):
    db.execute("insert into t(b) values(?)", (str(i) * 20,))
PY

step "a file of $BIG MiB"
openssl enc -aes-128-ctr -nosalt -K 00 -iv 00 -in /dev/zero 2>/dev/null | head -c $((BIG << 20)) | tee "$MNT/big" | sha256sum >"$WORK/big.sum" || true
[[ $(stat -c %s "$MNT/big") == $((BIG << 20)) ]] || fail "the big file is short"

step "a sparse file of 1 TiB"
python3 - "$MNT/sparse" <<'PY'
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 40)
for at in (0, 1 << 30, (1 << 40) - 4):
    os.pwrite(fd, b"dots", at)
os.fsync(fd)
PY

step "$MANY files in one directory"
mkdir "$MNT/many"
python3 - "$MNT/many" "$MANY" <<'PY'
import os, sys
for i in range(int(sys.argv[2])):
    os.close(os.open(f"{sys.argv[1]}/n{i:06}", os.O_CREAT | os.O_WRONLY))
PY

verify() {
    diff -r --no-dereference "$WORK/tree" "$MNT/tree" || fail "the tree differs"
    [[ $(find "$MNT/tree" -type f | wc -l) == $(find "$WORK/tree" -type f | wc -l) ]] || fail "files are missing"
    (cd "$WORK/tree" && find . -type f -printf '%p %m %T@ %s %n\n' | sort) >"$WORK/a"
    (cd "$MNT/tree" && find . -type f -printf '%p %m %T@ %s %n\n' | sort) >"$WORK/b"
    diff "$WORK/a" "$WORK/b" >"$WORK/stat.diff" || { head "$WORK/stat.diff"; fail "modes, times, sizes or links differ"; }
    git -C "$MNT/repo" fsck --full || fail "git fsck"
    [[ $(git -C "$MNT/repo" rev-parse HEAD) == "$(cat "$WORK/head")" ]] || fail "git HEAD"
    [[ -z $(git -C "$MNT/repo" status --porcelain) ]] || fail "git status is not clean"
    [[ $(sqlite3 "$MNT/t.db" 'pragma integrity_check; select count(*) from t') == $'ok\n1000' ]] || fail "sqlite"
    [[ $(sha256sum <"$MNT/big") == "$(cat "$WORK/big.sum")" ]] || fail "the big file differs"
    python3 - "$MNT/sparse" <<'PY' || fail "the sparse file"
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
stat = os.fstat(fd)
assert stat.st_size == 1 << 40, stat
assert stat.st_blocks * 512 < 1 << 20, stat
for at in (0, 1 << 30, (1 << 40) - 4):
    assert os.pread(fd, 4, at) == b"dots", at
assert os.pread(fd, 65536, 1 << 35) == bytes(65536)
assert os.lseek(fd, 8 << 20, os.SEEK_DATA) <= 1 << 30
assert os.lseek(fd, 0, os.SEEK_HOLE) < 1 << 30
PY
    [[ $(ls -f "$MNT/many" | grep -c '^n') == "$MANY" ]] || fail "readdir lost or doubled names"
    [[ $(ls "$MNT/many" | sort -u | wc -l) == "$MANY" ]] || fail "readdir doubled names"
}
step "verify"
verify
step "down and up"
down
! grep -q " $MNT " /proc/self/mountinfo || fail "still mounted"
up
verify
