//! What the master orders for one chunk: fence, seal, delete.

use super::durable::{self, failed};
use super::file::{Chunk, Phase, State};
use super::format::{CHUNK_HEADER_AT, Entry, FILE_HEADER, FileHeader, Record, RecordKind, digest};
use super::recovery;
use crate::lock;
use dfs_env::DiskFile;
use dfs_env::defect::{self, Defect};
use dfs_proto::error::ErrorCode;
use dfs_proto::{ByteLen, ByteOffset, Epoch, FsResult, InodeNo};
use std::io::IoSlice;
use std::sync::Arc;

/// What a fence or a seal left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    pub epoch: Epoch,
    pub length: u64,
    pub digest: u32,
    /// The length is final.
    pub sealed: bool,
}

impl Chunk {
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
            self.write(&[IoSlice::new(&record)], state.position, false)?;
            let mut now = lock(&self.state);
            now.position = state.position + record.len() as u64;
            now.epoch = epoch;
        }
        self.sync()?;
        if defect::has(Defect::CutEarly) {
            let (file, needed) = (self.open(&state)?, state.synced);
            state = self.snapshot();
            self.cut(&mut state, &*file, epoch, needed)?;
        }
        Ok(self.settled())
    }

    fn settled(&self) -> Settled {
        let state = lock(&self.state);
        let sealed = state.phase == Phase::Sealed;
        Settled { epoch: state.epoch, length: state.length, digest: state.digest, sealed }
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
    /// ERROR_CORRUPT when it is sealed and known to be damaged; ERROR_CONFLICT when it was sealed at another length or `length` is inside a record; what the disk says.
    pub fn seal(&self, epoch: Epoch, length: u64) -> FsResult<Settled> {
        let mut state = self.snapshot();
        match state.phase {
            Phase::Absent => return Err(self.error(ErrorCode::ErrorNoChunk, "there is no such chunk here")),
            Phase::Sealed if state.length == length => {
                if self.report().is_some_and(|found| found.damaged) {
                    return Err(self.error(ErrorCode::ErrorCorrupt, "damage was found in it"));
                }
                // A start may have found the footer in the page cache of a process that was killed before its sync.
                self.sync()?;
                return Ok(self.settled());
            }
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
            self.cut(&mut state, &*file, epoch, length)?;
        }
        self.sync()?;
        self.write_seal(&state, &file, epoch)?;
        Ok(self.settled())
    }

    /// Cuts whole records beyond `length`, durably. The epoch goes into the file header before, because an Epoch record
    /// behind the cut is cut too.
    fn cut(&self, state: &mut State, file: &dyn DiskFile, epoch: Epoch, length: u64) -> FsResult<()> {
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
        let sealed = false;
        let header = FileHeader {
            chunk: self.id,
            epoch,
            capacity: state.capacity,
            cluster: self.shared.cluster,
            sealed,
        };
        file.write_all_at(&header.encode(), CHUNK_HEADER_AT)
            .map_err(|error| failed("writing", &path, error))?;
        lock(&self.state).epoch = epoch;
        self.sync()?;
        {
            // Readers find the shorter length before the bytes are gone.
            let mut now = lock(&self.state);
            *lock(&self.index) = index;
            (now.length, now.synced, now.digest) = (length, now.synced.min(length), sum);
            now.position = position;
        }
        if let Err(error) = durable::cut(file, position) {
            let error = failed("cutting", &path, error);
            // A later sync might say that all is well.
            let mut now = lock(&self.state);
            (now.broken, now.sync_failed) = (Some(error.clone()), true);
            return Err(error);
        }
        let mut now = lock(&self.state);
        dir.account(0, now.file_bytes.saturating_sub(position));
        now.file_bytes = position;
        *state = now.clone();
        Ok(())
    }

    /// Writes the Seal record and the footer after everything that is there.
    fn write_seal(&self, state: &State, file: &Arc<dyn DiskFile>, epoch: Epoch) -> FsResult<()> {
        let record = self.mark(state, RecordKind::Seal, epoch);
        self.write(&[IoSlice::new(&record.encode())], state.position, false)?;
        let Some((dir, path)) = &state.place else {
            return Err(self.error(ErrorCode::ErrorIo, "it has no place"));
        };
        let header = FileHeader {
            chunk: self.id,
            epoch,
            capacity: state.capacity,
            cluster: self.shared.cluster,
            sealed: true,
        };
        let index = Arc::new(lock(&self.index).clone());
        let (at, sum) = (record.end_position(), state.digest);
        let _alone = lock(&self.syncing);
        self.check_synced(&self.snapshot())?;
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
        self.shared.cache.keep_file((self.id, state.generation), Arc::clone(file));
        self.shared.cache.keep_index((self.id, state.generation), index);
        let mut now = lock(&self.state);
        dir.account(end.saturating_sub(now.file_bytes), now.file_bytes.saturating_sub(end));
        *lock(&self.index) = Vec::new();
        (now.phase, now.epoch, now.file) = (Phase::Sealed, epoch, None);
        (now.position, now.file_bytes, now.synced) = (end, end, now.length);
        now.broken = None;
        if now.rotten {
            // Of a chunk that is not sealed nobody takes note.
            drop(now);
            self.shared.note(self.id);
        }
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
        let gone = Self::absent(self.id, Arc::clone(&self.shared)).snapshot();
        {
            let mut now = lock(&self.state);
            *lock(&self.index) = Vec::new();
            *now = gone;
        }
        self.shared.cache.forget((self.id, state.generation));
        Ok(())
    }
}
