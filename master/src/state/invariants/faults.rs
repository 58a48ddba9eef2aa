//! What can be mended of what a check found: each thing that is wrong as a fault that the Mend command knows.

use super::Found;
use super::chunks::Mapped;
use super::names::{Counts, Marks};
use crate::state::rows::Inode;
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, Fault, Kind, fault::What};
use std::collections::BTreeSet;

/// What something is wrong with. The order is that of mending: numbers before what takes some, slices before extents that
/// they use, both before chunks that count them, names before the inodes that count them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Numbers,
    /// A key.
    Row(Vec<u8>),
    /// Inode and file offset.
    Slice(u64, u64),
    /// Chunk and offset.
    Extent(u64, u64),
    Chunk(u64),
    /// Parent, hash and name.
    Entry(u64, u64, Vec<u8>),
    /// An inode that is not there.
    Missing(u64),
    Inode(u64),
    /// A file that wants more replicas than a chunk of it is to have.
    Wish(u64),
    Counters,
    /// What has no mending.
    Nothing,
}

/// The faults of these subjects, in their order.
pub fn of(
    found: &Found,
    cluster: &v1::ClusterRow,
    counts: &Counts,
    mapped: &Mapped,
    subjects: BTreeSet<Subject>,
) -> Vec<Fault> {
    let what = subjects.into_iter().filter_map(|subject| match subject {
        Subject::Numbers => Some(What::Numbers(v1::Empty {})),
        Subject::Row(key) => Some(What::Row(key.into())),
        Subject::Slice(ino, at) => Some(What::Slice(v1::SlicePlace { ino, at })),
        Subject::Extent(chunk, at) => {
            let unused = !mapped.extents.contains(&(chunk, at));
            Some(What::Extent(v1::ExtentPlace { chunk, at, unused }))
        }
        Subject::Chunk(chunk) => Some(What::Chunk(chunk)),
        Subject::Entry(parent, hash, name) => {
            Some(What::Entry(v1::EntryPlace { parent, hash, name: name.into() }))
        }
        Subject::Missing(ino) => missing(ino, found, counts, mapped).map(What::Missing),
        Subject::Inode(ino) => found.inodes.get(&ino).and_then(|row| inode(ino, row, found, counts, mapped)),
        Subject::Wish(ino) => Some(What::Wish(ino)),
        Subject::Counters => Some(What::Counters(off(found, cluster))),
        Subject::Nothing => None,
    });
    what.map(|what| Fault { what: Some(what) }).collect()
}

/// An inode of which only bytes or only entries are left. What had neither leaves nothing to be made again.
fn missing(ino: u64, found: &Found, counts: &Counts, mapped: &Mapped) -> Option<v1::MissingInode> {
    let (entries, end) = (counts.entries(ino), mapped.ends.get(&ino).copied());
    let is_dir = entries > 0 || ino == InodeNo::ROOT.get();
    if found.inodes.contains_key(&ino) || is_dir == end.is_some() {
        return None;
    }
    // Without a name it gets one next.
    let nlink = u32::try_from(counts.nlink(ino, is_dir)).ok()?.max(if is_dir { 2 } else { 1 });
    let named_in = found.dentries.iter().find(|(_, row)| row.ino == ino).map(|((parent, ..), _)| *parent);
    Some(v1::MissingInode {
        ino,
        kind: if is_dir { Kind::Dir } else { Kind::File }.into(),
        nlink,
        size: end.unwrap_or(entries),
        mapped: mapped.bytes.get(&ino).copied().unwrap_or(0),
        parent: named_in.unwrap_or(InodeNo::ROOT.get()),
    })
}

fn inode(ino: u64, row: &Inode, found: &Found, counts: &Counts, mapped: &Mapped) -> Option<What> {
    let attr = &row.attr;
    let names = counts.nlink(ino, row.is_dir());
    if names == 0 && attr.nlink > 0 {
        return Some(What::Nameless(v1::NamelessInode { ino, seen_version: attr.version }));
    }
    let marks = Marks::of(found, ino);
    let (size, parent) = match row.kind() {
        Kind::Dir => (counts.entries(ino), counts.parent(ino).unwrap_or(attr.parent)),
        Kind::Symlink => (row.target.len() as u64, attr.parent),
        // Bytes beyond the size are shown, not thrown away.
        Kind::File => (attr.size.max(mapped.ends.get(&ino).copied().unwrap_or(0)), attr.parent),
        Kind::Unspecified | Kind::Char | Kind::Block | Kind::Fifo | Kind::Socket => (attr.size, attr.parent),
    };
    Some(What::Inode(v1::InodeRepair {
        ino,
        seen_version: attr.version,
        seen_mapped: row.mapped.get(),
        nlink: u32::try_from(names).ok()?,
        size,
        mapped: mapped.bytes.get(&ino).copied().unwrap_or(0),
        parent,
        has_acl: marks.has_acl,
        has_default_acl: marks.has_default_acl,
        has_capability: marks.has_capability,
        bare: attr.bare && marks.bare,
    }))
}

fn off(found: &Found, cluster: &v1::ClusterRow) -> v1::CountersOff {
    let (files, chunks, live) = found.counters();
    // Wrapping: whatever nonsense is counted, adding the difference leads to what there is.
    let off = |there: u64, counted: u64| there.wrapping_sub(counted).cast_signed();
    v1::CountersOff {
        files: off(files, cluster.files),
        chunks: off(chunks, cluster.chunks),
        live_bytes: off(live, cluster.live_bytes),
    }
}
