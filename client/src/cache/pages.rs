//! Pages of directories as the master listed them: a directory that is read again is not asked for again while its lease
//! lasts.

use crate::leases::Term;
use dfs_proto::InodeNo;
use dfs_proto::v1::DirPage;
use lru::LruCache;
use std::sync::Arc;

/// Entries of all pages together; at some 200 bytes each this is 13 MB.
const ENTRIES_MAX: usize = 65_536;

/// A page, and what it is believed under.
#[derive(Clone)]
pub struct Kept {
    pub page: Arc<DirPage>,
    pub term: Term,
    /// When it was asked for: an own change since overtakes it.
    pub taken: u64,
}

/// The least recently read go first.
pub struct Pages {
    pages: LruCache<(InodeNo, u64), Kept>,
    entries: usize,
}

impl Pages {
    #[must_use]
    pub fn new() -> Self {
        Self { pages: LruCache::unbounded(), entries: 0 }
    }

    /// Keeps what follows a cookie. A page counts as one entry more than it has.
    pub fn put(&mut self, dir: InodeNo, cookie: u64, kept: Kept) {
        self.entries += kept.page.entries.len() + 1;
        if let Some(before) = self.pages.put((dir, cookie), kept) {
            self.entries -= before.page.entries.len() + 1;
        }
        while self.entries > ENTRIES_MAX
            && let Some((_, oldest)) = self.pages.pop_lru()
        {
            self.entries -= oldest.page.entries.len() + 1;
        }
    }

    /// What follows a cookie, as it was when it was kept.
    #[must_use]
    pub fn get(&mut self, dir: InodeNo, cookie: u64) -> Option<Kept> {
        self.pages.get(&(dir, cookie)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfs_proto::v1::DirEntry;

    #[test]
    fn the_number_of_entries_is_bounded() {
        let mut pages = Pages::new();
        let page = Arc::new(DirPage { entries: vec![DirEntry::default(); 999], ..DirPage::default() });
        let kept = Kept { page, term: Term::new(1), taken: 0 };
        for dir in 0..200 {
            pages.put(InodeNo(dir), 0, kept.clone());
            pages.put(InodeNo(dir), 0, kept.clone());
        }
        assert_eq!(pages.entries, pages.pages.len() * 1000);
        assert!(pages.entries <= ENTRIES_MAX && pages.pages.len() == ENTRIES_MAX / 1000);
        assert!(pages.get(InodeNo(0), 0).is_none() && pages.get(InodeNo(199), 0).is_some());
    }
}
