//! Snapshot files: the state as of one log entry.
//!
//! ```text
//! header   "dfsSNAP1"  u32 length  AppliedRow (protobuf, length bytes)  u32 CRC-32C of all before
//! block    u32 length > 0  payload  u32 CRC-32C of length and payload      any number of them
//!          payload: rows in key order, each u32 key length, u32 value length, key, value
//! end      u32 0  u64 number of rows  u32 CRC-32C of the twelve bytes before
//! ```
//!
//! Numbers are little endian. A file is written under a temporary name, fsynced, read back from the medium and checked,
//! and only then renamed into place and the directory fsynced. The two newest are kept; the log is purged up to the
//! older of them at most, so that one unreadable file loses nothing.

use super::codec::{AppliedRow, invalid};
use super::export::Rows;
use super::sim::SimStorage;
use super::sled_kv::sync_dir;
use super::types::SnapshotMeta;
use bytes::Bytes;
use dfs_env::defect::{self, Defect};
use dfs_proto::checksum::{crc32c, crc32c_append};
use prost::Message;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

const MAGIC: &[u8; 8] = b"dfsSNAP1";
/// About how long a block is, and how long one may be at most (a row is never split).
pub const BLOCK_BYTES: usize = 256 << 10;
const BLOCK_MAX: u32 = 64 << 20;
const EXTENSION: &str = "snapshot";

/// A snapshot's bytes: a file that stays readable when its name is gone, or memory.
#[derive(Clone, Debug)]
pub struct SnapshotData(Source);

#[derive(Clone, Debug)]
enum Source {
    File(Arc<fs::File>, PathBuf),
    Memory(Bytes),
}

impl SnapshotData {
    /// No bytes at all.
    pub fn empty() -> Self {
        Self(Source::Memory(Bytes::new()))
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn file(path: &Path) -> io::Result<Self> {
        Ok(Self(Source::File(Arc::new(fs::File::open(path)?), path.to_owned())))
    }

    #[cfg(fuzzing)]
    pub fn memory(bytes: Bytes) -> Self {
        Self(Source::Memory(bytes))
    }

    /// Up to `length` bytes from `offset`; empty at the end.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_at(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        match &self.0 {
            Source::Memory(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                Ok(bytes.slice(from..(from + length).min(bytes.len())))
            }
            Source::File(file, _) => {
                let mut buffer = vec![0; length];
                let mut done = 0;
                while done < length {
                    match std::os::unix::fs::FileExt::read_at(
                        &**file,
                        &mut buffer[done..],
                        offset + done as u64,
                    )? {
                        0 => break,
                        n => done += n,
                    }
                }
                buffer.truncate(done);
                Ok(buffer.into())
            }
        }
    }

    /// The length in bytes.
    ///
    /// # Errors
    /// When the file cannot be asked.
    pub fn length(&self) -> io::Result<u64> {
        match &self.0 {
            Source::Memory(bytes) => Ok(bytes.len() as u64),
            Source::File(file, _) => Ok(file.metadata()?.len()),
        }
    }

    /// Opens the snapshot from its beginning.
    ///
    /// # Errors
    /// When the header is damaged.
    pub fn open(&self) -> io::Result<SnapshotReader> {
        SnapshotReader::new(self.clone())
    }

    /// Reads everything and checks every checksum.
    ///
    /// # Errors
    /// When anything is damaged or missing.
    pub fn verify(&self) -> io::Result<AppliedRow> {
        let mut reader = self.open()?;
        while reader.block()?.is_some() {}
        Ok(reader.header)
    }
}

/// Reads a snapshot block by block, checking each.
pub struct SnapshotReader {
    from: io::BufReader<Cursor>,
    pub header: AppliedRow,
    rows: u64,
}

struct Cursor(SnapshotData, u64);

impl Read for Cursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.0.read_at(self.1, buffer.len())?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.1 += bytes.len() as u64;
        Ok(bytes.len())
    }
}

fn number(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

impl SnapshotReader {
    fn new(data: SnapshotData) -> io::Result<Self> {
        let mut from = io::BufReader::with_capacity(BLOCK_BYTES, Cursor(data, 0));
        let mut magic = [0; 8];
        from.read_exact(&mut magic)?;
        let length = number(&mut from)?;
        if &magic != MAGIC || length > 1 << 20 {
            return Err(invalid("not a snapshot file"));
        }
        let mut row = vec![0; length as usize];
        from.read_exact(&mut row)?;
        let sum = crc32c_append(crc32c_append(crc32c(&magic), &length.to_le_bytes()), &row);
        if number(&mut from)? != sum {
            return Err(invalid("the snapshot's header is damaged"));
        }
        Ok(Self { from, header: AppliedRow::read(&row)?, rows: 0 })
    }

    /// The next rows; None after the last.
    ///
    /// # Errors
    /// When the block is damaged or the end is missing.
    pub fn block(&mut self) -> io::Result<Option<Rows>> {
        let length = number(&mut self.from)?;
        if length == 0 {
            let mut count = [0; 8];
            self.from.read_exact(&mut count)?;
            let sum = crc32c_append(crc32c(&length.to_le_bytes()), &count);
            if number(&mut self.from)? != sum || u64::from_le_bytes(count) != self.rows {
                return Err(invalid("the snapshot's end is damaged"));
            }
            return Ok(None);
        }
        if length > BLOCK_MAX {
            return Err(invalid("a block of the snapshot is damaged"));
        }
        let mut payload = vec![0; length as usize];
        self.from.read_exact(&mut payload)?;
        if number(&mut self.from)? != crc32c_append(crc32c(&length.to_le_bytes()), &payload) {
            return Err(invalid("a block of the snapshot is damaged"));
        }
        let mut rest = payload.as_slice();
        let mut rows = Rows::new();
        while !rest.is_empty() {
            let (key, value) = (number(&mut rest)? as usize, number(&mut rest)? as usize);
            if key.checked_add(value).is_none_or(|both| both > rest.len()) {
                return Err(invalid("a row of the snapshot is damaged"));
            }
            rows.push((rest[..key].to_vec(), rest[key..key + value].to_vec()));
            rest = &rest[key + value..];
        }
        self.rows += rows.len() as u64;
        Ok(Some(rows))
    }
}

/// The rows of a snapshot one by one.
pub struct RowIter {
    reader: SnapshotReader,
    block: std::vec::IntoIter<(Vec<u8>, Vec<u8>)>,
    ended: bool,
}

impl From<SnapshotReader> for RowIter {
    fn from(reader: SnapshotReader) -> Self {
        Self { reader, block: Rows::new().into_iter(), ended: false }
    }
}

impl Iterator for RowIter {
    type Item = io::Result<(Vec<u8>, Vec<u8>)>;
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.block.next() {
                return Some(Ok(row));
            }
            if self.ended {
                return None;
            }
            match self.reader.block() {
                Ok(Some(rows)) => self.block = rows.into_iter(),
                Ok(None) => self.ended = true,
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// A snapshot being written: raw bytes, in order.
pub enum Draft {
    File(fs::File, PathBuf),
    Memory(Vec<u8>),
}

impl Draft {
    /// What was written to memory since the last call; nothing of a file.
    pub fn take(&mut self) -> Vec<u8> {
        match self {
            Self::File(..) => Vec::new(),
            Self::Memory(bytes) => std::mem::take(bytes),
        }
    }
}

impl Write for Draft {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file, _) => file.write(bytes),
            Self::Memory(buffer) => buffer.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Self::File(_, path) = self {
            // Renamed when it became a snapshot; what is still there under this name was given up, and is removed at
            // the next start if it cannot be now.
            drop(fs::remove_file(path));
        }
    }
}

/// Writes a snapshot's header, blocks and end.
pub struct SnapshotWriter {
    pub draft: Draft,
    rows: u64,
}

impl SnapshotWriter {
    /// Begins with the header.
    ///
    /// # Errors
    /// When the draft cannot be written.
    pub fn new(mut draft: Draft, header: &AppliedRow) -> io::Result<Self> {
        let row = header.encode_to_vec();
        let length = u32::try_from(row.len()).map_err(invalid)?;
        let mut bytes = [MAGIC.as_slice(), &length.to_le_bytes(), &row].concat();
        bytes.extend(crc32c(&bytes).to_le_bytes());
        draft.write_all(&bytes)?;
        Ok(Self { draft, rows: 0 })
    }

    /// Adds rows; they follow those of earlier calls in key order.
    ///
    /// # Errors
    /// When the draft cannot be written.
    pub fn block(&mut self, rows: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let mut bytes = vec![0; 4];
        for (key, value) in rows {
            for length in [key.len(), value.len()] {
                bytes.extend(u32::try_from(length).map_err(invalid)?.to_le_bytes());
            }
            bytes.extend(key);
            bytes.extend(value);
        }
        let length = u32::try_from(bytes.len() - 4).map_err(invalid)?;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes.extend(crc32c(&bytes).to_le_bytes());
        self.rows += rows.len() as u64;
        self.draft.write_all(&bytes)
    }

    /// What was written to memory since the last call.
    pub fn take(&mut self) -> Vec<u8> {
        self.draft.take()
    }

    /// Writes the end.
    ///
    /// # Errors
    /// When the draft cannot be written.
    pub fn finish(mut self) -> io::Result<Draft> {
        let mut bytes = [0_u32.to_le_bytes().as_slice(), &self.rows.to_le_bytes()].concat();
        bytes.extend(crc32c(&bytes).to_le_bytes());
        self.draft.write_all(&bytes)?;
        Ok(self.draft)
    }
}

/// Where a master keeps its snapshots.
#[derive(Clone)]
pub enum Snapshots {
    Disk(PathBuf),
    Sim(Arc<SimStorage>),
}

/// A snapshot that is in place.
pub type Kept = (SnapshotMeta, SnapshotData);

/// The name of the snapshot of one log entry.
pub fn snapshot_id(last: Option<&super::types::LogId>) -> String {
    last.map_or_else(
        || format!("{:020}-0-0", 0),
        |id| format!("{:020}-{}-{}", id.index, id.leader_id.term, id.leader_id.node_id),
    )
}

impl Snapshots {
    /// Snapshots in a directory, made when missing; what was left unfinished is removed.
    ///
    /// # Errors
    /// When the directory cannot be worked with.
    pub fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        sync_dir(dir.parent().unwrap_or(&dir))?;
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "tmp") {
                fs::remove_file(path)?;
            }
        }
        Ok(Self::Disk(dir))
    }

    fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                files.push(path);
            }
        }
        // Names begin with the index, padded: the newest comes last.
        files.sort();
        files.reverse();
        Ok(files)
    }

    /// The snapshots whose header can be read, newest first.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> io::Result<Vec<Kept>> {
        match self {
            Self::Sim(storage) => {
                let kept = storage.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
                Ok(kept
                    .iter()
                    .map(|(row, bytes)| (row.snapshot_meta(), SnapshotData(Source::Memory(bytes.clone()))))
                    .collect())
            }
            Self::Disk(dir) => {
                let mut found = Vec::new();
                for path in Self::files(dir)? {
                    let data = SnapshotData(Source::File(Arc::new(fs::File::open(&path)?), path.clone()));
                    match data.open() {
                        Ok(reader) => found.push((reader.header.snapshot_meta(), data)),
                        Err(error) => tracing::warn!(file = %path.display(), %error, "cannot use a snapshot"),
                    }
                }
                Ok(found)
            }
        }
    }

    /// Takes a damaged snapshot out of the way, for people to look at: to Raft it must not look like one.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn put_aside(&self, data: &SnapshotData) -> io::Result<()> {
        match (self, &data.0) {
            (Self::Disk(dir), Source::File(_, path)) => {
                fs::rename(path, path.with_extension("damaged"))?;
                sync_dir(dir)
            }
            (Self::Sim(storage), Source::Memory(bytes)) => {
                let mut kept = storage.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
                kept.retain(|(_, other)| other.as_ptr() != bytes.as_ptr());
                Ok(())
            }
            _ => Err(io::Error::other("a snapshot of another kind of storage")),
        }
    }

    /// A place to write a snapshot to. `name` tells drafts apart.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn draft(&self, name: &str) -> io::Result<Draft> {
        match self {
            Self::Sim(_) => Ok(Draft::Memory(Vec::new())),
            Self::Disk(dir) => {
                let path = dir.join(format!("{name}.tmp"));
                let file =
                    fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
                Ok(Draft::File(file, path))
            }
        }
    }

    /// Makes a finished draft durable, checks it as it stands on the medium, puts it in place and forgets all but the
    /// two newest. Answers it, and up to which index the log may be purged now.
    ///
    /// # Errors
    /// When it cannot be written or does not read back as it was written.
    pub fn keep(&self, mut draft: Draft, cluster: &str) -> io::Result<(Kept, Option<u64>)> {
        let (row, data) = match (self, &mut draft) {
            (Self::Disk(dir), Draft::File(file, path)) => {
                file.sync_all()?;
                drop_from_page_cache(file);
                let file = Arc::new(file.try_clone()?);
                let row = checked(&SnapshotData(Source::File(Arc::clone(&file), path.clone())), cluster)?;
                let place = dir.join(format!("{}.{EXTENSION}", row.snapshot));
                fs::rename(&*path, &place)?;
                sync_dir(dir)?;
                for old in Self::files(dir)?.iter().skip(2) {
                    fs::remove_file(old)?;
                }
                (row, SnapshotData(Source::File(file, place)))
            }
            (Self::Sim(storage), Draft::Memory(bytes)) => {
                let bytes = Bytes::from(std::mem::take(bytes));
                let data = SnapshotData(Source::Memory(bytes.clone()));
                let row = checked(&data, cluster)?;
                let mut kept = storage.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
                kept.retain(|(other, _)| other.snapshot != row.snapshot);
                kept.push((row.clone(), bytes));
                kept.sort_by_key(|(row, _)| std::cmp::Reverse(row.last().map(|id| id.index)));
                kept.truncate(2);
                drop(kept);
                (row, data)
            }
            _ => return Err(io::Error::other("a draft of another kind of storage")),
        };
        let barrier = if defect::has(Defect::PurgedEarly) { 0 } else { 1 };
        let older = self.list()?.get(barrier).and_then(|(meta, _)| meta.last_log_id).map(|id| id.index);
        Ok(((row.snapshot_meta(), data), older))
    }

    /// Whether the data is one of these snapshots already.
    pub fn holds(&self, data: &SnapshotData) -> bool {
        match (self, &data.0) {
            (Self::Disk(dir), Source::File(_, path)) => {
                path.parent() == Some(dir) && path.extension().is_some_and(|extension| extension == EXTENSION)
            }
            (Self::Sim(storage), Source::Memory(bytes)) => {
                let kept = storage.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
                kept.iter().any(|(_, other)| other.as_ptr() == bytes.as_ptr() && !bytes.is_empty())
            }
            _ => false,
        }
    }
}

fn checked(data: &SnapshotData, cluster: &str) -> io::Result<AppliedRow> {
    let row = data.verify()?;
    if row.cluster != cluster {
        return Err(invalid(format!("a snapshot of cluster {}, this is cluster {cluster}", row.cluster)));
    }
    // It becomes a file name.
    if row.snapshot != snapshot_id(row.last().as_ref()) {
        return Err(invalid("a snapshot with a wrong name"));
    }
    Ok(row)
}

/// Lets reading back see the medium, not what was just written to memory.
pub fn drop_from_page_cache(file: &fs::File) {
    // SAFETY: the descriptor is open for as long as `file` lives; the call changes no memory of ours.
    let result = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    if result != 0 {
        tracing::debug!(result, "posix_fadvise");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::types::{LogId, StoredMembership};
    use openraft::CommittedLeaderId;
    use proptest::prelude::*;

    fn meta(index: u64) -> SnapshotMeta {
        let last = LogId::new(CommittedLeaderId::new(1, 1), index);
        SnapshotMeta {
            last_log_id: Some(last),
            last_membership: StoredMembership::default(),
            snapshot_id: snapshot_id(Some(&last)),
        }
    }

    fn write(snapshots: &Snapshots, index: u64, blocks: &[Rows]) -> (Kept, Option<u64>) {
        let header = AppliedRow::of_snapshot(&meta(index), "c");
        let mut writer = SnapshotWriter::new(snapshots.draft("d").unwrap(), &header).unwrap();
        for block in blocks {
            writer.block(block).unwrap();
        }
        snapshots.keep(writer.finish().unwrap(), "c").unwrap()
    }

    #[test]
    fn the_two_newest_are_kept_and_the_older_one_bounds_the_purge() {
        let dir = tempfile::tempdir().unwrap();
        for snapshots in [Snapshots::open(dir.path().join("s")).unwrap(), Snapshots::Sim(SimStorage::new())] {
            let rows = vec![vec![(vec![1], vec![2])]];
            assert_eq!(write(&snapshots, 5, &rows).1, None);
            assert_eq!(write(&snapshots, 9, &rows).1, Some(5));
            let ((kept, data), older) = write(&snapshots, 12, &rows);
            assert_eq!((kept, older), (meta(12), Some(9)));
            assert!(snapshots.holds(&data));
            let listed: Vec<_> = snapshots.list().unwrap().into_iter().map(|(meta, _)| meta).collect();
            assert_eq!(listed, [meta(12), meta(9)]);
        }
        assert_eq!(fs::read_dir(dir.path().join("s")).unwrap().count(), 2, "no draft is left");
    }

    #[test]
    fn another_clusters_snapshot_is_refused() {
        let snapshots = Snapshots::Sim(SimStorage::new());
        let header = AppliedRow::of_snapshot(&meta(1), "other");
        let draft = SnapshotWriter::new(snapshots.draft("d").unwrap(), &header).unwrap().finish().unwrap();
        assert!(snapshots.keep(draft, "c").unwrap_err().to_string().contains("cluster other"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_snapshot_reads_back_and_no_flipped_bit_does(
            blocks in prop::collection::vec(prop::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..4), 0..4),
            flip: prop::sample::Index, bit in 0_u8..8,
        ) {
            let snapshots = Snapshots::Sim(SimStorage::new());
            let ((_, data), _) = write(&snapshots, 3, &blocks);
            let rows: Vec<_> = RowIter::from(data.open().unwrap()).collect::<Result<_, _>>().unwrap();
            prop_assert_eq!(rows, blocks.concat());
            let mut bytes = data.read_at(0, usize::MAX >> 1).unwrap().to_vec();
            let at = flip.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(SnapshotData(Source::Memory(bytes.into())).verify().is_err());
        }
    }
}
