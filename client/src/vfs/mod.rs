//! The operations on files, one family a file: what a program calls instead of the kernel.
//!
//! A request goes from here to the session (metadata) or to the data plane (bytes). The order rules of DESIGN section 5
//! are kept here: whatever names an inode in a way that shows after a crash (a new size or time, a rename, a link, a
//! copy by reference) first flushes the bytes this client holds of it.

mod alloc;
mod atime;
mod attr;
mod background;
mod change;
mod dir;
mod file;
mod files;
mod leaving;
mod locks;
mod namespace;
mod observer;
mod remains;
mod resolve;
mod statfs;
mod xattr;

pub use alloc::SeekKind;
pub use files::{OpenFile, OpenFlags, Privileges};
pub use leaving::Kernel;
pub use locks::Closing;
pub use namespace::Entry;

use crate::cache::Cache;
use crate::data::{DataConfig, DataPlane};
use crate::session::Session;
use crate::{ClientConfig, Master, settings};
use atime::Atimes;
use background::Background;
use dfs_env::Env;
use dfs_proto::limits;
use dfs_proto::v1::{self, Attr, Cred, ErrorCode};
use dfs_proto::{FsError, FsResult, InodeNo, SessionId};
use files::Files;
use locks::Closings;
use observer::Observer;
use remains::Remains;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How often access times go to the master, in one batch.
const TOUCH_INTERVAL: Duration = Duration::from_secs(3);
/// How long the end of a session, and the last access times, may take once everything is flushed.
const COURTESY: Duration = Duration::from_secs(2);

/// A client of one cluster. Cheap to clone; all clones are one session.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    pub config: ClientConfig,
    pub session: Arc<Session>,
    /// The session, seen through [`Observer`]: commits of the data plane reach the attribute cache.
    pub master: Arc<dyn Master>,
    pub data: Arc<DataPlane>,
    pub cache: Arc<Cache>,
    pub files: Arc<Files>,
    pub atimes: Atimes,
    pub background: Background,
    pub remains: Remains,
    pub closings: Arc<Closings>,
    /// Whoever caches what this client answers.
    pub kernel: OnceLock<Arc<dyn Kernel>>,
}

impl Client {
    /// Connects to the cluster.
    ///
    /// # Errors
    /// After `connect_timeout` at the latest, with one line that names the addresses tried and what each answered; at
    /// once when every master that answers refuses this client for good (another protocol version or cluster).
    pub async fn connect(env: Env, config: ClientConfig) -> FsResult<Self> {
        let (session, wanted) = Session::connect(env.clone(), &config).await?;
        let leases = session.leases();
        let cache = Arc::new(Cache::new(Arc::clone(leases), limits::ATTR_CACHE_ENTRIES));
        let master: Arc<dyn Master> = Arc::new(Observer::new(Arc::clone(&session), Arc::clone(&cache)));
        let host = if config.host.is_empty() { settings::host_name() } else { config.host.clone() };
        let data = DataPlane::new(
            env,
            Arc::clone(&master),
            DataConfig {
                write_memory: config.write_memory,
                read_cache: config.read_cache,
                append_progress: config.append_progress,
                readahead_bytes: config.readahead,
                operation_timeout: config.operation_timeout,
                ..DataConfig::default()
            },
            Arc::clone(leases),
        );
        data.prefer_host(&host);
        let client = Self {
            inner: Arc::new(Inner {
                config,
                session,
                master,
                data,
                cache,
                files: Arc::default(),
                atimes: Atimes::default(),
                background: Background::default(),
                remains: Remains::default(),
                closings: Arc::default(),
                kernel: OnceLock::new(),
            }),
        };
        tokio::spawn(leaving::run(Arc::downgrade(&client.inner), wanted));
        client.start_touching();
        Ok(client)
    }

    /// Flushes everything and ends the session. Later calls fail.
    ///
    /// # Errors
    /// When bytes could not be written within the operation time-out; the session ends all the same.
    pub async fn shutdown(&self) -> FsResult<()> {
        let bound =
            self.inner.config.operation_timeout.unwrap_or(Duration::from_millis(limits::OPERATION_MS));
        let flushed = match tokio::time::timeout(bound, self.sync()).await {
            Ok(result) => result,
            Err(_) => Err(FsError::new(
                ErrorCode::ErrorTimedOut,
                format!("not everything was written within {bound:?}"),
            )),
        };
        self.inner.session.goodbye(COURTESY).await;
        flushed
    }

    /// Ends the session as it is: what is not written is lost. Later calls fail.
    pub async fn leave(&self) {
        self.inner.session.goodbye(COURTESY).await;
    }

    /// Returns when everything written before the call is durable, as sync(2) does.
    ///
    /// # Errors
    /// The first error of a write in the background that nobody was told of.
    pub async fn sync(&self) -> FsResult<()> {
        let flushed = self.inner.data.flush_all().await;
        self.inner.background.idle().await;
        // A courtesy: it must not hold up a sync while no master answers.
        if tokio::time::timeout(COURTESY, self.inner.send_touches()).await.is_err() {
            tracing::debug!("access times were not kept: no answer");
        }
        flushed
    }

    /// The cluster's name, derived from its key.
    #[must_use]
    pub fn cluster_id(&self) -> String {
        self.inner.session.cluster_id()
    }

    /// The session's number.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.inner.master.session()
    }

    /// The session itself, for administration.
    #[must_use]
    pub fn master(&self) -> &Arc<dyn Master> {
        &self.inner.master
    }

    /// The masters' addresses, as configured.
    #[must_use]
    pub fn masters(&self) -> &[String] {
        &self.inner.config.masters
    }

    /// The address of the master that answered last: the leader, as far as is known.
    #[must_use]
    pub fn leader(&self) -> String {
        self.inner.session.leader()
    }

    fn start_touching(&self) {
        if self.inner.config.noatime {
            return;
        }
        // A weak reference: the last clone of the client ends the task.
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(TOUCH_INTERVAL).await;
                let Some(inner) = inner.upgrade() else { return };
                inner.send_touches().await;
            }
        });
    }
}

/// On whose behalf the client itself acts: what it does to keep its caches right is no user's act.
fn own_cred() -> Cred {
    Cred::default()
}

/// The attributes in an answer that must have them.
fn entry(body: v1::answer::Body) -> FsResult<Attr> {
    match body {
        v1::answer::Body::Entry(entry) => attr_of(entry.attr),
        other => Err(unexpected(&other)),
    }
}

fn attr_of(attr: Option<Attr>) -> FsResult<Attr> {
    attr.ok_or_else(|| FsError::new(ErrorCode::ErrorIo, "the master's answer lacks the attributes"))
}

/// An answer of the wrong kind: a fault of the master, never of the program.
fn unexpected(body: &v1::answer::Body) -> FsError {
    FsError::new(ErrorCode::ErrorIo, format!("the master answered something else than was asked: {body:?}"))
}

fn check_name(name: &[u8]) -> FsResult<()> {
    match name.len() {
        0 => Err(FsError::new(ErrorCode::ErrorNotFound, "an empty name")),
        length if length > limits::NAME_MAX => Err(FsError::new(
            ErrorCode::ErrorNameTooLong,
            format!("a name of {length} bytes; {} are allowed", limits::NAME_MAX),
        )),
        _ => Ok(()),
    }
}

impl Inner {
    /// From now on the file's bytes go where its attributes say: how many replicas, how large chunks.
    pub fn follow_policy(&self, attr: &Attr) {
        self.data.set_policy(InodeNo(attr.ino), attr, self.master.defaults());
    }

    /// Brings the master to know the attributes that were set on an inode, before it decides by them.
    pub async fn settle_attrs(&self, ino: InodeNo) -> FsResult<()> {
        match self.data.dirty(ino) {
            Some(dirty) if dirty.set.is_some() => self.flush_for_another(ino).await,
            _ => Ok(()),
        }
    }

    /// Flushes on behalf of somebody who wrote nothing: an error is the writer's to know as well.
    async fn flush_for_another(&self, ino: InodeNo) -> FsResult<()> {
        let flushed = self.data.flush(ino).await;
        flushed.map(drop).inspect_err(|error| self.data.keep_error(ino, error.clone()))
    }

    /// Flushes what is held of an inode, if anything.
    pub async fn flush_if_dirty(&self, ino: InodeNo) -> FsResult<()> {
        match self.data.dirty(ino) {
            Some(_) => self.flush_for_another(ino).await,
            None => Ok(()),
        }
    }
}
