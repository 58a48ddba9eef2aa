//! Walks over all chunks, slowly and for ever: counts what `dfs status` shows, and finds chunks that should be sealed or
//! repaired and are not, whatever the reason they were missed.

use super::nodes::Nodes;
use super::term::Term;
use crate::placement::Health;
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
                if should_seal(&term, chunk) {
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
    if alive < usize::try_from(chunk.wanted_replicas).unwrap_or(usize::MAX) {
        census.under_replicated += 1;
    }
    if alive == 0 {
        census.unavailable += 1;
    }
}

/// A chunk that is open though nobody can append to it any more, or though a daemon that has a replica is dead or is to be
/// emptied: only sealed chunks are repaired. A fenced one that is parked waits for its daemons.
fn should_seal(term: &Term, chunk: &ChunkState) -> bool {
    if chunk.phase() != Phase::Open {
        return false;
    }
    let leaves = |holder: &Holder| holder.health == Health::Dead || holder.draining;
    chunk.committed >= chunk.capacity
        || !term.memory().sessions.contains_key(&SessionId(chunk.session))
        || (chunk.live > 0 && term.nodes.holders(chunk).iter().any(leaves))
}
