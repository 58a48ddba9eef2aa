//! Compaction: extents of half-dead chunks move, with all that uses them, into a chunk that was made of copies of them.
//!
//! ```text
//!   ReserveChunk ──▶ daemons make the chunk, every replica on its disk ──▶ Relocate(new) ──▶ Relocate … ──▶ old chunk idle
//!                └──▶ it fails, or another master leads ──▶ ReleaseChunks ──▶ what was made is deleted
//! ```
//!
//! A file's bytes stay what they are, so no inode changes, not even its version: caches of slices stay right as long as the old
//! chunk is there, and whoever finds it gone asks for the slices again. What lost its users since it was copied is left out:
//! extents of a sealed chunk never change and never come back, so that an extent is there is all that has to be looked at.

use super::chunk::{check_nodes, existing};
use super::slices::{self, note_idle};
use super::{State, wish};
use crate::state::keys;
use crate::state::rows::{OpResult, corrupt, number, refused};
use dfs_proto::limits::{CHUNK_SIZE_MAX, REAP_ROWS_MAX, REPLICAS_MAX};
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{self, ChunkState, ErrorCode, ExtentRow, SliceRow, system_answer::Body};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, Epoch, InodeNo, NodeId};

/// Sets a number aside for a chunk that is about to be made.
pub fn reserve(s: &mut State<'_>) -> Body {
    let id = ChunkId(s.cluster.next_chunk);
    s.cluster.next_chunk += 1;
    s.tx.put(keys::reserved(id), Vec::new());
    Body::Chunks(v1::ChunkList { chunks: vec![id.get()] })
}

/// These numbers never become chunks. Answers those that might have.
pub fn release(s: &mut State<'_>, op: &v1::ReleaseChunks) -> OpResult<Body> {
    if op.chunks.len() > REAP_ROWS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many chunks in one command");
    }
    let mut released = Vec::new();
    for id in op.chunks.iter().copied().map(ChunkId) {
        let key = keys::reserved(id);
        if s.tx.get(&key)?.is_some() {
            s.tx.delete(key);
            released.push(id.get());
        }
    }
    Ok(Body::Chunks(v1::ChunkList { chunks: released }))
}

/// Moves extents, at most [`REAP_ROWS_MAX`] users of them together: what did not fit is named again by the leader.
pub fn relocate(s: &mut State<'_>, op: &v1::Relocate) -> OpResult<Body> {
    if op.moves.len() > REAP_ROWS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many extents in one command");
    }
    let mut target = match &op.new {
        Some(new) => make(s, ChunkId(op.to), new)?,
        None => existing(s, op.to)?,
    };
    if target.phase() != Phase::Sealed {
        return refused(ErrorCode::ErrorConflict, "the chunk is not sealed");
    }
    let mut budget = REAP_ROWS_MAX;
    for extent in &op.moves {
        budget -= move_extent(s, &mut target, extent, budget)?;
        if budget == 0 {
            break;
        }
    }
    if target.live > 0 {
        s.tx.delete(keys::idle(ChunkId(target.chunk)));
    } else if op.new.is_some() {
        note_idle(s, &target);
    }
    s.tx.put_chunk(&target);
    Ok(Body::Fenced(target))
}

/// A reserved number becomes a sealed chunk that nothing uses yet.
fn make(s: &mut State<'_>, id: ChunkId, new: &v1::NewChunk) -> OpResult<ChunkState> {
    let reserved = keys::reserved(id);
    if s.tx.get(&reserved)?.is_none() {
        return refused(ErrorCode::ErrorNoChunk, format!("the number of chunk {id} is not reserved"));
    }
    if !(1..=CHUNK_SIZE_MAX).contains(&new.length) || !(1..=REPLICAS_MAX).contains(&new.replicas) {
        return refused(ErrorCode::ErrorInvalid, "a chunk out of range");
    }
    check_nodes(s, &new.nodes)?;
    for node in &new.nodes {
        s.tx.put(keys::replica(NodeId(*node), id), Vec::new());
    }
    s.tx.delete(reserved);
    s.cluster.chunks += 1;
    Ok(ChunkState {
        chunk: id.get(),
        epoch: Epoch::FIRST.next().get(),
        phase: Phase::Sealed.into(),
        session: 0,
        committed: new.length,
        nodes: new.nodes.clone(),
        live: 0,
        capacity: new.length,
        // What its sources are to have may have changed since it was ordered: it follows from them, extent by extent.
        wanted_replicas: if s.keeps_wishes { 1 } else { new.replicas },
        joined: 0,
    })
}

/// Moves up to `budget` users of an extent; answers how many, or one for an extent without any.
fn move_extent(s: &mut State<'_>, target: &mut ChunkState, op: &v1::Move, budget: usize) -> OpResult<usize> {
    let (from, extent) = (ChunkId(op.chunk), ByteOffset(op.extent));
    let key = keys::extent(from, extent);
    let Some(row) = s.tx.row::<ExtentRow>(&key)? else { return Ok(1) };
    let source = existing(s, op.chunk)?;
    if op.chunk == target.chunk || source.phase() != Phase::Sealed || row.length != op.length {
        let text = format!("the extent at {extent} of chunk {from} is not one to be moved");
        return refused(ErrorCode::ErrorConflict, text);
    }
    let (to, length) = (ByteOffset(op.to_offset), ByteLen(op.length));
    let fits = op.to_offset.checked_add(op.length).is_some_and(|end| end <= target.committed);
    if !fits || slices::extent_for(s, target, to, length)? != to {
        let text = format!("there is no place for {length} bytes at {to} of chunk {}", target.chunk);
        return refused(ErrorCode::ErrorConflict, text);
    }
    target.wanted_replicas = target.wanted_replicas.max(source.wanted_replicas);
    wish::count(s, target);
    let first = row.has_first.then_some((InodeNo(row.first_ino), ByteOffset(row.first_offset)));
    let further =
        s.tx.collect(&keys::users(from, extent), budget - usize::from(first.is_some()), |key, _| {
            Ok((InodeNo(number(key, 2)?), ByteOffset(number(key, 3)?)))
        })?;
    let users: Vec<_> = first.into_iter().chain(further).collect();
    for (ino, at) in &users {
        let slice_key = keys::slice(*ino, *at);
        let old: SliceRow =
            s.tx.row(&slice_key)?.ok_or_else(|| corrupt(&slice_key, "an extent's user, but not there"))?;
        // A user that is none any more, which `dfs fsck --repair` mends; its bytes must not become others.
        if (old.chunk, old.extent) != (from.get(), extent.get()) {
            let text = format!("inode {ino} at {at} does not use the extent at {extent} of chunk {from}");
            return refused(ErrorCode::ErrorConflict, text);
        }
        let new = SliceRow {
            chunk: target.chunk,
            chunk_offset: to.get() + (old.chunk_offset - extent.get()),
            length: old.length,
            extent: to.get(),
        };
        slices::add_user(s, &new, *ino, *at)?;
        s.tx.put_row(slice_key, &new);
        slices::remove_user(s, &old, *ino, *at)?;
    }
    Ok(users.len())
}
