//! Consensus: the replicated log, the state store that it is applied to, snapshots, and the way to the other masters.
//!
//! [`Node`] is all that the rest of the master sees: it proposes commands, waits until reads are safe, and watches who
//! leads. Below it, openraft decides; `log` and `disk_log` keep what it must not forget, `store` applies entries and
//! builds snapshots, `network` and `service` carry its messages, `recover` brings the parts in line at a start. `backup`
//! and `restore` are what an operator does to all of it.

mod auth;
mod backup;
mod buffered;
mod codec;
mod confirm;
mod disk_log;
mod elections;
mod export;
#[cfg(test)]
mod flips;
#[cfg(fuzzing)]
pub mod fuzz;
mod handover;
mod identity;
mod joining;
mod log;
mod members;
#[cfg(test)]
mod members_tests;
mod network;
mod node;
mod propose;
mod recover;
mod restore;
mod room;
mod service;
mod sim;
mod sim_kv;
mod sled_kv;
mod snapshot;
mod store;
mod survivor;
#[cfg(test)]
mod tests;
mod types;

pub use backup::{Backup, check as check_backup};
pub use export::Piece;
pub use members::ChangeError;
pub use node::Node;
pub use restore::{Restore, Restored};
pub use service::RaftService;
pub use sim::{Crashed, SimStorage};
pub use survivor::{BEFORE as BEFORE_RECOVERY, recover as recover_alone};

use dfs_proto::token::ClusterKey;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What a master needs to know to take part.
#[derive(Clone)]
pub struct RaftConfig {
    /// This master's number, among those of `peers`.
    pub id: u64,
    /// `host:port` under which the other masters and clients reach this one.
    pub address: String,
    /// The masters that the cluster begins with, this one included.
    pub peers: BTreeMap<u64, String>,
    /// There is a cluster, to which this master is or will be added: it forms none.
    pub join: bool,
    /// The data directory; not used with simulated storage.
    pub dir: PathBuf,
    /// The name that the cluster key gives the cluster.
    pub cluster_id: String,
    pub key: ClusterKey,
    /// Bytes that are kept free on the disk of the data directory (room.rs); 0: none.
    pub reserve_bytes: u64,
    /// Memory for the state store's cache.
    pub state_cache_bytes: u64,
    /// A snapshot is made each time that so many entries were applied; a large state is written less often.
    pub snapshot_every_entries: u64,
    /// A leader shows that it lives so often.
    pub heartbeat: Duration,
    /// Followers wait for a new leader between these bounds before they want to lead.
    pub election: (Duration, Duration),
    pub storage: Storage,
}

impl RaftConfig {
    /// The default times: a heartbeat each 100 ms, elections after 300 to 600 ms.
    pub const HEARTBEAT: Duration = Duration::from_millis(100);
    pub const ELECTION: (Duration, Duration) = (Duration::from_millis(300), Duration::from_millis(600));
}

/// Where a master keeps its log and state.
#[derive(Clone)]
pub enum Storage {
    Disk,
    /// In memory that outlives a restart of the simulated master.
    Sim(Arc<SimStorage>),
}

/// Why a master could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Wrong settings, or a directory of somebody else: exit status 2.
    #[error("{0}")]
    Usage(String),
    /// Exit status 1.
    #[error("{0}")]
    Failed(String),
}

/// This master does not lead, or stopped leading before the outcome was known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", if *.unknown { "the outcome is unknown: the leader has changed or lost its majority" } else { "this master does not lead" })]
pub struct NotLeader {
    /// Who leads, where that is known: `host:port`.
    pub leader: Option<String>,
    /// The command may or may not be carried out: the client must repeat it with the same operation id.
    pub unknown: bool,
}

/// Who leads, as far as this master knows.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Leadership {
    /// This master leads, was confirmed by a majority, and has applied everything from before its term.
    pub leading: bool,
    pub term: u64,
    /// `host:port` of the leader.
    pub leader: Option<String>,
}

/// A master as the status shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub id: u64,
    pub address: String,
    pub leader: bool,
    pub voter: bool,
    /// The last entry known to be in its log; 0 unless this master leads.
    pub matched: u64,
}

/// Figures about Raft. Indexes of entries; 0 where there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftStatus {
    pub id: u64,
    pub term: u64,
    pub leader: Option<String>,
    pub last_log: u64,
    pub applied: u64,
    pub snapshot: u64,
    pub purged: u64,
    pub members: Vec<Member>,
}
