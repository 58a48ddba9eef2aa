//! One master's part in the cluster: starts and stops everything in this folder.

use super::auth::{Auth, Group};
use super::confirm::{self, Reader};
use super::elections::Bar;
use super::log::LogStore;
use super::network::{Network, probe};
use super::propose::{Batcher, Proposal};
use super::recover::{self, Opened};
use super::room::{self, Level};
use super::service::RaftService;
use super::store::{Shared, StateExport, StateMachine};
use super::types::Raft;
use super::{Leadership, Member, NotLeader, RaftConfig, RaftStatus, StartError, Storage};
use crate::state::{Applied, Kv};
use dfs_env::Env;
use dfs_proto::v1::raft_server::RaftServer;
use dfs_proto::{limits, v1};
use openraft::error::{CheckIsLeaderError, Fatal, InitializeError, RaftError};
use openraft::{BasicNode, Config, ServerState, SnapshotPolicy};
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Commands that may wait to be packed; who proposes more waits.
const PROPOSALS_MAX: usize = 2 * limits::BATCH_COMMANDS_MAX;
/// How long stopping may take: Raft itself, then its files.
const STOP_TIME: Duration = Duration::from_secs(5);
const CLOSE_TIME: Duration = Duration::from_secs(20);
/// Between two attempts to confirm a new leader or to reach the other masters of a new cluster.
const RETRY: Duration = Duration::from_millis(50);
const PROBE_EVERY: Duration = Duration::from_millis(200);
/// How often it is looked whether there is room for a snapshot by now.
const ROOM_AGAIN: Duration = Duration::from_secs(10);
const PROBE_TIME: Duration = Duration::from_secs(2);
/// A leader that no majority has answered for so long stops saying that it leads: the others have long elected another.
const MAJORITY_LOST: Duration = Duration::from_secs(3);

/// A running master, as far as consensus goes.
pub struct Node {
    pub(super) id: u64,
    pub(super) address: String,
    pub(super) raft: Raft,
    auth: Auth,
    env: Env,
    pub(super) network: Network,
    log: LogStore,
    pub(super) shared: Arc<Shared>,
    proposals: mpsc::Sender<Proposal>,
    readers: mpsc::Sender<Reader>,
    leadership: watch::Receiver<Leadership>,
    pub(super) lead: Arc<Lead>,
    /// One change of the group, or hand-over, at a time.
    pub(super) changing: tokio::sync::Mutex<()>,
    /// It hands over because its disk is full, or rests after it could not.
    pub(super) giving_way: AtomicBool,
    /// This master is the only voter: nobody else can lead, and what it acknowledged it has applied.
    alone: Arc<AtomicBool>,
    failure: watch::Receiver<Option<String>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    lock: Mutex<Option<File>>,
}

impl Node {
    /// Starts a master: opens its storage, forms the cluster if there is none yet, and takes part. Answers before there
    /// is a leader; serve [`Node::service`] at once, the other masters need it.
    ///
    /// # Errors
    /// When settings or directory are wrong (`Usage`), or the storage cannot be opened (`Failed`).
    pub async fn start(env: Env, config: RaftConfig) -> Result<Arc<Self>, StartError> {
        let settings = Arc::new(raft_settings(&env, &config)?);
        let opened = open(&env, &config).await?;
        let Opened { log, store, snapshots, joining, group, room, lock } = opened;
        let failed = |error: &dyn std::fmt::Display| StartError::Failed(error.to_string().replace('\n', " "));
        let (_, last) = log.ends().map_err(|error| failed(&error))?;
        let empty = joining.active() && last.is_none() && lock.is_some();
        let group = Arc::new(Group::new(group, config.dir.clone(), empty));
        // An address of its own is all that a master without peers knows, and that one it need not look up.
        let addresses = if config.peers.len() > 1 { config.peers.clone() } else { BTreeMap::new() };
        let auth = Auth {
            id: config.id,
            cluster: config.cluster_id.clone(),
            key: config.key.clone(),
            group,
            addresses: Arc::new(addresses),
        };
        let shared = Shared::new(
            env.clone(),
            config.cluster_id.clone(),
            store,
            snapshots,
            joining,
            room,
            config.snapshot_every_entries.max(1),
        );
        let shared = Arc::new(shared.map_err(|error| failed(&error))?);
        snapshot_what_the_log_lacks(&log, &shared).await.map_err(|error| failed(&error))?;
        let network = Network::new(env.clone(), auth.clone(), Arc::clone(&shared.elections));
        let machine = StateMachine(Arc::clone(&shared));
        let raft = Raft::new(config.id, settings, network.clone(), log.clone(), machine).await;
        let raft = raft.map_err(|error| failed(&error))?;
        if shared.joining.active() {
            shared.elections.bar(Bar::Joining);
        }
        shared.elections.govern(&raft);

        let (proposals, proposed) = mpsc::channel(PROPOSALS_MAX);
        let (readers, reading) = mpsc::channel(confirm::READERS_MAX);
        let lead = Arc::new(Lead::default());
        let leadership = lead.leads.subscribe();
        let (fails, failure) = watch::channel(None);
        let alone = Arc::new(AtomicBool::new(false));
        let kv: Arc<dyn Kv> = Arc::clone(&shared.store) as Arc<dyn Kv>;
        let batcher = Batcher {
            env: env.clone(),
            raft: raft.clone(),
            kv,
            leadership: leadership.clone(),
            proposals: proposed,
            shared: Arc::clone(&shared),
            alone: Arc::clone(&alone),
        };
        let watcher = Watcher {
            id: config.id,
            raft: raft.clone(),
            network: network.clone(),
            lead: Arc::clone(&lead),
            fails,
            alone: Arc::clone(&alone),
        };
        let mut tasks = vec![
            tokio::spawn(watcher.run()),
            tokio::spawn(batcher.run()),
            tokio::spawn(confirm::run(raft.clone(), leadership.clone(), reading)),
            tokio::spawn(purge(raft.clone(), shared.purges())),
            tokio::spawn(take_snapshots(raft.clone(), Arc::clone(&shared))),
            tokio::spawn(watch_room(Arc::clone(&shared))),
        ];
        if !config.join {
            let (raft, network, shared) = (raft.clone(), network.clone(), Arc::clone(&shared));
            tasks.push(tokio::spawn(form_cluster(raft, network, shared, config.id, config.peers)));
        }
        Ok(Arc::new(Self {
            id: config.id,
            address: config.address,
            raft,
            auth,
            env,
            network,
            log,
            shared,
            proposals,
            readers,
            leadership,
            lead,
            changing: tokio::sync::Mutex::new(()),
            giving_way: AtomicBool::new(false),
            alone,
            failure,
            tasks: Mutex::new(tasks),
            lock: Mutex::new(lock),
        }))
    }

    fn not_leader(&self, unknown: bool) -> NotLeader {
        NotLeader {
            leader: self.leadership.borrow().leader.clone().filter(|leader| *leader != self.address),
            unknown,
        }
    }

    /// Carries out a command: it is durable on a majority and applied here when this answers. The command's time is
    /// stamped on the way.
    ///
    /// # Errors
    /// When this master does not lead, or when leadership was lost with the outcome unknown.
    pub async fn propose(&self, command: v1::Command) -> Result<Applied, NotLeader> {
        if !self.leadership.borrow().leading {
            return Err(self.not_leader(false));
        }
        let (answer, answered) = oneshot::channel();
        if self.proposals.send(Proposal { command, answer }).await.is_err() {
            return Err(self.not_leader(false));
        }
        answered.await.unwrap_or_else(|_| Err(self.not_leader(true)))
    }

    /// Waits until a read of [`Node::kv`] sees everything that was acknowledged before this call.
    ///
    /// # Errors
    /// When this master does not lead or cannot reach a majority.
    pub async fn confirm(&self) -> Result<(), NotLeader> {
        if !self.leadership.borrow().leading {
            return Err(self.not_leader(false));
        }
        if self.alone.load(Ordering::Acquire) {
            return Ok(());
        }
        let (reader, confirmed) = oneshot::channel();
        if self.readers.send(reader).await.is_err() {
            return Err(self.not_leader(false));
        }
        confirmed.await.unwrap_or_else(|_| Err(self.not_leader(false)))
    }

    /// The applied state as it is now, whatever is applied while it is read.
    #[must_use]
    pub fn export(&self) -> StateExport {
        self.shared.export()
    }

    /// The applied state as it is now, as the bytes of a snapshot file.
    ///
    /// # Errors
    /// When the state store cannot be read.
    pub fn backup(&self) -> std::io::Result<super::Backup> {
        super::Backup::begin(&self.shared)
    }

    /// The applied state. Only read it.
    #[must_use]
    pub fn kv(&self) -> Arc<dyn Kv> {
        Arc::clone(&self.shared.store) as Arc<dyn Kv>
    }

    /// Who leads, and every change of that.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// The gRPC service for the other masters.
    #[must_use]
    pub fn service(&self) -> RaftServer<RaftService> {
        let (raft, auth, shared) = (self.raft.clone(), self.auth.clone(), Arc::clone(&self.shared));
        RaftServer::new(RaftService { raft, auth, shared })
            .max_decoding_message_size(limits::MESSAGE_MAX)
            .max_encoding_message_size(limits::MESSAGE_MAX)
    }

    /// Waits until this master has stopped by itself because it could not go on (an fsync failed, say), and answers why.
    pub async fn failed(&self) -> String {
        let mut failure = self.failure.clone();
        match failure.wait_for(Option::is_some).await.map(|reason| reason.clone()) {
            Ok(reason) => reason.unwrap_or_default(),
            // Stopped on purpose: there is no failure to come.
            Err(_) => std::future::pending().await,
        }
    }

    /// Makes a snapshot now, whatever the log's length.
    ///
    /// # Errors
    /// When Raft has stopped.
    pub async fn snapshot(&self) -> Result<(), NotLeader> {
        self.raft.trigger().snapshot().await.map_err(|_| self.not_leader(false))
    }

    /// Figures for the status.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        let metrics = self.raft.metrics().borrow().clone();
        let index = |id: Option<super::types::LogId>| id.map_or(0, |id| id.index);
        let membership = metrics.membership_config.membership();
        let voters: Vec<u64> = membership.voter_ids().collect();
        let members = membership.nodes().map(|(id, node)| Member {
            id: *id,
            address: self.network.address(*id, &node.addr),
            leader: metrics.current_leader == Some(*id),
            voter: voters.contains(id),
            matched: metrics.replication.as_ref().and_then(|r| r.get(id)).map_or(0, |id| index(*id)),
        });
        RaftStatus {
            id: self.id,
            term: metrics.current_term,
            leader: self.leadership.borrow().leader.clone(),
            last_log: metrics.last_log_index.unwrap_or(0),
            applied: index(metrics.last_applied),
            snapshot: index(metrics.snapshot),
            purged: index(metrics.purged),
            members: members.collect(),
        }
    }

    /// Stops this master: no more answers, everything on disk, the directory free. Bounded.
    pub async fn shutdown(&self) {
        self.network.close();
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in &tasks {
            task.abort();
        }
        match timeout(STOP_TIME, self.raft.shutdown()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "Raft ended badly"),
            Err(_) => tracing::warn!("Raft did not end within {STOP_TIME:?}"),
        }
        for task in tasks {
            // Aborted above: an error here only says so.
            drop(task.await);
        }
        let (log, store) = (self.log.clone(), Arc::clone(&self.shared.store));
        let closing = self.env.blocking(move || {
            log.close();
            store.close()
        });
        match timeout(CLOSE_TIME, closing).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the state store was not closed cleanly"),
            Err(_) => tracing::warn!("the files were not closed within {CLOSE_TIME:?}"),
        }
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

fn raft_settings(env: &Env, config: &RaftConfig) -> Result<Config, StartError> {
    if !config.peers.contains_key(&config.id) {
        return Err(StartError::Usage(format!("master {} is not among the peers", config.id)));
    }
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let (least, most) = (millis(config.election.0), millis(config.election.1));
    // openraft would draw the time-out from a generator of its own. We draw it here, each master from its own part of
    // the range, so that two masters seldom want to lead at the same moment and a simulation repeats.
    let part = most.saturating_sub(least) / config.peers.len() as u64;
    let rank = config.peers.keys().take_while(|id| **id < config.id).count() as u64;
    let election = least + rank * part + env.random() % part.max(1);
    let settings = Config {
        cluster_name: config.cluster_id.clone(),
        heartbeat_interval: millis(config.heartbeat),
        election_timeout_min: election,
        election_timeout_max: election + 1,
        // Snapshots are due when the state machine says so: how often depends on their size.
        snapshot_policy: SnapshotPolicy::Never,
        // The log is purged by `purge` below, never by openraft's own rule.
        max_in_snapshot_log_to_keep: u64::MAX,
        ..Config::default()
    };
    settings.validate().map_err(|error| StartError::Usage(format!("Raft's times: {error}")))
}

async fn open(env: &Env, config: &RaftConfig) -> Result<Opened, StartError> {
    let others = config.join || config.peers.len() > 1;
    match &config.storage {
        Storage::Sim(storage) => recover::open_sim(storage, &config.cluster_id, config.id, others),
        Storage::Disk => {
            let (disks, dir, cluster) = (env.clone(), config.dir.clone(), config.cluster_id.clone());
            let (id, cache, reserve) = (config.id, config.state_cache_bytes, config.reserve_bytes);
            env.blocking(move || Ok(recover::open_disk(&disks, &dir, &cluster, id, others, cache, reserve)))
                .await
                .unwrap_or_else(|error| Err(StartError::Failed(error.to_string())))
        }
    }
}

/// A log that lost its end while the state kept it would begin after the newest snapshot: followers could not be brought
/// up to date. So the state is made a snapshot before anything else.
async fn snapshot_what_the_log_lacks(log: &LogStore, shared: &Arc<Shared>) -> std::io::Result<()> {
    let (applied, _) = shared.applied();
    let (_, last) = log.ends()?;
    let newest = shared.snapshots.list()?.first().and_then(|(meta, _)| meta.last_log_id);
    if applied > last && applied > newest {
        tracing::warn!(
            ?applied,
            ?last,
            "the log ends before the state does: its last entries were lost, the state has them"
        );
        shared.begin_snapshot().build().await?;
    }
    Ok(())
}

/// Has a snapshot made whenever one is due and there is room for it.
async fn take_snapshots(raft: Raft, shared: Arc<Shared>) {
    let (mut due, mut room) = (shared.snapshots_due(), shared.room.changes());
    // One may have become due before this task began to listen.
    due.mark_changed();
    while due.changed().await.is_ok() {
        if *due.borrow_and_update() == 0 {
            continue;
        }
        room.borrow_and_update();
        while !shared.has_room_for_a_snapshot() {
            tracing::warn!("no snapshot is made: there is no room on the disk");
            if timeout(ROOM_AGAIN, room.changed()).await.is_ok_and(|changed| changed.is_err()) {
                return;
            }
        }
        if let Err(error) = raft.trigger().snapshot().await {
            tracing::debug!(%error, "no snapshot was made");
            return;
        }
    }
}

/// Looks how much room there is on the disk; without any this master does not want to lead.
async fn watch_room(shared: Arc<Shared>) {
    loop {
        let looking = Arc::clone(&shared);
        match shared.env.blocking(move || Ok(looking.room.look())).await {
            Ok(Level::None) => drop(shared.elections.bar(Bar::NoRoom)),
            Ok(Level::Short | Level::Plenty) => drop(shared.elections.lift(Bar::NoRoom)),
            Err(error) => tracing::warn!(%error, "cannot look for room on the disk"),
        }
        sleep(room::LOOK).await;
    }
}

/// Purges the log up to where two snapshots make it superfluous.
async fn purge(raft: Raft, mut upto: watch::Receiver<Option<u64>>) {
    while upto.changed().await.is_ok() {
        let index = *upto.borrow_and_update();
        if let Some(index) = index
            && let Err(error) = raft.trigger().purge_log(index).await
        {
            tracing::debug!(%error, "the log was not purged");
            return;
        }
    }
}

/// Lets this master vote and lead from now on.
///
/// # Errors
/// When that cannot be noted durably.
pub async fn end_joining(shared: &Arc<Shared>) -> std::io::Result<()> {
    if shared.joining.active() {
        let joining = Arc::clone(shared);
        shared.env.blocking(move || joining.joining.end()).await?;
        shared.elections.lift(Bar::Joining);
    }
    Ok(())
}

/// Makes a cluster where there is none: a single master at once; of several, the one with the lowest number, once it has
/// heard from all others that they have none either.
async fn form_cluster(
    raft: Raft,
    network: Network,
    shared: Arc<Shared>,
    id: u64,
    peers: BTreeMap<u64, String>,
) {
    if peers.keys().next() != Some(&id) {
        return;
    }
    let mut asked_at_all = false;
    loop {
        match raft.is_initialized().await {
            Ok(false) => {}
            Ok(true) | Err(_) => return,
        }
        let mut all_empty = true;
        for (other, address) in peers.iter().filter(|(other, _)| **other != id) {
            match probe(&network.peer(*other, address), 0, PROBE_TIME).await {
                Ok(row) if !row.initialized => {}
                Ok(_) => {
                    if !asked_at_all {
                        tracing::info!(master = other, "there is a cluster already, waiting to be taken in");
                    }
                    asked_at_all = true;
                    all_empty = false;
                }
                Err(_) => all_empty = false,
            }
        }
        if all_empty {
            if let Err(error) = end_joining(&shared).await {
                tracing::error!(%error, "cannot form a cluster");
                return;
            }
            let members: BTreeMap<u64, BasicNode> =
                peers.iter().map(|(id, address)| (*id, BasicNode::new(address))).collect();
            network.begins();
            match raft.initialize(members).await {
                Ok(()) => tracing::info!(masters = peers.len(), "formed a new cluster"),
                Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                Err(error) => tracing::error!(%error, "cannot form a cluster"),
            }
            return;
        }
        sleep(PROBE_EVERY).await;
    }
}

/// What is told of who leads.
#[derive(Default)]
pub(super) struct Lead {
    leads: watch::Sender<Leadership>,
    /// This master is handing over: it does not say any more that it leads.
    leaving: AtomicBool,
}

impl Lead {
    fn publish(&self, leadership: Leadership) {
        self.leads.send_if_modified(|known| {
            if leadership.leading && self.leaving.load(Ordering::Acquire) {
                return false;
            }
            let changed = *known != leadership;
            *known = leadership;
            changed
        });
    }

    /// From now on this master does not say that it leads.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
        let term = self.leads.borrow().term;
        self.publish(Leadership { leading: false, term, leader: None });
    }

    /// If it leads, it says so again.
    pub(super) fn stay(&self) {
        self.leaving.store(false, Ordering::Release);
    }
}

/// Watches openraft: who leads, and whether it has stopped.
struct Watcher {
    id: u64,
    raft: Raft,
    network: Network,
    lead: Arc<Lead>,
    fails: watch::Sender<Option<String>>,
    alone: Arc<AtomicBool>,
}

impl Watcher {
    async fn run(self) {
        let mut metrics = self.raft.server_metrics();
        loop {
            let seen = metrics.borrow_and_update().clone();
            let membership = seen.membership_config.membership();
            // A learner may be a voter before this is heard of: whoever has one is not alone.
            let mut nodes = membership.nodes().map(|(id, _)| *id);
            self.alone.store(nodes.next() == Some(self.id) && nodes.next().is_none(), Ordering::Release);
            let leader = seen
                .current_leader
                .and_then(|id| membership.get_node(&id).map(|node| self.network.address(id, &node.addr)));
            let term = seen.vote.leader_id().term;
            let is_leader = seen.state == ServerState::Leader && seen.current_leader == Some(self.id);
            let leaving = self.lead.leaving.load(Ordering::Acquire);
            let leads = is_leader && !leaving;
            let leader = leader.filter(|_| !(is_leader && leaving));
            let known = self.lead.leads.borrow().clone();
            if leads && known.leading && known.term == term {
                // The membership has changed, or it is time to look after the majority.
                if self.majority_lost() {
                    tracing::warn!(term, "no majority of masters answers: this master no longer leads");
                    self.lead.publish(Leadership { leading: false, term, leader: None });
                }
            } else if leads {
                self.lead.publish(Leadership { leading: false, term, leader: None });
                match timeout(STOP_TIME, self.take_office()).await {
                    Ok(Ok(())) => {
                        tracing::info!(term, "this master leads");
                        self.lead.publish(Leadership { leading: true, term, leader });
                    }
                    Ok(Err(RaftError::Fatal(_))) => {}
                    Ok(Err(RaftError::APIError(_))) | Err(_) => {
                        tokio::select! {
                            () = sleep(RETRY) => continue,
                            changed = metrics.changed() => if changed.is_ok() { continue },
                        }
                    }
                }
            } else {
                if known.leading {
                    tracing::info!(term, ?leader, "this master no longer leads");
                }
                self.lead.publish(Leadership { leading: false, term, leader });
            }
            match timeout(MAJORITY_LOST / 4, metrics.changed()).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(_)) => break,
            }
        }
        self.lead.publish(Leadership::default());
        let running = self.raft.metrics().borrow().running_state.clone();
        let reason = match running {
            Err(Fatal::Stopped) => return,
            Err(error) => error.to_string().replace('\n', " "),
            Ok(()) => "Raft has ended unexpectedly".to_owned(),
        };
        tracing::error!(%reason, "this master cannot go on and stops");
        self.fails.send_replace(Some(reason));
    }

    /// Answers when a majority has confirmed this leader, and everything that it or leaders before it may have acknowledged is applied:
    /// all of its log, as none of it can be lost any more. Confirmation alone does not say so of a leader that was started again and
    /// still leads in its old term: how much of that term is committed it knows only when the others have answered.
    async fn take_office(&self) -> Result<(), RaftError<u64, CheckIsLeaderError<u64, BasicNode>>> {
        let last = self.raft.metrics().borrow().last_log_index;
        self.raft.ensure_linearizable().await?;
        if self.raft.wait(None).applied_index_at_least(last, "all of the log").await.is_err() {
            // Raft has stopped: it says why.
            self.raft.ensure_linearizable().await?;
        }
        Ok(())
    }

    fn majority_lost(&self) -> bool {
        let silent = self.raft.metrics().borrow().millis_since_quorum_ack;
        !self.alone.load(Ordering::Acquire)
            && silent.is_some_and(|ms| Duration::from_millis(ms) > MAJORITY_LOST)
    }
}
