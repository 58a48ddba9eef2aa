//! Carries out [`crate::compact`]'s decisions: a new chunk is made of what is live of half-dead ones, and files are told.
//!
//! ```text
//!   Reserve (Raft) ──▶ Gather orders, one to each new replica ──▶ all durable and alike ──▶ Relocate (Raft), in steps
//!        │                                └── one fails ──▶ Release (Raft) ──▶ Delete orders
//!        └── this master leads no more: the next one releases the number before it hears of any daemon
//! ```
//!
//! No byte of an old chunk is given up here: it is dropped like any other that nothing uses, after the grace (`space.rs`).

use super::Gone;
use super::jobs::Job;
use super::nodes::OrderError;
use super::repairing::{self, hex};
use super::term::Term;
use crate::compact::{self, Recipe, Waiting};
use crate::placement::Health;
use crate::repair::Holder;
use crate::state;
use dfs_proto::limits::{COMPACTIONS_AT_ONCE, GATHER_PIECE_MS, GATHER_SOURCES_MAX, MOVES_PER_COMMAND};
use dfs_proto::v1::{self, ChunkState, ErrorCode, Move, OrderDone, order, system, system_answer};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, FsResult, NodeId};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// How often it is looked whether a chunk's turn has come.
const TICK: Duration = Duration::from_secs(1);
/// How long chunks are left alone that could not be compacted.
const REST: Duration = Duration::from_secs(10);
/// Extents read at once.
const PAGE: usize = 1024;
/// The pause between two commands that move extents: other commands go first.
const PAUSE: Duration = Duration::from_millis(5);
/// How many times an extent's users are moved in part. Only one of millions of clones needs many.
const PASSES: usize = 4096;

/// What is being compacted, in the leader's memory. After a failover the census finds it again.
#[derive(Default)]
pub struct Compactions {
    inner: Mutex<Inner>,
    wake: Notify,
}

#[derive(Default)]
struct Inner {
    waiting: Waiting,
    /// Chunks that are being compacted.
    busy: BTreeSet<ChunkId>,
    progress: Progress,
    /// Until when no chunk is waited for that is still losing bytes.
    hurry: Duration,
    closed: bool,
}

/// How a compaction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Made,
    /// There are not enough daemons with space.
    NoPlace,
    /// A source or a target failed; `blamed`: a source, as far as is known.
    Failed {
        blamed: bool,
    },
}

/// How the making of a new chunk's replicas ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gathered {
    Whole,
    /// A daemon did not do it, or not in time.
    Failed,
    /// A daemon found bytes that nobody has.
    Lacking,
}

/// How far compaction is.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Progress {
    pub waiting: u64,
    /// What their replicas would give back, of each one.
    pub waiting_bytes: u64,
    pub running: u64,
    /// Since this master was elected: old chunks, bytes that were moved, and what failed.
    pub compacted: u64,
    pub moved_bytes: u64,
    pub failed: u64,
}

impl Compactions {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sealed chunk as the census found it.
    pub fn note(&self, chunk: &ChunkState, now: Duration) {
        self.inner().waiting.note(chunk, now);
    }

    /// For a while, nothing is waited for.
    pub fn hurry(&self, until: Duration) {
        self.inner().hurry = until;
        self.wake.notify_one();
    }

    pub fn progress(&self) -> Progress {
        let inner = self.inner();
        let (waiting, waiting_bytes) = inner.waiting.total();
        Progress { waiting, waiting_bytes, running: inner.busy.len() as u64, ..inner.progress }
    }

    /// The term is over.
    pub fn close(&self) {
        self.inner().closed = true;
        self.wake.notify_one();
    }

    /// The chunks whose turn it is and that nobody compacts.
    fn ripe(&self, now: Duration, after: Duration) -> Vec<ChunkId> {
        let inner = self.inner();
        let after = if now < inner.hurry { Duration::ZERO } else { after };
        let mut ripe = inner.waiting.ripe(now, after);
        ripe.retain(|chunk| !inner.busy.contains(chunk));
        ripe
    }

    fn ended(&self, sources: &[ChunkState], end: End, now: Duration) {
        let mut inner = self.inner();
        for id in sources.iter().map(|chunk| ChunkId(chunk.chunk)) {
            inner.busy.remove(&id);
            match end {
                End::Made => inner.waiting.forget(id),
                End::NoPlace => inner.waiting.rest(id, now, REST, false),
                End::Failed { blamed } => inner.waiting.rest(id, now, REST, blamed),
            }
        }
        match end {
            End::Made => {
                inner.progress.compacted += sources.len() as u64;
                inner.progress.moved_bytes += sources.iter().map(|chunk| chunk.live).sum::<u64>();
            }
            End::NoPlace => {}
            End::Failed { .. } => inner.progress.failed += 1,
        }
        drop(inner);
        self.wake.notify_one();
    }
}

/// Compacts until the term ends.
pub async fn run(term: Arc<Term>) {
    let compactions = &term.compactions;
    let mut running = FuturesUnordered::new();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        if compactions.inner().closed {
            return;
        }
        while running.len() < COMPACTIONS_AT_ONCE
            && let Some(sources) = next(&term)
        {
            running.push(compact(&term, sources));
        }
        tokio::select! {
            Some(result) = running.next(), if !running.is_empty() => {
                if result.is_err() {
                    return;
                }
            }
            () = compactions.wake.notified() => {}
            _ = tick.tick() => {}
        }
    }
}

/// Chunks to be made one of next.
fn next(term: &Term) -> Option<Vec<ChunkState>> {
    let (compactions, now) = (&term.compactions, term.now());
    let mut chunks = Vec::new();
    for id in compactions.ripe(now, term.shared.settings.compact_after) {
        match super::sealing::read(term, id).filter(compact::is_half_dead) {
            Some(chunk) => chunks.push(chunk),
            None => compactions.inner().waiting.forget(id),
        }
        if chunks.len() == 2 * GATHER_SOURCES_MAX {
            break;
        }
    }
    let mut inner = compactions.inner();
    let is_blamed = |chunk: &ChunkState| inner.waiting.is_blamed(ChunkId(chunk.chunk));
    if chunks.first().is_some_and(is_blamed) {
        chunks.truncate(1);
    } else {
        // One that has a byte which nobody has must not stop the others for ever.
        chunks.retain(|chunk| !is_blamed(chunk));
    }
    let sources = compact::together(chunks, ByteLen(term.chunk_size));
    inner.busy.extend(sources.iter().map(|chunk| ChunkId(chunk.chunk)));
    (!sources.is_empty()).then_some(sources)
}

async fn compact(term: &Term, sources: Vec<ChunkState>) -> Result<(), Gone> {
    let end = match recipe(term, &sources).await {
        Ok(recipe) => make(term, &sources, &recipe).await?,
        Err(error) => {
            super::store_failed("reading a chunk's extents", &error);
            End::Failed { blamed: false }
        }
    };
    term.compactions.ended(&sources, end, term.now());
    Ok(())
}

/// What of the sources is live now. What does not fit stays: such a chunk is found again.
async fn recipe(term: &Term, sources: &[ChunkState]) -> std::io::Result<Recipe> {
    let (mut recipe, kv) = (Recipe::default(), term.kv());
    let limit = ByteLen(sources.first().map_or(0, |first| first.live).max(term.chunk_size));
    for (source, chunk) in (0..).zip(sources) {
        let (id, mut from) = (ChunkId(chunk.chunk), ByteOffset(0));
        loop {
            let page = state::extents(&*kv, id, from, PAGE)?;
            for (at, extent) in &page {
                if !recipe.add(source, id, *at, extent, limit) {
                    return Ok(recipe);
                }
            }
            let Some((at, last)) = page.last().filter(|_| page.len() == PAGE) else { break };
            from = *at + ByteLen(last.length);
            tokio::task::yield_now().await;
        }
    }
    Ok(recipe)
}

/// Has the new chunk made and moves the extents. If it could not be made, nothing is left of it.
async fn make(term: &Term, sources: &[ChunkState], recipe: &Recipe) -> Result<End, Gone> {
    let Some(nodes) = choose(term, sources, recipe) else {
        tracing::debug!(chunk = sources[0].chunk, "there is no place to compact it to");
        return Ok(End::NoPlace);
    };
    let id = match term.shared.system(system::Op::ReserveChunk(v1::ReserveChunk {})).await? {
        Ok(system_answer::Body::Chunks(list)) if list.chunks.len() == 1 => ChunkId(list.chunks[0]),
        other => {
            tracing::warn!(?other, "no number for a new chunk");
            return Ok(End::Failed { blamed: false });
        }
    };
    // It is not to be compacted itself while extents are moved into it.
    term.compactions.inner().busy.insert(id);
    let end = fill(term, id, sources, recipe, &nodes).await;
    term.compactions.inner().busy.remove(&id);
    end
}

/// Has the new chunk filled under the number that was reserved for it.
async fn fill(
    term: &Term,
    id: ChunkId,
    sources: &[ChunkState],
    recipe: &Recipe,
    nodes: &[NodeId],
) -> Result<End, Gone> {
    let made = gather(term, id, sources, recipe, nodes).await;
    let replicas = sources.iter().map(|chunk| chunk.wanted_replicas.max(1)).max().unwrap_or(1);
    let mut new = Some(v1::NewChunk {
        length: recipe.length,
        nodes: nodes.iter().map(|node| node.get()).collect(),
        replicas,
    });
    let first = recipe.moves.len().min(MOVES_PER_COMMAND);
    if made != Gathered::Whole || !relocate(term, id, new.take(), &recipe.moves[..first]).await? {
        let end = End::Failed { blamed: made == Gathered::Lacking };
        return give_up(term, id, nodes).await.map(|()| end);
    }
    let chunks = sources.len();
    tracing::info!(chunk = %id, of = chunks, length = recipe.length, "half-dead chunks were made one");
    move_rest(term, id, &recipe.moves).await?;
    // What daemons said of it while it was nobody's was not listened to: they are asked.
    for node in nodes {
        term.jobs.add(Job::Mend { node: *node, chunk: id }, false);
    }
    repairing::consider(term, id);
    Ok(End::Made)
}

fn choose(term: &Term, sources: &[ChunkState], recipe: &Recipe) -> Option<Vec<NodeId>> {
    if recipe.length == 0 {
        return None;
    }
    let good = |chunk: &ChunkState| {
        let (holders, flaws) = (term.nodes.holders(chunk), term.repairs.flaws(ChunkId(chunk.chunk)));
        // Those of drained daemons are as good as any until they are made up for.
        let is_good = |holder: &&Holder| holder.health != Health::Dead && !flaws.contains_key(&holder.node);
        holders.iter().filter(is_good).count()
    };
    let mut random = || term.shared.env.random();
    compact::targets(
        &sources[0],
        &term.nodes.holders(&sources[0]),
        sources.iter().map(good).max().unwrap_or(0),
        &term.nodes.candidates(),
        &*term.placement,
        ByteLen(recipe.length),
        &mut random,
    )
}

/// Every daemon makes its replica by itself. Whole: all have it on their disks, and what they have is alike.
async fn gather(
    term: &Term,
    id: ChunkId,
    sources: &[ChunkState],
    recipe: &Recipe,
    nodes: &[NodeId],
) -> Gathered {
    let limit = term.shared.settings.compaction_bandwidth;
    let source = |chunk: &ChunkState| {
        let flaws = term.repairs.flaws(ChunkId(chunk.chunk));
        let mut nodes: Vec<NodeId> = chunk.nodes.iter().copied().map(NodeId).collect();
        nodes.retain(|node| flaws.get(node).is_none_or(|flaw| !flaw.missing));
        nodes.sort_by_key(|node| (flaws.contains_key(node), term.nodes.health(*node)));
        let addresses = nodes.into_iter().filter_map(|node| term.nodes.address(node)).collect();
        v1::GatherSource { chunk: chunk.chunk, addresses }
    };
    let wait = repairing::bytes_wait(recipe.length, limit)
        + Duration::from_millis(GATHER_PIECE_MS * recipe.pieces.len() as u64);
    let op = order::Op::Gather(v1::GatherOrder {
        chunk: id.get(),
        epoch: dfs_proto::Epoch::FIRST.next().get(),
        length: recipe.length,
        sources: sources.iter().map(source).collect(),
        pieces: recipe.pieces.clone(),
        bytes_per_second: limit,
        wait_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
    });
    let orders = nodes.iter().map(|node| repairing::order_within(term, *node, &op, wait));
    let mut alike: Option<OrderDone> = None;
    let mut end = Gathered::Whole;
    for (node, done) in nodes.iter().zip(futures::future::join_all(orders).await) {
        match done {
            Ok(done) => {
                let same = |other: &OrderDone| (other.length, other.checksum) == (done.length, done.checksum);
                if done.length != recipe.length || !alike.as_ref().is_none_or(same) {
                    tracing::error!(chunk = %id, node = hex(*node), "replicas of a new chunk differ: it is given up");
                    end = Gathered::Failed;
                }
                alike = Some(done);
            }
            Err(error) => {
                tracing::warn!(chunk = %id, node = hex(*node), %error, "a new chunk was not made");
                let lacking = matches!(&error, OrderError::Refused(error)
                    if matches!(error.code, ErrorCode::ErrorCorrupt | ErrorCode::ErrorNoChunk));
                end = if lacking { Gathered::Lacking } else { Gathered::Failed };
            }
        }
    }
    end
}

/// One step; whether it was taken.
async fn relocate(term: &Term, to: ChunkId, new: Option<v1::NewChunk>, moves: &[Move]) -> Result<bool, Gone> {
    let op = v1::Relocate { to: to.get(), new, moves: moves.to_vec() };
    let answer: FsResult<_> = term.shared.system(system::Op::Relocate(op)).await?;
    if let Err(error) = &answer {
        tracing::warn!(chunk = %to, %error, "extents were not moved");
    }
    Ok(answer.is_ok())
}

/// Names extents until all are where they should be, or gone.
async fn move_rest(term: &Term, to: ChunkId, moves: &[Move]) -> Result<(), Gone> {
    for _ in 0..PASSES {
        let kv = term.kv();
        let there = |extent: &&Move| match state::has_extent(
            &*kv,
            ChunkId(extent.chunk),
            ByteOffset(extent.extent),
        ) {
            Ok(there) => there,
            Err(error) => {
                super::store_failed("reading an extent", &error);
                false
            }
        };
        let mut left: Vec<Move> = Vec::new();
        for some in moves.chunks(PAGE) {
            left.extend(some.iter().filter(there).copied());
            tokio::task::yield_now().await;
        }
        if left.is_empty() {
            return Ok(());
        }
        for step in left.chunks(MOVES_PER_COMMAND) {
            tokio::time::sleep(PAUSE).await;
            if !relocate(term, to, None, step).await? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The number never becomes a chunk; what was made is deleted. Only then: a daemon that is still at it has it reported.
async fn give_up(term: &Term, id: ChunkId, nodes: &[NodeId]) -> Result<(), Gone> {
    let release = v1::ReleaseChunks { chunks: vec![id.get()] };
    if let Err(error) = term.shared.system(system::Op::ReleaseChunks(release)).await? {
        tracing::warn!(chunk = %id, %error, "a number was not released");
    }
    for node in nodes {
        term.jobs.add(Job::Delete { node: *node, chunk: id }, false);
    }
    Ok(())
}

/// A new leader: what another one had begun is over. Before any daemon reports, so that what was made of it is nobody's then.
pub async fn release_all(shared: &super::Shared) -> Result<FsResult<()>, Gone> {
    let reserved = match state::reserved(&*shared.node.kv()) {
        Ok(reserved) => reserved,
        Err(error) => return Ok(Err(super::store_failed("reading the reserved chunks", &error))),
    };
    for chunks in reserved.chunks(dfs_proto::limits::REAP_ROWS_MAX) {
        let release = v1::ReleaseChunks { chunks: chunks.iter().map(|chunk| chunk.get()).collect() };
        if let Err(error) = shared.system(system::Op::ReleaseChunks(release)).await? {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}
