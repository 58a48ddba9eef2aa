#!/usr/bin/env bash
# fsx (https://crates.io/crates/fsx): random operations on one file, every read compared with what must be there.
# FSX_SEEDS: how many seeds; FSX_OPERATIONS: how many operations each; FSX_CRASHES: a number of seeds that run once more
# while one chunk daemon after the other is killed and started again.
. "$(dirname "${BASH_SOURCE[0]}")/../cluster/lib.sh"
cat >"$WORK/fsx.toml" <<'TOML'
flen = 262144

[opsize]
max = 65536

[weights]
close_open = 1
read = 10
write = 10
mapread = 10
mapwrite = 10
invalidate = 1
truncate = 2
fsync = 1
fdatasync = 1
posix_fallocate = 1
punch_hole = 2
copy_file_range = 2
sendfile = 2
TOML
up
killer=
at_end() { [[ -z $killer ]] || kill "$killer" 2>/dev/null || true; }

run() { # SEED
    timeout 900 fsx -q -f "$WORK/fsx.toml" -N "${FSX_OPERATIONS:-20000}" -S "$1" -P "$WORK" "$MNT/fsx.$1" \
        >"$WORK/fsx.$1.log" 2>&1 || { tail -n 40 "$WORK/fsx.$1.log"; fail "seed $1"; }
    rm "$MNT/fsx.$1"
}
two_at_once() { # SEED…
    local seed other=
    for seed in "$@"; do
        if [[ -z $other ]]; then run "$seed" & other=$!; else run "$seed"; wait "$other"; other=; fi
    done
    [[ -z $other ]] || wait "$other"
}

two_at_once $(seq 1 "${FSX_SEEDS:-4}")
step "${FSX_SEEDS:-4} seeds of ${FSX_OPERATIONS:-20000} operations: no difference"

crashes() {
    local n=0 name
    while sleep 2; do
        name=chunkd-$((n % 3 + 1))
        n=$((n + 1))
        crash "$name"
        sleep 1
        "$ROOT/scripts/quickstart" --home "$HOME_DIR" "$MNT" >>"$WORK/crashes.log" 2>&1 || { tail -n 5 "$WORK/crashes.log"; return 1; }
        echo "$n" >"$WORK/crashes"
    done
}
crashes &
killer=$!
two_at_once $(seq 1 "${FSX_CRASHES:-2}")
kill -0 "$killer" 2>/dev/null || fail "the chunk daemons could not be started again"
kill "$killer"
wait "$killer" 2>/dev/null || true
killer=
(($(cat "$WORK/crashes") > 0)) || fail "no chunk daemon was killed"
step "${FSX_CRASHES:-2} seeds again while chunk daemons were killed $(cat "$WORK/crashes") times: no difference"
