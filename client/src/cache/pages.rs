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
    /// The cookie that its first entry follows.
    pub after: u64,
    pub page: Arc<DirPage>,
    pub term: Term,
    /// When it was asked for: an own change since overtakes it.
    pub taken: u64,
}

impl Kept {
    /// How many of its entries stand before what follows a cookie; None: that is elsewhere.
    fn skips(&self, cookie: u64) -> Option<usize> {
        if cookie == self.after {
            return Some(0);
        }
        let at = self.page.entries.iter().position(|entry| entry.cookie == cookie)? + 1;
        (at < self.page.entries.len() || self.page.end).then_some(at)
    }

    /// A page counts as one entry more than it has.
    fn weight(&self) -> usize {
        self.page.entries.len() + 1
    }
}

/// The directories that were read last.
pub struct Pages {
    dirs: LruCache<InodeNo, Vec<Kept>>,
    entries: usize,
}

impl Pages {
    #[must_use]
    pub fn new() -> Self {
        Self { dirs: LruCache::unbounded(), entries: 0 }
    }

    /// Keeps a page of a directory; those of another time go.
    pub fn put(&mut self, dir: InodeNo, kept: Kept) {
        self.entries += kept.weight();
        let pages = self.dirs.get_or_insert_mut(dir, Vec::new);
        let (after, term) = (kept.after, kept.term);
        let gone = pages.extract_if(.., |old| old.after == after || old.term != term);
        self.entries -= gone.map(|old| old.weight()).sum::<usize>();
        pages.push(kept);
        while self.entries > ENTRIES_MAX
            && let Some((_, oldest)) = self.dirs.pop_lru()
        {
            self.entries -= oldest.iter().map(Kept::weight).sum::<usize>();
        }
    }

    /// The page with what follows a cookie, and how many of its entries stand before that.
    #[must_use]
    pub fn get(&mut self, dir: InodeNo, cookie: u64) -> Option<(Kept, usize)> {
        let pages = self.dirs.get(&dir)?;
        pages.iter().find_map(|kept| kept.skips(cookie).map(|skip| (kept.clone(), skip)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfs_proto::v1::DirEntry;

    fn kept(after: u64, cookies: &[u64], end: bool) -> Kept {
        let entries =
            cookies.iter().map(|cookie| DirEntry { cookie: *cookie, ..DirEntry::default() }).collect();
        let page = Arc::new(DirPage { entries, end });
        Kept { after, page, term: Term::new(1), taken: 0 }
    }

    #[test]
    fn what_follows_a_cookie_is_found_within_a_page() {
        let (mut pages, dir) = (Pages::new(), InodeNo(1));
        pages.put(dir, kept(0, &[10, 20], false));
        pages.put(dir, kept(20, &[30, 40], true));
        let mut found = |cookie| pages.get(dir, cookie).map(|(kept, skip)| (kept.after, skip));
        assert_eq!((found(0), found(10), found(20)), (Some((0, 0)), Some((0, 1)), Some((20, 0))));
        assert_eq!((found(30), found(40), found(15)), (Some((20, 1)), Some((20, 2)), None));
        pages.put(dir, Kept { term: Term::new(2), ..kept(0, &[10], false) });
        assert!(pages.get(dir, 30).is_none() && pages.get(dir, 0).is_some());
        assert_eq!(pages.entries, 2);
    }

    #[test]
    fn the_number_of_entries_is_bounded() {
        let mut pages = Pages::new();
        let many = kept(0, &(1..1000).collect::<Vec<_>>(), true);
        for dir in 0..200 {
            pages.put(InodeNo(dir), many.clone());
            pages.put(InodeNo(dir), many.clone());
        }
        assert_eq!(pages.entries, pages.dirs.len() * 1000);
        assert!(pages.entries <= ENTRIES_MAX && pages.dirs.len() == ENTRIES_MAX / 1000);
        assert!(pages.get(InodeNo(0), 0).is_none() && pages.get(InodeNo(199), 0).is_some());
    }
}
