//! What this client has open: one [`OpenFile`] an open, one [`FileState`] an inode.

use crate::read::ReadState;
use dfs_proto::InodeNo;
use dfs_proto::v1::Cred;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How a file is opened; as in open(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    pub read: bool,
    pub write: bool,
    /// Every write lands at the end of the file as it is then (O_APPEND).
    pub append: bool,
    /// The file is cut to nothing (O_TRUNC).
    pub truncate: bool,
    /// Opened to be executed: needs the right to execute, not to read.
    pub exec: bool,
    /// Every write returns when it is durable (O_SYNC, O_DSYNC).
    pub sync: bool,
}

/// What a write does to set-user-id, set-group-id and file capabilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Privileges {
    /// A writer with CAP_FSETID, or pages of a shared mapping.
    Keep,
    /// Anybody else's write ends them. Who: set-group-id without the right to execute stays for members of the group.
    EndedBy(Cred),
}

impl Privileges {
    /// What a write by a process does.
    #[must_use]
    pub fn of_writer(cred: &Cred) -> Self {
        if cred.uid == 0 { Self::Keep } else { Self::EndedBy(cred.clone()) }
    }
}

/// An open file. Give it back with [`crate::Client::release`]: dropping it does not close it at the master.
pub struct OpenFile {
    pub ino: InodeNo,
    pub flags: OpenFlags,
    /// Whether a write through it has ended privileges yet.
    pub(super) dropped: AtomicBool,
    pub(super) state: Arc<FileState>,
    /// Where the last reads were, for readahead.
    pub(super) read_state: ReadState,
}

impl OpenFile {
    pub(super) fn new(state: Arc<FileState>, flags: OpenFlags) -> Arc<Self> {
        Arc::new(Self {
            ino: state.ino,
            flags,
            dropped: AtomicBool::new(false),
            state,
            read_state: ReadState::default(),
        })
    }
}

/// What all opens of one inode share.
pub(super) struct FileState {
    pub ino: InodeNo,
    /// Held while an append finds the end and writes there: appends of this client do not overlap.
    pub append: tokio::sync::Mutex<()>,
    /// The last name is gone: bytes nobody has read by the last close need not be written.
    unlinked: AtomicBool,
}

/// What is left of an inode after a close.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remains {
    /// Others of this client have it open.
    Open,
    /// It has names, and nobody here has it open.
    Named,
    /// It has no name either.
    Nothing,
}

/// The inodes that are open, and how often. An inode leaves when its last open has been flushed and closed, so bytes
/// that are not committed belong to an inode in here.
#[derive(Default)]
pub(super) struct Files {
    open: Mutex<HashMap<InodeNo, (Arc<FileState>, usize)>>,
}

impl Files {
    /// Counts one more open of an inode.
    pub fn opened(&self, ino: InodeNo) -> Arc<FileState> {
        let mut open = self.lock();
        let (state, count) = open.entry(ino).or_insert_with(|| {
            let state =
                FileState { ino, append: tokio::sync::Mutex::new(()), unlinked: AtomicBool::new(false) };
            (Arc::new(state), 0)
        });
        *count += 1;
        Arc::clone(state)
    }

    /// Counts one open less. Answers what is left.
    pub fn closed(&self, ino: InodeNo) -> Remains {
        let mut open = self.lock();
        // Whoever is not in here has closed before.
        let Some((state, count)) = open.get_mut(&ino) else { return Remains::Open };
        *count -= 1;
        if *count > 0 {
            return Remains::Open;
        }
        let unlinked = state.unlinked.load(Ordering::Relaxed);
        open.remove(&ino);
        if unlinked { Remains::Nothing } else { Remains::Named }
    }

    /// The inode lost its last name. Answers whether this client has it open.
    pub fn unlinked(&self, ino: InodeNo) -> bool {
        match self.lock().get(&ino) {
            Some((state, _)) => {
                state.unlinked.store(true, Ordering::Relaxed);
                true
            }
            None => false,
        }
    }

    /// The inode has a name again (linkat of an O_TMPFILE).
    pub fn linked(&self, ino: InodeNo) {
        if let Some((state, _)) = self.lock().get(&ino) {
            state.unlinked.store(false, Ordering::Relaxed);
        }
    }

    /// Whether an inode is open.
    pub fn is_open(&self, ino: InodeNo) -> bool {
        self.lock().contains_key(&ino)
    }

    /// Whether nothing is open.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<InodeNo, (Arc<FileState>, usize)>> {
        // Every change is a single step: a poisoned table is whole.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_close_of_an_unlinked_inode_says_so() {
        let (files, ino) = (Files::default(), InodeNo(5));
        assert!(!files.unlinked(ino) && files.is_empty());
        let first = files.opened(ino);
        let second = files.opened(ino);
        assert!(Arc::ptr_eq(&first, &second));
        assert!(files.unlinked(ino));
        assert_eq!(files.closed(ino), Remains::Open);
        assert_eq!(files.closed(ino), Remains::Nothing);
        assert!(files.is_empty());
        files.opened(ino);
        files.unlinked(ino);
        files.linked(ino);
        assert_eq!(files.closed(ino), Remains::Named);
    }
}
