//! The Admin service: what `dfs status` shows.

use super::census::Census;
use super::compacting;
use super::nodes::millis;
use super::proofs::Bad;
use super::repairing::Progress;
use super::term::Term;
use super::{Gone, Shared, store_failed};
use super::{backup, fsck};
use crate::placement::Health;
use crate::state;
use bytes::Bytes;
use dfs_env::Seldom;
use dfs_proto::v1::change_node_request::Change;
use dfs_proto::v1::{
    self, CompactionStatus, MasterStatus, NodeStatus, RepairStatus, SessionStatus, StatusReply,
    StatusRequest, system,
};
use dfs_proto::{InodeNo, NodeId, SessionId};
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Orphans are counted up to here.
const ORPHANS_MAX: usize = 100_000;
/// Up to where files are counted whose chunks have not all got what was set.
const REVIEWS_MAX: usize = 100_000;

/// For how long after a wish for it compaction waits for nothing.
const HURRY: Duration = Duration::from_secs(60);

/// Answers `Admin`.
pub struct AdminService {
    pub(super) shared: Arc<Shared>,
}

impl AdminService {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

#[tonic::async_trait]
impl v1::admin_server::Admin for AdminService {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let term = match self.shared.term().await {
            Ok(term) => term,
            Err(gone) => return elsewhere(gone),
        };
        if let Err(gone) = self.shared.confirm().await {
            return elsewhere(gone);
        }
        let mut reply = overview(&term)?;
        if request.get_ref().sessions {
            reply.sessions = sessions(&term);
        }
        Ok(Response::new(reply))
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Result<Response<v1::EvictReply>, Status> {
        let v1::EvictRequest { session, now_ms, proof } = request.into_inner();
        let term = self.obeying("evict", session, now_ms, proof).await?;
        let id = SessionId(session);
        self.shared.confirm().await.map_err(|_| not_here())?;
        if !term.memory().fence(id) {
            return Err(Status::not_found(format!("there is no session {id}")));
        }
        Ok(Response::new(v1::EvictReply {}))
    }

    type FsckStream = ReceiverStream<Result<v1::FsckReply, Status>>;

    async fn fsck(&self, request: Request<v1::FsckRequest>) -> Result<Response<Self::FsckStream>, Status> {
        let v1::FsckRequest { deep, now_ms, proof, repair } = request.into_inner();
        let what = if repair { "fsck repair" } else { "fsck" };
        let term = self.obeying(what, 0, now_ms, proof).await?;
        let alone = Arc::clone(&term.fsck).try_acquire_owned();
        let alone = alone.map_err(|_| Status::resource_exhausted("another check is under way"))?;
        let (replies, outgoing) = mpsc::channel(1);
        tokio::spawn(fsck::run(term, fsck::Wish { deep, repair }, replies, alone));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    type BackupStream = ReceiverStream<Result<v1::BackupPart, Status>>;

    async fn backup(
        &self,
        request: Request<v1::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        let v1::BackupRequest { now_ms, proof } = request.into_inner();
        let term = self.obeying("backup", 0, now_ms, proof).await?;
        let alone = Arc::clone(&term.backup).try_acquire_owned();
        let alone = alone.map_err(|_| Status::resource_exhausted("another backup is being taken"))?;
        let (parts, outgoing) = mpsc::channel(1);
        tokio::spawn(backup::run(term, now_ms, parts, alone));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn forget_newer(
        &self,
        request: Request<v1::ForgetNewerRequest>,
    ) -> Result<Response<v1::ForgetNewerReply>, Status> {
        let v1::ForgetNewerRequest { now_ms, proof } = request.into_inner();
        let term = self.obeying("forget newer", 0, now_ms, proof).await?;
        let op = system::Op::ForgetNewer(v1::ForgetNewer {});
        if let Err(error) = self.shared.system(op).await.map_err(|_| not_here())? {
            return Err(Status::failed_precondition(error.message));
        }
        // They come back at once, and say what they have.
        term.nodes.detach_all();
        tracing::info!("what was made after the restored backup is kept no longer");
        Ok(Response::new(v1::ForgetNewerReply {}))
    }

    async fn gc(&self, request: Request<v1::GcRequest>) -> Result<Response<v1::GcReply>, Status> {
        let v1::GcRequest { dry_run, now_ms, proof } = request.into_inner();
        let term = if dry_run {
            self.shared.term().await.map_err(|_| not_here())?
        } else {
            self.obeying("gc", 0, now_ms, proof).await?
        };
        self.shared.confirm().await.map_err(|_| not_here())?;
        let reply = super::space::survey(&term).await.map_err(|error| Status::internal(error.to_string()))?;
        if !dry_run {
            term.compactions.hurry(term.now() + HURRY);
            term.walk.notify_one();
            tracing::info!("space is given back at once");
        }
        Ok(Response::new(reply))
    }

    async fn change_node(
        &self,
        request: Request<v1::ChangeNodeRequest>,
    ) -> Result<Response<v1::ChangeNodeReply>, Status> {
        let request = request.into_inner();
        let (change, node) = (request.change(), NodeId(request.node));
        let what = match change {
            Change::Drain => "drain node",
            Change::Undrain => "undrain node",
            Change::Remove => "remove node",
            Change::None => return Err(Status::invalid_argument("this master does not know the order")),
        };
        let term = self.obeying(what, request.node, request.now_ms, request.proof).await?;
        let op = if change == Change::Remove {
            if term.nodes.is_known(node) && term.nodes.health(node) != Health::Dead {
                let text = format!("chunk daemon {:016x} is not dead: stop it first", node.get());
                return Err(Status::failed_precondition(text));
            }
            system::Op::RemoveNode(v1::RemoveNode { node: node.get() })
        } else {
            system::Op::DrainNode(v1::DrainNode { node: node.get(), drain: change == Change::Drain })
        };
        if let Err(error) = self.shared.system(op).await.map_err(|_| not_here())? {
            return Err(Status::failed_precondition(error.message));
        }
        match change {
            Change::Remove => term.nodes.remove(node),
            Change::Drain | Change::Undrain => term.nodes.set_draining(node, change == Change::Drain),
            Change::None => {}
        }
        tracing::info!(node = format_args!("{:016x}", node.get()), "{what}");
        Ok(Response::new(v1::ChangeNodeReply {}))
    }

    async fn change_master(
        &self,
        request: Request<v1::ChangeMasterRequest>,
    ) -> Result<Response<v1::ChangeMasterReply>, Status> {
        super::masters::change(self, request.into_inner()).await.map(Response::new)
    }
}

/// Whoever asked must look for the leader and ask again.
pub fn not_here() -> Status {
    Status::unavailable("this master does not lead any more")
}

impl AdminService {
    /// The term that this master leads, for whoever orders something in it and shows that he has the cluster key, now and once.
    pub(super) async fn obeying(
        &self,
        what: &str,
        number: u64,
        at_ms: u64,
        proof: Bytes,
    ) -> Result<Arc<Term>, Status> {
        let term = self.shared.term().await.map_err(|_| not_here())?;
        self.judge(&term, what, number, at_ms, proof).inspect_err(|status| {
            static REFUSED: Seldom = Seldom::new();
            if let Some(unsaid) = REFUSED.now() {
                tracing::warn!(what, error = status.message(), unsaid, "an order was refused");
            }
        })?;
        Ok(term)
    }

    fn judge(&self, term: &Term, what: &str, number: u64, at_ms: u64, proof: Bytes) -> Result<(), Status> {
        if !self.shared.key.verify_proof(what, number, at_ms, term.challenge, &proof) {
            return Err(Status::unauthenticated("the proof is wrong: another cluster key?"));
        }
        let now_ms = self.shared.env.clock.system_ms();
        let taken = term.proofs.lock().unwrap_or_else(PoisonError::into_inner).take(now_ms, at_ms, proof);
        taken.map_err(|bad| match bad {
            Bad::OtherTime => Status::unauthenticated("the proof is of another time: are the clocks set?"),
            Bad::Used => Status::aborted("the proof was used already"),
        })
    }
}

fn elsewhere(gone: Gone) -> Result<Response<StatusReply>, Status> {
    if gone.leader.is_empty() {
        return Err(Status::unavailable("no master leads at the moment"));
    }
    Ok(Response::new(StatusReply { leader: gone.leader, ..StatusReply::default() }))
}

fn overview(term: &Term) -> Result<StatusReply, Status> {
    let shared = &term.shared;
    let kv = shared.node.kv();
    let failed = |what: &str, error: std::io::Error| Status::internal(store_failed(what, &error).to_string());
    let cluster = state::cluster_row(&*kv)
        .map_err(|error| failed("reading the cluster's counters", error))?
        .unwrap_or_default();
    let orphans = state::orphans(&*kv, InodeNo(0), ORPHANS_MAX)
        .map_err(|error| failed("reading the orphans", error))?
        .len();
    let reviews = state::reviews(&*kv, InodeNo(0), REVIEWS_MAX)
        .map_err(|error| failed("reading which files' replicas were set", error))?
        .len();
    let raft = shared.node.status();
    let census = *term.census.lock().unwrap_or_else(PoisonError::into_inner);
    let flawed = term.repairs.flaws_by_node();
    let mut nodes = term.nodes.status();
    for (node, ..) in &mut nodes {
        node.flawed = flawed.get(&NodeId(node.node)).copied().unwrap_or(0);
    }
    let space = term.nodes.space();
    let (parked, _) = term.jobs.sealing();
    let replicas = u64::from(term.replicas.max(1));
    let masters: Vec<MasterStatus> = raft
        .members
        .iter()
        .map(|member| MasterStatus {
            id: member.id,
            address: member.address.clone(),
            leader: member.leader,
            voter: member.voter,
            matched: member.matched,
        })
        .collect();
    Ok(StatusReply {
        leader: String::new(),
        cluster_id: shared.cluster_id.clone(),
        term: raft.term,
        applied: raft.applied,
        snapshot: raft.snapshot,
        warnings: [super::masters::warnings(&masters), warnings(term, &nodes, &census, parked)].concat(),
        masters,
        nodes: nodes.into_iter().map(|(status, ..)| status).collect(),
        sessions: Vec::new(),
        files: cluster.files,
        chunks: cluster.chunks,
        live_bytes: cluster.live_bytes,
        under_replicated: census.under_replicated,
        waiting_seal: census.fenced,
        surplus: census.surplus,
        reviews: reviews as u64,
        replicas: term.replicas,
        chunk_size: term.chunk_size,
        total_bytes: space.total / replicas,
        free_bytes: space.free / replicas,
        orphans: orphans as u64,
        repair: Some(repair(&term.repairs.progress(term.now()))),
        compaction: Some(compaction(&term.compactions.progress())),
        challenge: term.challenge,
    })
}

fn repair(progress: &Progress) -> RepairStatus {
    RepairStatus {
        waiting: progress.waiting,
        copying: progress.copying,
        copied: progress.copied,
        copied_bytes: progress.copied_bytes,
        failed: progress.failed,
        bytes_per_second: progress.bytes_per_second,
        flawed: progress.flaws,
    }
}

fn compaction(progress: &compacting::Progress) -> CompactionStatus {
    CompactionStatus {
        waiting: progress.waiting,
        waiting_bytes: progress.waiting_bytes,
        running: progress.running,
        compacted: progress.compacted,
        moved_bytes: progress.moved_bytes,
        failed: progress.failed,
    }
}

fn warnings(
    term: &Term,
    nodes: &[(NodeStatus, u64, Vec<String>)],
    census: &Census,
    parked: usize,
) -> Vec<String> {
    let mut warnings = Vec::new();
    let wanted = usize::try_from(term.replicas).unwrap_or(1);
    let up: Vec<&NodeStatus> =
        nodes.iter().map(|(node, ..)| node).filter(|node| node.state == "up").collect();
    let hosts: BTreeSet<&str> = up.iter().map(|node| node.host.as_str()).collect();
    if up.is_empty() {
        warnings.push("no chunk daemon is up: nothing can be written, and files cannot be read".to_owned());
    } else if up.len() < wanted {
        warnings.push(format!(
            "{} of the {wanted} chunk daemons needed for {wanted} replicas are up: new chunks have fewer replicas",
            up.len()
        ));
    } else if hosts.len() < wanted {
        warnings.push(format!(
            "the chunk daemons are on {} host{}: some of {wanted} replicas share a host",
            hosts.len(),
            if hosts.len() == 1 { "" } else { "s" }
        ));
    }
    for (node, unknown, failed) in nodes {
        if node.state != "up" {
            warnings.push(format!(
                "chunk daemon {:016x} at {} is {}, last seen {} s ago",
                node.node,
                node.address,
                node.state,
                node.last_seen_ms / 1000
            ));
        }
        if node.flawed > 0 {
            warnings.push(format!(
                "chunk daemon {:016x} has {} damaged or missing replicas, which are being made anew",
                node.node, node.flawed
            ));
        }
        if *unknown > 0 {
            warnings.push(format!(
                "chunk daemon {:016x} has {} chunks that this cluster does not know; they are left alone",
                node.node, unknown
            ));
        }
        for path in failed {
            warnings.push(format!("chunk daemon {:016x}: the directory {path} has failed", node.node));
        }
    }
    if census.unavailable > 0 {
        warnings.push(format!("{} chunks have no replica on a living daemon", census.unavailable));
    }
    if parked > 0 {
        warnings.push(format!("{parked} chunks wait for a daemon that has all of their committed bytes"));
    }
    warnings
}

fn sessions(term: &Term) -> Vec<SessionStatus> {
    let now = term.now();
    let memory = term.memory();
    let status = memory.sessions.iter().map(|(id, session)| SessionStatus {
        session: id.get(),
        client: session.row.client.clone(),
        host: session.row.host.clone(),
        last_seen_ms: millis(now.saturating_sub(session.seen)),
        opens: memory.opens.count(*id) as u64,
        locks: memory.locks.count(*id) as u64,
        leases: memory.leases.count(*id) as u64,
        requests: session.requests,
    });
    status.collect()
}
