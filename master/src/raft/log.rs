//! The Raft log as openraft sees it, over a directory or over simulated storage.

use super::codec;
use super::disk_log::{DiskLog, Flushed, StoredId, StoredPayload, read_error, write_error};
use super::sim::SimLog;
use super::types::{Entry, LogId, StorageError, StorageIOError, TypeConfig, Vote};
use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{AnyError, LogState, OptionalSend, RaftLogReader};
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

/// What one message to a follower holds at most: it must fit into a gRPC message and arrive within a heartbeat.
const READ_BYTES: usize = 2 << 20;

/// The log. Clones are handles to the same log.
#[derive(Clone)]
pub enum LogStore {
    Disk(DiskLog),
    Sim(SimLog),
}

impl LogStore {
    /// The last purged and the last log id.
    ///
    /// # Errors
    /// When the log is closed.
    pub fn ends(&self) -> io::Result<(Option<LogId>, Option<LogId>)> {
        match self {
            Self::Disk(log) => log.ends(),
            Self::Sim(log) => Ok(log.ends()),
        }
    }

    /// Syncs what is left and releases the directory.
    pub fn close(&self) {
        match self {
            Self::Disk(log) => log.close(),
            Self::Sim(_) => {}
        }
    }

    #[expect(clippy::result_large_err, reason = "openraft's own error, which its traits ask for")]
    fn read(&self, from: u64, to: u64, max_bytes: usize) -> Result<Vec<Entry>, StorageError> {
        let found = match self {
            Self::Disk(log) => log.read(from, to, max_bytes),
            Self::Sim(log) => Ok(log.read(from, to, max_bytes)),
        };
        found
            .and_then(|found| {
                found.into_iter().map(|(id, payload)| codec::entry(id, payload.kind, payload.data)).collect()
            })
            .map_err(|error| read_error(&error))
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        let from = match range.start_bound() {
            Bound::Included(from) => *from,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(last) => last + 1,
            Bound::Excluded(to) => *to,
            Bound::Unbounded => u64::MAX,
        };
        self.read(from, to, usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, from: u64, to: u64) -> Result<Vec<Entry>, StorageError> {
        self.read(from, to, READ_BYTES)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        let (purged, last) = self.ends().map_err(|error| read_error(&error))?;
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        let saved = match self {
            Self::Disk(log) => log.save_vote(*vote).await,
            Self::Sim(log) => log.save_vote(*vote).await,
        };
        saved.map_err(|error| StorageIOError::write_vote(AnyError::new(&error)).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        match self {
            Self::Disk(log) => {
                log.vote().map_err(|error| StorageIOError::read_vote(AnyError::new(&error)).into())
            }
            Self::Sim(log) => Ok(log.vote()),
        }
    }

    // What is committed is not saved: a restarted master learns it again from the leader, or as the leader by committing
    // its first entry, and until then it answers nothing.

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<(StoredId, StoredPayload)> = entries
            .into_iter()
            .map(|entry| {
                let (kind, data) = codec::payload_parts(&entry.payload);
                ((&entry.log_id).into(), StoredPayload { kind, data })
            })
            .collect();
        let done = Flushed::Raft(callback);
        let appended = match self {
            Self::Disk(log) => log.append(entries, done),
            Self::Sim(log) => log.append(entries, done).await,
        };
        appended.map_err(|error| write_error(&error))
    }

    async fn truncate(&mut self, since: LogId) -> Result<(), StorageError> {
        let truncated = match self {
            Self::Disk(log) => log.truncate(since.index).await,
            Self::Sim(log) => log.truncate(since.index).await,
        };
        truncated.map_err(|error| write_error(&error))
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), StorageError> {
        let purged = match self {
            Self::Disk(log) => log.purge(&upto).await,
            Self::Sim(log) => log.purge(&upto).await,
        };
        purged.map_err(|error| write_error(&error))
    }
}
