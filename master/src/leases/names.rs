//! Names that changes under way are about. Changes of one name follow each other: what it stands for stays the same from
//! when one of them looks until it is applied, so it recalls the leases of the right inode.
//!
//! A change takes all its names at once, and changes of a name take their turns in the order in which they came. So nobody
//! ever waits for somebody who came later, and they cannot wait for each other in a circle.

use bytes::Bytes;
use dfs_proto::InodeNo;
use std::collections::{BTreeMap, VecDeque};

/// A name in a directory.
pub type Name = (InodeNo, Bytes);

/// A change's turn for its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn(u64);

/// All turns that were taken and not given back.
#[derive(Debug, Default)]
pub struct Names {
    next: u64,
    lines: BTreeMap<Name, VecDeque<Turn>>,
    turns: BTreeMap<Turn, Vec<Name>>,
}

impl Names {
    /// Lines up for names. True: it is this one's turn for all of them already.
    pub fn take(&mut self, mut names: Vec<Name>) -> (Turn, bool) {
        let turn = Turn(self.next);
        self.next += 1;
        names.sort_unstable();
        names.dedup();
        for name in &names {
            self.lines.entry(name.clone()).or_default().push_back(turn);
        }
        self.turns.insert(turn, names);
        (turn, self.is_first(turn))
    }

    /// Gives a turn back, whether it had come or not. Answers those whose turn it is now.
    pub fn give_back(&mut self, turn: Turn) -> Vec<Turn> {
        let mut next = Vec::new();
        for name in self.turns.remove(&turn).unwrap_or_default() {
            let Some(line) = self.lines.get_mut(&name) else { continue };
            let was_first = line.front() == Some(&turn);
            line.retain(|other| *other != turn);
            match line.front() {
                Some(first) if was_first => next.push(*first),
                Some(_) => {}
                None => drop(self.lines.remove(&name)),
            }
        }
        next.sort_unstable();
        next.dedup();
        next.retain(|turn| self.is_first(*turn));
        next
    }

    fn is_first(&self, turn: Turn) -> bool {
        let first = |name: &Name| self.lines.get(name).and_then(VecDeque::front) == Some(&turn);
        self.turns.get(&turn).is_some_and(|names| names.iter().all(first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn name(name: u8) -> Name {
        (InodeNo(1), Bytes::copy_from_slice(&[name]))
    }

    #[test]
    fn a_rename_waits_for_both_of_its_names() {
        let mut names = Names::default();
        let (a, first) = names.take(vec![name(1)]);
        let (b, second) = names.take(vec![name(2)]);
        let (both, third) = names.take(vec![name(2), name(1), name(1)]);
        let (last, fourth) = names.take(vec![name(2)]);
        assert_eq!((first, second, third, fourth), (true, true, false, false));
        assert_eq!(names.give_back(a), []);
        assert_eq!(names.give_back(b), [both]);
        assert_eq!(names.give_back(both), [last]);
        assert_eq!(names.give_back(last), []);
        assert!(names.lines.is_empty() && names.turns.is_empty());
    }

    proptest! {
        #[test]
        fn nobody_shares_a_name_and_everybody_gets_his_turn(
            steps in prop::collection::vec((prop::collection::vec(0_u8..4, 0..3), any::<bool>(), 0_usize..8), 1..60)) {
            let mut names = Names::default();
            let mut has: BTreeSet<Turn> = BTreeSet::new();
            let mut waits: BTreeSet<Turn> = BTreeSet::new();
            for (wanted, give_back, which) in steps {
                let came = if give_back {
                    // Also those who wait may give up.
                    let all: Vec<Turn> = has.union(&waits).copied().collect();
                    let Some(turn) = all.get(which % all.len().max(1)).copied() else { continue };
                    has.remove(&turn);
                    waits.remove(&turn);
                    names.give_back(turn)
                } else {
                    let (turn, first) = names.take(wanted.into_iter().map(name).collect());
                    waits.insert(turn);
                    if first { vec![turn] } else { Vec::new() }
                };
                for turn in came {
                    prop_assert!(waits.remove(&turn), "a turn comes once");
                    has.insert(turn);
                }
                let taken: Vec<&Name> = has.iter().flat_map(|turn| &names.turns[turn]).collect();
                prop_assert_eq!(taken.len(), taken.iter().collect::<BTreeSet<_>>().len(), "two have one name");
            }
            while let Some(turn) = has.pop_first() {
                for next in names.give_back(turn) {
                    waits.remove(&next);
                    has.insert(next);
                }
            }
            prop_assert!(waits.is_empty(), "some never got their turn");
            prop_assert!(names.lines.is_empty() && names.turns.is_empty());
        }
    }
}
