//! Data directories: where chunk files stand, how much room is left, and which directory has failed.

use crate::lock;
use dfs_env::Env;
use dfs_proto::error::ErrorCode;
use dfs_proto::{ChunkId, FsError, FsResult, v1};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// One data directory.
pub struct DataDir {
    pub path: PathBuf,
    /// Bytes of all chunk files here.
    used_bytes: AtomicU64,
    room: Mutex<Room>,
}

#[derive(Clone, Default)]
struct Room {
    total_bytes: u64,
    free_bytes: u64,
    /// Why this directory is not used any more.
    failed: Option<String>,
}

/// All data directories of a daemon and how much they may take.
pub struct Dirs {
    env: Env,
    pub all: Vec<Arc<DataDir>>,
    /// Bytes all chunk files may take together.
    capacity_bytes: Option<u64>,
    /// Bytes of each file system that are left to others.
    reserve_bytes: u64,
}

/// Space of all directories together, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Totals {
    pub total_bytes: u64,
    pub used_bytes: u64,
    pub free_bytes: u64,
}

impl DataDir {
    #[must_use]
    pub fn new(path: PathBuf, failed: Option<String>) -> Arc<Self> {
        let room = Mutex::new(Room { failed, ..Room::default() });
        Arc::new(Self { path, used_bytes: AtomicU64::new(0), room })
    }

    /// Where a chunk's file stands in this directory.
    #[must_use]
    pub fn chunk_path(&self, chunk: ChunkId) -> PathBuf {
        let id = chunk.get();
        self.path.join("chunks").join(format!("{:02x}", id & 0xff)).join(format!("{id:016x}.chunk"))
    }

    /// Why this directory is out of use, if it is.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        lock(&self.room).failed.clone()
    }

    /// Takes the directory out of use for new chunks: its disk answered with an error. A full disk is none: whoever wrote is
    /// refused, and goes on here once there is room again.
    pub fn fail(&self, error: &FsError) {
        if matches!(error.code, ErrorCode::ErrorNoSpace | ErrorCode::ErrorQuota) {
            tracing::warn!(dir = %self.path.display(), %error, "the disk of this data directory is full");
            return;
        }
        let mut room = lock(&self.room);
        if room.failed.is_none() {
            tracing::error!(dir = %self.path.display(), %error, "this data directory has failed and takes no new chunks");
            room.failed = Some(error.to_string());
        }
    }

    /// A file grew or shrank.
    pub fn account(&self, grown: u64, shrunk: u64) {
        self.used_bytes.fetch_add(grown, Ordering::Relaxed);
        self.used_bytes.fetch_sub(shrunk, Ordering::Relaxed);
        let mut room = lock(&self.room);
        room.free_bytes = room.free_bytes.saturating_sub(grown).saturating_add(shrunk);
    }

    fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }
}

/// The chunk that a file belongs to by its name.
#[must_use]
pub fn chunk_of(path: &Path) -> Option<ChunkId> {
    let name = path.file_name()?.to_str()?.strip_suffix(".chunk")?;
    if name.len() != 16 {
        return None;
    }
    u64::from_str_radix(name, 16).ok().map(ChunkId)
}

impl Dirs {
    #[must_use]
    pub fn new(env: Env, all: Vec<Arc<DataDir>>, capacity_bytes: Option<u64>, reserve_bytes: u64) -> Self {
        Self { env, all, capacity_bytes, reserve_bytes }
    }

    /// Asks the file systems how much room they have. Blocks.
    pub fn refresh(&self) {
        for dir in &self.all {
            match self.env.disk.space(&dir.path) {
                Ok(space) => {
                    let mut room = lock(&dir.room);
                    (room.total_bytes, room.free_bytes) = (space.total_bytes, space.free_bytes);
                }
                Err(error) => dir.fail(&FsError::from(error).during("space")),
            }
        }
    }

    /// How many directories have failed.
    #[must_use]
    pub fn failed(&self) -> usize {
        self.all.iter().filter(|dir| dir.failure().is_some()).count()
    }

    /// The directory for a new chunk: the one in use with the most room.
    ///
    /// # Errors
    /// ERROR_IO when every directory has failed.
    pub fn place(&self) -> FsResult<Arc<DataDir>> {
        self.all
            .iter()
            .filter_map(|dir| {
                let room = lock(&dir.room);
                room.failed.is_none().then_some((room.free_bytes, dir))
            })
            .max_by_key(|(free, _)| *free)
            .map(|(_, dir)| Arc::clone(dir))
            .ok_or_else(|| FsError::new(ErrorCode::ErrorIo, "every data directory has failed"))
    }

    /// Whether `bytes` more may be written in a directory.
    ///
    /// # Errors
    /// ERROR_NO_SPACE.
    pub fn admit(&self, dir: &DataDir, bytes: u64) -> FsResult<()> {
        if let Some(capacity) = self.capacity_bytes
            && self.used_bytes() + bytes > capacity
        {
            let text = format!("the daemon's capacity of {capacity} bytes is used up");
            return Err(FsError::new(ErrorCode::ErrorNoSpace, text));
        }
        if lock(&dir.room).free_bytes < self.reserve_bytes.saturating_add(bytes) {
            let text = format!("{} has less than its reserve free", dir.path.display());
            return Err(FsError::new(ErrorCode::ErrorNoSpace, text));
        }
        Ok(())
    }

    fn used_bytes(&self) -> u64 {
        self.all.iter().map(|dir| dir.used_bytes()).sum()
    }

    /// Space of all directories in use.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let mut totals = Totals { used_bytes: self.used_bytes(), ..Totals::default() };
        for dir in &self.all {
            let room = lock(&dir.room);
            if room.failed.is_none() {
                totals.total_bytes += room.total_bytes;
                totals.free_bytes += room.free_bytes.saturating_sub(self.reserve_bytes);
            }
        }
        if let Some(capacity) = self.capacity_bytes {
            totals.total_bytes = totals.total_bytes.min(capacity);
            totals.free_bytes = totals.free_bytes.min(capacity.saturating_sub(totals.used_bytes));
        }
        totals
    }

    /// Each directory's state, for the master.
    #[must_use]
    pub fn report(&self) -> Vec<v1::DirState> {
        self.all
            .iter()
            .map(|dir| {
                let room = lock(&dir.room);
                v1::DirState {
                    path: dir.path.display().to_string(),
                    total_bytes: room.total_bytes,
                    free_bytes: room.free_bytes.saturating_sub(self.reserve_bytes),
                    failed: room.failed.is_some(),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(capacity: Option<u64>) -> Dirs {
        let all = vec![DataDir::new("/a".into(), None), DataDir::new("/b".into(), None)];
        for (dir, free) in all.iter().zip([1000, 2000]) {
            *lock(&dir.room) = Room { total_bytes: 5000, free_bytes: free, failed: None };
        }
        Dirs::new(Env::real(), all, capacity, 100)
    }

    #[test]
    fn new_chunks_go_where_most_room_is_and_never_to_a_failed_directory() {
        let dirs = dirs(None);
        assert_eq!(dirs.place().expect("room").path, Path::new("/b"));
        dirs.all[1].account(1500, 0);
        assert_eq!(dirs.place().expect("room").path, Path::new("/a"));
        dirs.all[0].fail(&ErrorCode::ErrorNoSpace.into());
        assert_eq!(dirs.place().expect("full is not broken").path, Path::new("/a"));
        dirs.all[0].fail(&ErrorCode::ErrorIo.into());
        assert_eq!(dirs.place().expect("room").path, Path::new("/b"));
        dirs.all[1].fail(&ErrorCode::ErrorIo.into());
        assert!(dirs.place().is_err());
        assert!(dirs.report().iter().all(|dir| dir.failed));
    }

    #[test]
    fn reserve_and_capacity_are_kept() {
        let dirs = dirs(Some(1200));
        assert_eq!(dirs.admit(&dirs.all[0], 900), Ok(()));
        assert_eq!(dirs.admit(&dirs.all[0], 901).expect_err("reserve").code, ErrorCode::ErrorNoSpace);
        dirs.all[1].account(800, 0);
        assert_eq!(dirs.admit(&dirs.all[0], 401).expect_err("capacity").code, ErrorCode::ErrorNoSpace);
        assert_eq!(dirs.totals(), Totals { total_bytes: 1200, used_bytes: 800, free_bytes: 400 });
    }

    #[test]
    fn a_chunk_and_its_path_name_each_other() {
        let dir = DataDir::new("/d".into(), None);
        let path = dir.chunk_path(ChunkId(0x1234));
        assert_eq!(path, Path::new("/d/chunks/34/0000000000001234.chunk"));
        assert_eq!(chunk_of(&path), Some(ChunkId(0x1234)));
        assert_eq!(chunk_of(Path::new("/d/chunks/34/1234.chunk")), None);
    }
}
