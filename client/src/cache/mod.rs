//! Attributes and names that were learned under leases, believed as long as these last: an attribute under the inode's, a name
//! under its directory's.
//!
//! Four rules keep an answer from going back in time:
//! * An attribute never replaces one of a later [`Attr::version`].
//! * A question that was under way when a change by this client to the same inode or directory ended may have been
//!   answered from before that change: its answer is not kept. Each question takes a [`Ticket`] first, each change
//!   leaves its stamp when it ends ([`Cache::changed`]). What was kept while the change was under way, it replaces.
//! * An answer is believed under a lease only if the master looked no earlier than when it gave the lease ([`Ticket::at`]).
//! * What a change by this client touches is not believed before that is answered (`doubts.rs`).

mod doubts;
mod pages;
mod whole;

use crate::leases::{Leases, Seen, Term};
use bytes::Bytes;
use dfs_proto::InodeNo;
use dfs_proto::v1::{Attr, DirEntry, DirPage, Timestamp};
use doubts::Doubts;
pub use doubts::Touched;
use lru::LruCache;
use pages::{Kept, Pages};
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use whole::WholeDirs;

/// Locks that lookups of different inodes share.
const SHARDS: usize = 16;
/// Stamps of changes; inodes that share one only lose a chance to be cached.
const STAMPS: usize = 4096;

/// Taken before a question is asked; says which answers may be kept.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    taken: u64,
    /// When the master looked at what it answered.
    seen: Option<Seen>,
}

impl Ticket {
    /// The answer has come, and the master looked then; None: it is not to be believed.
    #[must_use]
    pub const fn at(self, seen: Option<Seen>) -> Self {
        Self { seen, ..self }
    }
}

/// What is known of attributes and names. Bounded; the least recently used go first.
pub struct Cache {
    leases: Arc<Leases>,
    clock: AtomicU64,
    /// When an own change of the inodes that share a stamp ended last.
    stamps: Vec<AtomicU64>,
    doubts: Doubts,
    attrs: Vec<Mutex<LruCache<u64, Known>>>,
    /// Told of all attributes that are learned.
    learned: Learned,
    names: Vec<Mutex<LruCache<(u64, Bytes), Named>>>,
    whole: Mutex<WholeDirs>,
    pages: Mutex<Pages>,
}

/// Wakes those who wait for an attribute; costs who learns one a load when nobody does.
#[derive(Default)]
struct Learned {
    notify: Notify,
    waiting: AtomicUsize,
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Learned {
    fn begin(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        Waiting(&self.waiting)
    }

    fn tell(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.notify.notify_waiters();
        }
    }
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

/// What a directory's names are as of: the lease, and how many changes by this client there were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edition {
    pub term: Term,
    pub changes: u64,
}

/// A change by this client: nothing that it touches is believed before this is dropped, after its answer was learned; and for
/// a while longer if it was not answered.
pub struct Underway {
    cache: Arc<Cache>,
    doubt: u64,
    pub answered: bool,
}

impl Underway {
    /// It is about to be sent.
    #[must_use]
    pub fn begin(cache: &Arc<Cache>, touched: Touched) -> Self {
        Self { cache: Arc::clone(cache), doubt: cache.doubts.begin(touched), answered: false }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        if self.answered {
            self.cache.doubts.end(self.doubt);
        } else {
            self.cache.doubts.give_up(self.doubt, self.cache.leases.now());
        }
    }
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
            doubts: Doubts::default(),
            attrs: (0..SHARDS).map(|_| Mutex::new(LruCache::new(shard))).collect(),
            learned: Learned::default(),
            names: (0..SHARDS).map(|_| Mutex::new(LruCache::new(shard))).collect(),
            whole: Mutex::new(WholeDirs::new()),
            pages: Mutex::new(Pages::new()),
        }
    }

    /// To be taken before a question is asked.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        Ticket { taken: self.clock.load(Ordering::SeqCst), seen: None }
    }

    /// Whether a change of an inode by this client is under way.
    #[must_use]
    pub fn is_changing(&self, ino: InodeNo) -> bool {
        self.doubts.touches(ino, self.leases.now())
    }

    /// A change by this client to the inode or to the directory's names has ended: it overtakes every ticket taken so far.
    pub fn changed(&self, ino: InodeNo) {
        let now = self.clock.fetch_add(1, Ordering::SeqCst) + 1;
        self.stamps[stamp_of(ino)].fetch_max(now, Ordering::SeqCst);
    }

    /// Keeps the answer to a question.
    pub fn put_attr(&self, ticket: &Ticket, attr: &Attr) {
        let ino = InodeNo(attr.ino);
        let term = self.term_of(ticket, ino);
        if !self.overtaken(ticket.taken, ino) {
            self.insert_attr(attr, term);
        } else if self.last_attr(ino).is_some_and(|known| known.version < attr.version) {
            // Not to be believed, but later than what is known: that never goes back.
            self.insert_attr(attr, None);
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
        let left = self.left(ino, known.term)?;
        (!self.is_changing(ino)).then_some((known.attr, left))
    }

    /// The attributes of an inode as they were last known, however long ago.
    #[must_use]
    pub fn last_attr(&self, ino: InodeNo) -> Option<Attr> {
        self.attr_shard(ino).peek(&ino.get()).map(|known| known.attr)
    }

    /// Waits until this version of an inode is known.
    pub async fn knows(&self, ino: InodeNo, version: u64) {
        // Counted before it looks: whoever learns something and finds nobody waiting, learned it before that.
        let _one_more = self.learned.begin();
        loop {
            let mut learned = pin!(self.learned.notify.notified());
            // From here on nothing is missed.
            learned.as_mut().enable();
            if self.last_attr(ino).is_some_and(|known| known.version >= version) {
                return;
            }
            learned.await;
        }
    }

    /// Keeps the answer to the question what a name stands for; `None`: nothing.
    pub fn put_name(&self, ticket: &Ticket, parent: InodeNo, name: &[u8], ino: Option<InodeNo>) {
        let named = Named { ino, term: self.term_of(ticket, parent) };
        if self.overtaken(ticket.taken, parent) {
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
        if self.doubts.touches_name(parent, name, self.leases.now()) {
            return None;
        }
        let named = self.name_shard(parent, name).get(&(parent.get(), Bytes::copy_from_slice(name))).copied();
        if let Some(named) = named
            && let Some(left) = self.left(parent, named.term)
        {
            return Some((named.ino, left));
        }
        let term = self.whole().lacks(parent, name)?;
        Some((None, self.left(parent, Some(term))?))
    }

    /// Keeps a page of a directory's entries, without their attributes.
    pub fn put_page(&self, ticket: &Ticket, dir: InodeNo, cookie: u64, page: &DirPage) {
        if let Some(term) = self.term_of(ticket, dir) {
            let bare = |entry: &DirEntry| DirEntry { attr: None, name: entry.name.clone(), ..*entry };
            let page = DirPage { entries: page.entries.iter().map(bare).collect(), end: page.end };
            let kept = Kept { after: cookie, page: Arc::new(page), term, taken: ticket.taken };
            self.pages().put(dir, kept);
        }
    }

    /// The page with the entries that follow a cookie, if they are known, and how many of its entries stand before them.
    #[must_use]
    pub fn page(&self, dir: InodeNo, cookie: u64) -> Option<(Arc<DirPage>, usize)> {
        let (kept, skip) = self.pages().get(dir, cookie)?;
        let believed = self.left(dir, Some(kept.term)).is_some()
            && !self.overtaken(kept.taken, dir)
            && !self.is_changing(dir);
        believed.then_some((kept.page, skip))
    }

    /// As of what a directory's names are now, if that can be believed.
    #[must_use]
    pub fn edition(&self, dir: InodeNo) -> Option<Edition> {
        let changes = self.stamps[stamp_of(dir)].load(Ordering::SeqCst);
        let term = self.leases.term(dir).filter(|_| !self.is_changing(dir))?;
        Some(Edition { term, changes })
    }

    /// As of what an answer about a directory is, if it is as things are now.
    #[must_use]
    pub fn edition_of(&self, ticket: &Ticket, dir: InodeNo) -> Option<Edition> {
        let edition = self.edition(dir)?;
        let is_now = self.term_of(ticket, dir) == Some(edition.term) && !self.overtaken(ticket.taken, dir);
        is_now.then_some(edition)
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
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
        drop(shard);
        self.learned.tell();
    }

    /// For how long what was learned of an inode in a term may still be believed.
    fn left(&self, ino: InodeNo, term: Option<Term>) -> Option<Duration> {
        if !self.leases.is_current(ino, term?) {
            return None;
        }
        Some(self.leases.left()).filter(|left| !left.is_zero())
    }

    fn overtaken(&self, taken: u64, ino: InodeNo) -> bool {
        self.stamps[stamp_of(ino)].load(Ordering::SeqCst) > taken
    }

    /// The term in which an answer may be believed: nobody else has changed the inode since the master looked.
    fn term_of(&self, ticket: &Ticket, ino: InodeNo) -> Option<Term> {
        self.leases.term_at(ino, ticket.seen?)
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
    use crate::leases::testing::{SEEN, TestClock, leases};
    use dfs_env::Clock;

    fn attr(ino: u64, version: u64) -> Attr {
        Attr { ino, version, ..Attr::default() }
    }

    /// A ticket for an answer that was seen when the leases of tests began.
    fn fresh(cache: &Cache) -> Ticket {
        cache.ticket().at(Some(SEEN))
    }

    fn cache(inos: &[u64]) -> (Arc<Cache>, Arc<Leases>, Arc<TestClock>) {
        let (leases, clock) = leases();
        for ino in inos {
            leases.granted(InodeNo(*ino), Kind::Read, 1, SEEN);
        }
        (Arc::new(Cache::new(Arc::clone(&leases), 64)), leases, clock)
    }

    #[tokio::test]
    async fn whoever_waits_for_a_version_goes_on_when_it_or_a_later_one_is_learned() {
        let (cache, ..) = cache(&[7]);
        let waits = cache.knows(InodeNo(7), 5);
        let mut waits = pin!(waits);
        for (ino, version) in [(7, 4), (8, 5)] {
            cache.put_attr(&fresh(&cache), &attr(ino, version));
            assert!(futures::poll!(&mut waits).is_pending(), "version {version} of {ino}");
        }
        cache.learn(&fresh(&cache), &attr(7, 6));
        assert!(futures::poll!(&mut waits).is_ready());
        assert!(futures::poll!(pin!(cache.knows(InodeNo(7), 6))).is_ready(), "known already");
        assert_eq!(cache.learned.waiting.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn an_answer_is_believed_under_its_lease_and_never_replaces_a_later_version() {
        let (cache, leases, clock) = cache(&[7]);
        let ino = InodeNo(7);
        cache.put_attr(&fresh(&cache), &attr(7, 5));
        clock.pass(Duration::from_secs(4));
        assert_eq!(cache.attr(ino).map(|(a, left)| (a.version, left.as_secs())), Some((5, 14)));
        cache.put_attr(&fresh(&cache), &attr(7, 4));
        assert_eq!(cache.attr(ino).map(|(a, _)| a.version), Some(5));
        clock.pass(Duration::from_secs(14));
        assert!(cache.attr(ino).is_none(), "the master may have given the session up");
        leases.confirmed(clock.boot(), Duration::from_secs(20));
        assert!(cache.attr(ino).is_some());
        let changing = fresh(&cache);
        assert_eq!(leases.recalled(ino, 1, None), Ok(Kind::Read));
        assert!(cache.attr(ino).is_none());
        assert_eq!(leases.left_behind(ino, None, || true), Ok(Some(1)));
        let later = Seen { clock: SEEN.clock + 1, ..SEEN };
        leases.granted(ino, Kind::Read, 2, later);
        assert!(cache.attr(ino).is_none(), "what was learned under another lease");
        cache.learn(&changing, &attr(7, 6));
        assert!(cache.attr(ino).is_none(), "somebody else may have changed it since");
        cache.put_attr(&fresh(&cache), &attr(7, 6));
        assert!(cache.attr(ino).is_none(), "asked after the lease began, and seen before");
        cache.learn(&cache.ticket(), &attr(7, 6));
        assert!(cache.attr(ino).is_none(), "an answer that is not to be kept");
        cache.learn(&cache.ticket().at(Some(later)), &attr(7, 7));
        assert!(cache.attr(ino).is_some());
        let _asserted = leases.assert(Seen { stream: SEEN.stream + 1, clock: 0 });
        assert!(cache.attr(ino).is_some(), "the lease goes on");
        cache.put_attr(&cache.ticket().at(Some(later)), &attr(7, 8));
        assert!(
            cache.attr(ino).is_none(),
            "an answer from another stream than the one the lease was asserted on"
        );
        cache.put_attr(&cache.ticket().at(Some(Seen { stream: SEEN.stream + 1, clock: 1 })), &attr(7, 8));
        assert!(cache.attr(ino).is_some());
        cache.put_attr(&fresh(&cache), &attr(7, 4));
        assert_eq!(cache.attr(ino).map(|(a, _)| a.version), Some(8), "an old version does not come back");
        cache.put_attr(&fresh(&cache), &attr(8, 1));
        assert!(cache.attr(InodeNo(8)).is_none(), "nothing is believed without a lease");
    }

    #[test]
    fn what_was_asked_before_an_own_change_ended_is_not_kept() {
        let (cache, ..) = cache(&[1]);
        let dir = InodeNo(1);
        let before = fresh(&cache);
        cache.changed(dir);
        let between = fresh(&cache);
        cache.set_name(&before, dir, b"a", None);
        for ticket in [before, between] {
            cache.put_name(&ticket, dir, b"a", Some(InodeNo(9)));
            assert_eq!(cache.name(dir, b"a").map(|(ino, _)| ino), Some(None));
            cache.put_attr(&ticket, &attr(1, 1));
            assert!(cache.attr(dir).is_none());
        }
        cache.put_name(&fresh(&cache), dir, b"a", Some(InodeNo(10)));
        assert_eq!(cache.name(dir, b"a").map(|(ino, _)| ino), Some(Some(InodeNo(10))));
        cache.forget_name(dir, b"a");
        assert!(cache.name(dir, b"a").is_none());
    }

    #[test]
    fn a_page_is_believed_until_the_directory_changes() {
        let (cache, leases, _) = cache(&[1]);
        let dir = InodeNo(1);
        let page = DirPage { end: true, ..DirPage::default() };
        let keep = || cache.put_page(&fresh(&cache), dir, 0, &page);
        keep();
        assert!(cache.page(dir, 0).is_some() && cache.page(dir, 7).is_none());
        cache.changed(dir);
        assert!(cache.page(dir, 0).is_none(), "an own change");
        keep();
        let mut change = Underway::begin(&cache, Touched::name(dir, b"a"));
        assert!(cache.page(dir, 0).is_none());
        change.answered = true;
        drop(change);
        assert!(cache.page(dir, 0).is_some());
        assert!(leases.recalled(dir, 1, None).is_ok());
        assert!(cache.page(dir, 0).is_none(), "somebody else's");
    }

    #[test]
    fn nothing_is_believed_that_an_own_change_under_way_touches() {
        let (cache, _, clock) = cache(&[1, 7]);
        let (dir, ino) = (InodeNo(1), InodeNo(7));
        for ino in [1, 7] {
            cache.put_attr(&fresh(&cache), &attr(ino, 1));
        }
        for name in [b"a", b"b"] {
            cache.put_name(&fresh(&cache), dir, name, Some(ino));
        }
        let mut change = Underway::begin(&cache, Touched::name(dir, b"a").and(Some(ino)));
        assert!(cache.attr(dir).is_none() && cache.attr(ino).is_none() && cache.name(dir, b"a").is_none());
        assert!(cache.name(dir, b"b").is_some(), "others in the directory are what they were");
        change.answered = true;
        drop(change);
        assert!(cache.attr(dir).is_some() && cache.name(dir, b"a").is_some());
        drop(Underway::begin(&cache, Touched::inode(ino)));
        clock.pass(Duration::from_secs(5));
        assert!(cache.attr(ino).is_none(), "it may still happen");
    }

    #[test]
    fn a_directory_follows_own_changes_unless_their_order_is_unclear() {
        let (cache, ..) = cache(&[1]);
        let dir = InodeNo(1);
        let at = |seconds| Some(Timestamp { seconds, nanos: 0 });
        cache.learn(&fresh(&cache), &Attr { size: 4, nlink: 3, mtime: at(10), ctime: at(10), ..attr(1, 5) });
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
        cache.learn(&fresh(&cache), &attr(3, 2));
        cache.forget_attr(InodeNo(3));
        assert!(cache.attr(InodeNo(3)).is_none());
        cache.put_attr(&fresh(&cache), &attr(3, 2));
        assert!(cache.attr(InodeNo(3)).is_some());
        for ino in 0..1000 {
            cache.learn(&fresh(&cache), &attr(ino, 1));
            cache.set_name(&fresh(&cache), InodeNo(ino), b"x", None);
        }
        let kept: usize = cache.attrs.iter().map(|shard| shard.lock().expect("shard").len()).sum();
        assert!(kept <= 64, "{kept}");
    }
}
