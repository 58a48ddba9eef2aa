//! What is kept at hand of sealed chunks, within bounds: open files and indexes.

use super::format::Entry;
use crate::lock;
use dfs_env::DiskFile;
use dfs_proto::ChunkId;
use dfs_proto::limits::{INDEX_ENTRIES, OPEN_FILES};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

/// A chunk's file: the chunk, and which of those that have stood in its place.
pub type FileId = (ChunkId, u64);

/// Open files and indexes, the least recently used go first.
pub struct Cache {
    files: Mutex<LruCache<FileId, Arc<dyn DiskFile>>>,
    indexes: Mutex<Indexes>,
}

struct Indexes {
    by_file: LruCache<FileId, Arc<Vec<Entry>>>,
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
            indexes: Mutex::new(Indexes { by_file: LruCache::unbounded(), entries: 0 }),
        }
    }
}

impl Cache {
    #[must_use]
    pub fn file(&self, id: FileId) -> Option<Arc<dyn DiskFile>> {
        lock(&self.files).get(&id).cloned()
    }

    pub fn keep_file(&self, id: FileId, file: Arc<dyn DiskFile>) {
        lock(&self.files).put(id, file);
    }

    #[must_use]
    pub fn index(&self, id: FileId) -> Option<Arc<Vec<Entry>>> {
        lock(&self.indexes).by_file.get(&id).cloned()
    }

    pub fn keep_index(&self, id: FileId, index: Arc<Vec<Entry>>) {
        let mut indexes = lock(&self.indexes);
        indexes.entries += weight(&index);
        if let Some(old) = indexes.by_file.put(id, index) {
            indexes.entries -= weight(&old);
        }
        // The newest stays even when it alone is beyond the bound: it is in use anyway.
        while indexes.entries > INDEX_ENTRIES && indexes.by_file.len() > 1 {
            let Some((_, old)) = indexes.by_file.pop_lru() else { break };
            indexes.entries -= weight(&old);
        }
    }

    pub fn forget(&self, id: FileId) {
        lock(&self.files).pop(&id);
        let mut indexes = lock(&self.indexes);
        if let Some(old) = indexes.by_file.pop(&id) {
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
            cache.keep_index((ChunkId(chunk), 0), Arc::clone(&index));
        }
        assert!(cache.index((ChunkId(2), 0)).is_none() && cache.index((ChunkId(3), 0)).is_some());
        cache.keep_index((ChunkId(9), 1), Arc::new(vec![index[0]; INDEX_ENTRIES + 1]));
        assert!(cache.index((ChunkId(3), 0)).is_none() && cache.index((ChunkId(9), 1)).is_some());
        assert!(cache.index((ChunkId(9), 0)).is_none(), "another file stood there");
        cache.forget((ChunkId(9), 1));
        assert_eq!(lock(&cache.indexes).entries, 0);
    }
}
