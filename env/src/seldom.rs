//! Keeps strangers from filling the log: what anybody who reaches a port can make us say is said once in a while.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The least time between two lines about the same thing.
const PAUSE: Duration = Duration::from_secs(10);

/// A line of the log that is written once in ten seconds at most. One for each thing that can be said, as a static.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    unsaid: u64,
}

impl Seldom {
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(State { last: None, unsaid: 0 }))
    }

    /// Whether it is to be said now, and how many times it was not since it was said last.
    pub fn now(&self) -> Option<u64> {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            state.unsaid += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_and_the_next_one_says_how_many_there_were() {
        let (seldom, begin) = (Seldom::new(), Instant::now());
        assert_eq!(seldom.at(begin), Some(0));
        for _ in 0..1000 {
            assert_eq!(seldom.at(begin + PAUSE / 2), None);
        }
        assert_eq!(seldom.at(begin + PAUSE), Some(1000));
        assert_eq!(seldom.at(begin + PAUSE), None);
    }
}
