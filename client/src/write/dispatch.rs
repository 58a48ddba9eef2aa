//! Which chunk takes which record, and what becomes of chunks: the other half of [`Core`].

use super::chunk::{
    CHUNKS_MAX, CONGESTED_BYTES, KEEP_WHOLE, OPEN_MAX, OpenChunk, SEALS_MAX, Spare, WINDOW_ALL, is_old,
};
use super::core::Core;
use super::inode::Record;
use super::{Action, Policy};
use dfs_env::defect::{self, Defect};
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::ALLOC_CHUNKS_MAX;
use dfs_proto::v1::{self, ChunkAccess};
use dfs_proto::{ChunkId, FsError, FsResult, InodeNo, NodeId, PROTOCOL_VERSION};
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

/// How many times longer a chunk may wait while its first replica answers for others.
const BUSY: u32 = 4;
/// How many inodes in a row may find no room before the others wait for the next event.
const BLOCKED_MAX: usize = 16;

impl Core {
    /// Puts an inode with queued runs into the line, and lets its pool know how much that is.
    pub(super) fn line_up(&mut self, ino: InodeNo) {
        let Some(inode) = self.inodes.get_mut(&ino) else { return };
        let pool = self.pools.entry(inode.policy).or_default();
        pool.queued = pool.queued + inode.queued_bytes - inode.counted_bytes;
        inode.counted_bytes = inode.queued_bytes;
        if !inode.in_line && !inode.queued.is_empty() {
            inode.in_line = true;
            self.line.push_back(ino);
        }
    }

    /// Sends records while chunks have room, asks for syncs and for chunks.
    pub(super) fn dispatch(&mut self, now: Duration) {
        let mut blocked = 0;
        while blocked < BLOCKED_MAX.min(self.line.len()) && self.unacked < WINDOW_ALL {
            let Some(ino) = self.line.pop_front() else { break };
            let sent = self.send_one(ino, now);
            let Some(inode) = self.inodes.get_mut(&ino) else { continue };
            inode.in_line = !inode.queued.is_empty();
            if inode.in_line {
                self.line.push_back(ino);
            }
            blocked = if sent { 0 } else { blocked + usize::from(inode.in_line) };
        }
        // Inodes that were dropped leave their place in the line behind.
        if self.line.len() > 2 * self.inodes.len() {
            let inodes = &self.inodes;
            self.line.retain(|ino| inodes.contains_key(ino));
        }
        self.request_syncs(now);
        self.request_chunks(now);
    }

    /// Sends the front of an inode's queue as one record. False: no chunk has room for it now.
    fn send_one(&mut self, ino: InodeNo, now: Duration) -> bool {
        let Some(inode) = self.inodes.get(&ino) else { return false };
        let Some(front) = inode.queued.front() else { return false };
        let (policy, len, last) = (inode.policy, front.bytes.len(), inode.chunk);
        let Some(id) = self.pick(policy, last, len, now) else { return false };
        let request_id = self.id();
        let (Some(inode), Some(chunk)) = (self.inodes.get_mut(&ino), self.chunks.get_mut(&id)) else {
            return false;
        };
        let Some(run) = inode.take_queued(chunk.room()) else { return false };
        let record = Record {
            run: run.no,
            offset: run.offset,
            bytes: run.bytes,
            since: run.since,
            chunk: id,
            epoch: chunk.epoch(),
            chunk_offset: chunk.end,
        };
        if !chunk.is_waiting() {
            chunk.progress_at = now;
        }
        chunk.end = record.chunk_end();
        chunk.unacked.push_back(chunk.end);
        chunk.records.insert(chunk.end, ino);
        self.unacked += 1;
        self.actions.push(append(chunk, request_id, Some((ino, &record)), false));
        let full = chunk.room() == 0;
        let wanted = record.run <= inode.target;
        inode.chunk = Some(id);
        inode.sent.push_back(record);
        let whole = wanted && inode.target_is_sent();
        self.line_up(ino);
        if full {
            self.retire(id);
        }
        if whole {
            self.mark_syncs(ino);
        }
        true
    }

    /// The chunk that takes the next record of an inode whose last one went into `last`.
    fn pick(&mut self, policy: Policy, last: Option<ChunkId>, len: usize, now: Duration) -> Option<ChunkId> {
        if self.pools.entry(policy).or_default().hold_until > now {
            return None;
        }
        let unfit: Vec<ChunkId> = self.pools[&policy]
            .open
            .iter()
            .copied()
            .filter(|id| {
                self.chunks.get(id).is_none_or(|chunk| {
                    let tear = len <= KEEP_WHOLE
                        && chunk.room() < len as u64
                        && chunk.access.capacity >= 16 * KEEP_WHOLE as u64;
                    tear || is_old(chunk.opened_at, now)
                })
            })
            .collect();
        for id in unfit {
            self.retire(id);
        }
        let open: Vec<&OpenChunk> =
            self.pools[&policy].open.iter().filter_map(|id| self.chunks.get(id)).collect();
        if let Some(chunk) = open.iter().find(|chunk| Some(chunk.id()) == last) {
            return chunk.has_window().then(|| chunk.id());
        }
        let idlest = open.iter().min_by_key(|chunk| chunk.in_flight());
        let usable = idlest.filter(|chunk| chunk.has_window()).map(|chunk| chunk.id());
        let congested = idlest.is_none_or(|chunk| chunk.in_flight() > CONGESTED_BYTES);
        if congested && open.len() < OPEN_MAX {
            return self.open_spare(policy, now).or(usable);
        }
        usable
    }

    /// Begins a chunk that was allocated ahead.
    fn open_spare(&mut self, policy: Policy, now: Duration) -> Option<ChunkId> {
        if self.chunks.len() >= CHUNKS_MAX || self.seals >= SEALS_MAX {
            return None;
        }
        loop {
            let pool = self.pools.get_mut(&policy)?;
            let spare = pool.spares.pop_front()?;
            let id = ChunkId(spare.access.chunk);
            if is_old(spare.since, now) {
                self.seal(id, false, &[]);
                continue;
            }
            pool.open.push(id);
            self.chunks.insert(id, OpenChunk::new(spare, policy, now));
            return Some(id);
        }
    }

    fn seal(&mut self, chunk: ChunkId, failed: bool, suspects: &[NodeId]) {
        self.seals += 1;
        self.actions.push(Action::Seal { chunk, failed, suspects: suspects.to_vec() });
    }

    /// The master has taken note that a chunk is to be sealed, or could not be told (it finds out by itself when the
    /// session ends).
    pub fn sealed(&mut self, now: Duration) {
        self.seals = self.seals.saturating_sub(1);
        if self.seals == SEALS_MAX - 1 {
            self.dispatch(now);
        }
    }

    /// A chunk takes no more records. It is sealed when everything in it is committed.
    fn retire(&mut self, id: ChunkId) {
        let Some(chunk) = self.chunks.get_mut(&id) else { return };
        chunk.retired = true;
        if !chunk.records.is_empty() && chunk.sync_sent < chunk.end {
            chunk.want_sync = chunk.end;
            self.sync_wanted.insert(id);
        }
        if let Some(pool) = self.pools.get_mut(&chunk.policy) {
            pool.open.retain(|open| *open != id);
        }
        self.seal_if_settled(id);
    }

    fn seal_if_settled(&mut self, id: ChunkId) {
        if self.chunks.get(&id).is_some_and(OpenChunk::is_settled) {
            self.chunks.remove(&id);
            self.sync_wanted.remove(&id);
            self.seal(id, false, &[]);
        }
    }

    /// A record is committed or no longer needed.
    pub(super) fn release(&mut self, record: &Record) {
        if let Some(chunk) = self.chunks.get_mut(&record.chunk) {
            chunk.records.remove(&record.chunk_end());
            self.seal_if_settled(record.chunk);
        }
    }

    /// Wants the records of an inode that are to be committed on disk.
    pub(super) fn mark_syncs(&mut self, ino: InodeNo) {
        let Some(inode) = self.inodes.get(&ino) else { return };
        // With runs of the target still to come, the last of them will ask, once for all.
        if !inode.target_is_sent() {
            return;
        }
        for record in inode.sent.iter().filter(|record| record.run <= inode.target) {
            if let Some(chunk) = self.chunks.get_mut(&record.chunk)
                && chunk.sync_sent < record.chunk_end()
            {
                chunk.want_sync = chunk.want_sync.max(record.chunk_end());
                self.sync_wanted.insert(record.chunk);
            }
        }
    }

    /// Asks for the syncs that are wanted: on the last append if it is still here, else by one of their own.
    fn request_syncs(&mut self, now: Duration) {
        if self.sync_wanted.is_empty() {
            return;
        }
        if defect::has(Defect::CommittedUnsynced) {
            return self.sync_wanted.clear();
        }
        let mut appends: HashMap<u64, usize> = HashMap::new();
        for (at, action) in self.actions.iter().enumerate() {
            if let Action::Append { request, .. } = action {
                appends.insert(request.chunk, at);
            }
        }
        for id in std::mem::take(&mut self.sync_wanted) {
            let request_id = self.id();
            let Some(chunk) = self.chunks.get_mut(&id) else { continue };
            if chunk.want_sync <= chunk.sync_sent {
                continue;
            }
            if !chunk.is_waiting() {
                chunk.progress_at = now;
            }
            chunk.sync_sent = chunk.end;
            match appends.get(&id.get()).and_then(|at| self.actions.get_mut(*at)) {
                Some(Action::Append { request, .. }) => request.sync = true,
                _ => self.actions.push(append(chunk, request_id, None, true)),
            }
        }
    }

    /// Asks for chunks where the queue needs them.
    fn request_chunks(&mut self, now: Duration) {
        for (policy, pool) in &mut self.pools {
            let busy = pool.queued > 0 && !pool.allocating && pool.hold_until <= now;
            if busy && pool.is_short(*policy) && self.chunks.len() < CHUNKS_MAX && self.seals < SEALS_MAX {
                pool.allocating = true;
                let count = pool.wanted(*policy, ALLOC_CHUNKS_MAX);
                self.actions.push(Action::Alloc { policy: *policy, count });
            }
        }
    }

    /// The master answered a request for chunks.
    pub fn allocated(&mut self, policy: Policy, result: FsResult<Vec<ChunkAccess>>, now: Duration) {
        let pool = self.pools.entry(policy).or_default();
        pool.allocating = false;
        match result {
            Ok(chunks) if chunks.iter().any(is_usable) => {
                pool.refusals = 0;
                pool.spares
                    .extend(chunks.into_iter().filter(is_usable).map(|access| Spare { access, since: now }));
            }
            Ok(_) => {
                pool.refusals += 1;
                pool.back_off(now, FsError::new(ErrorCode::ErrorIo, "the master gave no usable chunk"));
                self.weather.failed(now);
            }
            Err(error) => {
                tracing::warn!(%error, "no chunks to write to");
                // Also the first refusal waits: the next answer would be the same.
                pool.refusals += if pool.refusals == 0 { 2 } else { 1 };
                pool.back_off(now, error);
                self.weather.failed(now);
            }
        }
        self.dispatch(now);
    }

    /// A daemon answered an append.
    pub fn append_replied(&mut self, reply: v1::AppendReply, now: Duration) {
        let id = ChunkId(reply.chunk);
        let Some(chunk) = self.chunks.get_mut(&id) else { return };
        if let Some(failure) = reply.failure {
            let error = FsError::from(failure);
            // A refused epoch or token is nobody's fault.
            let suspects: Vec<NodeId> = match error.code {
                ErrorCode::ErrorStaleEpoch | ErrorCode::ErrorBadToken => Vec::new(),
                _ if reply.failed_node != 0 => vec![NodeId(reply.failed_node)],
                _ => {
                    // A daemon that did not answer did not tell its number.
                    let replicas = &chunk.access.replicas;
                    let named = replicas.iter().find(|replica| replica.address == reply.failed_address);
                    named.or(replicas.first()).map(|replica| NodeId(replica.node)).into_iter().collect()
                }
            };
            self.give_up(id, &suspects, &error, true, now);
            self.dispatch(now);
            return;
        }
        let before = chunk.synced;
        // A daemon that claims more than was sent is not believed.
        let acked = reply.length.max(reply.synced).min(chunk.end).max(chunk.acked);
        let on_disk = if defect::has(Defect::CommittedUnsynced) { acked } else { reply.synced };
        let synced = on_disk.min(chunk.end).max(before);
        if acked > chunk.acked || synced > before {
            chunk.progress_at = now;
            match self.heard.get_mut(chunk.address()) {
                Some(heard) => *heard = now,
                None => drop(self.heard.insert(chunk.address().to_owned(), now)),
            }
        }
        (chunk.acked, chunk.synced) = (acked, synced);
        let policy = chunk.policy;
        while chunk.unacked.front().is_some_and(|end| *end <= acked) {
            chunk.unacked.pop_front();
            self.unacked -= 1;
        }
        let owners: BTreeSet<InodeNo> =
            chunk.records.range(before + 1..synced + 1).map(|(_, ino)| *ino).collect();
        self.learn_room(policy, reply.free_bytes, now);
        for ino in owners {
            self.try_commit(ino, now);
        }
        self.seal_if_settled(id);
        self.dispatch(now);
    }

    /// The stream to a first replica broke: what it owed will not come.
    pub fn link_down(&mut self, address: &str, error: &FsError, now: Duration) {
        let waiting = |chunk: &&OpenChunk| chunk.is_waiting() && chunk.address() == address;
        let mut chunks: Vec<ChunkId> = self.chunks.values().filter(waiting).map(OpenChunk::id).collect();
        chunks.sort_unstable();
        for id in chunks {
            let first = self.chunks.get(&id).and_then(|chunk| chunk.access.replicas.first());
            let suspects: Vec<NodeId> = first.map(|replica| NodeId(replica.node)).into_iter().collect();
            self.give_up(id, &suspects, error, true, now);
        }
        self.dispatch(now);
    }

    /// The session expired: its chunks are fenced, and what they hold uncommitted must be sent again.
    pub fn session_changed(&mut self, now: Duration) {
        let error = FsError::from(ErrorCode::ErrorSessionExpired);
        let mut chunks: Vec<ChunkId> = self.chunks.keys().copied().collect();
        chunks.sort_unstable();
        for pool in self.pools.values_mut() {
            pool.spares.clear();
        }
        for id in chunks {
            self.give_up(id, &[], &error, false, now);
        }
        for pool in self.pools.values_mut() {
            (pool.failures, pool.refusals, pool.hold_until) = (0, 0, Duration::ZERO);
        }
        self.dispatch(now);
    }

    /// Gives up a chunk: the master seals it, what it holds uncommitted goes back into the queues. `tell`: the master
    /// does not know yet.
    pub(super) fn give_up(
        &mut self,
        id: ChunkId,
        suspects: &[NodeId],
        error: &FsError,
        tell: bool,
        now: Duration,
    ) {
        let Some(chunk) = self.chunks.remove(&id) else { return };
        tracing::warn!(chunk = %id, %error, ?suspects, "chunk given up, its uncommitted bytes are sent again");
        self.weather.failed(now);
        self.unacked -= chunk.unacked.len();
        self.sync_wanted.remove(&id);
        // Appends not sent yet would only be refused.
        self.actions
            .retain(|action| !matches!(action, Action::Append { request, .. } if request.chunk == id.get()));
        if tell {
            self.seal(id, true, suspects);
        }
        let suspect = |access: &ChunkAccess| {
            access.replicas.iter().any(|replica| suspects.contains(&NodeId(replica.node)))
        };
        if let Some(pool) = self.pools.get_mut(&chunk.policy) {
            pool.failures += 1;
            pool.back_off(now, error.clone());
        }
        // Chunks that use the same daemon would only fail later.
        let mut unused = Vec::new();
        let mut affected = Vec::new();
        for pool in self.pools.values_mut() {
            pool.open.retain(|open| *open != id);
            let (bad, good) = pool.spares.drain(..).partition(|spare| suspect(&spare.access));
            pool.spares = good;
            unused.push(bad);
            let chunks = &self.chunks;
            affected.extend(
                pool.open.iter().filter(|id| chunks.get(id).is_some_and(|chunk| suspect(&chunk.access))),
            );
        }
        for spare in unused.into_iter().flatten() {
            self.seal(ChunkId(spare.access.chunk), false, &[]);
        }
        for id in affected {
            self.retire(id);
        }
        let owners: BTreeSet<InodeNo> = chunk.records.into_values().collect();
        for ino in owners {
            self.requeue(ino, id, now);
        }
    }

    /// Gives up chunks that make no progress. A daemon that answers for other chunks is alive and busy: it reports
    /// by itself what does not move, so it gets more time, but not for ever.
    pub(super) fn check_chunks(&mut self, now: Duration) {
        let mut late = Vec::new();
        for (id, chunk) in self.chunks.iter().filter(|(_, chunk)| chunk.is_waiting()) {
            let failures = self.pools.get(&chunk.policy).map_or(0, |pool| pool.failures);
            let patience = chunk.patience(self.settings.append_progress, failures);
            let heard = self.heard.get(chunk.address()).copied().unwrap_or_default();
            let silence = now.saturating_sub(chunk.progress_at.max(heard));
            if silence > patience || now.saturating_sub(chunk.progress_at) > patience * BUSY {
                late.push((*id, chunk.access.replicas.first().map(|replica| NodeId(replica.node))));
            }
        }
        late.sort_unstable();
        let error = FsError::new(ErrorCode::ErrorTimedOut, "an append makes no progress");
        for (id, first) in late {
            // Whoever is late behind the first replica, the first one reports; its silence speaks against itself.
            let suspects: Vec<NodeId> = first.into_iter().collect();
            self.give_up(id, &suspects, &error, true, now);
        }
    }
}

fn is_usable(access: &ChunkAccess) -> bool {
    access.capacity > 0 && !access.replicas.is_empty()
}

/// A request to append a record, or only to sync.
fn append(chunk: &OpenChunk, id: u64, record: Option<(InodeNo, &Record)>, sync: bool) -> Action {
    let mut request = v1::AppendRequest {
        id,
        version: PROTOCOL_VERSION,
        chunk: chunk.access.chunk,
        epoch: chunk.access.epoch,
        offset: chunk.end,
        sync,
        forward: chunk.access.replicas.iter().skip(1).map(|replica| replica.address.clone()).collect(),
        token: chunk.access.token.clone(),
        capacity: chunk.access.capacity,
        ..v1::AppendRequest::default()
    };
    if let Some((ino, record)) = record {
        request.offset = record.chunk_offset;
        request.ino = ino.get();
        request.file_offset = record.offset;
        request.payload = record.bytes.clone();
    }
    Action::Append { address: chunk.address().to_owned(), request }
}
