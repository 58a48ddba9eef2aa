//! The session's memory, without I/O: which requests wait, which are on their way, what their answers mean.
//!
//! ```text
//!             submit                frame               answered
//!  caller ────────────▶ unsent ───────────────▶ sent ──────────────▶ caller
//!                          ▲                      │
//!                          └──── stream lost ─────┘   same sequence numbers, in their order
//! ```
//!
//! A request is kept until its answer has come, its time is up, or its session has expired, and is sent again under the
//! same sequence number after a reconnect: the master answers a repeated mutation from its record (I6). So a failover
//! of the masters is a pause, not an error.
//!
//! `lowest_unanswered` speaks of mutations only: the master keeps no answers of anything else, and a lock that waits for
//! hours must not make it keep the answers of everything since.

use super::held::Held;
use crate::leases::{Kind, Leases, Seen, Unclean};
use dfs_env::defect::{self, Defect};
use dfs_proto::v1::{
    self, Answer, CancelLock, ClientFrame, Cred, EarlierSession, ErrorCode, Goodbye, Hello, LeaseKind,
    LeaseReturn, MasterFrame, Reply, Request, answer::Body, hold, mutation, request,
};
use dfs_proto::{FsError, FsResult, InodeNo, PROTOCOL_VERSION, limits};
use prost::Message;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

pub(super) type Answered = oneshot::Sender<Heard>;

/// What the master said.
#[derive(Debug)]
pub struct Heard {
    pub result: FsResult<Body>,
    /// When it looked at what it says; None: that is not to be cached, or the master said nothing at all.
    pub seen: Option<Seen>,
    /// The master has answered: a change was carried out, or never will be.
    pub answered: bool,
}

impl Heard {
    /// Nothing, for this reason.
    pub fn nothing(error: FsError) -> Self {
        Self { result: Err(error), seen: None, answered: false }
    }
}

/// A caller and what he is to be told, once no lock is held any more.
pub(super) struct Completion {
    pub reply: Answered,
    pub heard: Heard,
}

/// What the caller of [`State::answered`] has to do.
#[derive(Default)]
pub(super) struct Outcome {
    pub completions: Vec<Completion>,
    /// How many places in the window became free.
    pub freed: usize,
    /// The master no longer leads: reconnect.
    pub not_leader: bool,
    /// Leases to be given up.
    pub leaving: Vec<Leaving>,
    /// Questions of the master about files that are written here.
    pub asks: Vec<v1::Ask>,
}

/// What the master wants of this client by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    Leave(Leaving),
    /// To know what a file looks like whose changes are kept here.
    Tell(v1::Ask),
}

/// A lease is to be given up, down to `keep`. Nothing is believed beyond that any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    pub ino: InodeNo,
    /// What is held.
    pub held: Kind,
    pub keep: Option<Kind>,
}

struct Pending {
    request: Request,
    /// `None`: nobody waits for the answer.
    reply: Option<Answered>,
    deadline: Option<Instant>,
    /// It was in a frame at least once: it may have been carried out.
    sent: bool,
    since: Instant,
    /// A waiting lock that nobody waits for any more.
    cancelled: bool,
    /// It has a place in the window.
    counted: bool,
}

pub(super) struct State {
    next_seq: u64,
    pending: BTreeMap<u64, Pending>,
    unsent: VecDeque<u64>,
    /// Answered "not now": sent again after a moment.
    deferred: Vec<u64>,
    held: Held,
    /// Locks whose answer has not come yet.
    locks_pending: usize,
    /// The stream that may send; an older one ends itself.
    pub stream: u64,
    /// The stream was welcomed: requests may follow the hello.
    pub welcomed: bool,
    /// Since when it is not.
    silent_since: Instant,
    /// Wakes the stream when there is something to send.
    pub waker: Option<Waker>,
    keep_alive: u64,
    keep_alive_due: bool,
    /// When the hello and the keep-alives that are not answered were sent, since boot.
    hello_at: Duration,
    alive_at: VecDeque<(u64, Duration)>,
    leases: Arc<Leases>,
    /// Leases given back, to be sent.
    returned: Vec<LeaseReturn>,
    told: Vec<v1::Told>,
    goodbye: Option<bool>,
    pub session: u64,
    pub nonce: u64,
    pub cluster_id: String,
    pub leader: String,
    pub replicas: u32,
    pub chunk_size: u64,
    /// How long the session outlives its last sign of life.
    ttl: Duration,
    /// Set once, for good: every call fails with it.
    pub broken: Option<FsError>,
    /// Why there is no stream at the moment, for the error of those whose time is up.
    pub cause: String,
}

impl State {
    pub fn new(nonce: u64, cluster_id: String, leases: Arc<Leases>) -> Self {
        Self {
            next_seq: 1,
            pending: BTreeMap::new(),
            unsent: VecDeque::new(),
            deferred: Vec::new(),
            held: Held::default(),
            locks_pending: 0,
            stream: 0,
            welcomed: false,
            silent_since: Instant::now(),
            waker: None,
            keep_alive: 0,
            keep_alive_due: false,
            hello_at: Duration::ZERO,
            alive_at: VecDeque::new(),
            leases,
            returned: Vec::new(),
            told: Vec::new(),
            goodbye: None,
            session: 0,
            nonce,
            cluster_id,
            leader: String::new(),
            replicas: 0,
            chunk_size: 0,
            ttl: Duration::ZERO,
            broken: None,
            cause: "no answer".to_owned(),
        }
    }

    /// Takes a request. `counted`: it has a place in the window, to be given back when it is done.
    pub fn submit(
        &mut self,
        cred: &Cred,
        op: request::Op,
        reply: Option<Answered>,
        deadline: Option<Instant>,
        counted: bool,
    ) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        tracing::trace!(seq, ?op, "a request");
        if is_lock(&op) {
            self.locks_pending += 1;
        }
        let request = Request { seq, cred: Some(cred.clone()), op: Some(op), earlier: Vec::new() };
        let since = Instant::now();
        self.pending
            .insert(seq, Pending { request, reply, deadline, since, sent: false, cancelled: false, counted });
        self.unsent.push_back(seq);
        seq
    }

    /// What to send next, at `now` since boot: everything that waits, as far as it fits into one frame.
    pub fn frame(&mut self, now: Duration) -> Option<ClientFrame> {
        if !self.welcomed {
            return None;
        }
        let mut frame = ClientFrame::default();
        let mut bytes = 0;
        let newest = self.lowest_unanswered() + limits::DEDUP_WINDOW as u64;
        while let Some(seq) = self.unsent.front().copied() {
            // Further ahead, the master would forget the answer of the oldest mutation that is still under way.
            if frame.requests.len() >= limits::FRAME_REQUESTS_MAX || seq >= newest {
                break;
            }
            if let Some(pending) = self.pending.get_mut(&seq) {
                let size = pending.request.encoded_len();
                if !frame.requests.is_empty() && bytes + size > limits::FRAME_BYTES_MAX {
                    break;
                }
                bytes += size;
                pending.sent = true;
                frame.requests.push(pending.request.clone());
            }
            self.unsent.pop_front();
        }
        if std::mem::take(&mut self.keep_alive_due) {
            self.keep_alive += 1;
            frame.keep_alive = self.keep_alive;
            self.alive_at.push_back((self.keep_alive, now));
        }
        let returned = self.returned.len().min(limits::FRAME_REQUESTS_MAX);
        frame.returned.extend(self.returned.drain(..returned));
        if self.unsent.is_empty() && self.goodbye == Some(false) {
            self.goodbye = Some(true);
            frame.goodbye = Some(Goodbye {});
        }
        frame.told = std::mem::take(&mut self.told);
        let empty = frame.requests.is_empty() && frame.returned.is_empty() && frame.told.is_empty();
        if empty && frame.keep_alive == 0 && frame.goodbye.is_none() {
            return None;
        }
        frame.lowest_unanswered = self.lowest_unanswered();
        Some(frame)
    }

    fn lowest_unanswered(&self) -> u64 {
        let mutation = |pending: &Pending| matches!(pending.request.op, Some(request::Op::Mutation(_)));
        self.pending.iter().find(|(_, pending)| mutation(pending)).map_or(self.next_seq, |(seq, _)| *seq)
    }

    /// A frame has come: the leases that come with its answers count before anybody is told of these, and what is recalled
    /// ends after.
    pub fn received(&mut self, frame: MasterFrame) -> Outcome {
        let mut outcome = Outcome::default();
        for reply in &frame.replies {
            if reply.grant != 0 {
                let (read, write) = (&reply.read_leases, &reply.write_leases);
                tracing::trace!(
                    seq = reply.seq,
                    grant = reply.grant,
                    ?read,
                    ?write,
                    "leases came with an answer"
                );
            }
            for (kind, inos) in [(Kind::Read, &reply.read_leases), (Kind::Write, &reply.write_leases)] {
                let since = Seen { stream: self.stream, clock: reply.seen };
                let surplus = inos
                    .iter()
                    .filter_map(|ino| self.leases.granted(InodeNo(*ino), kind, reply.grant, since));
                outcome.leaving.extend(surplus.map(|(ino, held)| Leaving { ino, held, keep: None }));
            }
            // What is written under it counts from this version on.
            if let Some(attr) = attr_in(reply).filter(|attr| reply.write_leases.contains(&attr.ino))
                && let Some(term) = self.leases.tenure(InodeNo(attr.ino))
            {
                self.leases.seen(InodeNo(attr.ino), term, attr.version);
            }
        }
        self.answered(frame.replies, &mut outcome);
        for recall in frame.recalls {
            let (ino, keep) = (InodeNo(recall.ino), Kind::from_proto(recall.keep()));
            tracing::trace!(%ino, grant = recall.grant, ?keep, "a lease is recalled");
            if defect::has(Defect::LateInvalidation) {
                self.returned.push(LeaseReturn {
                    ino: recall.ino,
                    grant: recall.grant,
                    keep: recall.keep,
                    ..LeaseReturn::default()
                });
                outcome.leaving.push(Leaving { ino, held: Kind::Read, keep });
                continue;
            }
            match self.leases.recalled(ino, recall.grant, keep) {
                Ok(held) => outcome.leaving.push(Leaving { ino, held, keep }),
                // Nothing is held under it.
                Err(Some(grant)) => {
                    self.returned.push(LeaseReturn { ino: recall.ino, grant, ..LeaseReturn::default() });
                }
                Err(None) => {}
            }
        }
        let shed = self.leases.shed(usize::try_from(frame.return_leases).unwrap_or(usize::MAX));
        outcome.leaving.extend(shed.into_iter().map(|(ino, held)| Leaving { ino, held, keep: None }));
        outcome.asks.extend(frame.asks);
        while let Some((number, sent)) = self.alive_at.front().copied()
            && number <= frame.keep_alive
        {
            self.alive_at.pop_front();
            self.leases.confirmed(sent, self.ttl);
        }
        outcome
    }

    /// A lease is given up after a commit.
    pub fn flush_first(&mut self, ino: InodeNo) {
        if let Some(grant) = self.leases.flushing(ino) {
            self.returned.push(LeaseReturn {
                ino: ino.get(),
                grant,
                flushing: true,
                ..LeaseReturn::default()
            });
        }
    }

    /// A lease was given up, as far as it was asked for, if it is clean.
    pub fn give_back(
        &mut self,
        ino: InodeNo,
        keep: Option<Kind>,
        clean: impl FnOnce() -> bool,
    ) -> Result<(), Unclean> {
        if let Some(grant) = self.leases.left_behind(ino, keep, clean)? {
            tracing::trace!(%ino, grant, ?keep, "a lease is given back");
            let keep = Kind::to_proto(keep).into();
            self.returned.push(LeaseReturn { ino: ino.get(), grant, keep, ..LeaseReturn::default() });
        }
        Ok(())
    }

    /// A write lease becomes a read lease without being asked for, if it is clean.
    pub fn write_no_more(&mut self, ino: InodeNo, clean: impl FnOnce() -> bool) {
        if let Some(grant) = self.leases.write_no_more(ino, clean) {
            let keep = LeaseKind::LeaseRead.into();
            self.returned.push(LeaseReturn { ino: ino.get(), grant, keep, ..LeaseReturn::default() });
        }
    }

    /// What a file looks like that the master asked about; nothing: its changes are not kept here any more.
    pub fn tell(&mut self, ask: u64, attr: Option<v1::Attr>) {
        self.told.push(v1::Told { ask, attr });
    }

    fn answered(&mut self, replies: Vec<Reply>, outcome: &mut Outcome) {
        for reply in replies {
            let result = match reply.answer {
                Some(Answer { body: Some(Body::Failure(failure)) }) => Err(FsError::from(failure)),
                Some(Answer { body: Some(body) }) => Ok(body),
                _ => Err(FsError::new(ErrorCode::ErrorIo, "the master's answer is empty")),
            };
            match result.as_ref().err().map(|error| error.code) {
                // Not answers of the file system: the request was not carried out.
                Some(ErrorCode::ErrorNotLeader | ErrorCode::ErrorSessionExpired) => {
                    outcome.not_leader = true;
                    continue;
                }
                Some(ErrorCode::ErrorUnavailable) => {
                    if self.pending.contains_key(&reply.seq) {
                        self.deferred.push(reply.seq);
                    }
                    continue;
                }
                _ => {}
            }
            // An unknown one was answered before, or its time was up.
            if let Some(pending) = self.remove(reply.seq, &mut outcome.freed) {
                if let Some(request::Op::Hold(v1::Hold { op: Some(hold::Op::TakeLease(take)) })) =
                    &pending.request.op
                    && pending.reply.as_ref().is_some_and(|reply| !reply.is_closed())
                {
                    self.leases.reserve(InodeNo(take.ino));
                }
                let seen = (reply.seen > 0).then_some(Seen { stream: self.stream, clock: reply.seen });
                self.complete(pending, Heard { result, seen, answered: true }, &mut outcome.completions);
            }
        }
    }

    fn complete(&mut self, mut pending: Pending, heard: Heard, completions: &mut Vec<Completion>) {
        let result = &heard.result;
        let abandoned = pending.cancelled || pending.reply.as_ref().is_some_and(Answered::is_closed);
        if let (true, Ok(_), Some(request::Op::Hold(v1::Hold { op: Some(hold::Op::Lock(lock)) }))) =
            (abandoned, result, &pending.request.op)
        {
            for step in self.held.restore(lock) {
                self.submit_hold(hold::Op::Lock(step));
            }
            return;
        }
        let opened = self.note(&pending.request, result);
        if let Some(ino) = opened.filter(|_| abandoned) {
            self.submit_hold(hold::Op::Close(v1::Close { ino }));
        }
        if let Some(reply) = pending.reply.take() {
            completions.push(Completion { reply, heard });
        }
    }

    /// Keeps in mind what an answered request opened, closed, locked. Answers the inode it opened.
    fn note(&mut self, request: &Request, result: &FsResult<Body>) -> Option<u64> {
        match (&request.op, result) {
            (
                Some(request::Op::Mutation(v1::Mutation { op: Some(mutation::Op::Create(create)) })),
                Ok(body),
            ) => {
                if let (true, Body::Entry(v1::Entry { attr: Some(attr), .. })) = (create.open, body) {
                    self.held.opened(attr.ino, request.cred.as_ref(), request.cred.as_ref());
                    return Some(attr.ino);
                }
            }
            (Some(request::Op::Hold(v1::Hold { op: Some(op) })), result) => match op {
                hold::Op::Open(open) if result.is_ok() => {
                    let by = |opened: bool| request.cred.as_ref().filter(|_| opened);
                    self.held.opened(open.ino, by(open.read || open.exec), by(open.write));
                    return Some(open.ino);
                }
                // Also when it failed: nobody here has it open any more.
                hold::Op::Close(close) => self.held.closed(close.ino),
                hold::Op::Lock(lock) if result.is_ok() => self.held.set_lock(lock),
                hold::Op::ReleaseLocks(release) if result.is_ok() => {
                    self.held.release_locks(release.ino, release.owner);
                }
                _ => {}
            },
            _ => {}
        }
        None
    }

    /// A request of the session itself, for which nobody waits.
    pub fn submit_hold(&mut self, op: hold::Op) {
        self.submit(&Cred::default(), request::Op::Hold(v1::Hold { op: Some(op) }), None, None, false);
    }

    /// Nobody waits for this lock any more.
    pub fn cancel(&mut self, seq: u64, freed: &mut usize) {
        let Some(pending) = self.pending.get_mut(&seq) else { return };
        pending.cancelled = true;
        if pending.sent {
            self.submit_hold(hold::Op::CancelLock(CancelLock { seq }));
        } else {
            self.remove(seq, freed);
        }
    }

    /// Since when there is no master.
    pub fn silent_since(&self) -> Option<Instant> {
        (!self.welcomed).then_some(self.silent_since)
    }

    /// The stream has ended.
    pub fn disconnected(&mut self, cause: String) {
        if self.welcomed {
            self.silent_since = Instant::now();
        }
        self.welcomed = false;
        self.stream += 1;
        self.cause = cause;
    }

    /// Those whose time is up. One that was sent may still be carried out; the master will not be asked again. Who waits for
    /// a lock may do so for as long as its holder likes, but no longer than `silence` for a master.
    pub fn overdue(
        &mut self,
        now: Instant,
        silence: Option<Duration>,
        bound: impl Fn() -> String,
    ) -> Outcome {
        let deaf_since = |since: Instant| self.silent_since().map(|silent| since.max(silent));
        let late: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| match (pending.deadline, silence) {
                (Some(deadline), _) => deadline <= now,
                (None, Some(silence)) if is_wait(&pending.request) => {
                    deaf_since(pending.since).is_some_and(|since| since + silence <= now)
                }
                (None, _) => false,
            })
            .map(|(seq, _)| *seq)
            .collect();
        let mut outcome = Outcome::default();
        for seq in late {
            let Some(mut pending) = self.remove(seq, &mut outcome.freed) else { continue };
            if let Some(reply) = pending.reply.take() {
                let what = if self.welcomed { "connected, but no answer came" } else { self.cause.as_str() };
                let error = FsError::new(ErrorCode::ErrorTimedOut, format!("{}: {what}", bound()));
                outcome.completions.push(Completion { reply, heard: Heard::nothing(error) });
            }
        }
        outcome
    }

    /// Sends again what was answered "not now".
    pub fn retry_deferred(&mut self) {
        self.unsent.extend(self.deferred.drain(..));
    }

    /// Whether the stream should be woken.
    pub fn has_work(&self) -> bool {
        let news = !self.returned.is_empty() || !self.told.is_empty();
        let other = self.keep_alive_due || news || self.goodbye == Some(false);
        self.welcomed && (other || !self.unsent.is_empty())
    }

    pub fn want_keep_alive(&mut self) {
        self.keep_alive_due = true;
    }

    pub fn say_goodbye(&mut self) {
        self.goodbye.get_or_insert(false);
    }

    /// How long the session outlives its last sign of life.
    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Whether the goodbye is on its way.
    pub fn goodbye_sent(&self) -> bool {
        self.goodbye == Some(true)
    }

    /// A new stream: its first frame. From here the old one is silent.
    pub fn hello(&mut self, name: &str, host: &str, now: Duration) -> Hello {
        self.stream += 1;
        self.welcomed = false;
        self.waker = None;
        self.hello_at = now;
        self.alive_at.clear();
        // What was given back is not asserted.
        self.returned.clear();
        self.told.clear();
        let held = self.leases.assert(Seen { stream: self.stream, clock: 0 });
        Hello {
            version: PROTOCOL_VERSION,
            session: self.session,
            nonce: self.nonce,
            client: name.to_owned(),
            host: host.to_owned(),
            opens: self.held.opens(),
            locks: self.held.locks(),
            cluster_id: self.cluster_id.clone(),
            takes_leases: true,
            read_leases: held.read,
            write_leases: held.write,
        }
    }

    /// The stream may be used: everything unanswered is sent, in its order.
    pub fn welcome(&mut self, welcome: &v1::Welcome, freed: &mut usize) {
        self.session = welcome.session;
        self.cluster_id.clone_from(&welcome.cluster_id);
        self.replicas = welcome.replicas;
        self.chunk_size = welcome.chunk_size;
        self.ttl = Duration::from_millis(welcome.ttl_ms);
        self.leases.confirmed(self.hello_at, self.ttl);
        // The master forgot the waits of the lost stream: what was cancelled is over, and so is the cancelling.
        let over: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, pending)| pending.cancelled || is_cancel(&pending.request))
            .map(|(seq, _)| *seq)
            .collect();
        for seq in over {
            self.remove(seq, freed);
        }
        self.deferred.clear();
        self.unsent = self.pending.keys().copied().collect();
        self.welcomed = true;
    }

    /// The master closed the session, because it was silent too long. A mutation that was sent may or may not have been carried
    /// out: it is sent again in the new session with the name of the old one, whose answers the master has kept, and is done only if
    /// it was not. A commit without bytes is answered that it was not made: it sets attributes for a program that was told long ago, under
    /// a lease that is lost, and whether they may still be set is to be found out first. Locks are lost. Files stay open: the next hello asserts them, for the new session.
    pub fn expired(&mut self, nonce: u64) -> Outcome {
        let ended = EarlierSession { session: self.session, nonce: self.nonce };
        self.session = 0;
        self.nonce = nonce;
        self.welcomed = false;
        self.returned.clear();
        self.alive_at.clear();
        let lost = self.held.drop_locks();
        if lost > 0 {
            tracing::warn!(owners = lost, "the session expired: its locks are lost");
        }
        let (mut unknown, mut unmade) = (Vec::new(), Vec::new());
        for (seq, pending) in &mut self.pending {
            if is_bare_commit(&pending.request) {
                unmade.push(*seq);
                continue;
            }
            if !pending.sent || harmless_twice(&pending.request) {
                continue;
            }
            if pending.request.earlier.len() < limits::EARLIER_SESSIONS_MAX {
                pending.request.earlier.push(ended);
            } else {
                unknown.push(*seq);
            }
        }
        let mut outcome = Outcome::default();
        let ended = self.leases.end();
        outcome.leaving.extend(ended.into_iter().map(|(ino, held)| Leaving { ino, held, keep: None }));
        for seq in unmade {
            let Some(mut pending) = self.remove(seq, &mut outcome.freed) else { continue };
            if let Some(reply) = pending.reply.take() {
                let heard = Heard::nothing(ErrorCode::ErrorSessionExpired.into());
                outcome.completions.push(Completion { reply, heard });
            }
        }
        for seq in unknown {
            let Some(mut pending) = self.remove(seq, &mut outcome.freed) else { continue };
            if let Some(reply) = pending.reply.take() {
                let error = FsError::new(
                    ErrorCode::ErrorIo,
                    "sessions expire again and again before the answer comes: the change may or may not have been made",
                );
                outcome.completions.push(Completion { reply, heard: Heard::nothing(error) });
            }
        }
        // To the new session they are new.
        self.pending.values_mut().for_each(|pending| pending.sent = false);
        outcome
    }

    /// Nothing will be answered any more.
    pub fn fail_all(&mut self, error: &FsError) -> Outcome {
        self.broken.get_or_insert_with(|| error.clone());
        self.unsent.clear();
        self.deferred.clear();
        let mut outcome = Outcome::default();
        for mut pending in std::mem::take(&mut self.pending).into_values() {
            outcome.freed += usize::from(pending.counted);
            if let Some(reply) = pending.reply.take() {
                outcome.completions.push(Completion { reply, heard: Heard::nothing(error.clone()) });
            }
        }
        self.locks_pending = 0;
        outcome
    }

    /// Whether anybody here has locks on the inode.
    pub fn has_locks_on(&self, ino: u64) -> bool {
        self.held.has_locks_on(ino)
    }

    /// Whether the owner has locks on the inode, or may get one by an answer that is on its way.
    pub fn may_have_locks(&self, ino: u64, owner: u64) -> bool {
        let asked = |pending: &Pending| {
            matches!(&pending.request.op, Some(request::Op::Hold(v1::Hold { op: Some(hold::Op::Lock(lock)) }))
                if lock.ino == ino && lock.owner == owner)
        };
        self.held.has_locks(ino, owner) || (self.locks_pending > 0 && self.pending.values().any(asked))
    }

    fn remove(&mut self, seq: u64, freed: &mut usize) -> Option<Pending> {
        let pending = self.pending.remove(&seq)?;
        *freed += usize::from(pending.counted);
        if pending.request.op.as_ref().is_some_and(is_lock) {
            self.locks_pending -= 1;
        }
        Some(pending)
    }
}

/// The leader that a refusal names, if any.
pub(super) fn named_leader(frame: &MasterFrame) -> Option<String> {
    Some(frame.leader.clone()).filter(|leader| !leader.is_empty())
}

/// The attributes that an answer shows with a lease to write.
fn attr_in(reply: &Reply) -> Option<v1::Attr> {
    match reply.answer.as_ref()?.body.as_ref()? {
        Body::Entry(v1::Entry { attr, .. })
        | Body::Opened(v1::Opened { attr, .. })
        | Body::Leased(v1::Leased { attr }) => *attr,
        _ => None,
    }
}

/// What bytes need on their way to disk: others may wait for them.
pub(super) fn is_urgent(op: &request::Op) -> bool {
    use mutation::Op::{AllocChunks, Commit};
    match op {
        request::Op::Mutation(v1::Mutation { op }) => matches!(op, Some(Commit(_) | AllocChunks(_))),
        request::Op::Hold(v1::Hold { op }) => matches!(op, Some(hold::Op::SealChunk(_))),
        request::Op::Query(_) => false,
    }
}

fn is_lock(op: &request::Op) -> bool {
    matches!(op, request::Op::Hold(v1::Hold { op: Some(hold::Op::Lock(_)) }))
}

fn is_wait(request: &Request) -> bool {
    matches!(&request.op, Some(request::Op::Hold(v1::Hold { op: Some(hold::Op::Lock(lock)) })) if lock.wait)
}

fn is_cancel(request: &Request) -> bool {
    matches!(&request.op, Some(request::Op::Hold(v1::Hold { op: Some(hold::Op::CancelLock(_)) })))
}

/// A commit that names no bytes: of attributes that were set under a write lease.
fn is_bare_commit(request: &Request) -> bool {
    matches!(&request.op, Some(request::Op::Mutation(v1::Mutation { op: Some(mutation::Op::Commit(commit)) }))
        if commit.slices.is_empty())
}

/// Whether a request may be given to a new session although the old one may have carried it out. A commit names chunks
/// of the old session, which are fenced: it fails as stale, and the data plane sends the bytes again.
fn harmless_twice(request: &Request) -> bool {
    let Some(request::Op::Mutation(change)) = &request.op else { return true };
    matches!(
        &change.op,
        Some(mutation::Op::Commit(_) | mutation::Op::AllocChunks(_) | mutation::Op::Touch(_))
    )
}

#[cfg(test)]
#[path = "requests_tests.rs"]
mod tests;
