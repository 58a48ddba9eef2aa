//! Carries out [`crate::seal`]'s decisions, and the leader's other jobs with chunks, a bounded number at once.

use super::Gone;
use super::jobs::{Job, Lane};
use super::nodes::OrderError;
use super::repairing;
use super::term::Term;
use crate::placement::Health;
use crate::repair::Replicas;
use crate::seal::{Action, Event, Sealing};
use crate::state;
use dfs_proto::limits::{NODE_DEAD_MS, SEAL_WAIT_MS};
use dfs_proto::v1::{self, chunk_state::Phase, order, system, system_answer};
use dfs_proto::{ByteLen, ChunkId, Epoch, FsError, NodeId};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Jobs carried out at once.
const JOBS_AT_ONCE: usize = 32;
/// How often chunks are tried again for which no replica was long enough.
const PARKED_RETRY: Duration = Duration::from_secs(10);
/// How long a daemon may take over an order that nobody waits for.
const ORDER_WAIT: Duration = Duration::from_secs(30);

/// How long a job waits for a chunk that is being repaired before it goes to the end of the queue.
const CLAIM_WAIT: Duration = Duration::from_secs(2);

/// Works through one lane of the term's jobs until it ends.
pub async fn run(term: Arc<Term>, lane: Lane) {
    let mut running = FuturesUnordered::new();
    let mut retry = tokio::time::interval(PARKED_RETRY);
    retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            job = term.jobs.next(lane), if running.len() < JOBS_AT_ONCE => {
                let Some(job) = job else { return };
                running.push(carry_out(Arc::clone(&term), job));
            }
            Some(result) = running.next(), if !running.is_empty() => {
                if result.is_err() {
                    return;
                }
            }
            _ = retry.tick(), if lane == Lane::Seals => term.jobs.unpark(),
        }
    }
}

/// What follows a job.
enum After {
    Done,
    Park(ChunkId),
    Another(Job),
}

async fn carry_out(term: Arc<Term>, job: Job) -> Result<(), Gone> {
    let after = match job {
        Job::Seal(chunk) if seal(&term, chunk).await? => After::Park(chunk),
        Job::Seal(_) => After::Done,
        Job::Mend { node, chunk } => mend(&term, node, chunk).await?,
        Job::Delete { node, chunk } => delete(&term, node, chunk).await,
    };
    term.jobs.done(job);
    match after {
        After::Done => {}
        After::Park(chunk) => term.jobs.park(chunk),
        After::Another(job) => term.jobs.add(job, false),
    }
    Ok(())
}

/// Seals one chunk as far as the daemons that are there allow. True: it must wait for others.
async fn seal(term: &Term, id: ChunkId) -> Result<bool, Gone> {
    let Some(chunk) = read(term, id) else { return Ok(false) };
    let (mut sealing, mut action) = Sealing::begin(chunk, term.strays.of(id));
    loop {
        action = match action {
            Action::Fence => {
                let fence = v1::FenceChunk { chunk: id.get() };
                match term.shared.system(system::Op::FenceChunk(fence)).await? {
                    Ok(system_answer::Body::Fenced(chunk)) => sealing.on(Event::Fenced(chunk)),
                    refused => refuse(&mut sealing, id, "fencing", &refused),
                }
            }
            Action::Ask { epoch, nodes } => ask(term, &mut sealing, id, epoch, nodes).await,
            Action::Seal { epoch, length, nodes } => {
                let given_up = sealing.given_up(&nodes);
                let sealed = v1::SealedChunk {
                    chunk: id.get(),
                    epoch: epoch.get(),
                    length: length.get(),
                    nodes: nodes.iter().map(|node| node.get()).collect(),
                };
                match term.shared.system(system::Op::SealedChunk(sealed)).await? {
                    Ok(_) => {
                        term.strays.forget(id);
                        for node in given_up {
                            term.jobs.add(Job::Mend { node, chunk: id }, false);
                        }
                        tracing::debug!(chunk = %id, length = %length, replicas = nodes.len(), "sealed");
                        repairing::consider(term, id);
                        sealing.on(Event::Sealed)
                    }
                    refused => refuse(&mut sealing, id, "sealing", &refused),
                }
            }
            Action::Cut { epoch, length, nodes } => {
                cut(term, id, epoch, length, nodes).await;
                return Ok(false);
            }
            Action::Park => {
                tracing::warn!(chunk = %id, "no replica has every committed byte: waiting for daemons to come back");
                return Ok(true);
            }
            Action::Wait | Action::Done => return Ok(false),
        };
    }
}

fn refuse(
    sealing: &mut Sealing,
    chunk: ChunkId,
    what: &str,
    answer: &Result<system_answer::Body, FsError>,
) -> Action {
    tracing::debug!(%chunk, ?answer, what, "not carried out");
    sealing.on(Event::Refused)
}

/// Has the daemons fence, and waits until it is decided what comes next.
async fn ask(term: &Term, sealing: &mut Sealing, chunk: ChunkId, epoch: Epoch, nodes: Vec<NodeId>) -> Action {
    // Right after an election daemons are only coming back: one that is not here yet is not given up.
    let since_election = term.now().saturating_sub(term.elected);
    let arriving = Duration::from_millis(NODE_DEAD_MS).saturating_sub(since_election);
    let wait = Duration::from_millis(SEAL_WAIT_MS).max(arriving);
    let deadline = Instant::now() + wait;
    let op = order::Op::Fence(v1::FenceOrder { chunk: chunk.get(), epoch: epoch.get() });
    let mut orders: FuturesUnordered<_> = nodes
        .into_iter()
        .map(|node| {
            let op = &op;
            async move { (node, term.nodes.order(term.number, node, op, deadline).await) }
        })
        .collect();
    while let Some((node, result)) = orders.next().await {
        let event = match result {
            Ok(done) if done.sealed => Event::FoundSealed(node, ByteLen(done.length)),
            Ok(done) => Event::Answered(node, ByteLen(done.length)),
            Err(error) => {
                tracing::info!(%chunk, node = repairing::hex(node), %error, "not fenced");
                if matches!(error, OrderError::TimedOut) {
                    term.nodes.suspect(node);
                }
                Event::Failed(node)
            }
        };
        match sealing.on(event) {
            Action::Wait => {}
            action => return action,
        }
    }
    sealing.on(Event::TimeUp)
}

/// Has the replicas closed. One that does not is told again when its daemon reports.
async fn cut(term: &Term, chunk: ChunkId, epoch: Epoch, length: ByteLen, nodes: Vec<NodeId>) {
    let orders = nodes.into_iter().filter(|node| term.nodes.is_attached(*node)).map(|node| async move {
        if let Err(error) = cut_one(term, chunk, epoch, length, node).await {
            tracing::info!(%chunk, node = repairing::hex(node), %error, "not closed");
            // Asked again, it says whether it is damaged.
            term.jobs.add(Job::Mend { node, chunk }, false);
        }
    });
    futures::future::join_all(orders).await;
}

async fn cut_one(
    term: &Term,
    chunk: ChunkId,
    epoch: Epoch,
    length: ByteLen,
    node: NodeId,
) -> Result<v1::OrderDone, OrderError> {
    let seal = v1::SealOrder { chunk: chunk.get(), epoch: epoch.get(), length: length.get() };
    term.nodes.order(term.number, node, &order::Op::Seal(seal), Instant::now() + ORDER_WAIT).await
}

/// Closes a replica of a sealed chunk, and counts it again if it had been given up and is needed. What cannot be closed is
/// missing or damaged.
async fn mend(term: &Term, node: NodeId, id: ChunkId) -> Result<After, Gone> {
    // One that is away reports when it is back.
    if !term.nodes.is_attached(node) {
        return Ok(After::Done);
    }
    let again = After::Another(Job::Mend { node, chunk: id });
    let Some(_claim) = term.repairs.claimed(id, Instant::now() + CLAIM_WAIT).await else {
        return Ok(again);
    };
    let Some(chunk) = read(term, id) else { return Ok(After::Done) };
    let listed = chunk.nodes.contains(&node.get());
    match chunk.phase() {
        Phase::Sealed => {}
        // Only sealed chunks are repaired, and whoever appends to it may have nothing to append for days.
        Phase::Open if listed && chunk.live > 0 => return Ok(After::Another(Job::Seal(id))),
        Phase::Open | Phase::Fenced => return Ok(After::Done),
    }
    if !listed && is_whole(term, &chunk) {
        return Ok(After::Another(Job::Delete { node, chunk: id }));
    }
    let length = ByteLen(chunk.committed);
    match cut_one(term, id, Epoch(chunk.epoch), length, node).await {
        Ok(_) if listed => term.repairs.is_there(id, node),
        Ok(_) => {
            let add = v1::AddReplica { chunk: id.get(), node: node.get() };
            term.repairs.mended(id, node);
            if let Err(error) = term.shared.system(system::Op::AddReplica(add)).await? {
                tracing::info!(chunk = %id, node = repairing::hex(node), %error, "a replica was found but not counted");
            }
        }
        Err(OrderError::Refused(error)) if listed => note_flaw(term, id, node, &error),
        Err(OrderError::Refused(error)) => {
            tracing::info!(chunk = %id, node = repairing::hex(node), %error, "a replica that does not count cannot be closed");
            return Ok(After::Another(Job::Delete { node, chunk: id }));
        }
        Err(error @ (OrderError::Away | OrderError::TimedOut)) => {
            tracing::info!(chunk = %id, node = repairing::hex(node), %error, "not closed");
            return Ok(again);
        }
    }
    repairing::consider(term, id);
    Ok(After::Done)
}

/// A daemon that should have a whole replica says why it has none.
fn note_flaw(term: &Term, id: ChunkId, node: NodeId, error: &FsError) {
    // It may count no more: then nothing is wrong.
    let listed = |chunk: &v1::ChunkState| {
        chunk.phase() == Phase::Sealed && chunk.live > 0 && chunk.nodes.contains(&node.get())
    };
    if read(term, id).is_some_and(|chunk| listed(&chunk))
        && term.repairs.flawed(id, node, error.code == v1::ErrorCode::ErrorNoChunk)
    {
        tracing::error!(chunk = %id, node = repairing::hex(node), %error, "a replica is damaged or missing");
    }
}

/// Whether a daemon has a whole replica of a sealed chunk; what it says against it is noted.
pub async fn is_there(term: &Term, id: ChunkId, node: NodeId) -> bool {
    let Some(chunk) = read(term, id).filter(|chunk| chunk.phase() == Phase::Sealed) else { return false };
    let asked = cut_one(term, id, Epoch(chunk.epoch), ByteLen(chunk.committed), node).await;
    judge_answer(term, id, node, asked.map(drop))
}

/// Whether a daemon says that its replica is whole; what it says against it is noted.
pub fn judge_answer(term: &Term, id: ChunkId, node: NodeId, answer: Result<(), OrderError>) -> bool {
    match answer {
        Ok(()) => true,
        Err(OrderError::Refused(error)) => {
            note_flaw(term, id, node, &error);
            false
        }
        Err(error @ (OrderError::Away | OrderError::TimedOut)) => {
            tracing::info!(chunk = %id, node = repairing::hex(node), %error, "not asked");
            false
        }
    }
}

fn is_whole(term: &Term, chunk: &v1::ChunkState) -> bool {
    let (holders, flaws) = (term.nodes.holders(chunk), term.repairs.flaws(ChunkId(chunk.chunk)));
    Replicas::new(chunk, &holders, &flaws).is_whole()
}

/// Has a daemon delete a replica that does not count, judged by what is applied while nobody else may change that. One that
/// is away has its replicas judged when it is back.
async fn delete(term: &Term, node: NodeId, id: ChunkId) -> After {
    let again = After::Another(Job::Delete { node, chunk: id });
    let Some(_claim) = term.repairs.claimed(id, Instant::now() + CLAIM_WAIT).await else { return again };
    if !term.nodes.is_attached(node) || !is_garbage(term, node, id) {
        return After::Done;
    }
    // A restored state may list daemons that have long handed the chunk on to this one.
    if !others_have_it(term, node, id).await {
        return After::Another(Job::Mend { node, chunk: id });
    }
    let op = order::Op::Delete(v1::DeleteOrder { chunk: id.get() });
    match term.nodes.order(term.number, node, &op, Instant::now() + ORDER_WAIT).await {
        Ok(_) | Err(OrderError::Away) => After::Done,
        Err(OrderError::Refused(error)) => {
            tracing::warn!(chunk = %id, node = repairing::hex(node), %error, "not deleted");
            After::Done
        }
        Err(OrderError::TimedOut) => again,
    }
}

/// Whether those whose replicas of a chunk count say, now, that they have them; of a chunk that nobody needs nobody is asked.
async fn others_have_it(term: &Term, node: NodeId, id: ChunkId) -> bool {
    let Some(chunk) = read(term, id).filter(|chunk| chunk.live > 0) else { return true };
    let (holders, flaws) = (term.nodes.holders(&chunk), term.repairs.flaws(id));
    let relied = Replicas::new(&chunk, &holders, &flaws).relied_without(node);
    let asked = relied.iter().map(|other| is_there(term, id, *other));
    !relied.is_empty() && !futures::future::join_all(asked).await.contains(&false)
}

/// Whether nobody needs a daemon's replica: its chunk was dropped, or is sealed, does not list it and is safe without it.
fn is_garbage(term: &Term, node: NodeId, id: ChunkId) -> bool {
    let kv = term.kv();
    // In this order: a number that was not given then is none of ours; what is reserved may become a chunk at any moment, what
    // is not never does.
    let read = state::cluster_row(&*kv)
        .and_then(|cluster| Ok((cluster, state::is_reserved(&*kv, id)?, state::chunk_state(&*kv, id)?)));
    match read {
        Ok((_, false, Some(chunk))) => {
            let (holders, flaws) = (term.nodes.holders(&chunk), term.repairs.flaws(id));
            let safe = chunk.live == 0 || Replicas::new(&chunk, &holders, &flaws).is_safe_without(node);
            chunk.phase() == Phase::Sealed && !chunk.nodes.contains(&node.get()) && safe
        }
        // Numbers are given once: one that was given and is not there any more was dropped.
        Ok((Some(cluster), false, None)) => state::was_given(&cluster, id),
        Ok((_, true, _) | (None, false, None)) => false,
        Err(error) => {
            super::store_failed("reading a chunk", &error);
            false
        }
    }
}

/// A chunk as applied; None when it is gone, or when the store fails (which is logged).
pub fn read(term: &Term, chunk: ChunkId) -> Option<v1::ChunkState> {
    match state::chunk_state(&*term.kv(), chunk) {
        Ok(state) => state,
        Err(error) => {
            super::store_failed("reading a chunk", &error);
            None
        }
    }
}

/// What a daemon's report means for one chunk it has.
pub enum Report {
    Fine,
    Job(Job),
    /// Of no chunk that there ever was: left alone.
    Unknown,
    Damaged,
    /// Sealed, of a chunk that this state has not sealed yet, by a daemon that it does not list.
    Stray,
}

/// Judges one replica by what the daemon found and by what was applied.
pub fn judge(
    node: NodeId,
    found: &v1::ChunkFound,
    chunk: Option<&v1::ChunkState>,
    cluster: &v1::ClusterRow,
) -> Report {
    let id = ChunkId(found.chunk);
    let Some(chunk) = chunk else {
        return if state::was_given(cluster, id) {
            Report::Job(Job::Delete { node, chunk: id })
        } else {
            Report::Unknown
        };
    };
    match chunk.phase() {
        Phase::Open => Report::Fine,
        Phase::Fenced if found.sealed && !chunk.nodes.contains(&node.get()) => Report::Stray,
        Phase::Fenced => Report::Job(Job::Seal(id)),
        Phase::Sealed => {
            let listed = chunk.nodes.contains(&node.get());
            // What was short when the report began may have been filled and sealed since: it is asked.
            let short = found.length < chunk.committed;
            match (listed, found.damaged) {
                (true, true) => Report::Damaged,
                (true, false) if found.sealed && !short => Report::Fine,
                (false, true) => Report::Job(Job::Delete { node, chunk: id }),
                (_, false) => Report::Job(Job::Mend { node, chunk: id }),
            }
        }
    }
}

/// Whether a replica counts as there.
pub fn is_alive(health: Health) -> bool {
    health != Health::Dead
}
