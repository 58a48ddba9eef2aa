//! The Raft log on disk: the `raft-log` library, with what we add to it where it opens a directory.
//!
//! `raft-log` writes records into chunk files, fdatasyncs them on a thread of its own before it calls back, and fsyncs
//! the directory when it makes or removes a file (docs/adr/0001-raft-log.md). Two things are ours:
//!
//! * A payload's length has a checksum of its own. Without it, a flipped bit in a length reads as a record that the
//!   file's end cut off, and everything after it would be dropped as an unfinished write.
//! * Before opening we look at the last file: a record that a power loss tore (some 512-byte sector of it was never
//!   written, so it reads as zeroes, and no whole record follows) is cut off; any other damage is refused.

use super::codec::invalid;
use super::snapshot::drop_from_page_cache;
use super::types::{LogId, StorageIOError, Vote};
use bytes::Bytes;
use openraft::CommittedLeaderId;
use openraft::storage::LogFlushed;
use raft_log::api::raft_log_writer::RaftLogWriter;
use raft_log::codeq::{Decode, Encode};
use raft_log::{RaftLog, RaftLogAction, RaftLogRecord, Types, WALRecord};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// A log file is closed at this size; entries of the open one are also kept in memory.
const FILE_BYTES: usize = 32 << 20;
/// Memory for entries of closed files.
const CACHE_BYTES: usize = 16 << 20;
/// Marks a payload's beginning, so that whole records can be found behind a damaged one.
const MAGIC: u32 = 0x6466_7352;
/// Record type, log id, payload header: what stands before a payload's bytes.
const BEFORE_MAGIC: usize = 4 + 24;
const SECTOR: usize = 512;
/// In so many bytes of a record is everything that its length depends on.
const LENGTHS_WITHIN: usize = 256;
/// The longest payload: a batch and its protobuf framing.
const PAYLOAD_MAX: u32 = 64 << 20;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogTypes;

/// A log id as the log keeps it: term, node, index, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoredId(pub u64, pub u64, pub u64);

impl From<&LogId> for StoredId {
    fn from(id: &LogId) -> Self {
        Self(id.leader_id.term, id.leader_id.node_id, id.index)
    }
}

impl From<&StoredId> for LogId {
    fn from(id: &StoredId) -> Self {
        Self::new(CommittedLeaderId::new(id.0, id.1), id.2)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub struct StoredVote(pub Vote);

/// An entry's payload: its kind (see codec.rs) and bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPayload {
    pub kind: u32,
    pub data: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoUserData;

/// Who waits for a flush.
pub enum Flushed {
    Raft(LogFlushed<super::types::TypeConfig>),
    Caller(oneshot::Sender<io::Result<()>>),
}

impl raft_log::Callback for Flushed {
    fn send(self, result: io::Result<()>) {
        match self {
            Self::Raft(callback) => callback.log_io_completed(result),
            // A caller that went away needs no answer.
            Self::Caller(sender) => drop(sender.send(result)),
        }
    }
}

impl Types for LogTypes {
    type LogId = StoredId;
    type LogPayload = StoredPayload;
    type Vote = StoredVote;
    type Callback = Flushed;
    type UserData = NoUserData;

    fn log_index(id: &StoredId) -> u64 {
        id.2
    }

    fn payload_size(payload: &StoredPayload) -> u64 {
        payload.data.len() as u64
    }
}

fn read<const N: usize>(mut from: impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Encode for StoredId {
    fn encode<W: io::Write>(&self, mut to: W) -> io::Result<usize> {
        for number in [self.0, self.1, self.2] {
            to.write_all(&number.to_be_bytes())?;
        }
        Ok(24)
    }
}

impl Decode for StoredId {
    fn decode<R: Read>(mut from: R) -> io::Result<Self> {
        let mut next = || read::<8>(&mut from).map(u64::from_be_bytes);
        Ok(Self(next()?, next()?, next()?))
    }
}

impl Encode for StoredVote {
    fn encode<W: io::Write>(&self, mut to: W) -> io::Result<usize> {
        to.write_all(&self.0.leader_id().term.to_be_bytes())?;
        to.write_all(&self.0.leader_id().node_id.to_be_bytes())?;
        to.write_all(&[u8::from(self.0.is_committed())])?;
        Ok(17)
    }
}

impl Decode for StoredVote {
    fn decode<R: Read>(mut from: R) -> io::Result<Self> {
        let term = u64::from_be_bytes(read(&mut from)?);
        let node = u64::from_be_bytes(read(&mut from)?);
        match read::<1>(&mut from)? {
            [0] => Ok(Self(Vote::new(term, node))),
            [1] => Ok(Self(Vote::new_committed(term, node))),
            [other] => Err(invalid(format!("a vote with the flag {other}"))),
        }
    }
}

impl Encode for NoUserData {
    fn encode<W: io::Write>(&self, _: W) -> io::Result<usize> {
        Ok(0)
    }
}

impl Decode for NoUserData {
    fn decode<R: Read>(_: R) -> io::Result<Self> {
        Ok(Self)
    }
}

fn payload_header(kind: u32, length: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&kind.to_be_bytes());
    header[8..12].copy_from_slice(&length.to_be_bytes());
    let sum = dfs_proto::checksum::crc32c(&header[..12]);
    header[12..].copy_from_slice(&sum.to_be_bytes());
    header
}

impl Encode for StoredPayload {
    fn encode<W: io::Write>(&self, mut to: W) -> io::Result<usize> {
        let length = u32::try_from(self.data.len()).map_err(invalid)?;
        to.write_all(&payload_header(self.kind, length))?;
        to.write_all(&self.data)?;
        Ok(16 + self.data.len())
    }
}

impl Decode for StoredPayload {
    fn decode<R: Read>(mut from: R) -> io::Result<Self> {
        let header = read::<16>(&mut from)?;
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let (kind, length) = (number(4), number(8));
        if header != payload_header(kind, length) || length > PAYLOAD_MAX {
            return Err(invalid("a damaged payload header"));
        }
        let mut data = vec![0; length as usize];
        from.read_exact(&mut data)?;
        Ok(Self { kind, data: data.into() })
    }
}

/// The open log. Its lock is held while records are encoded or looked up, never while they are synced.
#[derive(Clone)]
pub struct DiskLog {
    log: Arc<Mutex<Option<RaftLog<LogTypes>>>>,
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the Raft log is closed")
}

impl DiskLog {
    /// Opens the log in a directory, made when it is missing.
    ///
    /// # Errors
    /// When a file cannot be read or written, or holds damage that is not a torn last write.
    pub fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        fs::File::open(dir.parent().unwrap_or(dir))?.sync_all()?;
        let files = log_files(dir)?;
        // A process that was killed may have left bytes in the page cache that nobody synced; from here on they count. Those of
        // a sync that failed the kernel calls clean and may show all the same: they are forgotten, so that what is read is
        // what the disk has.
        for path in &files {
            let file = fs::File::open(path)?;
            file.sync_data()?;
            drop_from_page_cache(&file);
        }
        fs::File::open(dir)?.sync_all()?;
        if let Some(last) = files.last() {
            cut_torn_tail(last)?;
        }
        let mut config =
            raft_log::Config::new(dir.to_str().ok_or_else(|| invalid("a path that is not UTF-8"))?);
        config.log_cache_capacity = Some(CACHE_BYTES);
        config.wal.read_buffer_size = Some(1 << 20);
        config.wal.chunk_max_size = Some(FILE_BYTES);
        // Batches are made before the log sees them; waiting for more here would only add to every fsync.
        config.wal.flush_batch_wait = Some(std::time::Duration::ZERO);
        let log = RaftLog::open(Arc::new(config)).map_err(|error| {
            // The cause in full: what raft-log was doing, and where.
            io::Error::new(
                error.kind(),
                format!(
                    "the Raft log in {} is damaged or cannot be read ({error}): restore the directory, or remove it and \
                     let this master rejoin the others",
                    dir.display()
                ),
            )
        })?;
        Ok(Self { log: Arc::new(Mutex::new(Some(log))) })
    }

    fn with<T>(&self, act: impl FnOnce(&mut RaftLog<LogTypes>) -> io::Result<T>) -> io::Result<T> {
        let mut guard: MutexGuard<'_, _> = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        act(guard.as_mut().ok_or_else(closed)?)
    }

    /// The last purged and the last log id.
    pub fn ends(&self) -> io::Result<(Option<LogId>, Option<LogId>)> {
        self.with(|log| {
            let state = log.log_state();
            let purged: Option<LogId> = state.purged().map(Into::into);
            Ok((purged, state.last().map(Into::into).or(purged)))
        })
    }

    pub fn vote(&self) -> io::Result<Option<Vote>> {
        self.with(|log| Ok(log.log_state().vote().map(|vote| vote.0)))
    }

    /// Changes the log and waits until the change is on disk.
    async fn synced(&self, act: impl FnOnce(&mut RaftLog<LogTypes>) -> io::Result<()>) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        self.with(|log| {
            act(log)?;
            log.flush(true, Some(Flushed::Caller(sender)))
        })?;
        receiver.await.map_err(|_| closed())?
    }

    pub async fn save_vote(&self, vote: Vote) -> io::Result<()> {
        self.synced(|log| log.save_vote(StoredVote(vote)).map(drop)).await
    }

    /// Keeps what is below `index`.
    pub async fn truncate(&self, index: u64) -> io::Result<()> {
        self.synced(|log| log.truncate(index).map(drop)).await
    }

    /// Forgets everything up to and with `upto`.
    pub async fn purge(&self, upto: &LogId) -> io::Result<()> {
        self.synced(|log| log.purge(upto.into()).map(drop)).await
    }

    /// Appends entries; `done` is called when they are on disk.
    pub fn append(&self, entries: Vec<(StoredId, StoredPayload)>, done: Flushed) -> io::Result<()> {
        self.with(|log| {
            log.append(entries)?;
            log.flush(true, Some(done))
        })
    }

    /// Entries in `[from, to)`, no more once they have `max_bytes` together.
    pub fn read(&self, from: u64, to: u64, max_bytes: usize) -> io::Result<Vec<(LogId, StoredPayload)>> {
        self.with(|log| {
            let (mut found, mut bytes) = (Vec::new(), 0);
            for entry in log.read(from, to) {
                let (id, payload) = entry?;
                bytes += payload.data.len();
                found.push(((&id).into(), payload));
                if bytes >= max_bytes {
                    break;
                }
            }
            Ok(found)
        })
    }

    /// Syncs what is left and releases the directory.
    pub fn close(&self) {
        drop(self.log.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Shorthand for openraft's error about reading the log.
pub fn read_error(error: &io::Error) -> super::types::StorageError {
    StorageIOError::read_logs(openraft::AnyError::new(error)).into()
}

/// Shorthand for openraft's error about writing the log.
pub fn write_error(error: &io::Error) -> super::types::StorageError {
    StorageIOError::write_logs(openraft::AnyError::new(error)).into()
}

fn log_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.path()))
        .filter(|path| path.as_ref().is_ok_and(|path| path.extension().is_some_and(|e| e == "wal")))
        .collect::<Result<_, _>>()?;
    files.sort();
    Ok(files)
}

/// Cuts a torn last record off the last log file. What raft-log repairs itself (a record that the file's end cuts off,
/// zeroes to the end) is left to it.
fn cut_torn_tail(path: &Path) -> io::Result<()> {
    let bytes = fs::read(path)?;
    let mut at = 0;
    let error = loop {
        if at == bytes.len() {
            return Ok(());
        }
        let mut rest = &bytes[at..];
        match RaftLogRecord::<LogTypes>::decode(&mut rest) {
            Ok(_) => at = bytes.len() - rest.len(),
            Err(error) => break error,
        }
    };
    let tail = &bytes[at..];
    let changed = || {
        invalid(format!(
            "the Raft log is damaged at byte {at} of {} ({error}): it was written whole and has changed since; restore \
             the directory, or remove it and let this master rejoin the others",
            path.display(),
        ))
    };
    if is_one_bit_from_whole(tail) {
        return Err(changed());
    }
    if error.kind() == io::ErrorKind::UnexpectedEof && find_record(&tail[1..]).is_none()
        || tail.iter().all(|byte| *byte == 0)
    {
        return Ok(());
    }
    if let Some(behind) = find_record(&tail[1..]) {
        return Err(invalid(format!(
            "the Raft log is damaged at byte {at} of {} ({error}) and whole entries follow at byte {}: refusing to drop \
             them; restore the directory, or remove it and let this master rejoin the others",
            path.display(),
            at + 1 + behind,
        )));
    }
    if !has_unwritten_sector(at, tail) {
        return Err(changed());
    }
    tracing::warn!(file = %path.display(), at, bytes = tail.len(), "cut off the last write of the Raft log, torn by a power loss");
    let file = fs::OpenOptions::new().write(true).open(path)?;
    file.set_len(at as u64)?;
    file.sync_all()
}

/// Whether the tail is a whole record but for a bit in what says how long it is. Such a record may seem to be cut off by the
/// file's end, as if it had never been written whole.
fn is_one_bit_from_whole(tail: &[u8]) -> bool {
    let mut bytes = tail.to_vec();
    // Type, log id, payload header; small records have nothing else.
    (0..tail.len().min(LENGTHS_WITHIN) * 8).any(|bit| {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut rest = bytes.as_slice();
        let whole = RaftLogRecord::<LogTypes>::decode(&mut rest).is_ok() && rest.is_empty();
        bytes[bit / 8] ^= 1 << (bit % 8);
        whole
    })
}

/// Where the next whole entry begins.
fn find_record(bytes: &[u8]) -> Option<usize> {
    let magic = MAGIC.to_be_bytes();
    (BEFORE_MAGIC..bytes.len().saturating_sub(4)).find_map(|at| {
        if bytes[at..at + 4] != magic {
            return None;
        }
        let start = at - BEFORE_MAGIC;
        match RaftLogRecord::<LogTypes>::decode(&bytes[start..]) {
            Ok(WALRecord::Action(RaftLogAction::Append(..))) => Some(start),
            _ => None,
        }
    })
}

/// Whether some disk sector that belongs to the bytes was never written. They stand at `at` in their file.
fn has_unwritten_sector(at: usize, bytes: &[u8]) -> bool {
    let first = (SECTOR - at % SECTOR).min(bytes.len());
    let (head, rest) = bytes.split_at(first);
    std::iter::once(head).chain(rest.chunks(SECTOR)).any(|sector| sector.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(index: u64) -> StoredId {
        StoredId(1, 1, index)
    }

    async fn append(log: &DiskLog, indices: std::ops::Range<u64>, size: usize) {
        for index in indices {
            let (sender, receiver) = oneshot::channel();
            let data = vec![u8::try_from(index % 250).unwrap() + 1; size].into();
            log.append(vec![(id(index), StoredPayload { kind: 1, data })], Flushed::Caller(sender)).unwrap();
            receiver.await.unwrap().unwrap();
        }
    }

    fn indices(log: &DiskLog) -> Vec<u64> {
        log.read(0, u64::MAX, usize::MAX).unwrap().iter().map(|(id, _)| id.index).collect()
    }

    async fn filled(entries: u64, size: usize) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let log = DiskLog::open(dir.path()).unwrap();
        log.save_vote(Vote::new_committed(1, 1)).await.unwrap();
        append(&log, 0..entries, size).await;
        log.close();
        let file = log_files(dir.path()).unwrap().pop().unwrap();
        (dir, file)
    }

    #[tokio::test]
    async fn what_was_synced_is_there_after_reopening() {
        let (dir, _) = filled(10, 100).await;
        let log = DiskLog::open(dir.path()).unwrap();
        assert_eq!(log.vote().unwrap(), Some(Vote::new_committed(1, 1)));
        assert_eq!(indices(&log), (0..10).collect::<Vec<_>>());
        log.purge(&(&id(3)).into()).await.unwrap();
        log.truncate(8).await.unwrap();
        log.close();
        let log = DiskLog::open(dir.path()).unwrap();
        assert_eq!(indices(&log), [4, 5, 6, 7]);
        assert_eq!(log.ends().unwrap(), (Some((&id(3)).into()), Some((&id(7)).into())));
    }

    #[tokio::test]
    async fn a_last_record_cut_short_anywhere_loses_only_itself() {
        for cut in [1, 3, 20, 50, 115] {
            let (dir, file) = filled(5, 100).await;
            let length = fs::metadata(&file).unwrap().len();
            fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(length - cut).unwrap();
            let log = DiskLog::open(dir.path()).unwrap();
            assert_eq!(indices(&log), [0, 1, 2, 3], "cut {cut}");
            append(&log, 4..6, 10).await;
            log.close();
            assert_eq!(indices(&DiskLog::open(dir.path()).unwrap()), (0..6).collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn a_last_record_with_an_unwritten_sector_is_cut_off() {
        let (dir, file) = filled(3, 3000).await;
        let mut bytes = fs::read(&file).unwrap();
        let sector = (bytes.len() - 1500) / SECTOR * SECTOR;
        bytes[sector..sector + SECTOR].fill(0);
        fs::write(&file, &bytes).unwrap();
        assert_eq!(indices(&DiskLog::open(dir.path()).unwrap()), [0, 1]);
    }

    #[tokio::test]
    async fn a_flipped_bit_is_refused_wherever_it_is() {
        let (dir, file) = filled(6, 64).await;
        let whole = fs::read(&file).unwrap();
        // Every byte of the last three records; 52 bytes stand around a payload.
        let from = whole.len() - 3 * (52 + 64);
        for at in from..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            fs::write(&file, &bytes).unwrap();
            let error = match DiskLog::open(dir.path()) {
                Err(error) => error.to_string(),
                // In the last record's type, a change may make a record that wants more bytes than are there.
                Ok(log) => {
                    assert!(indices(&log).len() >= 5, "byte {at}: {:?}", indices(&log));
                    log.close();
                    for file in log_files(dir.path()).unwrap() {
                        fs::remove_file(file).unwrap();
                    }
                    assert!(at >= whole.len() - (52 + 64), "byte {at} of {} was not refused", whole.len());
                    continue;
                }
            };
            assert!(error.contains("damaged") && !error.contains('\n'), "{error}");
        }
    }

    proptest! {
        #[test]
        fn records_survive_the_way_through_bytes(numbers: (u64, u64, u64), kind in 0_u32..3, data: Vec<u8>, committed: bool) {
            let mut bytes = Vec::new();
            let id = StoredId(numbers.0, numbers.1, numbers.2);
            let payload = StoredPayload { kind, data: data.into() };
            let vote = StoredVote(if committed { Vote::new_committed(numbers.0, numbers.1) } else { Vote::new(numbers.0, numbers.1) });
            id.encode(&mut bytes).unwrap();
            payload.encode(&mut bytes).unwrap();
            vote.encode(&mut bytes).unwrap();
            let mut rest = bytes.as_slice();
            prop_assert_eq!(StoredId::decode(&mut rest).unwrap(), id);
            prop_assert_eq!(StoredPayload::decode(&mut rest).unwrap(), payload);
            prop_assert_eq!(StoredVote::decode(&mut rest).unwrap(), vote);
            prop_assert!(rest.is_empty());
        }
    }
}
