#!/usr/bin/env bash
# The disk of a master's data directory is full: changes get ENOSPC, reads go on, nothing is lost, no master ends, and changes are
# taken again by themselves when there is room. Of three masters it takes two full disks before a program notices anything.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
((EUID == 0)) || { echo "needs root: it mounts small tmpfs"; exit 0; }
at_end() {
    local n
    "$ROOT/scripts/quickstart" --down --force --home "$HOME_DIR" >/dev/null 2>&1 || true
    for n in 1 2 3; do ! mountpoint -q "$HOME_DIR/data/master-$n" || umount "$HOME_DIR/data/master-$n"; done
}

small_disks() { # COUNT: gives each master's data directory a file system of 64 MiB
    local n
    down
    for ((n = 1; n <= $1; n++)); do
        mv "$HOME_DIR/data/master-$n" "$HOME_DIR/data/old-$n"
        mkdir "$HOME_DIR/data/master-$n"
        mount -t tmpfs -o size=64m,mode=700 dfs-test "$HOME_DIR/data/master-$n"
        cp -a "$HOME_DIR/data/old-$n/." "$HOME_DIR/data/master-$n/"
        rm -r "$HOME_DIR/data/old-$n"
        sed -i '1i reserve = "8MiB"' "$HOME_DIR/conf/master-$n.toml"
    done
    up
}
fill() { dd if=/dev/zero of="$HOME_DIR/data/master-$1/filler" bs=64K 2>/dev/null || true; }
empty() { rm -f "$HOME_DIR/data/master-$1/filler"; }
# What a program sees that makes a file, writes, fsyncs and renames it: "ok", or the errno's name.
try() { # NAME
    timeout 60 python3 - "$MNT/$1" <<'PY'
import errno, os, sys
try:
    with open(sys.argv[1] + ".new", "w") as file:
        file.write(sys.argv[1])
        file.flush()
        os.fsync(file.fileno())
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    print("ok")
except OSError as error:
    print(errno.errorcode[error.errno])
PY
}
count=0
put() { # makes a file that must be there from now on
    local seen
    count=$((count + 1))
    seen=$(try "f$count")
    [[ $seen == ok ]] || fail "f$count: $seen"
}
whole() {
    local n
    for ((n = 1; n <= count; n++)); do
        [[ $(cat "$MNT/f$n") == "$MNT/f$n" ]] || fail "f$n is lost or has other bytes"
    done
}
full() { [[ $(try full) == ENOSPC ]]; }
roomy() { [[ $(try roomy) == ok ]]; }
leader() { dfs status --json | python3 -c 'import json, sys; print(next(m["id"] for m in json.load(sys.stdin)["masters"] if m["leader"]))'; }
has_leader() { leader >/dev/null 2>&1; }

up
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
small_disks 1
for _ in 1 2 3 4 5; do put; done
before=$(pid master-1)
# A program that has a file open all the while: it writes when the disk is full.
timeout 120 python3 - "$MNT/open" "$WORK/go" >"$WORK/open.out" <<'PY' &
import errno, os, sys, time
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
print("open", flush=True)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
try:
    os.write(file, b"more")
    os.fsync(file)
    print("ok")
except OSError as error:
    print(errno.errorcode[error.errno])
PY
writer=$!
wait_for 20 grep -qs open "$WORK/open.out" || fail "no file was opened"
fill 1
wait_for 20 full || fail "a full disk: $(try full)"
for _ in 1 2 3 4 5; do
    seen=$(try full)
    [[ $seen == ENOSPC ]] || fail "a full disk: $seen"
done
whole
touch "$WORK/go"
wait "$writer" || fail "the program with the open file did not end"
[[ $(tail -n 1 "$WORK/open.out") == ENOSPC ]] || fail "fsync of an open file: $(tail -n 1 "$WORK/open.out")"
! gone "$before" || fail "the master has ended"
step "one master, no byte free: ENOSPC, reads go on"
crash master-1
up # with the full disk
whole
seen=$(try full)
[[ $seen == ENOSPC ]] || fail "a full disk after a restart: $seen"
before=$(pid master-1)
empty 1
wait_for 20 roomy || fail "no changes although there is room: $(try roomy)"
[[ $(pid master-1) == "$before" ]] && ! gone "$before" || fail "it took a restart"
put
whole
step "it was started with the full disk; with room again it takes changes"
for _ in 1 2 3; do # to and fro
    fill 1
    wait_for 20 full || fail "full again: $(try full)"
    empty 1
    wait_for 20 roomy || fail "room again: $(try roomy)"
done
put
whole
dfs fsck --cluster-key-file "$HOME_DIR/cluster.key" >/dev/null || fail "fsck"
at_end
rm -rf "$HOME_DIR"

count=0
up --masters 3
. "$HOME_DIR/cluster.env"
small_disks 3
put
declare -A started=()
for n in 1 2 3; do started[$n]=$(pid "master-$n"); done
wait_for 20 has_leader || fail "no leader"
lead=$(leader)
follower=$((lead % 3 + 1))
fill "$follower"
for _ in $(seq 20); do put; done
whole
[[ $(leader) == "$lead" ]] || fail "the leader has changed"
step "the disk of a follower is full: nobody notices"
empty "$follower"
has_room() { [[ $(df --output=avail "$HOME_DIR/data/master-$1" | tail -n 1) -gt 12000 ]]; }
wait_for 20 has_room "$follower"
put
fill "$lead"
for _ in $(seq 20); do put; done
other() { second=$(leader 2>/dev/null) && [[ $second && $second != "$lead" ]]; }
wait_for 20 other || fail "master $lead still leads, and its disk is full"
tries=$(grep -c "another one with room is to lead" "$HOME_DIR/log/master-$lead.log")
((tries <= 2)) || fail "it took $tries attempts to hand over"
for _ in $(seq 20); do put; done
whole
step "the disk of the leader is full: another one leads"
fill "$second"
wait_for 30 full || fail "two full disks of three: $(try full)"
whole
for n in 1 2 3; do ! gone "${started[$n]}" || fail "master-$n has ended"; done
step "two of three: ENOSPC"
empty "$lead"
empty "$second"
wait_for 30 roomy || fail "no changes although there is room: $(try roomy)"
put
whole
for n in 1 2 3; do ! gone "${started[$n]}" || fail "master-$n has ended"; done
caught_up() {
    dfs master ls --json | python3 -c 'import json, sys; logs = [m["matched"] for m in json.load(sys.stdin)]; sys.exit(max(logs) - min(logs) > 5)'
}
wait_for 30 caught_up || fail "they do not come together: $(dfs master ls)"
dfs fsck --cluster-key-file "$HOME_DIR/cluster.key" >/dev/null || fail "fsck"
