//! Where chunks live, and the right to read them.

use crate::master::Master;
use dfs_env::Env;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{GET_CHUNKS_MAX, TOKEN_TTL_MS};
use dfs_proto::v1::answer::Body;
use dfs_proto::v1::{ChunkAccess, Cred, GetChunks, query};
use dfs_proto::{ChunkId, FsError, FsResult, InodeNo};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Where a chunk is used: a slice of an inode, at an offset of the file. Whoever has the inode open to read may read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) chunk: ChunkId,
    pub(crate) ino: InodeNo,
    pub(crate) offset: u64,
}

/// Chunks remembered.
const CHUNKS: usize = 65_536;

type Known = lru::LruCache<ChunkId, (Arc<ChunkAccess>, Duration)>;

pub(crate) struct Accesses {
    env: Env,
    master: Arc<dyn Master>,
    known: Mutex<Known>,
}

impl Accesses {
    pub(crate) fn new(env: Env, master: Arc<dyn Master>) -> Self {
        let most = std::num::NonZeroUsize::MIN.saturating_add(CHUNKS - 1);
        Self { env, master, known: Mutex::new(lru::LruCache::new(most)) }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what the master told along with something else.
    pub(crate) fn learn(&self, chunks: &[ChunkAccess]) {
        let now = self.env.clock.boot();
        let mut known = self.lock();
        for access in chunks.iter().filter(|access| !access.token.is_empty()) {
            known.put(ChunkId(access.chunk), (Arc::new(access.clone()), now));
        }
    }

    fn cached(&self, chunk: ChunkId) -> Option<Arc<ChunkAccess>> {
        // Half a token's life: what begins with it ends before it does.
        let good = Duration::from_millis(TOKEN_TTL_MS / 2);
        let now = self.env.clock.boot();
        let mut known = self.lock();
        let (access, since) = known.get(&chunk)?;
        (now.saturating_sub(*since) < good && !access.replicas.is_empty()).then(|| Arc::clone(access))
    }

    /// Where a chunk lives. `fresh`: what is remembered did not serve.
    ///
    /// # Errors
    /// ErrorNoChunk when it is gone, or not in this place any more, and the session's.
    pub(crate) async fn get(&self, place: Place, fresh: bool) -> FsResult<Arc<ChunkAccess>> {
        let chunk = place.chunk;
        if !fresh && let Some(access) = self.cached(chunk) {
            return Ok(access);
        }
        let mut chunks = self.ask(place.ino, &[place]).await?;
        match chunks.pop() {
            Some(access) if access.chunk == chunk.get() => Ok(Arc::new(access)),
            _ => Err(FsError::new(ErrorCode::ErrorNoChunk, format!("chunk {chunk} is gone"))),
        }
    }

    /// Makes sure that these chunks are known, with few questions. What the master does not know shows when it is used.
    ///
    /// # Errors
    /// The session's.
    pub(crate) async fn prepare(&self, ino: InodeNo, places: impl Iterator<Item = Place>) -> FsResult<()> {
        let mut unknown: Vec<Place> = places.filter(|place| self.cached(place.chunk).is_none()).collect();
        unknown.sort_unstable_by_key(|place| place.chunk);
        unknown.dedup_by_key(|place| place.chunk);
        for places in unknown.chunks(GET_CHUNKS_MAX) {
            self.ask(ino, places).await?;
        }
        Ok(())
    }

    async fn ask(&self, ino: InodeNo, places: &[Place]) -> FsResult<Vec<ChunkAccess>> {
        let question = query::Op::GetChunks(GetChunks {
            chunks: places.iter().map(|place| place.chunk.get()).collect(),
            ino: ino.get(),
            offsets: places.iter().map(|place| place.offset).collect(),
        });
        match self.master.query(&Cred::default(), question).await? {
            Body::Chunks(answer) => {
                self.learn(&answer.chunks);
                Ok(answer.chunks)
            }
            other => {
                let text = format!("the master gave an answer to another question: {other:?}");
                Err(FsError::new(ErrorCode::ErrorIo, text))
            }
        }
    }
}
