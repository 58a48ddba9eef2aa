//! All chunks of a daemon: appended to, read, fenced, sealed and deleted by number.

pub mod append;
pub mod cache;
pub mod dirs;
pub mod draft;
pub mod durable;
pub mod file;
pub mod format;
pub mod orders;
pub mod queue;
pub mod read;
pub mod recovery;
pub mod scrub;

use crate::lock;
use append::NewRecord;
use dfs_env::Env;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::SYNCS_AT_ONCE;
use dfs_proto::{ByteLen, ChunkId, Epoch, FsError, FsResult, v1};
use dirs::{DataDir, Dirs, chunk_of};
use draft::{DRAFT, Draft};
use durable::Held;
use file::Chunk;
use orders::Settled;
use queue::{ChunkOrder, Job};
use read::Piece;
use recovery::{Found, Opened};
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, Semaphore, oneshot};

/// What all chunks of a daemon have in common.
pub struct Shared {
    pub(crate) env: Env,
    /// The cluster's id as file headers carry it.
    cluster: [u8; 16],
    pub(crate) dirs: Dirs,
    cache: cache::Cache,
    /// Bounds the fdatasyncs that run at once.
    syncs: Semaphore,
    /// Tells files of one chunk apart.
    generations: AtomicU64,
    /// The chunks of which damage was found, or that the master should hear of for another reason: for the next report.
    noted: Mutex<BTreeSet<ChunkId>>,
    found: Notify,
    /// The chunks of which a copy is being made.
    drafts: Mutex<HashSet<ChunkId>>,
    /// Every chunk with a file, and those whose first job waits. Locked before anything of a chunk.
    chunks: Mutex<HashMap<ChunkId, Arc<Chunk>>>,
}

/// The chunks of a daemon. Cheap to clone.
#[derive(Clone)]
pub struct Store(pub(crate) Arc<Shared>);

/// The cluster's id as file headers carry it.
#[must_use]
pub fn cluster_bytes(cluster_id: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    let length = cluster_id.len().min(16);
    bytes[..length].copy_from_slice(&cluster_id.as_bytes()[..length]);
    bytes
}

impl Store {
    /// Opens all chunk files of all directories. A directory that cannot be read is out of use, the others go on.
    pub async fn open(env: Env, dirs: Dirs, cluster_id: &str) -> Self {
        let shared = Arc::new(Shared {
            env: env.clone(),
            cluster: cluster_bytes(cluster_id),
            dirs,
            cache: cache::Cache::default(),
            syncs: Semaphore::new(SYNCS_AT_ONCE),
            generations: AtomicU64::new(0),
            noted: Mutex::default(),
            found: Notify::new(),
            drafts: Mutex::default(),
            chunks: Mutex::default(),
        });
        let store = Self(shared);
        let scans = store.0.dirs.all.iter().filter(|dir| dir.failure().is_none()).map(|dir| {
            let (shared, dir) = (Arc::clone(&store.0), Arc::clone(dir));
            let env = env.clone();
            async move {
                let scanned = Arc::clone(&dir);
                let result = env.blocking(move || shared.scan(&scanned)).await;
                if let Err(error) = result {
                    dir.fail(&FsError::from(error).during("reading the directory"));
                }
            }
        });
        futures::future::join_all(scans).await;
        let shared = Arc::clone(&store.0);
        let refreshed = env.blocking(move || {
            shared.dirs.refresh();
            Ok(())
        });
        if let Err(error) = refreshed.await {
            tracing::error!(%error, "the space of the data directories is unknown");
        }
        store
    }

    fn known(&self, id: ChunkId) -> Option<Arc<Chunk>> {
        lock(&self.0.chunks).get(&id).cloned()
    }

    fn existing(&self, id: ChunkId) -> FsResult<Arc<Chunk>> {
        self.known(id).ok_or_else(|| {
            FsError::new(ErrorCode::ErrorNoChunk, format!("chunk {id}: there is no such chunk here"))
        })
    }

    /// Appends a record after everything asked for this chunk before. The order is that of the calls, not of the
    /// answers. `sync`: answered when everything up to the record's end is on disk.
    pub fn append(
        &self,
        id: ChunkId,
        record: NewRecord,
        sync: bool,
    ) -> impl Future<Output = FsResult<Held>> + Send + use<> {
        let (done, answer) = oneshot::channel();
        self.0.submit(id, Job::Append { record, sync, done });
        async move { answer.await.unwrap_or_else(|_| Err(unanswered(id))) }
    }

    /// How much has been done on a chunk: it changes while somebody who waits is not stuck.
    #[must_use]
    pub fn progress(&self, id: ChunkId) -> u64 {
        self.known(id).map_or(0, |chunk| chunk.progress.load(Ordering::Relaxed))
    }

    /// Carries out an order of the master.
    ///
    /// # Errors
    /// See [`Chunk::fence`], [`Chunk::seal`] and [`Chunk::delete`].
    pub async fn order(&self, id: ChunkId, order: ChunkOrder) -> FsResult<Settled> {
        let (done, answer) = oneshot::channel();
        self.0.submit(id, Job::Order { order, done });
        answer.await.unwrap_or_else(|_| Err(unanswered(id)))
    }

    /// Reads whole units that cover a range.
    ///
    /// # Errors
    /// See [`Chunk::read`].
    pub async fn read(&self, id: ChunkId, offset: u64, length: usize) -> FsResult<Piece> {
        let chunk = self.existing(id)?;
        self.0.env.blocking(move || Ok(chunk.noting(|| chunk.read(offset, length)))).await?
    }

    /// Records of a chunk for another daemon; see [`Chunk::records`].
    ///
    /// # Errors
    /// See [`Chunk::records`].
    pub async fn records(&self, id: ChunkId, offset: u64, end: u64) -> FsResult<Vec<v1::FetchedRecord>> {
        let chunk = self.existing(id)?;
        self.0.env.blocking(move || Ok(chunk.noting(|| chunk.records(offset, end)))).await?
    }

    /// Begins a replica of a sealed chunk of `length` bytes; [`ChunkOrder::Install`] ends it.
    ///
    /// # Errors
    /// ERROR_BUSY while another one is being made; ERROR_NO_SPACE; what the disk says.
    pub async fn draft(&self, id: ChunkId, epoch: Epoch, capacity: ByteLen, length: u64) -> FsResult<Draft> {
        let shared = Arc::clone(&self.0);
        self.0.env.blocking(move || Ok(shared.draft(id, epoch, capacity, length))).await?
    }

    /// The master should hear how this chunk's replica is.
    pub fn note(&self, id: ChunkId) {
        self.0.note(id);
    }

    /// Waits until there are replicas of which the master should hear, and answers which.
    pub async fn noted(&self) -> Vec<v1::ChunkFound> {
        loop {
            let noted = std::mem::take(&mut *lock(&self.0.noted));
            if !noted.is_empty() {
                return noted.into_iter().filter_map(|id| self.found(id)).collect();
            }
            self.0.found.notified().await;
        }
    }

    /// A chunk's replica as a report names it.
    #[must_use]
    pub fn found(&self, id: ChunkId) -> Option<v1::ChunkFound> {
        self.known(id)?.report()
    }

    /// How far a chunk's bytes have come; nothing when it is not here.
    #[must_use]
    pub fn held(&self, id: ChunkId) -> Option<Held> {
        self.known(id).and_then(|chunk| chunk.report().map(|_| chunk.held()))
    }

    /// What may be written besides, in bytes.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.0.dirs.totals().free_bytes
    }

    /// Every chunk that has a file, by number.
    #[must_use]
    pub fn report(&self) -> Vec<v1::ChunkFound> {
        let chunks: Vec<_> = lock(&self.0.chunks).values().cloned().collect();
        let mut found: Vec<_> = chunks.iter().filter_map(|chunk| chunk.report()).collect();
        found.sort_by_key(|found| found.chunk);
        found
    }

    /// How many chunks are known.
    #[must_use]
    pub fn count(&self) -> u64 {
        lock(&self.0.chunks).len() as u64
    }

    /// Makes everything durable that was written: a clean stop.
    pub async fn sync_all(&self) {
        let chunks: Vec<_> = lock(&self.0.chunks).values().cloned().collect();
        for chunk in chunks {
            let held = chunk.held();
            if held.synced < held.length {
                let syncing = Arc::clone(&chunk);
                let result = self.0.env.blocking(move || Ok(syncing.sync())).await;
                if let Err(error) = result.map_err(FsError::from).and_then(std::convert::identity) {
                    tracing::warn!(chunk = %chunk.id, %error, "not synced at the stop");
                }
            }
        }
    }
}

fn unanswered(id: ChunkId) -> FsError {
    FsError::new(ErrorCode::ErrorIo, format!("chunk {id}: the operation was given up"))
}

impl Shared {
    fn next_generation(&self) -> u64 {
        self.generations.fetch_add(1, Ordering::Relaxed)
    }

    fn note(&self, id: ChunkId) {
        lock(&self.noted).insert(id);
        self.found.notify_one();
    }

    /// Opens every chunk file of a directory. Blocks.
    fn scan(self: &Arc<Self>, dir: &Arc<DataDir>) -> std::io::Result<()> {
        for byte in 0..=255_u8 {
            let folder = dir.path.join("chunks").join(format!("{byte:02x}"));
            for path in self.env.disk.list(&folder)? {
                if path.extension().is_some_and(|extension| extension == DRAFT) {
                    if let Err(error) = durable::forget(&*self.env.disk, &path) {
                        tracing::warn!(path = %path.display(), %error, "a copy that was given up stays");
                    }
                    continue;
                }
                let Some(id) = chunk_of(&path).filter(|id| dir.chunk_path(*id) == path) else {
                    tracing::warn!(path = %path.display(), "this is no chunk file; left alone");
                    continue;
                };
                match recovery::open(&*self.env.disk, &path, id, self.cluster) {
                    Ok(Opened::Chunk(found)) => self.add_found(dir, id, found),
                    Ok(Opened::Nothing) => {
                        tracing::info!(chunk = %id, "a chunk file that was never completed has been removed");
                    }
                    Ok(Opened::Foreign(why)) => {
                        tracing::error!(path = %path.display(), why, "this chunk file is not used; left alone");
                    }
                    Err(error) => {
                        tracing::error!(path = %path.display(), %error, "this chunk file cannot be read");
                    }
                }
            }
        }
        Ok(())
    }

    fn add_found(self: &Arc<Self>, dir: &Arc<DataDir>, id: ChunkId, found: Found) {
        if let Some(remark) = &found.remark {
            tracing::warn!(chunk = %id, dir = %dir.path.display(), "{remark}");
        }
        match lock(&self.chunks).entry(id) {
            Entry::Vacant(vacant) => {
                vacant.insert(Arc::new(Chunk::found(id, Arc::clone(self), dir, found)));
            }
            // A copy replaced a replica in a directory that had failed, or a file was brought here by hand. A sealed file
            // is complete; among others the one with more bytes is the safer one.
            Entry::Occupied(mut there) => {
                tracing::error!(chunk = %id, dir = %dir.path.display(), "this chunk is in two directories; the sealed or longer file is used");
                let sealed = |phase| phase == file::Phase::Sealed;
                let found_is = (found.condition == recovery::Condition::Sealed, found.length);
                if (sealed(there.get().phase()), there.get().held().length) < found_is {
                    let chunk = Chunk::found(id, Arc::clone(self), dir, found);
                    there.insert(Arc::new(chunk));
                }
            }
        }
    }
}

#[cfg(test)]
mod draft_tests;
#[cfg(test)]
mod flip_tests;
#[cfg(test)]
mod test_disk;
#[cfg(test)]
mod tests;
