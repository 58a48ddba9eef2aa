//! A chunk file with any bytes: a start takes it, repairs it or leaves it alone; a second start finds what the first
//! one left.
#![no_main]

use dfs_chunkd::store::recovery::{self, Condition, Opened};
use dfs_env::disk::{Disk, OpenMode, RealDisk};
use dfs_proto::ChunkId;
use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;

fuzz_target!(|bytes: &[u8]| {
    let path = PathBuf::from(format!("/dev/shm/dfs-fuzz-chunk.{}", std::process::id()));
    let _ = RealDisk.remove(&path);
    let file = RealDisk.open(&path, OpenMode::CreateNew).expect("a new file");
    file.write_all_at(bytes, 0).expect("written");
    let open = || recovery::open(&RealDisk, &path, ChunkId(7), [1; 16]).expect("the disk is sound");
    let first = open();
    if let Opened::Chunk(found) = &first {
        assert!(found.length <= bytes.len() as u64);
        let Opened::Chunk(again) = open() else { panic!("it was a chunk before") };
        assert_eq!(again.length, found.length);
        if found.condition != (Condition::Damaged { proven: false }) {
            assert_eq!(again.condition, found.condition);
        }
    }
    if let Ok(file) = RealDisk.open(&path, OpenMode::Read) {
        let _ = recovery::read_footer(&*file, ChunkId(7)).expect("the disk is sound");
    }
    let _ = RealDisk.remove(&path);
});
