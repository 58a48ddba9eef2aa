//! What files hold: commit, truncate, fallocate and copy_file_range, all on the slice map alone.

use super::slices::{self, Placed};
use super::{Caller, State, attr, entry, wish};
use crate::state::keys;
use crate::state::rows::{FLAG_APPEND, FLAG_IMMUTABLE, Inode, OpResult, corrupt, refused};
use dfs_proto::limits::{COMMIT_SLICES_MAX, FILE_SIZE_MAX, LAYOUT_SLICES_MAX};
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{self, ChunkState, CommitSlice, ErrorCode, Kind, SliceRow, Timestamp, answer::Body};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, InodeNo};
use std::collections::BTreeSet;

fn file(s: &State<'_>, ino: u64) -> OpResult<Inode> {
    let inode = s.tx.inode(InodeNo(ino))?;
    match inode.kind() {
        Kind::File => Ok(inode),
        Kind::Dir => Err(ErrorCode::ErrorIsDir.into()),
        Kind::Unspecified | Kind::Symlink | Kind::Char | Kind::Block | Kind::Fifo | Kind::Socket => {
            refused(ErrorCode::ErrorInvalid, "not a regular file")
        }
    }
}

/// The end of a range of a file; beyond what a file can hold it is EFBIG.
fn range_end(offset: u64, length: u64) -> OpResult<u64> {
    match offset.checked_add(length) {
        Some(end) if end <= FILE_SIZE_MAX => Ok(end),
        _ => Err(ErrorCode::ErrorFileTooBig.into()),
    }
}

/// Makes written bytes part of the file. Authorised by the open; all of it happens or nothing.
pub fn commit(s: &mut State<'_>, by: &Caller<'_>, op: &v1::Commit) -> OpResult<Body> {
    let mut inode = file(s, op.ino)?;
    if op.slices.len() > COMMIT_SLICES_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many slices in one commit");
    }
    if inode.has_flag(FLAG_IMMUTABLE) {
        return refused(ErrorCode::ErrorNotPermitted, "the immutable flag is set");
    }
    let size_before = inode.attr.size;
    for slice in &op.slices {
        let end = range_end(slice.file_offset, slice.length)?;
        if inode.has_flag(FLAG_APPEND) && slice.file_offset < size_before {
            return refused(ErrorCode::ErrorNotPermitted, "the append-only flag is set");
        }
        check_appendable(s, by, slice)?;
        place(s, &mut inode, slice, ByteOffset(end))?;
        inode.attr.size = inode.attr.size.max(end);
    }
    if op.kill_priv {
        let writer = op.writer.clone().unwrap_or_else(v1::Cred::nobody);
        attr::drop_privileges(s, &writer, &mut inode)?;
    }
    // Times by the client's idea of the master's clock, which may be ahead.
    let now = s.now;
    let past = |time: Option<Timestamp>| {
        time.filter(|time| time.nanos < 1_000_000_000 && time.key() <= now.key()).unwrap_or(now)
    };
    if !op.slices.is_empty() || op.set.is_none() {
        inode.attr.mtime = Some(past(op.mtime));
    }
    if let Some(set) = &op.set {
        attr::set_with_bytes(s, by, &mut inode, set)?;
    }
    // Programs have seen it changed when they wrote, not when it was committed.
    let (done, before) = (past(op.ctime), inode.attr.ctime.unwrap_or_default());
    inode.changed(if done.key() > before.key() { done } else { before });
    s.tx.put_inode(&inode);
    Ok(entry(&inode, false))
}

/// Puts one slice of a commit into the file, over whatever is there.
fn place(s: &mut State<'_>, inode: &mut Inode, slice: &CommitSlice, end: ByteOffset) -> OpResult<()> {
    let from = ByteOffset(slice.file_offset);
    // Cutting comes first: it may free an extent, and changes the chunk's row then.
    slices::cut(s, inode, from, end)?;
    let mut chunk = chunk_of(s, slice)?;
    let bytes = (ByteOffset(slice.chunk_offset), ByteLen(slice.length));
    let extended = slices::extend(s, inode, &mut chunk, from, bytes)?;
    let extent = if extended { None } else { Some(slices::extent_for(s, &mut chunk, bytes.0, bytes.1)?) };
    chunk.committed = chunk.committed.max(slice.record_end);
    wish::join(s, &mut chunk, inode);
    s.tx.put_chunk(&chunk);
    if let Some(extent) = extent {
        let row = SliceRow {
            chunk: slice.chunk,
            chunk_offset: slice.chunk_offset,
            length: slice.length,
            extent: extent.get(),
        };
        slices::insert(s, inode, from, &row)?;
    }
    Ok(())
}

fn chunk_of(s: &State<'_>, slice: &CommitSlice) -> OpResult<ChunkState> {
    match s.tx.find_chunk(ChunkId(slice.chunk))? {
        Some(chunk) => Ok(chunk),
        None => refused(ErrorCode::ErrorNoChunk, format!("chunk {} does not exist", slice.chunk)),
    }
}

/// The session must still own the slice's chunk at this epoch, and the slice must fit into it.
fn check_appendable(s: &State<'_>, by: &Caller<'_>, slice: &CommitSlice) -> OpResult<()> {
    let chunk = chunk_of(s, slice)?;
    let id = chunk.chunk;
    if chunk.phase() != Phase::Open || chunk.epoch != slice.epoch || chunk.session != by.session.get() {
        return refused(ErrorCode::ErrorStaleEpoch, format!("chunk {id} is at epoch {}", chunk.epoch));
    }
    let end = slice.chunk_offset.checked_add(slice.length);
    let fits = slice.length > 0 && end.is_some_and(|end| end <= slice.record_end);
    if !fits || slice.record_end > chunk.capacity {
        return refused(ErrorCode::ErrorInvalid, format!("a slice that does not fit into chunk {id}"));
    }
    Ok(())
}

/// Truncates or extends a file to `size`.
pub fn resize(s: &mut State<'_>, inode: &mut Inode, size: u64) -> OpResult<()> {
    if size > FILE_SIZE_MAX {
        return Err(ErrorCode::ErrorFileTooBig.into());
    }
    slices::cut(s, inode, ByteOffset(size), ByteOffset(u64::MAX))?;
    inode.attr.size = size;
    Ok(())
}

/// fallocate(2). Space is not set aside: chunks are allocated when bytes come.
pub fn fallocate(s: &mut State<'_>, by: &Caller<'_>, op: &v1::Fallocate) -> OpResult<Body> {
    if op.length == 0 {
        return refused(ErrorCode::ErrorInvalid, "an empty range");
    }
    if op.punch_hole && (!op.keep_size || op.zero_range) {
        return refused(
            ErrorCode::ErrorNotSupported,
            "FALLOC_FL_PUNCH_HOLE goes with FALLOC_FL_KEEP_SIZE only",
        );
    }
    let mut inode = file(s, op.ino)?;
    let end = range_end(op.offset, op.length)?;
    let changes_bytes = op.punch_hole || op.zero_range;
    if inode.has_flag(FLAG_IMMUTABLE) || (changes_bytes && inode.has_flag(FLAG_APPEND)) {
        return Err(ErrorCode::ErrorNotPermitted.into());
    }
    if changes_bytes {
        slices::cut(s, &mut inode, ByteOffset(op.offset), ByteOffset(end))?;
    }
    if !op.keep_size {
        inode.attr.size = inode.attr.size.max(end);
    }
    attr::drop_privileges_unless_root(s, by, &mut inode)?;
    inode.modified(s.now);
    s.tx.put_inode(&inode);
    Ok(entry(&inode, false))
}

/// copy_file_range(2) by reference: the target's slices point to the source's extents. May copy less than asked for.
pub fn copy_range(s: &mut State<'_>, by: &Caller<'_>, op: &v1::CopyRange) -> OpResult<Body> {
    let source = file(s, op.from)?;
    let mut target = file(s, op.to)?;
    if target.has_flag(FLAG_APPEND | FLAG_IMMUTABLE) {
        return Err(ErrorCode::ErrorNotPermitted.into());
    }
    let length = op.length.min(source.attr.size.saturating_sub(op.from_offset));
    range_end(op.to_offset, length)?;
    if op.from == op.to && op.from_offset < op.to_offset + length && op.to_offset < op.from_offset + length {
        return refused(ErrorCode::ErrorInvalid, "the ranges overlap");
    }
    if length == 0 {
        return Ok(Body::Copied(v1::Copied { length: 0, attr: Some(target.attr) }));
    }
    let (from, mut to) = (ByteOffset(op.from_offset), ByteOffset(op.from_offset + length));
    let limit = LAYOUT_SLICES_MAX as usize;
    let found = slices::overlapping(&s.tx, source.ino(), from, to, limit)?;
    if found.len() == limit
        && let Some((at, last)) = found.last()
    {
        to = to.min(*at + ByteLen(last.length));
    }
    let copied = to - from;
    let target_from = ByteOffset(op.to_offset);
    slices::cut(s, &mut target, target_from, target_from + copied)?;
    join_all(s, &target, &found)?;
    for slice in &found {
        copy_slice(s, &mut target, slice, (from, to), target_from)?;
    }
    target.attr.size = target.attr.size.max((target_from + copied).get());
    if op.kill_priv {
        attr::drop_privileges(s, by.cred, &mut target)?;
    }
    target.modified(s.now);
    s.tx.put_inode(&target);
    Ok(Body::Copied(v1::Copied { length: copied.get(), attr: Some(target.attr) }))
}

/// The target begins to use the chunks that these slices are of.
fn join_all(s: &mut State<'_>, target: &Inode, found: &[Placed]) -> OpResult<()> {
    let chunks: BTreeSet<u64> = found.iter().map(|(_, slice)| slice.chunk).collect();
    for id in chunks.into_iter().map(ChunkId) {
        let mut chunk =
            s.tx.find_chunk(id)?
                .ok_or_else(|| corrupt(&keys::chunk(id), "used by a slice, but not there"))?;
        wish::join(s, &mut chunk, target);
        s.tx.put_chunk(&chunk);
    }
    Ok(())
}

fn copy_slice(
    s: &mut State<'_>,
    target: &mut Inode,
    slice: &Placed,
    (from, to): (ByteOffset, ByteOffset),
    target_from: ByteOffset,
) -> OpResult<()> {
    let (at, end) = (slice.0.max(from), to.min(slice.0 + ByteLen(slice.1.length)));
    if at >= end {
        let key = keys::slice(target.ino(), at);
        return Err(corrupt(&key, "a slice outside of the range it was found in").into());
    }
    slices::insert(s, target, target_from + (at - from), &slices::part(slice, at, end))
}
