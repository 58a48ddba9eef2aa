//! What the leader still has to do with chunks: one queue, each job in it once.

use dfs_proto::{ChunkId, NodeId};
use std::collections::{BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The most jobs that wait. What does not fit is found again by the census.
const JOBS_MAX: usize = 1 << 20;

/// Something to do with a chunk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Job {
    /// Seal it.
    Seal(ChunkId),
    /// A daemon has a replica of a sealed chunk that is not closed yet, or that does not count; or it has none and should.
    Mend { node: NodeId, chunk: ChunkId },
    /// A daemon may delete its replica, if it still does not count by then.
    Delete { node: NodeId, chunk: ChunkId },
}

/// The queue.
#[derive(Default)]
pub struct Jobs {
    inner: Mutex<Inner>,
    wake: Notify,
}

#[derive(Default)]
struct Inner {
    queue: VecDeque<Job>,
    /// Everything that waits or is being done.
    known: BTreeSet<Job>,
    /// Fenced chunks of which no replica that was found is long enough.
    parked: BTreeSet<ChunkId>,
    closed: bool,
}

impl Jobs {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seals a chunk, before others if a client waits for what follows.
    pub fn seal(&self, chunk: ChunkId, urgent: bool) {
        self.add(Job::Seal(chunk), urgent);
    }

    /// Adds a job unless it is there already.
    pub fn add(&self, job: Job, urgent: bool) {
        let mut inner = self.inner();
        if inner.known.len() >= JOBS_MAX {
            tracing::warn!(?job, "too many jobs wait: left to the census");
            return;
        }
        if let Job::Seal(chunk) = job {
            inner.parked.remove(&chunk);
        }
        if !inner.known.insert(job) {
            return;
        }
        if urgent {
            inner.queue.push_front(job);
        } else {
            inner.queue.push_back(job);
        }
        drop(inner);
        self.wake.notify_one();
    }

    /// The next job; None when the term is over.
    pub async fn next(&self) -> Option<Job> {
        loop {
            {
                let mut inner = self.inner();
                if inner.closed {
                    return None;
                }
                if let Some(job) = inner.queue.pop_front() {
                    return Some(job);
                }
            }
            // One consumer: a permit stored in between is taken at once.
            self.wake.notified().await;
        }
    }

    /// A job was done.
    pub fn done(&self, job: Job) {
        self.inner().known.remove(&job);
    }

    /// A chunk waits for a daemon that has enough of it.
    pub fn park(&self, chunk: ChunkId) {
        self.inner().parked.insert(chunk);
    }

    /// Parked chunks are tried again.
    pub fn unpark(&self) {
        let parked = std::mem::take(&mut self.inner().parked);
        for chunk in parked {
            self.seal(chunk, false);
        }
    }

    /// How many chunks are parked, and how many wait to be sealed.
    pub fn sealing(&self) -> (usize, usize) {
        let inner = self.inner();
        (inner.parked.len(), inner.known.iter().filter(|job| matches!(job, Job::Seal(_))).count())
    }

    /// The term is over.
    pub fn close(&self) {
        self.inner().closed = true;
        self.wake.notify_one();
    }
}
