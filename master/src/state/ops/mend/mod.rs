//! `dfs fsck --repair`: sets right what a check of the whole state found, one fault after another.
//!
//! What follows from other rows is made to follow again; what names nothing is removed; what has lost its name gets one in
//! `/lost+found`. No slice, no inode and no chunk is ever removed here, so no bytes are. Each fault is judged anew by the
//! rows that it is about; where these rows cannot tell (how many names an inode has is written nowhere but in all directories
//! together) the check says it, and it counts only if the inode has not changed since.

mod data;
mod names;

pub use names::touched;

use super::{State, wish};
use crate::state::ended::second_of;
use crate::state::keys::{self, KeyRange, tag};
use crate::state::restored::Base;
use crate::state::rows::{Inode, OpResult, decode, number, refused};
use dfs_proto::limits::MEND_FAULTS_MAX;
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{self, ErrorCode, fault::What, system_answer::Body};
use dfs_proto::{ByteOffset, ChunkId, InodeNo, SessionId};
use std::io;

/// What was mended, in words; None: nothing was wrong any more, or it cannot be mended.
type Line = Option<String>;

/// Carries out the command; see `Mend` in meta.proto.
pub fn mend(s: &mut State<'_>, op: &v1::Mend) -> OpResult<Body> {
    if op.faults.len() > MEND_FAULTS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many faults in one command");
    }
    if op.mended != s.cluster.mended {
        return refused(ErrorCode::ErrorConflict, "the state has been mended since it was checked");
    }
    let mut lines = Vec::new();
    for what in op.faults.iter().filter_map(|fault| fault.what.as_ref()) {
        lines.extend(match what {
            What::Row(key) => row(s, key)?,
            What::Slice(op) => data::slice(s, op)?,
            What::Extent(op) => data::extent(s, op)?,
            What::Chunk(chunk) => data::chunk(s, ChunkId(*chunk))?,
            What::Entry(op) => names::entry(s, op)?,
            What::Missing(op) => names::missing(s, op)?,
            What::Inode(op) => names::inode(s, op)?,
            What::Nameless(op) => names::nameless(s, op)?,
            What::Counters(op) => counters(s, *op),
            What::Numbers(_) => numbers(s)?,
            What::Wish(ino) => wish(s, InodeNo(*ino))?,
        });
    }
    s.cluster.mended += 1;
    Ok(Body::Mended(v1::Mended { lines }))
}

/// Deletes a row that follows from others, which say that it should not be there, or that belongs to nothing.
fn row(s: &mut State<'_>, key: &[u8]) -> OpResult<Line> {
    if s.tx.get(key)?.is_none() {
        return Ok(None);
    }
    let at = |index| number(key, index);
    let chunk = |s: &State<'_>, id: u64| s.tx.find_chunk(ChunkId(id));
    let (stays, what) = match key.first().copied() {
        Some(tag::UNSEALED) => {
            let (session, id) = (at(0)?, at(1)?);
            let stays =
                chunk(s, id)?.is_some_and(|state| state.phase() != Phase::Sealed && state.session == session);
            (stays, format!("chunk {id} is not said to be appended to by session {session} any more"))
        }
        Some(tag::REPLICA) => {
            let (node, id) = (at(0)?, at(1)?);
            let stays = chunk(s, id)?.is_some_and(|state| state.nodes.contains(&node));
            (stays, format!("node {node:016x} is not said to hold chunk {id} any more"))
        }
        Some(tag::IDLE) => {
            let id = at(0)?;
            let stays = chunk(s, id)?.is_some_and(|state| state.phase() == Phase::Sealed)
                && data::live(s, ChunkId(id))? == 0;
            (stays, format!("chunk {id} is not said to be idle any more"))
        }
        Some(tag::RESERVED) => {
            let id = at(0)?;
            (chunk(s, id)?.is_none(), format!("the number of chunk {id} is not reserved any more"))
        }
        Some(tag::ANSWER) => {
            let (session, seq) = (at(0)?, at(1)?);
            let running = s.tx.find_session(SessionId(session))?.map(|row| row.lowest_unanswered);
            let ended = s.tx.row::<v1::EndedRow>(&keys::ended(SessionId(session)))?;
            let lowest = running.or(ended.map(|row| row.lowest_unanswered));
            let stays = lowest.is_some_and(|lowest| seq >= lowest);
            (stays, format!("answer {seq} of session {session} is forgotten"))
        }
        Some(tag::ENDED) => {
            let session = at(0)?;
            let row: Option<v1::EndedRow> = s.tx.row(key)?;
            let listed = match row {
                Some(row) => s.tx.get(&keys::ended_at(second_of(&row), SessionId(session)))?.is_some(),
                None => false,
            };
            let stays = listed && s.tx.find_session(SessionId(session))?.is_none();
            (stays, format!("the end of session {session} is forgotten"))
        }
        Some(tag::ENDED_AT) => {
            let (seconds, session) = (at(0)?, at(1)?);
            let row: Option<v1::EndedRow> = s.tx.row(&keys::ended(SessionId(session)))?;
            (
                row.is_some_and(|row| second_of(&row) == seconds),
                format!("that session {session} ended at {seconds} is forgotten"),
            )
        }
        Some(tag::LEASED) => {
            let session = at(0)?;
            let stays = s.tx.find_session(SessionId(session))?.is_some();
            (stays, format!("leases of session {session}, which does not exist, are forgotten"))
        }
        Some(tag::ORPHAN) => {
            let ino = at(0)?;
            let stays = s.tx.find_inode(InodeNo(ino))?.is_some();
            (stays, format!("orphan {ino}, which does not exist, is forgotten"))
        }
        Some(tag::REVIEW) => {
            let ino = at(0)?;
            let stays = s.tx.find_inode(InodeNo(ino))?.is_some_and(|inode| inode.is_file());
            (stays, format!("inode {ino}, which is no file, is not noted for its replicas any more"))
        }
        Some(tag::XATTR) => {
            let ino = InodeNo(at(0)?);
            let stays = s.tx.find_inode(ino)?.is_some() || is_evident(s, ino)?;
            (stays, format!("an attribute of inode {ino}, which does not exist, is removed"))
        }
        _ => (true, String::new()),
    };
    if stays {
        return Ok(None);
    }
    s.tx.delete(key.to_vec());
    Ok(Some(what))
}

/// Whether there are slices or entries of an inode, be it there or not: it can be made again.
fn is_evident(s: &State<'_>, ino: InodeNo) -> io::Result<bool> {
    let any = |range: &KeyRange| Ok::<_, io::Error>(!s.tx.collect(range, 1, |_, _| Ok(()))?.is_empty());
    Ok(any(&keys::slices(ino, ByteOffset(0), ByteOffset(u64::MAX)))? || any(&keys::dentries_after(ino, 0))?)
}

fn counters(s: &mut State<'_>, op: v1::CountersOff) -> Line {
    let cluster = &mut s.cluster;
    cluster.files = cluster.files.wrapping_add_signed(op.files);
    cluster.chunks = cluster.chunks.wrapping_add_signed(op.chunks);
    cluster.live_bytes = cluster.live_bytes.wrapping_add_signed(op.live_bytes);
    let v1::ClusterRow { files, chunks, live_bytes, .. } = cluster;
    Some(format!("the cluster counts {files} files, {chunks} chunks and {live_bytes} live bytes"))
}

/// Numbers that were given and are not there any more cannot be told from those that never were, so far more is skipped than
/// is taken.
fn numbers(s: &mut State<'_>) -> OpResult<Line> {
    let now = u64::try_from(s.now.seconds).unwrap_or(0);
    let greatest = |table| -> io::Result<u64> {
        let (from, to) = keys::table(table);
        s.tx.last(&from, &to)?.map_or(Ok(0), |(key, _)| number(&key, 0))
    };
    let chunk = greatest(tag::CHUNK)?.max(greatest(tag::RESERVED)?);
    let ino = greatest(tag::INODE)?;
    // The answers of an ended session are those of its number, too.
    let session = greatest(tag::SESSION)?.max(greatest(tag::ENDED)?).max(greatest(tag::ANSWER)?);
    let cluster = &mut s.cluster;
    let mut lifted = false;
    for (next, taken) in
        [(&mut cluster.next_ino, ino), (&mut cluster.next_chunk, chunk), (&mut cluster.next_session, session)]
    {
        if *next <= taken {
            *next = Base::of_second(now).lift(taken);
            lifted = true;
        }
    }
    let v1::ClusterRow { next_ino, next_chunk, next_session, .. } = cluster;
    Ok(lifted.then(|| {
        format!("the next inode is {next_ino}, the next chunk {next_chunk}, the next session {next_session}")
    }))
}

/// Notes a file that wants more replicas than a chunk of it is to have: the leader tells the chunk.
fn wish(s: &mut State<'_>, ino: InodeNo) -> OpResult<Line> {
    let Some(inode) = s.tx.find_inode(ino)?.filter(Inode::is_file) else { return Ok(None) };
    if wish::is_noted(s, ino)? || !wish::lacks(s, &inode)? {
        return Ok(None);
    }
    wish::note(s, &inode);
    Ok(Some(format!("inode {ino} is noted: chunks of it are to have as many replicas as it wants")))
}

/// Reads the slice of an inode at a place.
fn slice_at(s: &State<'_>, ino: InodeNo, at: ByteOffset) -> io::Result<Option<v1::SliceRow>> {
    let key = keys::slice(ino, at);
    s.tx.get(&key)?.map(|value| decode(&key, &value)).transpose()
}
