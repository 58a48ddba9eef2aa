//! What the leader knows of sessions, opens and locks: one struct behind one mutex, never held across an await.

use crate::leases::locks::{Lock, LockTable, Outcome, WaiterId};
use crate::leases::opens::{Access, Opens, Ticket};
use dfs_proto::v1::SessionRow;
use dfs_proto::{InodeNo, SessionId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// The most locks a session may hold and wait for.
const LOCKS_PER_SESSION: usize = 65_536;

/// A session as the leader sees it.
pub struct Session {
    pub row: SessionRow,
    /// Time since boot at its last sign of life, or at the election.
    pub seen: Duration,
    /// Counts the streams that attached it; only the newest one serves.
    pub generation: watch::Sender<u64>,
    /// It is being closed: nobody attaches it any more.
    pub closing: bool,
    pub attached: bool,
}

/// How a wait for a lock ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Held,
    Interrupted,
}

struct Waiting {
    session: SessionId,
    seq: u64,
    verdict: oneshot::Sender<Verdict>,
}

/// All of it.
pub struct Memory {
    pub sessions: BTreeMap<SessionId, Session>,
    pub opens: Opens,
    pub locks: LockTable,
    waiting: BTreeMap<WaiterId, Waiting>,
    /// Sessions of before the election that have not said yet what they hold.
    unclaimed: BTreeSet<SessionId>,
    /// Creates whose stream broke before their answer, and since when.
    abandoned: VecDeque<(Ticket, Duration)>,
}

impl Memory {
    /// At an election: the sessions that exist, seen just now.
    pub fn new(sessions: Vec<(SessionId, SessionRow)>, now: Duration) -> Self {
        let unclaimed = sessions.iter().map(|(id, _)| *id).collect();
        let sessions = sessions.into_iter().map(|(id, row)| (id, Session::new(row, now))).collect();
        Self {
            sessions,
            opens: Opens::default(),
            locks: LockTable::new(LOCKS_PER_SESSION),
            waiting: BTreeMap::new(),
            unclaimed,
            abandoned: VecDeque::new(),
        }
    }

    /// A stream takes a session over: the generation it serves under, and how it learns that another one took over.
    /// None: the session is not known or is being closed.
    pub fn attach(&mut self, id: SessionId, now: Duration) -> Option<(u64, watch::Receiver<u64>)> {
        let session = self.sessions.get_mut(&id).filter(|session| !session.closing)?;
        session.seen = now;
        session.attached = true;
        session.generation.send_modify(|generation| *generation += 1);
        let generation = session.generation.subscribe();
        let number = *generation.borrow();
        Some((number, generation))
    }

    /// The stream ended.
    pub fn detach(&mut self, id: SessionId, generation: u64) {
        if let Some(session) = self.sessions.get_mut(&id)
            && *session.generation.borrow() == generation
        {
            session.attached = false;
        }
    }

    /// Whether a stream still serves its session.
    pub fn serves(&self, id: SessionId, generation: u64) -> bool {
        self.sessions.get(&id).is_some_and(|session| *session.generation.borrow() == generation)
    }

    /// A sign of life.
    pub fn seen(&mut self, id: SessionId, now: Duration) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.seen = session.seen.max(now);
        }
    }

    /// What a client says it holds replaces what the leader thought. True: that was the last one to be waited for.
    pub fn assert_held(
        &mut self,
        id: SessionId,
        opens: impl IntoIterator<Item = (InodeNo, u32, Access)>,
        locks: &[(InodeNo, Lock)],
    ) -> bool {
        self.opens.assert_held(id, opens);
        let granted = self.locks.assert_session(id, locks);
        self.wake(granted);
        self.claimed(id)
    }

    /// Nothing is waited for from this session any more. True: it was the last one.
    pub fn claimed(&mut self, id: SessionId) -> bool {
        self.unclaimed.remove(&id);
        self.unclaimed.is_empty()
    }

    /// From here on nobody attaches the session, and the stream that serves it ends.
    pub fn begin_closing(&mut self, id: SessionId) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.closing = true;
            session.generation.send_modify(|generation| *generation += 1);
        }
    }

    /// The session was closed by Raft: what it held is free. True: nobody is waited for any more.
    pub fn end_session(&mut self, id: SessionId) -> bool {
        self.sessions.remove(&id);
        self.opens.end_session(id);
        let granted = self.locks.release_session(id);
        self.wake(granted);
        self.claimed(id)
    }

    /// Takes a lock or begins to wait for it; `Err` is how the end of the wait is learnt.
    pub fn lock(
        &mut self,
        ino: InodeNo,
        lock: Lock,
        wait: bool,
        seq: u64,
    ) -> Result<Outcome, (WaiterId, oneshot::Receiver<Verdict>)> {
        let (outcome, granted) = self.locks.request(ino, lock, wait);
        self.wake(granted);
        let Outcome::Waiting(id) = outcome else { return Ok(outcome) };
        let (verdict, end) = oneshot::channel();
        self.waiting.insert(id, Waiting { session: lock.owner.session, seq, verdict });
        Err((id, end))
    }

    /// A wait ends without the lock, because its stream is gone.
    pub fn forget_wait(&mut self, id: WaiterId) {
        self.locks.cancel(id);
        self.waiting.remove(&id);
    }

    /// The client gives up a wait. The wait may have ended: then its answer is on the way.
    pub fn cancel_wait(&mut self, session: SessionId, seq: u64) {
        let found = self.waiting.iter().find(|(_, wait)| wait.session == session && wait.seq == seq);
        if let Some(id) = found.map(|(id, _)| *id)
            && self.locks.cancel(id)
        {
            self.end_wait(id, Verdict::Interrupted);
        }
    }

    /// The client leaves: it waits for nothing any more.
    pub fn cancel_waits(&mut self, session: SessionId) {
        let waits = self.waiting.iter().filter(|(_, wait)| wait.session == session);
        for id in waits.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.locks.cancel(id);
            self.end_wait(id, Verdict::Interrupted);
        }
    }

    /// Tells waiters that they hold their locks now.
    pub fn wake(&mut self, granted: Vec<WaiterId>) {
        for id in granted {
            self.end_wait(id, Verdict::Held);
        }
    }

    fn end_wait(&mut self, id: WaiterId, verdict: Verdict) {
        if let Some(wait) = self.waiting.remove(&id) {
            // A stream that broke in between holds the lock until its client attaches again and says what it knows.
            let _gone = wait.verdict.send(verdict);
        }
    }

    /// A Create with `open` lost its stream before it was answered. It may yet be applied and its client may yet ask
    /// again: until `release_abandoned` no orphan it could mean is freed.
    pub fn abandon(&mut self, ticket: Ticket, now: Duration) {
        self.abandoned.push_back((ticket, now));
    }

    /// Forgets Creates abandoned before `before`.
    pub fn release_abandoned(&mut self, before: Duration) {
        while let Some((ticket, _)) = self.abandoned.front().filter(|(_, since)| *since < before).copied() {
            self.abandoned.pop_front();
            self.opens.created(ticket);
        }
    }
}

impl Session {
    /// A session that nothing serves yet.
    pub fn new(row: SessionRow, now: Duration) -> Self {
        Self { row, seen: now, generation: watch::Sender::new(0), closing: false, attached: false }
    }
}
