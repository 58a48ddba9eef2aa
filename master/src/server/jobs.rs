//! What the leader still has to do with chunks: each job once, in one of two lanes, so that seals, for which clients wait,
//! never wait for daemons that are slow to delete.

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

/// Jobs of one kind, worked through side by side with the others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    Seals,
    Replicas,
}

impl Job {
    const fn lane(self) -> Lane {
        match self {
            Self::Seal(_) => Lane::Seals,
            Self::Mend { .. } | Self::Delete { .. } => Lane::Replicas,
        }
    }
}

/// The queues.
#[derive(Default)]
pub struct Jobs {
    inner: Mutex<Inner>,
    /// For each lane.
    wake: [Notify; 2],
}

#[derive(Default)]
struct Inner {
    /// For each lane.
    queues: [VecDeque<Job>; 2],
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
        let lane = job.lane() as usize;
        if urgent {
            inner.queues[lane].push_front(job);
        } else {
            inner.queues[lane].push_back(job);
        }
        drop(inner);
        self.wake[lane].notify_one();
    }

    /// The next job of a lane; None when the term is over.
    pub async fn next(&self, lane: Lane) -> Option<Job> {
        loop {
            {
                let mut inner = self.inner();
                if inner.closed {
                    return None;
                }
                if let Some(job) = inner.queues[lane as usize].pop_front() {
                    return Some(job);
                }
            }
            // One consumer a lane: a permit stored in between is taken at once.
            self.wake[lane as usize].notified().await;
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

    /// Whether a chunk waits for a daemon that has enough of it.
    pub fn is_parked(&self, chunk: ChunkId) -> bool {
        self.inner().parked.contains(&chunk)
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
        self.wake.iter().for_each(Notify::notify_one);
    }
}
