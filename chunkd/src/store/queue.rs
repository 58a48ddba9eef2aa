//! The order of a chunk's changes: a queue whose runner exists only while there is work.
//!
//! Whoever adds the first job starts the runner; it takes what has gathered (so waiting appends share one write), and
//! ends when the queue is empty. Syncs run beside it: the fdatasync of record n does not hold up the write of n + 1.

use super::Shared;
use super::append::NewRecord;
use super::draft::Draft;
use super::durable::Held;
use super::file::{Chunk, Phase};
use super::orders::Settled;
use crate::lock;
use dfs_env::defect::{self, Defect};
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{UNSYNCED_BYTES, WRITE_BATCH_BYTES, WRITE_BATCH_RECORDS, WRITE_INLINE_BYTES};
use dfs_proto::{Epoch, FsError, FsResult};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use tokio::sync::oneshot;

/// Where the answer to an append goes.
pub type HeldSender = oneshot::Sender<FsResult<Held>>;

/// A change of a chunk.
pub enum Job {
    Append { record: NewRecord, sync: bool, done: HeldSender },
    Order { order: ChunkOrder, done: oneshot::Sender<FsResult<Settled>> },
}

/// What the master orders for one chunk.
pub enum ChunkOrder {
    Fence(Epoch),
    Seal {
        epoch: Epoch,
        length: u64,
    },
    Delete,
    /// Put this finished copy in its place.
    Install(Box<Draft>),
}

/// The jobs that wait. Bounded by those who add: they hold memory permits (`server/append.rs`) or are orders.
#[derive(Default)]
pub struct Jobs {
    waiting: VecDeque<Job>,
    running: bool,
    /// The chunk has no file and has left the store: add the job to a new one.
    gone: bool,
}

/// What the runner does next.
enum Work {
    Append(Vec<NewRecord>, Vec<(bool, HeldSender)>),
    Order(ChunkOrder, oneshot::Sender<FsResult<Settled>>),
}

/// A runner that panicked leaves a chunk that can be used on: those who wait are told by their dropped senders.
struct RunnerGuard<'a>(&'a Mutex<Jobs>);

impl Drop for RunnerGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut jobs = lock(self.0);
            jobs.running = false;
            jobs.waiting.clear();
        }
    }
}

impl Chunk {
    /// Adds a job. Gives it back when the chunk has left the store.
    pub(super) fn add(self: &Arc<Self>, job: Job) -> Result<(), Job> {
        let mut jobs = lock(&self.jobs);
        if jobs.gone {
            return Err(job);
        }
        jobs.waiting.push_back(job);
        if !std::mem::replace(&mut jobs.running, true) {
            tokio::spawn(Arc::clone(self).run());
        }
        Ok(())
    }

    async fn run(self: Arc<Self>) {
        let _guard = RunnerGuard(&self.jobs);
        while let Some(work) = self.next_work() {
            match work {
                Work::Append(records, answers) => self.run_appends(records, answers).await,
                Work::Order(order, done) => {
                    let chunk = Arc::clone(&self);
                    let result = self
                        .shared
                        .env
                        .blocking(move || {
                            Ok(match order {
                                ChunkOrder::Fence(epoch) => chunk.fence(epoch),
                                ChunkOrder::Seal { epoch, length } => chunk.seal(epoch, length),
                                ChunkOrder::Delete => chunk.delete().map(|()| Settled {
                                    epoch: Epoch(0),
                                    length: 0,
                                    digest: 0,
                                    sealed: false,
                                }),
                                ChunkOrder::Install(draft) => chunk.install(*draft),
                            })
                        })
                        .await;
                    // Whoever gave the order may have been disconnected; it is carried out all the same.
                    let _ = done.send(result.unwrap_or_else(|error| Err(error.into())));
                }
            }
            self.progress.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn next_work(&self) -> Option<Work> {
        // The map's lock first, as everywhere: see the lock order at `Chunk::jobs`.
        let mut map = (self.phase() == Phase::Absent).then(|| lock(&self.shared.chunks));
        let mut jobs = lock(&self.jobs);
        let (mut records, mut answers, mut bytes) = (Vec::new(), Vec::new(), 0);
        while let Some(job) = jobs.waiting.pop_front() {
            match job {
                Job::Append { record, sync, done } => {
                    bytes += record.payload.len();
                    records.push(record);
                    answers.push((sync, done));
                    if records.len() >= WRITE_BATCH_RECORDS || bytes >= WRITE_BATCH_BYTES {
                        break;
                    }
                }
                Job::Order { order, done } if records.is_empty() => return Some(Work::Order(order, done)),
                order @ Job::Order { .. } => {
                    jobs.waiting.push_front(order);
                    break;
                }
            }
        }
        if !records.is_empty() {
            return Some(Work::Append(records, answers));
        }
        jobs.running = false;
        if let Some(map) = &mut map {
            jobs.gone = true;
            map.remove(&self.id);
        }
        None
    }

    async fn run_appends(self: &Arc<Self>, records: Vec<NewRecord>, answers: Vec<(bool, HeldSender)>) {
        let bytes: usize = records.iter().map(|record| record.payload.len()).sum();
        let ends: Vec<u64> = records.iter().map(NewRecord::end).collect();
        // A few bytes into the page cache take less time than a change of thread. Creating a file may not be quick.
        let results = if bytes <= WRITE_INLINE_BYTES && self.phase() == Phase::Open {
            self.append(&records)
        } else {
            let chunk = Arc::clone(self);
            match self.shared.env.blocking(move || Ok(chunk.append(&records))).await {
                Ok(results) => results,
                Err(error) => answers.iter().map(|_| Err(FsError::from_io(&error))).collect(),
            }
        };
        for (((sync, done), result), end) in answers.into_iter().zip(results).zip(ends) {
            match result {
                Ok(length) if sync && defect::has(Defect::AckBeforeSync) => {
                    let _ = done.send(Ok(Held { length, synced: length }));
                    if lock(&self.syncs).start() {
                        tokio::spawn(Arc::clone(self).run_syncs());
                    }
                }
                Ok(_) if sync && self.held().synced < end => self.ask_sync(end, done),
                // Whoever asked may have gone.
                Ok(length) => drop(done.send(Ok(Held { length, synced: self.held().synced }))),
                Err(error) => drop(done.send(Err(error))),
            }
        }
        let held = self.held();
        if held.length.saturating_sub(held.synced) >= UNSYNCED_BYTES && lock(&self.syncs).start() {
            tokio::spawn(Arc::clone(self).run_syncs());
        }
    }

    /// Answers `done` when everything below `upto` is on disk.
    fn ask_sync(self: &Arc<Self>, upto: u64, done: HeldSender) {
        if lock(&self.syncs).ask(upto, done) {
            tokio::spawn(Arc::clone(self).run_syncs());
        }
    }

    async fn run_syncs(self: Arc<Self>) {
        loop {
            let result = match self.shared.syncs.acquire().await {
                Ok(_permit) => {
                    let chunk = Arc::clone(&self);
                    match self.shared.env.blocking(move || Ok(chunk.sync())).await {
                        Ok(result) => result,
                        Err(error) => Err(error.into()),
                    }
                }
                Err(closed) => Err(FsError::new(ErrorCode::ErrorUnavailable, closed.to_string())),
            };
            self.progress.fetch_add(1, Ordering::Relaxed);
            let mut syncs = lock(&self.syncs);
            if !syncs.ended(&result, self.held().length) {
                return;
            }
        }
    }
}

trait FromIo {
    fn from_io(error: &std::io::Error) -> Self;
}

impl FromIo for FsError {
    /// The same cause for everybody who waited for one call.
    fn from_io(error: &std::io::Error) -> Self {
        Self::new(ErrorCode::ErrorIo, error.to_string())
    }
}

impl Shared {
    /// Adds a job to a chunk's queue; the chunk is made known when it was not.
    pub(super) fn submit(self: &Arc<Self>, id: dfs_proto::ChunkId, mut job: Job) {
        loop {
            let chunk = Arc::clone(
                lock(&self.chunks).entry(id).or_insert_with(|| Arc::new(Chunk::absent(id, Arc::clone(self)))),
            );
            match chunk.add(job) {
                Ok(()) => return,
                Err(back) => job = back,
            }
        }
    }
}
