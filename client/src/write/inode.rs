//! One inode's way from unsent bytes to a commit. Pure.

use super::attrs::{AttrSet, Pending};
use super::extents::{Extents, Run};
use super::{CommitId, Policy, RunNo, WaiterId};
use bytes::Bytes;
use dfs_proto::v1::{self, Attr, Timestamp};
use dfs_proto::{ChunkId, Epoch, FsError};
use std::collections::VecDeque;
use std::time::Duration;

/// A part of a run that stands in a chunk. It is committed, or its chunk is given up and it is sent again.
#[derive(Clone, Debug)]
pub struct Record {
    pub run: RunNo,
    /// Where it begins in the file.
    pub offset: u64,
    pub bytes: Bytes,
    /// When its oldest byte was written.
    pub since: Duration,
    pub chunk: ChunkId,
    pub epoch: Epoch,
    /// Where it begins in the chunk.
    pub chunk_offset: u64,
}

impl Record {
    #[must_use]
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Never: a record without bytes is not made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    #[must_use]
    pub fn file_end(&self) -> u64 {
        self.offset + self.len()
    }

    #[must_use]
    pub fn chunk_end(&self) -> u64 {
        self.chunk_offset + self.len()
    }
}

/// A commit that the master has not answered.
#[derive(Debug)]
pub struct Committing {
    pub id: CommitId,
    pub kill_priv: Option<v1::Cred>,
    pub records: Vec<Record>,
    /// Attributes that it sets.
    pub attrs: Option<Pending>,
}

/// Everything about an inode with bytes that are not committed.
#[derive(Debug)]
pub struct Inode {
    pub policy: Policy,
    /// What the file shows beyond what is committed.
    pub extents: Extents,
    /// The last run cut.
    pub last_run: RunNo,
    /// Runs that wait for room in a chunk, oldest first.
    pub queued: VecDeque<Run>,
    /// Bytes in them.
    pub queued_bytes: u64,
    /// As many of these as the pool knows of.
    pub counted_bytes: u64,
    /// Records in chunks, oldest first; all older than `queued`.
    pub sent: VecDeque<Record>,
    /// All older than `sent`.
    pub committing: Option<Committing>,
    /// Runs up to here shall be synced and committed now.
    pub target: RunNo,
    /// Who waits until everything up to a run is committed.
    pub waiters: Vec<(RunNo, WaiterId)>,
    /// The chunk that took the last record: neighbours in a file become one slice.
    pub chunk: Option<ChunkId>,
    /// Whether it stands in the line of inodes with queued runs.
    pub in_line: bool,
    pub mtime: Timestamp,
    /// Attributes that were set since; what is in `committing` is older.
    pub attrs: Option<Pending>,
    /// The next commit clears suid, sgid and capabilities.
    pub kill_priv: Option<v1::Cred>,
    /// The answer to the last commit.
    pub attr: Option<Attr>,
    /// Why bytes were dropped; not reported yet.
    pub error: Option<FsError>,
    /// Reported to a sync of everything, but not to who wrote them.
    pub told_sync: bool,
    /// When it last made progress: its first byte came, or a commit.
    pub progress_at: Duration,
}

impl Inode {
    #[must_use]
    pub fn new(policy: Policy, now: Duration) -> Self {
        Self {
            policy,
            extents: Extents::default(),
            last_run: RunNo::default(),
            queued: VecDeque::new(),
            queued_bytes: 0,
            counted_bytes: 0,
            sent: VecDeque::new(),
            committing: None,
            target: RunNo::default(),
            waiters: Vec::new(),
            chunk: None,
            in_line: false,
            mtime: Timestamp::default(),
            attrs: None,
            kill_priv: None,
            attr: None,
            error: None,
            told_sync: false,
            progress_at: now,
        }
    }

    /// Nothing waits to be committed.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.oldest_run().is_none() && self.extents.unsent() == 0
    }

    /// Bytes in memory.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let committing = self.committing.iter().flat_map(|commit| &commit.records);
        self.extents.unsent() + self.queued_bytes + committing.chain(&self.sent).map(Record::len).sum::<u64>()
    }

    /// Nothing is left to know about it.
    #[must_use]
    pub fn is_forgettable(&self) -> bool {
        self.is_clean() && self.waiters.is_empty() && self.error.is_none() && self.kill_priv.is_none()
    }

    /// The oldest run of which something is not committed, bytes or attributes.
    #[must_use]
    pub fn oldest_run(&self) -> Option<RunNo> {
        let committing = self.committing.as_ref().and_then(|commit| commit.records.first());
        let bytes = committing.map(|record| record.run).or_else(|| self.oldest_bytes());
        let attrs = self.attrs_unsettled().next().map(|attrs| attrs.run);
        bytes.into_iter().chain(attrs).min()
    }

    /// Attributes that are set but not committed: those in a commit, then those that came later.
    pub fn attrs_unsettled(&self) -> impl Iterator<Item = &Pending> {
        let setting = self.committing.as_ref().and_then(|commit| commit.attrs.as_ref());
        setting.into_iter().chain(&self.attrs)
    }

    /// The oldest run of bytes that no commit names yet.
    #[must_use]
    pub fn oldest_bytes(&self) -> Option<RunNo> {
        self.sent.front().map(|record| record.run).or_else(|| self.queued.front().map(|run| run.no))
    }

    /// Whether nothing that was written before the attributes were set is left but in a commit.
    #[must_use]
    pub fn attrs_are_next(&self) -> bool {
        let Some(attrs) = &self.attrs else { return false };
        self.oldest_bytes().is_none_or(|run| run > attrs.run)
    }

    /// What programs set and is not committed.
    #[must_use]
    pub fn attrs_shown(&self) -> Option<(AttrSet, Timestamp)> {
        let all = self.attrs_unsettled().map(|attrs| (attrs.set, attrs.ctime));
        all.reduce(|(mut set, _), (later, ctime)| {
            set.then(later);
            (set, ctime)
        })
    }

    /// When the oldest run that nobody has asked to be committed yet was written.
    #[must_use]
    pub fn oldest_unasked(&self) -> Option<Duration> {
        let sent = self.sent.get(self.sent.partition_point(|record| record.run <= self.target));
        let queued = self.queued.get(self.queued.partition_point(|run| run.no <= self.target));
        sent.map(|record| record.since).into_iter().chain(queued.map(|run| run.since)).min()
    }

    /// Queues what is unsent.
    pub fn cut_all(&mut self) {
        let runs = self.extents.cut_all(&mut self.last_run);
        self.queue(runs);
    }

    /// Queues what is as long as a record may be.
    pub fn cut_full(&mut self) {
        let runs = self.extents.cut_full(&mut self.last_run);
        self.queue(runs);
    }

    fn queue(&mut self, runs: Vec<Run>) -> u64 {
        let bytes = runs.iter().map(|run| run.bytes.len() as u64).sum();
        self.queued_bytes += bytes;
        self.queued.extend(runs);
        bytes
    }

    /// Takes at most `room` bytes from the front of the queue.
    pub fn take_queued(&mut self, room: u64) -> Option<Run> {
        let front = self.queued.front_mut()?;
        let taken = match usize::try_from(room) {
            Ok(room) if room < front.bytes.len() => {
                let head = Run { bytes: front.bytes.split_to(room), ..front.clone() };
                front.offset += head.bytes.len() as u64;
                head
            }
            _ => self.queued.pop_front()?,
        };
        self.queued_bytes -= taken.bytes.len() as u64;
        Some(taken)
    }

    /// Whether everything up to the target is in chunks.
    #[must_use]
    pub fn target_is_sent(&self) -> bool {
        self.queued.front().is_none_or(|run| run.no > self.target)
    }

    /// Takes a failed record's visible bytes into new runs. Answers how many bytes that are.
    pub fn requeue(&mut self, record: &Record) -> u64 {
        let again = self.extents.recut(
            record.run,
            record.offset,
            record.file_end(),
            record.since,
            &mut self.last_run,
        );
        let bytes = self.queue(again);
        if let Some(attrs) = self.attrs.as_mut().filter(|attrs| attrs.run > record.run) {
            // Set after these bytes were written, so still committed after them.
            self.last_run.0 += 1;
            attrs.run = self.last_run;
        }
        // What hid the record's other bytes may not be cut yet. A flush that was to cover the record must cover that
        // instead: else the file could show, after a crash, what was there before both.
        if record.run <= self.target {
            self.cut_all();
            self.target = self.last_run;
        }
        for (target, _) in &mut self.waiters {
            if *target >= record.run {
                *target = self.last_run;
            }
        }
        bytes
    }

    /// Bytes were written: a time that was set before does not count any more.
    pub fn forget_set_mtime(&mut self) {
        let setting = self.committing.as_mut().and_then(|commit| commit.attrs.as_mut());
        for attrs in setting.into_iter().chain(self.attrs.as_mut()) {
            attrs.set.mtime = None;
        }
    }

    /// Attributes wait, after everything that was written before they were set last.
    pub fn set(&mut self, mut attrs: Pending, later: Option<Pending>) {
        if let Some(later) = later {
            // Whoever waits for the earlier ones waits for both.
            for (target, _) in &mut self.waiters {
                if *target >= attrs.run {
                    *target = later.run.max(*target);
                }
            }
            attrs.then(&later);
        }
        self.attrs = Some(attrs);
    }

    /// Takes out the waiters whose bytes are all committed.
    pub fn satisfied(&mut self) -> Vec<WaiterId> {
        let oldest = self.oldest_run();
        let (done, waiting) =
            self.waiters.drain(..).partition(|(target, _)| oldest.is_none_or(|oldest| *target < oldest));
        self.waiters = waiting;
        let done: Vec<(RunNo, WaiterId)> = done;
        done.into_iter().map(|(_, waiter)| waiter).collect()
    }
}
