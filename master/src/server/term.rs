//! One term of leadership: everything the leader keeps in memory, from its election to its end.

use super::compacting::{self, Compactions};
use super::jobs::Jobs;
use super::memory::{Memory, Session};
use super::nodes::Nodes;
use super::proofs::Proofs;
use super::repairing::Repairs;
use super::{Gone, Shared, store_failed};
use crate::leases::table::{Kind, Notes};
use crate::placement::{Placement, Spread};
use crate::state;
use bytes::Bytes;
use dfs_proto::v1::{self, ErrorCode, SessionRow, system, system_answer};
use dfs_proto::{ChunkId, FsError, FsResult, NodeId, SessionId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, watch};

/// The most sessions at a time.
const SESSIONS_MAX: usize = 65_536;

/// What is to become of the answers of a session that ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// Its client has them all.
    Forget,
    /// Its client may ask for them in its next session.
    Keep,
}

/// A term that this master leads.
pub struct Term {
    pub shared: Arc<Shared>,
    pub number: u64,
    /// Time since boot when it began.
    pub elected: Duration,
    /// What proofs of orders are made for in this term, and those that were used. Locked alone.
    pub challenge: u64,
    pub proofs: Mutex<Proofs>,
    /// The cluster's settings, decided once at its first start.
    pub replicas: u32,
    pub chunk_size: u64,
    pub nodes: Nodes,
    pub jobs: Jobs,
    pub repairs: Repairs,
    pub strays: Strays,
    pub compactions: Compactions,
    /// Cuts the census's rest short.
    pub walk: Notify,
    /// Taken by a check of the whole cluster.
    pub fsck: Arc<Semaphore>,
    /// Taken by a backup.
    pub backup: Arc<Semaphore>,
    pub placement: Box<dyn Placement>,
    pub census: Mutex<super::census::Census>,
    /// Locked alone: while it is held no other lock is taken.
    memory: Mutex<Memory>,
    ended: watch::Sender<bool>,
    /// True once every session of before the election has said what it holds, or is gone: the reclaim gate is open.
    reclaimed: watch::Sender<bool>,
}

impl Term {
    /// Takes office: makes sure that everything committed is applied, gives a new cluster its settings, and reads who
    /// is there.
    pub async fn begin(shared: &Arc<Shared>, number: u64) -> Result<FsResult<Arc<Self>>, Gone> {
        shared.confirm().await?;
        let kv = shared.node.kv();
        let read = |what: &str, error: std::io::Error| store_failed(what, &error);
        let mut cluster = match state::cluster_row(&*kv) {
            Ok(row) => row,
            Err(error) => return Ok(Err(read("reading the cluster's settings", error))),
        };
        if cluster.is_none() {
            let hash_key: Vec<u8> = (0..2).flat_map(|_| shared.env.random().to_le_bytes()).collect();
            let init = v1::Init {
                hash_key: Bytes::from(hash_key),
                replicas: shared.settings.replicas,
                chunk_size: shared.settings.chunk_size,
            };
            if let Err(error) = shared.system(system::Op::Init(init)).await? {
                return Ok(Err(error.during("giving the new cluster its settings")));
            }
            cluster = match state::cluster_row(&*kv) {
                Ok(row) => row,
                Err(error) => return Ok(Err(read("reading the cluster's settings", error))),
            };
        }
        let Some(cluster) = cluster else {
            return Ok(Err(FsError::new(ErrorCode::ErrorIo, "the cluster has no settings after Init")));
        };
        if let Err(error) = compacting::release_all(shared).await? {
            return Ok(Err(error.during("giving up what another master compacted")));
        }
        let rows = || {
            Ok((
                state::sessions(&*kv)?,
                state::leased(&*kv)?,
                state::nodes(&*kv)?,
                state::unsealed_chunks(&*kv)?,
            ))
        };
        let (sessions, leased, nodes, unsealed) = match rows() {
            Ok(rows) => rows,
            Err(error) => return Ok(Err(read("reading sessions, daemons and chunks", error))),
        };
        let elected = shared.env.clock.boot();
        let alone = sessions.is_empty();
        let term = Arc::new(Self {
            shared: Arc::clone(shared),
            number,
            elected,
            challenge: shared.env.random(),
            proofs: Mutex::default(),
            replicas: cluster.replicas,
            chunk_size: cluster.chunk_size,
            nodes: Nodes::new(Arc::clone(&shared.env.clock), nodes, elected),
            jobs: Jobs::default(),
            repairs: Repairs::default(),
            strays: Strays::default(),
            compactions: Compactions::default(),
            walk: Notify::new(),
            fsck: Arc::new(Semaphore::new(1)),
            backup: Arc::new(Semaphore::new(1)),
            placement: Box::new(Spread),
            census: Mutex::default(),
            memory: Mutex::new(Memory::new(sessions, notes_of(leased), elected)),
            ended: watch::Sender::new(false),
            reclaimed: watch::Sender::new(alone),
        });
        for (session, chunk) in unsealed {
            term.resume_seal(session, chunk);
        }
        Ok(Ok(term))
    }

    /// A chunk somebody left unsealed: sealing goes on if it had begun, and begins if its session is gone.
    pub fn resume_seal(&self, session: SessionId, chunk: ChunkId) {
        let fenced = match state::chunk_state(&*self.kv(), chunk) {
            Ok(state) => state.is_some_and(|state| state.phase() != v1::chunk_state::Phase::Open),
            Err(error) => {
                store_failed("reading a chunk", &error);
                return;
            }
        };
        if fenced || !self.memory().sessions.contains_key(&session) {
            self.jobs.seal(chunk, false);
        }
    }

    /// The term is over: streams end, nothing more is answered.
    pub fn end(&self) {
        self.ended.send_replace(true);
        self.jobs.close();
        self.repairs.close();
        self.compactions.close();
    }

    /// Becomes true when the term is over.
    pub fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// Sessions, opens and locks.
    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The applied state.
    pub fn kv(&self) -> Arc<dyn state::Kv> {
        self.shared.node.kv()
    }

    /// Time since boot.
    pub fn now(&self) -> Duration {
        self.shared.env.clock.boot()
    }

    /// Opens the reclaim gate if `last` says that nobody is waited for any more.
    pub fn reclaim(&self, last: bool) {
        if last {
            self.reclaimed.send_if_modified(|open| !std::mem::replace(open, true));
        }
    }

    /// Whether the reclaim gate is open.
    pub fn is_reclaimed(&self) -> bool {
        *self.reclaimed.borrow()
    }

    /// Waits for the reclaim gate. Bounded: whoever does not attach expires.
    pub async fn reclaimed(&self) -> Result<(), Gone> {
        let mut gate = self.reclaimed.subscribe();
        let mut ended = self.ended();
        tokio::select! {
            opened = gate.wait_for(|open| *open) => opened.map(|_| ()).map_err(|_| Gone::default()),
            _ = ended.wait_for(|ended| *ended) => Err(Gone::default()),
        }
    }

    /// Opens a new session.
    pub async fn open_session(
        &self,
        nonce: u64,
        client: &str,
        host: &str,
    ) -> Result<FsResult<SessionId>, Gone> {
        if self.memory().sessions.len() >= SESSIONS_MAX {
            let text = format!("{SESSIONS_MAX} sessions are open");
            return Ok(Err(FsError::new(ErrorCode::ErrorBusy, text)));
        }
        let open = v1::OpenSession { nonce, client: client.to_owned(), host: host.to_owned() };
        let id = match self.shared.system(system::Op::OpenSession(open)).await? {
            Ok(system_answer::Body::Session(id)) => SessionId(id),
            Ok(other) => {
                let text = format!("opening a session was answered {other:?}");
                return Ok(Err(FsError::new(ErrorCode::ErrorIo, text)));
            }
            Err(error) => return Ok(Err(error)),
        };
        let row =
            SessionRow { nonce, client: client.to_owned(), host: host.to_owned(), ..SessionRow::default() };
        let now = self.now();
        self.memory().sessions.entry(id).or_insert_with(|| Session::new(row, now));
        Ok(Ok(id))
    }

    /// Ends a session for good: opens and locks are free, its open chunks will be sealed. If that is refused (the masters' disks are
    /// full), the session stays, nobody attaches it any more, and it is tried again when it has been silent long enough.
    pub async fn close_session(&self, id: SessionId, answers: Answers) -> Result<(), Gone> {
        let begins = self.memory().begin_closing(id);
        let close = v1::CloseSession { target: id.get(), keep_answers: answers == Answers::Keep };
        match self.shared.system(system::Op::CloseSession(close)).await? {
            Ok(system_answer::Body::Chunks(list)) => {
                for chunk in list.chunks {
                    self.jobs.seal(ChunkId(chunk), false);
                }
            }
            Ok(_) => {}
            Err(error) => {
                if begins {
                    tracing::warn!(session = %id, %error, "a session could not be closed yet");
                }
                return Ok(());
            }
        }
        let now = self.now();
        let last = self.memory().end_session(id, now);
        self.reclaim(last);
        Ok(())
    }
}

/// Daemons that have sealed replicas of chunks that are not sealed here and do not list them: after a restore from a backup
/// that is older than the seal. At most one entry for each replica that a daemon reports.
#[derive(Default)]
pub struct Strays(Mutex<BTreeMap<ChunkId, BTreeSet<NodeId>>>);

impl Strays {
    fn map(&self) -> MutexGuard<'_, BTreeMap<ChunkId, BTreeSet<NodeId>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, chunk: ChunkId, node: NodeId) {
        self.map().entry(chunk).or_default().insert(node);
    }

    pub fn of(&self, chunk: ChunkId) -> Vec<NodeId> {
        self.map().get(&chunk).map(|nodes| nodes.iter().copied().collect()).unwrap_or_default()
    }

    pub fn forget(&self, chunk: ChunkId) {
        self.map().remove(&chunk);
    }
}

/// Where each session may hold leases.
fn notes_of(leased: Vec<(SessionId, v1::LeaseKind, u32)>) -> BTreeMap<SessionId, Notes> {
    let mut notes: BTreeMap<SessionId, Notes> = BTreeMap::new();
    for (session, kind, bucket) in leased {
        let notes = notes.entry(session).or_default();
        match kind {
            v1::LeaseKind::LeaseRead => notes.add(Kind::Read, bucket),
            v1::LeaseKind::LeaseWrite => notes.add(Kind::Write, bucket),
            v1::LeaseKind::LeaseNone => {}
        }
    }
    notes
}
