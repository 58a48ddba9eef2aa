//! Reading directories.

use super::{Client, unexpected};
use crate::cache::Edition;
use dfs_proto::v1::{self, Cred, answer, query};
use dfs_proto::{FsResult, InodeNo, limits};

impl Client {
    /// The entries that follow `cookie` (0: from the start), at most `max` of them; with `plus` each with its attributes.
    ///
    /// # Errors
    /// ErrorNotDir, ErrorAccess, and the session's.
    pub async fn read_dir(
        &self,
        cred: &Cred,
        ino: InodeNo,
        cookie: u64,
        max: u32,
        plus: bool,
    ) -> FsResult<v1::DirPage> {
        self.list_dir(cred, ino, cookie, max, plus).await.map(|(page, _)| page)
    }

    /// As [`Client::read_dir`], and as of what the entries are, if that is known: as long as it is the directory's edition, they
    /// are what an answer would show.
    ///
    /// # Errors
    /// As [`Client::read_dir`].
    pub async fn list_dir(
        &self,
        cred: &Cred,
        ino: InodeNo,
        cookie: u64,
        max: u32,
        plus: bool,
    ) -> FsResult<(v1::DirPage, Option<Edition>)> {
        let cache = &self.inner.cache;
        let max = max.clamp(1, limits::DIR_PAGE_MAX);
        // Before it is looked whether the page is believed: it is of this edition, or of a later one.
        let edition = cache.edition(ino);
        // Whoever may list it has been found out when it was opened.
        if let Some(page) = self.known_page(ino, cookie, max, plus) {
            return Ok((page, edition));
        }
        let ticket = cache.ticket();
        let question = v1::ReadDir { ino: ino.get(), cookie, max_entries: max, plus };
        let heard = self.inner.session.ask(cred, query::Op::ReadDir(question)).await;
        let ticket = ticket.at(heard.seen);
        let mut page = match heard.result? {
            answer::Body::DirPage(page) => page,
            other => return Err(unexpected(&other)),
        };
        cache.put_page(&ticket, ino, cookie, &page);
        for entry in &mut page.entries {
            if let Some(attr) = &mut entry.attr {
                cache.put_attr(&ticket, attr);
                cache.put_name(&ticket, ino, &entry.name, Some(InodeNo(entry.ino)));
                // What is known of later is shown: this page may be older than this client's own last change.
                let newest = cache.attr(InodeNo(entry.ino)).map_or(*attr, |(known, _)| known);
                *attr = self.inner.overlaid(newest);
            }
        }
        if cookie == 0
            && let Some((attr, _)) = cache.attr(ino)
        {
            self.inner.accessed(&attr);
        }
        Ok((page, cache.edition_of(&ticket, ino)))
    }

    /// The edition of a directory, if it can be believed, and everybody may list what the kernel lets him.
    #[must_use]
    pub fn edition(&self, dir: InodeNo) -> Option<Edition> {
        self.inner.cache.edition(dir).filter(|_| !self.inner.session.squashes_root())
    }

    /// The first entries of a directory that was listed before, without attributes, if they are still believed; what
    /// [`Client::read_dir`] would answer, without waiting. For whoever has opened it, and so may list it.
    #[must_use]
    pub fn names_listed(&self, dir: InodeNo, max: u32) -> Option<(v1::DirPage, Option<Edition>)> {
        let edition = self.inner.cache.edition(dir);
        Some((self.known_page(dir, 0, max, false)?, edition))
    }

    /// A page that was listed before, if everything in it is still believed.
    fn known_page(&self, dir: InodeNo, cookie: u64, max: u32, plus: bool) -> Option<v1::DirPage> {
        if self.inner.session.squashes_root() {
            return None;
        }
        let (page, skip) = self.inner.cache.page(dir, cookie)?;
        if page.entries.len() - skip > max as usize {
            return None;
        }
        let mut entries = Vec::with_capacity(page.entries.len() - skip);
        for entry in &page.entries[skip..] {
            let ino = InodeNo(entry.ino);
            let attr = if plus { Some(self.cached_attr(ino)?.0) } else { None };
            entries.push(v1::DirEntry { attr, name: entry.name.clone(), ..*entry });
        }
        Some(v1::DirPage { entries, end: page.end })
    }
}
