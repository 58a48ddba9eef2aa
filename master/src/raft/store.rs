//! The state machine as openraft sees it: applies entries, builds snapshots, installs those of a leader.

use super::buffered::BufferedKv;
use super::codec::{self, AppliedRow};
use super::elections::Elections;
use super::export::{Exports, Piece};
use super::joining::Joining;
use super::room::Room;
use super::sim::SimStorage;
use super::snapshot::{self, Kept, RowIter, SnapshotData, SnapshotWriter, Snapshots};
use super::types::{
    Answers, Entry, LogId, Payload, SnapshotMeta, StorageError, StorageIOError, StoredMembership, TypeConfig,
};
use crate::state::kv::Each;
use crate::state::{self, Kv, WriteSet, keys};
use dfs_env::Env;
use dfs_env::defect::{self, Defect};
use dfs_proto::v1;
use openraft::storage::RaftStateMachine;
use openraft::{AnyError, EntryPayload, OptionalSend, RaftSnapshotBuilder, Snapshot};
use prost::Message;
use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// The store under the state, on disk or in memory.
pub enum Store {
    Disk(BufferedKv),
    Sim(Arc<SimStorage>),
}

/// Where the store keeps what was applied last.
fn applied_key() -> Vec<u8> {
    vec![keys::tag::RAFT]
}

impl Store {
    fn inner(&self) -> &dyn Kv {
        match self {
            Self::Disk(store) => store,
            Self::Sim(storage) => &storage.kv,
        }
    }

    /// The last entry applied, and the membership as of it.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub fn applied(&self) -> io::Result<(Option<LogId>, StoredMembership)> {
        match self.inner().get(&applied_key())? {
            Some(bytes) => AppliedRow::read(&bytes).map(|row| (row.last(), row.membership())),
            None => Ok((None, StoredMembership::default())),
        }
    }

    /// Takes a snapshot's state in place of the present one; None: the empty state from before the first entry.
    ///
    /// # Errors
    /// When the snapshot is damaged or the store cannot be written; a restart then finds the old state, or none.
    pub fn replace(&self, snapshot: Option<&SnapshotData>) -> io::Result<()> {
        let mut rows: Box<dyn Iterator<Item = io::Result<_>>> = match snapshot {
            None => Box::new(std::iter::empty()),
            Some(data) => {
                let reader = data.open()?;
                let (last, members) = (reader.header.last(), reader.header.membership());
                let row = codec::applied_row(last.as_ref(), &members).encode_to_vec();
                Box::new(std::iter::once(Ok((applied_key(), row))).chain(RowIter::from(reader)))
            }
        };
        match self {
            Self::Disk(store) => store.replace(&mut rows),
            Self::Sim(storage) => {
                let mut writes = WriteSet::new();
                storage.kv.scan(&[], &keys::everything().1, &mut |key, _| {
                    writes.insert(key.to_vec(), None);
                    ControlFlow::Continue(())
                })?;
                for row in rows {
                    let (key, value) = row?;
                    writes.insert(key, Some(value));
                }
                storage.kv.apply(&writes)
            }
        }
    }

    /// Closes the store so that the next start can use it.
    ///
    /// # Errors
    /// When it cannot be synced; the next start builds it again then.
    pub fn close(&self) -> io::Result<()> {
        match self {
            Self::Disk(store) => store.close(),
            Self::Sim(_) => Ok(()),
        }
    }

    fn distrust(&self) {
        match self {
            Self::Disk(store) => store.distrust(),
            Self::Sim(_) => {}
        }
    }
}

impl Kv for Store {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.inner().get(key)
    }
    fn scan(&self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        self.inner().scan(from, to, each)
    }
    fn last(&self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        self.inner().last(from, to)
    }
    fn apply(&self, writes: &WriteSet) -> io::Result<()> {
        self.inner().apply(writes)
    }
    fn flush(&self) -> io::Result<()> {
        self.inner().flush()
    }
}

/// What state machine, snapshot builders and the node share.
pub struct Shared {
    pub env: Env,
    pub cluster: String,
    pub store: Arc<Store>,
    pub snapshots: Snapshots,
    pub joining: Joining,
    pub room: Room,
    /// So many masters have no room on their disks that changes are not taken; as the leader sees it.
    pub crowded: AtomicBool,
    /// Whether this master may want to lead.
    pub elections: Arc<Elections>,
    exports: Exports,
    export_number: AtomicU64,
    applied: Mutex<(Option<LogId>, StoredMembership)>,
    /// Up to where the log may be purged.
    purge: watch::Sender<Option<u64>>,
    /// Entries between two snapshots, at least.
    snapshot_every: u64,
    /// Up to which entry the state is in a snapshot or will be, and how long the last snapshot was.
    last_snapshot: Mutex<(u64, u64)>,
    /// Told the last applied index whenever it is time for a snapshot.
    due: watch::Sender<u64>,
}

/// A large state is written less often: at most about so many bytes of snapshot for each entry.
const SNAPSHOT_BYTES_PER_ENTRY: u64 = 2048;

impl Shared {
    /// Over a store that is ready for use.
    ///
    /// # Errors
    /// When the store cannot say what was applied last.
    pub fn new(
        env: Env,
        cluster: String,
        store: Arc<Store>,
        snapshots: Snapshots,
        joining: Joining,
        room: Room,
        snapshot_every: u64,
    ) -> io::Result<Self> {
        let applied = Mutex::new(store.applied()?);
        let (exports, export_number) = (Exports::default(), AtomicU64::new(1));
        let (purge, due) = (watch::Sender::new(None), watch::Sender::new(0));
        let last_snapshot = match snapshots.list()?.first() {
            Some((meta, data)) => (meta.last_log_id.map_or(0, |id| id.index), data.length()?),
            None => (0, 0),
        };
        let last_snapshot = Mutex::new(last_snapshot);
        Ok(Self {
            env,
            cluster,
            store,
            snapshots,
            joining,
            room,
            crowded: AtomicBool::new(false),
            elections: Arc::default(),
            exports,
            export_number,
            applied,
            purge,
            snapshot_every,
            last_snapshot,
            due,
        })
    }

    /// What was applied last.
    pub fn applied(&self) -> (Option<LogId>, StoredMembership) {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Told up to where the log may be purged, whenever that changes.
    pub fn purges(&self) -> watch::Receiver<Option<u64>> {
        self.purge.subscribe()
    }

    /// Told whenever it is time for a snapshot.
    pub fn snapshots_due(&self) -> watch::Receiver<u64> {
        self.due.subscribe()
    }

    fn check_whether_a_snapshot_is_due(&self, applied: u64) {
        let mut last = self.last_snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        let every = self.snapshot_every.max(last.1 / SNAPSHOT_BYTES_PER_ENTRY);
        if applied.saturating_sub(last.0) >= every {
            last.0 = applied;
            self.due.send_replace(applied);
        }
    }

    fn note_snapshot(&self, (meta, data): &Kept) -> io::Result<()> {
        let index = meta.last_log_id.map_or(0, |id| id.index);
        let mut last = self.last_snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        *last = (last.0.max(index), data.length()?);
        Ok(())
    }

    fn apply_entry(&self, entry: Entry) -> io::Result<Answers> {
        let (_, mut members) = self.applied();
        let (mut writes, answers) = match entry.payload {
            EntryPayload::Blank => (WriteSet::new(), Vec::new()),
            EntryPayload::Membership(membership) => {
                members = StoredMembership::new(Some(entry.log_id), membership);
                (WriteSet::new(), Vec::new())
            }
            EntryPayload::Normal(Payload(bytes)) => {
                let batch = v1::Batch::decode(bytes).map_err(codec::invalid)?;
                state::apply(&*self.store, &batch)?
            }
        };
        let row = codec::applied_row(Some(&entry.log_id), &members);
        writes.insert(applied_key(), Some(row.encode_to_vec()));
        self.exports.apply(&*self.store, &writes)?;
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = (Some(entry.log_id), members);
        self.check_whether_a_snapshot_is_due(entry.log_id.index);
        Ok(Answers(answers))
    }

    /// Whether there is room for another snapshot like the last one.
    pub fn has_room_for_a_snapshot(&self) -> bool {
        let length = self.last_snapshot.lock().unwrap_or_else(PoisonError::into_inner).1;
        self.room.has(length + length / 4 + (1 << 20))
    }

    /// Begins a snapshot of the state as it is now.
    pub fn begin_snapshot(self: &Arc<Self>) -> SnapshotBuilder {
        let (last_log_id, last_membership) = self.applied();
        let number = self.export_number.fetch_add(1, Ordering::Relaxed);
        self.exports.begin(number);
        let snapshot_id = snapshot::snapshot_id(last_log_id.as_ref());
        SnapshotBuilder {
            shared: Arc::clone(self),
            number,
            meta: SnapshotMeta { last_log_id, last_membership, snapshot_id },
        }
    }

    /// The state as it is now, to be read piece by piece while entries go on being applied.
    pub fn export(self: &Arc<Self>) -> StateExport {
        let number = self.export_number.fetch_add(1, Ordering::Relaxed);
        self.exports.begin(number);
        StateExport { shared: Arc::clone(self), number }
    }

    /// The same, and the header of a snapshot of it.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn export_with_header(self: &Arc<Self>) -> io::Result<(StateExport, AppliedRow)> {
        let number = self.export_number.fetch_add(1, Ordering::Relaxed);
        let row = self.exports.begin_with(&*self.store, number, &applied_key())?;
        let export = StateExport { shared: Arc::clone(self), number };
        let row = row.map_or_else(|| Ok(AppliedRow::default()), |bytes| AppliedRow::read(&bytes))?;
        let last_log_id = row.last();
        let snapshot_id = snapshot::snapshot_id(last_log_id.as_ref());
        let meta = SnapshotMeta { last_log_id, last_membership: row.membership(), snapshot_id };
        Ok((export, AppliedRow::of_snapshot(&meta, &self.cluster)))
    }

    fn newest(&self) -> io::Result<Option<Kept>> {
        Ok(self.snapshots.list()?.into_iter().next())
    }

    fn install(&self, data: &SnapshotData) -> io::Result<()> {
        self.exports.cancel();
        if !self.snapshots.holds(data) {
            let mut draft = self.snapshots.draft("install")?;
            let mut at = 0;
            loop {
                let part = data.read_at(at, snapshot::BLOCK_BYTES)?;
                if part.is_empty() {
                    break;
                }
                io::Write::write_all(&mut draft, &part)?;
                at += part.len() as u64;
            }
            self.snapshots.keep(draft, &self.cluster)?;
        }
        self.store.replace(Some(data))?;
        let applied = self.store.applied()?;
        *self.last_snapshot.lock().unwrap_or_else(PoisonError::into_inner) =
            (applied.0.map_or(0, |id| id.index), data.length()?);
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = applied;
        Ok(())
    }
}

/// A consistent view of the state.
pub struct StateExport {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for StateExport {
    fn drop(&mut self) {
        self.shared.exports.end(self.number);
    }
}

impl StateExport {
    /// Some more rows. Blocks.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn next(&self) -> io::Result<Piece> {
        self.shared.exports.next(&*self.shared.store, self.number, snapshot::BLOCK_BYTES)
    }
}

/// Builds one snapshot, while entries go on being applied.
pub struct SnapshotBuilder {
    shared: Arc<Shared>,
    number: u64,
    meta: SnapshotMeta,
}

impl Drop for SnapshotBuilder {
    fn drop(&mut self) {
        self.shared.exports.end(self.number);
    }
}

impl SnapshotBuilder {
    /// Writes the snapshot and puts it in place. None: a leader's snapshot replaced the state meanwhile.
    ///
    /// # Errors
    /// When the store cannot be read or the snapshot cannot be written.
    pub async fn build(&mut self) -> io::Result<Option<Kept>> {
        let (shared, number) = (Arc::clone(&self.shared), self.number);
        let header = AppliedRow::of_snapshot(&self.meta, &shared.cluster);
        let name = format!("build-{number}");
        let env = shared.env.clone();
        let mut writer = {
            let shared = Arc::clone(&shared);
            env.blocking(move || SnapshotWriter::new(shared.snapshots.draft(&name)?, &header)).await?
        };
        loop {
            let from = Arc::clone(&shared);
            let (back, more) = env
                .blocking(move || {
                    let more = match from.exports.next(&*from.store, number, snapshot::BLOCK_BYTES)? {
                        Piece::Rows(mut rows) => {
                            if defect::has(Defect::AnswersLost) {
                                rows.retain(|(key, _)| key.first() != Some(&keys::tag::ANSWER));
                            }
                            writer.block(&rows).map(|()| Some(true))?
                        }
                        Piece::End => Some(false),
                        Piece::Cancelled => None,
                    };
                    Ok((writer, more))
                })
                .await?;
            writer = back;
            match more {
                Some(true) => tokio::task::yield_now().await,
                Some(false) => break,
                None => return Ok(None),
            }
        }
        shared.exports.end(number);
        let keeper = Arc::clone(&shared);
        let keep = move || {
            // A store older than the newest snapshot would be built again at the next start.
            keeper.store.flush()?;
            keeper.snapshots.keep(writer.finish()?, &keeper.cluster)
        };
        let (kept, older) = env.blocking(keep).await?;
        shared.note_snapshot(&kept)?;
        shared.purge.send_replace(older);
        Ok(Some(kept))
    }
}

fn raft_snapshot((meta, data): Kept) -> Snapshot<TypeConfig> {
    Snapshot { meta, snapshot: Box::new(data) }
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError> {
        let built = match self.build().await {
            Ok(Some(kept)) => Ok(Some(kept)),
            Ok(None) => self.shared.newest(),
            // Somebody else has filled the disk meanwhile. The log is whole: a snapshot may be made later.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                tracing::error!(%error, "no snapshot is made: there is no room on the disk");
                self.shared.newest()
            }
            Err(error) => Err(error),
        };
        built
            // One of nothing is older than whatever Raft knows.
            .map(|kept| kept.unwrap_or_else(|| (SnapshotMeta::default(), SnapshotData::empty())))
            .map(raft_snapshot)
            .map_err(|error| StorageIOError::write_snapshot(None, AnyError::new(&error)).into())
    }
}

/// The state machine.
pub struct StateMachine(pub Arc<Shared>);

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        Ok(self.0.applied())
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Answers>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut answers = Vec::new();
        for entry in entries {
            let log_id = entry.log_id;
            match self.0.apply_entry(entry) {
                Ok(answer) => answers.push(answer),
                Err(error) => {
                    self.0.store.distrust();
                    return Err(StorageIOError::apply(log_id, AnyError::new(&error)).into());
                }
            }
        }
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        // Here, not when it is polled: no entry is applied between this call and the export's beginning.
        self.0.begin_snapshot()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<SnapshotData>, StorageError> {
        Ok(Box::new(SnapshotData::empty()))
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        data: Box<SnapshotData>,
    ) -> Result<(), StorageError> {
        let shared = Arc::clone(&self.0);
        let installed = self.0.env.blocking(move || shared.install(&data)).await;
        installed.map_err(|error| {
            self.0.store.distrust();
            StorageIOError::write_snapshot(Some(meta.signature()), AnyError::new(&error)).into()
        })
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError> {
        match self.0.newest() {
            Ok(kept) => Ok(kept.map(raft_snapshot)),
            Err(error) => Err(StorageIOError::read_snapshot(None, AnyError::new(&error)).into()),
        }
    }
}
