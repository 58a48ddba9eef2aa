//! What must be true some time after the last fault: every chunk that somebody needs has all its replicas, whole, on daemons
//! that live; every half-dead one has been compacted; and no disk keeps what nobody needs.

use crate::chunks::{self, Replica};
use crate::disk::SimDisk;
use crate::workload::Violation;
use dfs_master::raft::SimStorage;
use dfs_master::state;
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::{ChunkId, NodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What is not as it must be, if anything.
pub fn check(master: &SimStorage, disks: &[(String, SimDisk)]) -> Result<(), Violation> {
    let failed = |error| format!("cannot read a state: {error}");
    let (kv, alive, replicas) = (master.kv(), chunks::nodes(disks), chunks::on_disks(disks));
    let mut expected: BTreeSet<(ChunkId, String)> = BTreeSet::new();
    for chunk in state::chunks(kv, ChunkId(0), usize::MAX).map_err(failed)? {
        let id = ChunkId(chunk.chunk);
        if chunk.live > 0 && chunk.phase() != Phase::Sealed {
            return Err(format!("chunk {id} is not sealed: {chunk:?}"));
        }
        if dfs_master::compact::is_half_dead(&chunk) {
            return Err(format!("chunk {id} is half dead and was not compacted: {chunk:?}"));
        }
        if chunk.live > 0 && chunk.nodes.len() != chunk.wanted_replicas as usize {
            return Err(format!("chunk {id} has not the replicas it should: {chunk:?}"));
        }
        let none = BTreeMap::new();
        let held = replicas.get(&id).unwrap_or(&none);
        for node in chunk.nodes.iter().copied().map(NodeId) {
            let row = state::node(kv, node).map_err(failed)?;
            let host = row.map(|row| row.host).ok_or_else(|| format!("node {node} is not known"))?;
            let length = |replica: &Arc<Replica>| replica.length;
            if chunk.live > 0
                && (!alive.contains(&node) || held.get(&host).map(length) != Some(chunk.committed))
            {
                return Err(format!("chunk {id} is not whole on {host}: {chunk:?}"));
            }
            expected.insert((id, host));
        }
    }
    let there = replicas.iter().flat_map(|(id, held)| held.keys().map(|host| (*id, host.clone())));
    match there.into_iter().find(|replica| !expected.contains(replica)) {
        Some((id, host)) => Err(format!("{host} keeps a replica of chunk {id} that nobody needs")),
        None => Ok(()),
    }
}
