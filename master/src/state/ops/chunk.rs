//! Chunks: allocated to a session, fenced, sealed, given replicas, dropped.
//!
//! ```text
//!   AllocChunks ──▶ OPEN ──FenceChunk──▶ FENCED ──SealedChunk──▶ SEALED ──DropChunks──▶ gone
//!                  epoch 1               epoch + 1               length = committed, live may fall to 0
//! ```

use super::slices::note_idle;
use super::{Caller, State};
use crate::state::keys;
use crate::state::query::chunk_access;
use crate::state::rows::{OpResult, refused};
use dfs_proto::limits::{ALLOC_CHUNKS_MAX, CHUNK_SIZE_MAX, CHUNK_SIZE_MIN, REAP_ROWS_MAX, REPLICAS_MAX};
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{self, ChunkState, ErrorCode, answer, system_answer};
use dfs_proto::{ChunkId, Epoch, NodeId, SessionId};
use std::collections::BTreeSet;

/// Chunks for the session to append to, one for each placement.
pub fn alloc(s: &mut State<'_>, by: &Caller<'_>, op: &v1::AllocChunks) -> OpResult<answer::Body> {
    let capacity = if op.chunk_size == 0 { s.cluster.chunk_size } else { op.chunk_size };
    let replicas = if op.replicas == 0 { s.cluster.replicas } else { op.replicas };
    let in_range = (CHUNK_SIZE_MIN..=CHUNK_SIZE_MAX).contains(&capacity) && replicas <= REPLICAS_MAX;
    if by.session.get() == 0 || !in_range || op.placements.len() > ALLOC_CHUNKS_MAX as usize {
        return refused(ErrorCode::ErrorInvalid, "an allocation out of range");
    }
    if op.placements.is_empty() {
        return refused(ErrorCode::ErrorNoNodes, "no chunk daemon has room");
    }
    let mut chunks = Vec::with_capacity(op.placements.len());
    for placement in &op.placements {
        check_nodes(s, &placement.nodes)?;
        let state = ChunkState {
            chunk: s.cluster.next_chunk,
            epoch: Epoch::FIRST.get(),
            phase: Phase::Open.into(),
            session: by.session.get(),
            committed: 0,
            nodes: placement.nodes.clone(),
            live: 0,
            capacity,
            wanted_replicas: replicas,
            joined: 0,
        };
        s.cluster.next_chunk += 1;
        s.cluster.chunks += 1;
        let id = ChunkId(state.chunk);
        s.tx.put(keys::unsealed(by.session, id), Vec::new());
        for node in &state.nodes {
            s.tx.put(keys::replica(NodeId(*node), id), Vec::new());
        }
        s.tx.put_chunk(&state);
        chunks.push(chunk_access(&s.tx, &state)?);
    }
    Ok(answer::Body::Chunks(v1::Chunks { chunks }))
}

/// Replicas are on different nodes that all exist, at least one.
pub fn check_nodes(s: &State<'_>, nodes: &[u64]) -> OpResult<()> {
    let different: BTreeSet<u64> = nodes.iter().copied().collect();
    if nodes.is_empty() || different.len() != nodes.len() || nodes.len() > REPLICAS_MAX as usize {
        return refused(
            ErrorCode::ErrorInvalid,
            "a placement without nodes, with too many or with one twice",
        );
    }
    for node in nodes.iter().copied().map(NodeId) {
        if s.tx.find_node(node)?.is_none() {
            return refused(ErrorCode::ErrorNoNodes, format!("chunk daemon {node} is not registered"));
        }
    }
    Ok(())
}

pub fn existing(s: &State<'_>, chunk: u64) -> OpResult<ChunkState> {
    match s.tx.find_chunk(ChunkId(chunk))? {
        Some(state) => Ok(state),
        None => refused(ErrorCode::ErrorNoChunk, format!("chunk {chunk} does not exist")),
    }
}

/// Withdraws the right to append and to commit. Repeating it changes nothing: a new leader goes on from where it stands.
pub fn fence(s: &mut State<'_>, op: &v1::FenceChunk) -> OpResult<system_answer::Body> {
    let mut state = existing(s, op.chunk)?;
    if state.phase() == Phase::Open {
        state.epoch = Epoch(state.epoch).next().get();
        state.set_phase(Phase::Fenced);
        s.tx.put_chunk(&state);
    }
    Ok(system_answer::Body::Fenced(state))
}

/// Every named node has the chunk at its final length, which holds all that is committed.
pub fn sealed(s: &mut State<'_>, op: &v1::SealedChunk) -> OpResult<system_answer::Body> {
    let mut state = existing(s, op.chunk)?;
    match state.phase() {
        Phase::Sealed => return Ok(system_answer::Body::Fenced(state)),
        Phase::Open => return refused(ErrorCode::ErrorConflict, "the chunk was not fenced"),
        Phase::Fenced => {}
    }
    if state.epoch != op.epoch {
        return refused(ErrorCode::ErrorStaleEpoch, format!("the chunk is at epoch {}", state.epoch));
    }
    if op.length < state.committed || op.length > state.capacity {
        return refused(
            ErrorCode::ErrorConflict,
            format!("sealing at {} what is committed up to {}", op.length, state.committed),
        );
    }
    check_nodes(s, &op.nodes)?;
    let id = ChunkId(state.chunk);
    for node in std::mem::take(&mut state.nodes) {
        s.tx.delete(keys::replica(NodeId(node), id));
    }
    for node in &op.nodes {
        s.tx.put(keys::replica(NodeId(*node), id), Vec::new());
    }
    state.nodes.clone_from(&op.nodes);
    state.committed = op.length;
    state.set_phase(Phase::Sealed);
    s.tx.delete(keys::unsealed(SessionId(state.session), id));
    s.tx.put_chunk(&state);
    note_idle(s, &state);
    Ok(system_answer::Body::Fenced(state))
}

/// One more node holds the sealed chunk.
pub fn add_replica(s: &mut State<'_>, op: &v1::AddReplica) -> OpResult<system_answer::Body> {
    let mut state = existing(s, op.chunk)?;
    if state.phase() != Phase::Sealed {
        return refused(ErrorCode::ErrorConflict, "the chunk is not sealed");
    }
    if !state.nodes.contains(&op.node) {
        state.nodes.push(op.node);
        check_nodes(s, &state.nodes)?;
        s.tx.put(keys::replica(NodeId(op.node), ChunkId(op.chunk)), Vec::new());
        s.tx.put_chunk(&state);
    }
    Ok(system_answer::Body::Fenced(state))
}

/// One replica less. Whoever decided that relied on others: they must still be there.
pub fn drop_replica(s: &mut State<'_>, op: &v1::DropReplica) -> OpResult<system_answer::Body> {
    let mut state = existing(s, op.chunk)?;
    if state.phase() != Phase::Sealed {
        return refused(ErrorCode::ErrorConflict, "the chunk is not sealed");
    }
    let stays = |node: &u64| *node != op.node && state.nodes.contains(node);
    if op.relied.is_empty() || !op.relied.iter().all(stays) {
        let text = format!("the replicas are {:?}, not {:?} without {}", state.nodes, op.relied, op.node);
        return refused(ErrorCode::ErrorConflict, text);
    }
    if state.nodes.contains(&op.node) {
        state.nodes.retain(|node| *node != op.node);
        s.tx.delete(keys::replica(NodeId(op.node), ChunkId(op.chunk)));
        s.tx.put_chunk(&state);
    }
    Ok(system_answer::Body::Fenced(state))
}

/// Forgets sealed chunks that nothing uses; answers which it forgot.
pub fn drop_chunks(s: &mut State<'_>, op: &v1::DropChunks) -> OpResult<system_answer::Body> {
    if op.chunks.len() > REAP_ROWS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many chunks in one command");
    }
    let mut dropped = Vec::new();
    for id in op.chunks.iter().copied().map(ChunkId) {
        let Some(state) = s.tx.find_chunk(id)? else { continue };
        if state.phase() != Phase::Sealed || state.live > 0 {
            continue;
        }
        for node in &state.nodes {
            s.tx.delete(keys::replica(NodeId(*node), id));
        }
        s.tx.delete(keys::idle(id));
        s.tx.delete(keys::chunk(id));
        s.cluster.chunks -= 1;
        dropped.push(id.get());
    }
    Ok(system_answer::Body::Chunks(v1::ChunkList { chunks: dropped }))
}
