//! Whether this master may want to lead.

use super::types::Raft;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

/// Why a master does not want to lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bar {
    /// It has not caught up (joining.rs).
    Joining = 1,
    /// The others say that it was removed from the group.
    Removed = 2,
    /// It has just handed over, and stops.
    Leaving = 4,
    /// Its disk is full.
    NoRoom = 8,
}

/// The bars that are down. While there is one, openraft holds no election of its own accord.
#[derive(Default)]
pub struct Elections {
    bars: AtomicU8,
    /// Known once Raft runs.
    raft: OnceLock<Raft>,
}

impl Elections {
    /// Puts what was decided so far, and from now on, into effect.
    pub fn govern(&self, raft: &Raft) {
        drop(self.raft.set(raft.clone()));
        self.tell();
    }

    /// This master does not want to lead for this reason; answers whether that is new.
    pub fn bar(&self, bar: Bar) -> bool {
        let new = self.bars.fetch_or(bar as u8, Ordering::SeqCst) & bar as u8 == 0;
        self.tell();
        new
    }

    /// The reason is gone; answers whether it was there.
    pub fn lift(&self, bar: Bar) -> bool {
        let was = self.bars.fetch_and(!(bar as u8), Ordering::SeqCst) & bar as u8 != 0;
        if was {
            self.tell();
        }
        was
    }

    /// Whether there is no bar.
    pub fn allowed(&self) -> bool {
        self.bars.load(Ordering::SeqCst) == 0
    }

    fn tell(&self) {
        if let Some(raft) = self.raft.get() {
            raft.runtime_config().elect(self.allowed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_reason_is_enough_and_each_is_lifted_by_itself() {
        let elections = Elections::default();
        assert!(elections.allowed());
        assert!(elections.bar(Bar::Joining) && elections.bar(Bar::Removed) && !elections.bar(Bar::Removed));
        assert!(elections.lift(Bar::Joining) && !elections.allowed());
        assert!(elections.lift(Bar::Removed) && !elections.lift(Bar::Removed) && elections.allowed());
    }
}
