//! Where replicas go.
//!
//! Replicas go to distinct racks as long as there are any, then to distinct hosts, then to distinct daemons; among those
//! to a random one, weighted by free space, so that a new daemon fills faster without taking every write at once. Suspect
//! and dead daemons and those that are drained get nothing; one that is merely doubted gets something only when there
//! would be too few replicas without it.
//! With fewer daemons than wanted a chunk gets as many replicas as there are.

use dfs_proto::limits::RECORD_MAX;
use dfs_proto::{ByteLen, NodeId};

/// Whether a daemon can be relied on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Health {
    Up,
    /// It lives, but a client could not append to it lately.
    Doubted,
    Suspect,
    Dead,
}

impl Health {
    /// As `dfs status` shows it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Up | Self::Doubted => "up",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
        }
    }
}

/// What may fail together.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Domain {
    pub host: String,
    /// Empty: of no rack in particular.
    pub rack: String,
}

/// A daemon as placement sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Candidate {
    pub node: NodeId,
    pub domain: Domain,
    pub free: ByteLen,
    pub total: ByteLen,
    pub health: Health,
    pub draining: bool,
}

impl Candidate {
    /// How full it is, in thousandths.
    #[must_use]
    pub fn fill(&self) -> u64 {
        fill(self.free, self.total)
    }

    /// Whether it takes new replicas.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.health <= Health::Doubted && !self.draining
    }
}

/// How full something is, in thousandths; without any space it is full.
#[must_use]
pub fn fill(free: ByteLen, total: ByteLen) -> u64 {
    if total.get() == 0 {
        return 1000;
    }
    let free = u128::from(free.get().min(total.get())) * 1000 / u128::from(total.get());
    1000 - u64::try_from(free).unwrap_or(1000)
}

/// Why there is no place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoPlace {
    #[error("no chunk daemon is up")]
    NoNodes,
    #[error("every chunk daemon is full")]
    Full,
}

/// Chooses daemons.
pub trait Placement: Send + Sync + 'static {
    /// Distinct daemons for `replicas` more replicas of one chunk: at least one, the first to be written first. `beside`:
    /// where it has replicas that stay; their daemons are no candidates. `random` is asked for each choice.
    ///
    /// # Errors
    /// When no daemon is up, or none has space.
    fn place(
        &self,
        candidates: &[Candidate],
        beside: &[Domain],
        replicas: usize,
        capacity: ByteLen,
        random: &mut dyn FnMut() -> u64,
    ) -> Result<Vec<NodeId>, NoPlace>;
}

/// Distinct racks first, then distinct hosts, weighted by free space.
pub struct Spread;

impl Placement for Spread {
    fn place(
        &self,
        candidates: &[Candidate],
        beside: &[Domain],
        replicas: usize,
        capacity: ByteLen,
        random: &mut dyn FnMut() -> u64,
    ) -> Result<Vec<NodeId>, NoPlace> {
        let mut up: Vec<&Candidate> = candidates.iter().filter(|c| c.is_open()).collect();
        if up.is_empty() {
            return Err(NoPlace::NoNodes);
        }
        // Few chunks are ever filled, so a daemon takes one as long as it has space for a record; the weights keep
        // nearly full ones rare.
        let least = capacity.get().min(RECORD_MAX as u64);
        up.retain(|c| c.free.get() >= least);
        if up.is_empty() {
            return Err(NoPlace::Full);
        }
        let mut chosen: Vec<&Candidate> = Vec::with_capacity(replicas);
        while chosen.len() < replicas.max(1) && !up.is_empty() {
            let taken: Vec<&Domain> = beside.iter().chain(chosen.iter().map(|c| &c.domain)).collect();
            let host = |at: &usize| taken.iter().all(|domain| domain.host != up[*at].domain.host);
            let rack = |at: &usize| taken.iter().all(|domain| domain.rack != up[*at].domain.rack);
            let trusted = |at: &usize| up[*at].health == Health::Up;
            let choices: [&dyn Fn(&usize) -> bool; 6] = [
                &|at| trusted(at) && host(at) && rack(at),
                &|at| trusted(at) && host(at),
                &trusted,
                &|at| host(at) && rack(at),
                &host,
                &|_| true,
            ];
            let pools = choices.into_iter().map(|fits| (0..up.len()).filter(fits).collect::<Vec<_>>());
            let Some(pool) = pools.into_iter().find(|pool| !pool.is_empty()) else { break };
            let at = weighted(&pool, |at| up[at].free.get(), random());
            chosen.push(up.remove(at));
        }
        Ok(chosen.into_iter().map(|c| c.node).collect())
    }
}

/// One of the indices in `pool`, which is not empty, with a chance in proportion to its weight.
fn weighted(pool: &[usize], weight: impl Fn(usize) -> u64, random: u64) -> usize {
    let weight = |at: &usize| u128::from(weight(*at).max(1));
    let total: u128 = pool.iter().map(weight).sum();
    // `random` is uniform over 2^64: scale it to the total without losing the small weights.
    let mut point = (u128::from(random) * (total >> 32)) >> 32;
    if total >> 32 == 0 {
        point = (u128::from(random) * total) >> 64;
    }
    for at in pool {
        let w = weight(at);
        if point < w {
            return *at;
        }
        point -= w;
    }
    pool[pool.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn candidate(node: u64, host: &str, free: u64, health: Health) -> Candidate {
        let domain = Domain { host: host.to_owned(), rack: String::new() };
        let (free, total, draining) = (ByteLen(free), ByteLen(100 * GIB), false);
        Candidate { node: NodeId(node), domain, free, total, health, draining }
    }

    fn place(nodes: &[Candidate], replicas: usize, seed: u64) -> Result<Vec<NodeId>, NoPlace> {
        Spread.place(nodes, &[], replicas, CHUNK, &mut numbers(seed))
    }

    fn numbers(seed: u64) -> impl FnMut() -> u64 {
        let mut state = seed;
        move || {
            // SplitMix64 (Steele, Lea, Flood 2014).
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
    }

    const GIB: u64 = 1 << 30;
    const CHUNK: ByteLen = ByteLen(64 << 20);

    #[test]
    fn replicas_share_a_host_only_when_there_are_too_few_hosts() {
        let nodes = [
            candidate(1, "a", 100 * GIB, Health::Up),
            candidate(2, "a", 100 * GIB, Health::Up),
            candidate(3, "b", GIB, Health::Up),
        ];
        for seed in 0..100 {
            let two = place(&nodes, 2, seed).expect("there is space");
            assert!(two.contains(&NodeId(3)), "{two:?}");
            let three = place(&nodes, 3, seed).expect("there is space");
            assert_eq!(three.len(), 3);
        }
    }

    #[test]
    fn racks_come_before_hosts_and_replicas_that_stay_count() {
        let mut nodes: Vec<Candidate> = ["a", "b", "c", "d"]
            .iter()
            .zip(1..)
            .map(|(host, node)| candidate(node, host, GIB, Health::Up))
            .collect();
        for (node, rack) in nodes.iter_mut().zip(["left", "left", "left", "right"]) {
            rack.clone_into(&mut node.domain.rack);
        }
        for seed in 0..50 {
            assert!(place(&nodes, 2, seed).expect("there is space").contains(&NodeId(4)));
            let one = Spread.place(&nodes[..3], &[nodes[3].domain.clone()], 1, CHUNK, &mut numbers(seed));
            assert!(one.is_ok(), "the other rack");
            let beside = [nodes[0].domain.clone(), nodes[3].domain.clone()];
            let third = Spread.place(&nodes[1..3], &beside, 1, CHUNK, &mut numbers(seed)).expect("a place");
            assert!([NodeId(2), NodeId(3)].contains(&third[0]));
        }
        nodes[3].draining = true;
        assert!(!place(&nodes, 4, 1).expect("there is space").contains(&NodeId(4)), "it is drained");
    }

    #[test]
    fn suspect_and_dead_daemons_get_nothing() {
        let nodes = [
            candidate(1, "a", GIB, Health::Suspect),
            candidate(2, "b", GIB, Health::Dead),
            candidate(3, "c", GIB, Health::Up),
        ];
        assert_eq!(place(&nodes, 3, 1), Ok(vec![NodeId(3)]));
        assert_eq!(place(&nodes[..2], 3, 1), Err(NoPlace::NoNodes));
    }

    #[test]
    fn a_doubted_daemon_is_used_only_when_there_are_too_few_others() {
        let mut nodes = vec![
            candidate(1, "a", GIB, Health::Up),
            candidate(2, "b", GIB, Health::Doubted),
            candidate(3, "c", GIB, Health::Up),
        ];
        for seed in 0..50 {
            let two = place(&nodes, 2, seed).expect("there is space");
            assert!(!two.contains(&NodeId(2)), "{two:?}");
            let three = place(&nodes, 3, seed).expect("there is space");
            assert_eq!(three[2], NodeId(2), "last, so that it leads no chain");
        }
        nodes.truncate(2);
        nodes[0].health = Health::Dead;
        assert_eq!(place(&nodes, 3, 1), Ok(vec![NodeId(2)]));
    }

    #[test]
    fn full_daemons_get_nothing_and_empty_ones_get_more() {
        let full = [candidate(1, "a", 0, Health::Up), candidate(2, "b", 1000, Health::Up)];
        assert_eq!(place(&full, 2, 1), Err(NoPlace::Full));
        assert_eq!(Spread.place(&full, &[], 2, ByteLen(8), &mut numbers(1)), Ok(vec![NodeId(2)]));
        let nodes = [candidate(1, "a", 30 * GIB, Health::Up), candidate(2, "b", 10 * GIB, Health::Up)];
        let mut random = numbers(7);
        let first = (0..1000)
            .filter(|_| Spread.place(&nodes, &[], 1, CHUNK, &mut random) == Ok(vec![NodeId(1)]))
            .count();
        assert!((700..800).contains(&first), "{first} of 1000");
    }

    proptest! {
        #[test]
        fn places_are_distinct_healthy_and_as_many_as_possible(
            nodes in prop::collection::vec((0_u8..4, 0_u64..4 * GIB, 0_u8..3), 0..12),
            replicas in 1_usize..6,
            seed: u64,
        ) {
            let nodes: Vec<Candidate> = nodes.into_iter().enumerate().map(|(at, (host, free, health))| {
                let health = [Health::Up, Health::Suspect, Health::Dead][usize::from(health)];
                candidate(at as u64, &format!("host{host}"), free, health)
            }).collect();
            let usable: Vec<&Candidate> = nodes.iter()
                .filter(|c| c.health == Health::Up && c.free.get() >= 1 << 20).collect();
            match place(&nodes, replicas, seed) {
                Err(_) => prop_assert!(usable.is_empty()),
                Ok(places) => {
                    let distinct: BTreeSet<NodeId> = places.iter().copied().collect();
                    prop_assert_eq!(distinct.len(), places.len());
                    prop_assert_eq!(places.len(), replicas.min(usable.len()));
                    let host = |node: &NodeId| usable.iter().find(|c| c.node == *node).map(|c| &c.domain.host);
                    prop_assert!(places.iter().all(|node| host(node).is_some()));
                    let hosts: BTreeSet<_> = usable.iter().map(|c| &c.domain.host).collect();
                    let used: BTreeSet<_> = places.iter().filter_map(host).collect();
                    prop_assert_eq!(used.len(), replicas.min(hosts.len()));
                }
            }
        }
    }
}
