//! Reading directories.

use super::{Client, unexpected};
use dfs_proto::v1::{self, Cred, answer, query};
use dfs_proto::{FsResult, InodeNo, limits};

/// So many entries of a page are shown with attributes that are not believed, and asked for one by one if somebody wants
/// them, before the whole page is asked for again.
const STRANGERS: usize = 4;

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
        let cache = &self.inner.cache;
        let max = max.clamp(1, limits::DIR_PAGE_MAX);
        // Whoever may list it has been found out when it was opened.
        let known =
            if self.inner.session.squashes_root() { None } else { self.known_page(ino, cookie, plus) };
        if let Some(page) = known.filter(|page| page.entries.len() <= max as usize) {
            return Ok(page);
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
        Ok(page)
    }

    /// A page that was listed before, if the names and nearly all attributes in it are still believed.
    fn known_page(&self, dir: InodeNo, cookie: u64, plus: bool) -> Option<v1::DirPage> {
        let (page, skip) = self.inner.cache.page(dir, cookie)?;
        let mut page = v1::DirPage { entries: page.entries[skip..].to_vec(), end: page.end };
        let mut strangers = 0;
        for entry in &mut page.entries {
            let ino = InodeNo(entry.ino);
            entry.attr = match self.cached_attr(ino).filter(|_| plus) {
                Some((attr, _)) => Some(attr),
                None if plus => {
                    strangers += 1;
                    Some(self.last_known(ino)?)
                }
                None => None,
            };
        }
        (strangers <= STRANGERS).then_some(page)
    }
}
