//! What a start makes of a chunk file: a sealed one is believed by its footer, any other is read from end to end.
//!
//! The scan stops at the first byte that is no valid record in its place.
//!
//! * Nothing valid after it: zeroes that an append wrote ahead, or a torn tail, written but never synced when the power
//!   went. It is cut.
//! * Valid records after it: nothing is cut. The records before it count, the file takes no more appends. When a later
//!   record was written after bytes beyond the gap had been synced, the gap is *damage* (a flipped bit, a lost block),
//!   and is reported; otherwise blocks of an unsynced tail merely reached the disk out of order. A seal at or below the
//!   gap cuts the rest and heals the file.
//! * A Seal record: the footer was torn or damaged and is written again.
//!
//! Assumed of the medium: 64 aligned bytes are written whole or not at all; a synced byte stays or its checksum tells.

use super::durable;
use super::format::{
    CHUNK_HEADER_AT, Entry, FILE_HEADER, FileHeader, FormatError, RECORD_HEADER, RECORD_HEADER_MAX,
    RECORD_MAGIC, Record, RecordKind, TRAILER, Trailer, digest, encode_footer,
};
use dfs_env::disk::{Disk, DiskFile, OpenMode};
use dfs_proto::checksum::units_match;
use dfs_proto::limits::RECORD_MAX;
use dfs_proto::{ByteLen, ChunkId, Epoch};
use std::io;
use std::path::Path;

/// The condition of a chunk file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Takes appends.
    Open,
    /// Has a gap after its valid records; `proven`: synced bytes were lost.
    Damaged { proven: bool },
    /// Complete, unchangeable, with a footer.
    Sealed,
}

/// A chunk file as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub condition: Condition,
    pub epoch: Epoch,
    pub capacity: ByteLen,
    /// Valid payload bytes from offset 0 on.
    pub length: u64,
    /// Where the next record is written in the file.
    pub position: u64,
    pub file_bytes: u64,
    pub digest: u32,
    /// Where the data records stand; empty for a sealed chunk, whose footer has it.
    pub index: Vec<Entry>,
    /// What was cut or found damaged, in words.
    pub remark: Option<String>,
}

/// What a file turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    Chunk(Found),
    /// The file was being created when the power went: nothing was ever in it. It has been removed.
    Nothing,
    /// Not a chunk file of this name, cluster and format; left alone. Says why.
    Foreign(String),
}

/// Opens a chunk file, repairs what a crash left, and says what it holds. Blocks.
///
/// # Errors
/// What the disk says.
pub fn open(disk: &dyn Disk, path: &Path, chunk: ChunkId, cluster: [u8; 16]) -> io::Result<Opened> {
    let file = disk.open(path, OpenMode::Write)?;
    let file_len = file.len()?;
    let mut bytes = [0; FILE_HEADER];
    let header = if file_len < FILE_HEADER as u64 {
        Err(FormatError::Short)
    } else {
        file.read_exact_at(&mut bytes, CHUNK_HEADER_AT)?;
        FileHeader::decode(&bytes)
    };
    match &header {
        Err(version @ FormatError::Version(_)) => return Ok(Opened::Foreign(version.to_string())),
        Ok(header) if header.chunk != chunk => {
            return Ok(Opened::Foreign(format!("its header names chunk {}", header.chunk)));
        }
        Ok(header) if header.cluster != cluster => {
            return Ok(Opened::Foreign("it belongs to another cluster".to_owned()));
        }
        Ok(header) if header.sealed => {
            if let Some(trailer) = read_trailer(&*file, chunk, file_len)? {
                return Ok(Opened::Chunk(sealed(header.capacity, &trailer, file_len)));
            }
        }
        _ => {}
    }
    read_from_medium(&*file, file_len)?;
    let mut scan = Scan::new(&*file, chunk, file_len);
    scan.run()?;
    if scan.records == 0 && header.is_err() && !scan.gap_before_records()? {
        drop(file);
        durable::remove(disk, path)?;
        return Ok(Opened::Nothing);
    }
    scan.finish(header.as_ref().ok(), cluster).map(Opened::Chunk)
}

/// Has what is read next come from the disk. After an fdatasync that failed, in an earlier life of the process too, the kernel
/// calls pages clean that are not there: what is found in them would be reported as held, and be gone with the power. Pages that
/// are still to be written are not forgotten, so they are written first.
fn read_from_medium(file: &dyn DiskFile, file_len: u64) -> io::Result<()> {
    file.sync_data()?;
    file.forget_cached(0..file_len)
}

/// A sealed file's trailer, when it is valid.
///
/// # Errors
/// What the disk says.
pub fn read_trailer(file: &dyn DiskFile, chunk: ChunkId, file_len: u64) -> io::Result<Option<Trailer>> {
    let Some(at) = file_len.checked_sub(TRAILER as u64) else { return Ok(None) };
    let mut bytes = [0; TRAILER];
    file.read_exact_at(&mut bytes, at)?;
    Ok(Trailer::decode(&bytes, chunk, file_len).ok())
}

/// A sealed file's index from its footer, or why there is none.
///
/// # Errors
/// What the disk says.
pub fn read_footer(file: &dyn DiskFile, chunk: ChunkId) -> io::Result<Result<Vec<Entry>, FormatError>> {
    let file_len = file.len()?;
    let Some(trailer) = read_trailer(file, chunk, file_len)? else { return Ok(Err(FormatError::Magic)) };
    let length = file_len - TRAILER as u64 - trailer.index_position;
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, trailer.index_position)?;
    Ok(trailer.decode_index(&bytes))
}

/// The index of a sealed chunk of `length` bytes from its records' headers; nothing when one of them is damaged.
///
/// # Errors
/// What the disk says.
pub fn rebuild_index(file: &dyn DiskFile, chunk: ChunkId, length: u64) -> io::Result<Option<Vec<Entry>>> {
    let mut scan = Scan::new(file, chunk, file.len()?);
    while scan.length < length {
        match scan.window.record(chunk, scan.position, false)? {
            Some(record) if record.offset.get() == scan.length => scan.take(&record),
            _ => return Ok(None),
        }
    }
    Ok((scan.length == length).then_some(scan.index))
}

/// Reads a sealed file from end to end: its length and digest, or what is wrong with it.
///
/// # Errors
/// What the disk says.
pub fn verify(file: &dyn DiskFile, chunk: ChunkId) -> io::Result<Result<(u64, u32), String>> {
    let file_len = file.len()?;
    if file_len < (FILE_HEADER + TRAILER) as u64 {
        return Ok(Err("it is too short".to_owned()));
    }
    let mut bytes = [0; FILE_HEADER];
    file.read_exact_at(&mut bytes, CHUNK_HEADER_AT)?;
    match FileHeader::decode(&bytes) {
        Ok(header) if header.chunk == chunk && header.sealed => {}
        Ok(_) => return Ok(Err("its header is another one".to_owned())),
        Err(error) => return Ok(Err(format!("its header: {error}"))),
    }
    let mut scan = Scan::new(file, chunk, file_len);
    scan.run()?;
    if !scan.seal {
        let text = format!("no valid record at offset {}, file byte {}", scan.length, scan.position);
        return Ok(Err(text));
    }
    let fits = match (read_trailer(file, chunk, file_len)?, read_footer(file, chunk)?) {
        (Some(trailer), Ok(index)) => {
            (trailer.index_position, trailer.length.get(), trailer.digest)
                == (scan.position, scan.length, scan.digest)
                && index == scan.index
        }
        _ => false,
    };
    Ok(if fits {
        Ok((scan.length, scan.digest))
    } else {
        Err("its footer does not fit the records".to_owned())
    })
}

fn sealed(capacity: ByteLen, trailer: &Trailer, file_len: u64) -> Found {
    Found {
        condition: Condition::Sealed,
        epoch: trailer.epoch,
        capacity,
        length: trailer.length.get(),
        position: file_len,
        file_bytes: file_len,
        digest: trailer.digest,
        index: Vec::new(),
        remark: None,
    }
}

/// Marks a file as sealed and ends it with its footer, which begins at `index_position`. One sync makes both durable;
/// whatever part of it a crash keeps, the Seal record before the footer lets the next start write it again.
///
/// # Errors
/// What the disk says.
pub fn write_footer(
    file: &dyn DiskFile,
    header: &FileHeader,
    epoch: Epoch,
    index_position: u64,
    index: &[Entry],
    digest: u32,
) -> io::Result<u64> {
    let footer = encode_footer(header.chunk, epoch, index_position, index, digest);
    let end = index_position + footer.len() as u64;
    file.write_all_at(&footer, index_position)?;
    if file.len()? != end {
        file.set_len(end)?;
    }
    file.write_all_at(&FileHeader { sealed: true, ..header.clone() }.encode(), CHUNK_HEADER_AT)?;
    file.sync_data()?;
    Ok(end)
}

/// A read through a file with what it has found so far.
struct Scan<'a> {
    window: Window<'a>,
    chunk: ChunkId,
    position: u64,
    length: u64,
    epoch: Epoch,
    digest: u32,
    index: Vec<Entry>,
    /// Valid records of any kind.
    records: u64,
    seal: bool,
}

impl<'a> Scan<'a> {
    fn new(file: &'a dyn DiskFile, chunk: ChunkId, file_len: u64) -> Self {
        let window = Window { file, file_len, base: 0, bytes: Vec::new() };
        let (position, epoch) = (FILE_HEADER as u64, Epoch(0));
        let (length, digest, records, index) = (0, 0, 0, Vec::new());
        Self { window, chunk, position, length, epoch, digest, index, records, seal: false }
    }

    /// Goes on to the first byte that is no valid record in its place, or to a Seal record.
    fn run(&mut self) -> io::Result<()> {
        while let Some(record) = self.window.record(self.chunk, self.position, true)? {
            if record.offset.get() != self.length {
                break;
            }
            self.take(&record);
            if self.seal {
                break;
            }
        }
        Ok(())
    }

    fn take(&mut self, record: &Record) {
        self.records += 1;
        self.epoch = self.epoch.max(record.epoch);
        self.position = record.end_position();
        match record.kind {
            RecordKind::Data => {
                self.length += u64::from(record.length);
                self.digest = digest(self.digest, record.offset, record.length, &record.checksums);
                self.index.push(record.entry());
            }
            RecordKind::Epoch => {}
            RecordKind::Seal => self.seal = true,
        }
    }

    fn gap_before_records(&mut self) -> io::Result<bool> {
        Ok(self.resync()?.found)
    }

    /// Looks for valid records after the place where the scan stopped.
    fn resync(&mut self) -> io::Result<Beyond> {
        let mut beyond = Beyond::default();
        // The record that stands there is the gap: its header may be whole and only its payload torn.
        let mut at = self.position + 1;
        while let Some(candidate) = self.window.find_magic(at)? {
            at = candidate + 1;
            if let Some(record) = self.window.record(self.chunk, candidate, false)? {
                beyond.found = true;
                beyond.epoch = beyond.epoch.max(record.epoch);
                beyond.proven |= record.synced.get() > self.length;
                at = at.max(record.end_position().min(self.window.file_len));
            }
        }
        Ok(beyond)
    }

    fn finish(mut self, header: Option<&FileHeader>, cluster: [u8; 16]) -> io::Result<Found> {
        let (file, file_len) = (self.window.file, self.window.file_len);
        let capacity = header.map_or(ByteLen(0), |header| header.capacity);
        let mut epoch = header.map_or(self.epoch, |header| header.epoch.max(self.epoch));
        if self.seal {
            let header = FileHeader { chunk: self.chunk, epoch, capacity, cluster, sealed: true };
            let end = write_footer(file, &header, epoch, self.position, &self.index, self.digest)?;
            let remark = Some("its footer was incomplete and has been written again".to_owned());
            let (condition, length, position, digest) = (Condition::Sealed, self.length, end, self.digest);
            let (file_bytes, index) = (end, Vec::new());
            return Ok(Found {
                condition,
                epoch,
                capacity,
                length,
                position,
                file_bytes,
                digest,
                index,
                remark,
            });
        }
        if let Some(header) = header.filter(|header| header.sealed) {
            // The crash kept the mark of a seal but not the seal.
            let open = FileHeader { sealed: false, ..header.clone() };
            file.write_all_at(&open.encode(), CHUNK_HEADER_AT)?;
            file.sync_data()?;
        }
        let torn = file_len - self.position.min(file_len);
        let beyond = if torn > 0 { self.resync()? } else { Beyond::default() };
        epoch = epoch.max(beyond.epoch);
        let (condition, position, remark) = if beyond.found || header.is_none() {
            let proven = beyond.proven || header.is_none();
            let what = match (&header, proven) {
                (None, _) => "its header is damaged".to_owned(),
                (_, true) => format!("damaged at chunk offset {}, file byte {}", self.length, self.position),
                _ => format!("an unsynced tail has a gap at chunk offset {}", self.length),
            };
            (Condition::Damaged { proven }, file_len, Some(what))
        } else if torn > 0 {
            let ahead = self.window.is_zero_from(self.position)?;
            durable::cut(file, self.position)?;
            let what = || format!("a torn tail of {torn} bytes was cut at chunk offset {}", self.length);
            (Condition::Open, self.position, (!ahead).then(what))
        } else {
            (Condition::Open, self.position, None)
        };
        Ok(Found {
            condition,
            epoch,
            capacity,
            length: self.length,
            position,
            file_bytes: position,
            digest: self.digest,
            index: self.index,
            remark,
        })
    }
}

/// What stands after the place where a scan stopped.
#[derive(Default)]
struct Beyond {
    found: bool,
    proven: bool,
    epoch: Epoch,
}

/// A part of a file in memory, moved forward as needed.
struct Window<'a> {
    file: &'a dyn DiskFile,
    file_len: u64,
    base: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    const SIZE: u64 = 4 << 20;

    /// `length` bytes at `position`, fewer at the end of the file.
    fn bytes(&mut self, position: u64, length: usize) -> io::Result<&[u8]> {
        if position >= self.file_len {
            return Ok(&[]);
        }
        let end = self.file_len.min(position.saturating_add(length as u64));
        let inside = position >= self.base && end <= self.base + self.bytes.len() as u64;
        if !inside {
            let window_end = self.file_len.min(position.saturating_add(Self::SIZE));
            let size = usize::try_from(window_end.saturating_sub(position)).map_err(io::Error::other)?;
            self.bytes.resize(size, 0);
            self.base = position;
            self.file.read_exact_at(&mut self.bytes, position)?;
        }
        let from = usize::try_from(position - self.base).map_err(io::Error::other)?;
        let to = usize::try_from(end - self.base).map_err(io::Error::other)?;
        Ok(&self.bytes[from..to])
    }

    /// Whether nothing but zeroes stands from `position` on.
    fn is_zero_from(&mut self, mut position: u64) -> io::Result<bool> {
        while position < self.file_len {
            let bytes = self.bytes(position, RECORD_MAX)?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            position += bytes.len() as u64;
        }
        Ok(true)
    }

    /// The valid record at `position`; `whole`: its payload must be there and match too.
    fn record(&mut self, chunk: ChunkId, position: u64, whole: bool) -> io::Result<Option<Record>> {
        let Ok(record) = Record::decode(self.bytes(position, RECORD_HEADER_MAX)?, chunk, position) else {
            return Ok(None);
        };
        if whole {
            let payload = self.bytes(position + record.header_len() as u64, record.length as usize)?;
            if payload.len() != record.length as usize || !units_match(payload, &record.checksums) {
                return Ok(None);
            }
        }
        Ok(Some(record))
    }

    /// The next place from `position` on where a record may begin.
    fn find_magic(&mut self, mut position: u64) -> io::Result<Option<u64>> {
        while position + RECORD_HEADER as u64 <= self.file_len {
            let bytes = self.bytes(position, RECORD_MAX)?;
            if let Some(at) = bytes.windows(RECORD_MAGIC.len()).position(|four| four == RECORD_MAGIC) {
                return Ok(Some(position + at as u64));
            }
            // The magic may stand across the end of what was searched.
            position += (bytes.len() - (RECORD_MAGIC.len() - 1)) as u64;
        }
        Ok(None)
    }
}
