//! Bytes of chunks in memory. A chunk's bytes never change, so nothing here ever grows stale.

use bytes::Bytes;
use dfs_proto::ChunkId;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Locks that the cache is divided by; neighbouring chunks fall under different ones.
const SHARDS: usize = 8;
/// What an entry costs beside its bytes.
const ENTRY: u64 = 128;
/// Bytes up to this long are copied: else they would hold on to the network buffer that they are part of.
const COPY_MAX: usize = 64 << 10;

/// Verified bytes of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where they begin in the chunk.
    pub start: u64,
    pub bytes: Bytes,
}

impl Run {
    /// The part that covers `[from, from + len)`, if all of it is here.
    #[must_use]
    pub fn part(&self, from: u64, len: usize) -> Option<Bytes> {
        let skip = usize::try_from(from.checked_sub(self.start)?).ok()?;
        let end = skip.checked_add(len)?;
        (end <= self.bytes.len()).then(|| self.bytes.slice(skip..end))
    }
}

struct Shard {
    runs: lru::LruCache<(ChunkId, u64), Bytes>,
    /// The keys in order: which run may cover a position.
    keys: BTreeSet<(ChunkId, u64)>,
    used: u64,
}

/// Runs of chunk bytes, the least recently used ones leave first.
pub struct Blocks {
    shards: Vec<Mutex<Shard>>,
    /// Bytes that one shard may hold.
    each: u64,
}

impl Blocks {
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let shard = || Mutex::new(Shard { runs: lru::LruCache::unbounded(), keys: BTreeSet::new(), used: 0 });
        Self { shards: std::iter::repeat_with(shard).take(SHARDS).collect(), each: bytes / SHARDS as u64 }
    }

    /// Runs are spread by the megabyte that they begin in: one large chunk uses the whole cache.
    fn shard(&self, chunk: ChunkId, megabyte: u64) -> &Mutex<Shard> {
        let at = chunk.get().wrapping_mul(31).wrapping_add(megabyte) % SHARDS as u64;
        &self.shards[usize::try_from(at).expect("below SHARDS")]
    }

    /// The bytes `[from, from + len)` of a chunk, if one run has them all.
    #[must_use]
    pub fn get(&self, chunk: ChunkId, from: u64, len: usize) -> Option<Bytes> {
        let megabyte = from >> 20;
        // A run is hardly longer than a megabyte: it begins in this one or in the one before.
        self.get_in(chunk, megabyte, from, len)
            .or_else(|| self.get_in(chunk, megabyte.checked_sub(1)?, from, len))
    }

    fn get_in(&self, chunk: ChunkId, megabyte: u64, from: u64, len: usize) -> Option<Bytes> {
        let mut shard = self.shard(chunk, megabyte).lock().unwrap_or_else(PoisonError::into_inner);
        let key = *shard.keys.range((chunk, megabyte << 20)..=(chunk, from)).next_back()?;
        let bytes = shard.runs.get(&key)?.clone();
        Run { start: key.1, bytes }.part(from, len)
    }

    /// Keeps a run.
    pub fn put(&self, chunk: ChunkId, run: &Run) {
        if run.bytes.is_empty() || run.bytes.len() as u64 + ENTRY > self.each {
            return;
        }
        let bytes =
            if run.bytes.len() <= COPY_MAX { Bytes::copy_from_slice(&run.bytes) } else { run.bytes.clone() };
        let mut shard = self.shard(chunk, run.start >> 20).lock().unwrap_or_else(PoisonError::into_inner);
        let key = (chunk, run.start);
        // A shorter run at the same place would make the longer one's rest unknown.
        if shard.runs.peek(&key).is_some_and(|old| old.len() >= bytes.len()) {
            return;
        }
        shard.used += bytes.len() as u64 + ENTRY;
        if let Some((_, old)) = shard.runs.push(key, bytes) {
            shard.used -= old.len() as u64 + ENTRY;
        }
        shard.keys.insert(key);
        while shard.used > self.each
            && let Some((key, old)) = shard.runs.pop_lru()
        {
            shard.used -= old.len() as u64 + ENTRY;
            shard.keys.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, len: usize) -> Run {
        Run { start, bytes: (0..len).map(|at| (start as usize + at) as u8).collect::<Vec<u8>>().into() }
    }

    #[test]
    fn a_run_answers_for_every_part_of_itself_and_for_nothing_else() {
        let blocks = Blocks::new(1 << 20);
        blocks.put(ChunkId(1), &run(100, 50));
        assert_eq!(blocks.get(ChunkId(1), 110, 5).unwrap(), [110, 111, 112, 113, 114][..]);
        assert_eq!(blocks.get(ChunkId(1), 99, 5), None);
        assert_eq!(blocks.get(ChunkId(1), 146, 5), None);
        assert_eq!(blocks.get(ChunkId(2), 110, 5), None);
        blocks.put(ChunkId(1), &run(100, 10));
        assert!(blocks.get(ChunkId(1), 140, 5).is_some(), "the longer run stays");
    }

    #[test]
    fn memory_is_bounded_and_what_was_used_last_stays() {
        let blocks = Blocks::new(8 * 1000);
        for nth in 0..100 {
            blocks.put(ChunkId(8), &run(nth * 100, 100));
            assert!(blocks.get(ChunkId(8), 0, 10).is_some(), "used all the time");
        }
        let shard = blocks.shard(ChunkId(8), 0).lock().unwrap();
        assert!(shard.used <= 1000 && shard.keys.len() == shard.runs.len());
    }
}
