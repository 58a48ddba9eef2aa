//! Chunk files read from the simulated disks from outside, without the daemon that wrote them.

use crate::disk::SimDisk;
use dfs_chunkd::store::format::{FILE_HEADER, Record, RecordKind};
use dfs_proto::ChunkId;
use std::collections::BTreeMap;

/// One replica as its disk shows it.
pub struct Replica {
    pub payload: Vec<u8>,
    pub records: Vec<Record>,
}

/// Every replica of every chunk, by chunk and host.
pub type Replicas = BTreeMap<ChunkId, BTreeMap<String, Replica>>;

/// Reads all chunk files. A torn tail ends a replica, as it does for the daemon.
pub fn on_disks(disks: &[(String, SimDisk)]) -> Replicas {
    let mut replicas = Replicas::new();
    for (host, disk) in disks {
        for (path, bytes) in disk.files() {
            let name =
                path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".chunk"));
            if let Some(id) = name.and_then(|name| u64::from_str_radix(name, 16).ok()) {
                let replica = parse(ChunkId(id), &bytes);
                replicas.entry(ChunkId(id)).or_default().insert(host.clone(), replica);
            }
        }
    }
    replicas
}

fn parse(chunk: ChunkId, bytes: &[u8]) -> Replica {
    let mut replica = Replica { payload: Vec::new(), records: Vec::new() };
    let mut position = FILE_HEADER;
    while let Some(rest) = bytes.get(position..)
        && let Ok(record) = Record::decode(rest, chunk, position as u64)
    {
        let end = usize::try_from(record.end_position()).expect("a small file");
        let start = end - record.length as usize;
        let Some(payload) = bytes.get(start..end) else { break };
        if !dfs_proto::checksum::units_match(payload, &record.checksums) {
            break;
        }
        if record.kind == RecordKind::Data {
            replica.payload.extend_from_slice(payload);
        }
        replica.records.push(record);
        position = end;
    }
    replica
}
