//! What a sealed chunk needs next, so that it has as many good replicas as it should, no more, and on the right daemons.
//!
//! ```text
//!   too few good replicas ──▶ Copy to a daemon (anew where a damaged one is) ──▶ looked at again
//!   enough, and others    ──▶ Drop one of the others                         ──▶ looked at again
//!   enough, one on a much fuller daemon than another that has none ──▶ Copy to that, then Drop
//! ```
//!
//! A replica is *good* when its daemon is not dead and not drained, and nothing is known against it. It is *solid* when its
//! daemon is up besides, and has reported what it has since it is back: only those are relied on when another one is dropped. A suspect daemon's replicas are not made
//! again (it usually comes back), and none is dropped because of them.
//!
//! This file decides; `server/repairing.rs` orders, proposes and waits.

use crate::placement::{Candidate, Domain, Health, NoPlace, Placement};
use dfs_proto::v1::ChunkState;
use dfs_proto::{ByteLen, NodeId};
use std::collections::BTreeMap;

/// A daemon that is listed as holding a replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    pub node: NodeId,
    pub domain: Domain,
    pub health: Health,
    pub draining: bool,
    /// Since it is there it has told everything it has.
    pub reported: bool,
    /// How full it is, in thousandths.
    pub fill: u64,
}

/// By how many thousandths one daemon must be fuller than another before replicas are moved. Less would move replicas to and
/// fro as files come and go.
const UNEVEN: u64 = 100;

/// Whether some daemons are so much fuller than others that replicas are to be moved.
#[must_use]
pub fn is_uneven(candidates: &[Candidate]) -> bool {
    let fills = || candidates.iter().filter(|candidate| candidate.is_open()).map(Candidate::fill);
    fills().max().unwrap_or(0) > fills().min().unwrap_or(0) + UNEVEN
}

/// What is known against a replica that is listed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flaw {
    /// It is not there at all; otherwise it is damaged, and may still have good records.
    pub missing: bool,
    /// Its daemon could not make it anew: another one has to.
    pub hopeless: bool,
}

/// What to do with a chunk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Have `to` make a replica from those of `sources`, the best first. `anew`: in place of one that is damaged.
    Copy { to: NodeId, sources: Vec<NodeId>, anew: bool },
    /// Let a replica count no more, relying on others; its daemon may delete it then.
    Drop { node: NodeId, relied: Vec<NodeId> },
    /// Nothing to do, or nothing that can be done now.
    Nothing,
}

/// How far a chunk is from what it should be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Urgency {
    /// It has so many good replicas, too few.
    Lacking(u32),
    /// It has enough, and others besides.
    Untidy,
    /// One is on a daemon that is much fuller than another.
    Uneven,
}

/// A chunk's replicas, sorted out.
pub struct Replicas<'a> {
    wanted: usize,
    holders: &'a [Holder],
    flaws: &'a BTreeMap<NodeId, Flaw>,
}

impl<'a> Replicas<'a> {
    /// The replicas of a sealed chunk; `flaws`: what is known against some.
    #[must_use]
    pub fn new(chunk: &ChunkState, holders: &'a [Holder], flaws: &'a BTreeMap<NodeId, Flaw>) -> Self {
        let wanted = usize::try_from(chunk.wanted_replicas.max(1)).unwrap_or(usize::MAX);
        Self { wanted, holders, flaws }
    }

    fn is_good(&self, holder: &Holder) -> bool {
        holder.health != Health::Dead && !holder.draining && !self.flaws.contains_key(&holder.node)
    }

    fn is_solid(&self, holder: &Holder) -> bool {
        self.is_good(holder) && holder.health <= Health::Doubted && holder.reported
    }

    /// How many good replicas there are.
    fn good(&self) -> usize {
        self.holders.iter().filter(|holder| self.is_good(holder)).count()
    }

    fn solid(&self) -> Vec<NodeId> {
        self.holders.iter().filter(|holder| self.is_solid(holder)).map(|holder| holder.node).collect()
    }

    /// Whether enough daemons that are up have good replicas.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.solid().len() >= self.wanted
    }

    /// Whether any daemon that is up has a good replica.
    #[must_use]
    pub fn is_safe_without(&self, node: NodeId) -> bool {
        self.solid().iter().any(|solid| *solid != node)
    }

    /// The daemons that are up and have good replicas, this one left out.
    #[must_use]
    pub fn relied_without(&self, node: NodeId) -> Vec<NodeId> {
        self.solid().into_iter().filter(|solid| *solid != node).collect()
    }

    /// How much a chunk needs a step; None: it is as it should be.
    #[must_use]
    pub fn urgency(&self) -> Option<Urgency> {
        let good = self.good();
        if good < self.wanted {
            return Some(Urgency::Lacking(u32::try_from(good).unwrap_or(u32::MAX)));
        }
        (self.holders.len() > self.wanted).then_some(Urgency::Untidy)
    }

    /// What to do next. `candidates`: daemons that may take a copy now, the holders among them.
    pub fn next(
        &self,
        candidates: &[Candidate],
        placement: &dyn Placement,
        capacity: ByteLen,
        random: &mut dyn FnMut() -> u64,
    ) -> Step {
        if self.good() < self.wanted {
            return self.copy(candidates, placement, capacity, random).unwrap_or(Step::Nothing);
        }
        let solid = self.solid();
        match dispensable(self, self.holders) {
            Some(node) => {
                let relied: Vec<NodeId> = solid.into_iter().filter(|solid| *solid != node).collect();
                if relied.len() >= self.wanted { Step::Drop { node, relied } } else { Step::Nothing }
            }
            None => match self.better_place(candidates) {
                Some(to) => Step::Copy { to, sources: solid, anew: false },
                None => Step::Nothing,
            },
        }
    }

    /// The emptiest daemon to which one of the replicas, all of them solid, is to be moved: the one that would then be the
    /// least needed is on a much fuller daemon.
    #[must_use]
    pub fn better_place(&self, candidates: &[Candidate]) -> Option<NodeId> {
        if self.solid().len() != self.holders.len() {
            return None;
        }
        let fullest = self.holders.iter().map(|holder| holder.fill).max()?;
        let listed = |node: NodeId| self.holders.iter().any(|holder| holder.node == node);
        let mut better: Vec<&Candidate> = candidates
            .iter()
            .filter(|candidate| candidate.is_open() && candidate.health == Health::Up)
            .filter(|candidate| candidate.fill() + UNEVEN < fullest && !listed(candidate.node))
            .collect();
        better.sort_by_key(|candidate| (candidate.fill(), candidate.node));
        let moves = |candidate: &&Candidate| {
            let mut with = self.holders.to_vec();
            with.push(Holder {
                node: candidate.node,
                domain: candidate.domain.clone(),
                health: candidate.health,
                draining: false,
                reported: true,
                fill: candidate.fill(),
            });
            let left =
                dispensable(self, &with).and_then(|node| with.iter().find(|holder| holder.node == node));
            left.is_some_and(|holder| candidate.fill() + UNEVEN < holder.fill)
        };
        better.into_iter().find(moves).map(|candidate| candidate.node)
    }

    fn copy(
        &self,
        candidates: &[Candidate],
        placement: &dyn Placement,
        capacity: ByteLen,
        random: &mut dyn FnMut() -> u64,
    ) -> Option<Step> {
        let mut sources: Vec<&Holder> = self
            .holders
            .iter()
            .filter(|holder| holder.health != Health::Dead)
            .filter(|holder| self.flaws.get(&holder.node).is_none_or(|flaw| !flaw.missing))
            .collect();
        // The damaged ones last: together they may still have every record.
        sources.sort_by_key(|holder| (self.flaws.contains_key(&holder.node), holder.health));
        let may =
            |node: NodeId| candidates.iter().any(|candidate| candidate.node == node && candidate.is_open());
        let mendable = |holder: &&Holder| {
            self.flaws.get(&holder.node).is_some_and(|flaw| !flaw.hopeless) && may(holder.node)
        };
        let (to, anew) = match self.holders.iter().find(mendable) {
            Some(holder) => (holder.node, true),
            None => (self.place(candidates, placement, capacity, random).ok()?, false),
        };
        // The one that is made anew looks at what it has itself.
        let sources: Vec<NodeId> =
            sources.into_iter().map(|holder| holder.node).filter(|node| *node != to).collect();
        let own = self.flaws.get(&to).is_some_and(|flaw| !flaw.missing);
        (own || !sources.is_empty()).then_some(Step::Copy { to, sources, anew })
    }

    fn place(
        &self,
        candidates: &[Candidate],
        placement: &dyn Placement,
        capacity: ByteLen,
        random: &mut dyn FnMut() -> u64,
    ) -> Result<NodeId, NoPlace> {
        let listed = |candidate: &&Candidate| self.holders.iter().any(|holder| holder.node == candidate.node);
        let others: Vec<Candidate> =
            candidates.iter().filter(|candidate| !listed(candidate)).cloned().collect();
        let good = self.holders.iter().filter(|holder| self.is_good(holder));
        let beside: Vec<Domain> = good.map(|holder| holder.domain.clone()).collect();
        let places = placement.place(&others, &beside, 1, capacity, random)?;
        places.first().copied().ok_or(NoPlace::NoNodes)
    }
}

/// The replica that is needed least, when there are more than enough: one that is not good, else one that shares its host
/// with another, else one of the same rack, else that of the fullest daemon.
fn dispensable(replicas: &Replicas<'_>, holders: &[Holder]) -> Option<NodeId> {
    if holders.len() <= replicas.wanted {
        return None;
    }
    let shared = |holder: &Holder, same: fn(&Domain, &Domain) -> bool| {
        let others = holders.iter().filter(|other| other.node != holder.node && replicas.is_good(other));
        others.filter(|other| same(&other.domain, &holder.domain)).count()
    };
    let least = holders.iter().min_by_key(|holder| {
        let hosts = shared(holder, |a, b| a.host == b.host);
        let racks = shared(holder, |a, b| a.rack == b.rack);
        let reverse = std::cmp::Reverse::<u64>;
        (
            replicas.is_good(holder),
            replicas.is_solid(holder),
            reverse(hosts as u64),
            reverse(racks as u64),
            reverse(holder.fill),
            holder.node,
        )
    });
    least.map(|holder| holder.node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Spread;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const GIB: u64 = 1 << 30;
    const CAPACITY: ByteLen = ByteLen(64 << 20);

    /// A small cluster: what is true of each daemon, and which hold the chunk.
    #[derive(Clone, Debug)]
    struct World {
        nodes: Vec<Candidate>,
        flaws: BTreeMap<NodeId, Flaw>,
        /// Daemons that have not reported yet.
        silent: BTreeSet<NodeId>,
        chunk: ChunkState,
    }

    impl World {
        fn new(count: u64, holders: &[u64], wanted: u32) -> Self {
            let node = |node| Candidate {
                node: NodeId(node),
                domain: Domain { host: format!("host{node}"), rack: String::new() },
                free: ByteLen(GIB),
                total: ByteLen(2 * GIB),
                health: Health::Up,
                draining: false,
            };
            let nodes = (1..=count).map(node).collect();
            let chunk = ChunkState {
                chunk: 7,
                nodes: holders.to_vec(),
                wanted_replicas: wanted,
                ..Default::default()
            };
            Self { nodes, flaws: BTreeMap::new(), silent: BTreeSet::new(), chunk }
        }

        fn node(&mut self, node: u64) -> &mut Candidate {
            &mut self.nodes[usize::try_from(node - 1).expect("small")]
        }

        fn flaw(&mut self, node: u64, missing: bool) {
            self.flaws.insert(NodeId(node), Flaw { missing, hopeless: false });
        }

        fn holders(&self) -> Vec<Holder> {
            let holder = |id: &u64| {
                let node = self.nodes.iter().find(|node| node.node.get() == *id).expect("it exists");
                let fill = node.fill();
                let Candidate { node, domain, health, draining, .. } = node.clone();
                let reported = !self.silent.contains(&node);
                Holder { node, domain, health, draining, reported, fill }
            };
            self.chunk.nodes.iter().map(holder).collect()
        }

        fn urgency(&self) -> Option<Urgency> {
            Replicas::new(&self.chunk, &self.holders(), &self.flaws).urgency()
        }

        fn step(&self) -> Step {
            let holders = self.holders();
            let mut random = || 1 << 63;
            Replicas::new(&self.chunk, &holders, &self.flaws).next(
                &self.nodes,
                &Spread,
                CAPACITY,
                &mut random,
            )
        }

        /// Carries out a step as the master does.
        fn carry_out(&mut self, step: &Step) {
            match step {
                Step::Copy { to, .. } => {
                    if !self.chunk.nodes.contains(&to.get()) {
                        self.chunk.nodes.push(to.get());
                    }
                    self.flaws.remove(to);
                }
                Step::Drop { node, .. } => {
                    self.chunk.nodes.retain(|listed| *listed != node.get());
                    self.flaws.remove(node);
                }
                Step::Nothing => {}
            }
        }
    }

    fn nodes(ids: &[u64]) -> Vec<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    #[test]
    fn a_dead_daemons_replica_is_made_elsewhere_and_then_dropped() {
        let mut world = World::new(4, &[1, 2, 3], 3);
        assert_eq!((world.urgency(), world.step()), (None, Step::Nothing));
        world.node(2).health = Health::Suspect;
        assert_eq!(world.urgency(), None, "it may come back");
        world.node(2).health = Health::Dead;
        assert_eq!(world.urgency(), Some(Urgency::Lacking(2)));
        let copy = world.step();
        assert_eq!(copy, Step::Copy { to: NodeId(4), sources: nodes(&[1, 3]), anew: false });
        world.carry_out(&copy);
        assert_eq!(world.urgency(), Some(Urgency::Untidy));
        assert_eq!(world.step(), Step::Drop { node: NodeId(2), relied: nodes(&[1, 3, 4]) });
    }

    #[test]
    fn nothing_is_dropped_while_a_daemon_is_suspect() {
        let mut world = World::new(4, &[1, 2, 3, 4], 3);
        assert!(matches!(world.step(), Step::Drop { .. }));
        world.node(1).health = Health::Suspect;
        assert_eq!(world.step(), Step::Drop { node: NodeId(1), relied: nodes(&[2, 3, 4]) });
        world.node(2).health = Health::Suspect;
        assert_eq!(world.step(), Step::Nothing);
        // Nor on a daemon that has not said what it has.
        let mut world = World::new(3, &[1, 2], 1);
        world.silent.insert(NodeId(1));
        assert_eq!(world.step(), Step::Drop { node: NodeId(1), relied: nodes(&[2]) });
        world.silent.insert(NodeId(2));
        assert_eq!(world.step(), Step::Nothing);
    }

    #[test]
    fn a_damaged_replica_is_made_anew_in_its_place_and_is_the_last_source() {
        let mut world = World::new(3, &[1, 2, 3], 3);
        world.flaw(1, false);
        assert_eq!(world.step(), Step::Copy { to: NodeId(1), sources: nodes(&[2, 3]), anew: true });
        world.flaw(2, false);
        assert_eq!(world.step(), Step::Copy { to: NodeId(1), sources: nodes(&[3, 2]), anew: true });
        world.flaw(2, true);
        assert_eq!(world.step(), Step::Copy { to: NodeId(1), sources: nodes(&[3]), anew: true });
    }

    #[test]
    fn a_daemon_that_cannot_mend_its_replica_is_replaced() {
        let mut world = World::new(4, &[1, 2, 3], 3);
        world.flaws.insert(NodeId(1), Flaw { missing: true, hopeless: true });
        let copy = world.step();
        assert_eq!(copy, Step::Copy { to: NodeId(4), sources: nodes(&[2, 3]), anew: false });
        world.carry_out(&copy);
        assert_eq!(world.step(), Step::Drop { node: NodeId(1), relied: nodes(&[2, 3, 4]) });
    }

    #[test]
    fn a_drained_daemon_is_a_source_and_is_emptied() {
        let mut world = World::new(4, &[1, 2, 3], 3);
        world.node(3).draining = true;
        let copy = world.step();
        assert_eq!(copy, Step::Copy { to: NodeId(4), sources: nodes(&[1, 2, 3]), anew: false });
        world.carry_out(&copy);
        assert_eq!(world.step(), Step::Drop { node: NodeId(3), relied: nodes(&[1, 2, 4]) });
        // Its own only replica is copied too.
        let mut world = World::new(2, &[1], 1);
        world.node(1).draining = true;
        assert_eq!(world.step(), Step::Copy { to: NodeId(2), sources: nodes(&[1]), anew: false });
    }

    #[test]
    fn of_too_many_replicas_one_that_shares_its_host_goes() {
        let mut world = World::new(4, &[1, 2, 3, 4], 3);
        world.node(4).domain.host = "host2".to_owned();
        world.node(2).free = ByteLen(1);
        assert!(matches!(world.step(), Step::Drop { node: NodeId(2), .. }));
    }

    #[test]
    fn a_new_daemon_takes_replicas_of_the_fullest() {
        let mut world = World::new(4, &[1, 2, 3], 3);
        for (node, free) in [(1, 800), (2, 500), (3, 700), (4, 1900)] {
            world.node(node).free = ByteLen(free << 20);
        }
        assert!(is_uneven(&world.nodes));
        assert_eq!(world.urgency(), None, "nothing is wrong with it");
        let copy = world.step();
        assert_eq!(copy, Step::Copy { to: NodeId(4), sources: nodes(&[1, 2, 3]), anew: false });
        let mut moved = world.clone();
        moved.carry_out(&copy);
        assert_eq!(moved.step(), Step::Drop { node: NodeId(2), relied: nodes(&[1, 3, 4]) });
        // Not where it would share a host with one that stays; in the place of one it would share it with, it may.
        world.node(4).domain.host = "host1".to_owned();
        assert_eq!(world.step(), Step::Copy { to: NodeId(4), sources: nodes(&[1, 2, 3]), anew: false });
        world.node(1).free = ByteLen(1850 << 20);
        assert_eq!(world.step(), Step::Nothing, "the one that shares its host is as empty");
        // Nor for little.
        let mut world = World::new(4, &[1, 2, 3], 3);
        world.node(4).free = ByteLen(GIB + (200 << 20));
        assert!(!is_uneven(&world.nodes));
        assert_eq!(world.step(), Step::Nothing);
    }

    fn world() -> impl Strategy<Value = World> {
        let node = (0_u8..4, any::<bool>(), 0_u8..5, any::<bool>(), 1_u64..100, 0_u8..4);
        (prop::collection::vec(node, 1..7), 1_u32..4).prop_map(|(described, wanted)| {
            let mut world = World::new(described.len() as u64, &[], wanted);
            for (at, (health, draining, flaw, holds, full, host)) in (1..).zip(described) {
                world.node(at).free = ByteLen((100 - full) * (GIB / 50));
                world.node(at).domain.host = format!("host{host}");
                world.node(at).health =
                    [Health::Up, Health::Doubted, Health::Suspect, Health::Dead][usize::from(health)];
                world.node(at).draining = draining;
                if holds {
                    world.chunk.nodes.push(at);
                    if flaw < 2 {
                        world.flaw(at, flaw == 0);
                    }
                }
            }
            world
        })
    }

    proptest! {
        /// Steps come to an end, none lowers the number of solid replicas below what is wanted, none gives up the last
        /// readable one, and at the end nothing that could be done is left.
        #[test]
        fn steps_only_make_it_better_and_end(mut world in world()) {
            let solid = |world: &World| {
                let holders = world.holders();
                Replicas::new(&world.chunk, &holders, &world.flaws).solid().len()
            };
            for _ in 0..20 {
                let step = world.step();
                let before = solid(&world);
                match &step {
                    Step::Nothing => {
                        let open = world.nodes.iter().filter(|node| {
                            let listed = world.chunk.nodes.contains(&node.node.get());
                            node.is_open() && (!listed || world.flaws.contains_key(&node.node))
                        });
                        let sources = world.holders().into_iter().filter(|holder| {
                            let missing = world.flaws.get(&holder.node).is_some_and(|flaw| flaw.missing);
                            holder.health != Health::Dead && !missing
                        });
                        let (open, sources): (Vec<_>, Vec<_>) =
                            (open.map(|node| node.node).collect(), sources.map(|holder| holder.node).collect());
                        if matches!(world.urgency(), Some(Urgency::Lacking(_))) {
                            prop_assert!(open.is_empty() || sources.is_empty(), "{:?} could be copied to one of {open:?}", world);
                        }
                        return Ok(());
                    }
                    Step::Copy { to, sources, .. } => {
                        let lacking = matches!(world.urgency(), Some(Urgency::Lacking(_)));
                        prop_assert!(lacking || world.urgency().is_none());
                        let own = world.flaws.get(to).is_some_and(|flaw| !flaw.missing);
                        prop_assert!(!sources.contains(to) && (own || !sources.is_empty()));
                        let target = world.node(to.get()).clone();
                        prop_assert!(target.is_open());
                        world.carry_out(&step);
                        prop_assert_eq!(solid(&world), before + 1);
                    }
                    Step::Drop { node, relied } => {
                        prop_assert!(relied.len() >= world.chunk.wanted_replicas as usize);
                        prop_assert!(!relied.contains(node));
                        world.carry_out(&step);
                        prop_assert!(solid(&world) >= world.chunk.wanted_replicas as usize);
                    }
                }
            }
            prop_assert!(false, "no end: {world:?}");
        }
    }
}
