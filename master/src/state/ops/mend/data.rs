//! Slices, extents and chunks that do not agree.

use super::{Line, slice_at};
use crate::state::keys;
use crate::state::ops::slices::{self, note_idle};
use crate::state::ops::{State, wish};
use crate::state::rows::{OpResult, decode, number};
use dfs_proto::limits::REAP_ROWS_MAX;
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{self, ChunkState, ExtentRow, SliceRow};
use dfs_proto::{ByteOffset, ChunkId, InodeNo, NodeId, SessionId};
use std::collections::BTreeSet;
use std::io;

/// Makes a slice one user of its extent, which holds it.
pub fn slice(s: &mut State<'_>, op: &v1::SlicePlace) -> OpResult<Line> {
    let (ino, at) = (InodeNo(op.ino), ByteOffset(op.at));
    let Some(row) = slice_at(s, ino, at)? else { return Ok(None) };
    let Some(mut chunk) = s.tx.find_chunk(ChunkId(row.chunk))? else { return Ok(None) };
    let Some(lengthened) = hold(s, &mut chunk, &row)? else { return Ok(None) };
    let key = keys::extent(ChunkId(row.chunk), ByteOffset(row.extent));
    let user = keys::user(ChunkId(row.chunk), ByteOffset(row.extent), ino, at);
    let mut extent: ExtentRow = s.tx.row(&key)?.unwrap_or_default();
    let first = extent.has_first && (extent.first_ino, extent.first_offset) == (ino.get(), at.get());
    match (first, s.tx.get(&user)?.is_some()) {
        (false, false) => {
            slices::add_user(s, &row, ino, at)?;
            wish::moved(s, ChunkId(row.chunk))?;
        }
        (true, true) => {
            s.tx.delete(user);
            extent.others = extent.others.saturating_sub(1);
            s.tx.put_row(key, &extent);
        }
        (true, false) | (false, true) if lengthened => {}
        (true, false) | (false, true) => return Ok(None),
    }
    Ok(Some(format!("the slice at {at} of inode {ino} is a user of its extent in chunk {}", row.chunk)))
}

/// Makes the extent of a slice hold all of it, as far as there is room between its neighbours and in what is committed. Answers
/// whether it was changed; None: there is no room.
fn hold(s: &mut State<'_>, chunk: &mut ChunkState, row: &SliceRow) -> OpResult<Option<bool>> {
    let (id, at) = (ChunkId(row.chunk), ByteOffset(row.extent));
    let end = match row.chunk_offset.checked_add(row.length) {
        Some(end) if row.chunk_offset >= row.extent && row.length > 0 => end,
        _ => return Ok(None),
    };
    let key = keys::extent(id, at);
    let old: Option<ExtentRow> = s.tx.row(&key)?;
    let length = end - row.extent;
    if old.is_some_and(|old| old.length >= length) {
        return Ok(Some(false));
    }
    let (from, to) = keys::extents(id, ByteOffset(0), at);
    let before = match s.tx.last(&from, &to)? {
        Some((key, value)) => number(&key, 1)? + decode::<ExtentRow>(&key, &value)?.length,
        None => 0,
    };
    let behind = keys::extents(id, ByteOffset(row.extent.saturating_add(1)), ByteOffset(u64::MAX));
    let behind = s.tx.collect(&behind, 1, |key, _| number(key, 1))?.first().copied();
    if before > row.extent || behind.is_some_and(|behind| behind < end) || end > chunk.committed {
        return Ok(None);
    }
    let more = length - old.map_or(0, |old| old.length);
    s.tx.put_row(key, &ExtentRow { length, ..old.unwrap_or_default() });
    chunk.live = chunk.live.saturating_add(more);
    s.cluster.live_bytes = s.cluster.live_bytes.saturating_add(more);
    s.tx.delete(keys::idle(id));
    s.tx.put_chunk(chunk);
    Ok(Some(true))
}

/// Makes an extent count the users that it has. Without any it goes, if the check has seen no slice that names it, either.
pub fn extent(s: &mut State<'_>, op: &v1::ExtentPlace) -> OpResult<Line> {
    let (id, at) = (ChunkId(op.chunk), ByteOffset(op.at));
    let users = s.tx.collect(&keys::users(id, at), REAP_ROWS_MAX + 1, |key, _| Ok(key.to_vec()))?;
    if users.len() > REAP_ROWS_MAX {
        return Ok(None);
    }
    let uses = |s: &State<'_>, ino, offset| -> io::Result<bool> {
        let row = slice_at(s, InodeNo(ino), ByteOffset(offset))?;
        Ok(row.is_some_and(|row| (row.chunk, row.extent) == (op.chunk, op.at)))
    };
    let key = keys::extent(id, at);
    let old: Option<ExtentRow> = s.tx.row(&key)?;
    let mut others = 0;
    for user in &users {
        if old.is_some() && uses(s, number(user, 2)?, number(user, 3)?)? {
            others += 1;
        } else {
            s.tx.delete(user.clone());
        }
    }
    let Some(old) = old else {
        let line = format!("users of an extent at {at} of chunk {id}, which does not exist, are forgotten");
        return Ok((!users.is_empty()).then_some(line));
    };
    let has_first = old.has_first && uses(s, old.first_ino, old.first_offset)?;
    if !has_first && others == 0 && op.unused {
        s.tx.delete(key);
        uncount(s, id, old.length)?;
        return Ok(Some(format!("the extent at {at} of chunk {id}, which nothing uses, is forgotten")));
    }
    let mut new = ExtentRow { length: old.length, has_first, others, ..ExtentRow::default() };
    if has_first {
        (new.first_ino, new.first_offset) = (old.first_ino, old.first_offset);
    }
    if new == old && others == users.len() as u64 {
        return Ok(None);
    }
    s.tx.put_row(key, &new);
    let count = others + u64::from(has_first);
    Ok(Some(format!("the extent at {at} of chunk {id} counts {count} users")))
}

/// Bytes of a chunk are live no more.
fn uncount(s: &mut State<'_>, id: ChunkId, length: u64) -> OpResult<()> {
    let Some(mut chunk) = s.tx.find_chunk(id)? else { return Ok(()) };
    chunk.live = chunk.live.saturating_sub(length);
    s.cluster.live_bytes = s.cluster.live_bytes.saturating_sub(length);
    s.tx.put_chunk(&chunk);
    if live(s, id)? == 0 {
        note_idle(s, &chunk);
    }
    Ok(())
}

/// The live bytes of a chunk, counted.
pub fn live(s: &State<'_>, id: ChunkId) -> OpResult<u64> {
    let all = keys::extents(id, ByteOffset(0), ByteOffset(u64::MAX));
    let lengths = s.tx.collect(&all, usize::MAX, |key, value| Ok(decode::<ExtentRow>(key, value)?.length))?;
    Ok(lengths.into_iter().sum())
}

/// Counts a chunk's live bytes, and makes the rows that follow from its own.
pub fn chunk(s: &mut State<'_>, id: ChunkId) -> OpResult<Line> {
    let Some(mut chunk) = s.tx.find_chunk(id)? else { return Ok(None) };
    let old = chunk.clone();
    let mut different = BTreeSet::new();
    chunk.nodes.retain(|node| different.insert(*node));
    chunk.chunk = id.get();
    // The cluster's counter is about extents, not about what chunks count.
    chunk.live = live(s, id)?;
    wish::set_right(s, &mut chunk);
    let mut rows: Vec<Vec<u8>> = chunk.nodes.iter().map(|node| keys::replica(NodeId(*node), id)).collect();
    if chunk.phase() != Phase::Sealed {
        rows.push(keys::unsealed(SessionId(chunk.session), id));
    }
    let mut changed = chunk != old;
    for row in rows {
        if s.tx.get(&row)?.is_none() {
            s.tx.put(row, Vec::new());
            changed = true;
        }
    }
    let idle = chunk.phase() == Phase::Sealed && chunk.live == 0;
    if idle && s.tx.get(&keys::idle(id))?.is_none() {
        note_idle(s, &chunk);
        changed = true;
    }
    if chunk != old {
        s.tx.put_chunk(&chunk);
    }
    Ok(changed.then(|| {
        format!("chunk {id} counts {} live bytes and has the rows that follow from its own", chunk.live)
    }))
}
