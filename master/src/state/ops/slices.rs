//! The slice map: which bytes of a file are which bytes of a chunk, and who uses an extent.
//!
//! ```text
//!   file   |---- slice A ----|   hole   |-- slice B --|          rows (ino, file offset): never overlapping, all below size
//!                 |                           |
//!   chunk  ...|------ extent X ------|...|--- extent Y ---|...   rows (chunk, offset): as it was committed, never overlapping
//! ```
//!
//! A slice lies inside one extent. An extent counts its users, which are slices; it goes, and its bytes stop being live,
//! with the last of them. Cutting a hole into a slice makes it two users, so an extent is live as a whole or not at all.

use super::{State, wish};
use crate::state::keys;
use crate::state::kv::Tx;
use crate::state::rows::{Inode, OpResult, corrupt, decode, number, refused};
use dfs_proto::limits::RECORD_MAX;
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{ChunkState, ErrorCode, ExtentRow, SliceRow};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, InodeNo};
use std::io;

/// A slice with the place in the file where it begins.
pub type Placed = (ByteOffset, SliceRow);

pub fn read_row(key: &[u8], value: &[u8]) -> io::Result<Placed> {
    Ok((ByteOffset(number(key, 1)?), decode(key, value)?))
}

fn end(slice: &Placed) -> ByteOffset {
    slice.0 + ByteLen(slice.1.length)
}

/// The slices that overlap `[from, to)`, whole, in file order, at most `limit` of them.
pub fn overlapping(
    tx: &Tx<'_>,
    ino: InodeNo,
    from: ByteOffset,
    to: ByteOffset,
    limit: usize,
) -> io::Result<Vec<Placed>> {
    let mut found = Vec::new();
    if from >= to || limit == 0 {
        return Ok(found);
    }
    let (first, last) = keys::slices(ino, ByteOffset(0), from);
    if let Some((key, value)) = tx.last(&first, &last)? {
        let before = read_row(&key, &value)?;
        if end(&before) > from {
            found.push(before);
        }
    }
    let rest = limit - found.len();
    found.extend(tx.collect(&keys::slices(ino, from, to), rest, read_row)?);
    Ok(found)
}

/// Makes `[from, to)` of the file a hole. Changes the row's byte count, not its size or times.
pub fn cut(s: &mut State<'_>, inode: &mut Inode, from: ByteOffset, to: ByteOffset) -> OpResult<()> {
    // Slices lie below the size, so an append has nothing to look for.
    if from.get() >= inode.attr.size {
        return Ok(());
    }
    let ino = inode.ino();
    let mut gone = 0;
    for slice in overlapping(&s.tx, ino, from, to, usize::MAX)? {
        let (at, slice_end) = (slice.0, end(&slice));
        gone += slice.1.length.min(slice_end.min(to).get() - at.max(from).get());
        if slice_end > to {
            let tail = part(&slice, to, slice_end);
            add_user(s, &tail, ino, to)?;
            s.tx.put_row(keys::slice(ino, to), &tail);
            wish::moved(s, ChunkId(tail.chunk))?;
        }
        if at < from {
            s.tx.put_row(keys::slice(ino, at), &part(&slice, at, from));
        } else {
            s.tx.delete(keys::slice(ino, at));
            remove_user(s, &slice.1, ino, at)?;
        }
    }
    inode.set_mapped(ByteLen(inode.mapped.get() - gone));
    Ok(())
}

/// The part of a slice that is `[from, to)` of the file; both lie within it.
pub fn part(slice: &Placed, from: ByteOffset, to: ByteOffset) -> SliceRow {
    let skipped = from - slice.0;
    SliceRow {
        chunk: slice.1.chunk,
        chunk_offset: slice.1.chunk_offset + skipped.get(),
        length: (to - from).get(),
        extent: slice.1.extent,
    }
}

/// Puts a slice where the file has a hole, of an extent that exists.
pub fn insert(s: &mut State<'_>, inode: &mut Inode, at: ByteOffset, row: &SliceRow) -> OpResult<()> {
    add_user(s, row, inode.ino(), at)?;
    s.tx.put_row(keys::slice(inode.ino(), at), row);
    inode.set_mapped(ByteLen(inode.mapped.get() + row.length));
    Ok(())
}

/// The extent that holds these bytes of a chunk: one that has them already, or a new one that is as yet without users.
/// Bytes that lie across the border of an extent belong to no commit.
pub fn extent_for(
    s: &mut State<'_>,
    chunk: &mut ChunkState,
    at: ByteOffset,
    len: ByteLen,
) -> OpResult<ByteOffset> {
    let id = ChunkId(chunk.chunk);
    if at.get() < chunk.committed {
        let (first, last) = keys::extents(id, ByteOffset(0), at + len);
        if let Some((found, value)) = s.tx.last(&first, &last)? {
            let extent: ExtentRow = decode(&found, &value)?;
            let (start, end) = (number(&found, 1)?, number(&found, 1)? + extent.length);
            if start <= at.get() && (at + len).get() <= end {
                return Ok(ByteOffset(start));
            }
            if end > at.get() {
                return overlap(id, at);
            }
        }
    }
    s.tx.put_row(keys::extent(id, at), &ExtentRow { length: len.get(), ..Default::default() });
    chunk.live += len.get();
    s.cluster.live_bytes += len.get();
    Ok(at)
}

/// Bytes appended to file and chunk right behind a slice make that slice and its extent longer, when nothing else uses
/// the extent: a log of a million small appends is not a million rows. An extent lives as a whole, so it grows only up to
/// a record's length. Answers whether it did; the place in the file must be a hole, the bytes of the chunk new.
pub fn extend(
    s: &mut State<'_>,
    inode: &mut Inode,
    chunk: &mut ChunkState,
    file_at: ByteOffset,
    (at, len): (ByteOffset, ByteLen),
) -> OpResult<bool> {
    if file_at.get() == 0 || at.get() < chunk.committed {
        return Ok(false);
    }
    let ino = inode.ino();
    let (first, last) = keys::slices(ino, ByteOffset(0), file_at);
    let Some((key, value)) = s.tx.last(&first, &last)? else { return Ok(false) };
    let mut before = read_row(&key, &value)?;
    let follows = end(&before) == file_at
        && before.1.chunk == chunk.chunk
        && before.1.chunk_offset + before.1.length == at.get();
    if !follows {
        return Ok(false);
    }
    let (extent_key, mut extent) = extent_of(s, &before.1)?;
    let alone = extent.others == 0 && (extent.first_ino, extent.first_offset) == (ino.get(), before.0.get());
    let ends_there = before.1.extent + extent.length == at.get();
    if !alone || !ends_there || extent.length + len.get() > RECORD_MAX as u64 {
        return Ok(false);
    }
    extent.length += len.get();
    before.1.length += len.get();
    s.tx.put_row(extent_key, &extent);
    s.tx.put_row(key, &before.1);
    chunk.live += len.get();
    s.cluster.live_bytes += len.get();
    inode.set_mapped(ByteLen(inode.mapped.get() + len.get()));
    Ok(true)
}

fn overlap<T>(chunk: ChunkId, at: ByteOffset) -> OpResult<T> {
    refused(ErrorCode::ErrorInvalid, format!("bytes at {at} of chunk {chunk} lie across an extent's border"))
}

fn extent_of(s: &State<'_>, slice: &SliceRow) -> io::Result<(Vec<u8>, ExtentRow)> {
    let key = keys::extent(ChunkId(slice.chunk), ByteOffset(slice.extent));
    match s.tx.row(&key)? {
        Some(extent) => Ok((key, extent)),
        None => Err(corrupt(&key, "a slice without its extent")),
    }
}

/// The slice at this place uses its extent from now on.
pub fn add_user(s: &mut State<'_>, slice: &SliceRow, ino: InodeNo, at: ByteOffset) -> io::Result<()> {
    let (key, mut extent) = extent_of(s, slice)?;
    if extent.has_first {
        extent.others += 1;
        s.tx.put(keys::user(ChunkId(slice.chunk), ByteOffset(slice.extent), ino, at), Vec::new());
    } else {
        (extent.has_first, extent.first_ino, extent.first_offset) = (true, ino.get(), at.get());
    }
    s.tx.put_row(key, &extent);
    Ok(())
}

/// The slice at this place uses its extent no more.
pub fn remove_user(s: &mut State<'_>, slice: &SliceRow, ino: InodeNo, at: ByteOffset) -> io::Result<()> {
    let (key, mut extent) = extent_of(s, slice)?;
    if extent.has_first && (extent.first_ino, extent.first_offset) == (ino.get(), at.get()) {
        (extent.has_first, extent.first_ino, extent.first_offset) = (false, 0, 0);
    } else {
        let user = keys::user(ChunkId(slice.chunk), ByteOffset(slice.extent), ino, at);
        extent.others =
            extent.others.checked_sub(1).ok_or_else(|| corrupt(&user, "an extent without this user"))?;
        s.tx.delete(user);
    }
    if extent.has_first || extent.others > 0 {
        s.tx.put_row(key, &extent);
        return Ok(());
    }
    s.tx.delete(key);
    let id = ChunkId(slice.chunk);
    let mut chunk =
        s.tx.find_chunk(id)?.ok_or_else(|| corrupt(&keys::chunk(id), "an extent without its chunk"))?;
    chunk.live -= extent.length;
    s.cluster.live_bytes -= extent.length;
    s.tx.put_chunk(&chunk);
    note_idle(s, &chunk);
    Ok(())
}

/// A sealed chunk without live bytes never gets any again: from now on it may be dropped.
pub fn note_idle(s: &mut State<'_>, chunk: &ChunkState) {
    if chunk.phase() == Phase::Sealed && chunk.live == 0 {
        let now = s.now;
        s.tx.put_row(keys::idle(ChunkId(chunk.chunk)), &now);
    }
}
