//! What is kept at hand of sealed chunks, within bounds: open files and indexes.

use super::format::Entry;
use crate::lock;
use dfs_env::DiskFile;
use dfs_proto::ChunkId;
use dfs_proto::limits::{INDEX_ENTRIES, OPEN_FILES};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

/// Open files and indexes, the least recently used go first.
pub struct Cache {
    files: Mutex<LruCache<ChunkId, Arc<dyn DiskFile>>>,
    indexes: Mutex<Indexes>,
}

struct Indexes {
    by_chunk: LruCache<ChunkId, Arc<Vec<Entry>>>,
    entries: usize,
}

/// An index counts one more than its entries, so that empty ones are bounded too.
fn weight(index: &[Entry]) -> usize {
    index.len() + 1
}

impl Default for Cache {
    fn default() -> Self {
        let open = NonZeroUsize::new(OPEN_FILES).expect("not zero");
        Self {
            files: Mutex::new(LruCache::new(open)),
            indexes: Mutex::new(Indexes { by_chunk: LruCache::unbounded(), entries: 0 }),
        }
    }
}

impl Cache {
    #[must_use]
    pub fn file(&self, chunk: ChunkId) -> Option<Arc<dyn DiskFile>> {
        lock(&self.files).get(&chunk).cloned()
    }

    pub fn keep_file(&self, chunk: ChunkId, file: Arc<dyn DiskFile>) {
        lock(&self.files).put(chunk, file);
    }

    #[must_use]
    pub fn index(&self, chunk: ChunkId) -> Option<Arc<Vec<Entry>>> {
        lock(&self.indexes).by_chunk.get(&chunk).cloned()
    }

    pub fn keep_index(&self, chunk: ChunkId, index: Arc<Vec<Entry>>) {
        let mut indexes = lock(&self.indexes);
        indexes.entries += weight(&index);
        if let Some(old) = indexes.by_chunk.put(chunk, index) {
            indexes.entries -= weight(&old);
        }
        // The newest stays even when it alone is beyond the bound: it is in use anyway.
        while indexes.entries > INDEX_ENTRIES && indexes.by_chunk.len() > 1 {
            let Some((_, old)) = indexes.by_chunk.pop_lru() else { break };
            indexes.entries -= weight(&old);
        }
    }

    pub fn forget(&self, chunk: ChunkId) {
        lock(&self.files).pop(&chunk);
        let mut indexes = lock(&self.indexes);
        if let Some(old) = indexes.by_chunk.pop(&chunk) {
            indexes.entries -= weight(&old);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_stay_within_their_bound_and_the_newest_stays() {
        let cache = Cache::default();
        let index = Arc::new(vec![Entry { offset: 0, position: 64, length: 1 }; INDEX_ENTRIES / 2]);
        for chunk in 0..4 {
            cache.keep_index(ChunkId(chunk), Arc::clone(&index));
        }
        assert!(cache.index(ChunkId(2)).is_none() && cache.index(ChunkId(3)).is_some());
        cache.keep_index(ChunkId(9), Arc::new(vec![index[0]; INDEX_ENTRIES + 1]));
        assert!(cache.index(ChunkId(3)).is_none() && cache.index(ChunkId(9)).is_some());
        cache.forget(ChunkId(9));
        assert_eq!(lock(&cache.indexes).entries, 0);
    }
}
