//! Which chunk bytes a file's bytes are: committed slices as the master told them, changed by this client's own commits.

use dfs_proto::InodeNo;
use dfs_proto::limits::{ATTR_TTL_MS, LAYOUT_SLICES_MAX};
use dfs_proto::v1::{CommitSlice, Layout, Slice};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Inodes whose slices are kept.
const INODES: usize = 16_384;
/// Slices kept for all inodes together.
const SLICES: usize = 1 << 20;
/// Slices kept for one inode; beyond, its oldest window is dropped.
const SLICES_EACH: usize = 16 * LAYOUT_SLICES_MAX as usize;
/// An answer is handled this soon after it was given: the session's stream keeps answers in order.
const QUIET: Duration = Duration::from_secs(5);
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
    /// Believed until then.
    until: Duration,
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
    changes: Vec<Change>,
}

/// The last change of the inodes that share a counter.
#[derive(Clone, Copy, Default)]
struct Change {
    count: u64,
    at: Duration,
    /// The inode's version after it, if the master told.
    after: Option<(InodeNo, u64)>,
}

/// The layout cache. Without leases an answer is believed for `ATTR_TTL_MS`.
pub struct Layouts(Mutex<Inner>);

/// The state of an inode's layout when a question was asked: an answer that a change has overtaken is not kept.
#[derive(Clone, Copy, Debug)]
pub struct Asked(u64);

impl Default for Layouts {
    fn default() -> Self {
        let most = NonZeroUsize::MIN.saturating_add(INODES - 1);
        let inner =
            Inner { known: lru::LruCache::new(most), slices: 0, changes: vec![Change::default(); CHANGES] };
        Self(Mutex::new(inner))
    }
}

impl Inner {
    fn change(&mut self, ino: InodeNo) -> &mut Change {
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
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What stands in `[from, to)`, if that is known of the inode's `version` or a later one. An earlier one's layout
    /// would show holes where the file has grown since.
    #[must_use]
    pub fn get(&self, ino: InodeNo, from: u64, to: u64, version: u64, now: Duration) -> Option<Vec<Segment>> {
        let mut inner = self.lock();
        let known = inner.known.get(&ino)?;
        let believed = now < known.until && known.version >= version;
        (believed && known.from <= from && to <= known.to).then(|| known.segments(from, to))
    }

    /// To be called before the master is asked.
    #[must_use]
    pub fn asking(&self, ino: InodeNo) -> Asked {
        Asked(self.lock().change(ino).count)
    }

    /// Keeps an answer about `[from, to)`, unless the layout has changed since it was asked for.
    pub fn learn(&self, ino: InodeNo, layout: &Layout, from: u64, to: u64, asked: Asked, now: Duration) {
        let mut inner = self.lock();
        if to <= from || inner.change(ino).count != asked.0 {
            return;
        }
        let slices = layout.slices.iter().map(|slice| (slice.file_offset, *slice)).collect();
        let version = version_of(layout);
        let until = now + Duration::from_millis(ATTR_TTL_MS);
        let mut known = Known { slices, from, to, until, version };
        if let Some(mut old) = inner.remove(ino)
            && now < old.until
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
            known =
                Known { slices: old.slices, from: old.from, to: to.max(old.to), until: old.until, version };
        }
        inner.insert(ino, known);
    }

    /// Keeps an answer about the file from its beginning that came with something else, if it is newer than what is known
    /// and cannot be older than the last change.
    pub fn learn_unasked(&self, ino: InodeNo, layout: &Layout, now: Duration) {
        let asked = {
            let mut inner = self.lock();
            let change = *inner.change(ino);
            let version = version_of(layout);
            let newer = change.after.is_some_and(|(of, after)| of == ino && version >= after);
            let quiet = change.count == 0 || now.saturating_sub(change.at) > QUIET;
            let known = inner.known.peek(&ino).filter(|known| now < known.until);
            if known.is_some_and(|known| known.version >= version) {
                return;
            }
            inner.remove(ino);
            if !(newer || quiet) {
                return;
            }
            Asked(change.count)
        };
        self.learn(ino, layout, 0, layout.complete_to, asked, now);
    }

    /// This client has committed slices; `version`: the inode's after it.
    pub fn committed(&self, ino: InodeNo, slices: &[CommitSlice], version: Option<u64>, now: Duration) {
        let mut inner = self.lock();
        let change = inner.change(ino);
        *change = Change { count: change.count + 1, at: now, after: version.map(|version| (ino, version)) };
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

    /// Something else has changed the layout, or may have.
    pub fn forget(&self, ino: InodeNo, now: Duration) {
        let mut inner = self.lock();
        let change = inner.change(ino);
        *change = Change { count: change.count + 1, at: now, after: None };
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
    use proptest::prelude::*;

    fn slice(file_offset: u64, chunk: u64, chunk_offset: u64, length: u64) -> Slice {
        Slice { file_offset, chunk, chunk_offset, length }
    }

    const INO: InodeNo = InodeNo(5);
    const NOW: Duration = Duration::from_secs(10);

    #[test]
    fn holes_lie_between_slices_and_an_overtaken_answer_is_not_kept() {
        let layouts = Layouts::default();
        let layout = Layout { slices: vec![slice(10, 1, 0, 10), slice(30, 2, 5, 10)], ..Layout::default() };
        let asked = layouts.asking(INO);
        layouts.committed(INO, &[], None, NOW);
        layouts.learn(INO, &layout, 0, 100, asked, NOW);
        assert_eq!(layouts.get(INO, 0, 100, 0, NOW), None);
        layouts.learn(INO, &layout, 0, 100, layouts.asking(INO), NOW);
        let seen: Vec<_> = layouts
            .get(INO, 5, 50, 0, NOW)
            .unwrap()
            .iter()
            .map(|s| (s.offset, s.length, s.slice.map(|slice| slice.chunk)))
            .collect();
        assert_eq!(
            seen,
            [(5, 5, None), (10, 10, Some(1)), (20, 10, None), (30, 10, Some(2)), (40, 10, None)]
        );
        assert_eq!(layouts.get(INO, 0, 101, 0, NOW), None);
        assert_eq!(layouts.get(INO, 0, 100, 0, NOW + Duration::from_millis(ATTR_TTL_MS)), None);
    }

    #[test]
    fn an_answer_that_may_be_older_than_the_last_commit_is_not_kept() {
        let layouts = Layouts::default();
        let layout = |version| Layout {
            complete_to: 10,
            attr: Some(dfs_proto::v1::Attr { version, ..Default::default() }),
            ..Layout::default()
        };
        layouts.committed(INO, &[], Some(7), NOW);
        layouts.learn_unasked(INO, &layout(6), NOW);
        assert_eq!(layouts.get(INO, 0, 5, 0, NOW), None);
        layouts.learn_unasked(INO, &layout(7), NOW);
        assert!(layouts.get(INO, 0, 5, 0, NOW).is_some());
        layouts.forget(INO, NOW);
        layouts.learn_unasked(INO, &layout(9), NOW);
        assert_eq!(layouts.get(INO, 0, 5, 0, NOW), None);
        layouts.learn_unasked(INO, &layout(9), NOW + QUIET * 2);
        assert!(layouts.get(INO, 0, 5, 0, NOW + QUIET * 2).is_some());
    }

    #[test]
    fn an_open_brings_what_somebody_else_wrote_since() {
        let layouts = Layouts::default();
        let layout = |version, chunk| Layout {
            slices: vec![slice(0, chunk, 0, 10)],
            complete_to: 10,
            attr: Some(dfs_proto::v1::Attr { version, ..Default::default() }),
            ..Layout::default()
        };
        let chunk = || layouts.get(INO, 0, 10, 0, NOW).unwrap()[0].slice.unwrap().chunk;
        layouts.learn_unasked(INO, &layout(7, 1), NOW);
        layouts.learn_unasked(INO, &layout(8, 2), NOW);
        assert_eq!(chunk(), 2);
        layouts.learn_unasked(INO, &layout(7, 1), NOW);
        assert_eq!(chunk(), 2, "never back");
        let commit = |chunk| CommitSlice { chunk, length: 10, ..CommitSlice::default() };
        layouts.committed(INO, &[commit(3)], Some(9), NOW);
        layouts.learn_unasked(INO, &layout(9, 4), NOW);
        assert_eq!(chunk(), 3, "nobody else changed it");
        layouts.learn_unasked(INO, &layout(10, 5), NOW);
        assert_eq!(chunk(), 5);
        // Attributes of a later version say how long the file is: this layout would show a hole there.
        assert!(layouts.get(INO, 0, 10, 10, NOW).is_some() && layouts.get(INO, 0, 10, 11, NOW).is_none());
        // Newer, but perhaps older than a change of this client: neither is believed.
        layouts.committed(INO, &[commit(6)], None, NOW);
        layouts.learn_unasked(INO, &layout(12, 7), NOW);
        assert_eq!(layouts.get(INO, 0, 10, 0, NOW), None);
    }

    #[test]
    fn windows_that_touch_become_one() {
        let layouts = Layouts::default();
        let first = Layout { slices: vec![slice(0, 1, 0, 50)], ..Layout::default() };
        let second = Layout { slices: vec![slice(0, 1, 0, 50), slice(50, 2, 0, 50)], ..Layout::default() };
        layouts.learn(INO, &first, 0, 50, layouts.asking(INO), NOW);
        layouts.learn(INO, &second, 50, 100, layouts.asking(INO), NOW);
        assert_eq!(layouts.get(INO, 0, 100, 0, NOW).unwrap().len(), 2);
    }

    proptest! {
        #[test]
        fn own_commits_show_at_once(commits in proptest::collection::vec((0_u64..100, 1_u64..40, 1_u64..5), 1..20)) {
            let layouts = Layouts::default();
            layouts.learn(INO, &Layout::default(), 0, 200, layouts.asking(INO), NOW);
            let mut model: Vec<Option<(u64, u64)>> = vec![None; 200];
            for (nth, (offset, length, chunk)) in commits.into_iter().enumerate() {
                let at = nth as u64 * 1000;
                layouts.committed(INO, &[CommitSlice { file_offset: offset, chunk, chunk_offset: at, length, ..CommitSlice::default() }], None, NOW);
                for byte in 0..length { model[(offset + byte) as usize] = Some((chunk, at + byte)); }
            }
            let mut seen: Vec<Option<(u64, u64)>> = Vec::new();
            for segment in layouts.get(INO, 0, 200, 0, NOW).unwrap() {
                prop_assert_eq!(segment.offset, seen.len() as u64);
                for byte in 0..segment.length {
                    seen.push(segment.slice.map(|s| (s.chunk, s.chunk_offset + segment.offset - s.file_offset + byte)));
                }
            }
            prop_assert_eq!(seen, model);
        }
    }
}
