//! Appends: each record is judged, what passes is written with as few calls as can be.

use super::dirs::DataDir;
use super::durable::{self, failed};
use super::file::{Chunk, Phase, State};
use super::format::{Entry, FILE_HEADER, FileHeader, RECORD_HEADER_MAX, Record, RecordKind, digest};
use crate::lock;
use bytes::Bytes;
use dfs_env::defect::{self, Defect};
use dfs_proto::checksum::units_match;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{CHUNK_SIZE_MAX, RECORD_MAX};
use dfs_proto::{ByteLen, ByteOffset, Epoch, FsResult, InodeNo};
use std::io::ErrorKind::{QuotaExceeded, StorageFull};
use std::io::IoSlice;

/// Zeroes that a small append writes behind itself. An fdatasync of bytes that lengthen a file or get their first blocks
/// waits for the file system's journal; of bytes written over blocks that are there it does not (docs/BENCHMARKS.md).
static AHEAD: [u8; 256 << 10] = [0; 256 << 10];
/// Appends up to this many bytes get zeroes ahead of the next ones. Longer ones come in streams, where an fdatasync
/// serves many and the zeroes would only be written twice.
const SMALL: u64 = 64 << 10;

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

impl NewRecord {
    /// The payload offset after the last byte. Peers choose offsets freely, so one beyond 2^64 is cut off here and
    /// refused when the record is judged.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.get().saturating_add(self.payload.len() as u64)
    }
}

/// A record that passed all checks and waits for the write.
struct Planned {
    header: Vec<u8>,
    payload: Bytes,
    entry: Entry,
    checksums: Vec<u32>,
}

impl Chunk {
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
        } else if record.epoch != state.epoch && !defect::has(Defect::EpochUnchecked) {
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
        // Zeroes that stand there already are accounted for.
        match (state.position + bytes).saturating_sub(state.file_bytes) {
            0 => Ok(()),
            more => self.shared.dirs.admit(dir, more),
        }
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
        match self.write(&parts, at, true) {
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

    /// Writes at a position of the file and accounts for it; `ahead`: with zeroes for what comes next, where they help. A
    /// write that failed leaves no trace, or no appends follow.
    pub(super) fn write(&self, parts: &[IoSlice<'_>], at: u64, ahead: bool) -> FsResult<()> {
        let state = self.snapshot();
        let (dir, path) = state.place.as_ref().ok_or_else(|| self.error(ErrorCode::ErrorIo, "no place"))?;
        let file = self.open(&state)?;
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let zeroes = if ahead { self.zeroes_after(&state, dir, at, bytes) } else { &[] };
        let written = if zeroes.is_empty() {
            file.write_vectored_at(parts, at)
        } else {
            let all: Vec<IoSlice<'_>> =
                parts.iter().copied().chain(std::iter::once(IoSlice::new(zeroes))).collect();
            file.write_vectored_at(&all, at)
        };
        match written {
            Ok(()) => {
                let end = (at + bytes + zeroes.len() as u64).max(state.file_bytes);
                dir.account(end - state.file_bytes, 0);
                // The disk begins now; the fdatasync that comes waits for less.
                let stream = if bytes > SMALL { at..at + bytes } else { 0..0 };
                durable::pass_by(&*file, path, &stream);
                let mut state = lock(&self.state);
                state.file_bytes = end;
                if !stream.is_empty() {
                    let before = &state.streamed;
                    let start = if before.is_empty() { stream.start } else { before.start };
                    state.streamed = start..stream.end;
                }
                state.file = Some(file);
                Ok(())
            }
            Err(error) => {
                let full = matches!(error.kind(), StorageFull | QuotaExceeded);
                let error = failed("writing", path, error);
                if !full {
                    dir.fail(&error);
                }
                match file.set_len(at) {
                    Ok(()) => {
                        dir.account(0, state.file_bytes.saturating_sub(at));
                        lock(&self.state).file_bytes = at;
                        if full && !zeroes.is_empty() {
                            return self.write(parts, at, false);
                        }
                    }
                    Err(cut) => {
                        tracing::warn!(chunk = %self.id, error = %cut, "a failed write could not be undone");
                        lock(&self.state).broken = Some(error.clone());
                    }
                }
                Err(error)
            }
        }
    }

    /// The zeroes to write behind `bytes` at `at`: none while some are left, where few bytes are to come, and where the
    /// disk has little room.
    fn zeroes_after(&self, state: &State, dir: &DataDir, at: u64, bytes: u64) -> &'static [u8] {
        let room = state.capacity.get().saturating_sub(state.length + bytes);
        if bytes > SMALL || at + bytes <= state.file_bytes || room < SMALL {
            return &[];
        }
        let length = AHEAD.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        match self.shared.dirs.admit(dir, bytes + length as u64) {
            Ok(()) => &AHEAD[..length],
            Err(_) => &[],
        }
    }

    /// Makes the file with its header in the directory with the most room. A fence needs none: the reserve is for that.
    pub(super) fn create(
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
                Err(error) if matches!(error.kind(), StorageFull | QuotaExceeded) => {
                    return Err(failed("creating", &path, error));
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                    let text =
                        format_args!("{} is in its place and was not usable at the start", path.display());
                    return Err(self.error(ErrorCode::ErrorIo, text));
                }
                // This directory is out of use from here on, so the loop ends with the last directory.
                Err(error) => dir.fail(&failed("creating", &path, error)),
            }
        }
    }
}
