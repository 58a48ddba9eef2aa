//! The inodes that the kernel knows: how often it looked them up, which one is its root, and what it may have cached of
//! them. Pages are kept over an open only if they were all read under the lease that still lasts.

use dfs_client::leases::Term;
use dfs_proto::v1::ErrorCode;
use dfs_proto::{FsError, FsResult, InodeNo};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The kernel's number for the root of a mount.
const FUSE_ROOT: u64 = 1;
/// Locks that different inodes share.
const SHARDS: usize = 16;

/// What the kernel knows.
pub struct Inodes {
    root: InodeNo,
    began: Instant,
    /// Counts how often the kernel was told to forget all names.
    epoch: AtomicU32,
    shards: Vec<Mutex<HashMap<InodeNo, Known>>>,
}

#[derive(Default)]
struct Known {
    lookups: u64,
    is_dir: bool,
    /// It was opened here: pages of it may be in the kernel.
    has_pages: bool,
    /// In which lease they were read, all of them; none: some were read without.
    pages: Option<Term>,
    /// Until when the kernel believes a name of it, in seconds since the mount, if the epoch is still this one.
    name: u32,
    epoch: u32,
    /// Until when it believes its attributes, at least.
    attr: u32,
}

/// What the kernel still believes of an inode without asking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Believed {
    /// Until when a name, in seconds since the mount; None: not for a second any more.
    pub name: Option<u32>,
    pub attr: bool,
}

/// What the kernel may have cached of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cached {
    pub is_dir: bool,
    pub has_pages: bool,
}

impl Inodes {
    /// With `root` as what the kernel sees as the root of the mount.
    #[must_use]
    pub fn new(root: InodeNo) -> Self {
        Self {
            root,
            began: Instant::now(),
            epoch: AtomicU32::new(0),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
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
    pub fn looked_up(&self, ino: InodeNo, is_dir: bool) {
        let mut shard = self.shard(ino);
        let known = shard.entry(ino).or_default();
        known.lookups += 1;
        known.is_dir = is_dir;
    }

    /// The kernel is told of a name and of attributes that it may believe for so long.
    pub fn told(&self, ino: InodeNo, name: Duration, attr: Duration) {
        let epoch = self.epoch.load(Ordering::SeqCst);
        if let Some(known) = self.shard(ino).get_mut(&ino) {
            let elapsed = self.began.elapsed();
            let until = |ttl: Duration| u32::try_from((elapsed + ttl).as_secs()).unwrap_or(u32::MAX);
            // Another name of it may be believed for longer.
            let before = if known.epoch == epoch { known.name } else { 0 };
            (known.name, known.epoch, known.attr) = (until(name).max(before), epoch, until(attr));
        }
    }

    /// What the kernel believes of an inode for a second at least; only a guess, for it may drop anything at any time.
    #[must_use]
    pub fn believed(&self, ino: InodeNo) -> Believed {
        let epoch = self.epoch.load(Ordering::SeqCst);
        let soon = self.now().saturating_add(1);
        self.shard(ino).get(&ino).map_or_else(Believed::default, |known| Believed {
            name: Some(known.name).filter(|until| *until > soon && known.epoch == epoch),
            attr: known.attr > soon,
        })
    }

    /// Whether the kernel may believe a name of an inode.
    #[must_use]
    pub fn is_named(&self, ino: InodeNo) -> bool {
        let epoch = self.epoch.load(Ordering::SeqCst);
        let now = self.now();
        self.shard(ino).get(&ino).is_some_and(|known| known.name >= now && known.epoch == epoch)
    }

    /// Seconds since the mount.
    #[must_use]
    pub fn now(&self) -> u32 {
        u32::try_from(self.began.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    /// The kernel is about to forget the attributes of an inode.
    pub fn attr_dropped(&self, ino: InodeNo) {
        if let Some(known) = self.shard(ino).get_mut(&ino) {
            known.attr = 0;
        }
    }

    /// The kernel is about to forget all names.
    pub fn names_dropped(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
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

    /// What the kernel may have cached of an inode, if it knows it.
    #[must_use]
    pub fn known(&self, ino: InodeNo) -> Option<Cached> {
        let root = Cached { is_dir: true, has_pages: false };
        let known = self
            .shard(ino)
            .get(&ino)
            .map(|known| Cached { is_dir: known.is_dir, has_pages: known.has_pages });
        known.or((ino == self.root).then_some(root))
    }

    /// A file is opened under this lease. Answers whether the kernel may keep the pages that it has.
    pub fn opened(&self, ino: InodeNo, term: Option<Term>) -> bool {
        let mut shard = self.shard(ino);
        let known = shard.entry(ino).or_default();
        let keep = known.has_pages && term.is_some() && known.pages == term;
        (known.has_pages, known.pages) = (true, term);
        keep
    }

    /// The kernel is about to drop all pages of a file.
    pub fn pages_dropped(&self, ino: InodeNo) {
        if let Some(known) = self.shard(ino).get_mut(&ino) {
            known.pages = None;
        }
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

    const INO: InodeNo = InodeNo(7);

    #[test]
    fn the_root_of_a_subdirectory_mount_is_the_kernels_root() {
        let inodes = Inodes::new(InodeNo(99));
        assert_eq!(inodes.inode(fuser::INodeNo(1)), InodeNo(99));
        assert_eq!(inodes.node(InodeNo(99)), Ok(fuser::INodeNo(1)));
        assert_eq!(inodes.node(InodeNo(5)), Ok(fuser::INodeNo(5)));
        assert_eq!(inodes.node(InodeNo::ROOT).map_err(|error| error.code), Err(ErrorCode::ErrorStale));
        let whole = Inodes::new(InodeNo::ROOT);
        assert_eq!(whole.node(InodeNo::ROOT), Ok(fuser::INodeNo(1)));
        assert_eq!(whole.known(InodeNo::ROOT), Some(Cached { is_dir: true, has_pages: false }));
    }

    #[test]
    fn an_inode_is_forgotten_when_the_kernel_has_given_back_every_lookup() {
        let inodes = Inodes::new(InodeNo::ROOT);
        assert_eq!(inodes.known(INO), None);
        inodes.looked_up(INO, false);
        inodes.looked_up(INO, false);
        inodes.forget(INO, 1);
        assert_eq!(inodes.known(INO), Some(Cached { is_dir: false, has_pages: false }));
        inodes.forget(INO, 1);
        assert!(inodes.shard(INO).is_empty());
        inodes.forget(INO, 3);
    }

    #[test]
    fn what_the_kernel_believes_ends_with_its_time_with_the_names_and_with_the_attributes() {
        let inodes = Inodes::new(InodeNo::ROOT);
        let (long, all) = (Duration::from_secs(18), Believed { name: Some(18), attr: true });
        inodes.told(INO, long, long);
        assert_eq!(inodes.believed(INO), Believed::default(), "it does not know it");
        inodes.looked_up(INO, false);
        assert_eq!(inodes.believed(INO), Believed::default());
        inodes.told(INO, long, long);
        assert_eq!(inodes.believed(INO), all);
        inodes.attr_dropped(INO);
        assert_eq!(inodes.believed(INO), Believed { attr: false, ..all });
        inodes.told(INO, long, long);
        inodes.names_dropped();
        assert_eq!(inodes.believed(INO), Believed { name: None, attr: true });
        inodes.told(INO, long, Duration::ZERO);
        assert_eq!(inodes.believed(INO), Believed { attr: false, ..all });
        inodes.told(INO, Duration::ZERO, long);
        assert_eq!(inodes.believed(INO), all, "under another name");
        assert!(inodes.is_named(INO));
        inodes.names_dropped();
        assert!(!inodes.is_named(INO));
    }

    #[test]
    fn pages_are_kept_over_an_open_only_under_the_lease_that_they_were_read_under() {
        let inodes = Inodes::new(InodeNo::ROOT);
        let [one, two] = [Term::new(1), Term::new(2)].map(Some);
        assert!(!inodes.opened(INO, one), "there are none");
        assert!(inodes.opened(INO, one));
        assert!(!inodes.opened(INO, two) && inodes.opened(INO, two));
        assert!(!inodes.opened(INO, None) && !inodes.opened(INO, None));
        assert!(!inodes.opened(INO, one), "what was read without a lease may be old");
        inodes.pages_dropped(INO);
        assert!(!inodes.opened(INO, one) && inodes.opened(INO, one));
    }
}
