# shellcheck shell=bash
# For the systems beside this file: one cluster with 3 copies in a directory and a network namespace of its own.
#
# Called as NAME packages | up DIR MOUNTPOINT | remount DIR MOUNTPOINT | down DIR MOUNTPOINT. A system says what it needs (PACKAGES), starts
# its daemons (start_daemons), mounts (mount_it) and proves that files get 3 copies (prove_copies). Daemons start by hand: no service, no systemd.
# The namespace gives ports that nobody else uses, an address that is not 127.0.0.1 (some refuse it), and says which processes are ours.
set -euo pipefail

NAME=$(basename "$0")
readonly NAME ADDRESS=10.77.0.1
PACKAGES=()

fail() { echo "peers/$NAME: $*" >&2; exit 1; }
misuse() { echo "peers/$NAME: $*" >&2; exit 2; }

wait_for() { # SECONDS WHAT CONDITION...
    local deadline=$((SECONDS + $1)) bound=$1 what=$2
    shift 2
    until "$@"; do
        ((SECONDS < deadline)) || fail "$what: not within $bound s"
        sleep 0.2
    done
}

is_mounted() { awk -v at="$MNT" '$2 == at { found = 1 } END { exit !found }' /proc/self/mounts; }
not_mounted() { ! is_mounted; }

quietly() { # COMMAND...: what it says is kept, and shown when it fails
    "$@" >>"$DIR/log" 2>&1 </dev/null && return
    tail -n 5 "$DIR/log" >&2
    fail "$1 failed"
}

# ---- the namespace ----

holder() { cat "$DIR/holder" 2>/dev/null; }
namespace() { readlink "/proc/$1/ns/net" 2>/dev/null; }

make_namespace() {
    setsid unshare --net sleep infinity </dev/null >/dev/null 2>&1 &
    echo $! >"$DIR/holder"
    disown
    # shellcheck disable=SC2317 # wait_for calls it
    apart() { [[ $(namespace "$(holder)") != "$(namespace self)" ]]; }
    wait_for 10 "a network namespace" apart
    namespace "$(holder)" >"$DIR/namespace"
    nsenter --net="/proc/$(holder)/ns/net" sh -c "ip link set lo up && ip address add $ADDRESS/32 dev lo"
}

# Runs a verb of this script inside the namespace.
inside() { nsenter --net="/proc/$(holder)/ns/net" "$0" "$1" "$DIR" "$MNT"; }

# Who lives in our namespace. The holder keeps it alive: without one its number may belong to somebody else.
members() {
    local process ours
    ours=$(cat "$DIR/namespace" 2>/dev/null) || return 0
    [[ $(namespace "$(holder)") == "$ours" && $ours != "$(namespace 1)" ]] || return 0
    for process in /proc/[0-9]*; do
        process=${process#/proc/}
        [[ $process == "$(holder)" || $(namespace "$process") != "$ours" ]] || echo "$process"
    done
}

holds() { [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$(holder)/cmdline") == *"sleep infinity "* ]]; }

nobody_left() { [[ ! $(members) ]]; }

signal_members() { # SIGNAL
    local process
    for process in $(members); do
        kill "-$1" "$process" 2>/dev/null || true
    done
}

down() {
    local deadline=$((SECONDS + 30))
    ! is_mounted || umount "$MNT" 2>/dev/null || umount -l "$MNT" || true
    before_end
    signal_members TERM
    until nobody_left || ((SECONDS >= deadline)); do sleep 0.2; done
    signal_members KILL
    wait_for 10 "the end of its processes" nobody_left
    ! is_mounted || umount -l "$MNT" || true
    if holds; then
        kill -KILL "$(holder)" 2>/dev/null || true
    elif [[ -e $DIR/namespace ]]; then
        fail "the keeper of its namespace is gone; daemons of $DIR may still run"
    fi
    rm -f "$DIR/holder" "$DIR/namespace"
}

# Processes of our namespace that serve a FUSE mount.
clients() {
    local process
    for process in $(members); do
        [[ $(readlink "/proc/$process"/fd/* 2>/dev/null) != */dev/fuse* ]] || echo "$process"
    done
}

ended() { # PID...
    local process
    for process in "$@"; do [[ ! -e /proc/$process/ns/net || ! $(namespace "$process") ]] || return 1; done
}

# The old client may end, and unmount, well after umount: the new one waits for that (ceph-fuse failed to mount now and then).
remount() {
    local old
    mapfile -t old < <(clients)
    umount "$MNT"
    wait_for 60 "unmounting" not_mounted
    wait_for 60 "the end of the old client" ended "${old[@]}"
    mount_it
    wait_for 60 "the mount" is_mounted
}

# ---- what a system may leave out ----

start_daemons() { :; }
prove_copies() { :; }
before_end() { :; }

main() {
    local verb=${1:-}
    if [[ $verb == packages ]]; then
        printf '%s\n' "${PACKAGES[@]}"
        return
    fi
    [[ $# == 3 && ${2:-} == /* && ${3:-} == /* ]] ||
        misuse "usage: packages | up DIR MOUNTPOINT | remount DIR MOUNTPOINT | down DIR MOUNTPOINT"
    DIR=$2 MNT=$3
    case $verb in
        up)
            mkdir -p "$DIR" "$MNT"
            make_namespace
            inside up-inside
            ;;
        up-inside)
            start_daemons
            mount_it
            wait_for 60 "the mount" is_mounted
            prove_copies
            ;;
        remount) inside remount-inside ;;
        remount-inside) remount ;;
        down) down ;;
        *) misuse "unknown verb '$verb'" ;;
    esac
}
