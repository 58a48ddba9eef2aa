//! Gives space back: sealed chunks that no file uses any more are dropped, and their replicas deleted.
//!
//! A chunk stays for a grace of a session's time to live after its last byte lost its last user, so that whoever looked
//! up its slices before can still read them, and for `keep_deleted`, so that a backup which is not older can be restored. First the drop is committed, only then a replica is deleted.

use super::jobs::Job;
use super::term::Term;
use crate::state;
use dfs_proto::v1::{self, Timestamp, system, system_answer};
use dfs_proto::{ChunkId, NodeId};
use std::sync::Arc;
use std::time::Duration;

/// How often idle chunks are looked for.
const TICK: Duration = Duration::from_secs(1);
/// Chunks dropped with one command.
const BATCH: usize = 256;

/// Drops idle chunks until the term ends.
pub async fn run(term: Arc<Term>) {
    loop {
        tokio::time::sleep(TICK).await;
        let mut after = ChunkId(0);
        loop {
            let page = match state::idle_chunks(&*term.kv(), after, BATCH) {
                Ok(page) => page,
                Err(error) => {
                    super::store_failed("reading the idle chunks", &error);
                    break;
                }
            };
            let Some((last, _)) = page.last() else { break };
            after = *last;
            let full = page.len() == BATCH;
            let settings = &term.shared.settings;
            let before = term.shared.env.clock.system() - settings.session_ttl.max(settings.keep_deleted);
            let before = Timestamp::from_system(before);
            let due = page.into_iter().filter(|(_, since)| since.key() < before.key());
            let due: Vec<ChunkId> = due.map(|(chunk, _)| chunk).collect();
            if !due.is_empty() && drop_chunks(&term, &due).await.is_err() {
                return;
            }
            if !full {
                break;
            }
        }
    }
}

async fn drop_chunks(term: &Term, chunks: &[ChunkId]) -> Result<(), super::Gone> {
    let kv = term.kv();
    let mut replicas: Vec<(ChunkId, NodeId)> = Vec::new();
    for chunk in chunks {
        match state::chunk_state(&*kv, *chunk) {
            Ok(Some(state)) => replicas.extend(state.nodes.iter().map(|node| (*chunk, NodeId(*node)))),
            Ok(None) => {}
            Err(error) => {
                super::store_failed("reading a chunk", &error);
                return Ok(());
            }
        }
    }
    let drop = v1::DropChunks { chunks: chunks.iter().map(|chunk| chunk.get()).collect() };
    // The answer names those that were dropped: a chunk that got a user again in between stays.
    let dropped = match term.shared.system(system::Op::DropChunks(drop)).await? {
        Ok(system_answer::Body::Chunks(list)) => list.chunks,
        Ok(_) => Vec::new(),
        Err(error) => {
            tracing::warn!(%error, "idle chunks were not dropped");
            return Ok(());
        }
    };
    for chunk in &dropped {
        term.repairs.dropped(ChunkId(*chunk));
    }
    for (chunk, node) in replicas {
        if dropped.contains(&chunk.get()) {
            term.jobs.add(Job::Delete { node, chunk }, false);
        }
    }
    Ok(())
}
