//! What the data plane and the file system operations need of a master: one session that reconnects by itself.

use async_trait::async_trait;
use dfs_proto::v1::{self, Cred, Timestamp};
use dfs_proto::{FsResult, SessionId};
use tokio::sync::watch;

/// The cluster's policy for new chunks, as the master's welcome named it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// How many replicas a chunk has unless its file's policy says otherwise.
    pub replicas: u32,
    /// How many payload bytes a chunk holds unless its file's policy says otherwise.
    pub chunk_size: u64,
}

/// A session with the cluster's leading master. It reconnects by itself, repeats mutations under the same sequence
/// number, and bounds every wait by the operation time-out.
#[async_trait]
pub trait Master: Send + Sync + 'static {
    /// Carries out a change exactly once. The answer is never `Body::Failure`: that becomes the error.
    async fn mutate(&self, cred: &Cred, change: v1::mutation::Op) -> FsResult<v1::answer::Body>;

    /// Asks a question. The answer is never `Body::Failure`.
    async fn query(&self, cred: &Cred, question: v1::query::Op) -> FsResult<v1::answer::Body>;

    /// An ephemeral operation: opens, locks, seals. The answer is never `Body::Failure`.
    async fn hold(&self, cred: &Cred, hold: v1::hold::Op) -> FsResult<v1::answer::Body>;

    /// The time in the master's clock, for write times.
    fn now(&self) -> Timestamp;

    /// The session as it is now.
    fn session(&self) -> SessionId;

    /// The cluster's policy for new chunks.
    fn defaults(&self) -> Defaults;

    /// A new value means that the old session expired: its chunks can no longer be appended to, and what was not
    /// committed must be sent again.
    fn session_changed(&self) -> watch::Receiver<SessionId>;
}
