//! Chunk files read from the simulated disks from outside, without the daemon that wrote them.

use crate::disk::SimDisk;
use crate::pages::Pages;
use dfs_chunkd::store::format::{FILE_HEADER, FileHeader, Record, RecordKind};
use dfs_proto::{ChunkId, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// One replica as its disk shows it.
pub struct Replica {
    /// Another for every one that was read: what was proved of it need not be proved again.
    pub reading: u64,
    pub length: u64,
    pub records: Vec<Record>,
    bytes: Pages,
}

impl Replica {
    /// The payload of its data records.
    pub fn payload(&self) -> Vec<u8> {
        let mut payload = vec![0; usize::try_from(self.length).expect("a small file")];
        let mut rest = payload.as_mut_slice();
        for record in self.records.iter().filter(|record| record.kind == RecordKind::Data) {
            let (into, after) = rest.split_at_mut(record.length as usize);
            self.bytes.read_at(into, payload_start(record));
            rest = after;
        }
        payload
    }
}

fn payload_start(record: &Record) -> usize {
    usize::try_from(record.end_position()).expect("a small file") - record.length as usize
}

/// Every replica of every chunk, by chunk and host.
pub type Replicas = BTreeMap<ChunkId, BTreeMap<String, Arc<Replica>>>;

/// The chunk that a file belongs to by its name.
pub fn chunk_of(path: &Path) -> Option<ChunkId> {
    let name = path.file_name()?.to_str()?.strip_suffix(".chunk")?;
    u64::from_str_radix(name, 16).ok().map(ChunkId)
}

/// Whether a chunk file's bytes say that it is sealed.
pub fn is_sealed(bytes: &Pages) -> bool {
    let mut header = [0; FILE_HEADER];
    bytes.read_at(&mut header, 0) == FILE_HEADER
        && FileHeader::decode(&header).is_ok_and(|header| header.sealed)
}

/// The numbers of the daemons whose data directories these disks hold: a wiped disk has another one than before.
pub fn nodes(disks: &[(String, SimDisk)]) -> BTreeSet<NodeId> {
    let identities = disks.iter().flat_map(|(_, disk)| disk.named("IDENTITY"));
    let numbers = identities.filter_map(|text| {
        let text = String::from_utf8(text).ok()?;
        text.lines().find_map(|line| line.strip_prefix("node = ")?.parse().ok())
    });
    numbers.map(NodeId).collect()
}

/// Reads all chunk files. A torn tail ends a replica, as it does for the daemon.
pub fn on_disks(disks: &[(String, SimDisk)]) -> Replicas {
    let mut replicas = Replicas::new();
    for (host, disk) in disks {
        for (id, replica) in disk.replicas() {
            replicas.entry(id).or_default().insert(host.clone(), replica);
        }
    }
    replicas
}

/// Reads a chunk file.
pub fn parse(chunk: ChunkId, file: &Pages) -> Replica {
    static READINGS: AtomicU64 = AtomicU64::new(0);
    let bytes = file.to_vec();
    let (mut records, mut length, mut position) = (Vec::new(), 0, FILE_HEADER);
    while let Some(rest) = bytes.get(position..)
        && let Ok(record) = Record::decode(rest, chunk, position as u64)
    {
        let start = payload_start(&record);
        let Some(payload) = bytes.get(start..start + record.length as usize) else { break };
        if !dfs_proto::checksum::units_match(payload, &record.checksums) {
            break;
        }
        if record.kind == RecordKind::Data {
            length += u64::from(record.length);
        }
        position = start + record.length as usize;
        records.push(record);
    }
    let reading = READINGS.fetch_add(1, Ordering::Relaxed);
    Replica { reading, length, records, bytes: file.clone() }
}
