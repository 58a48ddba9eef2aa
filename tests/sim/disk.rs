//! A disk that forgets: what was not synced when its machine crashed is lost, or torn, as the seed decides.
//!
//! ```text
//!   write ──► pending ──sync_data──► durable        names ──► live ──sync_dir──► durable
//!                │ crash: a prefix survives,            │ crash: back to durable
//!                ▼ the last one torn                    ▼
//! ```
//!
//! It may be slow for a while, or full, and it sees every record that a daemon writes, also one that is cut again.

use crate::chunks::{Replica, chunk_of, parse};
use crate::pages::Pages;
use dfs_chunkd::store::format::{FILE_HEADER, FileHeader, Record, RecordKind};
use dfs_env::disk::{Disk, DiskFile, OpenMode, Space};
use dfs_proto::{ChunkId, Epoch};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

const CAPACITY: u64 = 1 << 30;

enum Change {
    Write { offset: usize, bytes: Vec<u8> },
    SetLen(usize),
}

/// `live` is `durable` with everything that is pending.
#[derive(Default)]
struct Content {
    live: Pages,
    durable: Pages,
    pending: Vec<Change>,
    /// What a checker read in it, until it changes.
    replica: Option<Arc<Replica>>,
}

fn apply(bytes: &mut Pages, change: &Change) {
    match change {
        Change::Write { offset, bytes: new } => bytes.write_at(new, *offset),
        Change::SetLen(length) => bytes.set_len(*length),
    }
}

type Shared = Arc<Mutex<Content>>;

#[derive(Default)]
struct Names {
    live: BTreeMap<PathBuf, Shared>,
    durable: BTreeMap<PathBuf, Shared>,
}

/// What a crash did; a run in which no crash ever lost anything tested nothing.
#[derive(Default, Clone, Copy, Debug)]
pub struct Losses {
    pub writes_lost: u64,
    pub writes_torn: u64,
    pub names_lost: u64,
}

/// The disk of one simulated machine. It outlives its machine's crashes.
#[derive(Clone, Default)]
pub struct SimDisk {
    names: Arc<Mutex<Names>>,
    medium: Arc<Mutex<Medium>>,
}

/// How the disk is, and what it has seen of chunk files since its machine started.
#[derive(Default)]
struct Medium {
    /// How long a call takes.
    lag: Duration,
    /// Nothing may grow any more.
    full: bool,
    refused: u64,
    epochs: BTreeMap<ChunkId, Epoch>,
    /// Records of an epoch that had ended.
    violations: Vec<String>,
}

impl Medium {
    fn written(&mut self, chunk: ChunkId, mut bytes: &[u8], offset: usize) {
        if offset == 0
            && let Some(Ok(header)) = bytes.get(..FILE_HEADER).map(FileHeader::decode)
        {
            self.raise(chunk, header.epoch);
            return;
        }
        let mut position = offset as u64;
        while let Ok(record) = Record::decode(bytes, chunk, position) {
            let epoch = self.epochs.get(&chunk).copied().unwrap_or(Epoch(0));
            if record.kind == RecordKind::Data && record.epoch < epoch {
                self.violations.push(format!(
                    "a record of epoch {} was written to chunk {chunk} after epoch {epoch} began",
                    record.epoch
                ));
            }
            self.raise(chunk, record.epoch);
            let length = usize::try_from(record.end_position() - position).unwrap_or(usize::MAX);
            position = record.end_position();
            bytes = bytes.get(length..).unwrap_or_default();
        }
    }

    fn raise(&mut self, chunk: ChunkId, epoch: Epoch) {
        let known = self.epochs.entry(chunk).or_insert(epoch);
        *known = epoch.max(*known);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("the simulation runs on one thread and stops at the first panic")
}

impl SimDisk {
    /// The machine stops here: keeps a random prefix of each file's unsynced writes, tears the next one, and takes
    /// back names that were not synced.
    pub fn crash(&self, seed: u64) -> Losses {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut losses = Losses::default();
        let mut names = lock(&self.names);
        losses.names_lost +=
            names.live.keys().filter(|name| !names.durable.contains_key(*name)).count() as u64;
        names.live = names.durable.clone();
        // An epoch that was not synced may be lost.
        lock(&self.medium).epochs.clear();
        for content in names.live.values() {
            let mut content = lock(content);
            let pending = std::mem::take(&mut content.pending);
            let kept = random.random_range(0..=pending.len());
            let mut survivor = std::mem::take(&mut content.durable);
            for change in &pending[..kept] {
                apply(&mut survivor, change);
            }
            losses.writes_lost += (pending.len() - kept) as u64;
            if let Some(Change::Write { offset, bytes }) = pending.get(kept)
                && random.next_u32().is_multiple_of(2)
            {
                let torn = random.random_range(0..bytes.len().max(1));
                apply(&mut survivor, &Change::Write { offset: *offset, bytes: bytes[..torn].to_vec() });
                losses.writes_torn += 1;
            }
            content.live = survivor.clone();
            content.durable = survivor;
            content.replica = None;
        }
        losses
    }

    /// Everything below a directory is gone, as with a new disk.
    pub fn wipe(&self, below: &Path) {
        let mut names = lock(&self.names);
        names.live.retain(|name, _| !name.starts_with(below));
        names.durable.retain(|name, _| !name.starts_with(below));
        lock(&self.medium).epochs.clear();
    }

    /// Flips one bit of one of the files that `may` be changed; of which.
    pub fn rot(&self, seed: u64, may: impl Fn(&Path, &Pages) -> bool) -> Option<PathBuf> {
        let mut random = SmallRng::seed_from_u64(seed);
        let names = lock(&self.names);
        let files: Vec<_> =
            names.live.iter().filter(|(path, content)| may(path, &lock(content).live)).collect();
        let (path, content) = files.get(random.random_range(0..files.len().max(1)))?;
        let mut content = lock(content);
        let bit = random.random_range(0..content.live.len() * 8);
        content.live.flip(bit);
        content.durable.flip(bit);
        content.replica = None;
        Some((*path).clone())
    }

    /// Whether a crash now could lose bytes of a file that outlives it.
    pub fn is_dirty(&self) -> bool {
        lock(&self.names).durable.values().any(|content| !lock(content).pending.is_empty())
    }

    /// From now on every call takes this long.
    pub fn slow_down(&self, lag: Duration) {
        lock(&self.medium).lag = lag;
    }

    /// From now on nothing may grow; or it may again. Answers how many writes were refused.
    pub fn fill(&self, full: bool) -> u64 {
        let mut medium = lock(&self.medium);
        medium.full = full;
        std::mem::take(&mut medium.refused)
    }

    /// What was written although it must not be, since the last call.
    pub fn violations(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.medium).violations)
    }

    /// Whether some file as its machine sees it is like this.
    pub fn any(&self, like: impl Fn(&Path, &Pages) -> bool) -> bool {
        lock(&self.names).live.iter().any(|(path, content)| like(path, &lock(content).live))
    }

    /// The bytes of the files of this name in any directory.
    pub fn named(&self, name: &str) -> Vec<Vec<u8>> {
        let names = lock(&self.names);
        let named = names.live.iter().filter(|(path, _)| path.ends_with(name));
        named.map(|(_, content)| lock(content).live.to_vec()).collect()
    }

    /// Every chunk file as its machine sees it. One that has not changed is not read again.
    pub fn replicas(&self) -> Vec<(ChunkId, Arc<Replica>)> {
        let names = lock(&self.names);
        let chunks = names.live.iter().filter_map(|(path, content)| Some((chunk_of(path)?, content)));
        let read = |(chunk, content): (ChunkId, &Shared)| {
            let mut content = lock(content);
            let Content { live, replica, .. } = &mut *content;
            (chunk, Arc::clone(replica.get_or_insert_with(|| Arc::new(parse(chunk, live)))))
        };
        chunks.map(read).collect()
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut names = lock(&self.names);
        let content = match (names.live.get(path), mode) {
            (Some(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(content), _) => Arc::clone(content),
            (None, OpenMode::CreateNew) => Arc::clone(names.live.entry(path.to_owned()).or_default()),
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        let medium = Arc::clone(&self.medium);
        Ok(Arc::new(SimFile { content, medium, chunk: chunk_of(path) }))
    }

    fn create_dir_all(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        // Directories are the prefixes of file names.
        let names = lock(&self.names);
        let depth = path.components().count();
        let mut found: Vec<PathBuf> = names
            .live
            .keys()
            .filter(|name| name.starts_with(path) && name.components().count() > depth)
            .map(|name| name.components().take(depth + 1).collect())
            .collect();
        found.dedup();
        Ok(found)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut names = lock(&self.names);
        let content = names.live.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.live.insert(to.to_owned(), content);
        if let Some(chunk) = chunk_of(to) {
            lock(&self.medium).epochs.remove(&chunk);
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if let Some(chunk) = chunk_of(path) {
            lock(&self.medium).epochs.remove(&chunk);
        }
        lock(&self.names).live.remove(path).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut names = lock(&self.names);
        let below = |name: &Path| name.parent() == Some(path);
        let Names { live, durable } = &mut *names;
        durable.retain(|name, _| !below(name));
        durable.extend(
            live.iter()
                .filter(|(name, _)| below(name))
                .map(|(name, content)| (name.clone(), Arc::clone(content))),
        );
        Ok(())
    }

    fn space(&self, _path: &Path) -> io::Result<Space> {
        let used: u64 = lock(&self.names).live.values().map(|content| lock(content).live.len() as u64).sum();
        let free = if lock(&self.medium).full { 0 } else { CAPACITY.saturating_sub(used) };
        Ok(Space { total_bytes: CAPACITY, free_bytes: free })
    }

    fn lag(&self) -> Duration {
        lock(&self.medium).lag
    }
}

struct SimFile {
    content: Shared,
    medium: Arc<Mutex<Medium>>,
    chunk: Option<ChunkId>,
}

impl SimFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut content = lock(&self.content);
        let mut medium = lock(&self.medium);
        let end = match &change {
            Change::Write { offset, bytes } => offset + bytes.len(),
            Change::SetLen(length) => *length,
        };
        if medium.full && end > content.live.len() {
            medium.refused += 1;
            return Err(io::ErrorKind::StorageFull.into());
        }
        if let (Some(chunk), Change::Write { offset, bytes }) = (self.chunk, &change) {
            medium.written(chunk, bytes, *offset);
        }
        apply(&mut content.live, &change);
        content.pending.push(change);
        content.replica = None;
        Ok(())
    }
}

fn position(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(io::Error::other)
}

impl DiskFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(lock(&self.content).live.read_at(buffer, position(offset)?))
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(Change::Write { offset: position(offset)?, bytes: bytes.to_vec() })
    }

    fn write_vectored_at(&self, parts: &[io::IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        self.change(Change::Write { offset: position(offset)?, bytes })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.content).live.len() as u64)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.change(Change::SetLen(position(length)?))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut content = lock(&self.content);
        let Content { live, durable, pending, .. } = &mut *content;
        if !pending.is_empty() {
            pending.clear();
            *durable = live.clone();
        }
        Ok(())
    }
}
