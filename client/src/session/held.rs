//! What a session asserts again after it reconnects: its open files and its locks.

use dfs_proto::v1::{Cred, HeldLock, Lock, OpenFile, lock::Type};
use std::collections::BTreeMap;

/// Open files and locks as the master's answers told.
#[derive(Debug, Default)]
pub(super) struct Held {
    opens: BTreeMap<u64, OpenFile>,
    /// By inode and owner; the ranges of one owner never overlap and are in order.
    locks: BTreeMap<(u64, u64), Vec<Range>>,
}

/// `end` is inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    end: u64,
    kind: i32,
    pid: u32,
}

impl Held {
    /// One open more. `reader`, `writer`: on whose behalf, if it is to read, or to write.
    pub fn opened(&mut self, ino: u64, reader: Option<&Cred>, writer: Option<&Cred>) {
        let open = self.opens.entry(ino).or_insert_with(|| OpenFile { ino, ..OpenFile::default() });
        open.count += 1;
        for (held, new) in [(&mut open.reader, reader), (&mut open.writer, writer)] {
            if let Some(new) = new {
                *held = Some(new.clone());
            }
        }
    }

    pub fn closed(&mut self, ino: u64) {
        if let Some(open) = self.opens.get_mut(&ino) {
            open.count -= 1;
            if open.count == 0 {
                self.opens.remove(&ino);
                // As the master does: nobody can give them up any more.
                self.locks.retain(|(locked, _), _| *locked != ino);
            }
        }
    }

    /// A lock was granted, or given up: it takes the place of whatever its owner had in its range.
    pub fn set_lock(&mut self, lock: &Lock) {
        let ranges = self.locks.entry((lock.ino, lock.owner)).or_default();
        let mut kept = Vec::with_capacity(ranges.len() + 2);
        for range in ranges.drain(..) {
            if range.end < lock.start || range.start > lock.end {
                kept.push(range);
                continue;
            }
            if range.start < lock.start {
                kept.push(Range { end: lock.start - 1, ..range });
            }
            if range.end > lock.end {
                kept.push(Range { start: lock.end + 1, ..range });
            }
        }
        if lock.r#type != Type::Unlock as i32 {
            kept.push(Range { start: lock.start, end: lock.end, kind: lock.r#type, pid: lock.pid });
        }
        kept.sort_unstable_by_key(|range| range.start);
        if kept.is_empty() {
            self.locks.remove(&(lock.ino, lock.owner));
        } else {
            *ranges = kept;
        }
    }

    pub fn release_locks(&mut self, ino: u64, owner: u64) {
        self.locks.remove(&(ino, owner));
    }

    pub fn has_locks_on(&self, ino: u64) -> bool {
        self.locks.keys().any(|(locked, _)| *locked == ino)
    }

    pub fn has_locks(&self, ino: u64, owner: u64) -> bool {
        self.locks.contains_key(&(ino, owner))
    }

    /// How many owners have locks; all of them are forgotten.
    pub fn drop_locks(&mut self) -> usize {
        std::mem::take(&mut self.locks).len()
    }

    /// What brings the range of a lock back to what is held there: the way out when a lock is granted to a program that
    /// no longer waits for it.
    pub fn restore(&self, lock: &Lock) -> Vec<Lock> {
        let mut steps = Vec::new();
        let mut step = |start: u64, end: u64, kind: i32, pid: u32| {
            steps.push(Lock { start, end, r#type: kind, pid, wait: false, ..*lock });
        };
        let mut at = Some(lock.start);
        for range in self.locks.get(&(lock.ino, lock.owner)).into_iter().flatten() {
            let Some(from) = at else { break };
            if range.end < from || range.start > lock.end {
                continue;
            }
            if range.start > from {
                step(from, range.start - 1, Type::Unlock as i32, lock.pid);
            }
            step(range.start.max(from), range.end.min(lock.end), range.kind, range.pid);
            at = range.end.checked_add(1);
        }
        if let Some(from) = at.filter(|from| *from <= lock.end) {
            step(from, lock.end, Type::Unlock as i32, lock.pid);
        }
        steps
    }

    pub fn opens(&self) -> Vec<OpenFile> {
        self.opens.values().cloned().collect()
    }

    pub fn locks(&self) -> Vec<HeldLock> {
        let ranges = self.locks.iter().flat_map(|(key, ranges)| ranges.iter().map(move |range| (key, range)));
        ranges
            .map(|((ino, owner), range)| HeldLock {
                ino: *ino,
                owner: *owner,
                start: range.start,
                end: range.end,
                r#type: range.kind,
                pid: range.pid,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(start: u64, end: u64, kind: Type) -> Lock {
        Lock { ino: 1, owner: 2, start, end, r#type: kind as i32, wait: true, pid: 3 }
    }

    fn ranges(held: &Held) -> Vec<(u64, u64, i32)> {
        held.locks().iter().map(|lock| (lock.start, lock.end, lock.r#type)).collect()
    }

    #[test]
    fn a_lock_takes_the_place_of_what_its_owner_had_there() {
        let mut held = Held::default();
        held.set_lock(&lock(0, u64::MAX, Type::Read));
        held.set_lock(&lock(10, 19, Type::Write));
        assert_eq!(ranges(&held), [(0, 9, 0), (10, 19, 1), (20, u64::MAX, 0)]);
        held.set_lock(&lock(5, 14, Type::Unlock));
        assert_eq!(ranges(&held), [(0, 4, 0), (15, 19, 1), (20, u64::MAX, 0)]);
        assert!(held.has_locks(1, 2) && !held.has_locks(1, 3));
        held.set_lock(&lock(0, u64::MAX, Type::Unlock));
        assert!(!held.has_locks(1, 2));
    }

    #[test]
    fn a_lock_granted_too_late_is_taken_back_to_what_was_held() {
        let mut held = Held::default();
        let shape = |held: &Held, wanted: &Lock| -> Vec<(u64, u64, i32)> {
            held.restore(wanted).iter().map(|lock| (lock.start, lock.end, lock.r#type)).collect()
        };
        let unlock = Type::Unlock as i32;
        assert_eq!(shape(&held, &lock(5, 9, Type::Write)), [(5, 9, unlock)]);
        held.set_lock(&lock(0, 6, Type::Read));
        held.set_lock(&lock(8, u64::MAX, Type::Read));
        assert_eq!(shape(&held, &lock(5, 9, Type::Write)), [(5, 6, 0), (7, 7, unlock), (8, 9, 0)]);
        assert_eq!(shape(&held, &lock(9, u64::MAX, Type::Write)), [(9, u64::MAX, 0)]);
    }

    #[test]
    fn opens_are_counted() {
        let mut held = Held::default();
        let (one, two) = (Cred { uid: 1, ..Cred::default() }, Cred { uid: 2, ..Cred::default() });
        held.opened(4, Some(&one), Some(&one));
        held.opened(4, None, Some(&two));
        held.closed(4);
        assert_eq!(held.opens(), [OpenFile { ino: 4, count: 1, reader: Some(one), writer: Some(two) }]);
        held.closed(4);
        held.closed(4);
        assert!(held.opens().is_empty());
    }
}
