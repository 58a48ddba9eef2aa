//! I2, and what I1 says of bytes on disks: a chunk's bytes below its committed length never change, and every replica
//! that the masters list has them.

use crate::chunks::Replicas;
use crate::workload::Violation;
use dfs_master::raft::SimStorage;
use dfs_master::state;
use dfs_proto::checksum::crc32c;
use dfs_proto::{ChunkId, NodeId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What was seen below committed lengths: chunk and length to checksum.
#[derive(Default)]
pub struct Committed {
    seen: BTreeMap<(ChunkId, u64), u32>,
}

impl Committed {
    pub fn observe(&mut self, masters: &[Arc<SimStorage>], replicas: &Replicas) -> Result<(), Violation> {
        for storage in masters {
            let kv = storage.kv();
            let failed = |error| format!("I2: cannot read a state: {error}");
            for chunk in state::chunks(kv, ChunkId(0), usize::MAX).map_err(failed)? {
                let id = ChunkId(chunk.chunk);
                // One that another master has dropped already may be gone from the disks too.
                let everywhere =
                    masters.iter().all(|other| matches!(state::chunk_state(other.kv(), id), Ok(Some(_))));
                if chunk.committed == 0 || !everywhere {
                    continue;
                }
                for node in &chunk.nodes {
                    let row = state::node(kv, NodeId(*node)).map_err(failed)?;
                    let host = row
                        .map(|row| row.host)
                        .ok_or_else(|| format!("I1: chunk {id} lists an unknown node"))?;
                    let held = replicas.get(&id).and_then(|replicas| replicas.get(&host));
                    let held = held.map(|replica| replica.payload.as_slice()).unwrap_or_default();
                    self.compare(id, chunk.committed, &host, held)?;
                }
            }
        }
        Ok(())
    }

    fn compare(&mut self, chunk: ChunkId, committed: u64, host: &str, held: &[u8]) -> Result<(), Violation> {
        let length = usize::try_from(committed).expect("chunks are small here");
        let Some(prefix) = held.get(..length) else {
            return Err(format!(
                "I1: {host} has {} of the {committed} committed bytes of chunk {chunk}",
                held.len()
            ));
        };
        let sum = crc32c(prefix);
        if *self.seen.entry((chunk, committed)).or_insert(sum) != sum {
            return Err(format!(
                "I2: {host} has other bytes below the committed length {committed} of chunk {chunk}"
            ));
        }
        // What was committed earlier is still the same.
        let earlier = self.seen.range((chunk, 0)..(chunk, committed)).next_back();
        if let Some(((_, length), sum)) = earlier
            && crc32c(&held[..usize::try_from(*length).expect("small")]) != *sum
        {
            return Err(format!("I2: the first {length} bytes of chunk {chunk} changed on {host}"));
        }
        Ok(())
    }
}
