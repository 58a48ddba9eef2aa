//! A master's storage in memory, which outlives the master: what the simulator restarts a master on.
//!
//! It keeps exactly what a disk would have kept: log entries count from the moment that their sync is done, and one that
//! was not done when the master died is lost.

use super::codec::AppliedRow;
use super::disk_log::{Flushed, StoredId, StoredPayload};
use super::sim_kv::{Left, SimKv};
use super::types::{LogId, Vote};
use bytes::Bytes;
use raft_log::Callback;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The storage of one simulated master. Keep it outside of the master, and start the master on it again after a crash.
#[derive(Default)]
pub struct SimStorage {
    pub(super) kv: SimKv,
    pub(super) snapshots: Mutex<Vec<(AppliedRow, Bytes)>>,
    log: Mutex<Log>,
    /// How long a sync takes.
    sync: Mutex<Duration>,
    failing: std::sync::atomic::AtomicBool,
    owner: Mutex<Option<(String, u64)>>,
    pub(super) joining: std::sync::atomic::AtomicBool,
}

#[derive(Default)]
struct Log {
    vote: Option<Vote>,
    purged: Option<StoredId>,
    entries: BTreeMap<u64, (StoredId, StoredPayload)>,
    /// Entries from here on are not on disk yet.
    synced: u64,
}

impl SimStorage {
    /// Empty storage whose syncs take no time.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Empty storage whose syncs take this long.
    #[must_use]
    pub fn with_sync_time(sync: Duration) -> Arc<Self> {
        Arc::new(Self { sync: Mutex::new(sync), ..Self::default() })
    }

    /// From now on a sync takes this long.
    pub fn set_sync_time(&self, sync: Duration) {
        *self.sync.lock().unwrap_or_else(PoisonError::into_inner) = sync;
    }

    /// The master's machine has stopped: of the log a random part of what was not synced is lost, of the state store what was
    /// not flushed, or all of it. `draw` answers random numbers.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub fn crash(&self, draw: &mut dyn FnMut() -> u64) -> io::Result<Crashed> {
        let mut log = self.log();
        let unsynced = log.entries.range(log.synced..).count() as u64;
        let kept = draw() % (unsynced + 1);
        let end = log.entries.range(log.synced..).nth(usize::try_from(kept).unwrap_or(usize::MAX));
        if let Some(end) = end.map(|(index, _)| *index) {
            log.entries.split_off(&end);
        }
        log.synced = log.entries.last_key_value().map_or(log.synced, |(last, _)| log.synced.max(last + 1));
        drop(log);
        let left = [Left::All, Left::Flushed, Left::Nothing][usize::try_from(draw() % 3).unwrap_or(0)];
        self.kv.crash(left)?;
        Ok(Crashed { entries_lost: unsynced - kept, state_lost: left != Left::All })
    }

    /// Flips a bit of the newest of two snapshots, and makes the state store unusable: a start must do without both. False: there
    /// are not two.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub fn rot_snapshot(&self, draw: &mut dyn FnMut() -> u64) -> io::Result<bool> {
        let mut kept = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < 2 {
            return Ok(false);
        }
        let mut bytes = kept[0].1.to_vec();
        let bit = usize::try_from(draw() % (bytes.len() as u64 * 8)).unwrap_or(0);
        bytes[bit / 8] ^= 1 << (bit % 8);
        kept[0].1 = bytes.into();
        drop(kept);
        self.kv.crash(Left::Nothing)?;
        Ok(true)
    }

    /// The last entry that is applied in the state.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub fn applied(&self) -> io::Result<Option<u64>> {
        let row = self.kv().get(&[crate::state::keys::tag::RAFT])?;
        Ok(row.map(|row| AppliedRow::read(&row)).transpose()?.and_then(|row| row.last()).map(|id| id.index))
    }

    /// How many snapshots there are.
    #[must_use]
    pub fn snapshots_kept(&self) -> usize {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The digest of the state after each entry that was applied since the last call: index and digest.
    #[must_use]
    pub fn take_digests(&self) -> Vec<(u64, u64)> {
        self.kv.take_digests()
    }

    /// From now on every sync fails, as on a broken disk; or works again.
    pub fn fail_syncs(&self, failing: bool) {
        self.failing.store(failing, std::sync::atomic::Ordering::SeqCst);
    }

    /// The state that the master has applied.
    #[must_use]
    pub fn kv(&self) -> &dyn crate::state::Kv {
        &self.kv
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes whose storage this is; when it is new, whether its master is joining others.
    ///
    /// # Errors
    /// When it is another's already.
    pub(super) fn claim(&self, cluster: &str, node: u64, joining: bool) -> Result<(), String> {
        let mut owner = self.owner.lock().unwrap_or_else(PoisonError::into_inner);
        match owner.as_ref() {
            Some((its_cluster, its_node)) if its_cluster != cluster || *its_node != node => {
                Err(format!("the storage belongs to master {its_node} of cluster {its_cluster}"))
            }
            Some(_) => Ok(()),
            None => {
                *owner = Some((cluster.to_owned(), node));
                self.joining.store(joining, std::sync::atomic::Ordering::SeqCst);
                Ok(())
            }
        }
    }

    async fn sync(&self) -> io::Result<()> {
        let sync = *self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        if !sync.is_zero() {
            tokio::time::sleep(sync).await;
        }
        if self.failing.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(io::Error::other("the simulated disk does not sync"));
        }
        Ok(())
    }
}

/// What a crash took.
#[derive(Clone, Copy, Debug)]
pub struct Crashed {
    pub entries_lost: u64,
    pub state_lost: bool,
}

/// The log in [`SimStorage`]; the same calls as `DiskLog` has.
#[derive(Clone)]
pub struct SimLog(Arc<SimStorage>);

impl SimLog {
    /// The log as it is after a restart: without what was not synced.
    pub fn open(storage: Arc<SimStorage>) -> Self {
        {
            let mut log = storage.log();
            let synced = log.synced;
            log.entries.split_off(&synced);
        }
        Self(storage)
    }

    pub fn ends(&self) -> (Option<LogId>, Option<LogId>) {
        let log = self.0.log();
        let purged: Option<LogId> = log.purged.as_ref().map(Into::into);
        (purged, log.entries.values().next_back().map(|(id, _)| id.into()).or(purged))
    }

    pub fn vote(&self) -> Option<Vote> {
        self.0.log().vote
    }

    pub async fn save_vote(&self, vote: Vote) -> io::Result<()> {
        self.0.sync().await?;
        self.0.log().vote = Some(vote);
        Ok(())
    }

    pub async fn truncate(&self, index: u64) -> io::Result<()> {
        self.0.sync().await?;
        let mut log = self.0.log();
        log.entries.split_off(&index);
        log.synced = log.synced.min(index);
        Ok(())
    }

    pub async fn purge(&self, upto: &LogId) -> io::Result<()> {
        self.0.sync().await?;
        let mut log = self.0.log();
        if log.purged.is_none_or(|purged| purged.2 < upto.index) {
            log.entries = log.entries.split_off(&(upto.index + 1));
            log.purged = Some(upto.into());
            log.synced = log.synced.max(upto.index + 1);
        }
        Ok(())
    }

    pub async fn append(&self, entries: Vec<(StoredId, StoredPayload)>, done: Flushed) -> io::Result<()> {
        let end = entries.last().map(|(id, _)| id.2 + 1);
        self.0.log().entries.extend(entries.into_iter().map(|(id, payload)| (id.2, (id, payload))));
        let result = self.0.sync().await;
        if result.is_ok() {
            let mut log = self.0.log();
            log.synced = end.unwrap_or(log.synced);
        }
        done.send(result);
        Ok(())
    }

    pub fn read(&self, from: u64, to: u64, max_bytes: usize) -> Vec<(LogId, StoredPayload)> {
        let (mut found, mut bytes) = (Vec::new(), 0);
        if from >= to {
            return found;
        }
        for (id, payload) in self.0.log().entries.range(from..to).map(|(_, entry)| entry) {
            bytes += payload.data.len();
            found.push((id.into(), payload.clone()));
            if bytes >= max_bytes {
                break;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_was_synced_outlives_a_restart() {
        let storage = SimStorage::with_sync_time(Duration::from_millis(20));
        let log = SimLog::open(Arc::clone(&storage));
        let entry = |index| (StoredId(1, 1, index), StoredPayload { kind: 0, data: Bytes::new() });
        let (sender, receiver) = tokio::sync::oneshot::channel();
        log.append(vec![entry(0), entry(1)], Flushed::Caller(sender)).await.unwrap();
        receiver.await.unwrap().unwrap();
        let (sender, _receiver) = tokio::sync::oneshot::channel();
        let unfinished = log.append(vec![entry(2)], Flushed::Caller(sender));
        assert!(futures::FutureExt::now_or_never(unfinished).is_none());
        assert_eq!(log.read(0, 9, usize::MAX).len(), 3);
        let log = SimLog::open(storage);
        assert_eq!(log.read(0, 9, usize::MAX).len(), 2);
    }

    #[test]
    fn storage_of_another_master_is_refused() {
        let storage = SimStorage::new();
        storage.claim("c", 1, false).unwrap();
        storage.claim("c", 1, false).unwrap();
        assert!(storage.claim("c", 2, false).unwrap_err().contains("master 1"));
    }
}
