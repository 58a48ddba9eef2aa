//! Fetches that are under way: who needs the same bytes waits for the same fetch.

use super::cache::Run;
use bytes::Bytes;
use dfs_proto::error::ErrorCode;
use dfs_proto::{ChunkId, FsError, FsResult};
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Bytes under way beyond which nothing more is read ahead.
const AHEAD_MAX: usize = 64 << 20;

type Landing = watch::Receiver<Option<FsResult<Run>>>;

struct Entry {
    end: u64,
    number: u64,
    landing: Landing,
}

#[derive(Default)]
struct Inner {
    /// By chunk and beginning.
    entries: BTreeMap<(ChunkId, u64), Entry>,
    bytes: usize,
    next: u64,
}

#[derive(Default)]
pub(crate) struct Flights(Mutex<Inner>);

/// Bytes that are here, or on their way.
pub(crate) enum Ticket {
    Here(Bytes),
    Flight(Flight),
}

pub(crate) struct Flight(Landing);

impl Flight {
    /// Waits for what the fetch brings. Bounded by the fetch.
    pub(crate) async fn land(mut self) -> FsResult<Run> {
        let gone = || FsError::new(ErrorCode::ErrorIo, "a fetch ended without a result");
        let landed = self.0.wait_for(Option::is_some).await.map_err(|_| gone())?;
        landed.clone().ok_or_else(gone)?
    }
}

/// Takes its flight off the board when the fetch has ended, however it ended.
struct Airborne {
    flights: Arc<Flights>,
    key: (ChunkId, u64),
    number: u64,
    bytes: usize,
}

impl Drop for Airborne {
    fn drop(&mut self) {
        let mut inner = self.flights.lock();
        inner.bytes -= self.bytes;
        if inner.entries.get(&self.key).is_some_and(|entry| entry.number == self.number) {
            inner.entries.remove(&self.key);
        }
    }
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether so much is under way that nothing more should be read ahead.
    pub(crate) fn is_full(&self) -> bool {
        self.lock().bytes >= AHEAD_MAX
    }

    /// Joins a fetch under way that brings `covers` (beginning and length), or starts one of `range`, which has them.
    pub(crate) fn join<F>(
        self: &Arc<Self>,
        handle: &Handle,
        chunk: ChunkId,
        covers: (u64, usize),
        range: (u64, usize),
        fetch: impl FnOnce() -> F,
    ) -> Ticket
    where
        F: Future<Output = FsResult<Run>> + Send + 'static,
    {
        let mut inner = self.lock();
        let before = inner.entries.range((chunk, 0)..=(chunk, covers.0)).next_back();
        if let Some((_, entry)) = before
            && entry.end >= covers.0 + covers.1 as u64
        {
            return Ticket::Flight(Flight(entry.landing.clone()));
        }
        let (sender, landing) = watch::channel(None);
        inner.next += 1;
        inner.bytes += range.1;
        let (key, number) = ((chunk, range.0), inner.next);
        let entry = Entry { end: range.0 + range.1 as u64, number, landing: landing.clone() };
        // A shorter flight from the same place keeps its passengers; who comes from now on takes this one.
        inner.entries.insert(key, entry);
        drop(inner);
        let airborne = Airborne { flights: Arc::clone(self), key, number, bytes: range.1 };
        let fetch = fetch();
        handle.spawn(async move {
            let result = fetch.await;
            drop(airborne);
            sender.send_replace(Some(result));
        });
        Ticket::Flight(Flight(landing))
    }
}
