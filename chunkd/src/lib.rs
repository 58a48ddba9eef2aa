//! The chunk daemon: append-only, replicated, checksummed files of bytes.
//!
//! `store/` has the files, `server/` what clients and other daemons ask, `replica.rs` the forwarding to other daemons,
//! `control.rs` the stream to the master, `identity.rs` whose data directories these are.

pub mod config;
mod control;
mod copy;
mod gather;
mod identity;
mod replica;
mod server;
pub mod store;
pub mod terms;

pub use config::Config;
pub use identity::StartError;

use control::{Control, NodeInfo};
use copy::Copier;
use dfs_env::Env;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::limits::MESSAGE_MAX;
use dfs_proto::token::ClusterKey;
use dfs_proto::v1;
use server::{ChunkService, Context};
use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use store::Store;
use store::dirs::Dirs;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long a clean stop waits for connections to end, and for the disk.
const STOP_CONNECTIONS: Duration = Duration::from_secs(2);
const STOP_SYNC: Duration = Duration::from_secs(15);

/// Locks a mutex. One whose holder panicked is used on: what it guards is changed in single steps.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running chunk daemon. Dropping it stops it without a last sync.
pub struct Daemon {
    address: String,
    node: u64,
    store: Store,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    _locks: Vec<Box<dyn Any + Send + Sync>>,
}

impl Daemon {
    /// Opens the data directories, listens, and begins to look for the leading master. Appends and reads are served
    /// from here on.
    ///
    /// # Errors
    /// [`StartError`]: one clear line, for exit status 2 or 1.
    pub async fn start(env: Env, config: Config) -> Result<Self, StartError> {
        let key = read_key(&env, &config)?;
        let cluster = key.cluster_id();
        // Before anything is claimed: a start on a port in use leaves no new data directory behind.
        let listener =
            env.net.listen(&config.listen).await.map_err(|error| {
                StartError::Failed(format!("cannot listen on {}: {error}", config.listen))
            })?;
        let (claiming, paths, id) = (env.clone(), config.data.clone(), cluster.clone());
        let claim = env
            .blocking(move || Ok(identity::claim(&claiming, &paths, &id)))
            .await
            .map_err(|error| StartError::Failed(error.to_string()))??;
        let listening = listener
            .address()
            .map_err(|error| StartError::Failed(format!("cannot listen on {}: {error}", config.listen)))?;
        let address = config.advertise.unwrap_or(listening);
        let reserve = config.reserve.get();
        let dirs =
            Dirs::new(env.clone(), claim.dirs, config.capacity.map(dfs_proto::units::ByteSize::get), reserve);
        let store = Store::open(env.clone(), dirs, &cluster).await;
        let (stop, stopping) = watch::channel(false);
        let context = Arc::new(Context::new(
            env.clone(),
            store.clone(),
            key.clone(),
            claim.node,
            address.clone(),
            stopping.clone(),
        ));
        let service = v1::chunk_server::ChunkServer::new(ChunkService(context))
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        let mut stopped = stopping.clone();
        let serving = rpc::server(Tuning::default()).add_service(service).serve_with_incoming_shutdown(
            rpc::incoming(listener),
            async move {
                drop(stopped.wait_for(|stopping| *stopping).await);
            },
        );
        let info = NodeInfo {
            node: claim.node,
            instance: env.random(),
            address: address.clone(),
            host: config.host.unwrap_or_else(hostname),
            rack: config.rack,
        };
        let (masters, terms) = (config.masters, Arc::new(claim.terms));
        let copier = Arc::new(Copier::new(env.clone(), store.clone(), key.clone()));
        let told = Arc::default();
        let control = Control { env, store: store.clone(), copier, key, masters, told, info, terms };
        let (scrubbed, mut stopped) = (store.clone(), stopping.clone());
        let scrub = async move {
            tokio::select! {
                () = scrubbed.scrub(config.scrub_bandwidth.get()) => {}
                _ = stopped.wait_for(|stopping| *stopping) => {}
            }
        };
        let tasks = vec![
            tokio::spawn(async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "the server ended");
                }
            }),
            tokio::spawn(control.run(stopping)),
            tokio::spawn(scrub),
        ];
        tracing::info!(node = claim.node, address, cluster, "the chunk daemon serves");
        Ok(Self { address, node: claim.node, store, stop, tasks, _locks: claim.locks })
    }

    /// What others reach this daemon by.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// This daemon's number.
    #[must_use]
    pub fn node(&self) -> u64 {
        self.node
    }

    /// The chunks it holds, for checkers.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Ends all streams, makes everything durable that was written, and lets go of the data directories. Bounded.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        let ended = futures::future::join_all(self.tasks.iter_mut());
        if tokio::time::timeout(STOP_CONNECTIONS, ended).await.is_err() {
            tracing::debug!("some connections did not end in time and are dropped");
        }
        for task in &self.tasks {
            task.abort();
        }
        if tokio::time::timeout(STOP_SYNC, self.store.sync_all()).await.is_err() {
            tracing::warn!("the disk did not finish the last sync within {STOP_SYNC:?}");
        }
    }
}

fn read_key(env: &Env, config: &Config) -> Result<ClusterKey, StartError> {
    let path = config.cluster_key_file.display();
    let secret = env
        .disk
        .read(&config.cluster_key_file)
        .map_err(|error| StartError::Usage(format!("cluster key {path}: {error}")))?;
    ClusterKey::new(&secret).map_err(|error| StartError::Usage(format!("cluster key {path}: {error}")))
}

/// This machine's name.
fn hostname() -> String {
    let mut name = [0_u8; 256];
    // SAFETY: the buffer is writable and one byte longer than told, so the name ends with a zero byte.
    let result = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    if result != 0 {
        tracing::warn!("this machine has no name; \"localhost\" stands for its failure domain");
        return "localhost".to_owned();
    }
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..length]).into_owned()
}
