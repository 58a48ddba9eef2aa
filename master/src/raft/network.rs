//! The way to the other masters: one long-lived stream to each, made on demand and made again after a failure.

use super::auth::{Auth, reply_body};
use super::codec::{self, AppendRow, AppliedRow, Body, SnapshotRow, VoteRequestRow};
use super::elections::{Bar, Elections};
use super::handover;
use super::members;
use super::room::Level;
use super::types::{LogId, Raft, TypeConfig, Vote};
use dfs_env::Env;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::limits;
use dfs_proto::v1;
use dfs_proto::v1::raft_client::RaftClient;
use openraft::error::{
    Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, OptionalSend, Snapshot};
use prost::Message;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// Calls that wait for one master at most.
const CALLS_MAX: usize = 256;
/// A stream on which nothing was answered for so long is made again.
const SILENCE: Duration = Duration::from_secs(3);
/// Between two attempts to connect.
const RECONNECT: Duration = Duration::from_millis(50);
/// A part of a snapshot, in bytes, and how long one may take.
const PART_BYTES: usize = 512 << 10;
const PART_TIME: Duration = Duration::from_secs(10);
/// How long a follower may take to install a snapshot that it has received.
const INSTALL_TIME: Duration = Duration::from_secs(600);

struct Call {
    body: Body,
    reply: oneshot::Sender<io::Result<Body>>,
}

/// The links to all masters; clones share them.
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

struct Shared {
    env: Env,
    auth: Auth,
    links: Mutex<BTreeMap<(u64, String), mpsc::Sender<Call>>>,
    elections: Arc<Elections>,
}

/// The way to one master.
pub struct Peer {
    network: Network,
    id: u64,
    address: String,
}

impl Network {
    pub fn new(env: Env, auth: Auth, elections: Arc<Elections>) -> Self {
        Self { shared: Arc::new(Shared { env, auth, links: Mutex::default(), elections }) }
    }

    /// The addresses that this master's own settings give.
    pub fn settings(&self) -> &BTreeMap<u64, String> {
        &self.shared.auth.addresses
    }

    /// Where a master is; `known` is what the membership says.
    pub fn address(&self, id: u64, known: &str) -> String {
        self.settings().get(&id).map_or(known, String::as_str).to_owned()
    }

    /// The way to a master.
    pub fn peer(&self, id: u64, known: &str) -> Peer {
        Peer { network: self.clone(), id, address: self.address(id, known) }
    }

    /// This master has a history from here on.
    pub fn begins(&self) {
        self.shared.auth.group.begins();
    }

    /// The way to a master at an address that is known; 0 for whichever is there.
    pub fn peer_at(&self, id: u64, address: &str) -> Peer {
        Peer { network: self.clone(), id, address: address.to_owned() }
    }

    /// Ends all streams. Later calls fail.
    pub fn close(&self) {
        self.shared.links.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn link(&self, id: u64, address: &str) -> mpsc::Sender<Call> {
        let mut links = self.shared.links.lock().unwrap_or_else(PoisonError::into_inner);
        let link = links.entry((id, address.to_owned())).or_insert_with(|| {
            let (sender, receiver) = mpsc::channel(CALLS_MAX);
            let (env, auth) = (self.shared.env.clone(), self.shared.auth.clone());
            tokio::spawn(run_link(env, auth, id, address.to_owned(), receiver));
            sender
        });
        link.clone()
    }
}

fn unreachable(error: io::Error) -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, error)
}

impl Peer {
    /// Asks the master something; waits for `bound` at most.
    ///
    /// # Errors
    /// When it cannot be reached, does not answer in time or refuses.
    pub async fn call(&self, body: Body, bound: Duration) -> io::Result<Body> {
        let (reply, answer) = oneshot::channel();
        let link = self.network.link(self.id, &self.address);
        link.try_send(Call { body, reply })
            .map_err(|_| io::Error::other(format!("too many calls wait for master {}", self.id)))?;
        match timeout(bound, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(unreachable(io::Error::other("the connection was closed"))),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {bound:?}"))),
        }
    }

    async fn send_snapshot(&self, vote: Vote, snapshot: Snapshot<TypeConfig>) -> io::Result<Vote> {
        let Shared { env, auth, .. } = &*self.network.shared;
        let channel = rpc::connect(env, &self.address, Tuning::default()).await?;
        let mut client = RaftClient::new(channel);
        let call = env.random();
        let meta = AppliedRow::of_snapshot(&snapshot.meta, &auth.cluster);
        let head = auth.seal(
            self.id,
            call,
            Body::Snapshot(SnapshotRow { vote: Some((&vote).into()), meta: Some(meta) }),
        );
        let (sender, receiver) = mpsc::channel(2);
        let feed = async {
            let (mut head, mut at) = (bytes::Bytes::from(head.encode_to_vec()), 0);
            loop {
                let data = snapshot.snapshot.as_ref().clone();
                let part = env.blocking(move || data.read_at(at, PART_BYTES)).await?;
                let (length, last) = (part.len() as u64, part.is_empty());
                let part = auth.seal_part(call, at, part, std::mem::take(&mut head), last);
                match timeout(PART_TIME, sender.send(part)).await {
                    Ok(Ok(())) => {}
                    // The follower has ended the transfer: its answer says why.
                    Ok(Err(_)) => return Ok(()),
                    Err(_) => {
                        return Err(io::Error::new(io::ErrorKind::TimedOut, "no progress with the snapshot"));
                    }
                }
                if last {
                    drop(sender);
                    return Ok(());
                }
                at += length;
            }
        };
        let answer = async {
            match timeout(INSTALL_TIME, client.snapshot(ReceiverStream::new(receiver))).await {
                Ok(Ok(answer)) => reply_body(auth.open(answer.into_inner()).map_err(io::Error::other)?),
                Ok(Err(status)) => Err(io::Error::other(status.message().to_owned())),
                Err(_) => {
                    Err(io::Error::new(io::ErrorKind::TimedOut, "the snapshot was not installed in time"))
                }
            }
        };
        let (fed, answer) = tokio::join!(feed, answer);
        match (fed, answer?) {
            (Err(error), _) => Err(error),
            (Ok(()), Body::Installed(row)) => codec::vote(row.vote.as_ref()),
            _ => Err(codec::invalid("an unexpected answer to a snapshot")),
        }
    }
}

async fn open_stream(
    env: &Env,
    address: &str,
) -> io::Result<(mpsc::Sender<v1::RaftMessage>, Streaming<v1::RaftMessage>, Channel)> {
    let channel = rpc::connect(env, address, Tuning::default()).await?;
    let mut client = RaftClient::new(channel.clone())
        .max_decoding_message_size(limits::MESSAGE_MAX)
        .max_encoding_message_size(limits::MESSAGE_MAX);
    let (sender, receiver) = mpsc::channel(CALLS_MAX);
    let bound = Duration::from_millis(limits::CONNECT_MS);
    match timeout(bound, client.append(ReceiverStream::new(receiver))).await {
        Ok(Ok(answer)) => Ok((sender, answer.into_inner(), channel)),
        Ok(Err(status)) => Err(io::Error::other(format!("{address}: {}", status.message()))),
        Err(_) => {
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("{address}: no answer within {bound:?}")))
        }
    }
}

/// Owns the stream to one master until nobody calls any more.
async fn run_link(env: Env, auth: Auth, to: u64, address: String, mut calls: mpsc::Receiver<Call>) {
    // The same cause is told once, until something was answered.
    let mut told = String::new();
    while let Some(first) = calls.recv().await {
        match open_stream(&env, &address).await {
            Ok((sender, replies, _channel)) => {
                let mut answered = false;
                let served =
                    serve_stream(&auth, to, &sender, replies, first, &mut calls, &mut answered).await;
                if answered {
                    told.clear();
                }
                if let Err(error) = served {
                    let text = error.to_string();
                    if text != told {
                        tracing::info!(master = to, %address, error = text, "lost the connection to a master");
                        told = text;
                    }
                }
            }
            Err(error) => {
                let text = error.to_string();
                if text != told {
                    tracing::info!(master = to, error = text, "cannot reach a master");
                    told = text;
                }
                let mut waiting = Some(first);
                while let Some(call) = waiting {
                    let copy = io::Error::new(io::ErrorKind::NotConnected, error.to_string());
                    drop(call.reply.send(Err(copy)));
                    waiting = calls.try_recv().ok();
                }
            }
        }
        sleep(RECONNECT).await;
    }
}

async fn serve_stream(
    auth: &Auth,
    to: u64,
    sender: &mpsc::Sender<v1::RaftMessage>,
    mut replies: Streaming<v1::RaftMessage>,
    first: Call,
    calls: &mut mpsc::Receiver<Call>,
    answered: &mut bool,
) -> io::Result<()> {
    // Dropped at the end, with which every call that still waits fails.
    let mut waiting: BTreeMap<u64, oneshot::Sender<io::Result<Body>>> = BTreeMap::new();
    let (mut number, mut next, mut heard) = (0, Some(first), Instant::now());
    loop {
        if let Some(call) = next.take() {
            number += 1;
            if waiting.is_empty() {
                heard = Instant::now();
            }
            if waiting.len() >= CALLS_MAX {
                return Err(io::Error::other("too many calls without an answer"));
            }
            waiting.insert(number, call.reply);
            sender
                .try_send(auth.seal(to, number, call.body))
                .map_err(|_| io::Error::other("the connection takes nothing more"))?;
        }
        tokio::select! {
            reply = replies.message() => match reply {
                Ok(Some(message)) => {
                    heard = Instant::now();
                    *answered = true;
                    let envelope = auth.open(message).map_err(|status| io::Error::other(status.message().to_owned()))?;
                    if let Some(reply) = waiting.remove(&envelope.call) {
                        drop(reply.send(reply_body(envelope)));
                    }
                }
                Ok(None) => return Err(io::Error::other("closed by the other side")),
                Err(status) => return Err(io::Error::other(status.message().to_owned())),
            },
            call = calls.recv() => match call {
                Some(call) => next = Some(call),
                None => return Ok(()),
            },
            () = sleep_until(heard + SILENCE), if !waiting.is_empty() => return Err(io::Error::other("no answer")),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        self.peer(target, &node.addr)
    }
}

type RpcError = RPCError<u64, BasicNode, RaftError<u64>>;

fn rpc_error(error: &io::Error) -> RpcError {
    if error.kind() == io::ErrorKind::TimedOut {
        RPCError::Network(NetworkError::new(error))
    } else {
        // openraft waits for the backoff below before it tries again; after any other error it would do so at once.
        RPCError::Unreachable(Unreachable::new(error))
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, RpcError> {
        let row = AppendRow {
            vote: Some((&request.vote).into()),
            previous: codec::log_id_row(request.prev_log_id.as_ref()),
            commit: codec::log_id_row(request.leader_commit.as_ref()),
            entries: request.entries.iter().map(codec::entry_row).collect(),
        };
        match self.call(Body::Append(row), option.hard_ttl()).await {
            Ok(Body::Appended(row)) => Ok(match row.higher {
                Some(vote) => AppendEntriesResponse::HigherVote((&vote).into()),
                None if row.success => AppendEntriesResponse::Success,
                None if row.partial => {
                    AppendEntriesResponse::PartialSuccess(codec::log_id(row.matched.as_ref()))
                }
                None => AppendEntriesResponse::Conflict,
            }),
            Ok(_) => Err(rpc_error(&codec::invalid("an unexpected answer to an append"))),
            Err(error) => Err(rpc_error(&error)),
        }
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, RpcError> {
        let row = VoteRequestRow {
            vote: Some((&request.vote).into()),
            last: codec::log_id_row(request.last_log_id.as_ref()),
        };
        match self.call(Body::Vote(row), option.hard_ttl()).await {
            Ok(Body::Voted(row)) if row.removed => {
                if self.network.shared.elections.bar(Bar::Removed) {
                    tracing::warn!(
                        by = self.id,
                        "this master was removed from the group: it is of no more use, unless a leader takes it in again"
                    );
                }
                Err(rpc_error(&io::Error::other("this master is none of the others' group any more")))
            }
            Ok(Body::Voted(row)) => {
                let vote = codec::vote(row.vote.as_ref()).map_err(|error| rpc_error(&error))?;
                Ok(VoteResponse {
                    vote,
                    vote_granted: row.granted,
                    last_log_id: codec::log_id(row.last.as_ref()),
                })
            }
            Ok(_) => Err(rpc_error(&codec::invalid("an unexpected answer to a vote"))),
            Err(error) => Err(rpc_error(&error)),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<TypeConfig>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<TypeConfig, Fatal<u64>>> {
        tokio::select! {
            closed = cancel => Err(closed.into()),
            sent = self.send_snapshot(vote, snapshot) => match sent {
                Ok(vote) => Ok(SnapshotResponse::new(vote)),
                Err(error) => {
                    // A failed transfer is tried again; not at once.
                    sleep(Duration::from_millis(500)).await;
                    Err(StreamingError::Network(NetworkError::new(&error)))
                }
            },
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(Duration::from_millis(100)))
    }
}

/// How a master is that can be reached, and where it looks for the master `about`.
///
/// # Errors
/// When it cannot be asked within `bound`.
pub async fn probe(peer: &Peer, about: u64, bound: Duration) -> io::Result<codec::ProbedRow> {
    match peer.call(Body::Probe(codec::ProbeRow { about }), bound).await? {
        Body::Probed(row) => Ok(row),
        _ => Err(codec::invalid("an unexpected answer to a probe")),
    }
}

/// Raft has stopped: this end of the stream is of no more use.
fn stopped(error: impl std::fmt::Display) -> io::Error {
    unreachable(io::Error::other(error.to_string()))
}

/// Nothing may be written that does not fit: the leader, or the candidate, asks again.
fn check_room(shared: &super::store::Shared) -> io::Result<()> {
    if shared.room.look() == Level::None {
        return Err(io::Error::new(io::ErrorKind::StorageFull, "there is no room on this master's disk"));
    }
    Ok(())
}

/// What a message between masters makes this master do.
///
/// # Errors
/// `NotConnected` when Raft has stopped; another when the message is malformed.
pub async fn dispatch(
    raft: &Raft,
    shared: &Arc<super::store::Shared>,
    auth: &Auth,
    from: u64,
    body: Option<Body>,
) -> io::Result<Body> {
    match body {
        Some(Body::Append(row)) => {
            let request = AppendEntriesRequest {
                vote: codec::vote(row.vote.as_ref())?,
                prev_log_id: codec::log_id(row.previous.as_ref()),
                leader_commit: codec::log_id(row.commit.as_ref()),
                entries: row.entries.into_iter().map(TryInto::try_into).collect::<io::Result<_>>()?,
            };
            if !request.entries.is_empty() {
                check_room(shared)?;
            }
            let (vote, commit) = (request.vote, request.leader_commit);
            let mut answer = codec::AppendedRow::default();
            match raft.append_entries(request).await.map_err(stopped)? {
                AppendEntriesResponse::Success => answer.success = true,
                AppendEntriesResponse::PartialSuccess(matched) => {
                    answer.partial = true;
                    answer.matched = codec::log_id_row(matched.as_ref());
                }
                AppendEntriesResponse::Conflict => {}
                AppendEntriesResponse::HigherVote(vote) => answer.higher = Some((&vote).into()),
            }
            let heard = answer.higher.is_none();
            if heard {
                // Whoever leads and appends here has taken this master in again, or never let it go.
                shared.elections.lift(Bar::Removed);
            }
            if heard
                && shared.joining.active()
                && shared.joining.caught_up(&vote, commit.as_ref(), shared.applied().0.as_ref())
            {
                super::node::end_joining(shared).await?;
                tracing::info!("caught up with the other masters: this one votes from now on");
            }
            Ok(Body::Appended(answer))
        }
        Some(Body::Vote(row)) => {
            let last: Option<LogId> = codec::log_id(row.last.as_ref());
            if !shared.joining.may_vote(last.as_ref()) {
                return Err(io::Error::other(
                    "this master is new here and does not vote before it has caught up",
                ));
            }
            check_room(shared)?;
            if members::was_removed(&shared.applied().1, from, last.as_ref()) {
                let vote = row.vote;
                return Ok(Body::Voted(codec::VotedRow { vote, removed: true, ..Default::default() }));
            }
            let request = VoteRequest::new(codec::vote(row.vote.as_ref())?, last);
            let answer = raft.vote(request).await.map_err(stopped)?;
            Ok(Body::Voted(codec::VotedRow {
                vote: Some((&answer.vote).into()),
                granted: answer.vote_granted,
                last: codec::log_id_row(answer.last_log_id.as_ref()),
                removed: false,
            }))
        }
        Some(Body::Probe(row)) => {
            let initialized = raft.is_initialized().await.map_err(stopped)?;
            let (joining, looks_at) = (shared.joining.active(), auth.addresses.get(&row.about));
            let looks_at = looks_at.cloned().unwrap_or_default();
            Ok(Body::Probed(codec::ProbedRow {
                initialized,
                id: auth.id,
                joining,
                looks_at,
                short: shared.room.level() != Level::Plenty,
            }))
        }
        Some(Body::Expect(row)) => {
            handover::expect(raft, codec::vote(row.vote.as_ref())?).await.map_err(stopped)?;
            Ok(Body::Expecting(codec::ExpectingRow {}))
        }
        Some(Body::TakeOver(row)) => {
            handover::take_over(raft, shared, &codec::vote(row.vote.as_ref())?).await?;
            Ok(Body::TakingOver(codec::TakingOverRow {}))
        }
        _ => Err(codec::invalid("a message of an unknown kind")),
    }
}
