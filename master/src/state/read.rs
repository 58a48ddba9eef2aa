//! Direct looks at the state, for the server: the cluster's settings, sessions, nodes, chunks and orphans. Long tables are
//! read in pages: pass the last number of a page to get the next one, 0 to begin.

use super::ended::tells;
use super::keys::{self, tag};
use super::kv::{Kv, Tx};
use super::rows::{corrupt, decode, number};
use dfs_proto::v1::{self, LeaseKind, Timestamp};
use dfs_proto::{ByteOffset, ChunkId, InodeNo, NodeId, SessionId};
use std::io;

/// The cluster's settings and counters; None before Init was applied.
pub fn cluster_row(kv: &dyn Kv) -> io::Result<Option<v1::ClusterRow>> {
    Tx::new(kv).row(&keys::cluster())
}

/// Whether a chunk's number was given by this state: if there is no such chunk any more, nobody needs it. A number that was
/// given by the history after the backup that this state is of was not.
#[must_use]
pub fn was_given(cluster: &v1::ClusterRow, chunk: ChunkId) -> bool {
    let newer = |range: &v1::ChunkRange| (range.from..range.to).contains(&chunk.get());
    chunk.get() < cluster.next_chunk && !cluster.newer.iter().any(newer)
}

/// One session.
pub fn session(kv: &dyn Kv, session: SessionId) -> io::Result<Option<v1::SessionRow>> {
    Tx::new(kv).find_session(session)
}

/// Whether an earlier session of the client may have carried a change out, or may yet, and does not say so.
pub fn is_undecided(kv: &dyn Kv, command: &v1::Command) -> io::Result<bool> {
    let tx = Tx::new(kv);
    for before in &command.earlier {
        let session = SessionId(before.session);
        let ended: Option<v1::EndedRow> = tx.row(&keys::ended(session))?;
        if tx.find_session(session)?.is_some() || !ended.is_some_and(|row| tells(&row, before, command.seq)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a request was answered before in one of these sessions.
pub fn is_answered(kv: &dyn Kv, sessions: impl IntoIterator<Item = SessionId>, seq: u64) -> io::Result<bool> {
    let tx = Tx::new(kv);
    for session in sessions {
        if tx.get(&keys::answer(session, seq))?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Every session.
pub fn sessions(kv: &dyn Kv) -> io::Result<Vec<(SessionId, v1::SessionRow)>> {
    Tx::new(kv).collect(&keys::table(tag::SESSION), usize::MAX, |key, value| {
        Ok((SessionId(number(key, 0)?), decode(key, value)?))
    })
}

/// Where sessions may hold leases: the session, what kind, the bucket.
pub fn leased(kv: &dyn Kv) -> io::Result<Vec<(SessionId, LeaseKind, u32)>> {
    Tx::new(kv).collect(&keys::table(tag::LEASED), usize::MAX, |key, _| {
        let number_32 = |index| {
            let number = number(key, index)?;
            u32::try_from(number).map_err(|_| corrupt(key, "a number of more than 32 bits"))
        };
        let kind = LeaseKind::try_from(number_32(1)?.cast_signed());
        let kind = kind.map_err(|_| corrupt(key, "a lease of an unknown kind"))?;
        Ok((SessionId(number(key, 0)?), kind, number_32(2)?))
    })
}

/// One chunk daemon.
pub fn node(kv: &dyn Kv, node: NodeId) -> io::Result<Option<v1::NodeRow>> {
    Tx::new(kv).find_node(node)
}

/// Every chunk daemon that ever registered.
pub fn nodes(kv: &dyn Kv) -> io::Result<Vec<v1::NodeRow>> {
    Tx::new(kv).collect(&keys::table(tag::NODE), usize::MAX, decode)
}

/// One chunk.
pub fn chunk_state(kv: &dyn Kv, chunk: ChunkId) -> io::Result<Option<v1::ChunkState>> {
    Tx::new(kv).find_chunk(chunk)
}

/// A page of all chunks above `after`.
pub fn chunks(kv: &dyn Kv, after: ChunkId, limit: usize) -> io::Result<Vec<v1::ChunkState>> {
    let range = (keys::chunk(ChunkId(after.get() + 1)), keys::table(tag::CHUNK).1);
    Tx::new(kv).collect(&range, limit, decode)
}

/// The session's chunks that are not sealed.
pub fn unsealed_chunks_of(kv: &dyn Kv, session: SessionId) -> io::Result<Vec<ChunkId>> {
    Tx::new(kv).collect(&keys::unsealed_of(session), usize::MAX, |key, _| Ok(ChunkId(number(key, 1)?)))
}

/// Every chunk that is not sealed, with the session that appends or appended to it: what a new leader looks at.
pub fn unsealed_chunks(kv: &dyn Kv) -> io::Result<Vec<(SessionId, ChunkId)>> {
    Tx::new(kv).collect(&keys::table(tag::UNSEALED), usize::MAX, |key, _| {
        Ok((SessionId(number(key, 0)?), ChunkId(number(key, 1)?)))
    })
}

/// A page of the sealed chunks above `after` without live bytes, and since when: what DropChunks may name after a grace.
pub fn idle_chunks(kv: &dyn Kv, after: ChunkId, limit: usize) -> io::Result<Vec<(ChunkId, Timestamp)>> {
    let range = (keys::idle(ChunkId(after.get() + 1)), keys::table(tag::IDLE).1);
    Tx::new(kv).collect(&range, limit, |key, value| Ok((ChunkId(number(key, 0)?), decode(key, value)?)))
}

/// Every number that is reserved for a chunk that compaction makes.
pub fn reserved(kv: &dyn Kv) -> io::Result<Vec<ChunkId>> {
    Tx::new(kv).collect(&keys::table(tag::RESERVED), usize::MAX, |key, _| Ok(ChunkId(number(key, 0)?)))
}

/// Whether a number is reserved for a chunk that compaction makes.
pub fn is_reserved(kv: &dyn Kv, chunk: ChunkId) -> io::Result<bool> {
    Ok(Tx::new(kv).get(&keys::reserved(chunk))?.is_some())
}

/// The chunk's extents from `from` on, at most `limit` of them: where each begins, and the row.
pub fn extents(
    kv: &dyn Kv,
    chunk: ChunkId,
    from: ByteOffset,
    limit: usize,
) -> io::Result<Vec<(ByteOffset, v1::ExtentRow)>> {
    Tx::new(kv).collect(&keys::extents(chunk, from, ByteOffset(u64::MAX)), limit, |key, value| {
        Ok((ByteOffset(number(key, 1)?), decode(key, value)?))
    })
}

/// A page of the files above `after` whose chunks are to get what the files want, each with the version that the note was made at.
pub fn reviews(kv: &dyn Kv, after: InodeNo, limit: usize) -> io::Result<Vec<(InodeNo, u64)>> {
    let range = (keys::review(InodeNo(after.get() + 1)), keys::table(tag::REVIEW).1);
    Tx::new(kv)
        .collect(&range, limit, |key, value| Ok((InodeNo(number(key, 0)?), version_of_review(key, value)?)))
}

pub(super) fn version_of_review(key: &[u8], value: &[u8]) -> io::Result<u64> {
    let version = value.try_into().map_err(|_| corrupt(key, "a version of another length"))?;
    Ok(u64::from_be_bytes(version))
}

/// A page of the file's slices that begin at `from` or later, and where each begins.
pub fn slices(
    kv: &dyn Kv,
    ino: InodeNo,
    from: ByteOffset,
    limit: usize,
) -> io::Result<Vec<(ByteOffset, v1::SliceRow)>> {
    Tx::new(kv).collect(&keys::slices(ino, from, ByteOffset(u64::MAX)), limit, |key, value| {
        Ok((ByteOffset(number(key, 1)?), decode(key, value)?))
    })
}

/// A slice that uses an extent of a chunk beside the extent's first user: in the order of the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FurtherUser {
    pub extent: ByteOffset,
    pub ino: InodeNo,
    pub at: ByteOffset,
}

/// A page of the users of a chunk's extents, from `from` on, without each extent's first one: that is in [`extents`].
pub fn further_users(
    kv: &dyn Kv,
    chunk: ChunkId,
    from: FurtherUser,
    limit: usize,
) -> io::Result<Vec<FurtherUser>> {
    let range = keys::users_from(chunk, from.extent, from.ino, from.at);
    Tx::new(kv).collect(&range, limit, |key, _| {
        Ok(FurtherUser {
            extent: ByteOffset(number(key, 1)?),
            ino: InodeNo(number(key, 2)?),
            at: ByteOffset(number(key, 3)?),
        })
    })
}

/// Whether an extent of a chunk begins there.
pub fn has_extent(kv: &dyn Kv, chunk: ChunkId, at: ByteOffset) -> io::Result<bool> {
    Ok(Tx::new(kv).get(&keys::extent(chunk, at))?.is_some())
}

/// A page of the chunks above `after` of which the node holds a replica.
pub fn chunks_on(kv: &dyn Kv, node: NodeId, after: ChunkId, limit: usize) -> io::Result<Vec<ChunkId>> {
    let end = keys::after(&keys::replica(node, ChunkId(u64::MAX)));
    let range = (keys::replica(node, ChunkId(after.get() + 1)), end);
    Tx::new(kv).collect(&range, limit, |key, _| Ok(ChunkId(number(key, 1)?)))
}

/// A page of the inodes above `after` that have no name: what Reap may name once nobody holds them open.
pub fn orphans(kv: &dyn Kv, after: InodeNo, limit: usize) -> io::Result<Vec<InodeNo>> {
    let range = (keys::orphan(InodeNo(after.get() + 1)), keys::table(tag::ORPHAN).1);
    Tx::new(kv).collect(&range, limit, |key, _| Ok(InodeNo(number(key, 0)?)))
}

/// An inode's attributes, without any check.
pub fn attr(kv: &dyn Kv, ino: InodeNo) -> io::Result<Option<v1::Attr>> {
    Ok(Tx::new(kv).find_inode(ino)?.map(|inode| inode.attr))
}
