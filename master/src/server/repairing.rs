//! Carries out [`crate::repair`]'s decisions: the most urgent chunks first, a bounded number of copies at once.
//!
//! Whoever changes which replicas of a sealed chunk count, or has one deleted, *claims* the chunk first: so no daemon is told
//! to delete what another job has just begun to count.

use super::Gone;
use super::jobs::Job;
use super::nodes::OrderError;
use super::term::Term;
use crate::placement::{Candidate, Health};
use crate::repair::{Flaw, Replicas, Step, Urgency};
use dfs_proto::limits::{COPIES_PER_NODE, COPY_WAIT_MS, SLOWEST_COPY};
use dfs_proto::v1::{self, ChunkState, ErrorCode, chunk_state::Phase, order, system};
use dfs_proto::{ByteLen, ChunkId, NodeId};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// The most chunks that wait. What does not fit is found again by the census.
const WAITING_MAX: usize = 1 << 20;
/// The most steps carried out at once; how many of them are copies depends on the number of daemons.
const STEPS_AT_ONCE: usize = 256;
/// How many chunks may wait when one that is merely in an uneven place is added.
const MOVES_MAX: usize = 64;
/// Of how many chunks the next step is worked out before it is seen that no daemon can take a copy now.
const TRIES: usize = 32;
/// How many times in a row that many are looked at.
const ROUNDS: usize = 8;
/// How often it is looked whether a daemon that is copying still lives.
const LOOK: Duration = Duration::from_secs(1);
/// How long a chunk is left alone that could not be copied.
const REST: Duration = Duration::from_secs(10);
/// How often a chunk is asked for that somebody else has claimed.
const CLAIM_RETRY: Duration = Duration::from_millis(50);
/// Over how long the rate is measured.
const RATE_OVER: Duration = Duration::from_secs(10);

/// What is known of replicas and being done about them, in the leader's memory. After a failover it is found again: daemons
/// report what they have, the census looks at every chunk.
#[derive(Default)]
pub struct Repairs {
    inner: Mutex<Inner>,
    wake: Notify,
}

#[derive(Default)]
struct Inner {
    waiting: BTreeSet<(Urgency, ChunkId)>,
    urgency: BTreeMap<ChunkId, Urgency>,
    claimed: BTreeSet<ChunkId>,
    /// Chunks that could not be copied, and until when they are left alone.
    resting: BTreeMap<ChunkId, Duration>,
    flaws: BTreeMap<ChunkId, BTreeMap<NodeId, Flaw>>,
    /// Copies that each daemon makes now.
    busy: BTreeMap<NodeId, usize>,
    copied: u64,
    copied_bytes: u64,
    failed: u64,
    /// When lately how many bytes were copied.
    lately: VecDeque<(Duration, u64)>,
    closed: bool,
}

/// How far repair is.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Progress {
    pub waiting: u64,
    pub copying: u64,
    /// Since this master was elected.
    pub copied: u64,
    pub copied_bytes: u64,
    pub failed: u64,
    pub bytes_per_second: u64,
    /// Replicas that are known to be damaged or missing.
    pub flaws: u64,
}

/// Nobody else changes the chunk's replicas while this lives.
pub struct Claim<'a> {
    repairs: &'a Repairs,
    chunk: ChunkId,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.repairs.inner().claimed.remove(&self.chunk);
        self.repairs.wake.notify_one();
    }
}

impl Repairs {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims a chunk once nobody else does; None when that takes too long.
    pub async fn claimed(&self, chunk: ChunkId, deadline: Instant) -> Option<Claim<'_>> {
        loop {
            if let Some(claim) = self.claim(chunk) {
                return Some(claim);
            }
            let soon = deadline.min(Instant::now() + CLAIM_RETRY);
            if soon == deadline {
                return None;
            }
            tokio::time::sleep_until(soon).await;
        }
    }

    /// Claims a chunk; None while somebody else does.
    pub fn claim(&self, chunk: ChunkId) -> Option<Claim<'_>> {
        // Not `then_some`: a claim that is made in vain would end the other one.
        let free = self.inner().claimed.insert(chunk);
        free.then(|| Claim { repairs: self, chunk })
    }

    /// A chunk is to be looked at.
    pub fn add(&self, chunk: ChunkId, urgency: Urgency, now: Duration) {
        let mut inner = self.inner();
        match inner.resting.get(&chunk) {
            Some(until) if now < *until => return,
            Some(_) => drop(inner.resting.remove(&chunk)),
            None => {}
        }
        if let Some(old) = inner.urgency.insert(chunk, urgency) {
            inner.waiting.remove(&(old, chunk));
        } else if inner.urgency.len() > WAITING_MAX {
            inner.urgency.remove(&chunk);
            return;
        }
        inner.waiting.insert((urgency, chunk));
        drop(inner);
        self.wake.notify_one();
    }

    /// A replica is damaged or not there. True: that is news.
    pub fn flawed(&self, chunk: ChunkId, node: NodeId, missing: bool) -> bool {
        let mut inner = self.inner();
        let flaws = inner.flaws.entry(chunk).or_default();
        let hopeless = flaws.get(&node).is_some_and(|flaw| flaw.hopeless);
        flaws.insert(node, Flaw { missing, hopeless }) != Some(Flaw { missing, hopeless })
    }

    /// What is known against a chunk's replicas.
    pub fn flaws(&self, chunk: ChunkId) -> BTreeMap<NodeId, Flaw> {
        self.inner().flaws.get(&chunk).cloned().unwrap_or_default()
    }

    /// How many replicas of each daemon something is known against.
    pub fn flaws_by_node(&self) -> BTreeMap<NodeId, u64> {
        let mut count = BTreeMap::new();
        for node in self.inner().flaws.values().flat_map(BTreeMap::keys) {
            *count.entry(*node).or_default() += 1;
        }
        count
    }

    /// A daemon has a replica that was thought to be missing.
    pub fn is_there(&self, chunk: ChunkId, node: NodeId) {
        if self.flaws(chunk).get(&node).is_some_and(|flaw| flaw.missing) {
            self.mended(chunk, node);
        }
    }

    /// Nothing is known against a replica any more: it was made anew, dropped, or found good.
    pub fn mended(&self, chunk: ChunkId, node: NodeId) {
        let mut inner = self.inner();
        if let Some(flaws) = inner.flaws.get_mut(&chunk) {
            flaws.remove(&node);
            if flaws.is_empty() {
                inner.flaws.remove(&chunk);
            }
        }
    }

    /// A daemon could not make its replica anew.
    fn hopeless(&self, chunk: ChunkId, node: NodeId) {
        let mut inner = self.inner();
        if let Some(flaw) = inner.flaws.get_mut(&chunk).and_then(|flaws| flaws.get_mut(&node)) {
            flaw.hopeless = true;
        }
    }

    /// A daemon is back: what it could not do before it may be able to do now.
    pub fn returned(&self, node: NodeId) {
        let mut inner = self.inner();
        inner.resting.clear();
        for flaws in inner.flaws.values_mut() {
            if let Some(flaw) = flaws.get_mut(&node) {
                flaw.hopeless = false;
            }
        }
    }

    /// The most urgent chunks that nobody has claimed.
    fn first(&self) -> Vec<ChunkId> {
        let inner = self.inner();
        let free = inner.waiting.iter().filter(|(_, chunk)| !inner.claimed.contains(chunk));
        free.take(TRIES).map(|(_, chunk)| *chunk).collect()
    }

    /// Nothing can be done for a chunk: it is left alone for a while.
    fn rest(&self, chunk: ChunkId, now: Duration) {
        self.forget(chunk);
        self.inner().resting.insert(chunk, now + REST);
    }

    /// A chunk was dropped: nothing about it matters any more.
    pub fn dropped(&self, chunk: ChunkId) {
        self.forget(chunk);
        let mut inner = self.inner();
        inner.flaws.remove(&chunk);
        inner.resting.remove(&chunk);
    }

    /// Once in a while: what was left alone long enough is not remembered for ever.
    pub fn tidy(&self, now: Duration) {
        self.inner().resting.retain(|_, until| *until > now);
    }

    fn forget(&self, chunk: ChunkId) {
        let mut inner = self.inner();
        if let Some(urgency) = inner.urgency.remove(&chunk) {
            inner.waiting.remove(&(urgency, chunk));
        }
    }

    fn has_slot(&self, node: NodeId) -> bool {
        self.inner().busy.get(&node).is_none_or(|copies| *copies < COPIES_PER_NODE)
    }

    fn begin(&self, node: NodeId) {
        *self.inner().busy.entry(node).or_default() += 1;
    }

    /// A copy ended; of how many bytes, if it was made.
    fn end(&self, chunk: ChunkId, node: NodeId, now: Duration, bytes: Option<u64>) {
        let mut inner = self.inner();
        if let Some(copies) = inner.busy.get_mut(&node) {
            *copies -= 1;
            if *copies == 0 {
                inner.busy.remove(&node);
            }
        }
        match bytes {
            Some(bytes) => {
                inner.copied += 1;
                inner.copied_bytes += bytes;
                inner.lately.push_back((now, bytes));
                while inner.lately.front().is_some_and(|(then, _)| *then + RATE_OVER < now) {
                    inner.lately.pop_front();
                }
            }
            None => {
                inner.failed += 1;
                inner.resting.insert(chunk, now + REST);
            }
        }
    }

    /// How far repair is.
    pub fn progress(&self, now: Duration) -> Progress {
        let inner = self.inner();
        let lately = inner.lately.iter().filter(|(then, _)| *then + RATE_OVER >= now);
        Progress {
            waiting: inner.waiting.len() as u64,
            copying: inner.busy.values().map(|copies| *copies as u64).sum(),
            copied: inner.copied,
            copied_bytes: inner.copied_bytes,
            failed: inner.failed,
            bytes_per_second: lately.map(|(_, bytes)| bytes).sum::<u64>() / RATE_OVER.as_secs(),
            flaws: inner.flaws.values().map(|flaws| flaws.len() as u64).sum(),
        }
    }

    /// The term is over.
    pub fn close(&self) {
        self.inner().closed = true;
        self.wake.notify_one();
    }
}

/// Repairs until the term ends.
pub async fn run(term: Arc<Term>) {
    let repairs = &term.repairs;
    let mut running = FuturesUnordered::new();
    loop {
        if repairs.inner().closed {
            return;
        }
        while running.len() < STEPS_AT_ONCE
            && let Some((chunk, claim, step)) = next(&term)
        {
            if let Step::Copy { to, .. } = &step {
                repairs.begin(*to);
                term.nodes.expect(*to, i64::try_from(chunk.committed).unwrap_or(i64::MAX));
            }
            running.push(carry_out(&term, chunk, claim, step));
        }
        tokio::select! {
            Some(result) = running.next(), if !running.is_empty() => {
                if result.is_err() {
                    return;
                }
            }
            () = repairs.wake.notified() => {}
        }
    }
}

/// The next thing to do. Chunks that need nothing, or for which nothing can be done, leave the queue: the census finds them
/// again. Those for which every daemon is busy stay.
fn next(term: &Term) -> Option<(ChunkState, Claim<'_>, Step)> {
    let repairs = &term.repairs;
    let candidates = term.nodes.candidates();
    let (free, all_free) = {
        let free: Vec<_> = candidates.iter().filter(|one| repairs.has_slot(one.node)).cloned().collect();
        let all_free = free.len() == candidates.len();
        (free, all_free)
    };
    for _ in 0..ROUNDS {
        let (step, forgotten) = first_step(term, &candidates, &free, all_free);
        if step.is_some() || !forgotten {
            return step;
        }
    }
    // There may be very many of which nothing is to be done: copies that are being made are looked at in between.
    repairs.wake.notify_one();
    None
}

/// Goes through the most urgent chunks: a step, and whether any of them left the queue without one.
fn first_step<'a>(
    term: &'a Term,
    candidates: &[Candidate],
    free: &[Candidate],
    all_free: bool,
) -> (Option<(ChunkState, Claim<'a>, Step)>, bool) {
    let (repairs, mut forgotten) = (&term.repairs, false);
    for id in repairs.first() {
        let Some(chunk) = sealed(term, id) else {
            repairs.forget(id);
            forgotten = true;
            continue;
        };
        let (holders, flaws) = (term.nodes.holders(&chunk), repairs.flaws(id));
        let mut random = || term.shared.env.random();
        let capacity = ByteLen(chunk.committed);
        let replicas = Replicas::new(&chunk, &holders, &flaws);
        match replicas.next(free, &*term.placement, capacity, &mut random) {
            Step::Nothing => {
                let busy = !all_free
                    && replicas.next(candidates, &*term.placement, capacity, &mut random) != Step::Nothing;
                if !busy {
                    match replicas.urgency() {
                        // The census comes by sooner than anything about it changes, and there may be many.
                        Some(_) => repairs.rest(id, term.now()),
                        None => repairs.forget(id),
                    }
                    forgotten = true;
                }
            }
            step => {
                // Somebody else may have claimed it this very moment; it is looked at again then.
                let Some(claim) = repairs.claim(id) else { continue };
                repairs.forget(id);
                return (Some((chunk, claim, step)), forgotten);
            }
        }
    }
    (None, forgotten)
}

/// A sealed chunk with bytes that somebody needs, as applied.
fn sealed(term: &Term, id: ChunkId) -> Option<ChunkState> {
    super::sealing::read(term, id).filter(|chunk| chunk.phase() == Phase::Sealed && chunk.live > 0)
}

async fn carry_out(term: &Term, chunk: ChunkState, claim: Claim<'_>, step: Step) -> Result<(), Gone> {
    let id = ChunkId(chunk.chunk);
    let again = match step {
        Step::Copy { to, sources, anew } => {
            let copied = copy(term, &chunk, to, &sources, anew).await;
            let bytes = copied.then_some(chunk.committed);
            term.repairs.end(id, to, term.now(), bytes);
            copied && count(term, &chunk, to).await?
        }
        Step::Drop { node, relied } => drop_replica(term, id, node, &relied).await?,
        Step::Nothing => false,
    };
    drop(claim);
    if again {
        consider(term, id);
    }
    Ok(())
}

/// Has a daemon make a replica. Bounded by the chunk's length, and by the daemon's life.
async fn copy(term: &Term, chunk: &ChunkState, to: NodeId, sources: &[NodeId], anew: bool) -> bool {
    let id = ChunkId(chunk.chunk);
    let op = order::Op::Copy(v1::CopyOrder {
        chunk: chunk.chunk,
        epoch: chunk.epoch,
        length: chunk.committed,
        capacity: chunk.capacity,
        sources: sources.iter().filter_map(|node| term.nodes.address(*node)).collect(),
        bytes_per_second: term.shared.settings.repair_bandwidth,
        anew,
    });
    let wait = bytes_wait(chunk.committed, term.shared.settings.repair_bandwidth);
    match order_within(term, to, &op, wait).await {
        Ok(_) => {
            tracing::info!(chunk = %id, node = hex(to), length = chunk.committed, anew, "a replica was made");
            true
        }
        Err(error) => {
            tracing::warn!(chunk = %id, node = hex(to), %error, "a replica could not be made");
            // Its disk may have failed, or be full: next time another daemon is asked. Sources that fail are not its fault.
            if let OrderError::Refused(error) = &error
                && matches!(error.code, ErrorCode::ErrorIo | ErrorCode::ErrorNoSpace)
            {
                term.repairs.hopeless(id, to);
            }
            false
        }
    }
}

/// How long something may take that moves so many bytes, at most `limit` of them a second (0: no limit) together with others.
pub fn bytes_wait(bytes: u64, limit: u64) -> Duration {
    let slowest = match limit {
        0 => SLOWEST_COPY,
        limit => SLOWEST_COPY.min(limit / (2 * COPIES_PER_NODE as u64)).max(1),
    };
    Duration::from_millis(COPY_WAIT_MS) + Duration::from_secs(bytes / slowest)
}

/// Orders something that takes a while. Bounded by that, and by the daemon's life.
pub async fn order_within(
    term: &Term,
    to: NodeId,
    op: &order::Op,
    wait: Duration,
) -> Result<v1::OrderDone, OrderError> {
    let ordered = term.nodes.order(term.number, to, op, Instant::now() + wait);
    let dead = async {
        while term.nodes.health(to) != Health::Dead {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        result = ordered => result,
        () = dead => Err(OrderError::Away),
    }
}

/// A daemon has a whole replica: it counts. True: the chunk is to be looked at again.
async fn count(term: &Term, chunk: &ChunkState, node: NodeId) -> Result<bool, Gone> {
    let id = ChunkId(chunk.chunk);
    if !chunk.nodes.contains(&node.get()) {
        let add = v1::AddReplica { chunk: chunk.chunk, node: node.get() };
        if let Err(error) = term.shared.system(system::Op::AddReplica(add)).await? {
            // The chunk may have been dropped meanwhile; what was copied is found by the next report.
            tracing::info!(chunk = %id, node = hex(node), %error, "a replica was made but not counted");
            term.jobs.add(Job::Delete { node, chunk: id }, false);
            return Ok(false);
        }
    }
    term.repairs.mended(id, node);
    Ok(true)
}

/// A replica counts no more, and its daemon is told. True: the chunk is to be looked at again.
async fn drop_replica(term: &Term, id: ChunkId, node: NodeId, relied: &[NodeId]) -> Result<bool, Gone> {
    // They say that they have it, now; a seal of what is sealed changes nothing.
    let asked = relied.iter().map(|other| super::sealing::is_there(term, id, *other));
    if futures::future::join_all(asked).await.contains(&false) {
        if term.repairs.flaws(id).is_empty() {
            term.repairs.rest(id, term.now());
            return Ok(false);
        }
        return Ok(true);
    }
    let relied = relied.iter().map(|node| node.get()).collect();
    let drop = v1::DropReplica { chunk: id.get(), node: node.get(), relied };
    if let Err(error) = term.shared.system(system::Op::DropReplica(drop)).await? {
        tracing::info!(chunk = %id, node = hex(node), %error, "a replica was not dropped");
        return Ok(false);
    }
    tracing::info!(chunk = %id, node = hex(node), "a replica counts no more");
    term.repairs.mended(id, node);
    if let Some(chunk) = super::sealing::read(term, id) {
        term.nodes.expect(node, -i64::try_from(chunk.committed).unwrap_or(i64::MAX));
    }
    term.jobs.add(Job::Delete { node, chunk: id }, false);
    Ok(true)
}

/// A daemon as `dfs node ls` shows it.
pub fn hex(node: NodeId) -> tracing::field::DisplayValue<String> {
    tracing::field::display(format!("{:016x}", node.get()))
}

/// Queues a sealed chunk that is as it should be if one of its replicas should be on a daemon that is much emptier. Few at a
/// time: each move makes the next one less needed.
pub fn consider_moving(term: &Term, chunk: &ChunkState, candidates: &[Candidate]) {
    let id = ChunkId(chunk.chunk);
    let (holders, flaws) = (term.nodes.holders(chunk), term.repairs.flaws(id));
    let replicas = Replicas::new(chunk, &holders, &flaws);
    if replicas.urgency().is_none()
        && term.repairs.inner().waiting.len() < MOVES_MAX
        && replicas.better_place(candidates).is_some()
    {
        term.repairs.add(id, Urgency::Uneven, term.now());
    }
}

/// Queues a chunk if it is not as it should be.
pub fn consider(term: &Term, id: ChunkId) {
    if let Some(chunk) = sealed(term, id) {
        consider_state(term, &chunk);
    }
}

/// The same for a sealed chunk that was just read.
pub fn consider_state(term: &Term, chunk: &ChunkState) {
    let id = ChunkId(chunk.chunk);
    let (holders, flaws) = (term.nodes.holders(chunk), term.repairs.flaws(id));
    if let Some(urgency) = Replicas::new(chunk, &holders, &flaws).urgency() {
        term.repairs.add(id, urgency, term.now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_chunk_is_claimed_by_one_at_a_time() {
        let repairs = Repairs::default();
        let first = repairs.claim(ChunkId(1)).expect("free");
        assert!(repairs.claim(ChunkId(1)).is_none());
        assert!(repairs.claim(ChunkId(1)).is_none(), "a claim in vain ends nobody's");
        assert!(repairs.claim(ChunkId(2)).is_some());
        let second = repairs.claimed(ChunkId(1), Instant::now() + Duration::from_secs(60));
        let (second, ()) = tokio::join!(second, async {
            tokio::time::sleep(CLAIM_RETRY).await;
            drop(first);
        });
        assert!(second.is_some());
        assert!(repairs.claimed(ChunkId(1), Instant::now() + CLAIM_RETRY).await.is_none());
    }

    #[test]
    fn the_most_urgent_go_first_and_failures_rest() {
        let repairs = Repairs::default();
        let now = Duration::from_secs(100);
        repairs.add(ChunkId(1), Urgency::Untidy, now);
        repairs.add(ChunkId(2), Urgency::Lacking(2), now);
        repairs.add(ChunkId(3), Urgency::Lacking(1), now);
        repairs.add(ChunkId(1), Urgency::Lacking(0), now);
        assert_eq!(repairs.first(), [ChunkId(1), ChunkId(3), ChunkId(2)]);
        let _claim = repairs.claim(ChunkId(3));
        repairs.forget(ChunkId(1));
        assert_eq!(repairs.first(), [ChunkId(2)]);
        repairs.begin(NodeId(7));
        assert!(repairs.has_slot(NodeId(7)));
        repairs.begin(NodeId(7));
        assert!(!repairs.has_slot(NodeId(7)));
        repairs.end(ChunkId(1), NodeId(7), now, None);
        repairs.end(ChunkId(2), NodeId(7), now, Some(100));
        repairs.add(ChunkId(1), Urgency::Lacking(0), now);
        assert_eq!(repairs.first(), [ChunkId(2)], "it rests");
        repairs.add(ChunkId(1), Urgency::Lacking(0), now + REST);
        assert_eq!(repairs.first(), [ChunkId(1), ChunkId(2)]);
        let progress = repairs.progress(now);
        assert_eq!((progress.copied_bytes, progress.failed, progress.copying), (100, 1, 0));
    }
}
