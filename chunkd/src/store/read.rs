//! Reading from a chunk: whole checksum units that cover a range, with the checksums that were stored with them.
//!
//! Everything is verified here, so that damage is found where it is and reported to the master; and once more, end to end, by
//! whoever asked, so that a bit that flips on the way is found too.

use super::file::Chunk;
use super::format::{Entry, Record};
use bytes::Bytes;
use dfs_proto::checksum::crc32c;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{CHECKSUM_UNIT, READ_MAX};
use dfs_proto::{FsError, FsResult, v1};
use std::ops::Range;

/// From how many records on one long read (headers and payloads together) is cheaper than two for each record.
const SPAN_RECORDS: usize = 8;

/// Bytes of a chunk.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// The chunk offset of the first byte.
    pub start: u64,
    pub units: Vec<v1::Unit>,
    pub data: Bytes,
}

/// The part of a record's payload that a read needs: whole units.
struct Wanted {
    entry: Entry,
    payload: Range<usize>,
}

impl Wanted {
    fn new(entry: Entry, offset: u64, end: u64) -> Self {
        let length = entry.length as usize;
        // Both lie inside the record, whose length is a u32.
        let inside =
            |at: u64| usize::try_from(at.saturating_sub(entry.offset)).map_or(length, |at| at.min(length));
        let from = inside(offset) / CHECKSUM_UNIT * CHECKSUM_UNIT;
        let to = inside(end).next_multiple_of(CHECKSUM_UNIT).min(length);
        Self { entry, payload: from..to }
    }

    fn add_units(&self, record: &Record, units: &mut Vec<v1::Unit>) {
        let mut at = self.payload.start;
        while at < self.payload.end {
            let length = (self.payload.end - at).min(CHECKSUM_UNIT);
            let checksum = record.checksums[at / CHECKSUM_UNIT];
            units.push(v1::Unit { length: u32::try_from(length).expect("at most a unit"), checksum });
            at += length;
        }
    }
}

impl Chunk {
    /// Reads whole units that cover `length` bytes at `offset`. Blocks.
    ///
    /// # Errors
    /// ERROR_INVALID for an empty or too long range, ERROR_NO_CHUNK, ERROR_RANGE beyond the length, ERROR_CORRUPT when
    /// a header or the footer is damaged; what the disk says.
    pub fn read(&self, offset: u64, length: usize) -> FsResult<Piece> {
        let end = offset.checked_add(length as u64).filter(|_| (1..=READ_MAX).contains(&length));
        let Some(end) = end else {
            let text = format!("a read of {length} bytes at {offset}");
            return Err(FsError::new(ErrorCode::ErrorInvalid, text));
        };
        let (file, entries) = self.locate(offset, end)?;
        let wanted: Vec<Wanted> = entries.into_iter().map(|entry| Wanted::new(entry, offset, end)).collect();
        let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else {
            return Err(self.corrupt(offset, "the index has no record for it"));
        };
        let start = first.entry.offset + first.payload.start as u64;
        let mut units = Vec::new();
        let mut data = Vec::with_capacity(wanted.iter().map(|part| part.payload.len()).sum());
        if wanted.len() > SPAN_RECORDS {
            let from = first.entry.position;
            let span = last.entry.payload_position() + last.payload.end as u64 - from;
            let span = usize::try_from(span).map_err(|_| self.corrupt(offset, "its index"))?;
            let mut bytes = Vec::new();
            file.append_exact_at(&mut bytes, span, from).map_err(|error| self.unreadable(offset, &error))?;
            for part in &wanted {
                let outside = || self.corrupt(part.entry.offset, "its place in the index");
                let at = part.entry.position.checked_sub(from).and_then(|at| usize::try_from(at).ok());
                let at = at.ok_or_else(outside)?;
                let payload = at + part.entry.header_len();
                let header = bytes.get(at..payload).ok_or_else(outside)?;
                part.add_units(&self.parse_header(header, &part.entry)?, &mut units);
                let found = bytes.get(payload + part.payload.start..payload + part.payload.end);
                data.extend_from_slice(found.ok_or_else(outside)?);
            }
        } else {
            for part in &wanted {
                part.add_units(&self.read_header(&*file, &part.entry)?, &mut units);
                let from = part.entry.payload_position() + part.payload.start as u64;
                file.append_exact_at(&mut data, part.payload.len(), from)
                    .map_err(|error| self.unreadable(part.entry.offset, &error))?;
            }
        }
        let mut at = 0;
        for unit in &units {
            let end = at + unit.length as usize;
            if crc32c(&data[at..end]) != unit.checksum {
                return Err(self.corrupt(start + at as u64, "its checksum does not match"));
            }
            at = end;
        }
        Ok(Piece { start, units, data: Bytes::from(data) })
    }
}
