//! The chunks that this session appends to, and the pools that they are taken from. Pure.

use super::Policy;
use dfs_proto::limits::TOKEN_TTL_MS;
use dfs_proto::v1::ChunkAccess;
use dfs_proto::{ChunkId, Epoch, FsError, InodeNo};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Bytes of one chunk that may be sent and not acknowledged: enough to keep three disks busy, few enough that a
/// small file does not wait long behind a large one.
pub const WINDOW_BYTES: u64 = 8 << 20;
/// Records of one chunk that may be sent and not acknowledged.
pub const WINDOW_RECORDS: usize = 1024;
/// Records of all chunks together that may be sent and not acknowledged.
pub const WINDOW_ALL: usize = 4096;
/// Chunks that a pool appends to at the same time.
pub const OPEN_MAX: usize = 2;
/// A second chunk is opened when the first has this many bytes in flight.
pub const CONGESTED_BYTES: u64 = 4 << 20;
/// Chunks that are not settled yet; with tiny chunks this bounds the bookkeeping.
pub const CHUNKS_MAX: usize = 8192;
/// Seals that the master has not answered.
pub const SEALS_MAX: usize = 4096;
/// A record up to this long is not torn in two to fill a chunk's last bytes.
pub const KEEP_WHOLE: usize = 64 << 10;
/// How fast a disk syncs at least, in bytes a second: what lengthens the bound on a sync.
const SYNC_RATE: u64 = 8 << 20;

/// A chunk with records that are not all committed, or with room for more.
#[derive(Debug)]
pub struct OpenChunk {
    pub access: ChunkAccess,
    pub policy: Policy,
    /// Where the next record goes; all below is sent.
    pub end: u64,
    /// Every replica has it up to here.
    pub acked: u64,
    /// Every replica has it on disk up to here.
    pub synced: u64,
    /// A sync up to here was asked of the daemons.
    pub sync_sent: u64,
    /// A sync up to here is needed.
    pub want_sync: u64,
    /// Ends of the records sent and not acknowledged, in order.
    pub unacked: VecDeque<u64>,
    /// Whose records are not committed yet, by the records' ends.
    pub records: BTreeMap<u64, InodeNo>,
    /// Takes no more records: full, or its token grows old.
    pub retired: bool,
    pub opened_at: Duration,
    /// When the last acknowledgement came, or the first append after everything was acknowledged went out.
    pub progress_at: Duration,
}

impl OpenChunk {
    #[must_use]
    pub fn new(spare: Spare, policy: Policy, now: Duration) -> Self {
        Self {
            access: spare.access,
            policy,
            end: 0,
            acked: 0,
            synced: 0,
            sync_sent: 0,
            want_sync: 0,
            unacked: VecDeque::new(),
            records: BTreeMap::new(),
            retired: false,
            opened_at: spare.since,
            progress_at: now,
        }
    }

    #[must_use]
    pub fn id(&self) -> ChunkId {
        ChunkId(self.access.chunk)
    }

    #[must_use]
    pub fn epoch(&self) -> Epoch {
        Epoch(self.access.epoch)
    }

    /// Who appends are sent to.
    #[must_use]
    pub fn address(&self) -> &str {
        self.access.replicas.first().map_or("", |replica| replica.address.as_str())
    }

    #[must_use]
    pub fn room(&self) -> u64 {
        self.access.capacity - self.end
    }

    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.end - self.acked
    }

    #[must_use]
    pub fn has_window(&self) -> bool {
        self.in_flight() < WINDOW_BYTES && self.unacked.len() < WINDOW_RECORDS
    }

    /// Whether the daemons owe an answer.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.acked < self.end || self.synced < self.sync_sent
    }

    /// Whether it can be sealed: nothing comes any more, nothing is owed.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.retired && self.records.is_empty() && !self.is_waiting()
    }

    /// How long it may make no progress. A sync takes as long as the disks need for what it covers.
    #[must_use]
    pub fn patience(&self, append_progress: Duration, failures: u32) -> Duration {
        // After failures in a row the cluster is slow rather than broken: giving up faster would only add load.
        let base = append_progress * (1 << failures.min(2));
        if self.sync_sent <= self.synced {
            return base;
        }
        base * 2 + Duration::from_millis((self.sync_sent - self.synced) * 1000 / SYNC_RATE)
    }
}

/// A chunk that was allocated ahead.
#[derive(Debug)]
pub struct Spare {
    pub access: ChunkAccess,
    pub since: Duration,
}

/// Whether a token of this age should not begin anything any more.
#[must_use]
pub fn is_old(since: Duration, now: Duration) -> bool {
    now.saturating_sub(since) > Duration::from_millis(TOKEN_TTL_MS / 2)
}

/// The chunks of one policy.
#[derive(Debug, Default)]
pub struct Pool {
    pub open: Vec<ChunkId>,
    pub spares: VecDeque<Spare>,
    /// An allocation that is not answered.
    pub allocating: bool,
    /// Bytes in queued runs.
    pub queued: u64,
    /// Chunks given up since the last commit that went through.
    pub failures: u32,
    /// Allocations refused in a row.
    pub refusals: u32,
    /// No record is sent and no chunk asked for before.
    pub hold_until: Duration,
    /// Why the last chunk or allocation failed.
    pub error: Option<FsError>,
    /// When daemons last said that all of them have plenty of room; None: one of them had not.
    pub roomy_at: Option<Duration>,
}

impl Pool {
    /// How many chunks to ask for: what the queue needs, and one ahead.
    #[must_use]
    pub fn wanted(&self, policy: Policy, most: u32) -> u32 {
        let needed = self.queued.div_ceil(policy.chunk_size.max(1)) + 1;
        u32::try_from(needed).unwrap_or(u32::MAX).clamp(2, most)
    }

    /// Whether there is too little ahead.
    #[must_use]
    pub fn is_short(&self, policy: Policy) -> bool {
        let spares = self.spares.len() as u64;
        spares == 0 || (self.queued > spares.saturating_mul(policy.chunk_size) && spares < 64)
    }

    /// Waits longer after each failure in a row, up to a second; the first one costs nothing.
    pub fn back_off(&mut self, now: Duration, error: FsError) {
        self.error = Some(error);
        let in_a_row = self.failures + self.refusals;
        if in_a_row > 1 {
            let wait = Duration::from_millis(50) * (1 << (in_a_row - 2).min(5));
            self.hold_until = now + wait.min(Duration::from_secs(1));
        }
    }
}
