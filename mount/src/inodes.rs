//! The inodes that the kernel knows: how often it looked them up, which one is its root, and whether the pages it keeps
//! of a file are still those of the file.
//!
//! There are no leases yet, so another client's change shows only as attributes that this mount did not cause. The rule:
//! pages are kept over an open only if the file's version or its size and mtime are as they were, and a change by
//! somebody else that is seen while a file is open drops them (what the kernel would do by itself without
//! EXPLICIT_INVAL_DATA, but without dropping what our own writes put there).

use dfs_proto::v1::{Attr, ErrorCode, Kind};
use dfs_proto::{FsError, FsResult, InodeNo, limits};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The kernel's number for the root of a mount.
const FUSE_ROOT: u64 = 1;
/// Locks that different inodes share.
const SHARDS: usize = 16;
/// How long the client may still believe where a file's bytes were before somebody else changed it.
const DOUBT: Duration = Duration::from_millis(limits::ATTR_TTL_MS);

/// What the kernel knows.
pub struct Inodes {
    root: InodeNo,
    shards: Vec<Mutex<HashMap<InodeNo, Known>>>,
}

#[derive(Default)]
struct Known {
    lookups: u64,
    /// Since the first open through this mount.
    pages: Option<Pages>,
}

/// The state of a file that the kernel's pages show.
struct Pages {
    version: u64,
    mtime: (i64, u32),
    size: u64,
    /// Bytes were written here that were not flushed since: attributes change without anybody else's doing.
    writing: bool,
    /// All that changed the file since the pages were dropped last is in them.
    whole: bool,
    /// Somebody else changed the file: pages that are read before then may still show what was there, and are dropped
    /// once more after it.
    doubt: Option<Instant>,
}

/// What attributes on their way to the kernel say about its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The pages are as good as before.
    Same,
    /// Somebody else changed the file: the pages must be dropped before the attributes are shown.
    Foreign,
}

impl Pages {
    fn of(attr: &Attr) -> Self {
        let mtime = attr.mtime.unwrap_or_default().key();
        Self { version: attr.version, mtime, size: attr.size, writing: false, whole: true, doubt: None }
    }

    fn shows(&self, attr: &Attr) -> bool {
        self.version == attr.version
            || (self.size == attr.size && self.mtime == attr.mtime.unwrap_or_default().key())
    }

    /// Whether pages may be stale for a reason that has ended by now, which is thereby settled.
    fn settle_doubt(&mut self, now: Instant) -> bool {
        self.doubt.take_if(|until| *until <= now).is_some()
    }

    fn take_over(&mut self, attr: &Attr, whole: bool) {
        *self = Self { writing: self.writing, whole, doubt: self.doubt, ..Self::of(attr) };
    }
}

impl Inodes {
    /// With `root` as what the kernel sees as the root of the mount.
    #[must_use]
    pub fn new(root: InodeNo) -> Self {
        Self { root, shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// The inode behind a number of the kernel's.
    #[must_use]
    pub fn inode(&self, node: fuser::INodeNo) -> InodeNo {
        if node.0 == FUSE_ROOT { self.root } else { InodeNo(node.0) }
    }

    /// The kernel's number of an inode.
    ///
    /// # Errors
    /// ErrorStale for the cluster's root in a mount of a subdirectory: its number is that directory's there, and nothing
    /// leads to it but a file handle of another mount.
    pub fn node(&self, ino: InodeNo) -> FsResult<fuser::INodeNo> {
        if ino == self.root {
            Ok(fuser::INodeNo(FUSE_ROOT))
        } else if ino.get() == FUSE_ROOT {
            Err(FsError::new(ErrorCode::ErrorStale, "outside of the mounted directory"))
        } else {
            Ok(fuser::INodeNo(ino.get()))
        }
    }

    /// The inode that the kernel's root is.
    #[must_use]
    pub fn root(&self) -> InodeNo {
        self.root
    }

    /// The kernel is about to be told of an inode once more.
    pub fn looked_up(&self, ino: InodeNo) {
        self.shard(ino).entry(ino).or_default().lookups += 1;
    }

    /// The kernel forgets that it was told `lookups` times.
    pub fn forget(&self, ino: InodeNo, lookups: u64) {
        let mut shard = self.shard(ino);
        let Some(known) = shard.get_mut(&ino) else { return };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0 && ino != self.root {
            shard.remove(&ino);
        }
    }

    /// A file was opened with these attributes. Answers whether the kernel may keep its pages.
    pub fn opened(&self, attr: &Attr, now: Instant) -> bool {
        let ino = InodeNo(attr.ino);
        let mut shard = self.shard(ino);
        let Some(pages) = &mut shard.entry(ino).or_default().pages else {
            shard.entry(ino).or_default().pages = Some(Pages::of(attr));
            return false;
        };
        // What is being written can hide what somebody else wrote: read it again.
        if pages.writing {
            return false;
        }
        let same = pages.shows(attr);
        let keep = same && pages.whole && pages.doubt.is_none();
        pages.settle_doubt(now);
        if !same {
            pages.doubt = Some(now + DOUBT);
        }
        pages.take_over(attr, true);
        keep
    }

    /// Bytes were written to a file.
    pub fn wrote(&self, ino: InodeNo) {
        if let Some(pages) = self.shard(ino).get_mut(&ino).and_then(|known| known.pages.as_mut()) {
            pages.writing = true;
        }
    }

    /// What was written to a file has been committed, which left it with these attributes (`None`: not known).
    pub fn flushed(&self, ino: InodeNo, attr: Option<&Attr>) {
        let mut shard = self.shard(ino);
        let Some(pages) = shard.get_mut(&ino).and_then(|known| known.pages.as_mut()) else { return };
        if !pages.writing {
            return;
        }
        pages.writing = false;
        match attr {
            // At least one commit was ours. One version more: nobody else changed the file in between.
            Some(attr) => {
                let whole = pages.whole && attr.version == pages.version + 1;
                pages.take_over(attr, whole);
            }
            None => pages.whole = false,
        }
    }

    /// This mount changed a file by one operation, which left it with these attributes.
    pub fn changed(&self, attr: &Attr, now: Instant) -> Seen {
        self.update(attr, attr.version.saturating_sub(1), now)
    }

    /// Attributes are about to be shown to the kernel.
    pub fn shown(&self, attr: &Attr, now: Instant) -> Seen {
        self.update(attr, attr.version, now)
    }

    /// `before`: the version that the attributes follow without anybody else's change.
    fn update(&self, attr: &Attr, before: u64, now: Instant) -> Seen {
        if attr.kind != Kind::File as i32 {
            return Seen::Same;
        }
        let ino = InodeNo(attr.ino);
        let mut shard = self.shard(ino);
        let Some(pages) = shard.get_mut(&ino).and_then(|known| known.pages.as_mut()) else {
            return Seen::Same;
        };
        if pages.writing || pages.version > attr.version {
            return Seen::Same;
        }
        if pages.version == before || pages.shows(attr) {
            let whole = pages.whole;
            pages.take_over(attr, whole);
            return if pages.settle_doubt(now) { Seen::Foreign } else { Seen::Same };
        }
        pages.take_over(attr, true);
        pages.doubt = Some(now + DOUBT);
        Seen::Foreign
    }

    fn shard(&self, ino: InodeNo) -> MutexGuard<'_, HashMap<InodeNo, Known>> {
        let index = usize::try_from(ino.get() % SHARDS as u64).expect("below 16");
        // Every change is a single step: a poisoned map is whole.
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfs_proto::v1::Timestamp;

    fn attr(version: u64, seconds: i64) -> Attr {
        let mtime = Some(Timestamp { seconds, nanos: 0 });
        Attr { ino: 7, version, mtime, size: 10, kind: Kind::File as i32, ..Attr::default() }
    }

    const INO: InodeNo = InodeNo(7);

    fn opened(now: Instant) -> Inodes {
        let inodes = Inodes::new(InodeNo::ROOT);
        inodes.looked_up(INO);
        assert!(!inodes.opened(&attr(5, 1), now));
        inodes
    }

    #[test]
    fn the_root_of_a_subdirectory_mount_is_the_kernels_root() {
        let inodes = Inodes::new(InodeNo(99));
        assert_eq!(inodes.inode(fuser::INodeNo(1)), InodeNo(99));
        assert_eq!(inodes.node(InodeNo(99)), Ok(fuser::INodeNo(1)));
        assert_eq!(inodes.node(InodeNo(5)), Ok(fuser::INodeNo(5)));
        assert_eq!(inodes.node(InodeNo::ROOT).map_err(|error| error.code), Err(ErrorCode::ErrorStale));
        let whole = Inodes::new(InodeNo::ROOT);
        assert_eq!(whole.node(InodeNo::ROOT), Ok(fuser::INodeNo(1)));
    }

    #[test]
    fn an_inode_is_forgotten_when_the_kernel_has_given_back_every_lookup() {
        let now = Instant::now();
        let inodes = opened(now);
        inodes.looked_up(INO);
        inodes.forget(INO, 1);
        assert!(inodes.opened(&attr(5, 1), now), "still known");
        inodes.forget(INO, 1);
        assert!(inodes.shard(INO).is_empty());
        inodes.forget(INO, 3);
        assert!(!inodes.opened(&attr(5, 1), now));
    }

    #[test]
    fn pages_are_kept_over_an_open_only_when_the_file_is_as_it_was() {
        let now = Instant::now();
        let inodes = opened(now);
        assert!(inodes.opened(&attr(5, 1), now));
        assert!(inodes.opened(&attr(8, 1), now), "a rename or chmod leaves the bytes alone");
        assert!(!inodes.opened(&attr(9, 2), now));
        assert!(!inodes.opened(&attr(9, 2), now), "what was read since may be what was there before");
        assert!(!inodes.opened(&attr(9, 2), now + DOUBT), "and it is dropped once more");
        assert!(inodes.opened(&attr(9, 2), now + DOUBT));
    }

    #[test]
    fn own_writes_keep_the_pages_when_nobody_else_wrote_in_between() {
        let now = Instant::now();
        let inodes = opened(now);
        inodes.wrote(INO);
        assert_eq!(inodes.shown(&attr(6, 2), now), Seen::Same);
        assert!(!inodes.opened(&attr(6, 2), now), "writing");
        inodes.flushed(INO, Some(&attr(6, 2)));
        assert!(inodes.opened(&attr(6, 2), now));
        inodes.wrote(INO);
        inodes.flushed(INO, Some(&attr(8, 3)));
        assert!(!inodes.opened(&attr(8, 3), now), "two versions more: perhaps somebody else's");
        inodes.wrote(INO);
        inodes.flushed(INO, None);
        assert!(!inodes.opened(&attr(8, 3), now));
    }

    #[test]
    fn a_change_by_somebody_else_is_seen_once_and_own_changes_are_not_mistaken_for_it() {
        let now = Instant::now();
        let inodes = opened(now);
        assert_eq!(inodes.shown(&attr(5, 1), now), Seen::Same);
        assert_eq!(inodes.shown(&attr(6, 2), now), Seen::Foreign);
        assert_eq!(inodes.shown(&attr(6, 2), now), Seen::Same);
        assert_eq!(inodes.shown(&attr(5, 1), now), Seen::Same, "an older answer changes nothing");
        assert_eq!(inodes.shown(&attr(6, 2), now + DOUBT), Seen::Foreign, "what was read since may be old");
        assert_eq!(inodes.shown(&attr(6, 2), now + DOUBT), Seen::Same);
        assert_eq!(inodes.changed(&attr(7, 3), now), Seen::Same);
        assert_eq!(inodes.changed(&attr(9, 4), now), Seen::Foreign);
        let unknown = Attr { ino: 8, ..attr(1, 1) };
        assert_eq!(inodes.shown(&unknown, now), Seen::Same);
    }
}
