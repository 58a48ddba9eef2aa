//! A Raft log file with any bytes: opened or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let dir = std::path::PathBuf::from(format!("/dev/shm/dfs-fuzz-log.{}/log", std::process::id()));
    dfs_master::raft::fuzz::log(&dir, bytes);
});
