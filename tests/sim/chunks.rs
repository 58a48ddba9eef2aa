//! Chunk files read from the simulated disks from outside, without the daemon that wrote them.

use crate::disk::SimDisk;
use dfs_chunkd::store::format::{FILE_HEADER, FileHeader, Record, RecordKind};
use dfs_proto::{ChunkId, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One replica as its disk shows it.
pub struct Replica {
    pub payload: Vec<u8>,
    pub records: Vec<Record>,
}

/// Every replica of every chunk, by chunk and host.
pub type Replicas = BTreeMap<ChunkId, BTreeMap<String, Replica>>;

/// The chunk that a file belongs to by its name.
pub fn chunk_of(path: &Path) -> Option<ChunkId> {
    let name = path.file_name()?.to_str()?.strip_suffix(".chunk")?;
    u64::from_str_radix(name, 16).ok().map(ChunkId)
}

/// Whether a chunk file's bytes say that it is sealed.
pub fn is_sealed(bytes: &[u8]) -> bool {
    bytes
        .get(..FILE_HEADER)
        .is_some_and(|header| FileHeader::decode(header).is_ok_and(|header| header.sealed))
}

/// The numbers of the daemons whose data directories these disks hold: a wiped disk has another one than before.
pub fn nodes(disks: &[(String, SimDisk)]) -> BTreeSet<NodeId> {
    let identities =
        disks.iter().flat_map(|(_, disk)| disk.files()).filter(|(path, _)| path.ends_with("IDENTITY"));
    let numbers = identities.filter_map(|(_, text)| {
        let text = String::from_utf8(text).ok()?;
        text.lines().find_map(|line| line.strip_prefix("node = ")?.parse().ok())
    });
    numbers.map(NodeId).collect()
}

/// Reads all chunk files. A torn tail ends a replica, as it does for the daemon.
pub fn on_disks(disks: &[(String, SimDisk)]) -> Replicas {
    let mut replicas = Replicas::new();
    for (host, disk) in disks {
        for (path, bytes) in disk.files() {
            if let Some(id) = chunk_of(&path) {
                replicas.entry(id).or_default().insert(host.clone(), parse(id, &bytes));
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
