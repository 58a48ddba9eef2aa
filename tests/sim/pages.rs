//! A file's bytes in pages that copies of the file share: a copy costs a pointer a page, and what was never written costs none.

use std::sync::Arc;

/// jemalloc rounds nothing up to this size, and one page more beyond 14 KiB.
const PAGE: usize = 8 << 10;
static ZEROES: [u8; PAGE] = [0; PAGE];

/// The bytes of a file. A page ends where the zeroes begin that nobody wrote.
#[derive(Clone, Default)]
pub struct Pages {
    pages: Vec<Arc<Vec<u8>>>,
    length: usize,
}

/// The parts of a range that lie in one page each: the page, where in it, and how much.
fn parts(start: usize, end: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut at = start;
    std::iter::from_fn(move || {
        let (page, within) = (at / PAGE, at % PAGE);
        let length = (PAGE - within).min(end.saturating_sub(at));
        at += length;
        (length > 0).then_some((page, within, length))
    })
}

impl Pages {
    pub fn len(&self) -> usize {
        self.length
    }

    /// The bytes from `start` to `end`, as far as there are that many, piece by piece.
    pub fn pieces(&self, start: usize, end: usize) -> impl Iterator<Item = &[u8]> {
        parts(start, end.min(self.length)).flat_map(|(page, within, length)| {
            let written = self.pages[page].get(within..).unwrap_or_default();
            let written = &written[..written.len().min(length)];
            [written, &ZEROES[written.len()..length]].into_iter().filter(|piece| !piece.is_empty())
        })
    }

    /// Reads from `offset` on, and answers how many bytes there were.
    pub fn read_at(&self, buffer: &mut [u8], offset: usize) -> usize {
        let mut filled = 0;
        for piece in self.pieces(offset, offset.saturating_add(buffer.len())) {
            buffer[filled..filled + piece.len()].copy_from_slice(piece);
            filled += piece.len();
        }
        filled
    }

    /// All of it.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.length);
        self.pieces(0, self.length).for_each(|piece| bytes.extend_from_slice(piece));
        bytes
    }

    pub fn write_at(&mut self, mut bytes: &[u8], offset: usize) {
        if bytes.is_empty() {
            return;
        }
        let end = offset + bytes.len();
        self.set_len(self.length.max(end));
        for (page, within, length) in parts(offset, end) {
            let page = Arc::make_mut(&mut self.pages[page]);
            let (these, rest) = bytes.split_at(length);
            if page.len() < within {
                page.resize(within, 0);
            }
            let over = length.min(page.len() - within);
            page[within..within + over].copy_from_slice(&these[..over]);
            page.extend_from_slice(&these[over..]);
            bytes = rest;
        }
    }

    /// Cuts it, or lengthens it with zeroes.
    pub fn set_len(&mut self, length: usize) {
        self.pages.resize_with(length.div_ceil(PAGE), Arc::default);
        if length < self.length
            && let Some(last) = self.pages.last_mut()
        {
            let kept = length - (length - 1) / PAGE * PAGE;
            if last.len() > kept {
                Arc::make_mut(last).truncate(kept);
            }
        }
        self.length = length;
    }

    /// Flips a bit, if there is that many.
    pub fn flip(&mut self, bit: usize) {
        let mut byte = [0];
        if self.read_at(&mut byte, bit / 8) == 1 {
            self.write_at(&[byte[0] ^ (1 << (bit % 8))], bit / 8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Op {
        Write(usize, u8, usize),
        SetLen(usize),
        Flip(usize),
        Copy,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let at = 0..4 * PAGE;
        let op = prop_oneof![
            (at.clone(), 1..=u8::MAX, 0..2 * PAGE + 2)
                .prop_map(|(at, byte, length)| Op::Write(at, byte, length)),
            at.clone().prop_map(Op::SetLen),
            prop_oneof![Just(0), Just(PAGE), Just(2 * PAGE)].prop_map(Op::SetLen),
            at.prop_map(|byte| Op::Flip(byte * 8 + 3)),
            Just(Op::Copy),
        ];
        proptest::collection::vec(op, 1..20)
    }

    proptest! {
        #[test]
        fn they_are_what_plain_bytes_are(ops in ops(), from in 0..5 * PAGE, length in 0..2 * PAGE) {
            let (mut pages, mut plain) = (Pages::default(), Vec::<u8>::new());
            let mut copies = Vec::new();
            for op in ops {
                match op {
                    Op::Write(at, byte, length) => {
                        pages.write_at(&vec![byte; length], at);
                        if length > 0 {
                            plain.resize(plain.len().max(at + length), 0);
                            plain[at..at + length].fill(byte);
                        }
                    }
                    Op::SetLen(length) => {
                        pages.set_len(length);
                        plain.resize(length, 0);
                    }
                    Op::Flip(bit) => {
                        pages.flip(bit);
                        plain.get_mut(bit / 8).into_iter().for_each(|byte| *byte ^= 1 << (bit % 8));
                    }
                    Op::Copy => copies.push((pages.clone(), plain.clone())),
                }
            }
            copies.push((pages, plain));
            for (pages, plain) in copies {
                prop_assert_eq!(pages.len(), plain.len());
                prop_assert!(pages.to_vec() == plain);
                let mut read = vec![0xee; length];
                let there = pages.read_at(&mut read, from);
                let expected = plain.get(from.min(plain.len())..).unwrap_or_default();
                prop_assert!(read[..there] == expected[..length.min(expected.len())]);
            }
        }
    }
}
