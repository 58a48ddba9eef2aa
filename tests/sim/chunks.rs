//! Chunk files read from the simulated disks from outside, without the daemon that wrote them.

use crate::disk::SimDisk;
use crate::pages::Pages;
use dfs_chunkd::store::format::{FILE_HEADER, FileHeader, Record, RecordKind};
use dfs_proto::checksum::{crc32c, crc32c_append, units_match};
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
    /// The first bytes of its payload, piece by piece. There must be that many.
    fn pieces(&self, length: u64) -> impl Iterator<Item = &[u8]> {
        let mut left = usize::try_from(length).expect("a small file");
        let data = self.records.iter().filter(|record| record.kind == RecordKind::Data);
        data.flat_map(move |record| {
            let start = payload_start(record);
            let these = left.min(record.length as usize);
            left -= these;
            self.bytes.pieces(start, start + these)
        })
    }

    /// The checksum of the first bytes of its payload. There must be that many.
    pub fn sum_below(&self, length: u64) -> u32 {
        self.pieces(length).fold(crc32c(&[]), crc32c_append)
    }

    /// Whether its payload is that of another, as far as both go.
    pub fn agrees_with(&self, other: &Self) -> bool {
        let common = self.length.min(other.length);
        let (mut ours, mut theirs) = (self.pieces(common), other.pieces(common));
        let (mut one, mut two): (&[u8], &[u8]) = (&[], &[]);
        loop {
            if one.is_empty() {
                one = ours.next().unwrap_or_default();
            }
            if two.is_empty() {
                two = theirs.next().unwrap_or_default();
            }
            let length = one.len().min(two.len());
            if length == 0 {
                return one.len() == two.len();
            }
            if one[..length] != two[..length] {
                return false;
            }
            (one, two) = (&one[length..], &two[length..]);
        }
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
        if !units_match(payload, &record.checksums) {
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
