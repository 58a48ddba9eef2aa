# Shared by the scenarios: a cluster of the real programs in a directory of its own, gone when the scenario ends.
# shellcheck shell=bash
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export DFS_BIN_DIR=${DFS_BIN_DIR:-${CARGO_TARGET_DIR:-$ROOT/target}/release}
export PATH=$DFS_BIN_DIR:$PATH
# DFS_TEST_DIR: a disk with room; the temporary directory may be small.
WORK=$(mktemp -d "${DFS_TEST_DIR:-/var/tmp}/dfs-test.XXXXXX")
HOME_DIR=$WORK/home
MNT=$WORK/mnt
export GIT_CONFIG_GLOBAL=$WORK/gitconfig GIT_CONFIG_NOSYSTEM=1
mkdir "$MNT"
git config --file "$GIT_CONFIG_GLOBAL" user.name test
git config --file "$GIT_CONFIG_GLOBAL" user.email test@example.net

at_end() { :; }   # what a scenario has to clean up besides
cleanup() {
    local status=$?
    cd /
    at_end || true
    if ((status != 0)) && [[ -d $HOME_DIR/log ]]; then
        echo "--- last lines of the logs"
        tail -n 15 "$HOME_DIR"/log/*.log || true
    fi
    [[ ! -d $HOME_DIR ]] || "$ROOT/scripts/quickstart" --down --force --home "$HOME_DIR" >/dev/null 2>&1 || true
    rm -rf --one-file-system "$WORK"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

up() { "$ROOT/scripts/quickstart" --home "$HOME_DIR" "$@" "$MNT" >"$WORK/up.log" 2>&1 || { cat "$WORK/up.log"; fail "quickstart failed"; }; }
down() { "$ROOT/scripts/quickstart" --down --home "$HOME_DIR" >"$WORK/down.log" 2>&1 || { cat "$WORK/down.log"; fail "quickstart --down failed"; }; }
fail() { echo "FAIL: $*" >&2; exit 1; }
step() { echo "- $*"; }

pid() { cat "$HOME_DIR/run/$1.pid"; }

# Kills daemons of this home as a crash would.
crash() { # NAME…
    local name
    for name in "$@"; do kill -KILL "$(pid "$name")"; done
    for name in "$@"; do wait_for 10 gone "$(pid "$name")" || fail "$name does not die"; done
}
# A process that nobody has reaped yet has ended, too, when its last thread has: one that waits for a disk keeps its ports and locks.
gone() {
    local stat tasks
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
    tasks=("/proc/$1/task"/*)
    [[ ${stat##*) } == [ZX]* ]] && ((${#tasks[@]} <= 1))
}

# Waits until a command succeeds, at most SECONDS.
wait_for() { # SECONDS COMMAND…
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.05
    done
}

# A command must fail with a status and say one line that matches.
refused() { # STATUS PATTERN COMMAND…
    local wanted=$1 pattern=$2 status=0 output lines
    shift 2
    output=$(timeout 60 "$@" 2>&1) || status=$?
    ((status == wanted)) || fail "'$*' ended with $status instead of $wanted: $output"
    lines=$(printf '%s\n' "$output" | grep -c .)
    ((lines == 1)) || fail "'$*' said $lines lines instead of one: $output"
    grep -qE -- "$pattern" <<<"$output" || fail "'$*' said '$output', which does not match '$pattern'"
    step "refused ($wanted): $output"
}

# A source tree of 4,000 files in 200 directories, the same every time: sizes from 0 to some 60 KiB, links and modes.
make_tree() { # DIR
    python3 - "$1" <<'PY'
import os, random, sys
top, rng = sys.argv[1], random.Random(4000)
for d in range(200):
    path = os.path.join(top, f"pkg{d % 20}", f"mod{d}")
    os.makedirs(path)
    for f in range(20):
        size = rng.choice([0, 17, 300, 1500, 4096, 9000, 20000, 60000])
        name = os.path.join(path, f"file{f}.rs")
        with open(name, "wb") as out:
            out.write(rng.randbytes(size))
        os.chmod(name, rng.choice([0o644, 0o600, 0o755]))
        os.utime(name, ns=(1_500_000_000_123_456_789, 1_500_000_000_000_000_000 + d * 1_000_000_007))
    os.symlink("file0.rs", os.path.join(path, "link"))
    os.link(os.path.join(path, "file1.rs"), os.path.join(path, "hard"))
PY
}

# in_namespaces SECONDS NAME ARGUMENT...: runs tests/cluster/NAME.py WORK ARGUMENT..., which makes network namespaces and removes them,
# also when the scenario is ended. When it fails, says what the daemons and mounts complained of. DFS_KEEP: where their logs are kept.
in_namespaces() {
    local seconds=$1 name=$2 log
    shift 2
    ((EUID == 0)) || fail "network namespaces need root"
    mkdir "$WORK/$name"
    python=
    at_end() {
        [[ -z $python ]] || ! kill -TERM "$python" 2>/dev/null || wait "$python" || true
    }
    PYTHONDONTWRITEBYTECODE=1 timeout --kill-after=60 "$seconds" python3 "$ROOT/tests/cluster/$name.py" "$WORK/$name" "$@" &
    python=$!
    if wait "$python"; then
        python=
        return
    fi
    python=
    for log in "$WORK/$name"/log/*.log; do
        echo "--- $log"
        grep -E 'WARN|ERROR|panic' "$log" | tail -n 12 || true
    done
    [[ -z ${DFS_KEEP:-} ]] || { cp -r "$WORK/$name/log" "$DFS_KEEP"; echo "logs: $DFS_KEEP"; }
    fail "$name $*"
}

# need PROGRAMS WHERE: they are installed.
need() {
    local program
    for program in $1; do
        command -v "$program" >/dev/null || fail "$program is missing ($2)"
    done
}
