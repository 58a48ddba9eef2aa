//! Which chunk bytes a file's bytes are: committed slices as the master told them, changed by this client's own commits.

use crate::leases::{Leases, Term};
use dfs_proto::InodeNo;
use dfs_proto::limits::LAYOUT_SLICES_MAX;
use dfs_proto::v1::{CommitSlice, Layout, Slice};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Inodes whose slices are kept.
const INODES: usize = 16_384;
/// Slices kept for all inodes together.
const SLICES: usize = 1 << 20;
/// Slices kept for one inode; beyond, its oldest window is dropped.
const SLICES_EACH: usize = 16 * LAYOUT_SLICES_MAX as usize;
/// Counters of changes: inodes share them by number.
const CHANGES: usize = 1024;

/// What stands in a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins in the file, and how long it is.
    pub offset: u64,
    pub length: u64,
    /// The slice that it is part of; none: a hole.
    pub slice: Option<Slice>,
}

/// The slices of one inode within a window of its file. They never overlap.
struct Known {
    slices: BTreeMap<u64, Slice>,
    from: u64,
    to: u64,
    /// Under which lease it is believed; none: for as long as it is kept.
    term: Option<Term>,
    /// The inode's version of which all of it was true; 0: not told.
    version: u64,
}

impl Known {
    fn punch(&mut self, from: u64, to: u64) {
        let before = self.slices.range(..from).next_back().map(|(_, slice)| *slice);
        if let Some(slice) = before
            && slice.file_offset + slice.length > from
        {
            self.slices.insert(slice.file_offset, Slice { length: from - slice.file_offset, ..slice });
            self.insert_tail(slice, to);
        }
        while let Some((&start, &slice)) = self.slices.range(from..to).next() {
            self.slices.remove(&start);
            self.insert_tail(slice, to);
        }
    }

    fn insert_tail(&mut self, slice: Slice, from: u64) {
        if slice.file_offset + slice.length > from {
            let skip = from - slice.file_offset;
            self.slices.insert(
                from,
                Slice {
                    file_offset: from,
                    chunk: slice.chunk,
                    chunk_offset: slice.chunk_offset + skip,
                    length: slice.length - skip,
                },
            );
        }
    }

    fn segments(&self, from: u64, to: u64) -> Vec<Segment> {
        let mut segments = Vec::new();
        let mut at = from;
        let before = self.slices.range(..=from).next_back().map(|(start, _)| *start).unwrap_or(from);
        for slice in self.slices.range(before..to).map(|(_, slice)| slice) {
            let end = slice.file_offset + slice.length;
            if end <= at {
                continue;
            }
            if slice.file_offset > at {
                segments.push(Segment { offset: at, length: slice.file_offset - at, slice: None });
                at = slice.file_offset;
            }
            let length = end.min(to) - at;
            segments.push(Segment { offset: at, length, slice: Some(*slice) });
            at += length;
        }
        if at < to {
            segments.push(Segment { offset: at, length: to - at, slice: None });
        }
        segments
    }
}

struct Inner {
    known: lru::LruCache<InodeNo, Known>,
    slices: usize,
    /// How often the layouts of inodes that share a counter were changed.
    changes: Vec<u64>,
}

/// The layout cache.
pub struct Layouts {
    inner: Mutex<Inner>,
    /// What is learned is believed under these; none: it serves one reader, who has just asked.
    leases: Option<Arc<Leases>>,
}

/// The state of an inode's layout when a question was asked: an answer that a change has overtaken is not kept.
#[derive(Clone, Copy, Debug)]
pub struct Asked(u64);

impl Inner {
    fn change(&mut self, ino: InodeNo) -> &mut u64 {
        let at = usize::try_from(ino.get() % CHANGES as u64).expect("below CHANGES");
        &mut self.changes[at]
    }

    fn remove(&mut self, ino: InodeNo) -> Option<Known> {
        let known = self.known.pop(&ino)?;
        self.slices -= known.slices.len();
        Some(known)
    }

    fn insert(&mut self, ino: InodeNo, known: Known) {
        self.slices += known.slices.len();
        if let Some((_, old)) = self.known.push(ino, known) {
            self.slices -= old.slices.len();
        }
        while self.slices > SLICES
            && let Some((_, old)) = self.known.pop_lru()
        {
            self.slices -= old.slices.len();
        }
    }
}

impl Layouts {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(leases: Option<Arc<Leases>>) -> Self {
        let most = NonZeroUsize::MIN.saturating_add(INODES - 1);
        let inner = Inner { known: lru::LruCache::new(most), slices: 0, changes: vec![0; CHANGES] };
        Self { inner: Mutex::new(inner), leases }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands in `[from, to)`, if that is known of this version of the inode (0: of any). An earlier one's layout would
    /// show holes where the file has grown since, a later one's where it was cut.
    #[must_use]
    pub fn get(&self, ino: InodeNo, from: u64, to: u64, version: u64) -> Option<Vec<Segment>> {
        let mut inner = self.lock();
        let known = inner.known.get(&ino)?;
        let same = version == 0 || known.version == version;
        let believed = self.is_current(ino, known.term) && same;
        (believed && known.from <= from && to <= known.to).then(|| known.segments(from, to))
    }

    /// To be called before the master is asked.
    #[must_use]
    pub fn asking(&self, ino: InodeNo) -> Asked {
        Asked(*self.lock().change(ino))
    }

    fn is_current(&self, ino: InodeNo, term: Option<Term>) -> bool {
        match (&self.leases, term) {
            (Some(leases), Some(term)) => leases.is_current(ino, term),
            (Some(_), None) => false,
            (None, _) => true,
        }
    }

    /// Keeps an answer about `[from, to)`, unless the layout has changed since it was asked for, or there is no lease to
    /// believe it under.
    pub fn learn(&self, ino: InodeNo, layout: &Layout, from: u64, to: u64, asked: Asked) {
        // Looked at first: a lease that began later began after what overtakes the question.
        let term = self.leases.as_ref().and_then(|leases| leases.term(ino));
        let mut inner = self.lock();
        if to <= from || *inner.change(ino) != asked.0 || !self.is_current(ino, term) {
            return;
        }
        let slices = layout.slices.iter().map(|slice| (slice.file_offset, *slice)).collect();
        let version = version_of(layout);
        let mut known = Known { slices, from, to, term, version };
        if let Some(mut old) = inner.remove(ino)
            && old.term == term
            && old.from <= from
            && from <= old.to
            && old.slices.len() < SLICES_EACH
        {
            // The window grows; it is as old as its oldest part.
            let beyond = old.slices.split_off(&to);
            old.slices.split_off(&from);
            old.slices.append(&mut known.slices);
            if old.to > to {
                old.slices.extend(beyond);
            }
            let version = version.min(old.version);
            known = Known { slices: old.slices, from: old.from, to: to.max(old.to), term, version };
        }
        inner.insert(ino, known);
    }

    /// This client has committed slices; `version`: the inode's after it.
    pub fn committed(&self, ino: InodeNo, slices: &[CommitSlice], version: Option<u64>) {
        let mut inner = self.lock();
        *inner.change(ino) += 1;
        let Some(mut known) = inner.remove(ino) else { return };
        if version == Some(known.version + 1) {
            known.version += 1;
        }
        for slice in slices {
            known.punch(slice.file_offset, slice.file_offset + slice.length);
            known.slices.insert(
                slice.file_offset,
                Slice {
                    file_offset: slice.file_offset,
                    chunk: slice.chunk,
                    chunk_offset: slice.chunk_offset,
                    length: slice.length,
                },
            );
        }
        inner.insert(ino, known);
    }

    /// Something else has changed the layout, or may, because the lease is given up.
    pub fn forget(&self, ino: InodeNo) {
        let mut inner = self.lock();
        *inner.change(ino) += 1;
        inner.remove(ino);
    }
}

/// The inode's version that an answer tells of; 0: it does not say.
fn version_of(layout: &Layout) -> u64 {
    layout.attr.as_ref().map_or(0, |attr| attr.version)
}

/// Up to where an answer to a question about `[from, to)` is complete.
#[must_use]
pub fn complete_to(layout: &Layout, from: u64, to: u64) -> u64 {
    // Fewer slices than were asked for: there are no more, whatever the answer says.
    if layout.complete_to <= from && layout.slices.len() < LAYOUT_SLICES_MAX as usize {
        return to;
    }
    layout.complete_to.min(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leases::Kind;
    use crate::leases::testing::{SEEN, leases};
    use proptest::prelude::*;

    fn slice(file_offset: u64, chunk: u64, chunk_offset: u64, length: u64) -> Slice {
        Slice { file_offset, chunk, chunk_offset, length }
    }

    const INO: InodeNo = InodeNo(5);

    fn layouts() -> (Layouts, Arc<Leases>) {
        let (leases, _) = leases();
        leases.granted(INO, Kind::Read, 1, SEEN);
        (Layouts::new(Some(Arc::clone(&leases))), leases)
    }

    #[test]
    fn holes_lie_between_slices_and_an_overtaken_answer_is_not_kept() {
        let (layouts, leases) = layouts();
        let layout = Layout { slices: vec![slice(10, 1, 0, 10), slice(30, 2, 5, 10)], ..Layout::default() };
        let asked = layouts.asking(INO);
        layouts.committed(INO, &[], None);
        layouts.learn(INO, &layout, 0, 100, asked);
        assert_eq!(layouts.get(INO, 0, 100, 0), None);
        layouts.learn(INO, &layout, 0, 100, layouts.asking(INO));
        let seen: Vec<_> = layouts
            .get(INO, 5, 50, 0)
            .unwrap()
            .iter()
            .map(|s| (s.offset, s.length, s.slice.map(|slice| slice.chunk)))
            .collect();
        assert_eq!(
            seen,
            [(5, 5, None), (10, 10, Some(1)), (20, 10, None), (30, 10, Some(2)), (40, 10, None)]
        );
        assert_eq!(layouts.get(INO, 0, 101, 0), None);
        // Attributes of a later version say how long the file is: this layout would show a hole there.
        assert_eq!(layouts.get(INO, 0, 100, 1), None);
        let asked = layouts.asking(INO);
        assert!(leases.recalled(INO, 1, None).is_ok());
        assert_eq!(layouts.get(INO, 0, 100, 0), None);
        layouts.learn(INO, &layout, 0, 100, layouts.asking(INO));
        layouts.forget(INO);
        assert_eq!(leases.left_behind(INO, None, || true), Ok(Some(1)));
        leases.granted(INO, Kind::Read, 2, SEEN);
        layouts.learn(INO, &layout, 0, 100, asked);
        assert_eq!(layouts.get(INO, 0, 100, 0), None, "asked for under another lease");
        layouts.learn(INO, &layout, 0, 100, layouts.asking(INO));
        assert!(layouts.get(INO, 0, 100, 0).is_some());
        let private = Layouts::new(None);
        private.learn(INO, &layout, 0, 100, private.asking(INO));
        assert!(private.get(INO, 0, 100, 0).is_some());
    }

    #[test]
    fn windows_that_touch_become_one() {
        let (layouts, _) = layouts();
        let first = Layout { slices: vec![slice(0, 1, 0, 50)], ..Layout::default() };
        let second = Layout { slices: vec![slice(0, 1, 0, 50), slice(50, 2, 0, 50)], ..Layout::default() };
        layouts.learn(INO, &first, 0, 50, layouts.asking(INO));
        layouts.learn(INO, &second, 50, 100, layouts.asking(INO));
        assert_eq!(layouts.get(INO, 0, 100, 0).unwrap().len(), 2);
    }

    proptest! {
        #[test]
        fn own_commits_show_at_once(commits in proptest::collection::vec((0_u64..100, 1_u64..40, 1_u64..5), 1..20)) {
            let (layouts, _) = layouts();
            layouts.learn(INO, &Layout::default(), 0, 200, layouts.asking(INO));
            let mut model: Vec<Option<(u64, u64)>> = vec![None; 200];
            for (nth, (offset, length, chunk)) in commits.into_iter().enumerate() {
                let at = nth as u64 * 1000;
                layouts.committed(INO, &[CommitSlice { file_offset: offset, chunk, chunk_offset: at, length, ..CommitSlice::default() }], None);
                for byte in 0..length { model[(offset + byte) as usize] = Some((chunk, at + byte)); }
            }
            let mut seen: Vec<Option<(u64, u64)>> = Vec::new();
            for segment in layouts.get(INO, 0, 200, 0).unwrap() {
                prop_assert_eq!(segment.offset, seen.len() as u64);
                for byte in 0..segment.length {
                    seen.push(segment.slice.map(|s| (s.chunk, s.chunk_offset + segment.offset - s.file_offset + byte)));
                }
            }
            prop_assert_eq!(seen, model);
        }
    }
}
