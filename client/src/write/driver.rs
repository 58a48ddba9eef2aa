//! Carries out what the write side's core decides: streams to daemons, commits and allocations at the master, timers.

use super::Under;
use super::attrs::AttrSet;
use super::core::{Core, Dirty};
use super::{Action, CommitId, Policy, Settings, WaiterId};
use crate::data::links::{AppendEvent, AppendLink, Task};
use crate::master::{Defaults, Master};
use bytes::Bytes;
use dfs_env::Env;
use dfs_proto::error::ErrorCode;
use dfs_proto::v1::answer::Body;
use dfs_proto::v1::{self, Attr, Cred, hold, mutation};
use dfs_proto::{ChunkId, FsError, FsResult, InodeNo, NodeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, oneshot};

/// How often time is looked at while there is something to do.
const TICK: Duration = Duration::from_millis(50);
/// As long as nothing else bounds a wait.
const LONG: Duration = Duration::from_secs(365 * 86_400);
/// Seals asked of the master at the same time.
const SEALS_AT_ONCE: usize = 64;
/// Flushes of `flush_all` that run at the same time.
const FLUSHES_AT_ONCE: usize = 256;

/// Whoever must know of commits and of bytes that are worth keeping.
pub(crate) trait Hooks: Send + Sync + 'static {
    /// The master has made slices part of an inode. Called before their bytes leave the write side, so that a reader
    /// finds them in one place or the other.
    fn committed(&self, ino: InodeNo, slices: &[v1::CommitSlice], attr: Option<&Attr>);
    /// Bytes of a chunk that were written here.
    fn keep(&self, chunk: ChunkId, offset: u64, bytes: Bytes);
}

struct State {
    core: Core,
    /// By address of a first replica; numbered, so that the end of an old stream is not taken for a newer one's.
    links: HashMap<String, (u64, AppendLink)>,
    next_link: u64,
    waiters: HashMap<WaiterId, oneshot::Sender<FsResult<Option<Attr>>>>,
}

/// The write side with its I/O.
pub(crate) struct Writer {
    env: Env,
    master: Arc<dyn Master>,
    hooks: Arc<dyn Hooks>,
    handle: Handle,
    operation_timeout: Duration,
    /// Taken before the read cache's locks, never after one; nothing is awaited under it.
    state: Mutex<State>,
    /// Memory came free, or an inode failed.
    freed: Notify,
    /// There is something to look after.
    work: Arc<Notify>,
    seals: Arc<Semaphore>,
    tasks: Mutex<Vec<Task>>,
    this: Weak<Self>,
}

fn policy_of(defaults: Defaults) -> Policy {
    Policy { replicas: defaults.replicas, chunk_size: defaults.chunk_size }
}

impl Writer {
    /// Must be called within a runtime: its tasks run there, whoever calls later.
    pub(crate) fn new(
        env: Env,
        master: Arc<dyn Master>,
        hooks: Arc<dyn Hooks>,
        settings: Settings,
    ) -> Arc<Self> {
        let operation_timeout = settings.operation_timeout;
        let core = Core::new(settings, policy_of(master.defaults()));
        let writer = Arc::new_cyclic(|this| Self {
            env,
            master,
            hooks,
            handle: Handle::current(),
            operation_timeout,
            state: Mutex::new(State { core, links: HashMap::new(), next_link: 0, waiters: HashMap::new() }),
            freed: Notify::new(),
            work: Arc::new(Notify::new()),
            seals: Arc::new(Semaphore::new(SEALS_AT_ONCE)),
            tasks: Mutex::new(Vec::new()),
            this: this.clone(),
        });
        let ticks = Task::spawn(&writer.handle, ticks(writer.this.clone(), Arc::clone(&writer.work)));
        let sessions =
            Task::spawn(&writer.handle, sessions(writer.this.clone(), writer.master.session_changed()));
        writer.tasks.lock().unwrap_or_else(PoisonError::into_inner).extend([ticks, sessions]);
        writer
    }

    fn now(&self) -> Duration {
        self.env.clock.boot()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the core see an event, and carries out what it decides.
    fn with<T>(&self, event: impl FnOnce(&mut Core, Duration) -> T) -> T {
        let mut state = self.lock();
        let before = state.core.used();
        let result = event(&mut state.core, self.now());
        self.act(&mut state);
        if state.core.used() < before {
            self.freed.notify_waiters();
        }
        if !state.core.is_idle() {
            self.work.notify_one();
        }
        result
    }

    /// Appends are handed to their streams under the lock: that is what keeps their order.
    fn act(&self, state: &mut State) {
        loop {
            let actions = state.core.take_actions();
            if actions.is_empty() {
                return;
            }
            for action in actions {
                match action {
                    Action::Append { address, request } => self.append(state, &address, request),
                    Action::Commit { ino, id, cred, commit } => self.commit(ino, id, cred, commit),
                    Action::Alloc { policy, count } => self.alloc(policy, count),
                    Action::Seal { chunk, failed, suspects } => self.seal(chunk, failed, &suspects),
                    Action::Wake { waiter, result } => {
                        if let Some(waiter) = state.waiters.remove(&waiter) {
                            // Whoever waited may have given up.
                            drop(waiter.send(result));
                        }
                    }
                    Action::Keep { chunk, offset, bytes } => self.hooks.keep(chunk, offset, bytes),
                }
            }
        }
    }

    fn append(&self, state: &mut State, address: &str, request: v1::AppendRequest) {
        if !state.links.contains_key(address) {
            state.next_link += 1;
            let link = self.open_link(address, state.next_link);
            state.links.insert(address.to_owned(), (state.next_link, link));
        }
        if !state.links.get(address).is_some_and(|(_, link)| link.send(request)) {
            state.links.remove(address);
            let error = FsError::new(ErrorCode::ErrorUnavailable, format!("{address}: the stream broke"));
            state.core.link_down(address, &error, self.now());
        }
    }

    fn open_link(&self, address: &str, number: u64) -> AppendLink {
        let (this, at) = (self.this.clone(), address.to_owned());
        AppendLink::open(&self.env, &self.handle, address, move |event| {
            let Some(writer) = this.upgrade() else { return };
            match event {
                AppendEvent::Reply(reply) => writer.with(|core, now| core.append_replied(reply, now)),
                AppendEvent::Down(error) => writer.link_down(&at, number, &error),
            }
        })
    }

    /// An append stream has ended. Removed and reported under one lock: what was handed to it the core waits for, and
    /// whatever comes later goes to a new stream.
    fn link_down(&self, address: &str, number: u64, error: &FsError) {
        let mut state = self.lock();
        if state.links.get(address).is_some_and(|(current, _)| *current == number) {
            state.links.remove(address);
            let now = self.now();
            state.core.link_down(address, error, now);
            self.act(&mut state);
            self.work.notify_one();
        }
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(&self, work: impl FnOnce(Arc<Self>) -> F) {
        if let Some(this) = self.this.upgrade() {
            self.handle.spawn(work(this));
        }
    }

    fn commit(&self, ino: InodeNo, id: CommitId, cred: Cred, commit: v1::Commit) {
        self.spawn(|this| async move {
            let slices = commit.slices.clone();
            let answer = this.master.mutate(&cred, mutation::Op::Commit(commit)).await;
            let result = answer.and_then(|body| match body {
                Body::Entry(entry) => Ok(entry.attr),
                other => Err(unexpected(&other)),
            });
            if let Ok(attr) = &result {
                this.hooks.committed(ino, &slices, attr.as_ref());
            }
            this.with(|core, now| core.committed(ino, id, result, now));
        });
    }

    fn alloc(&self, policy: Policy, count: u32) {
        self.spawn(|this| async move {
            let request = v1::AllocChunks {
                count,
                replicas: policy.replicas,
                chunk_size: policy.chunk_size,
                placements: Vec::new(),
            };
            let answer = this.master.mutate(&Cred::default(), mutation::Op::AllocChunks(request)).await;
            let result = answer.and_then(|body| match body {
                Body::Chunks(chunks) => Ok(chunks.chunks),
                other => Err(unexpected(&other)),
            });
            this.with(|core, now| core.allocated(policy, result, now));
        });
    }

    fn seal(&self, chunk: ChunkId, failed: bool, suspects: &[NodeId]) {
        let suspects = suspects.iter().map(|node| node.get()).collect();
        let request = v1::SealChunk { chunk: chunk.get(), failed, suspects };
        self.spawn(|this| async move {
            if let Ok(_permit) = this.seals.acquire().await
                && let Err(error) = this.master.hold(&Cred::default(), hold::Op::SealChunk(request)).await
            {
                // Nothing is lost: the chunk is fenced and sealed when the session ends.
                tracing::warn!(%chunk, %error, "the master could not be told to seal a chunk");
            }
            this.with(Core::sealed);
        });
    }

    /// Buffers bytes. None: there is no memory for them now.
    pub(crate) fn try_write(&self, ino: InodeNo, offset: u64, data: &[u8]) -> Option<FsResult<()>> {
        let mtime = self.master.now();
        self.with(|core, now| core.write(ino, offset, data, mtime, now))
    }

    /// Buffers bytes, waits for memory where there is none. Answers how many it took: all, or as many as it could `under` the
    /// lease before that ended.
    pub(crate) async fn write(
        &self,
        ino: InodeNo,
        offset: u64,
        data: &[u8],
        under: Under<'_>,
    ) -> FsResult<usize> {
        let mut done = 0;
        loop {
            // In pieces, so that a large write waits for as little as possible at a time.
            let piece = (data.len() - done).min(dfs_proto::limits::RECORD_MAX);
            let at = offset.saturating_add(done as u64);
            if !self.write_piece(ino, at, &data[done..done + piece], under).await? {
                return Ok(done);
            }
            done += piece;
            if done == data.len() {
                return Ok(done);
            }
        }
    }

    /// False: there is no such lease.
    async fn write_piece(&self, ino: InodeNo, offset: u64, data: &[u8], under: Under<'_>) -> FsResult<bool> {
        let began = self.now();
        loop {
            // Registered before the attempt: memory that comes free right after it wakes us.
            let freed = self.freed.notified();
            let attempt = match under {
                Under::WriteLease(leases) => leases.writing(ino, None, || self.try_write(ino, offset, data)),
                Under::AnyLease(leases) => leases.keeping(ino, || self.try_write(ino, offset, data)),
                #[cfg(test)]
                Under::Nothing => Some(self.try_write(ino, offset, data)),
            };
            match attempt {
                None => return Ok(false),
                Some(Some(result)) => return result.map(|()| true),
                Some(None) => {}
            }
            let waited = self.now().saturating_sub(began);
            if !self.operation_timeout.is_zero() && waited > self.operation_timeout {
                return Err(FsError::new(ErrorCode::ErrorIo, "no memory for writing came free in time"));
            }
            // The core looks after itself; the bound only lets the time-out above be seen.
            if tokio::time::timeout(Duration::from_millis(500), freed).await.is_err() {
                tracing::debug!(%ino, "a write waits for memory");
            }
        }
    }

    /// Waits until memory has come free.
    pub(crate) async fn room(&self) -> FsResult<()> {
        let freed = self.freed.notified();
        let bound = if self.operation_timeout.is_zero() { Duration::MAX } else { self.operation_timeout };
        let used = || self.lock().core.used();
        if used() == 0 {
            return Ok(());
        }
        tokio::time::timeout(bound.min(LONG), freed)
            .await
            .map_err(|_| FsError::new(ErrorCode::ErrorIo, "no memory for writing came free in time"))
    }

    /// Syncs and commits everything of an inode. The attributes after the last commit, if there was one.
    pub(crate) async fn flush(&self, ino: InodeNo) -> FsResult<Option<Attr>> {
        let answer = {
            let mut state = self.lock();
            let waiter = state.core.flush(ino, self.now());
            let answer = match &waiter {
                Ok(Some(waiter)) => {
                    let (sender, answer) = oneshot::channel();
                    state.waiters.insert(*waiter, sender);
                    Some(answer)
                }
                Ok(None) | Err(_) => None,
            };
            self.act(&mut state);
            self.work.notify_one();
            waiter?;
            answer
        };
        let Some(answer) = answer else { return Ok(None) };
        // Bounded by the core: it fails the inode when nothing has moved for the operation time-out.
        answer.await.unwrap_or_else(|_| Err(FsError::new(ErrorCode::ErrorIo, "the client was shut down")))
    }

    /// Starts to sync and commit everything of an inode. True: nobody needs to wait for it.
    pub(crate) fn leave(&self, ino: InodeNo, size: Option<u64>) -> FsResult<bool> {
        let mut state = self.lock();
        let left = state.core.leave(ino, size, self.now());
        self.act(&mut state);
        self.work.notify_one();
        left
    }

    /// Syncs and commits everything; the first error.
    pub(crate) async fn flush_all(&self) -> FsResult<()> {
        use futures::StreamExt;
        let dirty = self.lock().core.dirty_inodes();
        let mut flushes = futures::stream::iter(dirty)
            .map(|ino| async move { (ino, self.flush(ino).await) })
            .buffer_unordered(FLUSHES_AT_ONCE);
        let mut first = Ok(());
        while let Some((ino, flushed)) = flushes.next().await {
            if let Err(error) = flushed {
                // Whoever wrote must be told, too.
                self.keep_error(ino, error.clone(), true);
                first = first.and(Err(error));
            }
        }
        first
    }

    pub(crate) fn dirty(&self, ino: InodeNo) -> Option<Dirty> {
        self.lock().core.dirty(ino)
    }

    pub(crate) fn set_attrs(&self, ino: InodeNo, cred: &Cred, set: AttrSet) -> bool {
        let ctime = self.master.now();
        self.with(|core, now| core.set_attrs(ino, cred, set, ctime, now))
    }

    pub(crate) fn keep_error(&self, ino: InodeNo, error: FsError, told_sync: bool) {
        self.with(|core, now| core.keep_error(ino, error, told_sync, now));
    }

    pub(crate) fn kill_priv(&self, ino: InodeNo, writer: &Cred) {
        self.with(|core, now| core.kill_priv(ino, writer, now));
    }

    pub(crate) fn set_policy(&self, ino: InodeNo, policy: Policy) {
        self.lock().core.set_policy(ino, policy);
    }

    pub(crate) fn discard(&self, ino: InodeNo) {
        self.with(|core, now| core.discard(ino, now));
    }

    /// The dirty bytes within a range, in order.
    pub(crate) fn read(&self, ino: InodeNo, offset: u64, len: usize) -> Vec<(u64, Bytes)> {
        self.lock().core.read(ino, offset, len)
    }
}

fn unexpected(body: &Body) -> FsError {
    FsError::new(ErrorCode::ErrorIo, format!("the master gave an answer to another question: {body:?}"))
}

/// Shows the core how time passes, while there is something that time changes.
async fn ticks(writer: Weak<Writer>, work: Arc<Notify>) {
    loop {
        work.notified().await;
        loop {
            tokio::time::sleep(TICK).await;
            let Some(writer) = writer.upgrade() else { return };
            writer.with(Core::tick);
            if writer.lock().core.is_idle() {
                break;
            }
        }
    }
}

/// Gives up the chunks of sessions that expired.
async fn sessions(writer: Weak<Writer>, mut session: tokio::sync::watch::Receiver<dfs_proto::SessionId>) {
    while session.changed().await.is_ok() {
        let Some(writer) = writer.upgrade() else { return };
        let policy = policy_of(writer.master.defaults());
        writer.with(|core, now| {
            core.set_default_policy(policy);
            core.session_changed(now);
        });
    }
}
