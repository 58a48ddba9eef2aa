//! One chunk: its state in memory and every operation on its file.
//!
//! ```text
//!            append, fence                     seal
//!   Absent ───────────────► Open ───────────────────────────► Sealed
//!                            ▲                                  ▲
//!              start: clean  │   start: gap   ┌─────────┐ seal  │
//!                            └── (a file) ───►│ Damaged │ ──────┘
//!                                             └─────────┘   any but Absent ── delete ──► Absent
//!                                                                any ── a copy is installed ──► Sealed
//! ```
//!
//! Operations that change a chunk come one after the other from its queue (`queue.rs`), so what they read from the
//! state stays true while they do I/O without holding its lock. Reads and syncs run beside them.
//!
//! Crash order: a record is acknowledged as durable only after an fdatasync of the file *and* of the directory that
//! holds its name. A seal that cuts writes its epoch into the file header and syncs, cuts and syncs; every seal then
//! writes Seal record, footer and header and syncs once more.

use super::Shared;
use super::dirs::DataDir;
use super::durable::{self, Held, failed};
use super::format::{Entry, RECORD_HEADER_MAX, Record, RecordKind};
use super::queue::Jobs;
use super::recovery::{self, Condition, Found};
use crate::lock;
use dfs_env::DiskFile;
use dfs_env::disk::OpenMode;
use dfs_proto::error::ErrorCode;
use dfs_proto::{ByteLen, ChunkId, Epoch, FsError, FsResult, v1};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

/// Where a chunk is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Absent,
    Open,
    Damaged { proven: bool },
    Sealed,
}

/// One chunk.
pub struct Chunk {
    pub id: ChunkId,
    pub(super) shared: Arc<Shared>,
    /// Held for moments, never across I/O. Changed by the queue's runner, `synced` and `broken` by syncs too.
    pub(super) state: Mutex<State>,
    /// Every data record while the chunk is not sealed; empty afterwards. Locked after `state`.
    pub(super) index: Mutex<Vec<Entry>>,
    /// Held from an fdatasync until what it said is noted: the kernel tells of an error once, to whichever comes first.
    pub(super) syncing: Mutex<()>,
    /// Lock order: the store's map, `jobs`, `syncs`, `syncing`, `state`, `index`.
    pub(super) jobs: Mutex<Jobs>,
    pub(super) syncs: Mutex<durable::Syncs>,
    /// Counts what got done, so that those who wait can tell slow from stuck.
    pub progress: AtomicU64,
}

#[derive(Clone)]
pub(super) struct State {
    pub(super) phase: Phase,
    pub(super) place: Option<(Arc<DataDir>, PathBuf)>,
    /// Kept open from the first append to the seal, so that an error of a write-back is reported to our fdatasync.
    pub(super) file: Option<Arc<dyn DiskFile>>,
    pub(super) epoch: Epoch,
    pub(super) capacity: ByteLen,
    pub(super) length: u64,
    pub(super) synced: u64,
    /// The file's name is on disk.
    pub(super) name_synced: bool,
    /// Where the next record is written in the file.
    pub(super) position: u64,
    pub(super) file_bytes: u64,
    /// Where long appends lie in the file that no fdatasync has covered: the system need not keep them in memory after it.
    pub(super) streamed: Range<u64>,
    pub(super) digest: u32,
    /// Tells a file from one that was made again under the same name.
    pub(super) generation: u64,
    /// No more appends: a write or an fdatasync failed.
    pub(super) broken: Option<FsError>,
    /// No more syncs either: an fdatasync failed, nobody knows what is on disk.
    pub(super) sync_failed: bool,
    /// Damage was found in it since the start.
    pub(super) rotten: bool,
}

impl Chunk {
    /// A chunk without a file.
    pub(super) fn absent(id: ChunkId, shared: Arc<Shared>) -> Self {
        let state = State {
            phase: Phase::Absent,
            place: None,
            file: None,
            epoch: Epoch(0),
            capacity: ByteLen(0),
            length: 0,
            synced: 0,
            name_synced: false,
            position: 0,
            file_bytes: 0,
            streamed: 0..0,
            digest: 0,
            generation: shared.next_generation(),
            broken: None,
            sync_failed: false,
            rotten: false,
        };
        Self {
            id,
            shared,
            state: Mutex::new(state),
            index: Mutex::default(),
            jobs: Mutex::default(),
            syncs: Mutex::default(),
            syncing: Mutex::default(),
            progress: AtomicU64::new(0),
        }
    }

    /// A chunk whose file a start found.
    pub(super) fn found(id: ChunkId, shared: Arc<Shared>, dir: &Arc<DataDir>, found: Found) -> Self {
        dir.account(found.file_bytes, 0);
        let chunk = Self::absent(id, shared);
        {
            let mut state = lock(&chunk.state);
            state.place = Some((Arc::clone(dir), dir.chunk_path(id)));
            (state.epoch, state.capacity) = (found.epoch, found.capacity);
            (state.length, state.position, state.file_bytes) =
                (found.length, found.position, found.file_bytes);
            state.digest = found.digest;
            *lock(&chunk.index) = found.index;
            state.phase = match found.condition {
                Condition::Open => Phase::Open,
                Condition::Damaged { proven } => Phase::Damaged { proven },
                Condition::Sealed => Phase::Sealed,
            };
            if state.phase == Phase::Sealed {
                state.synced = found.length;
            }
        }
        chunk
    }

    /// Where the chunk is in its life.
    #[must_use]
    pub fn phase(&self) -> Phase {
        lock(&self.state).phase
    }

    /// How far the chunk's bytes have come.
    #[must_use]
    pub fn held(&self) -> Held {
        let state = lock(&self.state);
        Held { length: state.length, synced: state.synced }
    }

    /// The chunk as a report to the master names it; nothing when there is no file.
    #[must_use]
    pub fn report(&self) -> Option<v1::ChunkFound> {
        let state = lock(&self.state);
        let failed = state.place.as_ref().is_some_and(|(dir, _)| dir.failure().is_some());
        (state.phase != Phase::Absent).then(|| v1::ChunkFound {
            chunk: self.id.get(),
            epoch: state.epoch.get(),
            length: state.length,
            sealed: state.phase == Phase::Sealed,
            damaged: state.phase == Phase::Damaged { proven: true }
                || state.sync_failed
                || state.rotten
                || failed,
        })
    }

    pub(super) fn error(&self, code: ErrorCode, text: impl std::fmt::Display) -> FsError {
        FsError::new(code, format!("chunk {}: {text}", self.id))
    }

    pub(super) fn snapshot(&self) -> State {
        lock(&self.state).clone()
    }

    /// The chunk's file, for reads and writes.
    pub(super) fn open(&self, state: &State) -> FsResult<Arc<dyn DiskFile>> {
        if let Some(file) = &state.file {
            return Ok(Arc::clone(file));
        }
        let (_, path) = state
            .place
            .as_ref()
            .ok_or_else(|| self.error(ErrorCode::ErrorNoChunk, "there is no such chunk here"))?;
        let sealed = state.phase == Phase::Sealed;
        if sealed && let Some(file) = self.shared.cache.file((self.id, state.generation)) {
            return Ok(file);
        }
        let mode = if sealed { OpenMode::Read } else { OpenMode::Write };
        let file = self.shared.env.disk.open(path, mode).map_err(|error| failed("opening", path, error))?;
        if sealed {
            self.shared.cache.keep_file((self.id, state.generation), Arc::clone(&file));
        } else {
            let mut now = lock(&self.state);
            // A copy may have been installed meanwhile.
            if now.generation == state.generation && now.phase != Phase::Sealed {
                now.file = Some(Arc::clone(&file));
            }
        }
        Ok(file)
    }

    /// Refuses, with its cause, what follows a sync that failed.
    pub(super) fn check_synced(&self, state: &State) -> FsResult<()> {
        if !state.sync_failed {
            return Ok(());
        }
        Err(state.broken.clone().unwrap_or_else(|| self.error(ErrorCode::ErrorIo, "a sync failed")))
    }

    /// Makes everything written so far durable. Blocks.
    ///
    /// # Errors
    /// When the disk fails now, or failed an earlier sync of this chunk.
    pub fn sync(&self) -> FsResult<Held> {
        let _alone = lock(&self.syncing);
        let state = self.snapshot();
        self.check_synced(&state)?;
        let Some((dir, path)) = &state.place else {
            return Err(self.error(ErrorCode::ErrorNoChunk, "there is no such chunk here"));
        };
        let file = self.open(&state)?;
        match durable::sync_file(&*self.shared.env.disk, &*file, path, state.name_synced) {
            Ok(()) => {
                durable::pass_by(&*file, path, &state.streamed);
                let mut now = lock(&self.state);
                if now.generation != state.generation {
                    return Err(self.error(ErrorCode::ErrorNoChunk, "it was deleted meanwhile"));
                }
                now.streamed.start = now.streamed.start.max(state.streamed.end);
                // What was written while the sync ran may not be in it.
                now.synced = now.synced.max(state.length.min(now.length));
                now.name_synced = true;
                Ok(Held { length: now.length, synced: now.synced })
            }
            Err(error) => {
                let error = failed("syncing", path, error);
                dir.fail(&error);
                let mut now = lock(&self.state);
                (now.broken, now.sync_failed) = (Some(error.clone()), true);
                Err(error)
            }
        }
    }

    /// The header of an indexed record, checked.
    pub(super) fn read_header(&self, file: &dyn DiskFile, entry: &Entry) -> FsResult<Record> {
        let mut bytes = [0; RECORD_HEADER_MAX];
        let bytes = &mut bytes[..entry.header_len()];
        file.read_exact_at(bytes, entry.position).map_err(|error| self.unreadable(entry.offset, &error))?;
        self.parse_header(bytes, entry)
    }

    /// The header of an indexed record in bytes that were read, checked against the index.
    pub(super) fn parse_header(&self, bytes: &[u8], entry: &Entry) -> FsResult<Record> {
        match Record::decode(bytes, self.id, entry.position) {
            Ok(record) if record.entry() == *entry && record.kind == RecordKind::Data => Ok(record),
            Ok(_) => Err(self.corrupt(entry.offset, "the record here is not the one in the index")),
            Err(error) => Err(self.corrupt(entry.offset, error)),
        }
    }

    /// Reads the chunk, and notes damage that is found. A copy may be installed meanwhile: then what was read is judged again.
    pub(super) fn noting<T>(&self, read: impl Fn() -> FsResult<T>) -> FsResult<T> {
        loop {
            let generation = lock(&self.state).generation;
            let result = read();
            let Err(error) = &result else { return result };
            let mut state = lock(&self.state);
            if state.phase == Phase::Absent {
                return result;
            }
            if state.generation != generation {
                continue;
            }
            if error.code != ErrorCode::ErrorCorrupt {
                return result;
            }
            if !std::mem::replace(&mut state.rotten, true) {
                drop(state);
                self.shared.note(self.id);
            }
            return result;
        }
    }

    pub(super) fn corrupt(&self, offset: u64, cause: impl std::fmt::Display) -> FsError {
        self.error(ErrorCode::ErrorCorrupt, format_args!("the record at offset {offset} is damaged: {cause}"))
    }

    /// A file that ends inside what the index promises is damaged, and so is one that the medium does not give back; other
    /// errors are the system's.
    pub(super) fn unreadable(&self, offset: u64, error: &std::io::Error) -> FsError {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            return self.corrupt(offset, "the file ends before it");
        }
        if error.raw_os_error() == Some(libc::EIO) {
            return self.corrupt(offset, error);
        }
        self.error(ErrorCode::ErrorIo, format_args!("reading at offset {offset}: {error}"))
    }

    /// What a read needs: the file and the records that hold bytes of `[offset, end)`.
    ///
    /// # Errors
    /// ERROR_NO_CHUNK, ERROR_RANGE beyond the length, ERROR_CORRUPT in a damaged part; what the disk says.
    pub(super) fn locate(&self, offset: u64, end: u64) -> FsResult<(Arc<dyn DiskFile>, Vec<Entry>)> {
        let state = self.snapshot();
        if state.phase == Phase::Absent {
            return Err(self.error(ErrorCode::ErrorNoChunk, "there is no such chunk here"));
        }
        if end > state.length {
            if matches!(state.phase, Phase::Damaged { .. }) {
                return Err(self.corrupt(state.length, "a start found no valid record there"));
            }
            let text = format_args!("bytes {offset} to {end} are beyond the length {}", state.length);
            return Err(self.error(ErrorCode::ErrorRange, text));
        }
        let part = |index: &[Entry]| {
            let from = index.partition_point(|entry| entry.end() <= offset);
            let to = index.partition_point(|entry| entry.offset < end);
            index[from..to].to_vec()
        };
        let file = self.open(&state)?;
        if state.phase != Phase::Sealed {
            let entries = part(&lock(&self.index));
            // Empty only when a seal ended between the two looks; then the footer has the index.
            if !entries.is_empty() {
                return Ok((file, entries));
            }
        }
        if let Some(index) = self.shared.cache.index((self.id, state.generation)) {
            return Ok((file, part(&index)));
        }
        let index = Arc::new(self.read_index(&*file, state.length)?);
        self.shared.cache.keep_index((self.id, state.generation), Arc::clone(&index));
        Ok((file, part(&index)))
    }

    /// The index of a sealed chunk: from its footer, or from the records' headers when the footer is damaged.
    fn read_index(&self, file: &dyn DiskFile, length: u64) -> FsResult<Vec<Entry>> {
        let io = |error| self.unreadable(0, &error);
        let cause = match recovery::read_footer(file, self.id).map_err(io)? {
            Ok(index) if index.last().map_or(0, Entry::end) == length => return Ok(index),
            Ok(_) => "it is for another length".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::error!(chunk = %self.id, cause, "the footer is damaged; the index is made from the records");
        recovery::rebuild_index(file, self.id, length).map_err(io)?.ok_or_else(|| {
            self.error(ErrorCode::ErrorCorrupt, format_args!("footer and records are damaged: {cause}"))
        })
    }
}
