//! I4: at most one session can append to a chunk, and a raised epoch ends that.

use crate::chunks::{Replica, Replicas};
use crate::workload::Violation;
use dfs_chunkd::store::format::RecordKind;
use dfs_master::raft::SimStorage;
use dfs_master::state;
use dfs_proto::ChunkId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Whose each chunk was when it was first seen.
#[derive(Default)]
pub struct Owners {
    seen: BTreeMap<ChunkId, u64>,
    /// Which readings of a chunk's replicas were compared last.
    compared: BTreeMap<ChunkId, Vec<u64>>,
}

impl Owners {
    /// How many chunks there were that no session ever appended to.
    pub fn nobodys(&self) -> u64 {
        self.seen.values().filter(|owner| **owner == 0).count() as u64
    }

    pub fn observe(&mut self, masters: &[Arc<SimStorage>], replicas: &Replicas) -> Result<(), Violation> {
        for storage in masters {
            let chunks = state::chunks(storage.kv(), ChunkId(0), usize::MAX);
            for chunk in chunks.map_err(|error| format!("I4: cannot read a state: {error}"))? {
                let owner = *self.seen.entry(ChunkId(chunk.chunk)).or_insert(chunk.session);
                // A sealed chunk may forget its owner; it takes none but that one.
                if chunk.session != owner && chunk.session != 0 {
                    return Err(format!(
                        "I4: chunk {} went from session {owner} to {}",
                        chunk.chunk, chunk.session
                    ));
                }
            }
        }
        for (chunk, replicas) in replicas {
            let readings: Vec<u64> = replicas.values().map(|replica| replica.reading).collect();
            if self.compared.get(chunk) != Some(&readings) {
                one_writer(*chunk, replicas)?;
                self.compared.insert(*chunk, readings);
            }
        }
        Ok(())
    }
}

/// Two writers would show as replicas that differ, or as a record of an epoch that had ended.
fn one_writer(chunk: ChunkId, replicas: &BTreeMap<String, Arc<Replica>>) -> Result<(), Violation> {
    let mut longest: Option<(&String, &Replica)> = None;
    for (host, replica) in replicas {
        let mut epoch = 0;
        for record in &replica.records {
            if record.kind == RecordKind::Data && record.epoch.get() < epoch {
                let old = record.epoch;
                return Err(format!(
                    "I4: {host} took a record of epoch {old} for chunk {chunk} after epoch {epoch} began"
                ));
            }
            epoch = epoch.max(record.epoch.get());
        }
        if let Some((other, longest)) = longest
            && !longest.agrees_with(replica)
        {
            return Err(format!("I4: {other} and {host} hold different bytes of chunk {chunk}"));
        }
        if longest.is_none_or(|(_, longest)| longest.length < replica.length) {
            longest = Some((host, replica));
        }
    }
    Ok(())
}
