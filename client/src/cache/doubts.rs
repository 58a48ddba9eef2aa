//! This client's own changes that are under way. Others may see what one did before its answer is here; so what it touches
//! is asked at the master until then, and for a while longer when no answer came.

use dfs_proto::InodeNo;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a change may still happen whose answer nobody waits for any more: longer than the master works on one, and
/// longer than a request is tried.
const AFTERMATH: Duration = Duration::from_secs(90);

/// What a change touches: inodes, and names in directories (and with them the directories).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    pub inos: Vec<InodeNo>,
    pub names: Vec<(InodeNo, Vec<u8>)>,
}

impl Touched {
    pub fn inode(ino: InodeNo) -> Self {
        Self { inos: vec![ino], names: Vec::new() }
    }

    pub fn name(dir: InodeNo, name: &[u8]) -> Self {
        Self::default().and_name(dir, name)
    }

    /// And this, if there is something.
    #[must_use]
    pub fn and(mut self, ino: Option<InodeNo>) -> Self {
        self.inos.extend(ino);
        self
    }

    #[must_use]
    pub fn and_name(mut self, dir: InodeNo, name: &[u8]) -> Self {
        self.inos.push(dir);
        self.names.push((dir, name.to_vec()));
        self
    }
}

struct Doubt {
    id: u64,
    touched: Touched,
    /// Nobody waits for its answer: until when it counts.
    until: Option<Duration>,
}

#[derive(Default)]
struct All {
    next: u64,
    doubts: Vec<Doubt>,
}

/// All of them.
#[derive(Default)]
pub struct Doubts {
    count: AtomicUsize,
    all: Mutex<All>,
}

impl Doubts {
    // Every change is a single step: a poisoned list is whole.
    fn lock(&self) -> MutexGuard<'_, All> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change begins.
    pub fn begin(&self, touched: Touched) -> u64 {
        let mut all = self.lock();
        all.next += 1;
        let id = all.next;
        all.doubts.push(Doubt { id, touched, until: None });
        self.count.store(all.doubts.len(), Ordering::SeqCst);
        id
    }

    /// What a change did is known.
    pub fn end(&self, id: u64) {
        let mut all = self.lock();
        all.doubts.retain(|doubt| doubt.id != id);
        self.count.store(all.doubts.len(), Ordering::SeqCst);
    }

    /// Nobody will ever know what a change did.
    pub fn give_up(&self, id: u64, now: Duration) {
        let mut all = self.lock();
        for doubt in all.doubts.iter_mut().filter(|doubt| doubt.id == id) {
            doubt.until = Some(now + AFTERMATH);
        }
    }

    /// Whether an inode is touched by a change under way.
    pub fn touches(&self, ino: InodeNo, now: Duration) -> bool {
        self.any(now, |touched| touched.inos.contains(&ino))
    }

    /// Whether a name is.
    pub fn touches_name(&self, dir: InodeNo, name: &[u8], now: Duration) -> bool {
        self.any(now, |touched| touched.names.iter().any(|(of, one)| *of == dir && one == name))
    }

    fn any(&self, now: Duration, touched: impl Fn(&Touched) -> bool) -> bool {
        if self.count.load(Ordering::SeqCst) == 0 {
            return false;
        }
        let mut all = self.lock();
        all.doubts.retain(|doubt| doubt.until.is_none_or(|until| now < until));
        self.count.store(all.doubts.len(), Ordering::SeqCst);
        all.doubts.iter().any(|doubt| touched(&doubt.touched))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_change_touches_is_doubted_until_it_is_answered_or_long_over() {
        let (doubts, dir, ino) = (Doubts::default(), InodeNo(1), InodeNo(2));
        let now = Duration::from_secs(1_000);
        assert!(!doubts.touches(dir, now));
        let first = doubts.begin(Touched::name(dir, b"a").and(Some(ino)));
        let second = doubts.begin(Touched::inode(ino));
        assert!(doubts.touches(dir, now) && doubts.touches(ino, now));
        assert!(doubts.touches_name(dir, b"a", now) && !doubts.touches_name(dir, b"b", now));
        doubts.end(first);
        assert!(!doubts.touches(dir, now) && doubts.touches(ino, now));
        doubts.give_up(second, now);
        assert!(doubts.touches(ino, now + AFTERMATH / 2) && !doubts.touches(ino, now + AFTERMATH));
        assert_eq!(doubts.count.load(Ordering::SeqCst), 0);
    }
}
