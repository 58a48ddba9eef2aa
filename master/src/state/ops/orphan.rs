//! Inodes without a name: kept while somebody holds them open, freed by Reap in bounded steps.

use super::slices;
use super::{State, wish};
use crate::state::keys;
use crate::state::rows::{OpResult, corrupt, refused};
use dfs_proto::limits::REAP_ROWS_MAX;
use dfs_proto::v1::{self, ErrorCode, system_answer::Body};
use dfs_proto::{ByteLen, ByteOffset, InodeNo};
use std::io;

/// How an inode came to have no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orphan {
    /// Its last name was removed; it never gets another.
    Unlinked,
    /// It was made by O_TMPFILE; link(2) may still give it a name.
    Anonymous,
}

impl Orphan {
    fn to_byte(self) -> u8 {
        match self {
            Self::Unlinked => 0,
            Self::Anonymous => 1,
        }
    }

    pub fn from_value(key: &[u8], value: &[u8]) -> io::Result<Self> {
        match value {
            [0] => Ok(Self::Unlinked),
            [1] => Ok(Self::Anonymous),
            _ => Err(corrupt(key, "an orphan of an unknown kind")),
        }
    }
}

pub fn put(s: &mut State<'_>, ino: InodeNo, orphan: Orphan) {
    s.tx.put(keys::orphan(ino), vec![orphan.to_byte()]);
}

pub fn find(s: &State<'_>, ino: InodeNo) -> io::Result<Option<Orphan>> {
    let key = keys::orphan(ino);
    s.tx.get(&key)?.map(|value| Orphan::from_value(&key, &value)).transpose()
}

pub fn delete(s: &mut State<'_>, ino: InodeNo) {
    s.tx.delete(keys::orphan(ino));
}

/// Frees orphans, at most [`REAP_ROWS_MAX`] slices and xattrs of them together. What did not fit stays an orphan: the
/// leader names it again.
pub fn reap(s: &mut State<'_>, op: &v1::Reap) -> OpResult<Body> {
    if op.inos.len() > REAP_ROWS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many orphans in one command");
    }
    let mut budget = REAP_ROWS_MAX;
    for ino in op.inos.iter().copied().map(InodeNo) {
        if budget == 0 {
            break;
        }
        if find(s, ino)?.is_some() {
            budget -= reap_one(s, ino, budget)?;
        }
    }
    Ok(Body::Empty(v1::Empty {}))
}

/// Answers how many rows it freed, at least one.
fn reap_one(s: &mut State<'_>, ino: InodeNo, budget: usize) -> OpResult<usize> {
    let mut inode = s.tx.inode(ino)?;
    let all = keys::slices(ino, ByteOffset(0), ByteOffset(u64::MAX));
    let mapped = s.tx.collect(&all, budget, slices::read_row)?;
    let mut freed = mapped.len();
    for (at, row) in mapped {
        s.tx.delete(keys::slice(ino, at));
        slices::remove_user(s, &row, ino, at)?;
        inode.set_mapped(ByteLen(inode.mapped.get() - row.length));
    }
    let xattrs = s.tx.collect(&keys::xattrs(ino), budget - freed, |key, _| Ok(key.to_vec()))?;
    freed += xattrs.len();
    for key in xattrs {
        s.tx.delete(key);
    }
    if freed < budget {
        s.tx.delete(keys::inode(ino));
        wish::forget(s, ino)?;
        delete(s, ino);
        s.cluster.files -= 1;
        freed += 1;
    } else {
        inode.attr.has_acl = false;
        inode.attr.has_default_acl = false;
        inode.attr.has_capability = false;
        s.tx.put_inode(&inode);
    }
    Ok(freed)
}

/// Lazy atime: merged as a maximum, never above the time of the command, and no change in the sense of `version`.
pub fn touch(s: &mut State<'_>, op: &v1::Touch) -> OpResult<v1::answer::Body> {
    if op.items.len() > REAP_ROWS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many inodes in one command");
    }
    for item in &op.items {
        let (Some(atime), Some(mut inode)) = (item.atime, s.tx.find_inode(InodeNo(item.ino))?) else {
            continue;
        };
        let atime = if atime.key() > s.now.key() { s.now } else { atime };
        if atime.nanos < 1_000_000_000 && inode.attr.atime.is_none_or(|old| old.key() < atime.key()) {
            inode.attr.atime = Some(atime);
            s.tx.put_inode(&inode);
        }
    }
    Ok(v1::answer::Body::Empty(v1::Empty {}))
}
