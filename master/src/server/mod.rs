//! The services of a master: sessions of clients, chunk daemons, administration.
//!
//! Only the leader serves. Everything it keeps in memory belongs to one [`term::Term`] and is gone with it; streams
//! attached to a term end when the term does, and their peers look for the next leader.

mod admin;
mod answers;
pub mod backup;
mod census;
mod change;
mod compacting;
mod connection;
mod control;
mod fsck;
mod jobs;
mod leader;
mod locking;
mod masters;
mod memory;
mod nodes;
mod proofs;
mod questions;
mod repairing;
mod requests;
mod sealing;
mod session;
mod space;
mod term;
mod wishing;

use crate::raft;
use dfs_env::Env;
use dfs_proto::token::ClusterKey;
use dfs_proto::v1::{self, Command, ErrorCode, System, SystemAnswer, system_answer};
use dfs_proto::{FsError, FsResult};
use ipnet::IpNet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

pub use leader::run;
pub use term::Term;

use crate::state::Applied;

/// How long a confirmation, or the close of a session that said goodbye, may take before its peer is sent elsewhere.
const RAFT_WAIT: Duration = Duration::from_secs(10);
/// How long a change of the cluster's own may take: a disk that stalls for a while ends no term.
const SYSTEM_WAIT: Duration = Duration::from_secs(30);
/// How long a peer may take to introduce itself.
const HELLO_WAIT: Duration = Duration::from_secs(10);
/// How long a peer that asks a fresh leader waits for it to be ready.
const TERM_WAIT: Duration = Duration::from_secs(2);

/// What all services of one master share.
pub struct Shared {
    pub env: Env,
    pub node: Arc<raft::Node>,
    pub key: ClusterKey,
    pub cluster_id: String,
    pub address: String,
    pub settings: Settings,
    /// The term this master leads, once it is ready to serve.
    term: watch::Sender<Option<Arc<Term>>>,
    /// True: the process is about to end.
    stopping: watch::Sender<bool>,
}

/// What of the configuration the services need.
#[derive(Clone, Debug)]
pub struct Settings {
    pub replicas: u32,
    pub chunk_size: u64,
    pub session_ttl: Duration,
    /// Networks of clients whose root is nobody.
    pub root_squash: Vec<IpNet>,
    /// Bytes a second that each daemon copies at most to make replicas; 0: no limit.
    pub repair_bandwidth: u64,
    /// How long chunks that nobody uses are kept at least.
    pub keep_deleted: Duration,
    /// The same for compaction, and for how long nothing of a chunk may have been removed before it is compacted.
    pub compaction_bandwidth: u64,
    pub compact_after: Duration,
}

/// This master leads no more, or cannot tell: the peer must look for the leader and ask again.
#[derive(Clone, Debug, Default)]
pub struct Gone {
    pub leader: String,
}

impl Gone {
    fn failure(&self) -> v1::Failure {
        let text = if self.leader.is_empty() {
            "this master does not lead, and no leader is known".to_owned()
        } else {
            format!("this master does not lead: ask {}", self.leader)
        };
        FsError::new(ErrorCode::ErrorNotLeader, text).into()
    }
}

impl Shared {
    /// What the services of one master share; no term is led yet.
    #[must_use]
    pub fn new(
        env: Env,
        node: Arc<raft::Node>,
        key: ClusterKey,
        address: String,
        settings: Settings,
    ) -> Arc<Self> {
        let cluster_id = key.cluster_id();
        let (term, stopping) = (watch::Sender::new(None), watch::Sender::new(false));
        Arc::new(Self { env, node, key, cluster_id, address, settings, term, stopping })
    }

    /// Whether root is nobody on the client that calls from this address.
    fn squashes_root_of(&self, peer: &str) -> bool {
        let networks = &self.settings.root_squash;
        // An address that cannot be told is nobody's friend.
        !networks.is_empty()
            && peer.parse().map_or(true, |address: SocketAddr| {
                let ip = address.ip().to_canonical();
                networks.iter().any(|network| network.contains(&ip))
            })
    }

    /// The process is about to end: streams end, nobody new is served.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Who leads, as far as this master knows; empty when it does not, or when it is this one itself.
    fn leader(&self) -> Gone {
        let leader = self.node.leadership().borrow().leader.clone().unwrap_or_default();
        Gone { leader: if leader == self.address { String::new() } else { leader } }
    }

    /// The term this master leads. A leader that was just elected is waited for.
    async fn term(&self) -> Result<Arc<Term>, Gone> {
        let mut terms = self.term.subscribe();
        let leading = self.node.leadership().borrow().leading;
        if let Some(term) = terms.borrow().clone() {
            return Ok(term);
        }
        if !leading {
            return Err(self.leader());
        }
        match tokio::time::timeout(TERM_WAIT, terms.wait_for(Option::is_some)).await {
            Ok(Ok(term)) => term.clone().ok_or_else(|| self.leader()),
            Ok(Err(_)) | Err(_) => Err(self.leader()),
        }
    }

    /// Has a change applied.
    async fn propose(&self, command: Command) -> Result<Applied, Gone> {
        self.node.propose(command).await.map_err(|error| {
            tracing::debug!(%error, "a proposal was not carried out");
            self.leader()
        })
    }

    /// Afterwards the applied state is at least as new as everything answered before the call.
    async fn confirm(&self) -> Result<(), Gone> {
        match tokio::time::timeout(RAFT_WAIT, self.node.confirm()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                tracing::debug!(%error, "leadership is not confirmed");
                Err(self.leader())
            }
            Err(_) => Err(self.leader()),
        }
    }

    /// Has a change of the cluster's own applied, and takes the refusal out of the answer.
    async fn system(&self, op: v1::system::Op) -> Result<FsResult<system_answer::Body>, Gone> {
        use v1::command::Body;
        let command = Command { body: Some(Body::System(System { op: Some(op) })), ..Command::default() };
        let applied = tokio::time::timeout(SYSTEM_WAIT, self.propose(command)).await;
        let Ok(applied) = applied else { return Err(self.leader()) };
        Ok(match applied? {
            Applied::System(SystemAnswer { body: Some(system_answer::Body::Failure(failure)) }) => {
                Err(failure.into())
            }
            Applied::System(SystemAnswer { body: Some(body) }) => Ok(body),
            Applied::System(SystemAnswer { body: None }) | Applied::Answer(_) => {
                Err(FsError::new(ErrorCode::ErrorIo, "the state machine gave no answer to a system command"))
            }
        })
    }

    /// The services, to be added to a gRPC server.
    pub fn session_service(self: &Arc<Self>) -> v1::session_server::SessionServer<session::SessionService> {
        v1::session_server::SessionServer::new(session::SessionService::new(Arc::clone(self)))
            .max_decoding_message_size(dfs_proto::limits::MESSAGE_MAX)
            .max_encoding_message_size(dfs_proto::limits::MESSAGE_MAX)
    }

    /// See [`Shared::session_service`].
    pub fn control_service(self: &Arc<Self>) -> v1::control_server::ControlServer<control::ControlService> {
        v1::control_server::ControlServer::new(control::ControlService::new(Arc::clone(self)))
            .max_decoding_message_size(dfs_proto::limits::MESSAGE_MAX)
            .max_encoding_message_size(dfs_proto::limits::MESSAGE_MAX)
    }

    /// See [`Shared::session_service`].
    pub fn admin_service(self: &Arc<Self>) -> v1::admin_server::AdminServer<admin::AdminService> {
        v1::admin_server::AdminServer::new(admin::AdminService::new(Arc::clone(self)))
    }
}

/// A failure of the state store, for the log and for the peer.
fn store_failed(what: &str, error: &std::io::Error) -> FsError {
    tracing::error!(%error, "{what}");
    FsError::new(ErrorCode::ErrorIo, format!("{what}: {error}"))
}

/// A failure as an answer.
fn failed(error: impl Into<FsError>) -> v1::Answer {
    v1::Answer { body: Some(v1::answer::Body::Failure(error.into().into())) }
}

/// A body as an answer.
fn answer(body: v1::answer::Body) -> v1::Answer {
    v1::Answer { body: Some(body) }
}
