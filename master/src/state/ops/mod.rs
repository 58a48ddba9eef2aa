//! What each command does to the state, one family of operations a file.

pub mod attr;
pub mod chunk;
pub mod create;
pub mod data;
pub mod mend;
pub mod node;
pub mod orphan;
pub mod policy;
pub mod relocate;
pub mod remove;
pub mod rename;
pub mod session;
pub mod slices;
pub mod wish;
pub mod xattr;

use super::keys;
use super::kv::Tx;
use super::rows::{Inode, OpResult, corrupt, refused};
use dfs_proto::limits::NAME_MAX;
use dfs_proto::v1::{self, Cred, ErrorCode, Timestamp};
use dfs_proto::{InodeNo, SessionId};
use std::io;

/// The state as a command finds it and leaves it.
pub struct State<'k> {
    pub tx: Tx<'k>,
    pub cluster: v1::ClusterRow,
    /// The time of the command under way; it never runs backwards.
    pub now: Timestamp,
    pub hash_key: [u8; 16],
    /// Chunks follow what files want of replicas: see `wish.rs`.
    pub keeps_wishes: bool,
}

/// On whose behalf a mutation runs.
pub struct Caller<'c> {
    pub cred: &'c Cred,
    pub session: SessionId,
}

impl State<'_> {
    pub fn find(&self, dir: InodeNo, name: &[u8]) -> io::Result<Option<v1::DentryRow>> {
        find_dentry(&self.tx, &self.hash_key, dir, name)
    }

    pub fn dentry_key(&self, dir: InodeNo, name: &[u8]) -> Vec<u8> {
        keys::dentry(dir, keys::name_hash(&self.hash_key, name), name)
    }

    pub fn put_dentry(&mut self, dir: InodeNo, name: &[u8], inode: &Inode) {
        let row = v1::DentryRow { ino: inode.attr.ino, kind: inode.attr.kind };
        self.tx.put_row(self.dentry_key(dir, name), &row);
    }

    /// The inode that a dentry names; it exists, or the state is broken.
    pub fn named(&self, dentry: &v1::DentryRow) -> io::Result<Inode> {
        let ino = InodeNo(dentry.ino);
        self.tx.find_inode(ino)?.ok_or_else(|| corrupt(&keys::inode(ino), "named, but not there"))
    }

    /// Reads an inode that must exist, changes it and writes it back.
    pub fn update(&mut self, ino: InodeNo, change: impl FnOnce(&mut Inode)) -> OpResult<()> {
        let mut inode = self.tx.inode(ino)?;
        change(&mut inode);
        self.tx.put_inode(&inode);
        Ok(())
    }
}

/// The directory's entry of this name.
pub fn find_dentry(
    tx: &Tx<'_>,
    hash_key: &[u8; 16],
    dir: InodeNo,
    name: &[u8],
) -> io::Result<Option<v1::DentryRow>> {
    tx.row(&keys::dentry(dir, keys::name_hash(hash_key, name), name))
}

/// The inode, which must be a directory.
pub fn directory(tx: &Tx<'_>, ino: InodeNo) -> OpResult<Inode> {
    let inode = tx.inode(ino)?;
    if inode.is_dir() { Ok(inode) } else { Err(ErrorCode::ErrorNotDir.into()) }
}

/// Refuses what can not be a name. "." and ".." are the caller's to treat: each call answers them differently.
pub fn check_name(name: &[u8]) -> OpResult<()> {
    if name.is_empty() {
        return refused(ErrorCode::ErrorNotFound, "an empty name");
    }
    if name.len() > NAME_MAX {
        return Err(ErrorCode::ErrorNameTooLong.into());
    }
    if name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        return refused(ErrorCode::ErrorInvalid, "a name with a slash or a zero byte");
    }
    Ok(())
}

pub fn is_dots(name: &[u8]) -> bool {
    matches!(name, b"." | b"..")
}

/// The answer that shows an inode as it is now.
pub fn entry(inode: &Inode, created: bool) -> v1::answer::Body {
    v1::answer::Body::Entry(v1::Entry { attr: Some(inode.attr), created, dir_version: 0 })
}
