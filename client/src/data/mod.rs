//! The data plane: file bytes in and out. Writes wait in memory and go to chunks behind the program's back
//! ([`crate::write`]); reads come from chunks, caches, and what is not committed yet ([`crate::read`]).

pub(crate) mod links;
#[cfg(test)]
mod tests;

use crate::leases::Leases;
use crate::master::Master;
use crate::read::layout::Asked;
use crate::read::{ReadState, Reader};
pub use crate::write::Under;
use crate::write::driver::{Hooks, Writer};
use crate::write::{Policy, Settings};
use bytes::{Bytes, BytesMut};
use dfs_env::Env;
use dfs_proto::limits;
use dfs_proto::v1::{self, Attr};
use dfs_proto::{ChunkId, FsResult, InodeNo};
use std::sync::Arc;
use std::time::Duration;

pub use crate::write::attrs::AttrSet;
pub use crate::write::core::Dirty;

/// The data plane's settings.
#[derive(Clone, Copy, Debug)]
pub struct DataConfig {
    /// Bytes that may wait in memory to be committed; writers wait beyond.
    pub write_memory: u64,
    /// Bytes of chunks kept in memory for reads.
    pub read_cache: u64,
    /// How long an append may make no progress before its chunk is given up and its bytes are sent elsewhere.
    pub append_progress: Duration,
    /// Most bytes read ahead for one open file; 0: none.
    pub readahead_bytes: u64,
    /// How long bytes may make no progress before the operation fails. None: for ever.
    pub operation_timeout: Option<Duration>,
    /// How old uncommitted bytes grow at most before they are synced and committed without being asked.
    pub write_behind: Duration,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            write_memory: limits::WRITE_MEMORY,
            read_cache: limits::READ_CACHE,
            append_progress: Duration::from_millis(limits::APPEND_PROGRESS_MS),
            readahead_bytes: 16 << 20,
            operation_timeout: Some(Duration::from_millis(limits::OPERATION_MS)),
            write_behind: Duration::from_millis(limits::WRITE_BEHIND_MS),
        }
    }
}

/// What the write side tells the read side.
struct ToReader(Arc<Reader>);

impl Hooks for ToReader {
    fn committed(&self, ino: InodeNo, slices: &[v1::CommitSlice], attr: Option<&Attr>) {
        self.0.committed(ino, slices, attr.map(|attr| attr.version));
    }

    fn keep(&self, chunk: ChunkId, offset: u64, bytes: Bytes) {
        self.0.keep(chunk, offset, bytes);
    }
}

/// File bytes of one client.
pub struct DataPlane {
    writer: Arc<Writer>,
    reader: Arc<Reader>,
}

impl DataPlane {
    /// Must be called within a tokio runtime: background work runs there, whoever calls later and from where.
    #[must_use]
    pub fn new(env: Env, master: Arc<dyn Master>, config: DataConfig, leases: Arc<Leases>) -> Arc<Self> {
        let settings = Settings {
            memory: config.write_memory,
            append_progress: config.append_progress,
            operation_timeout: config.operation_timeout.unwrap_or(Duration::ZERO),
            write_behind: config.write_behind,
        };
        let reader = Arc::new(Reader::new(
            &env,
            Arc::clone(&master),
            config.read_cache,
            config.readahead_bytes,
            config.operation_timeout,
            leases,
        ));
        let hooks = Arc::new(ToReader(Arc::clone(&reader)));
        let writer = Writer::new(env, master, hooks, settings);
        Arc::new(Self { writer, reader })
    }

    /// Buffers bytes without waiting, from any thread. None: there is no memory now, call [`DataPlane::write`].
    ///
    /// # Errors
    /// An earlier error of the inode's bytes in the background, once; ErrorFileTooBig.
    #[must_use]
    pub fn try_write(&self, ino: InodeNo, offset: u64, data: &[u8]) -> Option<FsResult<()>> {
        self.writer.try_write(ino, offset, data)
    }

    /// Buffers bytes as long as a lease lasts; waits while memory is full. Answers how many it took. After an error a front
    /// part may have been taken.
    ///
    /// # Errors
    /// As [`DataPlane::try_write`], and ErrorIo when no memory came free within the operation time-out.
    pub async fn write(&self, ino: InodeNo, offset: u64, data: &[u8], under: Under<'_>) -> FsResult<usize> {
        self.writer.write(ino, offset, data, under).await
    }

    /// Waits until there may be memory for writes.
    ///
    /// # Errors
    /// ErrorIo when none came free within the operation time-out.
    pub async fn room(&self) -> FsResult<()> {
        self.writer.room().await
    }

    /// Returns when everything written to the inode so far is on disk on every replica and committed. Answers the
    /// attributes after the last commit; none if there was nothing to commit.
    ///
    /// # Errors
    /// ErrorNoSpace and ErrorIo after the operation time-out, or an earlier such error that nobody has seen. The bytes
    /// are dropped then. What the master answered to the commit.
    pub async fn flush(&self, ino: InodeNo) -> FsResult<Option<Attr>> {
        self.writer.flush(ino).await
    }

    /// Starts to write an inode's bytes out. True: nothing suggests that they might not be stored, and nobody needs to wait. `size`:
    /// up to where the file is known to have no holes; None: it may have some.
    ///
    /// # Errors
    /// An earlier error of the inode, once.
    pub fn leave(&self, ino: InodeNo, size: Option<u64>) -> FsResult<bool> {
        self.writer.leave(ino, size)
    }

    /// [`DataPlane::flush`] of every inode.
    ///
    /// # Errors
    /// The first one.
    pub async fn flush_all(&self) -> FsResult<()> {
        self.writer.flush_all().await
    }

    /// What the inode's attributes show of bytes that are not committed.
    #[must_use]
    pub fn dirty(&self, ino: InodeNo) -> Option<Dirty> {
        self.writer.dirty(ino)
    }

    /// Keeps attributes that somebody sets, to be committed with the bytes written before: they are on their way when this
    /// returns. False: there are none, and nothing was kept.
    #[must_use]
    pub fn set_attrs(&self, ino: InodeNo, cred: &v1::Cred, set: AttrSet) -> bool {
        self.writer.set_attrs(ino, cred, set)
    }

    /// Keeps an error of an earlier flush that nobody was told of, for the next write or flush of the inode.
    pub fn keep_error(&self, ino: InodeNo, error: dfs_proto::FsError) {
        self.writer.keep_error(ino, error, false);
    }

    /// The inode's next commit clears suid, sgid and capabilities.
    pub fn kill_priv(&self, ino: InodeNo, writer: &v1::Cred) {
        self.writer.kill_priv(ino, writer);
    }

    /// Which chunks the inode's bytes go into from now on: its attributes say so. 0 stands for the cluster's default.
    pub fn set_policy(&self, ino: InodeNo, attr: &Attr, defaults: crate::master::Defaults) {
        let replicas = if attr.replicas == 0 { defaults.replicas } else { attr.replicas };
        let chunk_size = if attr.chunk_size == 0 { defaults.chunk_size } else { attr.chunk_size };
        self.writer.set_policy(ino, Policy { replicas, chunk_size });
    }

    /// Reads `[offset, offset + len)`, cut at the end of the file that `attr` tells of (uncommitted bytes included), of that
    /// version or a later one. Holes are zeros; bytes not committed yet show.
    ///
    /// # Errors
    /// ErrorIo when no replica has the bytes or none answers within the operation time-out, and the session's.
    pub async fn read(
        &self,
        ino: InodeNo,
        state: &ReadState,
        attr: &Attr,
        offset: u64,
        len: usize,
    ) -> FsResult<Bytes> {
        let len = usize::try_from(attr.size.saturating_sub(offset)).map_or(len, |left| left.min(len));
        if len == 0 {
            return Ok(Bytes::new());
        }
        // Looked at first: a commit that ends meanwhile moves bytes from here to the layout, never the other way.
        let dirty = self.writer.read(ino, offset, len);
        match &dirty[..] {
            [] => return self.reader.read(ino, state, attr, offset, len).await,
            [(at, bytes)] if *at == offset && bytes.len() == len => return Ok(bytes.clone()),
            _ => {}
        }
        let index = |at: u64| usize::try_from(at - offset).expect("within the read");
        let end = offset + len as u64;
        let mut data = BytesMut::zeroed(len);
        let mut at = offset;
        for (start, bytes) in dirty.iter().chain(std::iter::once(&(end, Bytes::new()))) {
            if at < *start {
                let gap = self.reader.read(ino, state, attr, at, index(*start) - index(at)).await?;
                // Fewer where the file has become shorter.
                data[index(at)..index(at) + gap.len()].copy_from_slice(&gap);
            }
            data[index(*start)..index(*start) + bytes.len()].copy_from_slice(bytes);
            at = start + bytes.len() as u64;
        }
        Ok(data.freeze())
    }

    /// To be called before the master is asked something that it answers with a layout, too.
    #[must_use]
    pub fn asking(&self, ino: InodeNo) -> Asked {
        self.reader.asking(ino)
    }

    /// Takes note of an answer of the master about the file from its beginning ([`v1::Opened`]).
    pub fn learn_layout(&self, ino: InodeNo, layout: &v1::Layout, asked: Asked) {
        self.reader.learn_layout(ino, layout, asked);
    }

    /// The inode's committed bytes have changed otherwise than by writes through here: truncated, cloned, punched.
    pub fn forget_layout(&self, ino: InodeNo) {
        self.reader.forget_layout(ino);
    }

    /// The inode is unlinked and closed: its bytes need not be written.
    pub fn discard(&self, ino: InodeNo) {
        self.writer.discard(ino);
        self.reader.forget_layout(ino);
    }

    /// The host that this client runs on: replicas there are read first.
    pub fn prefer_host(&self, host: &str) {
        self.reader.peers().set_host(host);
    }
}
