//! One client's stream: requests come in, run side by side, answers go out.
//!
//! Reading, working and writing are one future, polled by the HTTP/2 connection as the stream of answers: a create goes
//! from its frame to Raft and back to a frame without a task or a channel in between. Mutations reach Raft in the order
//! in which they arrived, because futures are first polled in the order they were added; everything may overtake
//! everything else afterwards. Whatever is answered at one moment goes out in one frame.
//!
//! Bounds: a client that has twice [`SESSION_WINDOW`] requests unanswered is refused; a frame may have
//! [`FRAME_REQUESTS_MAX`]. It is read all the time: leases come back and keep-alives with whatever waits. What waits to be
//! sent is answers to those requests, and HTTP/2 stops polling us while the client does not read.

use super::session::gone;
use super::term::{Answers, Term};
use super::{Gone, RAFT_WAIT};
use super::{locking, questions, requests};
use crate::leases::table::{self, Kind};
use dfs_proto::limits::{FRAME_BYTES_MAX, FRAME_REQUESTS_MAX, SESSION_WINDOW};
use dfs_proto::v1::{ClientFrame, LeaseKind, MasterFrame, Recall, Reply, hold, request};
use dfs_proto::{InodeNo, SessionId};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use prost::Message;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::{Notify, watch};
use tonic::{Status, Streaming};

/// Which stream of which session a request belongs to. The session is detached with the last of them.
pub struct Link {
    pub term: Arc<Term>,
    pub session: SessionId,
    pub generation: u64,
    replaced: watch::Receiver<u64>,
}

impl Link {
    pub fn new(term: Arc<Term>, session: SessionId, generation: u64, replaced: watch::Receiver<u64>) -> Self {
        Self { term, session, generation, replaced }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.term.memory().detach(self.session, self.generation);
    }
}

/// Whom a client's requests are from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Whom it says.
    AsSaid,
    /// Its root is nobody (`root_squash`).
    RootIsNobody,
}

/// An answer, and the inodes of which the session was given leases with it.
pub struct Answered {
    pub reply: Reply,
    pub leases: Vec<InodeNo>,
}

/// What a running request ended with.
#[allow(clippy::large_enum_variant, reason = "nearly all of them are single replies")]
pub enum Done {
    Reply(Answered),
    /// Answers, and what is to run until it has further ones.
    Replies(Vec<Answered>, Vec<Running>),
    /// A keep-alive to send back.
    Alive(u64),
}

/// A request that runs.
pub type Running = BoxFuture<'static, Result<Done, Gone>>;

/// One client's stream.
pub struct Connection {
    link: Arc<Link>,
    rights: Rights,
    inbound: Streaming<ClientFrame>,
    running: FuturesUnordered<Running>,
    /// Requests that came in and whose answers did not go out yet.
    unanswered: usize,
    replies: VecDeque<Answered>,
    /// There is something to ask the client for.
    wake: Arc<Notify>,
    keep_alive: u64,
    lowest_unanswered: u64,
    ended: watch::Receiver<bool>,
    replaced: watch::Receiver<u64>,
    /// The client said goodbye.
    leaving: bool,
}

impl Connection {
    /// Serves an attached session; `first` is what its first frame held beside the hello. None: that was nonsense.
    pub fn new(
        link: Link,
        rights: Rights,
        inbound: Streaming<ClientFrame>,
        first: ClientFrame,
    ) -> Option<Self> {
        let (ended, replaced) = (link.term.ended(), link.replaced.clone());
        let wake = link.term.memory().sessions.get(&link.session)?.wake.clone();
        let mut connection = Self {
            link: Arc::new(link),
            rights,
            inbound,
            running: FuturesUnordered::new(),
            unanswered: 0,
            replies: VecDeque::new(),
            wake,
            keep_alive: 0,
            lowest_unanswered: 0,
            ended,
            replaced,
            leaving: false,
        };
        connection.accept(first).is_ok().then_some(connection)
    }

    /// The next frame to send; None ends the stream.
    pub async fn next_frame(&mut self) -> Option<Result<MasterFrame, Status>> {
        let generation = self.link.generation;
        loop {
            // Takes everything that has ended by now, so that it shares a frame; starts what was just added.
            while let Some(Some(result)) = self.running.next().now_or_never() {
                if let Err(why) = self.finish(result) {
                    return Some(Ok(gone(why)));
                }
            }
            if let Some(frame) = self.take_frame() {
                return Some(Ok(frame));
            }
            if self.leaving && self.running.is_empty() {
                return self.leave().await;
            }
            tokio::select! {
                biased;
                () = async { drop(self.ended.wait_for(|ended| *ended).await) } => {
                    return Some(Ok(gone(self.link.term.shared.leader())));
                }
                () = async { drop(self.replaced.wait_for(|now| *now != generation).await) } => return None,
                Some(result) = self.running.next(), if !self.running.is_empty() => {
                    if let Err(why) = self.finish(result) {
                        return Some(Ok(gone(why)));
                    }
                }
                // What there is to ask for goes out with the next frame.
                () = self.wake.notified() => {}
                frame = self.inbound.message(), if !self.leaving => {
                    match frame {
                        Ok(Some(frame)) => {
                            if let Err(status) = self.accept(frame) {
                                return Some(Err(status));
                            }
                        }
                        Ok(None) | Err(_) => {
                            tracing::debug!(session = %self.link.session, "detached");
                            return None;
                        }
                    }
                }
            }
        }
    }

    /// Starts what a frame asks for.
    fn accept(&mut self, frame: ClientFrame) -> Result<(), Status> {
        let term = &self.link.term;
        term.memory().heard(self.link.session, frame.requests.len(), term.now());
        if frame.hello.is_some() || frame.requests.len() > FRAME_REQUESTS_MAX {
            return Err(Status::invalid_argument("a second hello, or too many requests in one frame"));
        }
        if self.unanswered + frame.requests.len() > 2 * SESSION_WINDOW {
            return Err(Status::resource_exhausted("too many requests that are not answered yet"));
        }
        self.lowest_unanswered = self.lowest_unanswered.max(frame.lowest_unanswered);
        if frame.goodbye.is_some() {
            self.leaving = true;
            term.memory().cancel_waits(self.link.session);
        }
        if !frame.returned.is_empty() {
            let (mut memory, now) = (term.memory(), term.now());
            for returned in &frame.returned {
                let keep = match returned.keep() {
                    LeaseKind::LeaseNone => None,
                    LeaseKind::LeaseRead => Some(Kind::Read),
                    LeaseKind::LeaseWrite => Some(Kind::Write),
                };
                let ino = InodeNo(returned.ino);
                if returned.flushing {
                    memory.leases.flushing(self.link.session, ino, returned.grant, now);
                } else {
                    memory.leases.returned(self.link.session, ino, returned.grant, keep, now);
                }
            }
            memory.dispatch();
        }
        for told in frame.told {
            term.memory().told(self.link.session, told);
        }
        if frame.keep_alive != 0 {
            self.running.push(alive(Arc::clone(&self.link), frame.keep_alive).boxed());
        }
        self.unanswered += frame.requests.len();
        let mut reads = Vec::new();
        for request in frame.requests {
            let link = Arc::clone(&self.link);
            let (seq, cred) = (request.seq, requests::cred(request.cred, self.rights));
            match request.op {
                Some(request::Op::Mutation(mutation)) => {
                    let mutation =
                        requests::mutate(link, seq, self.lowest_unanswered, cred, request.earlier, mutation);
                    self.running.push(mutation.boxed());
                }
                Some(request::Op::Hold(hold)) => match hold.op {
                    Some(hold::Op::Lock(lock)) => {
                        self.running.push(locking::lock(link, seq, lock).boxed());
                    }
                    Some(hold::Op::GetLock(lock)) => {
                        self.running.push(locking::get_lock(link, seq, lock).boxed());
                    }
                    Some(hold::Op::TakeLease(take)) => {
                        self.running.push(questions::take_lease(link, seq, take).boxed());
                    }
                    Some(op) => reads.push(questions::Read { seq, cred, op: questions::ReadOp::Hold(op) }),
                    None => self.replies.push_back(requests::not_understood(seq)),
                },
                Some(request::Op::Query(query)) => {
                    let op = questions::ReadOp::Query(query);
                    reads.push(questions::Read { seq, cred, op });
                }
                None => self.replies.push_back(requests::not_understood(seq)),
            }
        }
        if !reads.is_empty() {
            self.running.push(questions::read(Arc::clone(&self.link), reads).boxed());
        }
        Ok(())
    }

    fn finish(&mut self, result: Result<Done, Gone>) -> Result<(), Gone> {
        match result? {
            Done::Reply(reply) => self.replies.push_back(reply),
            Done::Replies(replies, waiting) => {
                self.replies.extend(replies);
                self.running.extend(waiting);
            }
            Done::Alive(number) => self.keep_alive = self.keep_alive.max(number),
        }
        Ok(())
    }

    /// The answers that wait, as many as fit into a frame, and after them what the client is asked for.
    fn take_frame(&mut self) -> Option<MasterFrame> {
        let session = self.link.session;
        let masters = if self.keep_alive == 0 { Vec::new() } else { self.link.term.shared.node.voters() };
        let mut memory = self.link.term.memory();
        if !memory.serves(session, self.link.generation) {
            // What there is to tell is for the stream that has replaced this one.
            return None;
        }
        let (recalls, asks) = (memory.take_recalls(session), memory.take_asks(session));
        let surplus = memory.take_surplus(session) as u64;
        let news = !recalls.is_empty() || !asks.is_empty() || surplus > 0;
        if self.replies.is_empty() && self.keep_alive == 0 && !news {
            return None;
        }
        let mut frame = MasterFrame {
            masters,
            keep_alive: std::mem::take(&mut self.keep_alive),
            asks,
            return_leases: surplus,
            ..MasterFrame::default()
        };
        let mut bytes = 0;
        while frame.replies.len() < FRAME_REQUESTS_MAX
            && bytes < FRAME_BYTES_MAX
            && let Some(Answered { mut reply, leases }) = self.replies.pop_front()
        {
            if !leases.is_empty() {
                let (number, grants) = memory.leases.sent(session, &leases);
                reply.grant = number;
                for (ino, kind) in grants {
                    match kind {
                        Kind::Read => reply.read_leases.push(ino.get()),
                        Kind::Write => reply.write_leases.push(ino.get()),
                    }
                }
            }
            bytes += reply.encoded_len();
            frame.replies.push(reply);
        }
        // Leases that somebody wanted before this frame told of them.
        memory.dispatch();
        let late = memory.take_recalls(session);
        frame.recalls = recalls.into_iter().chain(late).map(recall_of).collect();
        drop(memory);
        self.unanswered = self.unanswered.saturating_sub(frame.replies.len());
        Some(frame)
    }

    /// The client said goodbye and has all its answers: the session is closed, then the stream.
    async fn leave(&mut self) -> Option<Result<MasterFrame, Status>> {
        let close = self.link.term.close_session(self.link.session, Answers::Forget);
        match tokio::time::timeout(RAFT_WAIT, close).await {
            Ok(Ok(())) => {
                tracing::info!(session = %self.link.session, "closed");
                None
            }
            Ok(Err(why)) => Some(Ok(gone(why))),
            Err(_) => Some(Ok(gone(self.link.term.shared.leader()))),
        }
    }
}

fn recall_of(recall: table::Recall) -> Recall {
    let keep = match recall.keep {
        None => LeaseKind::LeaseNone,
        Some(Kind::Read) => LeaseKind::LeaseRead,
        Some(Kind::Write) => LeaseKind::LeaseWrite,
    };
    Recall { ino: recall.ino.get(), grant: recall.grant, keep: keep.into() }
}

/// A keep-alive counts only if a quorum confirmed this leader after it arrived.
async fn alive(link: Arc<Link>, number: u64) -> Result<Done, Gone> {
    link.term.shared.confirm().await?;
    Ok(Done::Alive(number))
}
