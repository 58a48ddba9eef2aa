#!/usr/bin/env bash
# The whole cluster is dead: stopped, or killed. On a soft mount every operation fails in time, on a hard one every operation waits
# and goes on by itself (dead_cluster.py); either can be unmounted, and dfs-mount ended by any signal, within a bound.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
SECOND=$WORK/second
TIMEOUT=6   # of the soft mounts, in seconds
BOUND=22    # until every operation has failed: until the masters count as silent (5 s), the time-out, and what a slow machine adds
mkdir "$SECOND"
second() { cat "$WORK/second.pid"; }
mount_second() { # OPTIONS
    rm -f "$WORK/second.pid"
    timeout 60 dfs-mount -o "$1" --pid-file "$WORK/second.pid" --log-file "$WORK/second.log" "$SECOND" || fail "no second mount"
}
is_mounted() { grep -q " $SECOND " /proc/self/mountinfo; }
not_mounted() { ! is_mounted; }
daemons() { local name; for name in master-{1..3} chunkd-{1..3}; do pid "$name"; done; }
at_end() {
    kill -CONT $(daemons) 2>/dev/null || true
    umount -l "$SECOND" 2>/dev/null || true
    [[ ! -s $WORK/second.pid ]] || kill -KILL "$(second)" 2>/dev/null || true
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
python after "$SECOND/stopped" "$WORK/stopped.json"

step "soft, the daemons are killed"
round killed
python soft "$SECOND/killed" "$WORK/killed.json" $BOUND "$KILL"
up
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
