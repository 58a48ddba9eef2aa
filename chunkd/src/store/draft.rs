//! A replica of a sealed chunk that is made from others': written beside its place, put there when it is complete.
//!
//! ```text
//!   Store::draft ──► CHUNK.copy: header ── add ──► records ── finish ──► sealed, synced ── install ──► CHUNK.chunk
//!                         └── dropped, or the machine stops: removed, now or at the next start
//! ```
//!
//! What stood in its place stays whole until the rename, so a copy that fails loses nothing: a damaged replica may hold
//! the only good copy of some record.

use super::Shared;
use super::dirs::DataDir;
use super::durable::{self, failed};
use super::file::{Chunk, Phase, State};
use super::format::{Entry, FILE_HEADER, FileHeader, Record, RecordKind, digest};
use super::orders::Settled;
use super::recovery;
use crate::lock;
use dfs_env::DiskFile;
use dfs_env::disk::OpenMode;
use dfs_proto::checksum::units_match;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{FETCH_BYTES, FETCH_RECORDS, RECORD_MAX};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, Epoch, FsError, FsResult, InodeNo, v1};
use std::io::IoSlice;
use std::path::PathBuf;
use std::sync::Arc;

/// What a copy's file is called until it is complete.
pub const DRAFT: &str = "copy";

/// A replica that is being made.
pub struct Draft {
    shared: Arc<Shared>,
    dir: Arc<DataDir>,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    header: FileHeader,
    /// Payload bytes that the complete replica has, and those that are here.
    wanted: u64,
    length: u64,
    /// Where the next record is written, and the end of the file as accounted for.
    position: u64,
    file_bytes: u64,
    digest: u32,
    index: Vec<Entry>,
    installed: bool,
}

impl Shared {
    /// Begins a replica of `length` bytes. One at a time for each chunk. Blocks.
    ///
    /// # Errors
    /// ERROR_BUSY while another one is being made; ERROR_NO_SPACE; what the disk says.
    pub(super) fn draft(
        self: &Arc<Self>,
        id: ChunkId,
        epoch: Epoch,
        capacity: ByteLen,
        length: u64,
    ) -> FsResult<Draft> {
        // Where the chunk stands already a rename replaces it in one step.
        let here = lock(&self.chunks).get(&id).and_then(|chunk| chunk.snapshot().place);
        let dir = match here.filter(|(dir, _)| dir.failure().is_none()) {
            Some((dir, _)) => dir,
            None => self.dirs.place()?,
        };
        self.dirs.admit(&dir, length)?;
        if !lock(&self.drafts).insert(id) {
            return Err(FsError::new(ErrorCode::ErrorBusy, format!("chunk {id}: it is being copied here")));
        }
        let path = dir.chunk_path(id).with_extension(DRAFT);
        let header = FileHeader { chunk: id, epoch, capacity, cluster: self.cluster, sealed: false };
        let disk = &*self.env.disk;
        // One that could not be removed when it was given up.
        let made = durable::forget(disk, &path)
            .and_then(|()| disk.open(&path, OpenMode::CreateNew))
            .and_then(|file| file.write_all_at(&header.encode(), 0).map(|()| file));
        match made {
            Ok(file) => {
                dir.account(FILE_HEADER as u64, 0);
                Ok(Draft {
                    shared: Arc::clone(self),
                    dir,
                    path,
                    file,
                    header,
                    wanted: length,
                    length: 0,
                    position: FILE_HEADER as u64,
                    file_bytes: FILE_HEADER as u64,
                    digest: 0,
                    index: Vec::new(),
                    installed: false,
                })
            }
            Err(error) => {
                lock(&self.drafts).remove(&id);
                Err(failed("creating", &path, error))
            }
        }
    }
}

impl Draft {
    /// Payload bytes that are here: where the next record begins.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    fn error(&self, code: ErrorCode, text: impl std::fmt::Display) -> FsError {
        FsError::new(code, format!("chunk {}: {text}", self.header.chunk))
    }

    /// Adds the records that come next; each is verified. Blocks.
    ///
    /// # Errors
    /// ERROR_CORRUPT for a record that is damaged or in the wrong place; the ones before it are here then.
    /// ERROR_NO_SPACE; what the disk says.
    pub fn add(&mut self, records: &[v1::FetchedRecord]) -> FsResult<()> {
        let before = (self.position, self.length, self.digest, self.index.len());
        self.plan_and_write(records).inspect_err(|_| {
            if self.file_bytes != self.position {
                // What was not written is not here.
                (self.position, self.length, self.digest) = (before.0, before.1, before.2);
                self.index.truncate(before.3);
            }
        })
    }

    fn plan_and_write(&mut self, records: &[v1::FetchedRecord]) -> FsResult<()> {
        let (mut headers, mut payloads) = (Vec::with_capacity(records.len()), Vec::new());
        let (from, mut bad) = (self.position, None);
        for record in records {
            match self.plan(record) {
                Ok(header) => {
                    headers.push(header);
                    payloads.push(&record.payload);
                }
                Err(error) => {
                    bad = Some(error);
                    break;
                }
            }
        }
        let parts: Vec<IoSlice<'_>> = headers
            .iter()
            .zip(payloads)
            .flat_map(|(header, payload)| [IoSlice::new(header), IoSlice::new(payload)])
            .collect();
        if !parts.is_empty() {
            let bytes = self.position - from;
            self.shared.dirs.admit(&self.dir, bytes)?;
            self.file.write_vectored_at(&parts, from).map_err(|error| self.disk_failed("writing", error))?;
            durable::pass_by(&*self.file, &self.path, &(from..self.position));
            self.dir.account(bytes, 0);
            self.file_bytes = self.position;
        }
        bad.map_or(Ok(()), Err)
    }

    /// Takes one record in; its header's bytes.
    fn plan(&mut self, record: &v1::FetchedRecord) -> FsResult<Vec<u8>> {
        let length = record.payload.len();
        let fits = (1..=RECORD_MAX).contains(&length) && self.length + length as u64 <= self.wanted;
        if record.offset != self.length || !fits {
            let text =
                format_args!("a record of {length} bytes at {}, not at {}", record.offset, self.length);
            return Err(self.error(ErrorCode::ErrorCorrupt, text));
        }
        if !units_match(&record.payload, &record.checksums) {
            let text = format_args!("the record at offset {} was damaged on its way", record.offset);
            return Err(self.error(ErrorCode::ErrorCorrupt, text));
        }
        let header = Record {
            kind: RecordKind::Data,
            length: u32::try_from(length).expect("at most RECORD_MAX"),
            ino: InodeNo(record.ino),
            file_offset: ByteOffset(record.file_offset),
            checksums: record.checksums.clone(),
            ..self.mark(RecordKind::Data)
        };
        self.digest = digest(self.digest, header.offset, header.length, &header.checksums);
        self.index.push(header.entry());
        self.position = header.end_position();
        self.length += length as u64;
        Ok(header.encode())
    }

    /// A record without a payload at the end of what is here.
    fn mark(&self, kind: RecordKind) -> Record {
        Record {
            kind,
            chunk: self.header.chunk,
            epoch: self.header.epoch,
            position: self.position,
            offset: ByteOffset(self.length),
            length: 0,
            synced: ByteOffset(0),
            ino: InodeNo(0),
            file_offset: ByteOffset(0),
            checksums: Vec::new(),
        }
    }

    fn disk_failed(&self, what: &str, error: std::io::Error) -> FsError {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        let full = matches!(error.kind(), StorageFull | QuotaExceeded);
        let error = failed(what, &self.path, error);
        if !full {
            self.dir.fail(&error);
        }
        error
    }

    /// Ends the file with its seal and footer, durably. Its name is still its own. Blocks.
    ///
    /// # Errors
    /// ERROR_RANGE when records are missing; what the disk says.
    pub fn finish(&mut self) -> FsResult<()> {
        if self.length != self.wanted {
            let text = format_args!("only {} of {} bytes were copied", self.length, self.wanted);
            return Err(self.error(ErrorCode::ErrorRange, text));
        }
        let seal = self.mark(RecordKind::Seal);
        let end = self
            .file
            .write_all_at(&seal.encode(), self.position)
            .and_then(|()| {
                let (epoch, at) = (self.header.epoch, seal.end_position());
                recovery::write_footer(&*self.file, &self.header, epoch, at, &self.index, self.digest)
            })
            .map_err(|error| self.disk_failed("sealing", error))?;
        durable::pass_by(&*self.file, &self.path, &(0..end));
        self.dir.account(end.saturating_sub(self.file_bytes), 0);
        self.file_bytes = end;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.installed {
            if let Err(error) = durable::forget(&*self.shared.env.disk, &self.path) {
                tracing::warn!(path = %self.path.display(), %error, "a copy that was given up stays until the next start");
            }
            self.dir.account(0, self.file_bytes);
        }
        lock(&self.shared.drafts).remove(&self.header.chunk);
    }
}

impl Chunk {
    /// Puts a finished copy in the chunk's place. Blocks.
    ///
    /// # Errors
    /// ERROR_CONFLICT when a later epoch is here; what the disk says.
    pub(super) fn install(&self, mut draft: Draft) -> FsResult<Settled> {
        let old = self.snapshot();
        if old.epoch > draft.header.epoch {
            let text = format_args!("epoch {} is here, the copy has {}", old.epoch, draft.header.epoch);
            return Err(self.error(ErrorCode::ErrorConflict, text));
        }
        let path = draft.dir.chunk_path(self.id);
        // No sync of the file that was here may tell of the new one, and no reader may take one's index for the other.
        let _alone = lock(&self.syncing);
        lock(&self.state).generation = self.shared.next_generation();
        let disk = &*self.shared.env.disk;
        disk.rename(&draft.path, &path).map_err(|error| draft.disk_failed("renaming", error))?;
        draft.installed = true;
        {
            let mut now = lock(&self.state);
            *lock(&self.index) = Vec::new();
            *now = State {
                phase: Phase::Sealed,
                place: Some((Arc::clone(&draft.dir), path.clone())),
                file: None,
                epoch: draft.header.epoch,
                capacity: draft.header.capacity,
                length: draft.length,
                synced: draft.length,
                name_synced: false,
                position: draft.file_bytes,
                file_bytes: draft.file_bytes,
                streamed: 0..0,
                digest: draft.digest,
                generation: self.shared.next_generation(),
                broken: None,
                sync_failed: false,
                rotten: false,
            };
        }
        self.shared.cache.forget((self.id, old.generation));
        if let Some((dir, _)) = &old.place {
            dir.account(0, old.file_bytes);
        }
        if let Err(error) = durable::sync_name(disk, &path) {
            let error = failed("syncing the name of", &path, error);
            draft.dir.fail(&error);
            let mut now = lock(&self.state);
            (now.broken, now.sync_failed) = (Some(error.clone()), true);
            return Err(error);
        }
        // Not before: a power cut must leave one of the two.
        if let Some((_, there)) = old.place.as_ref().filter(|(_, there)| *there != path)
            && let Err(error) = durable::remove(disk, there)
        {
            // Its directory has failed; should it come back, a sealed file counts before another one.
            tracing::warn!(path = %there.display(), %error, "the replica that a copy replaced stays");
        }
        let mut now = lock(&self.state);
        now.name_synced = true;
        Ok(Settled { epoch: now.epoch, length: now.length, digest: now.digest, sealed: true })
    }

    /// One record, verified.
    fn record(&self, file: &dyn DiskFile, entry: &Entry) -> FsResult<v1::FetchedRecord> {
        let header = self.read_header(file, entry)?;
        let mut payload = Vec::new();
        file.append_exact_at(&mut payload, entry.length as usize, entry.payload_position())
            .map_err(|error| self.unreadable(entry.offset, &error))?;
        if !units_match(&payload, &header.checksums) {
            return Err(self.corrupt(entry.offset, "its checksums do not match"));
        }
        Ok(v1::FetchedRecord {
            offset: entry.offset,
            ino: header.ino.get(),
            file_offset: header.file_offset.get(),
            checksums: header.checksums,
            payload: payload.into(),
        })
    }

    /// The records from the one at `offset` on, verified: one at least, more while they are short. `end`: the chunk's
    /// length as the asker knows it. Blocks.
    ///
    /// # Errors
    /// ERROR_NO_CHUNK; ERROR_RANGE beyond the length or inside a record; ERROR_CORRUPT; what the disk says.
    pub fn records(&self, offset: u64, end: u64) -> FsResult<Vec<v1::FetchedRecord>> {
        let upto = end.min(offset.saturating_add(FETCH_BYTES));
        let (file, entries) = self.locate(offset, upto)?;
        if entries.first().is_none_or(|first| first.offset != offset) {
            let text = format_args!("no record begins at offset {offset}");
            return Err(self.error(ErrorCode::ErrorRange, text));
        }
        let mut records = Vec::with_capacity(entries.len());
        for entry in entries.iter().filter(|entry| entry.end() <= end).take(FETCH_RECORDS) {
            match self.record(&*file, entry) {
                Ok(record) => records.push(record),
                Err(error) if records.is_empty() => return Err(error),
                // Those before it are good; whoever wants this one hears why it is not to be had.
                Err(_) => break,
            }
        }
        if records.is_empty() {
            let text = format_args!("{end} is inside the record at offset {offset}");
            return Err(self.error(ErrorCode::ErrorRange, text));
        }
        Ok(records)
    }
}
