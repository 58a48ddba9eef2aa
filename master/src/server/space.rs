//! Gives space back: sealed chunks that no file uses any more are dropped, and their replicas deleted.
//!
//! A chunk stays for a grace of a session's time to live after its last byte lost its last user, so that whoever looked
//! up its slices before can still read them, and for `keep_deleted`, so that a backup which is not older can be restored. First the drop is committed, only then a replica is deleted.

use super::jobs::Job;
use super::term::Term;
use crate::compact;
use crate::state;
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{self, ChunkState, Timestamp, system, system_answer};
use dfs_proto::{ChunkId, FsResult, InodeNo, NodeId};
use std::sync::Arc;
use std::time::Duration;

/// How often idle chunks are looked for.
const TICK: Duration = Duration::from_secs(1);
/// Chunks dropped with one command.
const BATCH: usize = 256;
/// Chunks looked at in one go, and up to where orphans are counted.
const SURVEY_PAGE: usize = 1024;
const ORPHANS_MAX: usize = 100_000;

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

/// What may be deleted or compacted now.
pub async fn survey(term: &Term) -> FsResult<v1::GcReply> {
    let (kv, mut reply, mut after) = (term.kv(), v1::GcReply::default(), ChunkId(0));
    let failed = |error: std::io::Error| super::store_failed("looking for space to give back", &error);
    loop {
        let page = state::chunks(&*kv, after, SURVEY_PAGE).map_err(failed)?;
        for chunk in &page {
            add(&mut reply, chunk);
        }
        let Some(last) = page.last().filter(|_| page.len() == SURVEY_PAGE) else { break };
        after = ChunkId(last.chunk);
        tokio::task::yield_now().await;
    }
    reply.orphans = state::orphans(&*kv, InodeNo(0), ORPHANS_MAX).map_err(failed)?.len() as u64;
    Ok(reply)
}

/// Counts a chunk, with all its replicas.
fn add(reply: &mut v1::GcReply, chunk: &ChunkState) {
    let replicas = chunk.nodes.len() as u64;
    if chunk.phase() == Phase::Sealed && chunk.live == 0 {
        reply.dead_chunks += 1;
        reply.dead_bytes += chunk.committed * replicas;
    } else if compact::is_half_dead(chunk) {
        reply.half_dead_chunks += 1;
        reply.half_dead_bytes += compact::gain(chunk).get() * replicas;
        reply.copied_bytes += chunk.live * replicas;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dead_counts_with_all_replicas_and_what_is_open_not_at_all() {
        let mut reply = v1::GcReply::default();
        let chunk = |live, phase: Phase| ChunkState {
            committed: 100,
            live,
            phase: phase.into(),
            nodes: vec![1, 2, 3],
            ..ChunkState::default()
        };
        for (live, phase) in [(0, Phase::Sealed), (10, Phase::Sealed), (50, Phase::Sealed), (0, Phase::Open)]
        {
            add(&mut reply, &chunk(live, phase));
        }
        let expected = v1::GcReply {
            dead_chunks: 1,
            dead_bytes: 300,
            half_dead_chunks: 1,
            half_dead_bytes: 270,
            copied_bytes: 30,
            orphans: 0,
        };
        assert_eq!(reply, expected);
    }
}
