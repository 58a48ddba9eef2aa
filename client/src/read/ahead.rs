//! Whether an open file is read in order, and how far ahead to read. Pure.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Reads are fetched in blocks of this many bytes of the file, so that later reads find them.
pub const BLOCK: u64 = 1 << 20;
/// The kernel sends the reads of one sequential reader a little out of order.
const SLACK: u64 = 1 << 20;
/// The first window.
const WINDOW_MIN: u64 = BLOCK;

/// What one open file has read. The default is a file just opened.
#[derive(Debug, Default)]
pub struct ReadState(Mutex<Ahead>);

#[derive(Debug, Default)]
struct Ahead {
    /// Where the next read of a sequential reader begins.
    next: u64,
    /// How far ahead of it to read; 0: not yet.
    window: u64,
    /// Read ahead up to here.
    ahead_to: u64,
}

/// What a read is part of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Whether whole blocks are worth fetching.
    pub sequential: bool,
    /// What to fetch ahead; may be empty.
    pub ahead: Range<u64>,
}

impl ReadState {
    /// Takes note of a read of `[offset, end)` in a file of `size` bytes; at most `most` bytes are read ahead.
    pub fn plan(&self, offset: u64, end: u64, size: u64, most: u64) -> Plan {
        let mut ahead = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sequential =
            offset <= ahead.next.saturating_add(SLACK) && end.saturating_add(SLACK) >= ahead.next;
        if !sequential {
            *ahead = Ahead { next: end, window: 0, ahead_to: 0 };
            return Plan { sequential, ahead: 0..0 };
        }
        if end > ahead.next {
            // The window grows with what was really read, so a reader of one header costs one block.
            ahead.window = if ahead.next == 0 { 0 } else { (ahead.window * 2).max(WINDOW_MIN).min(most) };
            ahead.next = end;
        }
        let from = ahead.ahead_to.max(end.next_multiple_of(BLOCK));
        let to = end.saturating_add(ahead.window).checked_next_multiple_of(BLOCK).unwrap_or(size).min(size);
        if ahead.window == 0 || most < BLOCK || to <= from {
            return Plan { sequential, ahead: 0..0 };
        }
        ahead.ahead_to = to;
        Plan { sequential, ahead: from..to }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_sequential_reader_gets_a_growing_window_and_every_block_once() {
        let state = ReadState::default();
        let (size, step) = (100 * MIB, 128 << 10);
        let (mut fetched, mut offset, mut longest) = (MIB, 0, 0);
        while offset < size {
            let plan = state.plan(offset, offset + step, size, 16 * MIB);
            assert!(plan.sequential);
            if !plan.ahead.is_empty() {
                assert_eq!(plan.ahead.start, fetched, "without gaps and without repetitions");
                assert_eq!(plan.ahead.start % BLOCK, 0);
                fetched = plan.ahead.end;
            }
            longest = longest.max(fetched.saturating_sub(offset));
            offset += step;
        }
        assert_eq!(fetched, size);
        assert!(longest > 15 * MIB && longest <= 18 * MIB);
    }

    #[test]
    fn a_random_reader_reads_nothing_ahead() {
        let state = ReadState::default();
        for offset in [50 * MIB, 10 * MIB, 70 * MIB, 30 * MIB] {
            let plan = state.plan(offset, offset + 4096, 100 * MIB, 16 * MIB);
            assert_eq!(plan, Plan { sequential: false, ahead: 0..0 });
        }
        // Reading on from there is noticed.
        assert!(state.plan(30 * MIB + 4096, 30 * MIB + 8192, 100 * MIB, 16 * MIB).sequential);
    }

    #[test]
    fn without_memory_for_a_block_nothing_is_read_ahead() {
        let state = ReadState::default();
        for at in 0..8 {
            assert!(state.plan(at * MIB, (at + 1) * MIB, 100 * MIB, MIB / 4).ahead.is_empty());
        }
    }

    #[test]
    fn the_end_of_the_file_ends_the_window() {
        let state = ReadState::default();
        state.plan(0, MIB, 3 * MIB + 5, 16 * MIB);
        assert_eq!(state.plan(MIB, 2 * MIB, 3 * MIB + 5, 16 * MIB).ahead, 2 * MIB..3 * MIB);
        assert_eq!(state.plan(2 * MIB, 3 * MIB, 3 * MIB + 5, 16 * MIB).ahead, 3 * MIB..3 * MIB + 5);
        assert_eq!(state.plan(3 * MIB, 3 * MIB + 5, 3 * MIB + 5, 16 * MIB).ahead, 0..0);
    }
}
