//! The invariants, checked while a simulated cluster runs and when it has come to rest. One file each.

mod i10;
mod i2;
mod i4;
mod i6;
pub mod i7;
pub mod whole;

use crate::disk::SimDisk;
use crate::workload::Violation;
use dfs_master::raft::SimStorage;
use dfs_master::state::chunk_state;
use dfs_proto::{ChunkId, InodeNo};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Looks at the masters' state and the chunk daemons' disks from outside, as no part of the cluster can.
pub struct Watch {
    masters: Vec<Arc<SimStorage>>,
    disks: Vec<(String, SimDisk)>,
    committed: i2::Committed,
    owners: i4::Owners,
    states: i7::States,
    lost: i2::Lost,
}

impl Watch {
    pub fn new(masters: Vec<Arc<SimStorage>>, disks: impl Iterator<Item = (String, SimDisk)>) -> Self {
        Self {
            masters,
            disks: disks.collect(),
            committed: i2::Committed::default(),
            owners: i4::Owners::default(),
            states: i7::States::default(),
            lost: i2::Lost::default(),
        }
    }

    /// While the cluster runs.
    pub fn observe(&mut self) -> Result<(), Violation> {
        self.states.observe(&self.masters)?;
        for (host, disk) in &self.disks {
            if let Some(first) = disk.violations().first() {
                return Err(format!("I4: {host}: {first}"));
            }
        }
        let chunks = crate::chunks::on_disks(&self.disks);
        self.owners.observe(&self.masters, &chunks)?;
        self.lost.nodes = crate::chunks::nodes(&self.disks);
        // States that a crash took back know less than there was: what they list may be deleted by now.
        if self.states.is_known(&self.masters)? {
            self.committed.observe(&self.masters, &chunks, &self.lost)?;
        }
        Ok(())
    }

    /// How often two masters' states were compared.
    pub fn compared(&self) -> u64 {
        self.states.compared
    }

    /// How many chunks compaction has made.
    pub fn compacted(&self) -> u64 {
        self.owners.nobodys()
    }

    /// A fault damaged a replica.
    pub fn rotten(&mut self, host: &str, chunk: ChunkId) {
        self.lost.rotten.insert((host.to_owned(), chunk));
    }

    /// When it has come to rest. `acknowledged`: of each directory, how many changes of its names,
    /// where somebody counted them.
    pub fn at_end(&mut self, acknowledged: &BTreeMap<InodeNo, u64>) -> Result<(), Violation> {
        // What faults took has been made anew by now, except of chunks that nobody needs any more.
        let kv = self.masters[0].kv();
        let idle = |chunk: ChunkId| matches!(chunk_state(kv, chunk), Ok(Some(chunk)) if chunk.live == 0);
        self.lost.rotten.retain(|(_, chunk)| idle(*chunk));
        self.observe()?;
        if !acknowledged.is_empty() {
            i6::check(&self.masters, acknowledged)?;
        }
        i10::check(&self.masters)
    }
}
