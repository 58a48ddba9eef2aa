//! Attributes and names that were learned lately, believed for a second at most while there are no leases.
//!
//! Two rules keep an answer from going back in time:
//! * An attribute never replaces one of a later [`Attr::version`].
//! * A question that was under way when a change by this client to the same inode or directory ended may have been
//!   answered from before that change: its answer is not kept. Each question takes a [`Ticket`] first, each change
//!   leaves its stamp when it ends ([`Cache::changed`]). What was kept while the change was under way, it replaces.

mod whole;

use bytes::Bytes;
use dfs_proto::InodeNo;
use dfs_proto::v1::{Attr, Timestamp};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;
use whole::WholeDirs;

/// Locks that lookups of different inodes share.
const SHARDS: usize = 16;
/// Stamps of changes; inodes that share one only lose a chance to be cached.
const STAMPS: usize = 4096;

/// Taken before a question is asked; says which answers may be kept and how long.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    stamp: u64,
    asked: Instant,
}

/// What is known of attributes and names. Bounded; the least recently used go first.
pub struct Cache {
    ttl: Duration,
    clock: AtomicU64,
    stamps: Vec<AtomicU64>,
    attrs: Vec<Mutex<LruCache<u64, Known>>>,
    names: Vec<Mutex<LruCache<(u64, Bytes), Named>>>,
    whole: Mutex<WholeDirs>,
}

#[derive(Clone, Copy)]
struct Known {
    attr: Attr,
    until: Instant,
}

#[derive(Clone, Copy)]
struct Named {
    /// `None`: there is nothing of that name.
    ino: Option<InodeNo>,
    until: Instant,
}

impl Cache {
    /// A cache of at most `entries` attributes and as many names, each believed for `ttl`.
    #[must_use]
    pub fn new(ttl: Duration, entries: usize) -> Self {
        let shard = NonZeroUsize::new(entries / SHARDS).unwrap_or(NonZeroUsize::MIN);
        Self {
            ttl,
            clock: AtomicU64::new(1),
            stamps: (0..STAMPS).map(|_| AtomicU64::new(0)).collect(),
            attrs: (0..SHARDS).map(|_| Mutex::new(LruCache::new(shard))).collect(),
            names: (0..SHARDS).map(|_| Mutex::new(LruCache::new(shard))).collect(),
            whole: Mutex::new(WholeDirs::new()),
        }
    }

    /// To be taken before a question is asked.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket { stamp: self.clock.load(Ordering::SeqCst), asked: Instant::now() }
    }

    /// A change by this client to the inode or to the directory's names has ended.
    pub fn changed(&self, ino: InodeNo) {
        let now = self.clock.fetch_add(1, Ordering::SeqCst) + 1;
        self.stamp(ino).fetch_max(now, Ordering::SeqCst);
    }

    /// Keeps the answer to a question.
    pub fn put_attr(&self, ticket: &Ticket, attr: &Attr) {
        if self.overtaken(ticket, InodeNo(attr.ino)) {
            return;
        }
        self.insert_attr(attr, ticket.asked + self.ttl);
    }

    /// Keeps what the answer to this client's own change says.
    pub fn learn(&self, attr: &Attr) {
        self.changed(InodeNo(attr.ino));
        self.insert_attr(attr, Instant::now() + self.ttl);
    }

    /// The inode changed in a way that the answer did not show: it must be asked again.
    pub fn forget_attr(&self, ino: InodeNo) {
        self.changed(ino);
        // The entry stays for its version.
        if let Some(known) = self.attr_shard(ino).peek_mut(&ino.get()) {
            known.until = Instant::now();
        }
    }

    /// This client's own change at `time` (in the master's time) added to a directory that many entries, directories
    /// among them; negative: removed. What is known of the directory is brought up to date, so that a program that makes
    /// many files in it need not ask after each. It cannot be when another change of the same moment was seen first: an
    /// answer may hold both then.
    pub fn dir_changed(&self, dir: InodeNo, time: Option<Timestamp>, entries: i64, dirs: i32) {
        self.changed(dir);
        let mut shard = self.attr_shard(dir);
        let Some(known) = shard.peek_mut(&dir.get()) else { return };
        let key = |time: Option<Timestamp>| time.map(|time| time.key());
        if time.is_none() || key(known.attr.mtime).max(key(known.attr.ctime)) >= key(time) {
            known.until = Instant::now();
            return;
        }
        known.attr.version += 1;
        known.attr.size = known.attr.size.saturating_add_signed(entries);
        known.attr.nlink = known.attr.nlink.saturating_add_signed(dirs);
        known.attr.mtime = time;
        known.attr.ctime = time;
    }

    /// The master took this access time.
    pub fn accessed(&self, ino: InodeNo, atime: Timestamp) {
        if let Some(known) = self.attr_shard(ino).peek_mut(&ino.get())
            && known.attr.atime.is_none_or(|before| before.key() < atime.key())
        {
            known.attr.atime = Some(atime);
        }
    }

    /// The attributes of an inode and how long they may still be believed.
    #[must_use]
    pub fn attr(&self, ino: InodeNo) -> Option<(Attr, Duration)> {
        let known = *self.attr_shard(ino).get(&ino.get())?;
        Some((known.attr, left(known.until)?))
    }

    /// The attributes of an inode as they were last known, however long ago.
    #[must_use]
    pub fn last_attr(&self, ino: InodeNo) -> Option<Attr> {
        self.attr_shard(ino).peek(&ino.get()).map(|known| known.attr)
    }

    /// Keeps the answer to the question what a name stands for; `None`: nothing.
    pub fn put_name(&self, ticket: &Ticket, parent: InodeNo, name: &[u8], ino: Option<InodeNo>) {
        if self.overtaken(ticket, parent) {
            return;
        }
        let named = Named { ino, until: ticket.asked + self.ttl };
        self.name_shard(parent, name).put((parent.get(), Bytes::copy_from_slice(name)), named);
    }

    /// What a name stands for after this client's own change.
    pub fn set_name(&self, parent: InodeNo, name: &[u8], ino: Option<InodeNo>) {
        self.changed(parent);
        let named = Named { ino, until: Instant::now() + self.ttl };
        self.name_shard(parent, name).put((parent.get(), Bytes::copy_from_slice(name)), named);
    }

    /// This client made a directory, and asked for it with this ticket.
    pub fn made_dir(&self, ticket: &Ticket, dir: &Attr) {
        self.whole().made(InodeNo(dir.ino), dir.version, ticket.asked + self.ttl);
    }

    /// This client made a name in a directory, which is of this version since.
    pub fn made_name(&self, ticket: &Ticket, dir: InodeNo, name: &Bytes, version: u64) {
        self.whole().added(dir, name, version, ticket.asked + self.ttl);
    }

    /// This client changed the names in a directory otherwise than by making one.
    pub fn changed_names(&self, dir: InodeNo) {
        self.whole().forget(dir);
    }

    /// Nothing is known of a name any longer.
    pub fn forget_name(&self, parent: InodeNo, name: &[u8]) {
        self.changed(parent);
        self.changed_names(parent);
        self.name_shard(parent, name).pop(&(parent.get(), Bytes::copy_from_slice(name)));
    }

    /// What a name stands for (`None`: nothing) and how long that may still be believed.
    #[must_use]
    pub fn name(&self, parent: InodeNo, name: &[u8]) -> Option<(Option<InodeNo>, Duration)> {
        let named = self.name_shard(parent, name).get(&(parent.get(), Bytes::copy_from_slice(name))).copied();
        if let Some(named) = named
            && let Some(left) = left(named.until)
        {
            return Some((named.ino, left));
        }
        let until = self.whole().lacks(parent, name)?;
        Some((None, left(until)?))
    }

    fn whole(&self) -> MutexGuard<'_, WholeDirs> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert_attr(&self, attr: &Attr, until: Instant) {
        let mut shard = self.attr_shard(InodeNo(attr.ino));
        match shard.get_mut(&attr.ino) {
            Some(known) if known.attr.version > attr.version => {}
            Some(known) => *known = Known { attr: *attr, until: until.max(known.until) },
            None => {
                shard.put(attr.ino, Known { attr: *attr, until });
            }
        }
    }

    fn overtaken(&self, ticket: &Ticket, ino: InodeNo) -> bool {
        self.stamp(ino).load(Ordering::SeqCst) > ticket.stamp
    }

    fn stamp(&self, ino: InodeNo) -> &AtomicU64 {
        &self.stamps[spread(ino.get()) % STAMPS]
    }

    fn attr_shard(&self, ino: InodeNo) -> MutexGuard<'_, LruCache<u64, Known>> {
        // Nothing can panic half way through a change of a shard, so a poisoned one is whole.
        self.attrs[spread(ino.get()) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name_shard(&self, parent: InodeNo, name: &[u8]) -> MutexGuard<'_, LruCache<(u64, Bytes), Named>> {
        let hash = name.iter().fold(parent.get(), |hash, byte| hash.wrapping_mul(31) ^ u64::from(*byte));
        self.names[spread(hash) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fibonacci hashing (Knuth, TAOCP 6.4): the upper bits of the product are well mixed.
fn spread(value: u64) -> usize {
    (value.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize
}

fn left(until: Instant) -> Option<Duration> {
    until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(ino: u64, version: u64) -> Attr {
        Attr { ino, version, ..Attr::default() }
    }

    fn cache() -> Cache {
        Cache::new(Duration::from_secs(1), 64)
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_believed_from_when_it_was_asked_for_and_never_replaces_a_later_version() {
        let (cache, ino) = (cache(), InodeNo(7));
        let ticket = cache.ticket();
        tokio::time::advance(Duration::from_millis(400)).await;
        cache.put_attr(&ticket, &attr(7, 5));
        assert_eq!(cache.attr(ino).map(|(a, left)| (a.version, left.as_millis())), Some((5, 600)));
        cache.put_attr(&cache.ticket(), &attr(7, 4));
        assert_eq!(cache.attr(ino).map(|(a, _)| a.version), Some(5));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(cache.attr(ino).is_none());
        cache.put_attr(&cache.ticket(), &attr(7, 4));
        assert!(cache.attr(ino).is_none(), "an old version does not come back after its successor ran out");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_asked_before_an_own_change_ended_is_not_kept() {
        let (cache, dir) = (cache(), InodeNo(1));
        let before = cache.ticket();
        cache.changed(dir);
        let between = cache.ticket();
        cache.set_name(dir, b"a", None);
        for ticket in [before, between] {
            cache.put_name(&ticket, dir, b"a", Some(InodeNo(9)));
            assert_eq!(cache.name(dir, b"a").map(|(ino, _)| ino), Some(None));
            cache.put_attr(&ticket, &attr(1, 1));
            assert!(cache.attr(dir).is_none());
        }
        cache.put_name(&cache.ticket(), dir, b"a", Some(InodeNo(10)));
        assert_eq!(cache.name(dir, b"a").map(|(ino, _)| ino), Some(Some(InodeNo(10))));
        cache.forget_name(dir, b"a");
        assert!(cache.name(dir, b"a").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_directory_follows_own_changes_unless_their_order_is_unclear() {
        let (cache, dir) = (cache(), InodeNo(1));
        let at = |seconds| Some(Timestamp { seconds, nanos: 0 });
        cache.learn(&Attr { size: 4, nlink: 3, mtime: at(10), ctime: at(10), ..attr(1, 5) });
        cache.dir_changed(dir, at(12), 1, 1);
        let (known, _) = cache.attr(dir).expect("still known");
        assert_eq!((known.size, known.nlink, known.version, known.mtime), (5, 4, 6, at(12)));
        // Made before that one, answered after it.
        cache.dir_changed(dir, at(11), 1, 0);
        assert!(cache.attr(dir).is_none());
        cache.accessed(dir, Timestamp { seconds: 20, nanos: 0 });
        assert_eq!(cache.last_attr(dir).and_then(|attr| attr.atime), at(20));
    }

    #[tokio::test(start_paused = true)]
    async fn a_forgotten_attribute_is_asked_again_and_the_number_of_entries_is_bounded() {
        let cache = cache();
        cache.learn(&attr(3, 2));
        cache.forget_attr(InodeNo(3));
        assert!(cache.attr(InodeNo(3)).is_none());
        cache.put_attr(&cache.ticket(), &attr(3, 2));
        assert!(cache.attr(InodeNo(3)).is_some());
        for ino in 0..1000 {
            cache.learn(&attr(ino, 1));
            cache.set_name(InodeNo(ino), b"x", None);
        }
        let kept: usize = cache.attrs.iter().map(|shard| shard.lock().expect("shard").len()).sum();
        assert!(kept <= 64, "{kept}");
    }
}
