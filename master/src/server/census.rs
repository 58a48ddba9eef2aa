//! Walks over all chunks, slowly and for ever: counts what `dfs status` shows, and finds chunks that should be sealed or
//! repaired and are not, whatever the reason they were missed.

use super::nodes::Nodes;
use super::term::Term;
use crate::placement::{Candidate, Health};
use crate::repair::Holder;
use crate::state;
use dfs_proto::v1::{ChunkState, chunk_state::Phase};
use dfs_proto::{ChunkId, NodeId, SessionId};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Chunks looked at in one go, the pause after it, and the pause after the last chunk.
const PAGE: usize = 512;
const PAUSE: Duration = Duration::from_millis(20);
const REST: Duration = Duration::from_secs(5);

/// What the last whole walk found.
#[derive(Clone, Copy, Default, Debug)]
pub struct Census {
    /// Chunks with bytes that have fewer replicas on daemons that are not dead than they should.
    pub under_replicated: u64,
    /// Among them those with no such replica at all.
    pub unavailable: u64,
    /// Sealed chunks with bytes that have more replicas than they should.
    pub surplus: u64,
    /// Chunks that are fenced and not sealed yet.
    pub fenced: u64,
}

/// Walks until the term ends.
pub async fn run(term: Arc<Term>) {
    loop {
        let mut census = Census::default();
        let mut after = ChunkId(0);
        loop {
            let page = match state::chunks(&*term.kv(), after, PAGE) {
                Ok(page) => page,
                Err(error) => {
                    super::store_failed("reading the chunks", &error);
                    break;
                }
            };
            let candidates = term.nodes.candidates();
            let uneven = crate::repair::is_uneven(&candidates);
            for chunk in &page {
                count(&mut census, &term.nodes, chunk);
                if should_seal(&term, chunk, &candidates) {
                    term.jobs.seal(ChunkId(chunk.chunk), false);
                }
                term.compactions.note(chunk, term.now());
                if chunk.phase() == Phase::Sealed && chunk.live > 0 {
                    super::repairing::consider_state(&term, chunk);
                    if uneven {
                        super::repairing::consider_moving(&term, chunk, &candidates);
                    }
                }
            }
            let Some(last) = page.last().filter(|_| page.len() == PAGE) else { break };
            after = ChunkId(last.chunk);
            tokio::time::sleep(PAUSE).await;
        }
        *term.census.lock().unwrap_or_else(PoisonError::into_inner) = census;
        term.repairs.tidy(term.now());
        tokio::select! {
            () = tokio::time::sleep(REST) => {}
            () = term.walk.notified() => {}
        }
    }
}

fn count(census: &mut Census, nodes: &Nodes, chunk: &ChunkState) {
    if chunk.phase() == Phase::Fenced {
        census.fenced += 1;
    }
    if chunk.live == 0 {
        return;
    }
    let alive =
        chunk.nodes.iter().filter(|node| super::sealing::is_alive(nodes.health(NodeId(**node)))).count();
    let wanted = usize::try_from(chunk.wanted_replicas).unwrap_or(usize::MAX);
    if alive < wanted {
        census.under_replicated += 1;
    }
    census.surplus += u64::from(chunk.phase() == Phase::Sealed && chunk.nodes.len() > wanted);
    if alive == 0 {
        census.unavailable += 1;
    }
}

/// A chunk that is open though nobody can append to it any more, or though it needs another replica: only sealed chunks are repaired.
/// A fenced one that is parked waits for its daemons.
fn should_seal(term: &Term, chunk: &ChunkState, candidates: &[Candidate]) -> bool {
    chunk.phase() == Phase::Open
        && (chunk.committed >= chunk.capacity
            || !term.memory().sessions.contains_key(&SessionId(chunk.session))
            || needs_another(chunk, &term.nodes.holders(chunk), candidates))
}

/// Whether a daemon that has a replica is dead or is to be emptied, or there are fewer replicas than there could be: it was allocated
/// while too few daemons were up or had room.
fn needs_another(chunk: &ChunkState, holders: &[Holder], candidates: &[Candidate]) -> bool {
    let leaves = |holder: &Holder| holder.health == Health::Dead || holder.draining;
    let could = |candidate: &Candidate| {
        let holds = chunk.nodes.contains(&candidate.node.get());
        candidate.is_open() && !holds && candidate.free.get() >= chunk.capacity
    };
    let too_few = chunk.nodes.len() < usize::try_from(chunk.wanted_replicas).unwrap_or(usize::MAX);
    chunk.live > 0 && (holders.iter().any(leaves) || (too_few && candidates.iter().any(could)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Domain;
    use dfs_proto::ByteLen;

    #[test]
    fn an_open_chunk_is_sealed_once_it_could_have_another_replica() {
        let candidate = |node, free| Candidate {
            node: NodeId(node),
            domain: Domain { host: format!("host{node}"), rack: String::new() },
            free: ByteLen(free),
            total: ByteLen(1 << 30),
            health: Health::Up,
            draining: false,
        };
        let chunk = |nodes: &[u64], live| ChunkState {
            nodes: nodes.to_vec(),
            live,
            capacity: 100,
            wanted_replicas: 3,
            ..Default::default()
        };
        let daemons = [candidate(1, 0), candidate(2, 500), candidate(3, 99), candidate(4, 100)];
        assert!(needs_another(&chunk(&[1, 2], 7), &[], &daemons));
        assert!(!needs_another(&chunk(&[1, 2], 0), &[], &daemons), "nobody has a byte there");
        assert!(!needs_another(&chunk(&[2, 4], 7), &[], &daemons), "the others have no room");
        assert!(!needs_another(&chunk(&[1, 2, 3], 7), &[], &daemons), "as many as are wanted");
    }
}
