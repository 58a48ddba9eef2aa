//! Which sealed chunks are compacted, when, where to, and of what the new chunk is made.
//!
//! A chunk of which less than half is live goes: its live extents are copied into a new chunk, with those of others like it, as long
//! as they fit. Chunks that are still losing bytes wait for a while: what is removed in the meantime need not be copied.
//!
//! This file decides; `server/compacting.rs` reserves, orders and proposes.

use crate::placement::{Candidate, Health, Placement};
use crate::repair::Holder;
use dfs_proto::limits::{COMPACT_PATIENCE, COMPACT_RESTS_DOUBLED, GATHER_PIECES_MAX, GATHER_SOURCES_MAX};
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{ChunkState, ExtentRow, GatherPiece, Move};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, NodeId};
use std::collections::BTreeMap;
use std::time::Duration;

/// The most chunks that wait. What does not fit is found again by the census.
const WAITING_MAX: usize = 1 << 18;

/// Whether a chunk is to be compacted: it is sealed, and more of it is dead than alive. Without any live byte it is dropped instead.
#[must_use]
pub fn is_half_dead(chunk: &ChunkState) -> bool {
    chunk.phase() == Phase::Sealed && chunk.live > 0 && chunk.live.saturating_mul(2) < chunk.committed
}

/// Bytes that every replica of a chunk gives back when it is compacted.
#[must_use]
pub fn gain(chunk: &ChunkState) -> ByteLen {
    ByteLen(chunk.committed.saturating_sub(chunk.live))
}

/// What is known of a chunk that waits.
#[derive(Clone, Copy, Debug)]
struct Seen {
    live: u64,
    gain: ByteLen,
    /// When it was first found, and since when it has lost nothing.
    since: Duration,
    quiet: Duration,
    /// Until when it is left alone, as it could not be compacted.
    rests: Duration,
    /// How often it could not be compacted, and whether it is to blame for it.
    failures: u32,
    blamed: bool,
}

/// Half-dead chunks, as the census finds them.
#[derive(Default, Debug)]
pub struct Waiting(BTreeMap<ChunkId, Seen>);

impl Waiting {
    /// A chunk as it is now: it waits from now on, or does not any more. `now`: time since boot.
    pub fn note(&mut self, chunk: &ChunkState, now: Duration) {
        let id = ChunkId(chunk.chunk);
        if !is_half_dead(chunk) {
            self.0.remove(&id);
            return;
        }
        if self.0.len() >= WAITING_MAX && !self.0.contains_key(&id) {
            return;
        }
        let fresh = Seen {
            live: chunk.live,
            gain: gain(chunk),
            since: now,
            quiet: now,
            rests: Duration::ZERO,
            failures: 0,
            blamed: false,
        };
        let seen = self.0.entry(id).or_insert(fresh);
        if seen.live != chunk.live {
            (seen.live, seen.gain, seen.quiet) = (chunk.live, gain(chunk), now);
        }
    }

    /// It is compacted, or gone.
    pub fn forget(&mut self, chunk: ChunkId) {
        self.0.remove(&chunk);
    }

    /// It could not be compacted: it is left alone for so long, and for twice as long each time that it fails again. `blamed`: it
    /// may lack bytes.
    pub fn rest(&mut self, chunk: ChunkId, now: Duration, rest: Duration, blamed: bool) {
        if let Some(seen) = self.0.get_mut(&chunk) {
            seen.rests = now + rest * (1 << seen.failures.min(COMPACT_RESTS_DOUBLED));
            (seen.failures, seen.blamed) = (seen.failures.saturating_add(1), seen.blamed || blamed);
        }
    }

    /// Whether it may have been to blame that it could not be compacted: it goes alone, after the others.
    #[must_use]
    pub fn is_blamed(&self, chunk: ChunkId) -> bool {
        self.0.get(&chunk).is_some_and(|seen| seen.blamed)
    }

    /// How many wait, and how many bytes every one of their replicas would give back together.
    #[must_use]
    pub fn total(&self) -> (u64, u64) {
        (self.0.len() as u64, self.0.values().map(|seen| seen.gain.get()).sum())
    }

    /// The chunks whose turn it is, those first that never failed, and among them those that give back most. `after`: how long one must have lost nothing; one that goes on
    /// losing bytes is waited for [`COMPACT_PATIENCE`] times as long.
    #[must_use]
    pub fn ripe(&self, now: Duration, after: Duration) -> Vec<ChunkId> {
        let is_ripe = |seen: &Seen| {
            let waited = seen.quiet + after <= now || seen.since + after * COMPACT_PATIENCE <= now;
            waited && seen.rests <= now
        };
        let mut ripe: Vec<_> = self.0.iter().filter(|(_, seen)| is_ripe(seen)).collect();
        ripe.sort_by_key(|(id, seen)| (seen.failures > 0, std::cmp::Reverse(seen.gain), **id));
        ripe.into_iter().map(|(id, _)| *id).collect()
    }
}

/// Of these chunks the first, and others that fit into one of `capacity` bytes together with it and are to have as many replicas.
#[must_use]
pub fn together(chunks: Vec<ChunkState>, capacity: ByteLen) -> Vec<ChunkState> {
    let mut chosen: Vec<ChunkState> = Vec::new();
    let mut sum = 0;
    for chunk in chunks {
        let alike = chosen.first().is_none_or(|first| first.wanted_replicas == chunk.wanted_replicas);
        let fits = chosen.is_empty() || sum + chunk.live <= capacity.get();
        if alike && fits && chosen.len() < GATHER_SOURCES_MAX {
            sum += chunk.live;
            chosen.push(chunk);
        }
    }
    chosen
}

/// Where the new chunk's replicas go. Daemons that hold the first source make them of what they have; if these are not enough,
/// placement says. `good`: the most good replicas that any of the sources has; fewer than that, or than are wanted as long as there
/// are daemons, are not enough: None.
#[must_use]
pub fn targets(
    first: &ChunkState,
    holders: &[Holder],
    good: usize,
    candidates: &[Candidate],
    placement: &dyn Placement,
    length: ByteLen,
    random: &mut dyn FnMut() -> u64,
) -> Option<Vec<NodeId>> {
    let wanted = usize::try_from(first.wanted_replicas.max(1)).unwrap_or(usize::MAX);
    let open: Vec<Candidate> =
        candidates.iter().filter(|one| one.is_open() && one.free.get() >= length.get()).cloned().collect();
    let trusted =
        |holder: &&Holder| open.iter().any(|one| one.node == holder.node && one.health == Health::Up);
    let mut nodes: Vec<NodeId> = holders.iter().filter(trusted).map(|holder| holder.node).collect();
    if nodes.len() < wanted {
        nodes = placement.place(&open, &[], wanted, length, random).ok()?;
    }
    nodes.truncate(wanted);
    (nodes.len() >= wanted.min(open.len()) && nodes.len() >= good.min(wanted) && !nodes.is_empty())
        .then_some(nodes)
}

/// What the new chunk is made of, and where its extents come from.
#[derive(Default, Debug)]
pub struct Recipe {
    pub pieces: Vec<GatherPiece>,
    pub moves: Vec<Move>,
    pub length: u64,
}

impl Recipe {
    /// Adds an extent of the source at this place in the list of sources. False: there is no room for more.
    pub fn add(
        &mut self,
        source: u32,
        chunk: ChunkId,
        at: ByteOffset,
        extent: &ExtentRow,
        limit: ByteLen,
    ) -> bool {
        let fits = self.length == 0 || self.length + extent.length <= limit.get();
        if !fits || self.pieces.len() >= GATHER_PIECES_MAX {
            return false;
        }
        self.pieces.push(GatherPiece {
            source,
            offset: at.get(),
            length: extent.length,
            ino: extent.first_ino,
            file_offset: extent.first_offset,
        });
        self.moves.push(Move {
            chunk: chunk.get(),
            extent: at.get(),
            length: extent.length,
            to_offset: self.length,
        });
        self.length += extent.length;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::{Domain, Spread};

    fn chunk(id: u64, live: u64, committed: u64) -> ChunkState {
        let phase = Phase::Sealed.into();
        ChunkState { chunk: id, live, committed, phase, wanted_replicas: 3, ..ChunkState::default() }
    }

    fn ids(ids: &[u64]) -> Vec<ChunkId> {
        ids.iter().copied().map(ChunkId).collect()
    }

    const AFTER: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(1000 + seconds)
    }

    #[test]
    fn less_than_half_live_and_sealed() {
        assert!(is_half_dead(&chunk(1, 49, 100)) && !is_half_dead(&chunk(1, 50, 100)));
        assert!(!is_half_dead(&chunk(1, 0, 100)), "it is dropped");
        let open = ChunkState { phase: Phase::Open.into(), ..chunk(1, 10, 100) };
        assert!(!is_half_dead(&open));
    }

    #[test]
    fn a_chunk_that_is_losing_bytes_waits_but_not_for_ever() {
        let mut waiting = Waiting::default();
        waiting.note(&chunk(1, 40, 100), at(0));
        waiting.note(&chunk(2, 10, 100), at(0));
        assert_eq!((waiting.ripe(at(9), AFTER), waiting.total()), (vec![], (2, 150)));
        waiting.note(&chunk(1, 30, 100), at(9));
        waiting.note(&chunk(2, 10, 100), at(9));
        assert_eq!(waiting.ripe(at(10), AFTER), ids(&[2]));
        assert_eq!(waiting.ripe(at(19), AFTER), ids(&[2, 1]), "the one first that gives back more");
        for second in 10..60 {
            waiting.note(&chunk(1, 100 - second, 1000), at(second));
        }
        assert_eq!(waiting.ripe(at(59), AFTER), ids(&[2]));
        assert_eq!(waiting.ripe(at(60), AFTER), ids(&[1, 2]));
        waiting.rest(ChunkId(1), at(60), AFTER, true);
        assert!(waiting.is_blamed(ChunkId(1)) && !waiting.is_blamed(ChunkId(2)));
        assert_eq!((waiting.ripe(at(60), AFTER), waiting.ripe(at(70), AFTER)), (ids(&[2]), ids(&[2, 1])));
        waiting.rest(ChunkId(1), at(70), AFTER, false);
        assert_eq!((waiting.ripe(at(80), AFTER), waiting.ripe(at(90), AFTER)), (ids(&[2]), ids(&[2, 1])));
        // One that needs nothing any more does not wait.
        waiting.note(&chunk(2, 0, 100), at(70));
        waiting.forget(ChunkId(1));
        assert_eq!(waiting.total(), (0, 0));
    }

    #[test]
    fn chunks_that_fit_into_one_and_want_the_same_are_taken_together() {
        let other = ChunkState { wanted_replicas: 2, ..chunk(3, 10, 100) };
        let all = vec![chunk(1, 40, 100), chunk(2, 30, 100), other, chunk(4, 40, 100), chunk(5, 20, 100)];
        let chosen: Vec<u64> = together(all, ByteLen(100)).iter().map(|chunk| chunk.chunk).collect();
        assert_eq!(chosen, [1, 2, 5]);
        assert_eq!(together(vec![chunk(1, 400, 1000)], ByteLen(100)).len(), 1, "it may be a larger one");
    }

    fn node(node: u64) -> Candidate {
        Candidate {
            node: NodeId(node),
            domain: Domain { host: format!("host{node}"), rack: String::new() },
            free: ByteLen(1 << 30),
            total: ByteLen(2 << 30),
            health: Health::Up,
            draining: false,
        }
    }

    fn holder(node: u64) -> Holder {
        Holder {
            node: NodeId(node),
            domain: Domain { host: format!("host{node}"), rack: String::new() },
            health: Health::Up,
            draining: false,
            reported: true,
            fill: 500,
        }
    }

    #[test]
    fn the_new_chunk_is_made_where_its_bytes_are_and_never_of_fewer_replicas_than_there_were() {
        let (first, holders) = (chunk(1, 10, 100), [holder(2), holder(3), holder(4)]);
        let choose = |candidates: &[Candidate], good| {
            let mut random = || 1 << 63;
            targets(&first, &holders, good, candidates, &Spread, ByteLen(10), &mut random)
        };
        let mut nodes: Vec<Candidate> = (1..=4).map(node).collect();
        assert_eq!(choose(&nodes, 3), Some(vec![NodeId(2), NodeId(3), NodeId(4)]));
        nodes[1].draining = true;
        let mut elsewhere = choose(&nodes, 3).expect("there are three");
        elsewhere.sort();
        assert_eq!(elsewhere, [NodeId(1), NodeId(3), NodeId(4)]);
        // A suspect daemon usually comes back: the chunk has three good replicas, so two are too few.
        nodes[0].health = Health::Suspect;
        assert_eq!(choose(&nodes, 3), None);
        assert_eq!(choose(&nodes, 2).map(|nodes| nodes.len()), Some(2), "there is no third daemon");
        nodes.iter_mut().for_each(|node| node.free = ByteLen(9));
        assert_eq!(choose(&nodes, 0), None, "none has room");
    }

    #[test]
    fn a_recipe_lays_extents_one_after_the_other_up_to_its_limit() {
        let mut recipe = Recipe::default();
        let row = |length| ExtentRow { length, has_first: true, first_ino: 9, first_offset: 3, others: 0 };
        let limit = ByteLen(100);
        assert!(recipe.add(0, ChunkId(1), ByteOffset(50), &row(60), limit));
        assert!(recipe.add(1, ChunkId(2), ByteOffset(0), &row(40), limit));
        assert!(!recipe.add(1, ChunkId(2), ByteOffset(70), &row(1), limit));
        assert_eq!((recipe.length, recipe.pieces.len()), (100, 2));
        assert_eq!(recipe.moves[1], Move { chunk: 2, extent: 0, length: 40, to_offset: 60 });
        assert_eq!(
            recipe.pieces[0],
            GatherPiece { source: 0, offset: 50, length: 60, ino: 9, file_offset: 3 }
        );
        assert!(Recipe::default().add(0, ChunkId(1), ByteOffset(0), &row(101), limit), "one always fits");
    }
}
