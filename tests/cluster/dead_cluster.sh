#!/usr/bin/env bash
# The whole cluster is dead: stopped, or killed. On a soft mount every operation fails in time, on a hard one every operation waits
# and goes on by itself (dead_cluster.py); either can be unmounted, and dfs-mount ended by any signal, within a bound.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
SECOND=$WORK/second
TIMEOUT=6   # of the soft mounts, in seconds
BOUND=22    # until every operation has failed: until the masters count as silent (5 s), the time-out, and what a slow machine adds
mkdir "$SECOND"
second() { echo "$SECOND_PID"; }
SECOND_PID=
mount_second() { # OPTIONS
    rm -f "$WORK/second.pid" "$WORK/second.log"
    timeout 60 dfs-mount -o "$1" --pid-file "$WORK/second.pid" --log-file "$WORK/second.log" "$SECOND" || fail "no second mount"
    SECOND_PID=$(cat "$WORK/second.pid")
}
is_mounted() { grep -q " $SECOND " /proc/self/mountinfo; }
not_mounted() { ! is_mounted; }
daemons() { local name; for name in master-{1..3} chunkd-{1..3}; do pid "$name"; done; }
at_end() {
    kill -CONT $(daemons) 2>/dev/null || true
    umount -l "$SECOND" 2>/dev/null || true
    [[ -z $SECOND_PID ]] || kill -KILL "$(second)" 2>/dev/null || true
}
up --masters 3 --chunkds 3
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
PY=$ROOT/tests/cluster/dead_cluster.py
STOP="kill -STOP $(daemons | tr '\n' ' ')"
CONT="kill -CONT $(daemons | tr '\n' ' ')"
KILL="kill -KILL $(daemons | tr '\n' ' ')"
round() { # NAME: its files, made by the other mount
    mkdir "$MNT/$1"
    python3 "$PY" prepare "$MNT/$1"
}
python() { # WHAT ARGUMENT…
    timeout 300 python3 "$PY" "$@" >"$WORK/py.log" 2>&1 || { cat "$WORK/py.log"; tail -n 20 "$WORK/second.log"; fail "$1 $(basename "$2")"; }
    step "  $(tail -n 1 "$WORK/py.log")"
}

step "soft, the daemons stand still"
round stopped
mount_second timeout=$TIMEOUT
python soft "$SECOND/stopped" "$WORK/stopped.json" $BOUND "$STOP"
eval "$CONT"
# Until it has heard of the master again a soft mount refuses at once.
wait_for 20 mkdir "$SECOND/stopped/back" 2>/dev/null || fail "the mount does not come back"
python after "$SECOND/stopped" "$WORK/stopped.json"

step "soft, the daemons are killed"
round killed
python soft "$SECOND/killed" "$WORK/killed.json" $BOUND "$KILL"
up
wait_for 20 mkdir "$SECOND/killed/back" 2>/dev/null || fail "the mount does not come back"
python after "$SECOND/killed" "$WORK/killed.json"
umount "$SECOND"
wait_for 20 gone "$(second)" || fail "dfs-mount does not end"

step "hard, the daemons stand still, and are killed"
STOP="kill -STOP $(daemons | tr '\n' ' ')"
CONT="kill -CONT $(daemons | tr '\n' ' ')"
round hard
mount_second hard
python hard "$SECOND/hard" "$WORK/hard.json" 25 "$STOP" "$CONT"
python after "$SECOND/hard" "$WORK/hard.json"
round hard-killed
KILL="kill -KILL $(daemons | tr '\n' ' ')"
python hard "$SECOND/hard-killed" "$WORK/hard.json" 15 "$KILL" "$ROOT/scripts/quickstart --home $HOME_DIR $MNT >/dev/null"
python after "$SECOND/hard-killed" "$WORK/hard.json"
umount "$SECOND"
wait_for 20 gone "$(second)" || fail "dfs-mount does not end"

# Ends a mount while the cluster stands still and a program keeps changes, and sees how long that takes.
holder=
holds=0
hold() { # OPTIONS
    rm -f "$WORK/go"
    # What a mount held that could not say goodbye is not to be had before its session's life is over.
    holds=$((holds + 1))
    mkdir "$MNT/hold$holds"
    mount_second "$1"
    python3 "$PY" hold "$SECOND/hold$holds" "$WORK/go" >"$WORK/hold.log" 2>&1 &
    holder=$!
    disown
    wait_for 30 grep -q ready "$WORK/hold.log" || { cat "$WORK/hold.log"; fail "the program that holds is not ready"; }
    STOP="kill -STOP $(daemons | tr '\n' ' ')"
    CONT="kill -CONT $(daemons | tr '\n' ' ')"
    eval "$STOP"
    touch "$WORK/go"
    wait_for 10 grep -q holds "$WORK/hold.log" || fail "writing waits for the cluster"
    began=$SECONDS
}
ended() { # WHAT SECONDS
    wait_for "$2" gone "$(second)" || { tail -n 20 "$WORK/second.log"; fail "$1: dfs-mount has not ended after $2 s"; }
    wait_for 5 not_mounted || fail "$1: a dead mount is left"
    step "  $1: ended after $((SECONDS - began)) s"
    eval "$CONT"
    kill -KILL "$holder" 2>/dev/null || true
    wait_for 10 gone "$holder" || fail "$1: a program that used the mount cannot be killed"
}
again() { timeout 5 dfs --timeout 2 status --ready 3 >/dev/null 2>&1; }

step "a mount ends within a bound, whatever it holds"
hold timeout=$TIMEOUT
kill -TERM "$(second)"
ended "soft, SIGTERM" 30
wait_for 60 again || fail "the cluster does not come back"

hold timeout=$TIMEOUT
umount -l "$SECOND"
kill -KILL "$holder"
ended "soft, umount -l, and the program is killed" 30
wait_for 60 again || fail "the cluster does not come back"

hold hard
kill -TERM "$(second)"
wait_for 10 grep -q 'unmounting' "$WORK/second.log" || fail "no answer to SIGTERM"
is_mounted || fail "it was not waited for what is to be written"
kill -INT "$(second)"
ended "hard, SIGTERM and then SIGINT" 20
wait_for 60 again || fail "the cluster does not come back"

hold hard
umount -f "$SECOND" 2>/dev/null || true   # it says that it is busy, and is rid of whoever waits
# It goes on writing what it keeps, for a while; a signal ends that.
wait_for 10 grep -qE 'INFO unmounted|the session ended' "$WORK/second.log" || fail "dfs-mount does not see that it is unmounted"
kill -TERM "$(second)"
ended "hard, umount -f and SIGTERM" 20
wait_for 60 again || fail "the cluster does not come back"

# Leases have ended meanwhile, and the kernel is told to drop pages that programs are waiting for.
hold hard
wait_for 60 grep -q 'no word of the master for too long' "$WORK/second.log" || fail "caches are believed for ever"
kill -KILL "$(second)"
wait_for 10 gone "$(second)" || fail "dfs-mount cannot be killed"
refused 2 'Transport endpoint is not connected' ls "$SECOND"
eval "$CONT"
wait_for 60 again || fail "the cluster does not come back"
kill -KILL "$holder"
# What the killed one held is to be had after its session's life.
mount_second timeout=60
echo again >"$SECOND/again" && [[ $(cat "$MNT/again") == again ]] || fail "the new mount does not work"
step "  hard, SIGKILL: mounted again on the same place"

step "what is asked to end before it is mounted leaves nothing"
eval "$STOP"
umount -f "$SECOND" 2>/dev/null || true   # it says that it is busy, and is rid of whoever waits
wait_for 30 gone "$(second)" || fail "dfs-mount does not end"
dfs-mount --foreground --log debug "$SECOND" 2>"$WORK/early.log" &
early=$!
wait_for 10 grep -q 'no session with this master' "$WORK/early.log" || fail "it does not look for a master"
kill -TERM $early   # a shell has what it starts in the background ignore SIGINT
wait_for 5 gone $early || fail "dfs-mount that finds no master does not end"
not_mounted || fail "a mount is left"
refused 1 'no master took the session within 10s' dfs-mount "$SECOND"
not_mounted || fail "a mount is left"
eval "$CONT"
