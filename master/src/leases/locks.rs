//! Byte-range locks of fcntl(2) and flock(2), across clients.
//!
//! An *owner* is whatever the client says it is within its session: a process for fcntl, an open file description for
//! flock (a lock over the whole file). As POSIX has it, an owner's new lock replaces its own locks where they overlap,
//! splitting and merging them; locks of different owners conflict unless both are read locks.
//!
//! ```text
//!             no conflict                    conflict gone, in order of arrival
//!  request ─────────────────▶ held ◀──────────────────────────┐
//!     │ conflict, no wait ──▶ refused (WouldBlock)            │
//!     │ conflict, wait: cycle in the wait-for graph ──▶ refused (Deadlock)
//!     └ conflict, wait ──▶ waiting ─── cancel, session end ──▶ gone
//! ```
//!
//! Waiters of an inode are looked at in order of arrival whenever a lock is released or shrinks; one that still
//! conflicts does not hold up a later one that does not (as in Linux, `posix_lock_inode`).

use dfs_proto::{InodeNo, SessionId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Whether others may hold read locks on the same bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
}

/// Who holds or wants a lock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Owner {
    pub session: SessionId,
    /// The client's name for the owner.
    pub key: u64,
}

/// Bytes `start..=end`; an end of `u64::MAX` reaches as far as the file may ever grow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    pub start: u64,
    pub end: u64,
}

impl Range {
    const fn overlaps(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

/// A lock that is held, or that is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lock {
    pub owner: Owner,
    pub range: Range,
    pub kind: Kind,
    /// The process, for F_GETLK.
    pub pid: u32,
}

impl Lock {
    fn conflicts(&self, other: &Self) -> bool {
        self.owner != other.owner
            && self.range.overlaps(other.range)
            && (self.kind == Kind::Write || other.kind == Kind::Write)
    }
}

/// Names a waiting request.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct WaiterId(pub u64);

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Held,
    /// Another owner has a conflicting lock, and the request does not wait.
    WouldBlock,
    /// Waiting would wait for itself.
    Deadlock,
    /// The session has too many locks already.
    TooMany,
    /// Granted later: the id turns up in what a release returns.
    Waiting(WaiterId),
}

#[derive(Debug)]
struct Waiter {
    id: WaiterId,
    lock: Lock,
}

#[derive(Debug, Default)]
struct File {
    /// Of one owner they neither overlap nor touch with equal kind; in no particular order.
    held: Vec<Lock>,
    /// In order of arrival.
    waiting: VecDeque<Waiter>,
}

/// All locks of the file system.
#[derive(Debug)]
pub struct LockTable {
    files: BTreeMap<InodeNo, File>,
    waits: BTreeMap<WaiterId, InodeNo>,
    /// Locks held and waited for, by session.
    counts: BTreeMap<SessionId, usize>,
    next_waiter: u64,
    /// The most locks a session may hold and wait for together.
    limit: usize,
}

impl LockTable {
    /// No locks; each session may have up to `limit`.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            files: BTreeMap::new(),
            waits: BTreeMap::new(),
            counts: BTreeMap::new(),
            next_waiter: 1,
            limit,
        }
    }

    /// Takes a lock, or waits for it. Changing a write lock into a read lock may let others in: they are returned.
    pub fn request(&mut self, ino: InodeNo, lock: Lock, wait: bool) -> (Outcome, Vec<WaiterId>) {
        let count = self.counts.get(&lock.owner.session).copied().unwrap_or(0);
        // One more request may split a lock in three.
        if count + 2 > self.limit {
            return (Outcome::TooMany, Vec::new());
        }
        let blocked =
            self.files.get(&ino).is_some_and(|file| file.held.iter().any(|held| held.conflicts(&lock)));
        if !blocked {
            self.replace(ino, lock.owner, lock.range, Some(lock));
            return (Outcome::Held, self.grant(ino));
        }
        if !wait {
            return (Outcome::WouldBlock, Vec::new());
        }
        if self.would_deadlock(ino, &lock) {
            return (Outcome::Deadlock, Vec::new());
        }
        let id = WaiterId(self.next_waiter);
        self.next_waiter += 1;
        self.files.entry(ino).or_default().waiting.push_back(Waiter { id, lock });
        self.waits.insert(id, ino);
        *self.counts.entry(lock.owner.session).or_default() += 1;
        (Outcome::Waiting(id), Vec::new())
    }

    /// Replaces everything a session holds by what its client says it holds, and ends its waits (the client asks
    /// again). The client is believed: whatever a leader granted it, it knows of, or will ask for again.
    pub fn assert_session(&mut self, session: SessionId, locks: &[(InodeNo, Lock)]) -> Vec<WaiterId> {
        let before: Vec<InodeNo> =
            if self.count(session) == 0 { Vec::new() } else { self.files.keys().copied().collect() };
        for ino in &before {
            self.remove_where(*ino, |lock| lock.owner.session == session);
        }
        for (ino, lock) in locks.iter().take(self.limit) {
            self.replace(*ino, lock.owner, lock.range, Some(*lock));
        }
        // Only now: in between others must not slip into what is merely held again.
        before.into_iter().flat_map(|ino| self.grant(ino)).collect()
    }

    /// Gives bytes free. Returns the waiters that have their locks now.
    pub fn unlock(&mut self, ino: InodeNo, owner: Owner, range: Range) -> Vec<WaiterId> {
        self.replace(ino, owner, range, None);
        self.grant(ino)
    }

    /// The first lock, by where it begins, that `lock` would have to wait for.
    #[must_use]
    pub fn conflict(&self, ino: InodeNo, lock: &Lock) -> Option<Lock> {
        let held = &self.files.get(&ino)?.held;
        held.iter().filter(|held| held.conflicts(lock)).min_by_key(|held| held.range.start).copied()
    }

    /// Gives everything free that the owner holds or waits for on an inode.
    pub fn release_owner(&mut self, ino: InodeNo, owner: Owner) -> Vec<WaiterId> {
        self.release_where(ino, |lock| lock.owner == owner)
    }

    /// Gives everything free that a session holds or waits for on an inode: its last open file is closed.
    pub fn release_file(&mut self, ino: InodeNo, session: SessionId) -> Vec<WaiterId> {
        self.release_where(ino, |lock| lock.owner.session == session)
    }

    /// Gives everything free that a session holds or waits for.
    pub fn release_session(&mut self, session: SessionId) -> Vec<WaiterId> {
        if !self.counts.contains_key(&session) {
            return Vec::new();
        }
        let inos: Vec<InodeNo> = self.files.keys().copied().collect();
        inos.into_iter().flat_map(|ino| self.release_file(ino, session)).collect()
    }

    /// A waiter waits no more. False: it does not wait (it may have been granted).
    pub fn cancel(&mut self, id: WaiterId) -> bool {
        let Some(ino) = self.waits.remove(&id) else { return false };
        if let Some(file) = self.files.get_mut(&ino)
            && let Some(at) = file.waiting.iter().position(|waiter| waiter.id == id)
            && let Some(waiter) = file.waiting.remove(at)
        {
            count_down(&mut self.counts, waiter.lock.owner.session, 1);
        }
        self.tidy(ino);
        true
    }

    /// How many locks a session holds and waits for.
    #[must_use]
    pub fn count(&self, session: SessionId) -> usize {
        self.counts.get(&session).copied().unwrap_or(0)
    }

    fn release_where(&mut self, ino: InodeNo, gone: impl Fn(&Lock) -> bool) -> Vec<WaiterId> {
        self.remove_where(ino, gone);
        self.grant(ino)
    }

    fn remove_where(&mut self, ino: InodeNo, gone: impl Fn(&Lock) -> bool) {
        let Some(file) = self.files.get_mut(&ino) else { return };
        let mut released = Vec::new();
        file.held.retain(|lock| {
            let keep = !gone(lock);
            if !keep {
                released.push(lock.owner.session);
            }
            keep
        });
        let waits = &mut self.waits;
        file.waiting.retain(|waiter| {
            let keep = !gone(&waiter.lock);
            if !keep {
                waits.remove(&waiter.id);
                released.push(waiter.lock.owner.session);
            }
            keep
        });
        for session in released {
            count_down(&mut self.counts, session, 1);
        }
        self.tidy(ino);
    }

    /// Cuts `range` out of the owner's locks, puts `new` in its place and merges it with equal neighbours.
    fn replace(&mut self, ino: InodeNo, owner: Owner, range: Range, new: Option<Lock>) {
        if new.is_none() && !self.files.contains_key(&ino) {
            return;
        }
        let file = self.files.entry(ino).or_default();
        let before = file.held.len();
        let mut merged = new;
        let mut kept = Vec::with_capacity(before + 2);
        for held in file.held.drain(..) {
            if held.owner != owner {
                kept.push(held);
                continue;
            }
            if let Some(new) = &mut merged
                && held.kind == new.kind
                && touches(held.range, new.range)
            {
                new.range = Range {
                    start: new.range.start.min(held.range.start),
                    end: new.range.end.max(held.range.end),
                };
                continue;
            }
            if !held.range.overlaps(range) {
                kept.push(held);
                continue;
            }
            if held.range.start < range.start {
                kept.push(Lock { range: Range { start: held.range.start, end: range.start - 1 }, ..held });
            }
            if held.range.end > range.end {
                kept.push(Lock { range: Range { start: range.end + 1, end: held.range.end }, ..held });
            }
        }
        kept.extend(merged);
        let after = kept.len();
        file.held = kept;
        if after > before {
            *self.counts.entry(owner.session).or_default() += after - before;
        } else {
            count_down(&mut self.counts, owner.session, before - after);
        }
        self.tidy(ino);
    }

    /// Gives waiters of an inode, in order of arrival, the locks that nothing held conflicts with any more.
    fn grant(&mut self, ino: InodeNo) -> Vec<WaiterId> {
        let mut granted = Vec::new();
        let mut at = 0;
        while let Some(file) = self.files.get_mut(&ino)
            && let Some(waiter) = file.waiting.get(at)
        {
            let (id, lock) = (waiter.id, waiter.lock);
            if file.held.iter().any(|held| held.conflicts(&lock)) {
                at += 1;
                continue;
            }
            file.waiting.remove(at);
            self.waits.remove(&id);
            count_down(&mut self.counts, lock.owner.session, 1);
            self.replace(ino, lock.owner, lock.range, Some(lock));
            granted.push(id);
            // Taking a read lock may have shrunk the owner's own write lock: earlier waiters may fit now.
            at = 0;
        }
        self.tidy(ino);
        granted
    }

    /// Whether waiting for `lock` closes a cycle: does anyone it waits for wait, through others, for its owner?
    fn would_deadlock(&self, ino: InodeNo, lock: &Lock) -> bool {
        let mut seen = BTreeSet::new();
        let mut todo = self.holders(ino, lock);
        while let Some(owner) = todo.pop() {
            if owner == lock.owner {
                return true;
            }
            if !seen.insert(owner) {
                continue;
            }
            for ino in self.waits.values().collect::<BTreeSet<_>>() {
                let Some(file) = self.files.get(ino) else { continue };
                for waiter in file.waiting.iter().filter(|waiter| waiter.lock.owner == owner) {
                    todo.extend(self.holders(*ino, &waiter.lock));
                }
            }
        }
        false
    }

    fn holders(&self, ino: InodeNo, lock: &Lock) -> Vec<Owner> {
        let held = self.files.get(&ino).map(|file| file.held.as_slice()).unwrap_or_default();
        held.iter().filter(|held| held.conflicts(lock)).map(|held| held.owner).collect()
    }

    fn tidy(&mut self, ino: InodeNo) {
        if self.files.get(&ino).is_some_and(|file| file.held.is_empty() && file.waiting.is_empty()) {
            self.files.remove(&ino);
        }
    }
}

fn touches(a: Range, b: Range) -> bool {
    a.start <= b.end.saturating_add(1) && b.start <= a.end.saturating_add(1)
}

fn count_down(counts: &mut BTreeMap<SessionId, usize>, session: SessionId, by: usize) {
    if let Some(count) = counts.get_mut(&session) {
        *count = count.saturating_sub(by);
        if *count == 0 {
            counts.remove(&session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INO: InodeNo = InodeNo(9);

    fn lock(owner: u64, start: u64, end: u64, kind: Kind) -> Lock {
        let owner = Owner { session: SessionId(owner / 2 + 1), key: owner };
        Lock { owner, range: Range { start, end }, kind, pid: 1 }
    }

    fn waiting((outcome, _granted): (Outcome, Vec<WaiterId>)) -> WaiterId {
        match outcome {
            Outcome::Waiting(id) => id,
            other => panic!("expected to wait, got {other:?}"),
        }
    }

    #[test]
    fn waiters_get_their_locks_in_order_of_arrival() {
        let mut table = LockTable::new(100);
        assert_eq!(table.request(INO, lock(0, 0, 9, Kind::Write), false).0, Outcome::Held);
        let first = waiting(table.request(INO, lock(2, 0, 4, Kind::Write), true));
        let second = waiting(table.request(INO, lock(4, 0, 4, Kind::Write), true));
        let third = waiting(table.request(INO, lock(6, 5, 9, Kind::Read), true));
        let owner = lock(0, 0, 0, Kind::Read).owner;
        assert_eq!(table.unlock(INO, owner, Range { start: 0, end: u64::MAX }), vec![first, third]);
        assert_eq!(table.release_owner(INO, lock(2, 0, 0, Kind::Read).owner), vec![second]);
        assert!(!table.cancel(second));
    }

    #[test]
    fn a_cycle_of_waits_is_refused() {
        let mut table = LockTable::new(100);
        for owner in 0..3 {
            let byte = owner * 10;
            assert_eq!(
                table.request(InodeNo(owner), lock(owner, byte, byte, Kind::Write), false).0,
                Outcome::Held
            );
        }
        waiting(table.request(InodeNo(1), lock(0, 10, 10, Kind::Write), true));
        let last = waiting(table.request(InodeNo(2), lock(1, 20, 20, Kind::Read), true));
        assert_eq!(table.request(InodeNo(0), lock(2, 0, 0, Kind::Read), true).0, Outcome::Deadlock);
        assert!(table.cancel(last));
        waiting(table.request(InodeNo(0), lock(2, 0, 0, Kind::Read), true));
    }

    #[test]
    fn the_end_of_a_session_frees_what_it_held_and_what_it_waited_for() {
        let mut table = LockTable::new(100);
        assert_eq!(table.request(INO, lock(0, 0, 9, Kind::Write), false).0, Outcome::Held);
        assert_eq!(table.request(InodeNo(5), lock(2, 0, 9, Kind::Write), false).0, Outcome::Held);
        let other = waiting(table.request(INO, lock(2, 3, 3, Kind::Write), true));
        waiting(table.request(InodeNo(5), lock(4, 3, 3, Kind::Write), true));
        assert_eq!(table.count(SessionId(1)), 1);
        assert_eq!(table.release_session(SessionId(3)), vec![]);
        assert_eq!(table.release_session(SessionId(1)), vec![other]);
        assert_eq!((table.count(SessionId(1)), table.count(SessionId(3))), (0, 0));
        assert_eq!(table.count(SessionId(2)), 2);
    }

    #[test]
    fn a_write_lock_that_becomes_a_read_lock_lets_readers_in() {
        let mut table = LockTable::new(100);
        table.request(INO, lock(0, 0, 9, Kind::Write), false);
        let reader = waiting(table.request(INO, lock(2, 0, 9, Kind::Read), true));
        assert_eq!(table.request(INO, lock(0, 0, 9, Kind::Read), false), (Outcome::Held, vec![reader]));
        assert_eq!(table.request(INO, lock(0, 0, 9, Kind::Write), false).0, Outcome::WouldBlock);
    }

    #[test]
    fn an_assertion_replaces_locks_without_letting_others_in_between() {
        let mut table = LockTable::new(100);
        table.request(INO, lock(0, 0, 9, Kind::Write), false);
        table.request(InodeNo(5), lock(0, 0, 9, Kind::Write), false);
        let kept = waiting(table.request(INO, lock(2, 0, 9, Kind::Read), true));
        let freed = waiting(table.request(InodeNo(5), lock(2, 0, 9, Kind::Read), true));
        let granted = table.assert_session(SessionId(1), &[(INO, lock(0, 0, 9, Kind::Write))]);
        assert_eq!(granted, vec![freed]);
        assert!(table.cancel(kept));
        assert_eq!(table.count(SessionId(1)), 1);
    }

    #[test]
    fn a_session_cannot_fill_the_memory() {
        let mut table = LockTable::new(4);
        for at in 0..3 {
            assert_eq!(table.request(INO, lock(0, at * 2, at * 2, Kind::Write), false).0, Outcome::Held);
        }
        assert_eq!(table.request(INO, lock(0, 90, 90, Kind::Write), false).0, Outcome::TooMany);
        assert_eq!(table.request(INO, lock(2, 90, 90, Kind::Write), false).0, Outcome::Held);
    }

    const BYTES: u64 = 12;

    /// What each byte is locked with, by owner: the definition of correct.
    #[derive(Default)]
    struct Model(BTreeMap<(u64, u64), Kind>);

    impl Model {
        fn conflict(&self, owner: u64, start: u64, end: u64, kind: Kind) -> bool {
            self.0.iter().any(|((who, byte), held)| {
                *who != owner && (start..=end).contains(byte) && (kind == Kind::Write || *held == Kind::Write)
            })
        }
        fn set(&mut self, owner: u64, start: u64, end: u64, kind: Option<Kind>) {
            for byte in start..=end {
                match kind {
                    Some(kind) => self.0.insert((owner, byte), kind),
                    None => self.0.remove(&(owner, byte)),
                };
            }
        }
    }

    fn as_bytes(table: &LockTable) -> BTreeMap<(u64, u64), Kind> {
        let mut bytes = BTreeMap::new();
        for held in table.files.get(&INO).map(|file| file.held.as_slice()).unwrap_or_default() {
            for byte in held.range.start..=held.range.end {
                assert_eq!(bytes.insert((held.owner.key, byte), held.kind), None, "an owner's locks overlap");
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn agrees_with_a_table_of_bytes(steps in prop::collection::vec(
            (0_u64..4, 0..BYTES, 0..BYTES, 0_u8..4, any::<bool>()), 1..60)) {
            let mut table = LockTable::new(10_000);
            let mut model = Model::default();
            let mut queue: Vec<(WaiterId, u64, u64, u64, Kind)> = Vec::new();
            for (owner, a, b, what, wait) in steps {
                let (start, end) = (a.min(b), a.max(b));
                let granted = if what < 3 {
                    let kind = if what == 0 { Kind::Write } else { Kind::Read };
                    let request = lock(owner, start, end, kind);
                    let blocked = model.conflict(owner, start, end, kind);
                    prop_assert_eq!(table.conflict(INO, &request).is_some(), blocked);
                    let (outcome, granted) = table.request(INO, request, wait);
                    match outcome {
                        Outcome::Held => { prop_assert!(!blocked); model.set(owner, start, end, Some(kind)); }
                        Outcome::Waiting(id) => {
                            prop_assert!(blocked && wait);
                            queue.push((id, owner, start, end, kind));
                        }
                        Outcome::WouldBlock => prop_assert!(blocked && !wait),
                        Outcome::Deadlock => {
                            prop_assert!(blocked && wait);
                            prop_assert!(queue.iter().any(|(_, waiter, ..)| *waiter != owner), "nobody else waits");
                        }
                        Outcome::TooMany => prop_assert!(false, "far from the limit"),
                    }
                    granted
                } else {
                    model.set(owner, start, end, None);
                    table.unlock(INO, lock(owner, 0, 0, Kind::Read).owner, Range { start, end })
                };
                for id in granted {
                    // In order of arrival: nobody before the granted one could have been granted instead.
                    let at = queue.iter().position(|(waiting, ..)| *waiting == id).expect("it waited");
                    for (_, who, from, to, kind) in &queue[..at] {
                        prop_assert!(model.conflict(*who, *from, *to, *kind));
                    }
                    let (_, who, from, to, kind) = queue.remove(at);
                    prop_assert!(!model.conflict(who, from, to, kind));
                    model.set(who, from, to, Some(kind));
                }
                for (_, who, from, to, kind) in &queue {
                    prop_assert!(model.conflict(*who, *from, *to, *kind), "a waiter was forgotten");
                }
                prop_assert_eq!(as_bytes(&table), model.0.clone());
                let total: usize = table.files.values().map(|f| f.held.len() + f.waiting.len()).sum();
                prop_assert_eq!(total, table.counts.values().sum::<usize>());
            }
        }
    }
}
