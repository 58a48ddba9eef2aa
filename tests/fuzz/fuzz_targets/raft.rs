//! What masters send each other, and snapshot files.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    if which % 2 == 0 {
        dfs_master::raft::fuzz::envelope(bytes);
    } else {
        dfs_master::raft::fuzz::snapshot(bytes);
    }
});
