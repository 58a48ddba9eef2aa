//! The whole keyspace of the state store, on one screen.
//!
//! A key is one tag byte and then the parts below; numbers are big endian, so keys sort as their parts do. Values are the
//! `*Row` messages of `proto/meta.proto` unless said otherwise. The layout as a whole has the version [`FORMAT`], kept in
//! the cluster row; a number once used for a tag is never used for another table.
//!
//! ```text
//! tag  key after the tag                       value
//! 00   (anything)                              the Raft layer's own: last applied entry, membership; no row of the state
//! 01                                           ClusterRow: settings, counters, next numbers
//! 02   ino                                     InodeRow
//! 03   parent, hash(name), name                DentryRow; the hash is the readdir cookie
//! 04   ino, file offset                        SliceRow
//! 05   chunk, chunk offset                     ExtentRow
//! 06   chunk, extent, ino, file offset         nothing: a further user of the extent
//! 07   ino, xattr name, 00, part               up to XATTR_PART bytes of the value; part 0 always exists
//! 08   chunk                                   ChunkState
//! 09   session, chunk                          nothing: the chunk is not sealed yet
//! 0a   session                                 SessionRow
//! 0b   session, seq                            Answer, as it was given
//! 0c   node                                    NodeRow
//! 0d   ino                                     one byte, Orphan: an inode without a name
//! 0e   chunk                                   Timestamp: sealed and without live bytes since then
//! 0f   node, chunk                             nothing: the node holds a replica of the chunk
//! 10   session, lease kind, bucket             nothing: the session may hold such leases on inodes of the bucket
//! 11   chunk                                   nothing: the number is reserved for a chunk that is being made by compaction
//! 12   ino                                     8 bytes, the inode's version when its wish for replicas was set: its chunks are to get it
//! 16   session                                 EndedRow: it ended without a goodbye, its answers are kept
//! 17   seconds since 1970, session             nothing: the session ended then
//! ```

use dfs_proto::{ByteOffset, ChunkId, InodeNo, NodeId, SessionId};
use siphasher::sip::SipHasher13;

/// The version of this layout.
pub const FORMAT: u32 = 1;
/// The most bytes of an xattr value in one row: the state store likes small values.
pub const XATTR_PART: usize = 16 << 10;
/// Cookies up to this one are ".", ".." and the start of a directory.
pub const COOKIE_RESERVED: u64 = 2;

/// The first byte of a key: which table it belongs to.
pub mod tag {
    pub const RAFT: u8 = 0x00;
    pub const CLUSTER: u8 = 0x01;
    pub const INODE: u8 = 0x02;
    pub const DENTRY: u8 = 0x03;
    pub const SLICE: u8 = 0x04;
    pub const EXTENT: u8 = 0x05;
    pub const USER: u8 = 0x06;
    pub const XATTR: u8 = 0x07;
    pub const CHUNK: u8 = 0x08;
    pub const UNSEALED: u8 = 0x09;
    pub const SESSION: u8 = 0x0a;
    pub const ANSWER: u8 = 0x0b;
    pub const NODE: u8 = 0x0c;
    pub const ORPHAN: u8 = 0x0d;
    pub const IDLE: u8 = 0x0e;
    pub const REPLICA: u8 = 0x0f;
    pub const LEASED: u8 = 0x10;
    pub const RESERVED: u8 = 0x11;
    pub const REVIEW: u8 = 0x12;
    pub const ENDED: u8 = 0x16;
    pub const ENDED_AT: u8 = 0x17;
}

/// A range of keys: from the first, up to but without the second.
pub type KeyRange = (Vec<u8>, Vec<u8>);

fn key(tag: u8, numbers: &[u64], tail: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + 8 * numbers.len() + tail.len());
    key.push(tag);
    for number in numbers {
        key.extend_from_slice(&number.to_be_bytes());
    }
    key.extend_from_slice(tail);
    key
}

/// The least key above every key that begins with `prefix`.
#[must_use]
pub fn after(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    // Only a prefix of 0xff bytes comes here, and no tag is 0xff.
    vec![u8::MAX; prefix.len() + 1]
}

fn all_with(prefix: Vec<u8>) -> KeyRange {
    let end = after(&prefix);
    (prefix, end)
}

/// Every key of one table.
#[must_use]
pub fn table(tag: u8) -> KeyRange {
    (vec![tag], vec![tag + 1])
}

/// Every key of the state machine: what a snapshot holds, without the Raft layer's own keys.
#[must_use]
pub fn everything() -> KeyRange {
    (vec![tag::CLUSTER], vec![u8::MAX])
}

#[must_use]
pub fn cluster() -> Vec<u8> {
    vec![tag::CLUSTER]
}

#[must_use]
pub fn inode(ino: InodeNo) -> Vec<u8> {
    key(tag::INODE, &[ino.get()], &[])
}

/// The readdir cookie of a name: 63 bits of SipHash-1-3 under the cluster's key, so that nobody outside can craft names that collide.
#[must_use]
pub fn name_hash(hash_key: &[u8; 16], name: &[u8]) -> u64 {
    let hash = SipHasher13::new_with_key(hash_key).hash(name) & (u64::MAX >> 1);
    if hash <= COOKIE_RESERVED { hash + COOKIE_RESERVED + 1 } else { hash }
}

#[must_use]
pub fn dentry(parent: InodeNo, hash: u64, name: &[u8]) -> Vec<u8> {
    key(tag::DENTRY, &[parent.get(), hash], name)
}

/// The directory's entries whose cookie is above `cookie`.
#[must_use]
pub fn dentries_after(parent: InodeNo, cookie: u64) -> KeyRange {
    (
        key(tag::DENTRY, &[parent.get(), cookie.saturating_add(1)], &[]),
        after(&key(tag::DENTRY, &[parent.get()], &[])),
    )
}

#[must_use]
pub fn slice(ino: InodeNo, at: ByteOffset) -> Vec<u8> {
    key(tag::SLICE, &[ino.get(), at.get()], &[])
}

/// The inode's slices that begin in `[from, to)`.
#[must_use]
pub fn slices(ino: InodeNo, from: ByteOffset, to: ByteOffset) -> KeyRange {
    (slice(ino, from), slice(ino, to))
}

#[must_use]
pub fn extent(chunk: ChunkId, at: ByteOffset) -> Vec<u8> {
    key(tag::EXTENT, &[chunk.get(), at.get()], &[])
}

/// The chunk's extents that begin in `[from, to)`.
#[must_use]
pub fn extents(chunk: ChunkId, from: ByteOffset, to: ByteOffset) -> KeyRange {
    (extent(chunk, from), extent(chunk, to))
}

#[must_use]
pub fn user(chunk: ChunkId, extent: ByteOffset, ino: InodeNo, at: ByteOffset) -> Vec<u8> {
    key(tag::USER, &[chunk.get(), extent.get(), ino.get(), at.get()], &[])
}

/// One part of an xattr's value. Names hold no zero byte, so parts of one name stay together.
#[must_use]
pub fn xattr(ino: InodeNo, name: &[u8], part: u8) -> Vec<u8> {
    let mut key = key(tag::XATTR, &[ino.get()], name);
    key.extend_from_slice(&[0, part]);
    key
}

/// Every part of one xattr.
#[must_use]
pub fn xattr_parts(ino: InodeNo, name: &[u8]) -> KeyRange {
    let mut prefix = key(tag::XATTR, &[ino.get()], name);
    prefix.push(0);
    all_with(prefix)
}

/// Every xattr of an inode.
#[must_use]
pub fn xattrs(ino: InodeNo) -> KeyRange {
    all_with(key(tag::XATTR, &[ino.get()], &[]))
}

#[must_use]
pub fn chunk(chunk: ChunkId) -> Vec<u8> {
    key(tag::CHUNK, &[chunk.get()], &[])
}

#[must_use]
pub fn unsealed(session: SessionId, chunk: ChunkId) -> Vec<u8> {
    key(tag::UNSEALED, &[session.get(), chunk.get()], &[])
}

/// The session's chunks that are not sealed.
#[must_use]
pub fn unsealed_of(session: SessionId) -> KeyRange {
    all_with(key(tag::UNSEALED, &[session.get()], &[]))
}

#[must_use]
pub fn session(session: SessionId) -> Vec<u8> {
    key(tag::SESSION, &[session.get()], &[])
}

#[must_use]
pub fn answer(session: SessionId, seq: u64) -> Vec<u8> {
    key(tag::ANSWER, &[session.get(), seq], &[])
}

/// The session's recorded answers with sequences in `[from, to)`.
#[must_use]
pub fn answers(session: SessionId, from: u64, to: u64) -> KeyRange {
    (answer(session, from), answer(session, to))
}

/// All of the session's recorded answers.
#[must_use]
pub fn answers_of(session: SessionId) -> KeyRange {
    all_with(key(tag::ANSWER, &[session.get()], &[]))
}

/// `kind`: as [`dfs_proto::v1::LeaseKind`] numbers it.
#[must_use]
pub fn leased(session: SessionId, kind: u64, bucket: u32) -> Vec<u8> {
    key(tag::LEASED, &[session.get(), kind, bucket.into()], &[])
}

/// Where the session may hold leases.
#[must_use]
pub fn leased_of(session: SessionId) -> KeyRange {
    all_with(key(tag::LEASED, &[session.get()], &[]))
}

#[must_use]
pub fn ended(session: SessionId) -> Vec<u8> {
    key(tag::ENDED, &[session.get()], &[])
}

#[must_use]
pub fn ended_at(seconds: u64, session: SessionId) -> Vec<u8> {
    key(tag::ENDED_AT, &[seconds, session.get()], &[])
}

#[must_use]
pub fn node(node: NodeId) -> Vec<u8> {
    key(tag::NODE, &[node.get()], &[])
}

#[must_use]
pub fn orphan(ino: InodeNo) -> Vec<u8> {
    key(tag::ORPHAN, &[ino.get()], &[])
}

#[must_use]
pub fn idle(chunk: ChunkId) -> Vec<u8> {
    key(tag::IDLE, &[chunk.get()], &[])
}

#[must_use]
pub fn reserved(chunk: ChunkId) -> Vec<u8> {
    key(tag::RESERVED, &[chunk.get()], &[])
}

#[must_use]
pub fn review(ino: InodeNo) -> Vec<u8> {
    key(tag::REVIEW, &[ino.get()], &[])
}

/// The further users of a chunk's extents, from that slice on.
#[must_use]
pub fn users_from(chunk: ChunkId, extent: ByteOffset, ino: InodeNo, at: ByteOffset) -> KeyRange {
    (user(chunk, extent, ino, at), after(&key(tag::USER, &[chunk.get()], &[])))
}

/// The further users of an extent.
#[must_use]
pub fn users(chunk: ChunkId, extent: ByteOffset) -> KeyRange {
    all_with(key(tag::USER, &[chunk.get(), extent.get()], &[]))
}

#[must_use]
pub fn replica(node: NodeId, chunk: ChunkId) -> Vec<u8> {
    key(tag::REPLICA, &[node.get(), chunk.get()], &[])
}

/// The chunks of which the node holds a replica.
#[must_use]
pub fn replicas_of(node: NodeId) -> KeyRange {
    all_with(key(tag::REPLICA, &[node.get()], &[]))
}

/// The number at place `index` after the tag; None when the key is too short to hold it.
#[must_use]
pub fn number(key: &[u8], index: usize) -> Option<u64> {
    let at = 1 + 8 * index;
    Some(u64::from_be_bytes(key.get(at..at + 8)?.try_into().expect("a slice of eight bytes")))
}

/// What follows the tag and `numbers` numbers: the name in a dentry's key.
#[must_use]
pub fn tail(key: &[u8], numbers: usize) -> Option<&[u8]> {
    key.get(1 + 8 * numbers..)
}

/// Name and part of an xattr's key.
#[must_use]
pub fn xattr_name(key: &[u8]) -> Option<(&[u8], u8)> {
    match tail(key, 1)? {
        [name @ .., 0, part] => Some((name, *part)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_sort_as_their_parts_do(a in any::<(u64, u64, Vec<u8>)>(), b in any::<(u64, u64, Vec<u8>)>()) {
            let dentry_key = |(parent, hash, name): &(u64, u64, Vec<u8>)| dentry(InodeNo(*parent), *hash, name);
            prop_assert_eq!(dentry_key(&a).cmp(&dentry_key(&b)), a.cmp(&b));
            let slice_key = |(ino, at, _): &(u64, u64, Vec<u8>)| slice(InodeNo(*ino), ByteOffset(*at));
            prop_assert_eq!(slice_key(&a).cmp(&slice_key(&b)), (a.0, a.1).cmp(&(b.0, b.1)));
        }

        #[test]
        fn parts_are_read_back(parent: u64, hash: u64, name: Vec<u8>, part: u8) {
            let key = dentry(InodeNo(parent), hash, &name);
            prop_assert_eq!((number(&key, 0), number(&key, 1), tail(&key, 2)), (Some(parent), Some(hash), Some(name.as_slice())));
            let name: Vec<u8> = name.into_iter().filter(|byte| *byte != 0).collect();
            let key = xattr(InodeNo(parent), &name, part);
            prop_assert_eq!(xattr_name(&key), Some((name.as_slice(), part)));
            let key = user(ChunkId(parent), ByteOffset(hash), InodeNo(hash), ByteOffset(parent));
            prop_assert_eq!((number(&key, 0), number(&key, 3), number(&key, 4)), (Some(parent), Some(parent), None));
        }

        #[test]
        fn a_range_holds_what_begins_with_its_prefix_and_nothing_else(ino: u64, other: u64, name in "[a-z]{1,9}", longer in "[a-z]{1,3}") {
            let (from, to) = xattrs(InodeNo(ino));
            let key = xattr(InodeNo(other), name.as_bytes(), 0);
            prop_assert_eq!(from <= key && key < to, ino == other);
            let (from, to) = xattr_parts(InodeNo(ino), name.as_bytes());
            let inside = xattr(InodeNo(ino), name.as_bytes(), 200);
            prop_assert!(from <= inside && inside < to);
            let outside = xattr(InodeNo(ino), format!("{name}{longer}").as_bytes(), 0);
            prop_assert!(!(from <= outside && outside < to));
        }

        #[test]
        fn cookies_are_positive_and_above_the_reserved_ones(hash_key: [u8; 16], name: Vec<u8>) {
            let hash = name_hash(&hash_key, &name);
            prop_assert!(hash > COOKIE_RESERVED && hash <= i64::MAX.cast_unsigned());
        }
    }
}
