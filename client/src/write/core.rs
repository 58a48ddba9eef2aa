//! What becomes of written bytes, decided without I/O: events in, [`Action`]s out. The chunks' side of it stands in
//! `dispatch.rs`.

use super::attrs::{AttrSet, Pending};
use super::chunk::{OpenChunk, Pool};
use super::commit;
use super::inode::{Committing, Inode, Record};
use super::weather::Weather;
use super::{Action, CommitId, Policy, RunNo, Settings, WaiterId};
use bytes::Bytes;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{COMMIT_SLICES_MAX, FILE_SIZE_MAX};
use dfs_proto::v1::{self, Attr, Cred, Timestamp};
use dfs_proto::{ChunkId, FsError, FsResult, InodeNo};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

/// Records in one commit. Where they overlap one may fall into two slices, so this many always fit.
const COMMIT_RECORDS: usize = COMMIT_SLICES_MAX / 2;
/// Committed records up to this long are worth keeping for reads: small files are often read soon after.
const KEEP_MAX: usize = 128 << 10;

/// What of an inode is not committed, as its attributes show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirty {
    /// Where the last dirty byte ends: the file is at least this long.
    pub end: u64,
    /// When it was last written, in the master's time.
    pub mtime: Timestamp,
    /// What was set since, and when.
    pub set: Option<(AttrSet, Timestamp)>,
}

/// The state of the write side. One owner; every event is a method, its consequences wait in `actions`.
#[derive(Debug)]
pub struct Core {
    pub(super) settings: Settings,
    pub(super) default_policy: Policy,
    /// Policies of inodes that have one of their own; a bounded memory, the default serves when it has forgotten.
    policies: lru::LruCache<InodeNo, Policy>,
    /// Inodes with something that is not committed or not reported. Ordered, so that a run repeats from its seed.
    pub(super) inodes: BTreeMap<InodeNo, Inode>,
    pub(super) chunks: HashMap<ChunkId, OpenChunk>,
    pub(super) pools: BTreeMap<Policy, Pool>,
    /// Inodes with queued runs: each sends a record in turn.
    pub(super) line: VecDeque<InodeNo>,
    /// Chunks of which a sync is wanted that is not asked for.
    pub(super) sync_wanted: BTreeSet<ChunkId>,
    /// When a first replica, by its address, last acknowledged anything.
    pub(super) heard: HashMap<String, Duration>,
    /// Records that are sent and not acknowledged.
    pub(super) unacked: usize,
    /// Seals that the master has not answered.
    pub(super) seals: usize,
    pub(super) weather: Weather,
    /// Bytes in memory: unsent, queued, sent, committing.
    used: u64,
    /// Bytes written since everything was last asked to be committed.
    since_relief: u64,
    next_id: u64,
    pub(super) actions: Vec<Action>,
}

impl Core {
    #[must_use]
    pub fn new(settings: Settings, default_policy: Policy) -> Self {
        Self {
            settings,
            default_policy,
            policies: lru::LruCache::new(std::num::NonZeroUsize::MIN.saturating_add(65_535)),
            inodes: BTreeMap::new(),
            chunks: HashMap::new(),
            pools: BTreeMap::new(),
            line: VecDeque::new(),
            sync_wanted: BTreeSet::new(),
            heard: HashMap::new(),
            unacked: 0,
            seals: 0,
            weather: Weather::default(),
            used: 0,
            since_relief: 0,
            next_id: 0,
            actions: Vec::new(),
        }
    }

    /// Takes out what is to be done, in order.
    pub fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// Bytes that wait in memory.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Whether time alone changes nothing.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.used == 0 && self.sync_wanted.is_empty() && !self.chunks.values().any(OpenChunk::is_waiting)
    }

    /// The cluster's policy, for inodes that have none.
    pub fn set_default_policy(&mut self, policy: Policy) {
        self.default_policy = policy;
    }

    /// An inode's own policy, for what is written from now on.
    pub fn set_policy(&mut self, ino: InodeNo, policy: Policy) {
        if policy == self.default_policy {
            self.policies.pop(&ino);
        } else {
            self.policies.put(ino, policy);
        }
    }

    pub(super) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn inode(&mut self, ino: InodeNo, now: Duration) -> &mut Inode {
        let policy = self.policies.get(&ino).copied().unwrap_or(self.default_policy);
        self.inodes.entry(ino).or_insert_with(|| Inode::new(policy, now))
    }

    /// An error that no writer was told of, for whoever writes or flushes next. `told_sync`: a sync of everything was.
    pub fn keep_error(&mut self, ino: InodeNo, error: FsError, told_sync: bool, now: Duration) {
        let inode = self.inode(ino, now);
        inode.error.get_or_insert(error);
        inode.told_sync |= told_sync;
    }

    fn take_error(&mut self, ino: InodeNo) -> Option<FsError> {
        let inode = self.inodes.get_mut(&ino)?;
        inode.told_sync = false;
        let error = inode.error.take();
        self.forget_if_done(ino);
        error
    }

    pub(super) fn forget_if_done(&mut self, ino: InodeNo) {
        if self.inodes.get(&ino).is_some_and(Inode::is_forgettable) {
            self.inodes.remove(&ino);
        }
    }

    /// Buffers bytes. None: there is no memory for them now.
    pub fn write(
        &mut self,
        ino: InodeNo,
        offset: u64,
        data: &[u8],
        mtime: Timestamp,
        now: Duration,
    ) -> Option<FsResult<()>> {
        let len = data.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > FILE_SIZE_MAX) {
            return Some(Err(ErrorCode::ErrorFileTooBig.into()));
        }
        if let Some(error) = self.take_error(ino) {
            return Some(Err(error));
        }
        if data.is_empty() {
            return Some(Ok(()));
        }
        if self.used > 0 && self.used + len > self.settings.memory {
            self.relieve(true, now);
            return None;
        }
        let inode = self.inode(ino, now);
        if inode.is_clean() {
            inode.progress_at = now;
        }
        inode.mtime = mtime;
        inode.forget_set_mtime();
        let before = inode.extents.unsent();
        inode.extents.write(offset, data, now);
        // Never less than before: what the write covers is unsent now.
        let added = inode.extents.unsent() - before;
        inode.cut_full();
        let cut = !inode.queued.is_empty();
        self.used += added;
        self.since_relief += added;
        if self.used > self.settings.memory / 4 && self.since_relief >= self.settings.memory / 8 {
            self.relieve(false, now);
        } else if cut {
            self.line_up(ino);
            self.dispatch(now);
        }
        Some(Ok(()))
    }

    /// Asks for everything to be synced and committed, so that its memory comes free; `cut`: what is not a full run
    /// too.
    fn relieve(&mut self, cut: bool, now: Duration) {
        self.since_relief = 0;
        let inos: Vec<InodeNo> = self.inodes.keys().copied().collect();
        for ino in inos {
            self.push(ino, cut, now);
        }
        self.dispatch(now);
    }

    /// Asks for an inode's runs to be synced and committed.
    fn push(&mut self, ino: InodeNo, cut: bool, now: Duration) {
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        if cut {
            inode.cut_all();
        }
        inode.target = inode.last_run;
        self.line_up(ino);
        self.mark_syncs(ino);
        self.try_commit(ino, now);
    }

    /// The next commit of the inode clears suid, sgid and capabilities.
    pub fn kill_priv(&mut self, ino: InodeNo, writer: &Cred, now: Duration) {
        let inode = self.inode(ino, now);
        inode.kill_priv = Some(writer.clone());
        if let Some(attrs) = &mut inode.attrs {
            attrs.set.kill_priv();
        }
    }

    /// Keeps attributes that a program sets, to be committed with the bytes it wrote before. False: there are none;
    /// somebody else's attributes wait already; or somebody waits for them.
    pub fn set_attrs(
        &mut self,
        ino: InodeNo,
        cred: &Cred,
        set: AttrSet,
        ctime: Timestamp,
        now: Duration,
    ) -> bool {
        let Some(inode) = self.inodes.get_mut(&ino).filter(|inode| !inode.is_clean()) else { return false };
        if inode.attrs_unsettled().any(|attrs| attrs.cred != *cred) {
            return false;
        }
        // Whoever waits for what was set before would wait for this and for the bytes in between, and so on for ever.
        let run = inode.attrs.as_ref().map(|attrs| attrs.run);
        if run.is_some_and(|run| inode.waiters.iter().any(|(target, _)| *target >= run)) {
            return false;
        }
        // Bytes written so far come before.
        inode.cut_all();
        inode.last_run.0 += 1;
        let attrs = Pending { run: inode.last_run, cred: cred.clone(), set, ctime };
        match inode.attrs.take() {
            Some(before) => inode.set(before, Some(attrs)),
            None => inode.set(attrs, None),
        }
        self.push(ino, true, now);
        self.dispatch(now);
        true
    }

    /// Asks for everything of an inode to be synced and committed. The waiter is woken when it is; None: it is.
    ///
    /// # Errors
    /// An earlier error of the inode, once.
    pub fn flush(&mut self, ino: InodeNo, now: Duration) -> FsResult<Option<WaiterId>> {
        if let Some(error) = self.take_error(ino) {
            return Err(error);
        }
        if self.inodes.get(&ino).is_none_or(Inode::is_clean) {
            return Ok(None);
        }
        let waiter = WaiterId(self.id());
        self.push(ino, true, now);
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.waiters.push((inode.target, waiter));
        }
        self.dispatch(now);
        Ok(Some(waiter))
    }

    /// Asks for everything of an inode to be synced and committed. True: nobody needs to wait for it. `size`: up to where the file is
    /// known to have no holes; None: it may have some.
    ///
    /// # Errors
    /// An earlier error of the inode, once.
    pub fn leave(&mut self, ino: InodeNo, size: Option<u64>, now: Duration) -> FsResult<bool> {
        if let Some(error) = self.take_error(ino) {
            return Err(error);
        }
        // How much of a sparse file is allocated only the master knows, and programs ask for that.
        let dense = |inode: &Inode| size.is_some_and(|size| !inode.extents.has_gap_beyond(size));
        let left = self.inodes.get(&ino).is_none_or(dense) && self.may_be_left(ino, now);
        if left {
            self.push(ino, true, now);
            self.dispatch(now);
        }
        Ok(left)
    }

    /// The inodes with something that is not committed, and those with an error that is not reported.
    #[must_use]
    pub fn dirty_inodes(&self) -> Vec<InodeNo> {
        let untold = |inode: &Inode| inode.error.is_some() && !inode.told_sync;
        let dirty = self.inodes.iter().filter(|(_, inode)| !inode.is_clean() || untold(inode));
        dirty.map(|(ino, _)| *ino).collect()
    }

    #[must_use]
    pub fn dirty(&self, ino: InodeNo) -> Option<Dirty> {
        let inode = self.inodes.get(&ino)?;
        let (end, set) = (inode.extents.end(), inode.attrs_shown());
        (end.is_some() || set.is_some()).then(|| Dirty { end: end.unwrap_or(0), mtime: inode.mtime, set })
    }

    /// The dirty bytes within a range, in order.
    #[must_use]
    pub fn read(&self, ino: InodeNo, offset: u64, len: usize) -> Vec<(u64, Bytes)> {
        self.inodes.get(&ino).map_or_else(Vec::new, |inode| inode.extents.read(offset, len))
    }

    /// The inode is gone: its bytes need not be written.
    pub fn discard(&mut self, ino: InodeNo, now: Duration) {
        self.policies.pop(&ino);
        if let Some(inode) = self.drop_bytes(ino) {
            self.wake_all(inode.waiters, &Ok(inode.attr));
        }
        self.dispatch(now);
    }

    /// Takes an inode out with everything that it has in memory and in chunks.
    fn drop_bytes(&mut self, ino: InodeNo) -> Option<Inode> {
        let mut inode = self.inodes.remove(&ino)?;
        self.used -= inode.extents.unsent() + inode.queued_bytes;
        if let Some(pool) = self.pools.get_mut(&inode.policy) {
            pool.queued -= inode.counted_bytes;
        }
        let committing = inode.committing.take().map_or_else(Vec::new, |commit| commit.records);
        for record in inode.sent.drain(..).chain(committing) {
            self.used -= record.len();
            self.release(&record);
        }
        Some(inode)
    }

    /// Drops an inode's bytes for an error that whoever waits for them, or else the next caller, gets to see.
    pub(super) fn fail_inode(&mut self, ino: InodeNo, error: &FsError, now: Duration) {
        let Some(inode) = self.drop_bytes(ino) else { return };
        self.weather.failed(now);
        if inode.waiters.is_empty() {
            self.inode(ino, now).error = Some(error.clone());
        }
        self.wake_all(inode.waiters, &Err(error.clone()));
    }

    fn wake_all(&mut self, waiters: Vec<(RunNo, WaiterId)>, result: &FsResult<Option<Attr>>) {
        let woken = waiters.into_iter().map(|(_, waiter)| Action::Wake { waiter, result: result.clone() });
        self.actions.extend(woken);
    }

    /// Commits an inode's oldest records if they are wanted and on disk, and attributes that were set after all others;
    /// no other commit of it may be in flight.
    pub(super) fn try_commit(&mut self, ino: InodeNo, now: Duration) {
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        if inode.committing.is_some() {
            return;
        }
        let mut count = 0;
        if inode.sent.front().is_some_and(|record| record.run <= inode.target) {
            let chunks = &self.chunks;
            let synced = |record: &Record| {
                chunks.get(&record.chunk).is_some_and(|chunk| chunk.synced >= record.chunk_end())
            };
            count = inode.sent.iter().take(COMMIT_RECORDS).take_while(|record| synced(record)).count();
        }
        let records: Vec<Record> = inode.sent.drain(..count).collect();
        let attrs = if inode.attrs_are_next() { inode.attrs.take() } else { None };
        if records.is_empty() && attrs.is_none() {
            return;
        }
        self.next_id += 1;
        let id = CommitId(self.next_id);
        let writer = inode.kill_priv.take();
        let written = (!records.is_empty()).then_some(inode.mtime);
        let set_at = attrs.as_ref().map(|attrs| attrs.ctime);
        let commit = v1::Commit {
            ino: ino.get(),
            slices: commit::slices(&records),
            mtime: Some(inode.mtime),
            kill_priv: writer.is_some(),
            writer: writer.clone(),
            set: attrs.as_ref().map(|attrs| attrs.set.change()),
            ctime: written.into_iter().chain(set_at).max_by_key(|time| (time.seconds, time.nanos)),
        };
        let cred = attrs.as_ref().map_or_else(Cred::default, |attrs| attrs.cred.clone());
        inode.committing = Some(Committing { id, kill_priv: writer, records, attrs });
        inode.progress_at = inode.progress_at.max(now);
        self.actions.push(Action::Commit { ino, id, cred, commit });
    }

    /// The master answered a commit.
    pub fn committed(&mut self, ino: InodeNo, id: CommitId, result: FsResult<Option<Attr>>, now: Duration) {
        self.weather.commit_ended(result.is_ok(), now);
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        let Some(commit) = inode.committing.take_if(|commit| commit.id == id) else { return };
        match result {
            Ok(attr) => {
                inode.attr = attr;
                inode.progress_at = now;
                for record in &commit.records {
                    inode.extents.take(record.run, record.offset, record.file_end());
                }
                for record in commit.records {
                    self.settle(record);
                }
                self.wake_satisfied(ino);
                self.try_commit(ino, now);
                self.forget_if_done(ino);
            }
            Err(error)
                if matches!(error.code, ErrorCode::ErrorStaleEpoch | ErrorCode::ErrorSessionExpired) =>
            {
                // The answer does not say which chunk was fenced, so all that the commit named are given up.
                let chunks: BTreeSet<ChunkId> = commit.records.iter().map(|record| record.chunk).collect();
                let tell = error.code == ErrorCode::ErrorStaleEpoch;
                // If somebody else has changed the inode meanwhile, the next commit is refused as a whole (`vfs/observer.rs`).
                self.take_back(ino, commit);
                for chunk in chunks {
                    self.give_up(chunk, &[], &error, tell, now);
                }
                self.line_up(ino);
                self.mark_syncs(ino);
                self.try_commit(ino, now);
                self.wake_satisfied(ino);
            }
            // Somebody else has changed the file since its lease was lost: nothing of it may come back.
            Err(error) if error.code == ErrorCode::ErrorConflict => {
                inode.committing = Some(commit);
                self.fail_inode(ino, &FsError { code: ErrorCode::ErrorIo, ..error }, now);
            }
            Err(error) if commit.attrs.is_some() => {
                // Perhaps because of the attributes: the bytes get another chance without them.
                self.tell_error(ino, &error);
                self.take_back(ino, Committing { attrs: None, ..commit });
                self.line_up(ino);
                self.mark_syncs(ino);
                self.try_commit(ino, now);
                self.forget_if_done(ino);
            }
            Err(error) => {
                inode.committing = Some(commit);
                self.fail_inode(ino, &error, now);
            }
        }
        self.dispatch(now);
    }

    /// Tells whoever waits for an inode of an error, or else keeps it for the next caller.
    fn tell_error(&mut self, ino: InodeNo, error: &FsError) {
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        let waiters = std::mem::take(&mut inode.waiters);
        if waiters.is_empty() {
            inode.error.get_or_insert_with(|| error.clone());
        }
        self.wake_all(waiters, &Err(error.clone()));
    }

    /// A commit did not happen: what it held waits again, older than everything else.
    fn take_back(&mut self, ino: InodeNo, commit: Committing) {
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        let written_since = inode.kill_priv.is_some();
        inode.kill_priv = inode.kill_priv.take().or(commit.kill_priv);
        if let Some(mut attrs) = commit.attrs {
            if written_since {
                attrs.set.kill_priv();
            }
            let later = inode.attrs.take();
            inode.set(attrs, later);
        }
        // In front again, they are requeued first.
        for record in commit.records.into_iter().rev() {
            if self.chunks.contains_key(&record.chunk) {
                inode.sent.push_front(record);
            } else {
                self.used -= record.len();
                self.used += inode.requeue(&record);
            }
        }
    }

    /// A record's bytes are committed: they leave memory.
    fn settle(&mut self, record: Record) {
        self.used -= record.len();
        if let Some(chunk) = self.chunks.get(&record.chunk)
            && let Some(pool) = self.pools.get_mut(&chunk.policy)
        {
            pool.failures = 0;
        }
        self.release(&record);
        if record.bytes.len() <= KEEP_MAX {
            self.actions.push(Action::Keep {
                chunk: record.chunk,
                offset: record.chunk_offset,
                bytes: record.bytes,
            });
        }
    }

    pub(super) fn wake_satisfied(&mut self, ino: InodeNo) {
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        if inode.waiters.is_empty() {
            return;
        }
        let attr = inode.attr;
        let woken = inode.satisfied();
        self.actions.extend(woken.into_iter().map(|waiter| Action::Wake { waiter, result: Ok(attr) }));
    }

    /// Takes a given-up chunk's records of an inode back into its queue.
    pub(super) fn requeue(&mut self, ino: InodeNo, chunk: ChunkId, now: Duration) {
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        let (failed, sent): (VecDeque<Record>, VecDeque<Record>) =
            inode.sent.drain(..).partition(|record| record.chunk == chunk);
        inode.sent = sent;
        for record in failed {
            self.used -= record.len();
            self.used += inode.requeue(&record);
        }
        self.line_up(ino);
        // A flush may wait for later records now, which nobody has asked to be synced; or which are synced already, and
        // waited for these, of which a later write may have left nothing.
        self.mark_syncs(ino);
        self.try_commit(ino, now);
        self.wake_satisfied(ino);
    }

    /// Time has passed: gives up what makes no progress, sends and commits what has grown old.
    pub fn tick(&mut self, now: Duration) {
        self.check_chunks(now);
        let mut due = Vec::new();
        let mut stalled = Vec::new();
        for (ino, inode) in &self.inodes {
            if inode.is_clean() {
                continue;
            }
            let timeout = self.settings.operation_timeout;
            // A commit in flight is bounded by the session; dropping its bytes now could reorder commits.
            if !timeout.is_zero()
                && inode.committing.is_none()
                && now.saturating_sub(inode.progress_at) > timeout
            {
                stalled.push(*ino);
                continue;
            }
            let old = |since: Option<Duration>| {
                since.is_some_and(|since| now.saturating_sub(since) >= self.settings.write_behind / 2)
            };
            let unsent = old(inode.extents.oldest_unsent());
            if unsent || old(inode.oldest_unasked()) {
                due.push((*ino, unsent));
            }
        }
        for ino in stalled {
            let error = self.stall_error(ino);
            tracing::error!(%ino, %error, "written bytes could not be stored in time and are lost");
            self.fail_inode(ino, &error, now);
        }
        for (ino, unsent) in due {
            self.push(ino, unsent, now);
        }
        self.dispatch(now);
    }

    /// Why an inode's bytes could not be stored.
    fn stall_error(&self, ino: InodeNo) -> FsError {
        let policy = self.inodes.get(&ino).map(|inode| inode.policy);
        let cause = policy.and_then(|policy| self.pools.get(&policy)).and_then(|pool| pool.error.clone());
        let Some(cause) = cause else {
            return FsError::new(ErrorCode::ErrorIo, "no chunk daemon took the bytes in time");
        };
        let code = match cause.code {
            ErrorCode::ErrorNoSpace | ErrorCode::ErrorNoNodes => ErrorCode::ErrorNoSpace,
            _ => ErrorCode::ErrorIo,
        };
        FsError::new(code, cause.to_string())
    }

    /// The memory in use, counted anew: must equal [`Core::used`].
    #[cfg(test)]
    pub(super) fn validate(&self) {
        let mut used = 0;
        let mut records = BTreeMap::new();
        for (ino, inode) in &self.inodes {
            used += inode.extents.unsent();
            let queued: u64 = inode.queued.iter().map(|run| run.bytes.len() as u64).sum();
            assert_eq!(queued, inode.queued_bytes);
            used += queued;
            assert_eq!(inode.in_line, self.line.contains(ino));
            assert!(inode.in_line || inode.queued.is_empty(), "{ino} waits outside the line");
            let mut last = RunNo(0);
            let committing = inode.committing.iter().flat_map(|commit| &commit.records);
            for record in committing.clone().chain(&inode.sent) {
                assert!(record.run >= last, "records of {ino} stand in order");
                last = record.run;
                used += record.len();
                records.insert((record.chunk, record.chunk_end()), *ino);
            }
            for run in &inode.queued {
                assert!(run.no >= last, "runs of {ino} stand in order");
                last = run.no;
            }
            for record in &inode.sent {
                assert!(self.chunks.contains_key(&record.chunk), "a sent record's chunk is known");
            }
        }
        assert_eq!(used, self.used);
        assert_eq!(self.unacked, self.chunks.values().map(|chunk| chunk.unacked.len()).sum::<usize>());
        for chunk in self.chunks.values() {
            assert!(
                chunk.synced <= chunk.acked && chunk.acked <= chunk.end && chunk.end <= chunk.access.capacity
            );
            for (end, ino) in &chunk.records {
                assert_eq!(records.get(&(chunk.id(), *end)), Some(ino));
            }
        }
        for (policy, pool) in &self.pools {
            let queued: u64 = self
                .inodes
                .values()
                .filter(|inode| inode.policy == *policy)
                .map(|inode| inode.counted_bytes)
                .sum();
            assert_eq!(queued, pool.queued);
        }
    }
}
