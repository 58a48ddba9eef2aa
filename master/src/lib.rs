//! The master: namespace, permissions, chunk map and placement, replicated by Raft.
//!
//! `state/` says what a command does, purely. `raft/` orders commands and keeps them. `leases/`, `placement.rs`, `repair.rs`,
//! `compact.rs`, `review.rs` and `seal.rs` decide what the leader keeps in memory or does in the background, purely too. `server/`
//! connects them with clients and chunk daemons.

pub mod compact;
pub mod config;
pub mod leases;
pub mod operate;
pub mod placement;
pub mod raft;
pub mod repair;
pub mod review;
pub mod seal;
pub mod server;
pub mod state;

pub use config::{Config, ConfigError};
pub use raft::StartError;

use dfs_env::{Env, Listener, rpc};
use raft::RaftConfig;
use server::{Settings, Shared};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long a stop waits for streams to end, and for everything together.
const STREAMS_END: Duration = Duration::from_secs(2);
const STOP: Duration = Duration::from_secs(10);

/// A running master. Dropped without [`Master::shutdown`] it goes on until the runtime ends.
pub struct Master {
    shared: Arc<Shared>,
    address: String,
    leader: JoinHandle<()>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    stop: Option<oneshot::Sender<()>>,
}

/// Starts a master: takes its port, opens its data, joins its group, serves.
///
/// # Errors
/// [`StartError::Usage`] for settings or a data directory that cannot be used, [`StartError::Failed`] for anything else;
/// one line each.
pub async fn start(env: Env, config: Config) -> Result<Master, StartError> {
    config.validate().map_err(|error| StartError::Usage(error.to_string()))?;
    let listener = listen(&env, &config.listen).await?;
    let bound = listener.address().map_err(|error| {
        StartError::Failed(format!("cannot tell the address of {}: {error}", config.listen))
    })?;
    let address = advertised(&config, &bound);
    let node = raft::Node::start(env.clone(), raft_config(&config, &address)).await?;
    let settings = Settings {
        replicas: config.replicas,
        chunk_size: config.chunk_size,
        session_ttl: Duration::from_millis(config.session_ttl_ms),
        root_squash: config.root_squash,
        repair_bandwidth: config.repair_bandwidth,
        keep_deleted: config.keep_deleted,
        compaction_bandwidth: config.compaction_bandwidth,
        compact_after: Duration::from_millis(config.compact_after_ms),
    };
    let shared = Shared::new(env, Arc::clone(&node), config.key, address.clone(), settings);
    let (stop, stopped) = oneshot::channel();
    let router = rpc::server(rpc::Tuning::default())
        .add_service(node.service())
        .add_service(shared.session_service())
        .add_service(shared.control_service())
        .add_service(shared.admin_service());
    let server = tokio::spawn(async move {
        // The sender is dropped or used: either way it is time to stop.
        let stopped = async move { drop(stopped.await) };
        router.serve_with_incoming_shutdown(rpc::incoming(listener), stopped).await
    });
    let leader = tokio::spawn(server::run(Arc::clone(&shared)));
    Ok(Master { shared, address, leader, server, stop: Some(stop) })
}

async fn listen(env: &Env, address: &str) -> Result<Box<dyn Listener>, StartError> {
    env.net.listen(address).await.map_err(|error| {
        let why = if error.kind() == std::io::ErrorKind::AddrInUse {
            "the port is in use".to_owned()
        } else {
            error.to_string()
        };
        StartError::Failed(format!("cannot listen on {address}: {why}"))
    })
}

/// How others reach this master: with port 0 the port is known only now.
fn advertised(config: &Config, bound: &str) -> String {
    let wanted = config.advertised();
    match (wanted.rsplit_once(':'), bound.rsplit_once(':')) {
        (Some((host, "0")), Some((_, port))) => format!("{host}:{port}"),
        _ => wanted.to_owned(),
    }
}

fn raft_config(config: &Config, address: &str) -> RaftConfig {
    let mut peers = config.peers.clone();
    if peers.is_empty() {
        peers.insert(config.id, address.to_owned());
    }
    let election = Duration::from_millis(config.raft_election_ms);
    RaftConfig {
        id: config.id,
        address: address.to_owned(),
        peers,
        join: config.join,
        dir: config.data.clone(),
        cluster_id: config.key.cluster_id(),
        key: config.key.clone(),
        reserve_bytes: config.reserve_bytes,
        state_cache_bytes: config.state_cache_bytes,
        snapshot_every_entries: config.snapshot_every_entries,
        heartbeat: Duration::from_millis(config.raft_heartbeat_ms),
        election: (election, election * 2),
        storage: config.storage.clone(),
    }
}

impl Master {
    /// `host:port` that clients, chunk daemons and other masters reach it by.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its part in the Raft group.
    #[must_use]
    pub fn node(&self) -> &Arc<raft::Node> {
        &self.shared.node
    }

    /// Returns why, when this master cannot go on: its disk has failed, say.
    pub async fn failed(&self) -> String {
        self.shared.node.failed().await
    }

    /// Hands over to another master if this one leads, stops serving, then stops the log. Bounded: what does not end in
    /// time is left.
    pub async fn shutdown(mut self) {
        if let Err(reason) = self.shared.node.hand_over(true).await {
            tracing::info!(%reason, "stopping without a successor");
        }
        self.shared.stop();
        let stop = async {
            if let Err(error) = (&mut self.leader).await {
                tracing::error!(%error, "the leader's task ended");
            }
            drop(self.stop.take());
            if tokio::time::timeout(STREAMS_END, &mut self.server).await.is_err() {
                // Streams of peers that do not read, and the other masters' streams.
                self.server.abort();
            }
            self.shared.node.shutdown().await;
        };
        if tokio::time::timeout(STOP, stop).await.is_err() {
            tracing::warn!("stopped before everything had ended");
            self.leader.abort();
            self.server.abort();
        }
    }
}
