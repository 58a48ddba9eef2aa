//! One chunk: its state in memory and every operation on its file.
//!
//! ```text
//!            append, fence                     seal
//!   Absent ───────────────► Open ───────────────────────────► Sealed
//!                            ▲                                  ▲
//!              start: clean  │   start: gap   ┌─────────┐ seal  │
//!                            └── (a file) ───►│ Damaged │ ──────┘
//!                                             └─────────┘   any but Absent ── delete ──► Absent
//! ```
//!
//! Operations that change a chunk come one after the other from its queue (`queue.rs`), so what they read from the
//! state stays true while they do I/O without holding its lock. Reads and syncs run beside them.
//!
//! Crash order: the file header goes out in one write with the first records; a record is acknowledged as durable only
//! after an fdatasync of the file *and* of the directory that holds its name; a seal first cuts and syncs, then writes
//! Seal record, footer and header and syncs again. A crash between the two syncs of a seal may lose an Epoch record
//! that stood behind the cut: harmless, because the master gives seal orders only after it committed the fence, and
//! commits of the old epoch are refused there.

use super::Shared;
use super::dirs::DataDir;
use super::durable::{self, Held, failed};
use super::format::{Entry, FILE_HEADER, FileHeader, RECORD_HEADER_MAX, Record, RecordKind, digest};
use super::queue::Jobs;
use super::recovery::{self, Condition, Found};
use crate::lock;
use bytes::Bytes;
use dfs_env::DiskFile;
use dfs_env::disk::OpenMode;
use dfs_proto::checksum::units_match;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{CHUNK_SIZE_MAX, RECORD_MAX};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, Epoch, FsError, FsResult, InodeNo, v1};
use std::io::IoSlice;
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

/// A record to append.
#[derive(Debug, Clone)]
pub struct NewRecord {
    pub epoch: Epoch,
    pub offset: ByteOffset,
    pub ino: InodeNo,
    pub file_offset: ByteOffset,
    pub checksums: Vec<u32>,
    pub payload: Bytes,
    /// Payload bytes that the chunk may hold: kept when this record creates it.
    pub capacity: ByteLen,
}

/// What a fence or a seal left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    pub epoch: Epoch,
    pub length: u64,
    pub digest: u32,
}

/// One chunk.
pub struct Chunk {
    pub id: ChunkId,
    pub(super) shared: Arc<Shared>,
    /// Held for moments, never across I/O. Changed by the queue's runner, `synced` and `broken` by syncs too.
    state: Mutex<State>,
    /// Every data record while the chunk is not sealed; empty afterwards. Locked after `state`.
    index: Mutex<Vec<Entry>>,
    /// Lock order: the store's map, `jobs`, `syncs`, `state`, `index`.
    pub(super) jobs: Mutex<Jobs>,
    pub(super) syncs: Mutex<durable::Syncs>,
    /// Counts what got done, so that those who wait can tell slow from stuck.
    pub progress: AtomicU64,
}

#[derive(Clone)]
struct State {
    phase: Phase,
    place: Option<(Arc<DataDir>, PathBuf)>,
    /// Kept open from the first append to the seal, so that an error of a write-back is reported to our fdatasync.
    file: Option<Arc<dyn DiskFile>>,
    epoch: Epoch,
    capacity: ByteLen,
    length: u64,
    synced: u64,
    /// The file's name is on disk.
    name_synced: bool,
    /// Where the next record is written in the file.
    position: u64,
    file_bytes: u64,
    digest: u32,
    /// Tells a file from one that was made again under the same name.
    generation: u64,
    /// No more appends: a write or an fdatasync failed.
    broken: Option<FsError>,
    /// No more syncs either: an fdatasync failed, nobody knows what is on disk.
    sync_failed: bool,
}

/// A record that passed all checks and waits for the write.
struct Planned {
    header: Vec<u8>,
    payload: Bytes,
    entry: Entry,
    checksums: Vec<u32>,
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
            digest: 0,
            generation: 0,
            broken: None,
            sync_failed: false,
        };
        Self {
            id,
            shared,
            state: Mutex::new(state),
            index: Mutex::default(),
            jobs: Mutex::default(),
            syncs: Mutex::default(),
            progress: AtomicU64::new(0),
        }
    }

    /// A chunk whose file a start found.
    pub(super) fn found(id: ChunkId, shared: Arc<Shared>, dir: Arc<DataDir>, found: Found) -> Self {
        dir.account(found.file_bytes, 0);
        let chunk = Self::absent(id, shared);
        {
            let mut state = lock(&chunk.state);
            state.place = Some((Arc::clone(&dir), dir.chunk_path(id)));
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
                (state.synced, state.name_synced) = (found.length, true);
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
        (state.phase != Phase::Absent).then(|| v1::ChunkFound {
            chunk: self.id.get(),
            epoch: state.epoch.get(),
            length: state.length,
            sealed: state.phase == Phase::Sealed,
            damaged: state.phase == Phase::Damaged { proven: true } || state.sync_failed,
        })
    }

    fn error(&self, code: ErrorCode, text: impl std::fmt::Display) -> FsError {
        FsError::new(code, format!("chunk {}: {text}", self.id))
    }

    fn snapshot(&self) -> State {
        lock(&self.state).clone()
    }

    /// Appends records in order, as few writes as can be. One result for each: the chunk's length after it, or why it
    /// was refused. Blocks.
    pub fn append(&self, records: &[NewRecord]) -> Vec<FsResult<u64>> {
        let mut results: Vec<FsResult<u64>> = Vec::with_capacity(records.len());
        let mut state = self.snapshot();
        let mut plan: Vec<Planned> = Vec::new();
        for record in records {
            let is_new = record.offset.get() == state.length && !record.payload.is_empty();
            if !is_new && !plan.is_empty() {
                self.write_plan(&mut plan, &mut results);
                state = self.snapshot();
            }
            let result = self.judge(&mut state, record);
            if result.is_ok() && is_new {
                plan.push(self.plan(&mut state, record));
            }
            results.push(result);
        }
        self.write_plan(&mut plan, &mut results);
        results
    }

    /// Decides on a record: the length after it when it may be written or is here already.
    fn judge(&self, state: &mut State, record: &NewRecord) -> FsResult<u64> {
        let (offset, length) = (record.offset.get(), record.payload.len() as u64);
        let end = offset
            .checked_add(length)
            .ok_or_else(|| self.error(ErrorCode::ErrorInvalid, "the offset is beyond 2^64"))?;
        if length > RECORD_MAX as u64 {
            return Err(self.error(ErrorCode::ErrorInvalid, format_args!("a record of {length} bytes")));
        }
        if state.phase == Phase::Absent {
            if offset > 0 || length == 0 {
                return Err(self.error(ErrorCode::ErrorNoChunk, "there is no such chunk here"));
            }
        } else if record.epoch != state.epoch {
            let code = if record.epoch < state.epoch {
                ErrorCode::ErrorStaleEpoch
            } else {
                ErrorCode::ErrorConflict
            };
            let text = format_args!("epoch {} is here, not {}", state.epoch, record.epoch);
            return Err(self.error(code, text));
        }
        match state.phase {
            Phase::Absent | Phase::Open => {}
            Phase::Damaged { .. } => {
                return Err(
                    self.error(ErrorCode::ErrorCorrupt, format_args!("damaged at offset {}", state.length))
                );
            }
            Phase::Sealed => return Err(self.error(ErrorCode::ErrorConflict, "it is sealed")),
        }
        if let Some(broken) = &state.broken {
            return Err(broken.clone());
        }
        if !units_match(&record.payload, &record.checksums) {
            let text = format_args!("the bytes for offset {offset} arrived damaged");
            return Err(self.error(ErrorCode::ErrorCorrupt, text));
        }
        if offset > state.length || (offset < state.length && end > state.length) {
            let text = format_args!("offset {offset} does not follow the length {}", state.length);
            return Err(self.error(ErrorCode::ErrorConflict, text));
        }
        if length == 0 {
            return Ok(state.length);
        }
        if offset < state.length {
            return self.is_a_retry(state, record).map(|()| state.length);
        }
        let capacity = if state.phase == Phase::Absent { record.capacity } else { state.capacity };
        if end > capacity.get().min(CHUNK_SIZE_MAX) {
            let text = format_args!("{end} bytes are beyond its capacity of {capacity}");
            return Err(self.error(ErrorCode::ErrorRange, text));
        }
        self.make_room(state, record, length)?;
        Ok(end)
    }

    /// Room for a record, and a place for the file when it is the first one.
    fn make_room(&self, state: &mut State, record: &NewRecord, length: u64) -> FsResult<()> {
        let bytes = length + (RECORD_HEADER_MAX + FILE_HEADER) as u64;
        if state.phase == Phase::Absent {
            return self.create(state, record.epoch, record.capacity, Some(bytes));
        }
        let Some((dir, _)) = &state.place else {
            return Err(self.error(ErrorCode::ErrorIo, "it has no place"));
        };
        self.shared.dirs.admit(dir, bytes)
    }

    /// An answered record that is sent again must be the one that is here.
    fn is_a_retry(&self, state: &State, record: &NewRecord) -> FsResult<()> {
        let at = record.offset.get();
        let conflict =
            || self.error(ErrorCode::ErrorConflict, format_args!("other bytes are at offset {at}"));
        let entry = {
            let index = lock(&self.index);
            let found = index.binary_search_by_key(&at, |entry| entry.offset).map_err(|_| conflict())?;
            index[found]
        };
        let there = self.read_header(&*self.open(state)?, &entry)?;
        let same = there.length as usize == record.payload.len() && there.checksums == record.checksums;
        if same { Ok(()) } else { Err(conflict()) }
    }

    fn plan(&self, state: &mut State, record: &NewRecord) -> Planned {
        let length = u32::try_from(record.payload.len()).expect("judged to be at most RECORD_MAX");
        let header = Record {
            kind: RecordKind::Data,
            chunk: self.id,
            epoch: record.epoch,
            position: state.position,
            offset: record.offset,
            length,
            synced: ByteOffset(state.synced),
            ino: record.ino,
            file_offset: record.file_offset,
            checksums: record.checksums.clone(),
        };
        state.position = header.end_position();
        state.length += u64::from(length);
        Planned {
            header: header.encode(),
            payload: record.payload.clone(),
            entry: header.entry(),
            checksums: header.checksums,
        }
    }

    /// Writes what was planned with one call. When that fails, the records' results become the error.
    fn write_plan(&self, plan: &mut Vec<Planned>, results: &mut [FsResult<u64>]) {
        let Some(first) = plan.first() else { return };
        let at = first.entry.position;
        let parts: Vec<IoSlice<'_>> = plan
            .iter()
            .flat_map(|record| [IoSlice::new(&record.header), IoSlice::new(&record.payload)])
            .collect();
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let count = plan.len();
        match self.write(&parts, at) {
            Ok(()) => {
                let mut state = lock(&self.state);
                let mut index = lock(&self.index);
                for record in plan.drain(..) {
                    let Entry { offset, length, .. } = record.entry;
                    state.digest = digest(state.digest, ByteOffset(offset), length, &record.checksums);
                    state.length = record.entry.end();
                    index.push(record.entry);
                }
                state.position = at + bytes;
            }
            Err(error) => {
                plan.clear();
                // The last results belong to the plan, but refusals may stand between: those keep their own cause.
                for result in results.iter_mut().rev().filter(|result| result.is_ok()).take(count) {
                    *result = Err(error.clone());
                }
            }
        }
    }

    /// Writes at a position of the file and accounts for it. A write that failed leaves no trace, or no appends follow.
    fn write(&self, parts: &[IoSlice<'_>], at: u64) -> FsResult<()> {
        let state = self.snapshot();
        let (dir, path) = state.place.as_ref().ok_or_else(|| self.error(ErrorCode::ErrorIo, "no place"))?;
        let file = self.open(&state)?;
        let end = at + parts.iter().map(|part| part.len() as u64).sum::<u64>();
        match file.write_vectored_at(parts, at) {
            Ok(()) => {
                dir.account(end.saturating_sub(state.file_bytes), 0);
                let mut state = lock(&self.state);
                state.file_bytes = state.file_bytes.max(end);
                state.file = Some(file);
                Ok(())
            }
            Err(error) => {
                let full = error.kind() == std::io::ErrorKind::StorageFull;
                let error = failed("writing", path, error);
                if !full {
                    dir.fail(&error);
                }
                if let Err(cut) = file.set_len(state.file_bytes.min(at)) {
                    tracing::warn!(chunk = %self.id, error = %cut, "a failed write could not be undone");
                    lock(&self.state).broken = Some(error.clone());
                }
                Err(error)
            }
        }
    }

    /// Makes the file with its header in the directory with the most room. A fence needs none: the reserve is for that.
    fn create(
        &self,
        state: &mut State,
        epoch: Epoch,
        capacity: ByteLen,
        room_bytes: Option<u64>,
    ) -> FsResult<()> {
        let disk = &*self.shared.env.disk;
        loop {
            let dir = self.shared.dirs.place()?;
            if let Some(bytes) = room_bytes {
                self.shared.dirs.admit(&dir, bytes)?;
            }
            let path = dir.chunk_path(self.id);
            let header =
                FileHeader { chunk: self.id, epoch, capacity, cluster: self.shared.cluster, sealed: false };
            let made = durable::open_for_appends(disk, &path, true).and_then(|file| {
                file.write_all_at(&header.encode(), 0).map(|()| file).inspect_err(|_| {
                    if let Err(error) = disk.remove(&path) {
                        tracing::warn!(path = %path.display(), %error, "a file that could not be begun stays");
                    }
                })
            });
            match made {
                Ok(file) => {
                    dir.account(FILE_HEADER as u64, 0);
                    let mut here = lock(&self.state);
                    here.phase = Phase::Open;
                    here.place = Some((dir, path));
                    here.file = Some(file);
                    (here.epoch, here.capacity) = (epoch, capacity);
                    (here.position, here.file_bytes) = (FILE_HEADER as u64, FILE_HEADER as u64);
                    *state = here.clone();
                    return Ok(());
                }
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                    return Err(failed("creating", &path, error));
                }
                // This directory is out of use from here on, so the loop ends with the last directory.
                Err(error) => dir.fail(&failed("creating", &path, error)),
            }
        }
    }

    /// The chunk's file, for reads and writes.
    fn open(&self, state: &State) -> FsResult<Arc<dyn DiskFile>> {
        if let Some(file) = &state.file {
            return Ok(Arc::clone(file));
        }
        let (_, path) = state
            .place
            .as_ref()
            .ok_or_else(|| self.error(ErrorCode::ErrorNoChunk, "there is no such chunk here"))?;
        let sealed = state.phase == Phase::Sealed;
        if sealed && let Some(file) = self.shared.cache.file(self.id) {
            return Ok(file);
        }
        let mode = if sealed { OpenMode::Read } else { OpenMode::Write };
        let file = self.shared.env.disk.open(path, mode).map_err(|error| failed("opening", path, error))?;
        if sealed {
            self.shared.cache.keep_file(self.id, Arc::clone(&file));
        } else {
            lock(&self.state).file = Some(Arc::clone(&file));
        }
        Ok(file)
    }

    /// Makes everything written so far durable. Blocks.
    ///
    /// # Errors
    /// When the disk fails now, or failed an earlier sync of this chunk.
    pub fn sync(&self) -> FsResult<Held> {
        let state = self.snapshot();
        if state.sync_failed {
            return Err(state.broken.unwrap_or_else(|| self.error(ErrorCode::ErrorIo, "a sync failed")));
        }
        let Some((dir, path)) = &state.place else {
            return Err(self.error(ErrorCode::ErrorNoChunk, "there is no such chunk here"));
        };
        let file = self.open(&state)?;
        match durable::sync_file(&*self.shared.env.disk, &*file, path, state.name_synced) {
            Ok(()) => {
                let mut now = lock(&self.state);
                if now.generation != state.generation {
                    return Err(self.error(ErrorCode::ErrorNoChunk, "it was deleted meanwhile"));
                }
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

    /// Refuses appends below `epoch` from here on, durably, and says what is here. A chunk that is not here is created
    /// empty, so that a late first append is refused too. Blocks.
    ///
    /// # Errors
    /// ERROR_STALE_EPOCH when a higher epoch is here; what the disk says.
    pub fn fence(&self, epoch: Epoch) -> FsResult<Settled> {
        let mut state = self.snapshot();
        if epoch < state.epoch {
            let text = format_args!("epoch {} is here, not {epoch}", state.epoch);
            return Err(self.error(ErrorCode::ErrorStaleEpoch, text));
        }
        if state.phase == Phase::Sealed {
            return Ok(self.settled());
        }
        if state.phase == Phase::Absent {
            self.create(&mut state, epoch, ByteLen(0), None)?;
        } else if epoch > state.epoch {
            let record = self.mark(&state, RecordKind::Epoch, epoch).encode();
            self.write(&[IoSlice::new(&record)], state.position)?;
            let mut now = lock(&self.state);
            now.position = state.position + record.len() as u64;
            now.epoch = epoch;
        }
        self.sync()?;
        Ok(self.settled())
    }

    fn settled(&self) -> Settled {
        let state = lock(&self.state);
        Settled { epoch: state.epoch, length: state.length, digest: state.digest }
    }

    /// A record without a payload.
    fn mark(&self, state: &State, kind: RecordKind, epoch: Epoch) -> Record {
        Record {
            kind,
            chunk: self.id,
            epoch,
            position: state.position,
            offset: ByteOffset(state.length),
            length: 0,
            synced: ByteOffset(state.synced),
            ino: InodeNo(0),
            file_offset: ByteOffset(0),
            checksums: Vec::new(),
        }
    }

    /// Ends the chunk at `length`: records beyond are cut, the footer is written. Blocks.
    ///
    /// # Errors
    /// ERROR_NO_CHUNK; ERROR_STALE_EPOCH when a higher epoch is here; ERROR_RANGE when fewer bytes are here;
    /// ERROR_CONFLICT when it was sealed at another length or `length` is inside a record; what the disk says.
    pub fn seal(&self, epoch: Epoch, length: u64) -> FsResult<Settled> {
        let mut state = self.snapshot();
        match state.phase {
            Phase::Absent => return Err(self.error(ErrorCode::ErrorNoChunk, "there is no such chunk here")),
            Phase::Sealed if state.length == length => return Ok(self.settled()),
            Phase::Sealed => {
                let text = format_args!("it was sealed at {}, not {length}", state.length);
                return Err(self.error(ErrorCode::ErrorConflict, text));
            }
            Phase::Open | Phase::Damaged { .. } => {}
        }
        if epoch < state.epoch {
            let text = format_args!("epoch {} is here, not {epoch}", state.epoch);
            return Err(self.error(ErrorCode::ErrorStaleEpoch, text));
        }
        if length > state.length {
            let text = format_args!("only {} of {length} bytes are here", state.length);
            return Err(self.error(ErrorCode::ErrorRange, text));
        }
        let file = self.open(&state)?;
        if length < state.length || matches!(state.phase, Phase::Damaged { .. }) {
            self.cut(&mut state, &*file, length)?;
        }
        self.sync()?;
        self.write_seal(&state, &file, epoch)?;
        Ok(self.settled())
    }

    /// Cuts whole records beyond `length`, durably.
    fn cut(&self, state: &mut State, file: &dyn DiskFile, length: u64) -> FsResult<()> {
        let mut index = lock(&self.index).clone();
        index.truncate(index.partition_point(|entry| entry.end() <= length));
        if index.last().map_or(0, Entry::end) != length {
            let text = format_args!("{length} is inside a record");
            return Err(self.error(ErrorCode::ErrorConflict, text));
        }
        let mut sum = 0;
        for entry in &index {
            let record = self.read_header(file, entry)?;
            sum = digest(sum, record.offset, record.length, &record.checksums);
        }
        let position = index.last().map_or(FILE_HEADER as u64, Entry::end_position);
        let Some((dir, path)) = state.place.clone() else {
            return Err(self.error(ErrorCode::ErrorIo, "it has no place"));
        };
        {
            // Readers find the shorter length before the bytes are gone.
            let mut now = lock(&self.state);
            *lock(&self.index) = index;
            (now.length, now.synced, now.digest) = (length, now.synced.min(length), sum);
            now.position = position;
        }
        durable::cut(file, position).map_err(|error| failed("cutting", &path, error))?;
        let mut now = lock(&self.state);
        dir.account(0, now.file_bytes.saturating_sub(position));
        now.file_bytes = position;
        *state = now.clone();
        Ok(())
    }

    /// Writes the Seal record and the footer after everything that is there.
    fn write_seal(&self, state: &State, file: &Arc<dyn DiskFile>, epoch: Epoch) -> FsResult<()> {
        let record = self.mark(state, RecordKind::Seal, epoch);
        self.write(&[IoSlice::new(&record.encode())], state.position)?;
        let Some((dir, path)) = &state.place else {
            return Err(self.error(ErrorCode::ErrorIo, "it has no place"));
        };
        let header = FileHeader {
            chunk: self.id,
            epoch: state.epoch,
            capacity: state.capacity,
            cluster: self.shared.cluster,
            sealed: true,
        };
        let index = Arc::new(lock(&self.index).clone());
        let (at, sum) = (record.end_position(), state.digest);
        let end = match recovery::write_footer(&**file, &header, epoch, at, &index, sum) {
            Ok(end) => end,
            Err(error) => {
                let error = failed("sealing", path, error);
                dir.fail(&error);
                let mut now = lock(&self.state);
                (now.broken, now.sync_failed) = (Some(error.clone()), true);
                return Err(error);
            }
        };
        self.shared.cache.keep_file(self.id, Arc::clone(file));
        self.shared.cache.keep_index(self.id, index);
        let mut now = lock(&self.state);
        dir.account(end.saturating_sub(now.file_bytes), now.file_bytes.saturating_sub(end));
        *lock(&self.index) = Vec::new();
        (now.phase, now.epoch, now.file) = (Phase::Sealed, epoch, None);
        (now.position, now.file_bytes, now.synced) = (end, end, now.length);
        now.broken = None;
        Ok(())
    }

    /// Removes the chunk for good. One that is not here is removed. Blocks.
    ///
    /// # Errors
    /// What the disk says.
    pub fn delete(&self) -> FsResult<()> {
        let state = self.snapshot();
        let Some((dir, path)) = &state.place else { return Ok(()) };
        durable::remove(&*self.shared.env.disk, path).map_err(|error| failed("removing", path, error))?;
        dir.account(0, state.file_bytes);
        self.shared.cache.forget(self.id);
        let gone = Self::absent(self.id, Arc::clone(&self.shared)).snapshot();
        {
            let mut now = lock(&self.state);
            *lock(&self.index) = Vec::new();
            *now = State { generation: state.generation + 1, ..gone };
        }
        // A read that began before may have put the file or index back at hand.
        self.shared.cache.forget(self.id);
        Ok(())
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

    pub(super) fn corrupt(&self, offset: u64, cause: impl std::fmt::Display) -> FsError {
        self.error(ErrorCode::ErrorCorrupt, format_args!("the record at offset {offset} is damaged: {cause}"))
    }

    /// A file that ends inside what the index promises is damaged; other errors are the disk's.
    pub(super) fn unreadable(&self, offset: u64, error: &std::io::Error) -> FsError {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            return self.corrupt(offset, "the file ends before it");
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
        if let Some(index) = self.shared.cache.index(self.id) {
            return Ok((file, part(&index)));
        }
        let file_len = file
            .len()
            .map_err(|error| self.error(ErrorCode::ErrorIo, format_args!("its length: {error}")))?;
        let index = Arc::new(self.read_index(&*file, file_len)?);
        self.shared.cache.keep_index(self.id, Arc::clone(&index));
        Ok((file, part(&index)))
    }

    fn read_index(&self, file: &dyn DiskFile, file_len: u64) -> FsResult<Vec<Entry>> {
        let damaged = |cause: &dyn std::fmt::Display| {
            self.error(ErrorCode::ErrorCorrupt, format_args!("its footer is damaged: {cause}"))
        };
        let io = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => damaged(&"the file ends before it"),
            _ => self.error(ErrorCode::ErrorIo, format_args!("reading its footer: {error}")),
        };
        let trailer = recovery::read_trailer(file, self.id, file_len)
            .map_err(io)?
            .ok_or_else(|| damaged(&"no valid trailer"))?;
        let length = file_len - super::format::TRAILER as u64 - trailer.index_position;
        let mut bytes = vec![0; usize::try_from(length).map_err(|error| damaged(&error))?];
        file.read_exact_at(&mut bytes, trailer.index_position).map_err(io)?;
        trailer.decode_index(&bytes).map_err(|error| damaged(&error))
    }
}
