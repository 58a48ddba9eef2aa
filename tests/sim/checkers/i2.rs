//! I2, and what I1 says of bytes on disks: a chunk's bytes below its committed length never change, and every replica
//! that the masters list has them.

use crate::chunks::{Replica, Replicas};
use crate::workload::Violation;
use dfs_master::raft::SimStorage;
use dfs_master::state;
use dfs_proto::{ChunkId, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What was seen below committed lengths: chunk and length to checksum.
#[derive(Default)]
pub struct Committed {
    seen: BTreeMap<(ChunkId, u64), u32>,
    /// Readings of replicas that were compared already: at which length, and at which length of before.
    compared: BTreeSet<(u64, u64, Option<u64>)>,
}

/// Replicas that faults took.
#[derive(Default)]
pub struct Lost {
    /// The daemons whose disks are still there.
    pub nodes: BTreeSet<NodeId>,
    /// Where bits were flipped.
    pub rotten: BTreeSet<(String, ChunkId)>,
}

impl Lost {
    fn contains(&self, node: NodeId, host: &str, chunk: ChunkId) -> bool {
        !self.nodes.contains(&node) || self.rotten.contains(&(host.to_owned(), chunk))
    }
}

impl Committed {
    /// `lost`: replicas that a fault took or damaged; they are known to be missing, or will be.
    pub fn observe(
        &mut self,
        masters: &[Arc<SimStorage>],
        replicas: &Replicas,
        lost: &Lost,
    ) -> Result<(), Violation> {
        for storage in masters {
            let kv = storage.kv();
            let failed = |error| format!("I2: cannot read a state: {error}");
            for chunk in state::chunks(kv, ChunkId(0), usize::MAX).map_err(failed)? {
                let id = ChunkId(chunk.chunk);
                if chunk.committed == 0 {
                    continue;
                }
                // What another master has dropped already may be gone from the disks too.
                let everywhere = |node: &u64| {
                    let listed = |other: &Arc<SimStorage>| match state::chunk_state(other.kv(), id) {
                        Ok(Some(chunk)) => chunk.nodes.contains(node),
                        Ok(None) | Err(_) => false,
                    };
                    masters.iter().all(listed)
                };
                for node in chunk.nodes.iter().filter(|node| everywhere(node)) {
                    let row = state::node(kv, NodeId(*node)).map_err(failed)?;
                    let host = row
                        .map(|row| row.host)
                        .ok_or_else(|| format!("I1: chunk {id} lists an unknown node"))?;
                    if lost.contains(NodeId(*node), &host, id) {
                        continue;
                    }
                    let held = replicas.get(&id).and_then(|replicas| replicas.get(&host));
                    self.compare(id, chunk.committed, &host, held.map(|replica| &**replica))?;
                }
            }
        }
        Ok(())
    }

    fn compare(
        &mut self,
        chunk: ChunkId,
        committed: u64,
        host: &str,
        held: Option<&Replica>,
    ) -> Result<(), Violation> {
        let held = held.filter(|replica| replica.length >= committed).ok_or_else(|| {
            let length = held.map_or(0, |replica| replica.length);
            format!("I1: {host} has {length} of the {committed} committed bytes of chunk {chunk}")
        })?;
        let earlier = self.seen.range((chunk, 0)..(chunk, committed)).next_back();
        let earlier = earlier.map(|((_, length), sum)| (*length, *sum));
        // Sums of what is committed stay as they were seen first: comparing the same bytes again shows nothing new.
        if !self.compared.insert((held.reading, committed, earlier.map(|(length, _)| length))) {
            return Ok(());
        }
        let sum = held.sum_below(committed);
        if *self.seen.entry((chunk, committed)).or_insert(sum) != sum {
            return Err(format!(
                "I2: {host} has other bytes below the committed length {committed} of chunk {chunk}"
            ));
        }
        // What was committed earlier is still the same.
        match earlier {
            Some((length, sum)) if held.sum_below(length) != sum => {
                Err(format!("I2: the first {length} bytes of chunk {chunk} changed on {host}"))
            }
            _ => Ok(()),
        }
    }
}
