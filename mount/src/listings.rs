//! What the kernel may have cached of directories' entries (FOPEN_CACHE_DIR).
//!
//! The kernel keeps entries after it has got them, and nothing says when it does: a reader that is slow to take an answer in adds
//! entries that are older than what others were told meanwhile. But by its next request for the same handle it has taken them
//! in. So a directory's entries are kept over an open only if everything that is in that cache, and everything that may still
//! come into it, is of one *edition*: the same lease, and no change by this client in between.
//!
//! ```text
//!              opened in this edition,                 first read: the kernel             an answer of another edition,
//!   nothing ── all answers before taken in ──▶ filling ── has dropped what it had ──▶ good ── or a recall ──────────────▶ nothing
//!                    Mode::Fill                                                   Mode::Keep
//! ```
//!
//! A handle that was open before a change may show what was there when it was opened, as POSIX has it, until it is rewound. A
//! rewound one is shown the cache if the directory's times are the same and this kernel has changed nothing. So what goes into the
//! cache is answered under a lease that is held at that moment (`fuse/dirs.rs`), and its recall has the cache dropped.

use dfs_client::Edition;
use dfs_proto::InodeNo;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Directories of which something is known; those that hold nobody up go when there are more.
const MOST: usize = 65_536;

/// How a directory's handle uses the kernel's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// Not at all.
    #[default]
    Off,
    /// The kernel drops what it has, and keeps what it reads.
    Fill,
    /// It also uses what it has.
    Keep,
}

/// A handle's part.
#[derive(Debug, Default)]
pub struct Reader {
    mode: Mode,
    /// The filling that it began or joined.
    filling: u64,
    /// It was answered, and the kernel may not have taken that in yet.
    unsettled: bool,
}

#[derive(Default)]
struct Cached {
    /// Of what edition everything in the kernel's cache is; none: of several, or nobody knows.
    edition: Option<Edition>,
    /// Names the time that `edition` was set.
    filling: u64,
    /// What was there before `edition` is gone.
    good: bool,
    /// Until when the kernel believes the names in it, in seconds since the mount.
    believed: u32,
    /// Handles that are unsettled.
    unsettled: usize,
}

/// All directories.
#[derive(Default)]
pub struct Listings {
    dirs: Mutex<HashMap<InodeNo, Cached>>,
    fillings: AtomicU64,
}

impl Reader {
    /// Whether what it is answered may come into the kernel's cache.
    #[must_use]
    pub fn caches(&self) -> bool {
        self.mode != Mode::Off
    }
}

impl Listings {
    fn lock(&self) -> MutexGuard<'_, HashMap<InodeNo, Cached>> {
        // Every change is a single step: a poisoned map is whole.
        self.dirs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A directory is opened while this is its edition; `now` in seconds since the mount.
    pub fn open(&self, dir: InodeNo, edition: Option<Edition>, now: u32) -> (Reader, Mode) {
        let Some(edition) = edition else { return Default::default() };
        let mut all = self.lock();
        if all.len() >= MOST {
            all.retain(|_, cached| cached.unsettled > 0);
        }
        let cached = all.entry(dir).or_default();
        let mode = match cached.edition == Some(edition) {
            true if cached.good && cached.believed > now + 1 => Mode::Keep,
            true => Mode::Fill,
            false if cached.unsettled == 0 => {
                (cached.edition, cached.good) = (Some(edition), false);
                // Never again for another time, also when the entry is made anew.
                cached.filling = self.fillings.fetch_add(1, Ordering::Relaxed) + 1;
                Mode::Fill
            }
            false => Mode::Off,
        };
        (Reader { mode, filling: cached.filling, unsettled: false }, mode)
    }

    /// A handle asks for more: what it was answered before is taken in, and what it had the kernel drop is gone.
    pub fn reads(&self, dir: InodeNo, reader: &mut Reader) {
        let mut all = self.lock();
        let Some(cached) = all.get_mut(&dir) else { return };
        settle(cached, reader);
        if reader.mode == Mode::Fill && cached.edition.is_some() && cached.filling == reader.filling {
            cached.good = true;
        }
    }

    /// A handle is about to be answered with entries of this edition.
    pub fn answers(&self, dir: InodeNo, reader: &mut Reader, edition: Option<Edition>) {
        if reader.mode == Mode::Off {
            return;
        }
        let mut all = self.lock();
        let cached = all.entry(dir).or_default();
        if cached.edition != edition {
            (cached.edition, cached.good) = (None, false);
        }
        if !std::mem::replace(&mut reader.unsettled, true) {
            cached.unsettled += 1;
        }
    }

    /// The kernel believes the names of the entries until then.
    pub fn believes(&self, dir: InodeNo, until: u32) {
        if let Some(cached) = self.lock().get_mut(&dir) {
            cached.believed = until;
        }
    }

    /// A handle is closed, or was not answered after all.
    pub fn closes(&self, dir: InodeNo, reader: &mut Reader) {
        if let Some(cached) = self.lock().get_mut(&dir) {
            settle(cached, reader);
        }
    }

    /// The kernel is about to drop what it has of a directory. False: it has nothing.
    pub fn dropped(&self, dir: InodeNo) -> bool {
        let mut all = self.lock();
        let Some(cached) = all.get_mut(&dir) else { return false };
        (cached.edition, cached.good) = (None, false);
        if cached.unsettled == 0 {
            all.remove(&dir);
        }
        true
    }
}

fn settle(cached: &mut Cached, reader: &mut Reader) {
    if std::mem::take(&mut reader.unsettled) {
        cached.unsettled -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfs_client::leases::Term;

    const DIR: InodeNo = InodeNo(7);

    fn edition(term: u64, changes: u64) -> Option<Edition> {
        Some(Edition { term: Term::new(term), changes })
    }

    /// Opens, reads everything and closes.
    fn list(all: &Listings, now: Option<Edition>) -> Mode {
        let (mut reader, mode) = all.open(DIR, now, 0);
        for _ in 0..2 {
            all.reads(DIR, &mut reader);
            all.answers(DIR, &mut reader, now);
        }
        all.believes(DIR, 18);
        all.closes(DIR, &mut reader);
        mode
    }

    #[test]
    fn entries_are_kept_while_their_edition_lasts_and_the_names_are_believed() {
        let (all, one) = (Listings::default(), edition(1, 1));
        assert_eq!([list(&all, one), list(&all, one)], [Mode::Fill, Mode::Keep]);
        assert_eq!(all.open(DIR, one, 17).1, Mode::Fill, "the names are to be told anew");
        assert_eq!(all.open(DIR, None, 0).1, Mode::Off);
        for next in [edition(1, 2), edition(2, 2)] {
            assert_eq!([list(&all, next), list(&all, next)], [Mode::Fill, Mode::Keep]);
        }
        assert!(all.dropped(DIR) && !all.dropped(DIR));
        assert_eq!(list(&all, edition(2, 2)), Mode::Fill);
    }

    #[test]
    fn an_answer_that_may_be_taken_in_late_keeps_the_next_edition_out() {
        let (all, one, two) = (Listings::default(), edition(1, 1), edition(1, 2));
        let (mut slow, _) = all.open(DIR, one, 0);
        all.reads(DIR, &mut slow);
        all.answers(DIR, &mut slow, one);
        assert_eq!([list(&all, two), list(&all, two)], [Mode::Off, Mode::Off]);
        all.dropped(DIR);
        assert_eq!(list(&all, two), Mode::Off, "a recall does not make it take the answer in");
        all.closes(DIR, &mut slow);
        assert_eq!([list(&all, two), list(&all, two)], [Mode::Fill, Mode::Keep]);
    }

    #[test]
    fn what_was_there_before_is_not_kept_before_the_kernel_has_dropped_it() {
        let (all, one, two) = (Listings::default(), edition(1, 1), edition(1, 2));
        list(&all, one);
        let (mut first, mode) = all.open(DIR, two, 0);
        assert_eq!((mode, all.open(DIR, two, 0).1), (Mode::Fill, Mode::Fill));
        all.reads(DIR, &mut first);
        all.believes(DIR, 18);
        assert_eq!(all.open(DIR, two, 0).1, Mode::Keep);
    }

    #[test]
    fn entries_of_several_editions_are_not_kept() {
        let (all, one, two) = (Listings::default(), edition(1, 1), edition(1, 2));
        let (mut reader, _) = all.open(DIR, one, 0);
        all.reads(DIR, &mut reader);
        all.answers(DIR, &mut reader, two);
        all.reads(DIR, &mut reader);
        assert_eq!(all.open(DIR, two, 0).1, Mode::Fill);
        // That handle's purge says nothing of what came after.
        let (mut early, _) = all.open(DIR, two, 0);
        all.answers(DIR, &mut reader, one);
        all.reads(DIR, &mut reader);
        assert_eq!(all.open(DIR, two, 0).1, Mode::Fill);
        all.reads(DIR, &mut early);
        all.believes(DIR, 18);
        assert_eq!(all.open(DIR, two, 0).1, Mode::Fill, "it dropped what was there before the mixture");
    }
}
