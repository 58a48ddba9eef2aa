//! The dirty bytes of one inode: what its file shows beyond what is committed. Pure.

use super::RunNo;
use bytes::Bytes;
use dfs_proto::limits::RECORD_MAX;
use std::collections::BTreeMap;
use std::time::Duration;

/// An unsent piece of this length that still grows gets the memory of a whole record.
const GROWING: usize = 128 << 10;

/// A piece of a file that was cut off to be sent: its bytes never change again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub no: RunNo,
    /// Where it begins in the file.
    pub offset: u64,
    pub bytes: Bytes,
    /// When its oldest byte was written.
    pub since: Duration,
}

#[derive(Debug)]
enum Piece {
    /// Not sent yet: a later write changes it in place.
    Unsent { buffer: Vec<u8>, since: Duration },
    /// Part of a run that is queued or sent.
    Cut { run: RunNo, bytes: Bytes },
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Self::Unsent { buffer, .. } => buffer.len(),
            Self::Cut { bytes, .. } => bytes.len(),
        }
    }

    /// Keeps the first `at` bytes, returns the others.
    fn split_off(&mut self, at: usize) -> Self {
        match self {
            Self::Unsent { buffer, since } => Self::Unsent { buffer: buffer.split_off(at), since: *since },
            Self::Cut { run, bytes } => Self::Cut { run: *run, bytes: bytes.split_off(at) },
        }
    }
}

/// A map from file ranges to dirty bytes. Pieces never overlap and are never empty; an unsent piece is at most
/// `RECORD_MAX` long. A newer write hides older bytes whatever has become of them.
#[derive(Debug, Default)]
pub struct Extents {
    pieces: BTreeMap<u64, Piece>,
    unsent: u64,
    /// Beginnings of unsent pieces that have reached `RECORD_MAX`.
    full: Vec<u64>,
    /// When the oldest unsent byte was written.
    oldest: Option<Duration>,
}

fn index(distance: u64) -> usize {
    usize::try_from(distance).expect("within a piece, so at most RECORD_MAX")
}

impl Extents {
    /// Bytes that are not cut into runs yet.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        self.unsent
    }

    /// When the oldest byte that is not cut yet was written.
    #[must_use]
    pub fn oldest_unsent(&self) -> Option<Duration> {
        self.oldest
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Where the last dirty byte ends.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        self.pieces.last_key_value().map(|(start, piece)| start + piece.len() as u64)
    }

    /// Whether dirty bytes beyond `size` leave out any between there and the last of them.
    #[must_use]
    pub fn has_gap_beyond(&self, size: u64) -> bool {
        let Some(end) = self.end().filter(|end| *end > size) else { return false };
        let first = self
            .pieces
            .range(..size)
            .next_back()
            .map_or(0, |(start, piece)| (start + piece.len() as u64).saturating_sub(size));
        let bytes = first + self.pieces.range(size..).map(|(_, piece)| piece.len() as u64).sum::<u64>();
        bytes < end - size
    }

    /// Writes over whatever is there.
    pub fn write(&mut self, mut offset: u64, mut data: &[u8], now: Duration) {
        if !data.is_empty() {
            self.oldest = Some(self.oldest.map_or(now, |oldest| oldest.min(now)));
        }
        while !data.is_empty() {
            let taken = self.write_some(offset, data, now);
            offset += taken as u64;
            data = &data[taken..];
        }
    }

    fn write_some(&mut self, offset: u64, data: &[u8], now: Duration) -> usize {
        let mut grow = None;
        if let Some((&start, Piece::Unsent { buffer, .. })) = self.pieces.range_mut(..=offset).next_back()
            && offset - start <= buffer.len() as u64
        {
            let at = index(offset - start);
            let inside = data.len().min(buffer.len() - at);
            if inside > 0 {
                buffer[at..at + inside].copy_from_slice(&data[..inside]);
                return inside;
            }
            grow = (buffer.len() < RECORD_MAX).then_some((start, data.len().min(RECORD_MAX - buffer.len())));
        }
        let taken = grow.map_or(data.len().min(RECORD_MAX), |(_, room)| room);
        self.clear(offset, offset + taken as u64);
        let start = grow.map_or(offset, |(start, _)| start);
        let piece = self
            .pieces
            .entry(start)
            .or_insert_with(|| Piece::Unsent { buffer: Vec::with_capacity(taken), since: now });
        if let Piece::Unsent { buffer, .. } = piece {
            if buffer.len() >= GROWING {
                // It will most likely become a full record: one copy instead of three.
                buffer.reserve_exact(RECORD_MAX - buffer.len());
            }
            buffer.extend_from_slice(&data[..taken]);
            if buffer.len() == RECORD_MAX {
                self.full.push(start);
            }
        }
        self.unsent += taken as u64;
        taken
    }

    /// Forgets the bytes of a range, so that pieces on both of its sides stay.
    fn clear(&mut self, from: u64, to: u64) {
        if let Some((&start, piece)) = self.pieces.range_mut(..from).next_back()
            && start + piece.len() as u64 > from
        {
            let tail = piece.split_off(index(from - start));
            self.drop_front(from, tail, to);
        }
        while let Some((&start, _)) = self.pieces.range(from..to).next() {
            let piece = self.pieces.remove(&start).expect("just found");
            self.drop_front(start, piece, to);
        }
    }

    /// Forgets the part of a piece (already taken out of the map) that lies below `to`; the rest goes back.
    fn drop_front(&mut self, start: u64, mut piece: Piece, to: u64) {
        let end = start + piece.len() as u64;
        if matches!(piece, Piece::Unsent { .. }) {
            self.unsent -= end.min(to) - start;
        }
        if end > to {
            let rest = piece.split_off(index(to - start));
            self.pieces.insert(to, rest);
        }
    }

    /// Cuts the unsent pieces that are as long as a record may be.
    pub fn cut_full(&mut self, next: &mut RunNo) -> Vec<Run> {
        if self.full.is_empty() {
            return Vec::new();
        }
        let mut runs = Vec::new();
        for start in std::mem::take(&mut self.full) {
            let Some(Piece::Unsent { buffer, since }) = self.pieces.get_mut(&start) else { continue };
            if buffer.len() == RECORD_MAX {
                let (buffer, since) = (std::mem::take(buffer), *since);
                runs.push(self.make_run(start, buffer, since, next));
            }
        }
        self.oldest = if self.unsent == 0 {
            None
        } else {
            let unsent = self.pieces.values().filter_map(|piece| match piece {
                Piece::Unsent { since, .. } => Some(*since),
                Piece::Cut { .. } => None,
            });
            unsent.min()
        };
        runs
    }

    /// Cuts everything that is unsent; neighbours become one run as far as a record holds them.
    pub fn cut_all(&mut self, next: &mut RunNo) -> Vec<Run> {
        self.full.clear();
        self.oldest = None;
        if self.unsent == 0 {
            return Vec::new();
        }
        let unsent = self.pieces.iter().filter(|(_, piece)| matches!(piece, Piece::Unsent { .. }));
        let starts: Vec<u64> = unsent.map(|(start, _)| *start).collect();
        let mut runs = Vec::new();
        let mut open: Option<(u64, Vec<u8>, Duration)> = None;
        for start in starts {
            let Some(Piece::Unsent { buffer, since }) = self.pieces.remove(&start) else { continue };
            match &mut open {
                Some((first, whole, oldest))
                    if *first + whole.len() as u64 == start && whole.len() + buffer.len() <= RECORD_MAX =>
                {
                    whole.extend_from_slice(&buffer);
                    *oldest = since.min(*oldest);
                }
                _ => {
                    if let Some((first, whole, oldest)) = open.replace((start, buffer, since)) {
                        runs.push(self.make_run(first, whole, oldest, next));
                    }
                }
            }
        }
        if let Some((first, whole, oldest)) = open {
            runs.push(self.make_run(first, whole, oldest, next));
        }
        runs
    }

    fn make_run(&mut self, offset: u64, buffer: Vec<u8>, since: Duration, next: &mut RunNo) -> Run {
        next.0 += 1;
        let bytes = Bytes::from(buffer);
        self.unsent -= bytes.len() as u64;
        self.pieces.insert(offset, Piece::Cut { run: *next, bytes: bytes.clone() });
        Run { no: *next, offset, bytes, since }
    }

    /// Takes out what is still visible of a run within a range: it is committed, or about to be cut anew.
    pub fn take(&mut self, run: RunNo, from: u64, to: u64) -> Vec<(u64, Bytes)> {
        let mut taken = Vec::new();
        let before = self.pieces.range(..from).next_back();
        let first =
            before.filter(|(start, piece)| **start + piece.len() as u64 > from).map(|(start, _)| *start);
        let starts: Vec<u64> =
            first.into_iter().chain(self.pieces.range(from..to).map(|(start, _)| *start)).collect();
        for start in starts {
            let Some(Piece::Cut { run: of, bytes }) = self.pieces.get(&start) else { continue };
            if *of != run {
                continue;
            }
            let (bytes, end) = (bytes.clone(), start + bytes.len() as u64);
            self.pieces.remove(&start);
            if start < from {
                let bytes = bytes.slice(..index(from - start));
                self.pieces.insert(start, Piece::Cut { run, bytes });
            }
            if end > to {
                let bytes = bytes.slice(index(to - start)..);
                self.pieces.insert(to, Piece::Cut { run, bytes });
            }
            let (low, high) = (start.max(from), end.min(to));
            taken.push((low, bytes.slice(index(low - start)..index(high - start))));
        }
        taken
    }

    /// Cuts anew what is still visible of a run within a range: the record that carried it failed.
    pub fn recut(&mut self, run: RunNo, from: u64, to: u64, since: Duration, next: &mut RunNo) -> Vec<Run> {
        let mut runs = Vec::new();
        for (offset, bytes) in self.take(run, from, to) {
            next.0 += 1;
            self.pieces.insert(offset, Piece::Cut { run: *next, bytes: bytes.clone() });
            runs.push(Run { no: *next, offset, bytes, since });
        }
        runs
    }

    /// The dirty bytes within a range, in order.
    #[must_use]
    pub fn read(&self, offset: u64, len: usize) -> Vec<(u64, Bytes)> {
        let to = offset.saturating_add(len as u64);
        let before = self.pieces.range(..offset).next_back();
        before
            .into_iter()
            .chain(self.pieces.range(offset..to))
            .filter_map(|(&start, piece)| {
                let (low, high) = (start.max(offset), (start + piece.len() as u64).min(to));
                if low >= high {
                    return None;
                }
                let part = index(low - start)..index(high - start);
                let bytes = match piece {
                    Piece::Unsent { buffer, .. } => Bytes::copy_from_slice(&buffer[part]),
                    Piece::Cut { bytes, .. } => bytes.slice(part),
                };
                Some((low, bytes))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Op {
        Write {
            offset: u64,
            len: usize,
            byte: u8,
        },
        CutAll,
        CutFull,
        /// What the nth oldest run's middle part had is committed.
        Settle(usize),
        /// The nth oldest run's first half failed.
        Recut(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (0_u64..3_000_000, prop_oneof![4 => 1_usize..5000, 1 => Just(RECORD_MAX), 1 => 1_usize..2_500_000], any::<u8>())
                .prop_map(|(offset, len, byte)| Op::Write { offset, len, byte }),
            1 => Just(Op::CutAll),
            2 => Just(Op::CutFull),
            1 => (0_usize..8).prop_map(Op::Settle),
            1 => (0_usize..8).prop_map(Op::Recut),
        ]
    }

    const SPACE: usize = 5_600_000;

    /// What a file shows: bytes, and which of them are dirty.
    struct Model {
        bytes: Vec<u8>,
        dirty: Vec<u8>,
    }

    fn check(extents: &Extents, model: &Model) {
        // Whole slices are copied and compared: byte by byte this would take minutes.
        let mut shown = Model { bytes: vec![0; SPACE], dirty: vec![0; SPACE] };
        let mut last = 0;
        for (offset, bytes) in extents.read(0, SPACE) {
            assert!(offset >= last && !bytes.is_empty());
            last = offset + bytes.len() as u64;
            let range = offset as usize..last as usize;
            shown.bytes[range.clone()].copy_from_slice(&bytes);
            shown.dirty[range].fill(1);
        }
        assert!(shown.bytes == model.bytes && shown.dirty == model.dirty, "the map and the array differ");
        let end = extents.end().map_or(0, |end| end as usize);
        assert!(end == 0 || model.dirty[end - 1] == 1);
        assert!(model.dirty[end..] == vec![0; SPACE - end]);
        let unsent: u64 = extents
            .pieces
            .values()
            .map(|piece| if matches!(piece, Piece::Unsent { .. }) { piece.len() as u64 } else { 0 })
            .sum();
        assert_eq!(extents.unsent(), unsent);
        assert_eq!(extents.oldest_unsent().is_some(), unsent > 0 || extents.oldest.is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn shows_what_a_byte_array_shows(ops in proptest::collection::vec(op(), 1..24)) {
            let mut extents = Extents::default();
            let mut model = Model { bytes: vec![0; SPACE], dirty: vec![0; SPACE] };
            // Whose byte each is: the number of the run, or none.
            let mut owner: Vec<RunNo> = vec![RunNo(0); SPACE];
            let (mut runs, mut next): (Vec<Run>, RunNo) = (Vec::new(), RunNo(0));
            for op in ops {
                match op {
                    Op::Write { offset, len, byte } => {
                        let data: Vec<u8> = (byte..=255).chain(0..byte).cycle().take(len).collect();
                        extents.write(offset, &data, Duration::ZERO);
                        let range = offset as usize..offset as usize + len;
                        model.bytes[range.clone()].copy_from_slice(&data);
                        model.dirty[range.clone()].fill(1);
                        owner[range].fill(RunNo(0));
                    }
                    Op::CutAll | Op::CutFull => {
                        let cut = if matches!(op, Op::CutAll) { extents.cut_all(&mut next) } else { extents.cut_full(&mut next) };
                        for run in &cut {
                            prop_assert!(run.bytes.len() <= RECORD_MAX);
                            let range = run.offset as usize..run.offset as usize + run.bytes.len();
                            prop_assert!(model.bytes[range.clone()] == run.bytes[..]);
                            owner[range].fill(run.no);
                        }
                        runs.extend(cut);
                    }
                    Op::Settle(n) if !runs.is_empty() => {
                        let run = runs[n % runs.len()].clone();
                        let (low, high) = (run.bytes.len() as u64 / 3, 2 * run.bytes.len() as u64 / 3 + 1);
                        for (offset, bytes) in extents.take(run.no, run.offset + low, run.offset + high) {
                            prop_assert_eq!(&bytes, &run.bytes.slice((offset - run.offset) as usize..(offset - run.offset) as usize + bytes.len()));
                        }
                        for at in run.offset + low..run.offset + high {
                            let at = at as usize;
                            if owner[at] == run.no { (model.bytes[at], model.dirty[at], owner[at]) = (0, 0, RunNo(0)); }
                        }
                    }
                    Op::Recut(n) if !runs.is_empty() => {
                        let run = runs.remove(n % runs.len());
                        let half = run.offset + run.bytes.len() as u64 / 2;
                        for again in extents.recut(run.no, run.offset, half, run.since, &mut next) {
                            let range = again.offset as usize..again.offset as usize + again.bytes.len();
                            prop_assert!(owner[range.clone()].iter().all(|owner| *owner == run.no));
                            owner[range].fill(again.no);
                            runs.push(again);
                        }
                        prop_assert!(!owner[run.offset as usize..half as usize].contains(&run.no));
                        runs.push(run);
                    }
                    Op::Settle(_) | Op::Recut(_) => {}
                }
                check(&extents, &model);
            }
        }
    }

    #[test]
    fn sequential_writes_become_one_run_and_reverse_ones_are_joined_when_cut() {
        let (mut extents, mut next) = (Extents::default(), RunNo(0));
        for at in 0..300_u64 {
            extents.write(at * 4096, &[1; 4096], Duration::from_secs(at));
        }
        let runs = extents.cut_full(&mut next);
        assert_eq!(runs.len(), 1);
        assert_eq!((runs[0].offset, runs[0].bytes.len(), runs[0].since), (0, RECORD_MAX, Duration::ZERO));
        assert_eq!(extents.unsent(), 300 * 4096 - RECORD_MAX as u64);
        assert_eq!(extents.oldest_unsent(), Some(Duration::from_secs(256)));

        let mut extents = Extents::default();
        for at in (0..10_u64).rev() {
            extents.write(at * 100, &[2; 100], Duration::from_secs(20 - at));
        }
        let runs = extents.cut_all(&mut next);
        assert_eq!(runs.len(), 1);
        assert_eq!((runs[0].bytes.len(), runs[0].since), (1000, Duration::from_secs(11)));
    }
}
