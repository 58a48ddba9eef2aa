#!/usr/bin/env bash
# Real programs on a mount: what they make is what they make elsewhere.
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"
up
make_tree "$WORK/tree"
cd "$MNT"

step "tar"
mkdir tar
tar -C "$WORK/tree" --format=posix -cf - . | tar -C tar -xpf -
diff -r --no-dereference "$WORK/tree" tar
diff <(cd "$WORK/tree" && find . -printf '%p %m %s %T@ %n %y\n' | sed 's/ \([0-9]* [0-9.]* \)[0-9]* d$/ dir/' | sort) \
     <(cd tar && find . -printf '%p %m %s %T@ %n %y\n' | sed 's/ \([0-9]* [0-9.]* \)[0-9]* d$/ dir/' | sort)
tar -C tar --compare -f <(tar -C "$WORK/tree" --format=posix -cf - .)

step "rsync"
setfattr -n user.note -v "a value" "$WORK/tree/pkg1/mod1/file3.rs"
setfacl -m u:1:r,g:2:rw "$WORK/tree/pkg1/mod1/file4.rs"
setfacl -d -m u:1:rwx "$WORK/tree/pkg1/mod1"
rsync -aHAX "$WORK/tree/" rsync/
[[ -z $(rsync -aHAX --itemize-changes "$WORK/tree/" rsync/) ]] || fail "the second rsync finds something to do"
[[ -z $(rsync -aHAX --checksum --delete --itemize-changes rsync/ "$WORK/tree/") ]] || fail "rsync back finds something to do"

step "git"
git init -q repository
cp -r "$WORK/tree/." repository/
git -C repository add -A
git -C repository commit -qm "everything"
git clone -q repository clone
git -C clone fsck --strict 2>&1 | { ! grep -E "error|missing|corrupt"; }
[[ -z $(git -C clone status --porcelain) ]] || fail "a fresh clone is not clean"
git -C clone gc -q
git -C clone fsck --strict 2>&1 | { ! grep -E "error|missing|corrupt"; }

for mode in wal delete truncate persist; do
    step "sqlite3, journal_mode $mode"
    python3 - "db.$mode" "$mode" <<'PY'
import multiprocessing, sqlite3, sys
path, mode = sys.argv[1:]
base = sqlite3.connect(path, isolation_level=None)
assert base.execute(f"pragma journal_mode={mode}").fetchone()[0] == mode
base.execute("create table t(a integer primary key, who integer, b blob)")

def insert(who):
    mine = sqlite3.connect(path, isolation_level=None, timeout=60)
    for i in range(150):
        mine.execute("begin immediate")
        mine.execute("insert into t(who, b) values(?, ?)", (who, bytes([who]) * (i * 37 % 9000)))
        mine.execute("commit" if i % 10 else "rollback")

base.close()
writers = [multiprocessing.Process(target=insert, args=(n,)) for n in range(3)]
for w in writers: w.start()
for w in writers: w.join()
assert all(w.exitcode == 0 for w in writers)
base = sqlite3.connect(path)
assert base.execute("select count(*) from t").fetchone()[0] == 3 * 135
assert base.execute("pragma integrity_check").fetchone()[0] == "ok"
PY
done

step "cp --reflink=auto, cp --sparse, cp -a, cmp"
head -c 5000000 /dev/urandom >big
cp --reflink=auto big big.copy
cmp big big.copy
truncate -s 100M sparse
printf x | dd of=sparse bs=1 seek=50000000 conv=notrunc status=none
cp --sparse=always sparse sparse.copy
cmp sparse sparse.copy
(($(stat -c %b sparse.copy) * 512 < 2000000)) || fail "the copy of a sparse file takes $(stat -c %b sparse.copy) blocks"
cp -a tar tar.copy
diff -r --no-dereference tar tar.copy

step "find -newer"
touch -d '2020-01-01 00:00:00.5' old
touch -d '2020-01-01 00:00:00.500000001' new
[[ $(find . -maxdepth 1 -name new -newer old) == ./new && -z $(find . -maxdepth 1 -name old -newer new) ]] || fail "newer"

step "cargo build"
mkdir -p crate/src
printf '[package]\nname = "small"\nversion = "0.1.0"\nedition = "2024"\n[workspace]\n' >crate/Cargo.toml
printf 'fn main() { println!("{}", (1..=10).product::<u64>()); }\n' >crate/src/main.rs
(cd crate && unset CARGO_TARGET_DIR && cargo build -q --offline && ./target/debug/small | grep -qx 3628800)
sleep 1.1   # cargo tells by times what is fresh
(cd crate && unset CARGO_TARGET_DIR && cargo build --offline 2>&1 | { ! grep Compiling; }) || fail "cargo builds again"

step "save as vim does: write, fsync, rename"
python3 - <<'PY'
import os
for i in range(300):
    with open("note.tmp", "w") as f:
        f.write(f"version {i}\n")
        f.flush()
        os.fsync(f.fileno())
    os.rename("note.tmp", "note")
    assert open("note").read() == f"version {i}\n"
PY

step "rename as logrotate does, while a writer appends"
python3 - <<'PY'
import os, subprocess, sys, time
writer = subprocess.Popen([sys.executable, "-c", """
import os, sys
log = None
for i in range(20000):
    if i % 1000 == 0:
        if log is not None: os.close(log)
        log = os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, b'%d\\n' % i)
"""])
n = 0
while writer.poll() is None:
    time.sleep(0.02)
    if os.path.exists("log"):
        os.rename("log", f"log.{n:05}")
        n += 1
assert writer.returncode == 0 and n > 1, n
lines = []
for name in sorted(f for f in os.listdir(".") if f.startswith("log.")) + (["log"] if os.path.exists("log") else []):
    lines += open(name).read().split()
assert lines == [str(i) for i in range(20000)], len(lines)
PY
cd /
