//! What the leader knows of sessions, leases, opens and locks: one struct behind one mutex, never held across an await.

use crate::leases::locks::{Lock, LockTable, Outcome, WaiterId};
use crate::leases::names::{Name, Names, Turn};
use crate::leases::opens::{Access, Opens, Ticket};
use crate::leases::table::{Actions, ClaimId, Kind, Leases, Notes, Recall, What};
use dfs_proto::v1::{self, SessionRow};
use dfs_proto::{InodeNo, SessionId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, oneshot, watch};

/// The most locks a session may hold and wait for.
const LOCKS_PER_SESSION: usize = 65_536;
/// The most leases of all sessions together: at [`BYTES_PER_LEASE`] this is 320 MB.
///
/// [`BYTES_PER_LEASE`]: crate::leases::table::BYTES_PER_LEASE
const LEASES_MAX: usize = 2_000_000;

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
    /// It did not give back a lease in time, or is evicted: it is not listened to any more, and expires when it cannot believe
    /// any longer that it holds one.
    pub fenced: bool,
    /// Leases to ask it for, and inodes to ask it about, when its stream sends next.
    recalls: Vec<Recall>,
    asks: Vec<v1::Ask>,
    /// How many leases it is to give back, whichever it needs least.
    surplus: usize,
    /// How many requests it has made of this leader.
    pub requests: u64,
    /// Wakes its stream.
    pub wake: Arc<Notify>,
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
    pub leases: Leases,
    names: Names,
    /// Who waits for a claim to pass, or for his turn with names.
    claimants: BTreeMap<ClaimId, oneshot::Sender<()>>,
    turns: BTreeMap<Turn, oneshot::Sender<()>>,
    /// Buckets that the log is to note, and whom to tell of new ones.
    notes: BTreeSet<(SessionId, Kind, u32)>,
    noting: BTreeSet<(SessionId, Kind, u32)>,
    pub notes_wanted: Arc<Notify>,
    /// How often the log has noted some.
    noted: watch::Sender<u64>,
    /// Questions to those who buffer changes: whom, and who waits for the answer.
    asked: BTreeMap<u64, (SessionId, oneshot::Sender<Option<v1::Attr>>)>,
    next_ask: u64,
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
    pub fn new(
        sessions: Vec<(SessionId, SessionRow)>,
        leased: BTreeMap<SessionId, Notes>,
        now: Duration,
    ) -> Self {
        let unclaimed = sessions.iter().map(|(id, _)| *id).collect();
        let sessions = sessions.into_iter().map(|(id, row)| (id, Session::new(row, now))).collect();
        Self {
            sessions,
            leases: Leases::new(LEASES_MAX, leased),
            names: Names::default(),
            claimants: BTreeMap::new(),
            turns: BTreeMap::new(),
            notes: BTreeSet::new(),
            noting: BTreeSet::new(),
            notes_wanted: Arc::default(),
            noted: watch::Sender::new(0),
            asked: BTreeMap::new(),
            next_ask: 1,
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
        self.sessions.get(&id).filter(|session| !session.closing && !session.fenced)?;
        // What the old stream waits for it can tell nobody of; the client asks again.
        self.leases.end_waiting(id, now);
        self.end_claimants();
        self.dispatch();
        let session = self.sessions.get_mut(&id)?;
        session.seen = now;
        session.attached = true;
        session.recalls.clear();
        session.asks.clear();
        session.surplus = 0;
        // What the old stream was asked, the new one is not: whoever waits looks again.
        self.asked.retain(|_, (asked, _)| *asked != id);
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

    /// A sign of life, with so many requests.
    pub fn heard(&mut self, id: SessionId, requests: usize, now: Duration) {
        if let Some(session) = self.sessions.get_mut(&id).filter(|session| !session.fenced) {
            session.seen = session.seen.max(now);
            session.requests += requests as u64;
        }
    }

    /// Nothing is taken from a session any more; it ends when its client cannot believe any longer that it holds anything.
    /// False: it is not there.
    pub fn fence(&mut self, id: SessionId) -> bool {
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        if !session.fenced {
            session.fenced = true;
            session.generation.send_modify(|generation| *generation += 1);
            tracing::warn!(session = %id, client = session.row.client, "a session is cut off: it does not give a lease back, or is evicted");
        }
        true
    }

    /// What a client says it holds replaces what the leader thought. True: that was the last one to be waited for.
    pub fn assert_held(
        &mut self,
        id: SessionId,
        opens: impl IntoIterator<Item = (InodeNo, u32, Access)>,
        locks: &[(InodeNo, Lock)],
        leases: Option<Vec<(InodeNo, Kind)>>,
        now: Duration,
    ) -> bool {
        self.opens.assert_held(id, opens);
        let granted = self.locks.assert_session(id, locks);
        self.wake(granted);
        match leases {
            Some(leases) => self.leases.assert_session(id, leases, now),
            None => self.leases.end_session(id, now),
        }
        self.dispatch();
        self.claimed(id)
    }

    /// Nothing is waited for from this session any more. True: it was the last one.
    pub fn claimed(&mut self, id: SessionId) -> bool {
        self.unclaimed.remove(&id);
        self.unclaimed.is_empty()
    }

    /// From here on nobody attaches the session, and the stream that serves it ends. False: that was so before.
    pub fn begin_closing(&mut self, id: SessionId) -> bool {
        let Some(session) = self.sessions.get_mut(&id).filter(|session| !session.closing) else {
            return false;
        };
        session.closing = true;
        session.generation.send_modify(|generation| *generation += 1);
        true
    }

    /// The session was closed by Raft: what it held is free. True: nobody is waited for any more.
    pub fn end_session(&mut self, id: SessionId, now: Duration) -> bool {
        self.sessions.remove(&id);
        self.leases.end_session(id, now);
        self.notes.retain(|(session, ..)| *session != id);
        self.asked.retain(|_, (asked, _)| *asked != id);
        self.dispatch();
        self.end_claimants();
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

/// Leases, names and those who wait for them.
impl Memory {
    /// Lines up for names. None: it is this one's turn already.
    pub fn take_names(&mut self, names: Vec<Name>) -> (Turn, Option<oneshot::Receiver<()>>) {
        let (turn, first) = self.names.take(names);
        let waiting = (!first).then(|| {
            let (sender, waiting) = oneshot::channel();
            self.turns.insert(turn, sender);
            waiting
        });
        (turn, waiting)
    }

    /// Gives names back, or stops waiting for them.
    pub fn give_back_names(&mut self, turn: Turn) {
        self.turns.remove(&turn);
        for next in self.names.give_back(turn) {
            if let Some(sender) = self.turns.remove(&next) {
                // Whoever has gone gives it back by himself.
                let _gone = sender.send(());
            }
        }
    }

    /// Makes a claim. None: it has passed already.
    pub fn claim(
        &mut self,
        session: SessionId,
        what: What,
        inos: Vec<InodeNo>,
        now: Duration,
    ) -> (ClaimId, Option<oneshot::Receiver<()>>) {
        let (id, passed) = self.leases.claim(session, what, inos, now);
        let waiting = (!passed).then(|| {
            let (sender, waiting) = oneshot::channel();
            self.claimants.insert(id, sender);
            waiting
        });
        self.dispatch();
        (id, waiting)
    }

    /// A change has ended, or a claim is given up.
    pub fn end_claim(&mut self, id: ClaimId, now: Duration) {
        self.claimants.remove(&id);
        self.leases.end(id, now);
        self.dispatch();
    }

    /// Whoever waits for a claim that was given up waits no more.
    fn end_claimants(&mut self) {
        let leases = &self.leases;
        self.claimants.retain(|id, _| leases.is_claim(*id));
    }

    /// Carries out what the lease table decided.
    pub fn dispatch(&mut self) {
        let Actions { passed, recalls, notes } = self.leases.take_actions();
        for id in passed {
            if let Some(sender) = self.claimants.remove(&id) {
                // Whoever waited and has gone ends a change by himself; a lease that he took he does not name when he is back.
                let _gone = sender.send(());
            }
        }
        for recall in recalls {
            if let Some(session) = self.sessions.get_mut(&recall.session) {
                session.recalls.push(recall);
                session.wake.notify_one();
            }
        }
        let noting = &self.noting;
        self.notes.extend(notes.into_iter().filter(|note| !noting.contains(note)));
        if !self.notes.is_empty() {
            self.notes_wanted.notify_one();
        }
    }

    /// The buckets that the log is to note; [`Memory::noted`] follows.
    pub fn take_notes(&mut self) -> BTreeSet<(SessionId, Kind, u32)> {
        self.noting = std::mem::take(&mut self.notes);
        self.noting.clone()
    }

    /// The log has noted what was taken, or has not (`done`).
    pub fn noted(&mut self, done: bool, now: Duration) {
        for (session, kind, bucket) in std::mem::take(&mut self.noting) {
            if done {
                self.leases.noted(session, kind, bucket, now);
            } else {
                self.notes.insert((session, kind, bucket));
            }
        }
        self.noted.send_modify(|times| *times += 1);
        self.dispatch();
    }

    /// Changes when the log has noted buckets, perhaps those that are wanted now.
    pub fn tell_when_noted(&self) -> watch::Receiver<u64> {
        self.noted.subscribe()
    }

    /// Asks whoever buffers changes of an inode what it looks like. None: nobody else does, as far as is known.
    pub fn ask(
        &mut self,
        session: SessionId,
        ino: InodeNo,
        version: u64,
    ) -> Option<oneshot::Receiver<Option<v1::Attr>>> {
        let writer = self.leases.writer(ino).filter(|writer| *writer != session)?;
        let holder = self.sessions.get_mut(&writer)?;
        let ask = self.next_ask;
        self.next_ask += 1;
        holder.asks.push(v1::Ask { ask, ino: ino.get(), version });
        holder.wake.notify_one();
        let (sender, answer) = oneshot::channel();
        self.asked.insert(ask, (writer, sender));
        Some(answer)
    }

    /// Somebody who was asked has answered.
    pub fn told(&mut self, session: SessionId, told: v1::Told) {
        if self.asked.get(&told.ask).is_some_and(|(asked, _)| *asked == session)
            && let Some((_, sender)) = self.asked.remove(&told.ask)
        {
            // Whoever asked may have gone.
            let _gone = sender.send(told.attr);
        }
    }

    /// Asks for leases back when there are nearly too many.
    pub fn make_room(&mut self) {
        for (id, surplus) in self.leases.surplus() {
            if let Some(session) = self.sessions.get_mut(&id) {
                session.surplus = surplus;
                session.wake.notify_one();
            }
        }
    }

    /// How many leases a session is to give back.
    pub fn take_surplus(&mut self, session: SessionId) -> usize {
        self.sessions.get_mut(&session).map_or(0, |session| std::mem::take(&mut session.surplus))
    }

    /// What to ask a session.
    pub fn take_asks(&mut self, session: SessionId) -> Vec<v1::Ask> {
        self.sessions.get_mut(&session).map_or_else(Vec::new, |session| std::mem::take(&mut session.asks))
    }

    /// The leases to ask a session for.
    pub fn take_recalls(&mut self, session: SessionId) -> Vec<Recall> {
        self.sessions.get_mut(&session).map_or_else(Vec::new, |session| std::mem::take(&mut session.recalls))
    }
}

impl Session {
    /// A session that nothing serves yet.
    pub fn new(row: SessionRow, now: Duration) -> Self {
        Self {
            row,
            seen: now,
            generation: watch::Sender::new(0),
            closing: false,
            attached: false,
            fenced: false,
            recalls: Vec::new(),
            asks: Vec::new(),
            surplus: 0,
            requests: 0,
            wake: Arc::default(),
        }
    }
}
