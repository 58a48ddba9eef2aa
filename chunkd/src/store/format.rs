//! The bytes of a chunk file: header, records, footer. The only place that knows them; `docs/formats/chunk.md` has the map.
//!
//! All numbers are little endian. A record knows its own place in the file, so neither a misplaced write nor a copy of
//! a chunk file that somebody stores *inside* a chunk can be taken for a record of this file.

use dfs_proto::checksum::{crc32c, crc32c_append};
use dfs_proto::limits::{CHECKSUM_UNIT, RECORD_MAX};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, Epoch, InodeNo};

/// The version of this format. Files of another one are left alone.
pub const FORMAT_VERSION: u32 = 1;
/// The length of a file's header.
pub const FILE_HEADER: usize = 64;
/// The length of a record's header without its checksums of units.
pub const RECORD_HEADER: usize = 68;
/// The length of a header with the most checksums it may have.
pub const RECORD_HEADER_MAX: usize = RECORD_HEADER + 4 * UNITS_MAX;
/// The most units one record may have.
pub const UNITS_MAX: usize = RECORD_MAX / CHECKSUM_UNIT;
/// The length of one entry of the footer's index.
pub const INDEX_ENTRY: usize = 20;
/// The length of the trailer, the last bytes of a sealed file.
pub const TRAILER: usize = 64;
/// What every record begins with.
pub const RECORD_MAGIC: [u8; 4] = *b"dfsR";

/// Where the file header stands.
pub const CHUNK_HEADER_AT: u64 = 0;

const FILE_MAGIC: [u8; 8] = *b"dfschunk";
const TRAILER_MAGIC: [u8; 8] = *b"dfssealx";

/// Why bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("it ends too early")]
    Short,
    #[error("it does not begin as it should")]
    Magic,
    #[error("its checksum does not match")]
    Checksum,
    #[error("it has format version {0}, this program knows version {FORMAT_VERSION}")]
    Version(u32),
    #[error("it is for another chunk or place")]
    Place,
    #[error("a field is out of its range")]
    Field,
}

/// The first bytes of a chunk file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHeader {
    pub chunk: ChunkId,
    /// The epoch that the file was created in; of a sealed one, the epoch that it was sealed in.
    pub epoch: Epoch,
    /// Payload bytes the chunk may hold; 0: created by a fence, takes no appends.
    pub capacity: ByteLen,
    /// The cluster's id in ASCII, padded with zero bytes.
    pub cluster: [u8; 16],
    /// A footer ends the file. Said here, where no payload can stand, so that no payload passes for a footer.
    pub sealed: bool,
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// A payload.
    Data,
    /// Appends below `epoch` are refused from here on. No payload.
    Epoch,
    /// Nothing is appended any more; the footer follows. No payload.
    Seal,
}

/// A record's header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub kind: RecordKind,
    pub chunk: ChunkId,
    pub epoch: Epoch,
    /// Where the header's first byte stands in the file.
    pub position: u64,
    /// Where the payload begins in the chunk's payload bytes; without a payload: where the next one will.
    pub offset: ByteOffset,
    /// The payload's length.
    pub length: u32,
    /// Payload bytes below this were fdatasync'ed here before this record was written: damage there is no torn write.
    pub synced: ByteOffset,
    pub ino: InodeNo,
    pub file_offset: ByteOffset,
    /// CRC-32C of each unit of the payload.
    pub checksums: Vec<u32>,
}

/// Where a data record stands: an entry of the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub offset: u64,
    pub position: u64,
    pub length: u32,
}

/// The last bytes of a sealed chunk file; the index stands right before them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trailer {
    pub chunk: ChunkId,
    pub epoch: Epoch,
    /// The chunk's final length in payload bytes.
    pub length: ByteLen,
    /// Where the index begins in the file.
    pub index_position: u64,
    pub entries: u64,
    /// [`digest`] over all data records.
    pub digest: u32,
    /// CRC-32C of the index.
    pub index_checksum: u32,
}

impl Entry {
    /// The payload offset after the record's last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.length)
    }

    /// The length of the record's header.
    #[must_use]
    pub fn header_len(&self) -> usize {
        RECORD_HEADER + 4 * (self.length as usize).div_ceil(CHECKSUM_UNIT)
    }

    /// Where the payload begins in the file.
    #[must_use]
    pub fn payload_position(&self) -> u64 {
        self.position + self.header_len() as u64
    }

    /// Where the next record begins in the file.
    #[must_use]
    pub fn end_position(&self) -> u64 {
        self.payload_position() + u64::from(self.length)
    }
}

/// Reads numbers one after the other; the caller has checked the length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N);
        self.0 = rest;
        head.try_into().expect("split at N")
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

fn closing_checksum(bytes: &[u8]) -> Result<&[u8], FormatError> {
    let (body, sum) = bytes.split_at(bytes.len() - 4);
    if crc32c(body).to_le_bytes() == sum { Ok(body) } else { Err(FormatError::Checksum) }
}

impl FileHeader {
    #[must_use]
    pub fn encode(&self) -> [u8; FILE_HEADER] {
        let mut out = [0; FILE_HEADER];
        out[..8].copy_from_slice(&FILE_MAGIC);
        out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.epoch.get().to_le_bytes());
        out[16..24].copy_from_slice(&self.chunk.get().to_le_bytes());
        out[24..32].copy_from_slice(&self.capacity.get().to_le_bytes());
        out[32..48].copy_from_slice(&self.cluster);
        out[48] = u8::from(self.sealed);
        let sum = crc32c(&out[..FILE_HEADER - 4]);
        out[FILE_HEADER - 4..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// # Errors
    /// When the bytes are no header of this format.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = bytes.get(..FILE_HEADER).ok_or(FormatError::Short)?;
        let mut fields = Fields(closing_checksum(bytes)?);
        if fields.take::<8>() != FILE_MAGIC {
            return Err(FormatError::Magic);
        }
        match fields.u32() {
            FORMAT_VERSION => {}
            version => return Err(FormatError::Version(version)),
        }
        Ok(Self {
            epoch: Epoch(fields.u32()),
            chunk: ChunkId(fields.u64()),
            capacity: ByteLen(fields.u64()),
            cluster: fields.take(),
            sealed: fields.take::<1>()[0] != 0,
        })
    }
}

impl Record {
    /// The length of this record's header.
    #[must_use]
    pub fn header_len(&self) -> usize {
        RECORD_HEADER + 4 * self.checksums.len()
    }

    /// The header's bytes; the payload follows them in the file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.header_len());
        out.extend(RECORD_MAGIC);
        out.push(match self.kind {
            RecordKind::Data => 1,
            RecordKind::Epoch => 2,
            RecordKind::Seal => 3,
        });
        out.push(1); // the version of the record's layout
        out.extend(u16::try_from(self.checksums.len()).expect("at most UNITS_MAX").to_le_bytes());
        out.extend(self.chunk.get().to_le_bytes());
        out.extend(self.position.to_le_bytes());
        out.extend(self.offset.get().to_le_bytes());
        out.extend(self.length.to_le_bytes());
        out.extend(self.epoch.get().to_le_bytes());
        out.extend(self.synced.get().to_le_bytes());
        out.extend(self.ino.get().to_le_bytes());
        out.extend(self.file_offset.get().to_le_bytes());
        for sum in &self.checksums {
            out.extend(sum.to_le_bytes());
        }
        // The header's own checksum stands last but is part of the fixed length: it covers everything before it.
        let sum = crc32c(&out);
        out.extend(sum.to_le_bytes());
        out
    }

    /// The header at the beginning of `bytes`, which were read at `position` of the file of `chunk`.
    ///
    /// # Errors
    /// When no valid header of this chunk and position stands there.
    pub fn decode(bytes: &[u8], chunk: ChunkId, position: u64) -> Result<Self, FormatError> {
        if bytes.len() < RECORD_HEADER {
            return Err(FormatError::Short);
        }
        if bytes[..4] != RECORD_MAGIC {
            return Err(FormatError::Magic);
        }
        let units = usize::from(u16::from_le_bytes([bytes[6], bytes[7]]));
        if units > UNITS_MAX {
            return Err(FormatError::Field);
        }
        let bytes = bytes.get(..RECORD_HEADER + 4 * units).ok_or(FormatError::Short)?;
        let body = closing_checksum(bytes)?;
        if body[5] != 1 {
            return Err(FormatError::Version(u32::from(body[5])));
        }
        let kind = match body[4] {
            1 => RecordKind::Data,
            2 => RecordKind::Epoch,
            3 => RecordKind::Seal,
            _ => return Err(FormatError::Field),
        };
        let mut fields = Fields(&body[8..]);
        let record = Self {
            kind,
            chunk: ChunkId(fields.u64()),
            position: fields.u64(),
            offset: ByteOffset(fields.u64()),
            length: fields.u32(),
            epoch: Epoch(fields.u32()),
            synced: ByteOffset(fields.u64()),
            ino: InodeNo(fields.u64()),
            file_offset: ByteOffset(fields.u64()),
            checksums: (0..units).map(|_| fields.u32()).collect(),
        };
        if record.chunk != chunk || record.position != position {
            return Err(FormatError::Place);
        }
        let fits = record.length as usize <= RECORD_MAX
            && (record.length as usize).div_ceil(CHECKSUM_UNIT) == units
            && (kind == RecordKind::Data) == (record.length > 0)
            && record.offset.get().checked_add(u64::from(record.length)).is_some();
        if fits { Ok(record) } else { Err(FormatError::Field) }
    }

    /// This record's entry in the index.
    #[must_use]
    pub fn entry(&self) -> Entry {
        Entry { offset: self.offset.get(), position: self.position, length: self.length }
    }

    /// Where the next record begins in the file.
    #[must_use]
    pub fn end_position(&self) -> u64 {
        self.position + self.header_len() as u64 + u64::from(self.length)
    }
}

/// A checksum of what a chunk holds, independent of where records stand in the file: replicas that hold the same
/// records have the same digest. `digest` is the one of the records before, 0 for none.
#[must_use]
pub fn digest(digest: u32, offset: ByteOffset, length: u32, checksums: &[u32]) -> u32 {
    let mut sum = crc32c_append(digest, &offset.get().to_le_bytes());
    sum = crc32c_append(sum, &length.to_le_bytes());
    checksums.iter().fold(sum, |sum, unit| crc32c_append(sum, &unit.to_le_bytes()))
}

/// The footer that follows the Seal record: index and trailer.
#[must_use]
pub fn encode_footer(
    chunk: ChunkId,
    epoch: Epoch,
    index_position: u64,
    index: &[Entry],
    digest: u32,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(index.len() * INDEX_ENTRY + TRAILER);
    for entry in index {
        out.extend(entry.offset.to_le_bytes());
        out.extend(entry.position.to_le_bytes());
        out.extend(entry.length.to_le_bytes());
    }
    let index_checksum = crc32c(&out);
    let begin = out.len();
    out.extend(TRAILER_MAGIC);
    out.extend(FORMAT_VERSION.to_le_bytes());
    out.extend(epoch.get().to_le_bytes());
    out.extend(chunk.get().to_le_bytes());
    out.extend(index.last().map_or(0, Entry::end).to_le_bytes());
    out.extend(index_position.to_le_bytes());
    out.extend((index.len() as u64).to_le_bytes());
    out.extend(digest.to_le_bytes());
    out.extend(index_checksum.to_le_bytes());
    out.extend([0; 4]);
    let sum = crc32c(&out[begin..]);
    out.extend(sum.to_le_bytes());
    out
}

impl Trailer {
    /// The trailer at the end of a file of `file_len` bytes, whose last bytes are `bytes`.
    ///
    /// # Errors
    /// When no valid trailer of this chunk and length stands there.
    pub fn decode(bytes: &[u8], chunk: ChunkId, file_len: u64) -> Result<Self, FormatError> {
        if bytes.len() != TRAILER {
            return Err(FormatError::Short);
        }
        if bytes[..8] != TRAILER_MAGIC {
            return Err(FormatError::Magic);
        }
        let mut fields = Fields(&closing_checksum(bytes)?[8..]);
        match fields.u32() {
            FORMAT_VERSION => {}
            version => return Err(FormatError::Version(version)),
        }
        let epoch = Epoch(fields.u32());
        let found = ChunkId(fields.u64());
        let trailer = Self {
            chunk: found,
            epoch,
            length: ByteLen(fields.u64()),
            index_position: fields.u64(),
            entries: fields.u64(),
            digest: fields.u32(),
            index_checksum: fields.u32(),
        };
        let end = trailer
            .entries
            .checked_mul(INDEX_ENTRY as u64)
            .and_then(|bytes| bytes.checked_add(trailer.index_position))
            .and_then(|bytes| bytes.checked_add(TRAILER as u64));
        if found != chunk || end != Some(file_len) {
            return Err(FormatError::Place);
        }
        Ok(trailer)
    }

    /// The index in front of this trailer: entries without gaps from offset 0 to the length.
    ///
    /// # Errors
    /// When the bytes are not the index that this trailer was written for.
    pub fn decode_index(&self, bytes: &[u8]) -> Result<Vec<Entry>, FormatError> {
        if bytes.len() as u64 != self.entries * INDEX_ENTRY as u64 {
            return Err(FormatError::Short);
        }
        if crc32c(bytes) != self.index_checksum {
            return Err(FormatError::Checksum);
        }
        let mut next = 0;
        let mut index = Vec::with_capacity(bytes.len() / INDEX_ENTRY);
        for entry in bytes.chunks_exact(INDEX_ENTRY) {
            let mut fields = Fields(entry);
            let entry = Entry { offset: fields.u64(), position: fields.u64(), length: fields.u32() };
            if entry.offset != next || entry.length as usize > RECORD_MAX {
                return Err(FormatError::Field);
            }
            next = entry.end();
            index.push(entry);
        }
        if next == self.length.get() { Ok(index) } else { Err(FormatError::Field) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfs_proto::checksum::unit_checksums;
    use proptest::prelude::*;

    fn data(position: u64, offset: u64, payload: &[u8]) -> Record {
        Record {
            kind: RecordKind::Data,
            chunk: ChunkId(7),
            epoch: Epoch(2),
            position,
            offset: ByteOffset(offset),
            length: u32::try_from(payload.len()).expect("small"),
            synced: ByteOffset(offset / 2),
            ino: InodeNo(11),
            file_offset: ByteOffset(13),
            checksums: unit_checksums(payload),
        }
    }

    #[test]
    fn the_bytes_of_a_record_are_these() {
        let bytes = data(64, 3, b"hello").encode();
        assert_eq!(bytes.len(), RECORD_HEADER + 4);
        assert_eq!(bytes[..8], *b"dfsR\x01\x01\x01\x00");
        assert_eq!(bytes[8..16], 7_u64.to_le_bytes());
        assert_eq!(bytes[16..24], 64_u64.to_le_bytes());
        assert_eq!(bytes[24..32], 3_u64.to_le_bytes());
        assert_eq!(bytes[32..36], 5_u32.to_le_bytes());
        assert_eq!(bytes[36..40], 2_u32.to_le_bytes());
        assert_eq!(bytes[40..48], 1_u64.to_le_bytes());
        assert_eq!(bytes[48..56], 11_u64.to_le_bytes());
        assert_eq!(bytes[56..64], 13_u64.to_le_bytes());
        // hello's CRC-32C, as other programs compute it
        assert_eq!(bytes[64..68], 0x9a71_bb4c_u32.to_le_bytes());
    }

    proptest! {
        #[test]
        fn a_file_header_survives(chunk: u64, epoch: u32, capacity: u64, cluster: [u8; 16], sealed: bool) {
            let header = FileHeader { chunk: ChunkId(chunk), epoch: Epoch(epoch), capacity: ByteLen(capacity), cluster, sealed };
            prop_assert_eq!(FileHeader::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn a_record_survives_and_no_flipped_bit_is_accepted(
            length in 1_usize..100_000, offset in 0_u64..1 << 40, position in 0_u64..1 << 40, bit: proptest::sample::Index,
        ) {
            let record = data(position, offset, &vec![9; length]);
            let mut bytes = record.encode();
            prop_assert_eq!(Record::decode(&bytes, ChunkId(7), position), Ok(record.clone()));
            prop_assert_eq!(Record::decode(&bytes, ChunkId(8), position), Err(FormatError::Place));
            prop_assert_eq!(Record::decode(&bytes, ChunkId(7), position + 1), Err(FormatError::Place));
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Record::decode(&bytes, ChunkId(7), position).is_err());
        }

        #[test]
        fn a_footer_survives_and_no_flipped_bit_is_accepted(
            lengths in proptest::collection::vec(1_u32..5000, 0..50), bit: proptest::sample::Index,
        ) {
            let (mut offset, mut position, mut index) = (0, 64, Vec::new());
            for length in lengths {
                let entry = Entry { offset, position, length };
                (offset, position) = (entry.end(), entry.end_position());
                index.push(entry);
            }
            let mut bytes = encode_footer(ChunkId(7), Epoch(3), position, &index, 5);
            let file_len = position + bytes.len() as u64;
            let open = |bytes: &[u8]| {
                let (index, trailer) = bytes.split_at(bytes.len() - TRAILER);
                let trailer = Trailer::decode(trailer, ChunkId(7), file_len)?;
                Ok::<_, FormatError>((trailer.decode_index(index)?, trailer))
            };
            let (found, trailer) = open(&bytes).expect("valid");
            prop_assert_eq!(&found, &index);
            prop_assert_eq!((trailer.length.get(), trailer.epoch, trailer.digest), (offset, Epoch(3), 5));
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(open(&bytes).is_err());
        }
    }
}
