//! Sealing one chunk: from here on its bytes never change (DESIGN section 5, invariants I2 and I4).
//!
//! ```text
//!  Open ──Fence by Raft──▶ Fenced ──fence orders──▶ Asking ──all answered, or time up──┐
//!                             ▲                                                         ▼
//!                             │ a daemon reports, or time passes    no replica long enough? ──▶ Parked
//!                             └──────────────────────────────────────────────────────────────────┘
//!                                                                   else Sealed by Raft ──▶ cut orders ──▶ Done
//! ```
//!
//! 1. Raft raises the epoch: commits of the old one are refused from then on, so the committed length is final.
//! 2. Daemons persist the new epoch, refuse appends below it and answer how long their replica is.
//! 3. Raft notes the committed length as the chunk's length, and as replicas those that hold at least that much. When
//!    none does, the chunk waits for a daemon to come back: it is never shortened.
//! 4. Only then daemons cut what lies beyond. A crash anywhere before leaves a fenced chunk, resumed at 2.
//!
//! A replica that is sealed before Raft says so is of a later time than the state: the state was restored from a backup. What
//! is sealed never changes, so the chunk's length is the one it was sealed at; it holds all that the backup knows and more.
//!
//! This file decides; `server/sealing.rs` proposes, sends and waits.

use dfs_proto::limits::REPLICAS_MAX;
use dfs_proto::v1::{ChunkState, chunk_state::Phase};
use dfs_proto::{ByteLen, Epoch, NodeId};
use std::collections::{BTreeMap, BTreeSet};

/// What happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// Raft raised the epoch; the chunk as it is now.
    Fenced(ChunkState),
    /// A daemon will take no more appends below the epoch; it holds this much.
    Answered(NodeId, ByteLen),
    /// A daemon has sealed its replica already, at this length: the cluster got further with the chunk than this state,
    /// which was restored from a backup.
    FoundSealed(NodeId, ByteLen),
    /// A daemon did not do it, or cannot be reached.
    Failed(NodeId),
    /// The wait for daemons is over.
    TimeUp,
    /// Raft noted the length and the replicas.
    Sealed,
    /// Raft refused: somebody else went further with this chunk.
    Refused,
}

/// What to do next.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Propose the fence.
    Fence,
    /// Order these daemons to fence, and wait for them.
    Ask { epoch: Epoch, nodes: Vec<NodeId> },
    /// Nothing until the next event.
    Wait,
    /// Propose the seal.
    Seal { epoch: Epoch, length: ByteLen, nodes: Vec<NodeId> },
    /// Order these daemons to cut and close their replica. Whether they do decides nothing.
    Cut { epoch: Epoch, length: ByteLen, nodes: Vec<NodeId> },
    /// No replica is long enough: begin again when a daemon reports.
    Park,
    /// Nothing is left to do.
    Done,
}

#[derive(Debug)]
enum Step {
    Fencing,
    Asking { answers: BTreeMap<NodeId, Answer>, missing: BTreeSet<NodeId> },
    Sealing { nodes: Vec<NodeId>, length: ByteLen },
    Ended,
}

/// What a daemon holds.
#[derive(Clone, Copy, Debug)]
struct Answer {
    length: ByteLen,
    sealed: bool,
}

/// One attempt to seal one chunk.
#[derive(Debug)]
pub struct Sealing {
    chunk: ChunkState,
    /// Daemons that do not count and say that they have it sealed.
    strays: Vec<NodeId>,
    step: Step,
}

impl Sealing {
    /// Begins with a chunk as Raft has it. `strays`: daemons that are no replicas of it and say that they have it sealed;
    /// there are such only when the state was restored from a backup that is older.
    #[must_use]
    pub fn begin(chunk: ChunkState, strays: Vec<NodeId>) -> (Self, Action) {
        let phase = chunk.phase();
        let mut sealing = Self { chunk, strays, step: Step::Ended };
        let action = match phase {
            Phase::Open => {
                sealing.step = Step::Fencing;
                Action::Fence
            }
            Phase::Fenced => sealing.ask(),
            Phase::Sealed => Action::Done,
        };
        (sealing, action)
    }

    /// The replicas that are not among `nodes`.
    #[must_use]
    pub fn given_up(&self, nodes: &[NodeId]) -> Vec<NodeId> {
        self.chunk.nodes.iter().copied().map(NodeId).filter(|node| !nodes.contains(node)).collect()
    }

    /// Takes one event and says what follows. Events that do not fit the step are late answers: they change nothing.
    pub fn on(&mut self, event: Event) -> Action {
        match (&mut self.step, event) {
            (Step::Fencing, Event::Fenced(chunk)) => {
                self.chunk = chunk;
                if self.chunk.phase() == Phase::Fenced { self.ask() } else { self.end() }
            }
            (
                Step::Asking { answers, missing },
                event @ (Event::Answered(node, length) | Event::FoundSealed(node, length)),
            ) => {
                if missing.remove(&node) {
                    answers.insert(node, Answer { length, sealed: matches!(event, Event::FoundSealed(..)) });
                }
                if missing.is_empty() { self.judge() } else { Action::Wait }
            }
            (Step::Asking { missing, .. }, Event::Failed(node)) => {
                missing.remove(&node);
                if missing.is_empty() { self.judge() } else { Action::Wait }
            }
            (Step::Asking { .. }, Event::TimeUp) => self.judge(),
            (Step::Sealing { nodes, length }, Event::Sealed) => {
                let (nodes, length) = (std::mem::take(nodes), *length);
                self.step = Step::Ended;
                if self.chunk.committed == 0 {
                    // Nothing was committed: there is nothing to keep, and the chunk is dropped soon.
                    return Action::Done;
                }
                Action::Cut { epoch: self.epoch(), length, nodes }
            }
            (_, Event::Refused) => self.end(),
            _ => Action::Wait,
        }
    }

    fn ask(&mut self) -> Action {
        let mut nodes: Vec<NodeId> = self.chunk.nodes.iter().copied().map(NodeId).collect();
        if self.chunk.committed == 0 {
            // Every replica holds all of nothing. The raised epoch alone keeps later bytes out of sight.
            return self.seal(nodes, ByteLen(0));
        }
        let strays = self.strays.iter().filter(|stray| !self.chunk.nodes.contains(&stray.get()));
        nodes.extend(strays);
        self.step = Step::Asking { answers: BTreeMap::new(), missing: nodes.iter().copied().collect() };
        Action::Ask { epoch: self.epoch(), nodes }
    }

    fn judge(&mut self) -> Action {
        let Step::Asking { answers, .. } = &self.step else { return Action::Wait };
        let enough = |answer: &&Answer| answer.length >= self.committed();
        // The longest of those that are sealed: others may be copied from it, it can not be cut.
        let final_length =
            answers.values().filter(|answer| answer.sealed).filter(enough).map(|one| one.length);
        let length = final_length.max();
        let fits = |answer: &Answer| match length {
            Some(length) if answer.sealed => answer.length == length,
            Some(length) => answer.length >= length,
            None => answer.length >= self.committed(),
        };
        let listed = |node: &NodeId| self.chunk.nodes.contains(&node.get());
        let counts = |node: &NodeId, answer: &Answer| fits(answer) && (answer.sealed || listed(node));
        let long = answers.iter().filter(|(node, answer)| counts(node, answer)).map(|(node, _)| *node);
        let long: Vec<NodeId> = long.take(REPLICAS_MAX as usize).collect();
        if long.is_empty() {
            self.step = Step::Ended;
            return Action::Park;
        }
        let length = length.unwrap_or_else(|| self.committed());
        self.seal(long, length)
    }

    fn seal(&mut self, nodes: Vec<NodeId>, length: ByteLen) -> Action {
        self.step = Step::Sealing { nodes: nodes.clone(), length };
        Action::Seal { epoch: self.epoch(), length, nodes }
    }

    fn end(&mut self) -> Action {
        self.step = Step::Ended;
        Action::Done
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.chunk.epoch)
    }

    fn committed(&self) -> ByteLen {
        ByteLen(self.chunk.committed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk(phase: Phase, epoch: u32, committed: u64) -> ChunkState {
        ChunkState {
            chunk: 5,
            epoch,
            phase: phase.into(),
            session: 1,
            committed,
            nodes: vec![1, 2, 3],
            capacity: 100,
            ..ChunkState::default()
        }
    }

    fn nodes(nodes: &[u64]) -> Vec<NodeId> {
        nodes.iter().copied().map(NodeId).collect()
    }

    #[test]
    fn seals_at_the_committed_length_with_every_replica_that_is_long_enough() {
        let (mut sealing, action) = Sealing::begin(chunk(Phase::Open, 1, 40), Vec::new());
        assert_eq!(action, Action::Fence);
        let asked = sealing.on(Event::Fenced(chunk(Phase::Fenced, 2, 50)));
        assert_eq!(asked, Action::Ask { epoch: Epoch(2), nodes: nodes(&[1, 2, 3]) });
        assert_eq!(sealing.on(Event::Answered(NodeId(1), ByteLen(60))), Action::Wait);
        assert_eq!(sealing.on(Event::Answered(NodeId(2), ByteLen(49))), Action::Wait);
        let seal = sealing.on(Event::Answered(NodeId(3), ByteLen(50)));
        assert_eq!(seal, Action::Seal { epoch: Epoch(2), length: ByteLen(50), nodes: nodes(&[1, 3]) });
        let cut = sealing.on(Event::Sealed);
        assert_eq!(cut, Action::Cut { epoch: Epoch(2), length: ByteLen(50), nodes: nodes(&[1, 3]) });
    }

    #[test]
    fn goes_on_without_daemons_that_do_not_answer() {
        let (mut sealing, _) = Sealing::begin(chunk(Phase::Fenced, 2, 50), Vec::new());
        assert_eq!(sealing.on(Event::Failed(NodeId(1))), Action::Wait);
        assert_eq!(sealing.on(Event::Answered(NodeId(2), ByteLen(50))), Action::Wait);
        let seal = Action::Seal { epoch: Epoch(2), length: ByteLen(50), nodes: nodes(&[2]) };
        assert_eq!(sealing.on(Event::TimeUp), seal);
        assert_eq!(sealing.on(Event::Answered(NodeId(3), ByteLen(90))), Action::Wait, "too late");
    }

    #[test]
    fn waits_rather_than_shorten() {
        let (mut sealing, _) = Sealing::begin(chunk(Phase::Fenced, 2, 50), Vec::new());
        sealing.on(Event::Answered(NodeId(1), ByteLen(49)));
        sealing.on(Event::Failed(NodeId(2)));
        assert_eq!(sealing.on(Event::Failed(NodeId(3))), Action::Park);
    }

    #[test]
    fn a_chunk_without_committed_bytes_needs_no_daemon() {
        let (mut sealing, action) = Sealing::begin(chunk(Phase::Fenced, 2, 0), Vec::new());
        assert_eq!(action, Action::Seal { epoch: Epoch(2), length: ByteLen(0), nodes: nodes(&[1, 2, 3]) });
        assert_eq!(sealing.on(Event::Sealed), Action::Done);
    }

    #[test]
    fn takes_the_length_of_what_was_sealed_after_the_backup_that_the_state_is_of() {
        let (mut sealing, _) = Sealing::begin(chunk(Phase::Fenced, 900, 50), Vec::new());
        assert_eq!(sealing.on(Event::Answered(NodeId(1), ByteLen(60))), Action::Wait);
        assert_eq!(sealing.on(Event::FoundSealed(NodeId(2), ByteLen(80))), Action::Wait);
        let seal = sealing.on(Event::FoundSealed(NodeId(3), ByteLen(80)));
        assert_eq!(seal, Action::Seal { epoch: Epoch(900), length: ByteLen(80), nodes: nodes(&[2, 3]) });
        let cut = sealing.on(Event::Sealed);
        assert_eq!(cut, Action::Cut { epoch: Epoch(900), length: ByteLen(80), nodes: nodes(&[2, 3]) });
        // Whoever has it by now may not be whom the backup knows.
        let (mut sealing, action) = Sealing::begin(chunk(Phase::Fenced, 900, 50), nodes(&[3, 7]));
        assert_eq!(action, Action::Ask { epoch: Epoch(900), nodes: nodes(&[1, 2, 3, 7]) });
        for gone in [1, 2, 3] {
            sealing.on(Event::Failed(NodeId(gone)));
        }
        let seal = sealing.on(Event::FoundSealed(NodeId(7), ByteLen(80)));
        assert_eq!(seal, Action::Seal { epoch: Epoch(900), length: ByteLen(80), nodes: nodes(&[7]) });
        // One that is sealed and too short is of another history: it counts for nothing.
        let (mut sealing, _) = Sealing::begin(chunk(Phase::Fenced, 900, 50), Vec::new());
        sealing.on(Event::FoundSealed(NodeId(1), ByteLen(40)));
        sealing.on(Event::Failed(NodeId(2)));
        let seal = sealing.on(Event::Answered(NodeId(3), ByteLen(70)));
        assert_eq!(seal, Action::Seal { epoch: Epoch(900), length: ByteLen(50), nodes: nodes(&[3]) });
    }

    #[test]
    fn stops_when_somebody_else_went_further() {
        assert_eq!(Sealing::begin(chunk(Phase::Sealed, 2, 50), Vec::new()).1, Action::Done);
        let (mut sealing, _) = Sealing::begin(chunk(Phase::Open, 1, 50), Vec::new());
        assert_eq!(sealing.on(Event::Fenced(chunk(Phase::Sealed, 3, 50))), Action::Done);
        let (mut sealing, _) = Sealing::begin(chunk(Phase::Fenced, 2, 0), Vec::new());
        assert_eq!(sealing.on(Event::Refused), Action::Done);
    }

    proptest! {
        #[test]
        fn never_lists_a_replica_that_is_too_short(
            committed in 1_u64..20,
            events in prop::collection::vec((1_u64..5, 0_u64..25, 0_u8..6), 0..12),
        ) {
            let (mut sealing, _) = Sealing::begin(chunk(Phase::Fenced, 2, committed), Vec::new());
            let mut first = BTreeMap::new();
            for (node, length, what) in events {
                let action = match what {
                    0 => sealing.on(Event::TimeUp),
                    1 => { first.entry(node).or_insert(None); sealing.on(Event::Failed(NodeId(node))) }
                    _ => { first.entry(node).or_insert(Some(length)); sealing.on(Event::Answered(NodeId(node), ByteLen(length))) }
                };
                match action {
                    Action::Seal { length, nodes, .. } => {
                        prop_assert_eq!(length, ByteLen(committed));
                        prop_assert!(!nodes.is_empty());
                        for node in nodes {
                            prop_assert!(first[&node.get()].is_some_and(|long| long >= committed));
                        }
                        return Ok(());
                    }
                    Action::Park => {
                        prop_assert!((1..4).all(|node| first.get(&node).copied().flatten().is_none_or(|l| l < committed)));
                        return Ok(());
                    }
                    Action::Wait => {}
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }
    }
}
