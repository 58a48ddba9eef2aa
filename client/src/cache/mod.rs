//! Attributes and names that were learned under leases, believed as long as these last: an attribute under the inode's, a name
//! under its directory's.
//!
//! Two rules keep an answer from going back in time:
//! * An attribute never replaces one of a later [`Attr::version`].
//! * A question that was under way when a change by this client to the same inode or directory ended may have been
//!   answered from before that change: its answer is not kept. Each question takes a [`Ticket`] first, each change
//!   leaves its stamp when it ends ([`Cache::changed`]). What was kept while the change was under way, it replaces. A lease that
//!   is given up leaves one, too.

mod whole;

use crate::leases::{Leases, Term};
use bytes::Bytes;
use dfs_proto::InodeNo;
use dfs_proto::v1::{Attr, Timestamp};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use whole::WholeDirs;

/// Locks that lookups of different inodes share.
const SHARDS: usize = 16;
/// Stamps of changes; inodes that share one only lose a chance to be cached.
const STAMPS: usize = 4096;

/// Taken before a question is asked; says which answers may be kept.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    taken: u64,
}

/// What is known of attributes and names. Bounded; the least recently used go first.
pub struct Cache {
    leases: Arc<Leases>,
    clock: AtomicU64,
    /// When an own change of the inodes that share a stamp ended last, or a lease of one was given up.
    stamps: Vec<AtomicU64>,
    /// The latter alone.
    given_up: Vec<AtomicU64>,
    attrs: Vec<Mutex<LruCache<u64, Known>>>,
    names: Vec<Mutex<LruCache<(u64, Bytes), Named>>>,
    whole: Mutex<WholeDirs>,
}

#[derive(Clone, Copy)]
struct Known {
    attr: Attr,
    /// Under which it is believed.
    term: Option<Term>,
}

#[derive(Clone, Copy)]
struct Named {
    /// `None`: there is nothing of that name.
    ino: Option<InodeNo>,
    term: Option<Term>,
}

impl Cache {
    /// A cache of at most `entries` attributes and as many names.
    #[must_use]
    pub fn new(leases: Arc<Leases>, entries: usize) -> Self {
        let shard = NonZeroUsize::new(entries / SHARDS).unwrap_or(NonZeroUsize::MIN);
        Self {
            leases,
            clock: AtomicU64::new(1),
            stamps: (0..STAMPS).map(|_| AtomicU64::new(0)).collect(),
            given_up: (0..STAMPS).map(|_| AtomicU64::new(0)).collect(),
            attrs: (0..SHARDS).map(|_| Mutex::new(LruCache::new(shard))).collect(),
            names: (0..SHARDS).map(|_| Mutex::new(LruCache::new(shard))).collect(),
            whole: Mutex::new(WholeDirs::new()),
        }
    }

    /// To be taken before a question is asked.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket { taken: self.clock.load(Ordering::SeqCst) }
    }

    /// A change by this client to the inode or to the directory's names has ended.
    pub fn changed(&self, ino: InodeNo) {
        self.overtake(ino);
    }

    /// A lease is about to be given up: what was asked under it is not kept under the next one.
    pub fn leaving(&self, ino: InodeNo) {
        let now = self.overtake(ino);
        self.given_up[stamp_of(ino)].fetch_max(now, Ordering::SeqCst);
    }

    /// Keeps the answer to a question.
    pub fn put_attr(&self, ticket: &Ticket, attr: &Attr) {
        let ino = InodeNo(attr.ino);
        // Looked at first: a lease that began later began after what overtakes the ticket.
        let term = self.leases.term(ino);
        if !self.overtaken(ticket, ino) {
            self.insert_attr(attr, term);
        }
    }

    /// Keeps what the answer to this client's own change says.
    pub fn learn(&self, ticket: &Ticket, attr: &Attr) {
        let ino = InodeNo(attr.ino);
        self.changed(ino);
        self.insert_attr(attr, self.term_of(ticket, ino));
    }

    /// The inode changed in a way that the answer did not show: it must be asked again.
    pub fn forget_attr(&self, ino: InodeNo) {
        self.changed(ino);
        // The entry stays for its version.
        if let Some(known) = self.attr_shard(ino).peek_mut(&ino.get()) {
            known.term = None;
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
            known.term = None;
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
        Some((known.attr, self.left(ino, known.term)?))
    }

    /// The attributes of an inode as they were last known, however long ago.
    #[must_use]
    pub fn last_attr(&self, ino: InodeNo) -> Option<Attr> {
        self.attr_shard(ino).peek(&ino.get()).map(|known| known.attr)
    }

    /// Keeps the answer to the question what a name stands for; `None`: nothing.
    pub fn put_name(&self, ticket: &Ticket, parent: InodeNo, name: &[u8], ino: Option<InodeNo>) {
        let named = Named { ino, term: self.leases.term(parent) };
        if self.overtaken(ticket, parent) {
            return;
        }
        self.name_shard(parent, name).put((parent.get(), Bytes::copy_from_slice(name)), named);
    }

    /// What a name stands for after this client's own change.
    pub fn set_name(&self, ticket: &Ticket, parent: InodeNo, name: &[u8], ino: Option<InodeNo>) {
        self.changed(parent);
        let named = Named { ino, term: self.term_of(ticket, parent) };
        self.name_shard(parent, name).put((parent.get(), Bytes::copy_from_slice(name)), named);
    }

    /// This client made a directory, and asked for it with this ticket.
    pub fn made_dir(&self, ticket: &Ticket, dir: &Attr) {
        let ino = InodeNo(dir.ino);
        if let Some(term) = self.term_of(ticket, ino) {
            self.whole().made(ino, dir.version, term);
        }
    }

    /// This client made a name in a directory, which is of this version since.
    pub fn made_name(&self, dir: InodeNo, name: &Bytes, version: u64) {
        self.whole().added(dir, name, version);
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
            && let Some(left) = self.left(parent, named.term)
        {
            return Some((named.ino, left));
        }
        let term = self.whole().lacks(parent, name)?;
        Some((None, self.left(parent, Some(term))?))
    }

    fn whole(&self) -> MutexGuard<'_, WholeDirs> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert_attr(&self, attr: &Attr, term: Option<Term>) {
        if let Some(term) = term {
            self.leases.seen(InodeNo(attr.ino), term, attr.version);
        }
        let known = Known { attr: *attr, term };
        let mut shard = self.attr_shard(InodeNo(attr.ino));
        match shard.get_mut(&attr.ino) {
            Some(before) if before.attr.version > attr.version => {}
            Some(before) => *before = known,
            None => drop(shard.put(attr.ino, known)),
        }
    }

    /// For how long what was learned of an inode in a term may still be believed.
    fn left(&self, ino: InodeNo, term: Option<Term>) -> Option<Duration> {
        if !self.leases.is_current(ino, term?) {
            return None;
        }
        Some(self.leases.left()).filter(|left| !left.is_zero())
    }

    /// Overtakes every ticket taken so far; says when.
    fn overtake(&self, ino: InodeNo) -> u64 {
        let now = self.clock.fetch_add(1, Ordering::SeqCst) + 1;
        self.stamps[stamp_of(ino)].fetch_max(now, Ordering::SeqCst);
        now
    }

    fn overtaken(&self, ticket: &Ticket, ino: InodeNo) -> bool {
        self.stamps[stamp_of(ino)].load(Ordering::SeqCst) > ticket.taken
    }

    /// The term in which the answer to an own change may be believed: it was given under this lease, not an earlier one.
    fn term_of(&self, ticket: &Ticket, ino: InodeNo) -> Option<Term> {
        let term = self.leases.term(ino)?;
        (self.given_up[stamp_of(ino)].load(Ordering::SeqCst) <= ticket.taken).then_some(term)
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

fn stamp_of(ino: InodeNo) -> usize {
    spread(ino.get()) % STAMPS
}

/// Fibonacci hashing (Knuth, TAOCP 6.4): the upper bits of the product are well mixed.
fn spread(value: u64) -> usize {
    (value.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leases::Kind;
    use crate::leases::testing::{TestClock, leases};
    use dfs_env::Clock;

    fn attr(ino: u64, version: u64) -> Attr {
        Attr { ino, version, ..Attr::default() }
    }

    fn cache(inos: &[u64]) -> (Cache, Arc<Leases>, Arc<TestClock>) {
        let (leases, clock) = leases();
        for ino in inos {
            leases.granted(InodeNo(*ino), Kind::Read, 1);
        }
        (Cache::new(Arc::clone(&leases), 64), leases, clock)
    }

    #[test]
    fn an_answer_is_believed_under_its_lease_and_never_replaces_a_later_version() {
        let (cache, leases, clock) = cache(&[7]);
        let ino = InodeNo(7);
        cache.put_attr(&cache.ticket(), &attr(7, 5));
        clock.pass(Duration::from_secs(4));
        assert_eq!(cache.attr(ino).map(|(a, left)| (a.version, left.as_secs())), Some((5, 14)));
        cache.put_attr(&cache.ticket(), &attr(7, 4));
        assert_eq!(cache.attr(ino).map(|(a, _)| a.version), Some(5));
        clock.pass(Duration::from_secs(14));
        assert!(cache.attr(ino).is_none(), "the master may have given the session up");
        leases.confirmed(clock.boot(), Duration::from_secs(20));
        assert!(cache.attr(ino).is_some());
        let changing = cache.ticket();
        assert_eq!(leases.recalled(ino, 1, None), Ok(Kind::Read));
        assert!(cache.attr(ino).is_none());
        cache.leaving(ino);
        assert_eq!(leases.left_behind(ino, None), Some(1));
        leases.granted(ino, Kind::Read, 2);
        assert!(cache.attr(ino).is_none(), "what was learned under another lease");
        cache.learn(&changing, &attr(7, 6));
        assert!(cache.attr(ino).is_none(), "somebody else may have changed it since");
        cache.learn(&cache.ticket(), &attr(7, 7));
        assert!(cache.attr(ino).is_some());
        cache.put_attr(&cache.ticket(), &attr(7, 4));
        assert_eq!(cache.attr(ino).map(|(a, _)| a.version), Some(7), "an old version does not come back");
        cache.put_attr(&cache.ticket(), &attr(8, 1));
        assert!(cache.attr(InodeNo(8)).is_none(), "nothing is believed without a lease");
    }

    #[test]
    fn what_was_asked_before_an_own_change_ended_is_not_kept() {
        let (cache, ..) = cache(&[1]);
        let dir = InodeNo(1);
        let before = cache.ticket();
        cache.changed(dir);
        let between = cache.ticket();
        cache.set_name(&before, dir, b"a", None);
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

    #[test]
    fn a_directory_follows_own_changes_unless_their_order_is_unclear() {
        let (cache, ..) = cache(&[1]);
        let dir = InodeNo(1);
        let at = |seconds| Some(Timestamp { seconds, nanos: 0 });
        cache.learn(&cache.ticket(), &Attr { size: 4, nlink: 3, mtime: at(10), ctime: at(10), ..attr(1, 5) });
        cache.dir_changed(dir, at(12), 1, 1);
        let (known, _) = cache.attr(dir).expect("still known");
        assert_eq!((known.size, known.nlink, known.version, known.mtime), (5, 4, 6, at(12)));
        // Made before that one, answered after it.
        cache.dir_changed(dir, at(11), 1, 0);
        assert!(cache.attr(dir).is_none());
        cache.accessed(dir, Timestamp { seconds: 20, nanos: 0 });
        assert_eq!(cache.last_attr(dir).and_then(|attr| attr.atime), at(20));
    }

    #[test]
    fn a_forgotten_attribute_is_asked_again_and_the_number_of_entries_is_bounded() {
        let (cache, ..) = cache(&[3]);
        cache.learn(&cache.ticket(), &attr(3, 2));
        cache.forget_attr(InodeNo(3));
        assert!(cache.attr(InodeNo(3)).is_none());
        cache.put_attr(&cache.ticket(), &attr(3, 2));
        assert!(cache.attr(InodeNo(3)).is_some());
        for ino in 0..1000 {
            cache.learn(&cache.ticket(), &attr(ino, 1));
            cache.set_name(&cache.ticket(), InodeNo(ino), b"x", None);
        }
        let kept: usize = cache.attrs.iter().map(|shard| shard.lock().expect("shard").len()).sum();
        assert!(kept <= 64, "{kept}");
    }
}
