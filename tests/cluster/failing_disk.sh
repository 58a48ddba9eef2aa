#!/usr/bin/env bash
# The disk under a master's data directory fails a sync: the program ends with status 1 and one line, and when it is started again, on a
# disk that works, everything is there that it had acknowledged.
# The disk is a loop device whose sparse file lies on a tmpfs: when that one is full, what the file system believes to have room for
# cannot be written, and fdatasync says so.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
((EUID == 0)) || { echo "needs root: it mounts a loop device"; exit 0; }
command -v mke2fs >/dev/null || { echo "needs mke2fs"; exit 0; }
MEDIUM=$WORK/medium DATA=$WORK/disk
master='' count=0
at_end() {
    [[ ! $master ]] || kill -KILL "$master" 2>/dev/null || true
    ! mountpoint -q "$DATA" || umount -l "$DATA"
    ! mountpoint -q "$MEDIUM" || umount -l "$MEDIUM"
}
mkdir "$MEDIUM" "$DATA"
mount -t tmpfs -o size=64m dfs-test "$MEDIUM"
truncate -s 1G "$MEDIUM/image"
mke2fs -q -t ext4 -O ^has_journal "$MEDIUM/image"
mount -o loop,errors=continue "$MEDIUM/image" "$DATA" 2>/dev/null || { echo "needs loop devices"; exit 0; }

PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export DFS_MASTERS=127.0.0.1:$PORT
head -c 32 /dev/urandom | base64 >"$WORK/key"
cat >"$WORK/master.toml" <<TOML
id = 1
listen = "$DFS_MASTERS"
data = "$DATA/master"
cluster_key_file = "$WORK/key"
reserve = "8MiB"
TOML
ready() { dfs status --ready 0 2>/dev/null; }
start() {
    dfs-master --config "$WORK/master.toml" 2>"$1" &
    master=$!
    wait_for 30 ready || { cat "$1"; fail "the master does not start"; }
}
make() { # SECONDS
    dfs mkdir --timeout "$1" "/d$((count + 1))" 2>"$WORK/refused" && count=$((count + 1))
}

start "$WORK/first"
for _ in 1 2 3 4 5; do make 30 || fail "no directory: $(cat "$WORK/refused")"; done
dd if=/dev/zero of="$MEDIUM/filler" bs=64K 2>/dev/null || true
for ((i = 0; i < 2000; i++)); do make 5 || break; done
((i < 2000)) || fail "2000 directories were made on a disk that fails"
step "$count directories were acknowledged, then: $(cat "$WORK/refused")"
wait_for 10 gone "$master" || fail "the master goes on after a failed sync"
status=0
wait "$master" || status=$?
((status == 1)) || fail "the master ended with $status instead of 1"
(($(grep -c '^dfs-master: ' "$WORK/first") == 1)) || { cat "$WORK/first"; fail "not one line"; }
grep '^dfs-master: ' "$WORK/first" | tee "$WORK/line"
grep -qE 'No space left|Input/output error' "$WORK/line" || fail "the line does not say why"

rm "$MEDIUM/filler"
start "$WORK/second"
for ((i = 1; i <= count; i++)); do echo "d$i"; done | sort >"$WORK/wanted"
dfs ls / | sort >"$WORK/there"
[[ -z $(comm -23 "$WORK/wanted" "$WORK/there") ]] || fail "lost: $(comm -23 "$WORK/wanted" "$WORK/there" | tr '\n' ' ')"
count=$((count + 1))
# The last client did not say goodbye: what it may have cached waits until its session has expired.
make 60 || fail "no directory after the restart: $(cat "$WORK/refused")"
dfs fsck --cluster-key-file "$WORK/key" || fail "fsck found something"
kill -TERM "$master"
wait "$master" || fail "the master does not stop as it should"
master=''
