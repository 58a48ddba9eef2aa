//! Who has which inode open, and which inodes without a name may be freed.
//!
//! An inode whose last name is gone is an *orphan*: it lives on while anyone holds it open. The leader counts opens in
//! memory; an orphan nobody holds open is *queued*, then *reaping* while the command that frees it is on its way.
//!
//! ```text
//!  named ──last name gone──▶ orphan, open ──last close──▶ queued ──▶ reaping ──▶ gone
//!                │ nobody has it open                       ▲ │ opened        │ an Open now is told ERROR_STALE
//!                └──────────────────────────────────────────┘ └─▶ orphan, open (by a file handle)
//! ```
//!
//! Two races decide the shape. An Open counts *before* it looks the inode up, so a reap either sees the count or the
//! Open sees the reap. And a Create that opens learns its inode only from its answer: it takes a [`Ticket`] before it is
//! proposed, and an orphan queued in the meantime waits until every such Create that could mean it has ended.

use dfs_proto::{InodeNo, SessionId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A Create with `open` that is on its way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ticket(u64);

/// What a session may do with an inode that it has open.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    pub read: bool,
    pub write: bool,
}

/// A session's opens of one inode: what one of them allows, all may do.
#[derive(Debug, Default, Clone, Copy)]
struct Held {
    count: u32,
    access: Access,
}

/// The open table.
#[derive(Debug, Default)]
pub struct Opens {
    counts: BTreeMap<InodeNo, BTreeMap<SessionId, Held>>,
    by_session: BTreeMap<SessionId, BTreeSet<InodeNo>>,
    orphans: BTreeSet<InodeNo>,
    /// Orphans to free, each with the first ticket that cannot mean it.
    queue: VecDeque<(InodeNo, Ticket)>,
    queued: BTreeSet<InodeNo>,
    reaping: BTreeSet<InodeNo>,
    creating: BTreeSet<Ticket>,
    next_ticket: u64,
}

impl Opens {
    /// Counts one open. False: the inode is being freed, nothing was counted.
    #[must_use]
    pub fn open(&mut self, session: SessionId, ino: InodeNo) -> bool {
        if self.reaping.contains(&ino) {
            return false;
        }
        self.counts.entry(ino).or_default().entry(session).or_default().count += 1;
        self.by_session.entry(session).or_default().insert(ino);
        true
    }

    /// A counted open was allowed to do this.
    pub fn allow(&mut self, session: SessionId, ino: InodeNo, access: Access) {
        if let Some(held) = self.counts.get_mut(&ino).and_then(|sessions| sessions.get_mut(&session)) {
            held.access.read |= access.read;
            held.access.write |= access.write;
        }
    }

    /// What the session may do; None: it has not opened the inode.
    #[must_use]
    pub fn access(&self, session: SessionId, ino: InodeNo) -> Option<Access> {
        self.counts.get(&ino)?.get(&session).map(|held| held.access)
    }

    /// One open less. True: the session has it open no more.
    pub fn close(&mut self, session: SessionId, ino: InodeNo) -> bool {
        let Some(held) = self.counts.get_mut(&ino).and_then(|sessions| sessions.get_mut(&session)) else {
            return true;
        };
        held.count -= 1;
        if held.count > 0 {
            return false;
        }
        self.forget(session, ino);
        true
    }

    /// Replaces all opens of a session by what its client says it holds. The client knows: an open whose answer it
    /// never got is not in the list, and is counted when the request comes again. Inodes being freed are left out. What
    /// was allowed before stays so.
    pub fn assert_held(
        &mut self,
        session: SessionId,
        opens: impl IntoIterator<Item = (InodeNo, u32, Access)>,
    ) {
        let before = self.by_session.remove(&session).unwrap_or_default();
        let mut now = BTreeSet::new();
        for (ino, count, access) in opens {
            if count > 0 && !self.reaping.contains(&ino) {
                self.counts.entry(ino).or_default().entry(session).or_default().count = count;
                self.allow(session, ino, access);
                now.insert(ino);
            }
        }
        let gone: Vec<InodeNo> = before.difference(&now).copied().collect();
        if !now.is_empty() {
            self.by_session.insert(session, now);
        }
        for ino in gone {
            self.forget(session, ino);
        }
    }

    /// The session is gone, and its opens with it.
    pub fn end_session(&mut self, session: SessionId) {
        for ino in self.by_session.remove(&session).unwrap_or_default() {
            self.forget(session, ino);
        }
    }

    /// A Create that opens is about to be proposed.
    pub fn creating(&mut self) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.creating.insert(ticket);
        ticket
    }

    /// It was answered and counted, or nobody waits for its answer any more.
    pub fn created(&mut self, ticket: Ticket) {
        self.creating.remove(&ticket);
    }

    /// The last name of an inode is gone.
    pub fn orphaned(&mut self, ino: InodeNo) {
        if !self.reaping.contains(&ino) && self.orphans.insert(ino) {
            self.queue_if_unused(ino);
        }
    }

    /// An inode made without a name was given its first one.
    pub fn named(&mut self, ino: InodeNo) {
        self.orphans.remove(&ino);
    }

    /// Up to `max` orphans to free now: they are reaping from here on.
    pub fn take_unused(&mut self, max: usize) -> Vec<InodeNo> {
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some((ino, bound)) = self.queue.front().copied()
        {
            if self.creating.first().is_some_and(|oldest| *oldest < bound) {
                break;
            }
            self.queue.pop_front();
            self.queued.remove(&ino);
            // It may have been opened again by its handle, or named, while it was queued.
            if !self.counts.contains_key(&ino) && self.orphans.remove(&ino) {
                self.reaping.insert(ino);
                taken.push(ino);
            }
        }
        taken
    }

    /// The command that frees them was applied.
    pub fn reaped(&mut self, inos: &[InodeNo]) {
        for ino in inos {
            self.reaping.remove(ino);
        }
    }

    /// Whether orphans wait to be freed.
    #[must_use]
    pub fn has_unused(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether anyone has it open.
    #[must_use]
    pub fn is_open(&self, ino: InodeNo) -> bool {
        self.counts.contains_key(&ino)
    }

    /// How many inodes a session has open.
    #[must_use]
    pub fn count(&self, session: SessionId) -> usize {
        self.by_session.get(&session).map_or(0, BTreeSet::len)
    }

    fn forget(&mut self, session: SessionId, ino: InodeNo) {
        if let Some(sessions) = self.counts.get_mut(&ino) {
            sessions.remove(&session);
            if sessions.is_empty() {
                self.counts.remove(&ino);
                self.queue_if_unused(ino);
            }
        }
        if let Some(inos) = self.by_session.get_mut(&session) {
            inos.remove(&ino);
            if inos.is_empty() {
                self.by_session.remove(&session);
            }
        }
    }

    fn queue_if_unused(&mut self, ino: InodeNo) {
        if self.orphans.contains(&ino) && !self.counts.contains_key(&ino) && self.queued.insert(ino) {
            self.queue.push_back((ino, Ticket(self.next_ticket)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);
    const INO: InodeNo = InodeNo(7);

    #[test]
    fn an_orphan_is_freed_when_the_last_holder_closes_it() {
        let mut opens = Opens::default();
        assert!(opens.open(A, INO) && opens.open(A, INO) && opens.open(B, INO));
        opens.orphaned(INO);
        assert!(opens.take_unused(10).is_empty());
        assert!(!opens.close(A, INO));
        assert!(opens.close(A, INO));
        assert!(opens.take_unused(10).is_empty());
        opens.end_session(B);
        assert_eq!(opens.take_unused(10), vec![INO]);
        assert!(!opens.open(A, INO), "it is being freed");
        opens.reaped(&[INO]);
        assert!(!opens.has_unused());
    }

    #[test]
    fn an_orphan_opened_by_its_handle_while_queued_lives_on() {
        let mut opens = Opens::default();
        opens.orphaned(INO);
        assert!(opens.open(A, INO));
        assert!(opens.take_unused(10).is_empty());
        assert!(opens.close(A, INO));
        assert_eq!(opens.take_unused(10), vec![INO]);
    }

    #[test]
    fn an_inode_made_without_a_name_is_safe_once_it_has_one() {
        let mut opens = Opens::default();
        assert!(opens.open(A, INO));
        opens.orphaned(INO);
        opens.named(INO);
        assert!(opens.close(A, INO));
        assert!(opens.take_unused(10).is_empty());
    }

    #[test]
    fn a_create_under_way_protects_orphans_queued_after_it_began() {
        let mut opens = Opens::default();
        let ticket = opens.creating();
        opens.orphaned(INO);
        let later = opens.creating();
        assert!(opens.take_unused(10).is_empty());
        assert!(opens.open(A, INO));
        opens.created(ticket);
        assert!(opens.take_unused(10).is_empty());
        opens.close(A, INO);
        opens.created(later);
        assert_eq!(opens.take_unused(10), vec![INO]);
    }

    #[test]
    fn an_assertion_replaces_what_was_counted() {
        let mut opens = Opens::default();
        assert!(opens.open(A, INO) && opens.open(A, InodeNo(8)));
        opens.orphaned(INO);
        opens.orphaned(InodeNo(8));
        opens.allow(A, InodeNo(8), Access { read: true, write: false });
        let none = Access::default();
        opens.assert_held(A, [(InodeNo(8), 2, Access { write: true, ..none }), (InodeNo(9), 1, none)]);
        assert_eq!(opens.access(A, InodeNo(8)), Some(Access { read: true, write: true }));
        assert_eq!((opens.access(A, InodeNo(9)), opens.access(A, INO)), (Some(none), None));
        assert_eq!(opens.take_unused(10), vec![INO]);
        assert_eq!(opens.count(A), 2);
        assert!(!opens.close(A, InodeNo(8)));
        assert!(opens.close(A, InodeNo(8)));
        assert!(opens.close(A, InodeNo(8)), "one close too many is harmless");
        assert_eq!(opens.take_unused(10), vec![InodeNo(8)]);
    }
}
