#!/usr/bin/env bash
# Two mounts of one cluster: what one does the other sees (coherence.py), also when one is frozen, cut off or killed.
# DFS_ROUNDS: how many random rounds (2,000; the long form is 10,000); DFS_SECONDS: how long many work in one directory (10; 60).
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
SECOND=$WORK/second
mkdir "$SECOND"
second() { cat "$WORK/second.pid"; }
mount_second() { timeout 60 dfs-mount --pid-file "$WORK/second.pid" --log-file "$WORK/second.log" "$SECOND" || fail "no second mount"; }
at_end() {
    [[ ! -s $WORK/second.pid ]] || kill -CONT "$(second)" 2>/dev/null || true
    umount "$SECOND" 2>/dev/null || umount -l "$SECOND" 2>/dev/null || true
}
up
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
mount_second

DFS_ROUNDS=${DFS_ROUNDS:-2000} timeout 900 python3 "$ROOT/tests/cluster/coherence.py" "$MNT" "$SECOND" >"$WORK/coherence.log" 2>&1 || { cat "$WORK/coherence.log"; fail "the mounts do not show the same"; }
step "$(grep -E '^Ran ' "$WORK/coherence.log")"
grep -E 'slowest|writers' "$WORK/coherence.log" | sed 's/^.*\.\.\. /  /'

step "what is cached costs no message"
mkdir "$MNT/warm"
for i in {1..10}; do
    mkdir "$MNT/warm/$i"
    touch "$MNT/warm/$i/"{1..30}
done
requests() { dfs status --clients --json | python3 -c 'import json, sys; print(sum(s["requests"] for s in json.load(sys.stdin)["sessions"] if s["client"].endswith(sys.argv[1])))' "${1:-$MNT}"; }
warm() {
    ls -lR "$MNT/warm"
    # Not find(1): it asks for the file system's space.
    for _ in 1 2 3; do stat "$MNT"/warm/*/*; done
}
warm >/dev/null
# Access times are sent a few seconds later.
quiet() { local before; before=$(requests); sleep 4; [[ $(requests) == "$before" ]]; }
wait_for 60 quiet || fail "a mount that nobody uses asks the master all the time"
before=$(requests)
warm >"$WORK/warm"
after=$(requests)
(($(wc -l <"$WORK/warm") > 3000)) || fail "nothing was listed"
((after == before)) || fail "listing and looking at what is cached cost $((after - before)) messages"

step "what another mount has just made is listed with a few messages"
mkdir "$MNT/many"
(cd "$MNT/many" && seq -f %05g 3000 | xargs touch && for i in {00001..00300}; do echo "$i" >"$i"; done)
before=$(requests "$SECOND")
(($(ls -l "$SECOND/many" | wc -l) == 3001)) || fail "not everything was listed"
after=$(requests "$SECOND")
echo "  $((after - before)) messages for 3,000 files"
((after - before <= 20)) || fail "ls -l of 3,000 files cost $((after - before)) messages"
(($(ls -l "$SECOND/many" | awk '$5 == 6' | wc -l) == 300)) || fail "the sizes are not those that were written"

step "a mount that stands still for longer than its session lives: the other one goes on, and nothing is lost silently"
mkdir "$MNT/frozen"
cat >"$WORK/frozen.py" <<'PY'
import errno, os, signal, sys, time
first, second, pid = sys.argv[1], sys.argv[2], int(sys.argv[3])
def write(path, data):
    with open(path, "wb") as file:
        file.write(data)
write(f"{second}/read", b"old")
write(f"{second}/kept", b"old")
write(f"{second}/lost", b"old")
reader = os.open(f"{second}/read", os.O_RDONLY)
assert os.pread(reader, 10, 0) == b"old"
kept, lost = (os.open(f"{second}/{name}", os.O_RDWR) for name in ("kept", "lost"))
# Not committed yet when the mount stops.
os.pwrite(kept, b"second", 0)
os.pwrite(lost, b"second", 0)
os.kill(pid, signal.SIGSTOP)
began = time.monotonic()
write(f"{first}/read", b"new")
write(f"{first}/lost", b"first")
waited = time.monotonic() - began
assert waited < 60, f"the other mount waited for {waited:.0f} s"
os.kill(pid, signal.SIGCONT)
with open(f"{second}/read", "rb") as file:
    assert file.read() == b"new", "stale after the freeze"
end = time.monotonic() + 5
while os.pread(reader, 10, 0) != b"new":
    assert time.monotonic() < end, "a file that was open stays stale"
    time.sleep(0.01)
# Nobody else touched it: it goes on. Somebody else changed it: its writer is told.
os.fsync(kept)
with open(f"{first}/kept", "rb") as file:
    assert file.read() == b"second", "bytes that nobody was in the way of are lost"
try:
    os.fsync(lost)
    raise AssertionError("lost bytes without a word")
except OSError as error:
    assert error.errno == errno.EIO, error
with open(f"{first}/lost", "rb") as file:
    assert file.read() == b"first", "a client that was cut off has overwritten what came after"
print(f"waited {waited:.0f} s")
PY
timeout 200 python3 "$WORK/frozen.py" "$MNT/frozen" "$SECOND/frozen" "$(second)" >"$WORK/frozen.log" 2>&1 || { cat "$WORK/frozen.log"; tail -n 20 "$WORK/second.log"; fail "the frozen mount"; }
step "$(cat "$WORK/frozen.log")"

step "an evicted client loses what it held and comes back by itself"
sessions() { dfs status --clients --json | python3 -c 'import json, sys; [print(s["session"], s["leases"]) for s in json.load(sys.stdin)["sessions"] if s["client"].endswith(sys.argv[1])]' "$SECOND"; }
ls -l "$SECOND/frozen" >/dev/null
read -r session leases <<<"$(sessions)"
((leases > 0)) || fail "no leases are shown"
refused 1 'no session 999999' dfs client evict 999999 --cluster-key-file "$HOME_DIR/cluster.key"
printf 'the key of another cluster' >"$WORK/other.key"
refused 1 'proof is wrong' dfs client evict "$session" --cluster-key-file "$WORK/other.key"
timeout 60 dfs client evict "$session" --cluster-key-file "$HOME_DIR/cluster.key" || fail "the session does not end"
echo evicted >"$MNT/frozen/read"
back() { [[ $(cat "$SECOND/frozen/read" 2>/dev/null) == evicted ]]; }
wait_for 30 back || fail "the evicted client does not come back"
read -r again _ <<<"$(sessions)"
[[ $again != "$session" ]] || fail "the session is still the same"

step "a killed mount's locks and leases are free after its session's life"
echo old >"$MNT/held"
flock "$SECOND/held" sleep 300 &
holder=$!
locked() { ! flock --nonblock "$MNT/held" true; }
wait_for 10 locked || fail "the lock does not hold"
kill -KILL "$(second)"
timeout 60 flock "$MNT/held" true || fail "the lock outlives its holder's session"
echo new >"$MNT/held"
kill "$holder" 2>/dev/null || true
umount -l "$SECOND"
mount_second
[[ $(cat "$SECOND/held") == new ]] || fail "the new mount shows something old"
