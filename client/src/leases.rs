//! The leases that this client holds: what of its caches may be believed, and which files it may keep written bytes of.
//!
//! ```text
//!            granted with an answer                recalled                 given up: flushed, dropped here and in the kernel
//!  nothing ─────────────────────────▶ held ──────────────────────▶ leaving ───────────────────────▶ nothing (or read)
//!                                      │  nothing is believed from here on, no new bytes are kept ──┘
//!                                      └──── the deadline passes: as if nothing were held, until the master is heard again
//! ```
//!
//! What is cached under a lease carries its *term*: a number that a lease gets when it begins. It is believed as long as the
//! inode's lease has this number, so that ending a lease ends everything under it in one step.
//!
//! Nothing here does I/O. The session tells of grants and recalls in the order in which they came.

use dfs_env::Clock;
use dfs_proto::v1::LeaseKind;
use dfs_proto::{InodeNo, limits};
use lru::LruCache;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Locks that leases of different inodes share.
const SHARDS: usize = 16;
/// How long a lease is kept for whoever waited for it.
const USE: Duration = Duration::from_millis(20);
/// How long before the master may give a session up its client does.
const MARGIN: Duration = Duration::from_millis(limits::LEASE_MARGIN_MS);

/// What a lease allows; each allows what those before it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Read,
    Write,
}

impl Kind {
    /// What may be kept of a lease that is asked for.
    #[must_use]
    pub fn from_proto(kind: LeaseKind) -> Option<Self> {
        match kind {
            LeaseKind::LeaseNone => None,
            LeaseKind::LeaseRead => Some(Self::Read),
            LeaseKind::LeaseWrite => Some(Self::Write),
        }
    }

    /// As the protocol says it.
    #[must_use]
    pub fn to_proto(kind: Option<Self>) -> LeaseKind {
        match kind {
            None => LeaseKind::LeaseNone,
            Some(Self::Read) => LeaseKind::LeaseRead,
            Some(Self::Write) => LeaseKind::LeaseWrite,
        }
    }
}

/// Numbers the times that an inode was leased: what was learned in one is not believed in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term(u64);

impl Term {
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }
}

/// When the master looked at what it answered: on which stream, and after how many changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub stream: u64,
    pub clock: u64,
}

impl Seen {
    /// Whether what was seen now holds under a lease that has been there since then.
    fn is_under(self, since: Self) -> bool {
        self.stream == since.stream && self.clock >= since.clock
    }
}

#[derive(Clone, Copy, Debug)]
struct Held {
    kind: Kind,
    /// The number of its last grant.
    grant: u64,
    /// Nobody else has changed the inode since then.
    since: Seen,
    term: Term,
    /// The inode's version when it was last seen under it.
    version: u64,
    /// Somebody here has waited for it and has not used it yet: so long it is not given up, if that is wanted (and how far).
    /// Else two clients would hand it to each other for ever.
    reserved: bool,
    wanted: Option<Option<Kind>>,
    /// It is being given up, down to this.
    leaving: Option<Option<Kind>>,
    /// The kernel wrote back pages under it: bytes may be kept under a read lease.
    kept: bool,
}

impl Held {
    fn leave(&mut self, keep: Option<Kind>) {
        self.reserved = false;
        self.leaving = Some(self.leaving.map_or(keep, |leaving| leaving.min(keep)));
    }
}

/// Bytes came to be kept under a lease that was about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unclean;

/// Inodes on which leases are asserted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Asserted {
    pub read: Vec<u64>,
    pub write: Vec<u64>,
}

/// All of them.
pub struct Leases {
    clock: Arc<dyn Clock>,
    shards: Vec<Mutex<LruCache<InodeNo, Held>>>,
    /// Of one shard.
    most: usize,
    next_term: AtomicU64,
    /// Until when they count, in milliseconds since boot.
    deadline: AtomicU64,
    /// Leases that ended with their session and under which bytes may be kept, and the version that the inode had then: these
    /// bytes are shown to nobody, and committed only if nobody else has changed the inode since.
    lost: Mutex<HashMap<InodeNo, u64>>,
    lost_count: AtomicUsize,
    /// A reserved lease was used.
    used: Notify,
}

impl Leases {
    /// None. More than `most` are given back, the least used first.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, most: usize) -> Self {
        Self {
            clock,
            shards: (0..SHARDS).map(|_| Mutex::new(LruCache::unbounded())).collect(),
            most: (most / SHARDS).max(1),
            next_term: AtomicU64::new(1),
            deadline: AtomicU64::new(0),
            lost: Mutex::default(),
            lost_count: AtomicUsize::new(0),
            used: Notify::new(),
        }
    }

    fn shard(&self, ino: InodeNo) -> MutexGuard<'_, LruCache<InodeNo, Held>> {
        // Every change is a single step: a poisoned shard is whole.
        self.shards[usize::try_from(ino.get() % SHARDS as u64).expect("below SHARDS")]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The master has confirmed a message that was sent at `sent` (since boot): leases count for `ttl` from then, less a
    /// margin.
    pub fn confirmed(&self, sent: Duration, ttl: Duration) {
        let until = (sent + ttl).saturating_sub(MARGIN.min(ttl / 3));
        self.deadline.fetch_max(millis(until), Ordering::SeqCst);
    }

    /// For how long what is cached under a lease may still be believed without another word from the master.
    #[must_use]
    pub fn left(&self) -> Duration {
        let now = millis(self.clock.boot());
        Duration::from_millis(self.deadline.load(Ordering::SeqCst).saturating_sub(now))
    }

    /// A lease was granted with an answer that was seen then. Answers one that is to be given up for it, if there are too
    /// many.
    pub fn granted(&self, ino: InodeNo, kind: Kind, grant: u64, since: Seen) -> Option<(InodeNo, Kind)> {
        let term = Term(self.next_term.fetch_add(1, Ordering::Relaxed));
        let mut shard = self.shard(ino);
        match shard.get_mut(&ino) {
            // One lease goes on as another: what was learned under it is as good as before.
            Some(held) => (held.kind, held.grant) = (kind, grant),
            None => {
                let held = Held {
                    kind,
                    grant,
                    since,
                    term,
                    version: 0,
                    reserved: false,
                    wanted: None,
                    leaving: None,
                    kept: false,
                };
                shard.put(ino, held);
            }
        }
        if shard.len() <= self.most {
            return None;
        }
        let idle = shard.iter().rev().find(|(_, held)| held.leaving.is_none()).map(|(ino, _)| *ino)?;
        let held = shard.peek_mut(&idle)?;
        held.leaving = Some(None);
        Some((idle, held.kind))
    }

    /// The term under which something that is learned of an inode now may be kept, and believed until it ends.
    #[must_use]
    pub fn term(&self, ino: InodeNo) -> Option<Term> {
        self.believed(ino).map(|held| held.term)
    }

    /// The lease under which what is known of an inode may be believed now.
    fn believed(&self, ino: InodeNo) -> Option<Held> {
        let held = self.shard(ino).get(&ino).copied().filter(|held| held.leaving != Some(None))?;
        (!self.left().is_zero()).then_some(held)
    }

    /// The term under which what the master saw then may be kept.
    #[must_use]
    pub fn term_at(&self, ino: InodeNo, seen: Seen) -> Option<Term> {
        self.believed(ino).filter(|held| seen.is_under(held.since)).map(|held| held.term)
    }

    /// Time since boot.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.clock.boot()
    }

    /// The inode was seen in this version under its lease.
    pub fn seen(&self, ino: InodeNo, term: Term, version: u64) {
        if let Some(held) = self.shard(ino).peek_mut(&ino).filter(|held| held.term == term) {
            held.version = held.version.max(version);
        }
    }

    /// The version that an inode had when its lease was lost with the session, if bytes may be kept from before.
    #[must_use]
    pub fn lost_at(&self, ino: InodeNo) -> Option<u64> {
        if self.lost_count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        self.lost().get(&ino).copied()
    }

    /// What was kept under a lease that was lost at this version may be committed, or is gone.
    pub fn settle_lost(&self, ino: InodeNo, version: u64) {
        let mut lost = self.lost();
        if lost.get(&ino) == Some(&version) {
            lost.remove(&ino);
        }
        self.lost_count.store(lost.len(), Ordering::SeqCst);
    }

    fn lost(&self) -> MutexGuard<'_, HashMap<InodeNo, u64>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what was learned in a term may be believed.
    #[must_use]
    pub fn is_current(&self, ino: InodeNo, term: Term) -> bool {
        self.term(ino) == Some(term)
    }

    /// What is held on an inode and not being given up.
    #[must_use]
    pub fn kind(&self, ino: InodeNo) -> Option<Kind> {
        let held = self.shard(ino).peek(&ino).copied()?;
        if held.leaving.is_none() { Some(held.kind) } else { None }
    }

    /// Does something that takes a write lease, if there is one, and in this term if one is given. While it is being done,
    /// the lease does not end; it must not look at leases itself.
    pub fn writing<T>(&self, ino: InodeNo, term: Option<Term>, act: impl FnOnce() -> T) -> Option<T> {
        let mut shard = self.shard(ino);
        let held = shard.get_mut(&ino).filter(|_| self.lost_at(ino).is_none())?;
        let another = term.is_some_and(|term| term != held.term);
        if another || held.kind != Kind::Write || held.leaving.is_some() || self.left().is_zero() {
            return None;
        }
        let done = act();
        self.spend(held);
        Some(done)
    }

    /// Keeps what the kernel writes back of a shared mapping, under any lease, also one that is being given up: it ends only
    /// when that is committed. While it is being done, the lease does not end; it must not look at leases itself.
    pub fn keeping<T>(&self, ino: InodeNo, act: impl FnOnce() -> T) -> Option<T> {
        let mut shard = self.shard(ino);
        let held = shard.get_mut(&ino).filter(|_| self.lost_at(ino).is_none())?;
        held.kept = true;
        Some(act())
    }

    /// Whoever waited for a lease has used it.
    pub fn used(&self, ino: InodeNo) {
        if let Some(held) = self.shard(ino).peek_mut(&ino) {
            self.spend(held);
        }
    }

    fn spend(&self, held: &mut Held) {
        if std::mem::take(&mut held.reserved) && held.wanted.is_some() {
            self.used.notify_waiters();
        }
    }

    /// Leases to be given up because the master is short of memory: so many, the least used first.
    pub fn shed(&self, count: usize) -> Vec<(InodeNo, Kind)> {
        let mut chosen = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let idle = shard.iter().rev().filter(|(_, held)| held.leaving.is_none() && !held.reserved);
            let idle: Vec<InodeNo> = idle.map(|(ino, _)| *ino).take(count.div_ceil(SHARDS)).collect();
            for ino in idle {
                if let Some(held) = shard.peek_mut(&ino) {
                    held.leave(None);
                    chosen.push((ino, held.kind));
                }
            }
        }
        chosen
    }

    /// Somebody here has waited for this lease, and is about to be told that he has it.
    pub fn reserve(&self, ino: InodeNo) {
        if let Some(held) = self.shard(ino).peek_mut(&ino) {
            held.reserved = true;
        }
    }

    /// A lease that was recalled is to be given up now, or when whoever waited for it has used it. Answers the kind that is
    /// held; None: nothing any more.
    pub async fn depart(&self, ino: InodeNo) -> Option<Kind> {
        let used = async {
            loop {
                let used = self.used.notified();
                if !self.shard(ino).peek(&ino).is_some_and(|held| held.reserved && held.wanted.is_some()) {
                    return;
                }
                used.await;
            }
        };
        // Whoever does not use it has given up himself.
        let _in_time = tokio::time::timeout(USE, used).await;
        let mut shard = self.shard(ino);
        let held = shard.peek_mut(&ino)?;
        if let Some(keep) = held.wanted.take() {
            held.leave(keep);
        }
        Some(held.kind)
    }

    /// In which term the inode is leased, be the lease given up or not: what was kept under it is shown until it is gone.
    #[must_use]
    pub fn tenure(&self, ino: InodeNo) -> Option<Term> {
        self.shard(ino).peek(&ino).map(|held| held.term)
    }

    /// Somebody else needs the inode. What is to be given up: the kind that is held. `Err`: nothing is held under this
    /// grant, and that is what the master is to be told; or it is being given up as far already (None).
    pub fn recalled(&self, ino: InodeNo, grant: u64, keep: Option<Kind>) -> Result<Kind, Option<u64>> {
        let mut shard = self.shard(ino);
        let Some(held) = shard.peek_mut(&ino).filter(|held| held.grant == grant) else {
            return Err(Some(grant));
        };
        match held.leaving.or(held.wanted) {
            Some(leaving) if leaving <= keep => Err(None),
            _ if held.reserved => {
                held.wanted = Some(keep);
                Ok(held.kind)
            }
            _ => {
                held.leave(keep);
                Ok(held.kind)
            }
        }
    }

    /// The master and this client know both that a lease has ended: the inode lost its last name, and nobody has it open. One
    /// that the master has asked for is given back all the same: it waits for that.
    pub fn forget(&self, ino: InodeNo) {
        let mut shard = self.shard(ino);
        if shard.peek(&ino).is_some_and(|held| held.leaving.is_none()) {
            shard.pop(&ino);
        }
    }

    /// A lease that nobody asks for is to be given up. False: there is none, or it is being given up already.
    pub fn surrender(&self, ino: InodeNo) -> bool {
        let mut shard = self.shard(ino);
        let held = shard.peek_mut(&ino).filter(|held| held.leaving.is_none());
        held.map(|held| held.leaving = Some(None)).is_some()
    }

    /// Nothing is believed of an inode any more that is being given up as a whole, but something is to be committed before: the
    /// number of the grant, for the master.
    #[must_use]
    pub fn flushing(&self, ino: InodeNo) -> Option<u64> {
        let held = self.shard(ino).peek(&ino).copied()?;
        (held.leaving == Some(None)).then_some(held.grant)
    }

    /// Nothing is cached or kept any more beyond what remains of the lease, if it is `clean`, which must not look at leases.
    /// What to tell the master: the number of the grant. None: there is more to give up meanwhile, or nothing is held.
    ///
    /// # Errors
    /// It is not clean.
    pub fn left_behind(
        &self,
        ino: InodeNo,
        keep: Option<Kind>,
        clean: impl FnOnce() -> bool,
    ) -> Result<Option<u64>, Unclean> {
        let mut shard = self.shard(ino);
        let Some(held) = shard.peek_mut(&ino) else { return Ok(None) };
        if held.leaving.is_none_or(|leaving| leaving < keep) {
            return Ok(None);
        }
        if !clean() {
            return Err(Unclean);
        }
        let grant = held.grant;
        match keep {
            Some(kind) => (held.kind, held.leaving) = (held.kind.min(kind), None),
            None => drop(shard.pop(&ino)),
        }
        Ok(Some(grant))
    }

    /// A write lease that nobody waits for becomes a read lease, if it is `clean`, which must not look at leases. Answers the
    /// number of the grant, for the master.
    pub fn write_no_more(&self, ino: InodeNo, clean: impl FnOnce() -> bool) -> Option<u64> {
        let mut shard = self.shard(ino);
        let held = shard.peek_mut(&ino)?;
        if held.kind != Kind::Write || held.leaving.is_some() || held.reserved || !clean() {
            return None;
        }
        held.kind = Kind::Read;
        Some(held.grant)
    }

    /// What is held, to be asserted to a master on a stream that begins; grants are numbered 0 from here on.
    #[must_use]
    pub fn assert(&self, begins: Seen) -> Asserted {
        let mut asserted = Asserted::default();
        for shard in &self.shards {
            for (ino, held) in shard.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
                (held.grant, held.since) = (0, begins);
                match held.kind {
                    Kind::Read => asserted.read.push(ino.get()),
                    Kind::Write => asserted.write.push(ino.get()),
                }
            }
        }
        asserted
    }

    /// The session is over: nothing is held. Answers what was.
    pub fn end(&self) -> Vec<(InodeNo, Kind)> {
        self.deadline.store(0, Ordering::SeqCst);
        let mut held = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            held.extend(shard.iter().map(|(ino, lease)| (*ino, lease.kind)));
            let writes = shard.iter().filter(|(_, lease)| lease.kind == Kind::Write || lease.kept);
            let mut lost = self.lost();
            lost.extend(writes.map(|(ino, lease)| (*ino, lease.version)));
            self.lost_count.store(lost.len(), Ordering::SeqCst);
            drop(lost);
            shard.clear();
        }
        held
    }

    /// Every inode on which one is held.
    #[must_use]
    pub fn all(&self) -> Vec<InodeNo> {
        let mut inos = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            inos.extend(shard.iter().map(|(ino, _)| *ino));
        }
        inos
    }

    /// How many are held.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub mod testing {
    //! Leases on a clock that a test moves.

    use super::*;
    use std::time::SystemTime;

    /// When answers and leases of tests were seen.
    pub const SEEN: Seen = Seen { stream: 1, clock: 1 };

    pub struct TestClock(AtomicU64);

    impl TestClock {
        pub fn pass(&self, time: Duration) {
            self.0.fetch_add(millis(time), Ordering::SeqCst);
        }
    }

    impl Clock for TestClock {
        fn system(&self) -> SystemTime {
            SystemTime::UNIX_EPOCH + self.boot()
        }

        fn boot(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::SeqCst))
        }
    }

    /// No leases, which count for the next 18 seconds.
    pub fn leases() -> (Arc<Leases>, Arc<TestClock>) {
        let clock = Arc::new(TestClock(AtomicU64::new(1_000_000)));
        let leases = Leases::new(Arc::clone(&clock) as Arc<dyn Clock>, 1_000_000);
        leases.confirmed(clock.boot(), Duration::from_secs(20));
        (Arc::new(leases), clock)
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{SEEN, leases};
    use super::*;

    const INO: InodeNo = InodeNo(5);

    #[test]
    fn a_write_lease_that_is_recalled_takes_no_more_bytes_and_may_leave_a_read_lease() {
        let (leases, clock) = leases();
        assert_eq!(leases.writing(INO, None, || ()), None);
        leases.granted(INO, Kind::Read, 1, SEEN);
        let term = leases.term(INO).expect("held");
        assert_eq!(leases.writing(INO, None, || ()), None);
        leases.granted(INO, Kind::Write, 2, SEEN);
        assert_eq!(leases.writing(INO, Some(term), || 7), Some(7));
        assert!(leases.is_current(INO, term), "an upgrade begins no other term");
        assert_eq!(leases.recalled(INO, 1, None), Err(Some(1)), "an older grant");
        assert_eq!(leases.recalled(INO, 2, Some(Kind::Read)), Ok(Kind::Write));
        assert_eq!(leases.writing(INO, None, || ()), None);
        assert!(leases.is_current(INO, term));
        // More is wanted before as much was given.
        assert_eq!(leases.recalled(INO, 2, Some(Kind::Read)), Err(None));
        assert_eq!(leases.recalled(INO, 2, None), Ok(Kind::Write));
        assert!(!leases.is_current(INO, term));
        assert_eq!(leases.left_behind(INO, Some(Kind::Read), || true), Ok(None));
        assert_eq!(leases.left_behind(INO, None, || true), Ok(Some(2)));
        assert_eq!((leases.left_behind(INO, None, || true), leases.count()), (Ok(None), 0));
        leases.granted(INO, Kind::Read, 5, SEEN);
        assert_eq!(leases.recalled(INO, 5, None), Ok(Kind::Read));
        leases.forget(INO);
        assert_eq!(leases.left_behind(INO, None, || false), Err(Unclean));
        assert_eq!(leases.left_behind(INO, None, || true), Ok(Some(5)), "the master waits for it");
        leases.granted(INO, Kind::Read, 6, SEEN);
        leases.forget(INO);
        assert_eq!(leases.count(), 0);
        leases.granted(INO, Kind::Write, 3, SEEN);
        clock.pass(Duration::from_secs(18));
        assert_eq!(
            (leases.writing(INO, None, || ()), leases.term(INO)),
            (None, None),
            "nobody may know of it any more"
        );
        let tenure = leases.tenure(INO).expect("held");
        leases.seen(INO, tenure, 9);
        assert_eq!(leases.end(), [(INO, Kind::Write)]);
        assert_eq!(leases.lost_at(INO), Some(9));
    }

    #[test]
    fn a_clean_write_lease_becomes_a_read_lease_and_goes_on() {
        let (leases, _) = leases();
        leases.granted(INO, Kind::Write, 1, SEEN);
        let term = leases.term(INO).expect("held");
        assert_eq!(leases.write_no_more(INO, || false), None);
        leases.reserve(INO);
        assert_eq!(leases.write_no_more(INO, || true), None, "somebody is about to write");
        leases.used(INO);
        assert_eq!(leases.write_no_more(INO, || true), Some(1));
        assert_eq!((leases.kind(INO), leases.is_current(INO, term)), (Some(Kind::Read), true));
        assert_eq!(leases.writing(INO, None, || ()), None);
        assert_eq!(leases.write_no_more(INO, || true), None, "it is one already");
        assert_eq!(
            leases.recalled(INO, 1, Some(Kind::Read)),
            Ok(Kind::Read),
            "the master's question was on its way"
        );
        assert_eq!(leases.left_behind(INO, Some(Kind::Read), || true), Ok(Some(1)));
        leases.granted(INO, Kind::Write, 2, SEEN);
        assert_eq!(leases.recalled(INO, 2, None), Ok(Kind::Write));
        assert_eq!(leases.write_no_more(INO, || true), None, "it is being given up");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_was_waited_for_is_used_before_it_is_given_up() {
        let (leases, _) = leases();
        leases.granted(INO, Kind::Write, 1, SEEN);
        leases.reserve(INO);
        assert_eq!(leases.recalled(INO, 1, None), Ok(Kind::Write));
        assert_eq!(leases.recalled(INO, 1, Some(Kind::Read)), Err(None));
        let (held, written) = tokio::join!(leases.depart(INO), async { leases.writing(INO, None, || 7) });
        assert_eq!((held, written), (Some(Kind::Write), Some(7)));
        assert_eq!(leases.writing(INO, None, || ()), None);
        assert_eq!(leases.left_behind(INO, None, || true), Ok(Some(1)));
        // Nobody comes to use it.
        leases.granted(INO, Kind::Write, 2, SEEN);
        leases.reserve(INO);
        assert!(leases.recalled(INO, 2, None).is_ok());
        assert_eq!(leases.depart(INO).await, Some(Kind::Write));
        assert_eq!((leases.writing(INO, None, || ()), leases.tenure(INO).is_some()), (None, true));
    }

    #[test]
    fn what_is_held_is_asserted_and_the_least_used_is_given_back() {
        let clock = leases().1;
        let leases = Leases::new(Arc::clone(&clock) as Arc<dyn Clock>, 2 * SHARDS);
        leases.confirmed(clock.boot(), Duration::from_secs(20));
        let ino = |n: usize| InodeNo((n * SHARDS) as u64);
        assert_eq!(
            (leases.granted(ino(1), Kind::Read, 1, SEEN), leases.granted(ino(2), Kind::Write, 1, SEEN)),
            (None, None)
        );
        assert!(leases.term(ino(1)).is_some());
        assert_eq!(leases.granted(ino(3), Kind::Read, 1, SEEN), Some((ino(2), Kind::Write)));
        assert_eq!(leases.kind(ino(2)), None);
        assert_eq!(leases.left_behind(ino(2), None, || true), Ok(Some(1)));
        let mut asserted = leases.assert(SEEN);
        asserted.read.sort_unstable();
        assert_eq!(asserted, Asserted { read: vec![ino(1).get(), ino(3).get()], write: Vec::new() });
        assert_eq!(leases.recalled(ino(1), 0, None), Ok(Kind::Read));
        assert_eq!(leases.shed(1), [(ino(3), Kind::Read)]);
        assert!(leases.shed(10).is_empty(), "both are being given up");
    }
}
