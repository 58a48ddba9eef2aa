# just check | test | sim | bench

check:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    if command -v cargo-deny >/dev/null; then cargo deny check; else echo "cargo-deny is not installed: cargo install cargo-deny"; fi

test:
    scripts/test

sim seed="1":
    DFS_SIM_SEED={{seed}} cargo test -p dfs-tests --test sim

bench *ARGS:
    scripts/bench {{ARGS}}
