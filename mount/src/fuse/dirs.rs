//! Directory handles: pages of entries, fetched as they are read.
//!
//! An entry's cookie is the same for every reader and stays while entries come and go, so a position is just the cookie
//! of the last entry read: `.` has 1, `..` has 2, the master's are above.
//!
//! A kernel that opens a directory asks for attributes with the first entries, whether it has them or not; those that come make
//! it drop the ACLs that it has. If it has most of what it asks for, the first answer is the two dots and nothing else: then it
//! goes on without asking for attributes.

use super::answer::Answer;
use super::convert::{file_attr, file_type};
use super::forget::LISTING;
use super::state::Shared;
use crate::killable::Refuse;
use crate::listings::{Listings, Reader};
use dfs_client::Edition;
use dfs_proto::v1::{Attr, Cred, DirEntry, Kind};
use dfs_proto::{FsError, FsResult, InodeNo, limits};
use fuser::{FileAttr, FileType, Generation, ReplyDirectory, ReplyDirectoryPlus};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Mutex;

/// More entries with attributes than fit in one answer.
const REPLY_MAX: usize = 256;
/// Entries of a page that are looked at to tell whether the kernel has them.
const SAMPLES: usize = 16;
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;

/// An open directory.
pub struct Dir {
    ino: InodeNo,
    /// When it was last answered with what the kernel keeps: names, if attributes came with it, or entries.
    listed: std::sync::Mutex<Option<Instant>>,
    /// Who opened it: reading is allowed or not as it was then, whoever reads.
    cred: Cred,
    page: Mutex<Page>,
    reader: std::sync::Mutex<Reader>,
}

/// A piece of the directory as the master answered it.
#[derive(Default)]
struct Page {
    entries: Vec<DirEntry>,
    /// The cookie that the first entry follows.
    after: u64,
    /// Nothing follows the last entry.
    end: bool,
    /// Where the reader is: the index of the next entry, and the cookie before it.
    next: usize,
    position: u64,
    /// The entries have their attributes.
    plus: bool,
    /// As of what the entries are.
    edition: Option<Edition>,
    /// The kernel asks for attributes beyond the beginning: it does when names have been looked up since the last piece, as
    /// `ls -l` does after every few hundred entries. What it does not ask for in between is looked up next.
    looks: bool,
}

impl Page {
    /// Goes to what follows `cookie`; false: that is not in this page.
    fn seek(&mut self, cookie: u64) -> bool {
        if cookie != self.position {
            let index = if cookie == self.after {
                Some(0)
            } else {
                self.entries.iter().position(|entry| entry.cookie == cookie).map(|index| index + 1)
            };
            let Some(index) = index else { return false };
            (self.next, self.position) = (index, cookie);
        }
        self.next < self.entries.len() || self.end
    }
}

impl Dir {
    pub fn new(ino: InodeNo, cred: Cred, reader: Reader) -> Self {
        let nowhere = Page { position: u64::MAX, after: u64::MAX, ..Page::default() };
        Self {
            ino,
            listed: std::sync::Mutex::default(),
            cred,
            page: Mutex::new(nowhere),
            reader: std::sync::Mutex::new(reader),
        }
    }

    fn reader(&self) -> std::sync::MutexGuard<'_, Reader> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel has closed it.
    pub fn closes(&self, listings: &Listings) {
        listings.closes(self.ino, &mut self.reader());
    }

    /// When it was last answered with what the kernel keeps, if it is this directory.
    pub fn listed(&self, dir: InodeNo) -> Option<Instant> {
        let listed = *self.listed.lock().unwrap_or_else(PoisonError::into_inner);
        listed.filter(|_| self.ino == dir)
    }
}

/// A reply that entries are added to until it is full (`add` answers true).
pub trait Listing: Refuse {
    const PLUS: bool;
    fn add(&mut self, entry: &Line<'_>) -> bool;
    fn ok(self);
}

/// One entry as it is listed.
pub struct Line<'a> {
    node: fuser::INodeNo,
    cookie: u64,
    name: &'a OsStr,
    kind: FileType,
    /// Attributes, generation, and how long they may be believed; in listings with attributes.
    attr: Option<(FileAttr, u64, Duration)>,
}

impl Listing for ReplyDirectory {
    const PLUS: bool = false;
    fn add(&mut self, line: &Line<'_>) -> bool {
        self.add(line.node, line.cookie, line.kind, line.name)
    }
    fn ok(self) {
        self.ok();
    }
}

impl Listing for ReplyDirectoryPlus {
    const PLUS: bool = true;
    fn add(&mut self, line: &Line<'_>) -> bool {
        let Some((attr, generation, ttl)) = &line.attr else { return true };
        self.add(line.node, line.cookie, line.name, ttl, attr, Generation(*generation))
    }
    fn ok(self) {
        self.ok();
    }
}

impl Shared {
    /// Answers with the entries that follow `position`.
    pub async fn list<L: Listing>(self: &Arc<Self>, dir: &Dir, position: u64, answer: &Answer<L>) {
        let mut page = dir.page.lock().await;
        let caches = dir.reader().caches();
        self.listings.reads(dir.ino, &mut dir.reader());
        if let Err(error) = self.turn_to::<L>(dir, &mut page, position).await {
            return answer.fail(&error);
        }
        let dots = if position < DOT_DOT { self.dots(dir, position).await } else { Ok(Vec::new()) };
        let dots = match dots {
            Ok(dots) => dots,
            Err(error) => return answer.fail(&error),
        };
        if L::PLUS && page.plus {
            self.complete(&mut page).await;
        }
        // A page without attributes is here for those who do not want them.
        let rest = if L::PLUS && !page.plus { &[] } else { &page.entries[page.next..] };
        let mut told = 0;
        // Before it is looked how long names may be believed, and again when they are on their way.
        let listing = || {
            if L::PLUS || caches {
                *dir.listed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            }
        };
        listing();
        self.listings.answers(dir.ino, &mut dir.reader(), page.edition);
        let sent = answer.send(|mut reply| {
            told = self.fill(&mut reply, dir, rest, &dots);
            listing();
            if L::PLUS && position == 0 {
                let shown = if rest.is_empty() { &page.entries[..] } else { &rest[..told] };
                let until = self.seen_until(dir, shown).filter(|_| rest.is_empty() || told > 0);
                self.listings.believes(dir.ino, until.unwrap_or(0));
            }
            reply.ok();
        });
        if !sent {
            self.listings.closes(dir.ino, &mut dir.reader());
        } else if caches && page.edition.is_none() && self.client.lease_term(dir.ino).is_none() {
            self.drop_soon(dir.ino);
        }
        if sent && told > 0 {
            page.next += told;
            page.position = page.entries[page.next - 1].cookie;
        }
    }

    /// Entries came without a lease, so that no recall will drop them: they are dropped as soon as they have been taken in.
    fn drop_soon(self: &Arc<Self>, dir: InodeNo) {
        let (fs, Ok(node)) = (Arc::clone(self), self.inodes.node(dir)) else { return };
        self.runtime.spawn(async move {
            tokio::time::sleep(LISTING).await;
            fs.drop_pages(node, 0, 0).await;
        });
    }

    /// Makes `page` hold what follows `position`.
    async fn turn_to<L: Listing>(&self, dir: &Dir, page: &mut Page, position: u64) -> FsResult<()> {
        // The dots stand before the first entry.
        let cookie = if position <= DOT_DOT { 0 } else { position };
        // Rewinding shows what is there now, not what was.
        page.looks |= L::PLUS && position != 0;
        let caches = dir.reader().caches();
        // What the kernel keeps for others is not from before a change by anybody else.
        let good =
            !caches || page.edition.is_some_and(|old| self.client.lease_term(dir.ino) == Some(old.term));
        if position != 0 && good && (page.plus || !L::PLUS) && page.seek(cookie) {
            return Ok(());
        }
        let known = if L::PLUS && position == 0 {
            self.client.names_listed(dir.ino, limits::DIR_PAGE_MAX)
        } else {
            None
        };
        let known = known.filter(|(known, _)| self.seen_until(dir, &known.entries).is_some());
        let plus = known.is_none() && (L::PLUS || page.looks);
        let (fetched, edition) = match known {
            Some(known) => known,
            None => {
                let list = || self.client.list_dir(&dir.cred, dir.ino, cookie, limits::DIR_PAGE_MAX, plus);
                let mut listed = list().await?;
                if caches && listed.1.is_none() && self.client.lease_term(dir.ino).is_none() {
                    // Others want it. In its turn it is to be had.
                    self.client.read_lease(dir.ino).await;
                    listed = list().await?;
                }
                listed
            }
        };
        *page = Page {
            // A page without entries that is not the end would be asked for again and again.
            end: fetched.end || fetched.entries.is_empty(),
            entries: fetched.entries,
            after: cookie,
            next: 0,
            position: cookie,
            plus,
            edition,
            looks: page.looks,
        };
        Ok(())
    }

    /// Gets the attributes that did not come with the next entries: their reader may list them, but not search the directory.
    /// The kernel takes no entry without, and lets nobody see what he may not.
    async fn complete(&self, page: &mut Page) {
        let next = page.next;
        if page.entries.iter().skip(next).take(REPLY_MAX).all(|entry| entry.attr.is_some()) {
            return;
        }
        for entry in page.entries.iter_mut().skip(next).take(REPLY_MAX) {
            if entry.attr.is_none() {
                entry.attr = self.client.getattr(InodeNo(entry.ino)).await.ok();
            }
        }
        let mut at = 0;
        page.entries.retain(|entry| {
            at += 1;
            // What is gone is not shown.
            at <= next || at > next + REPLY_MAX || entry.attr.is_some()
        });
    }

    /// `.` and `..`, as far as they follow `position`.
    async fn dots(&self, dir: &Dir, position: u64) -> FsResult<Vec<(u64, &'static str, Attr)>> {
        let own = self.client.getattr(dir.ino).await?;
        let parent = if dir.ino == self.inodes.root() || own.parent == 0 { own.ino } else { own.parent };
        let mut dots = Vec::new();
        if position < DOT {
            dots.push((DOT, ".", own));
        }
        // The kernel takes nothing but the number of `..`.
        dots.push((DOT_DOT, "..", Attr { ino: parent, ..own }));
        Ok(dots)
    }

    /// Until when the kernel believes most entries of a page that it could be told anything of; None: it does not.
    fn seen_until(&self, dir: &Dir, entries: &[DirEntry]) -> Option<u32> {
        let (mut seen, mut samples, mut all_until) = (0, 0, u32::MAX);
        for entry in entries.iter().step_by((entries.len() / SAMPLES).max(1)) {
            let believed = self.inodes.believed(InodeNo(entry.ino));
            let has_news = !believed.attr && self.client.cached_lookup(dir.ino, &entry.name).is_some();
            samples += 1;
            if let Some(until) = believed.name.filter(|_| !has_news) {
                seen += 1;
                all_until = all_until.min(until);
            }
        }
        (seen * 4 >= samples * 3).then_some(all_until)
    }

    /// Answers how many of the entries were told.
    fn fill<L: Listing>(
        &self,
        reply: &mut L,
        dir: &Dir,
        entries: &[DirEntry],
        dots: &[(u64, &'static str, Attr)],
    ) -> usize {
        let mut told = 0;
        for (cookie, name, attr) in dots {
            let Ok(node) = self.inodes.node(InodeNo(attr.ino)) else { continue };
            let Ok(shown) = file_attr(attr, node) else { continue };
            let line = Line {
                node,
                cookie: *cookie,
                name: OsStr::new(name),
                kind: FileType::Directory,
                // The kernel counts no lookup for these two.
                attr: Some((shown, attr.generation, Duration::ZERO)),
            };
            if reply.add(&line) {
                return told;
            }
        }
        for entry in entries {
            let ino = InodeNo(entry.ino);
            // Counted before it is looked how long it may be believed, and before the kernel can forget it.
            if L::PLUS {
                self.inodes.looked_up(ino, entry.kind() == Kind::Dir);
            }
            let attr = if L::PLUS { self.entry_attr(dir, entry) } else { None };
            let added = self.line(entry, attr.as_ref()).map(|line| {
                let full = reply.add(&line);
                if full && L::PLUS {
                    self.inodes.forget(ino, 1);
                }
                full
            });
            match added {
                Ok(false) => {}
                Ok(true) => return told,
                Err(error) => {
                    if L::PLUS {
                        self.inodes.forget(ino, 1);
                    }
                    tracing::warn!(%ino, %error, "a directory entry was left out");
                }
            }
            told += 1;
        }
        told
    }

    fn line<'a>(&self, entry: &'a DirEntry, attr: Option<&(Attr, Duration)>) -> Result<Line<'a>, FsError> {
        let node = self.inodes.node(InodeNo(entry.ino))?;
        let attr = match attr {
            Some((attr, ttl)) => Some((file_attr(attr, node)?, attr.generation, *ttl)),
            None => None,
        };
        let name = OsStr::from_bytes(&entry.name);
        Ok(Line { node, cookie: entry.cookie, name, kind: file_type(entry.kind)?, attr })
    }

    /// The attributes to list an entry with, and how long the name and they may be believed: as long as the client does. What
    /// it does not believe any more is shown and looked up again when it is used.
    fn entry_attr(&self, dir: &Dir, entry: &DirEntry) -> Option<(Attr, Duration)> {
        match self.client.cached_lookup(dir.ino, &entry.name) {
            Some(Ok((attr, left))) if attr.ino == entry.ino => {
                let left = self.as_kernel_can(left);
                self.inodes.told(InodeNo(attr.ino), left, left);
                Some((attr, left))
            }
            _ => entry.attr.map(|attr| (self.client.listed(attr), Duration::ZERO)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_left_when_the_position_is_elsewhere_or_behind_it() {
        let entry = |cookie| DirEntry { cookie, ..DirEntry::default() };
        let mut page =
            Page { entries: vec![entry(10), entry(20), entry(30)], after: 5, position: 5, ..Page::default() };
        assert!(page.seek(5) && page.next == 0);
        assert!(page.seek(20) && page.next == 2 && page.position == 20);
        assert!(page.seek(20) && page.next == 2);
        assert!(!page.seek(30), "what follows is in the next page");
        assert!(!page.seek(15), "no such entry here");
        page.end = true;
        assert!(page.seek(30) && page.next == 3);
    }
}
