//! What a client needs to know to reach a cluster and how much memory and patience it has.

use dfs_proto::limits;
use std::time::Duration;

/// The settings of one client. [`crate::settings`] reads them from `client.toml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientConfig {
    /// The masters' addresses, `host:port`. One that answers is enough: it names the leader.
    pub masters: Vec<String>,
    /// What `dfs status` shows for this client.
    pub name: String,
    /// The machine it runs on; decides which replica is local.
    pub host: String,
    /// Only this cluster will do; empty: whichever answers.
    pub cluster_id: String,
    /// Memory for bytes that are not committed yet, in bytes.
    pub write_memory: u64,
    /// Memory for bytes that were read, in bytes.
    pub read_cache: u64,
    /// How far ahead of a sequential reader bytes are fetched, in bytes.
    pub readahead: u64,
    /// How long an operation may wait for the cluster; `None`: for ever.
    pub operation_timeout: Option<Duration>,
    /// How long the first connect may take.
    pub connect_timeout: Duration,
    /// How long an append may make no progress before the chunk is given up.
    pub append_progress: Duration,
    /// Reading leaves the access time alone.
    pub noatime: bool,
    /// A close through a mount waits until what was written is durable, however well everything goes.
    pub flush_on_close: bool,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            masters: Vec::new(),
            name: String::new(),
            host: String::new(),
            cluster_id: String::new(),
            write_memory: limits::WRITE_MEMORY,
            read_cache: limits::READ_CACHE,
            readahead: 16 << 20,
            operation_timeout: Some(Duration::from_millis(limits::OPERATION_MS)),
            connect_timeout: Duration::from_secs(10),
            append_progress: Duration::from_millis(limits::APPEND_PROGRESS_MS),
            noatime: false,
            flush_on_close: true,
        }
    }
}

impl ClientConfig {
    /// The defaults for a cluster with these masters.
    #[must_use]
    pub fn new(masters: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { masters: masters.into_iter().map(Into::into).collect(), ..Self::default() }
    }
}
