//! `dfs fsck`: proves I10 over a consistent view of the whole state, and I1 by asking every daemon for every replica that
//! counts. Nothing stands still meanwhile. What is wrong with replicas is noted as a report would be, so it is mended.
//!
//! `--repair`: what the check of the state finds is mended by commands that judge it again ([`crate::state::Findings`]), and the
//! state is checked again: mending one thing may show another, and what changed under the check is left to the next one. In the end
//! the replicas that were found flawed are waited for.

use super::sealing;
use super::term::Term;
use crate::placement::Health;
use crate::raft::Piece;
use crate::state::{self, Findings};
use dfs_proto::limits::{COPY_WAIT_MS, SLOWEST_COPY};
use dfs_proto::v1::{FsckReply, VerifyOrder, chunk_state::Phase, order};
use dfs_proto::{ByteLen, ChunkId, FsError, FsResult, NodeId};
use futures::StreamExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tonic::Status;

mod mending;

/// Chunks read at once, replicas asked for at once, and how many of these between two words about the progress.
const PAGE: usize = 1024;
const AT_ONCE: usize = 16;
const PROGRESS: u64 = 256;
/// How many violations of the state's own rules are told one by one.
const PROBLEMS_MAX: usize = 1000;

type Replies = mpsc::Sender<Result<FsckReply, Status>>;

/// Checks everything and tells what it finds, until it is done or nobody listens. `_alone`: a check keeps about what the state
/// takes in memory, so there is one at a time.
pub async fn run(term: Arc<Term>, wish: Wish, replies: Replies, _alone: OwnedSemaphorePermit) {
    let mut ended = term.ended();
    let result = tokio::select! {
        result = check(&term, wish, &replies) => result,
        _ = ended.wait_for(|ended| *ended) => Err(Stop::Gone),
        () = replies.closed() => return,
    };
    let last = match result {
        Ok(()) => return,
        Err(Stop::Gone) => Status::unavailable("this master does not lead any more: nothing is proved"),
        Err(Stop::Failed(error)) => Status::internal(error.to_string()),
    };
    // Whoever asked may have gone.
    drop(replies.send(Err(last)).await);
}

/// What is to be done besides looking at the state and asking for replicas.
#[derive(Clone, Copy)]
pub struct Wish {
    /// Have every byte of every replica read.
    pub deep: bool,
    /// Mend what can be mended.
    pub repair: bool,
}

/// Why a check did not come to its end.
enum Stop {
    Gone,
    Failed(FsError),
}

impl From<FsError> for Stop {
    fn from(error: FsError) -> Self {
        Self::Failed(error)
    }
}

async fn check(term: &Arc<Term>, wish: Wish, replies: &Replies) -> Result<(), Stop> {
    let Wish { deep, repair } = wish;
    term.shared.confirm().await.map_err(|_| Stop::Gone)?;
    let mut reply = FsckReply::default();
    if repair {
        mending::mend_state(term, replies, &mut reply).await?;
    }
    let findings = check_state(term, &mut reply).await?;
    reply.problems = shortened(findings.problems);
    send(replies, &mut reply).await?;
    let mut flawed = Vec::new();
    let mut after = ChunkId(0);
    loop {
        let page = state::chunks(&*term.kv(), after, PAGE)
            .map_err(|error| super::store_failed("reading the chunks", &error))?;
        let Some(last) = page.last() else { break };
        after = ChunkId(last.chunk);
        let mut replicas = Vec::new();
        for chunk in page.iter().filter(|chunk| chunk.live > 0 && term.jobs.is_parked(ChunkId(chunk.chunk))) {
            let text =
                format!("chunk {}: no daemon that is there has all of its committed bytes", chunk.chunk);
            reply.problems.push(text);
        }
        for chunk in page.iter().filter(|chunk| chunk.phase() == Phase::Sealed && chunk.live > 0) {
            reply.lacking += u64::from(chunk.nodes.len() < chunk.wanted_replicas as usize);
            let length = ByteLen(chunk.committed);
            replicas.extend(chunk.nodes.iter().map(|node| (ChunkId(chunk.chunk), length, NodeId(*node))));
        }
        let mut asked = futures::stream::iter(replicas)
            .map(|(chunk, length, node)| async move {
                (chunk, length, node, check_replica(term, chunk, length, node, deep).await)
            })
            .buffer_unordered(AT_ONCE);
        while let Some((chunk, length, node, found)) = asked.next().await {
            reply.replicas += 1;
            match found {
                Replica::Whole => reply.replicas_checked += 1,
                Replica::Away => reply.away += 1,
                Replica::Flawed(problem) => {
                    reply.replicas_checked += 1;
                    if repair {
                        flawed.push(mending::Flawed { chunk, length, node, problem });
                    } else {
                        reply.problems.push(problem);
                    }
                }
            }
            if reply.replicas % PROGRESS == 0 {
                send(replies, &mut reply).await?;
            }
        }
    }
    mending::await_replicas(term, replies, flawed, &mut reply).await?;
    reply.done = true;
    send(replies, &mut reply).await
}

/// Sends what was found; problems are told once.
async fn send(replies: &Replies, reply: &mut FsckReply) -> Result<(), Stop> {
    let next = FsckReply { problems: Vec::new(), mended: Vec::new(), ..reply.clone() };
    replies.send(Ok(std::mem::replace(reply, next))).await.map_err(|_| Stop::Gone)
}

/// Reads the whole state as it is now, and counts what is in it.
async fn check_state(term: &Arc<Term>, reply: &mut FsckReply) -> FsResult<Findings> {
    let export = Arc::new(term.shared.node.export());
    let mut check = state::Check::default();
    loop {
        let (from, mut so_far) = (Arc::clone(&export), check);
        let (back, more) = term
            .shared
            .env
            .blocking(move || {
                let more = match from.next()? {
                    Piece::Rows(rows) => {
                        rows.iter().for_each(|(key, value)| so_far.row(key, value));
                        true
                    }
                    Piece::End => false,
                    Piece::Cancelled => return Err(std::io::Error::other("another leader's state came")),
                };
                Ok((so_far, more))
            })
            .await
            .map_err(|error| super::store_failed("reading the state", &error))?;
        check = back;
        if !more {
            break;
        }
        tokio::task::yield_now().await;
    }
    (reply.files, reply.chunks) = check.seen();
    Ok(term.shared.env.blocking(move || Ok(check.findings())).await?)
}

/// As many problems as are told one by one.
fn shortened(mut problems: Vec<String>) -> Vec<String> {
    if problems.len() > PROBLEMS_MAX {
        let more = format!("and {} more", problems.len() - PROBLEMS_MAX);
        problems.truncate(PROBLEMS_MAX);
        problems.push(more);
    }
    problems
}

enum Replica {
    Whole,
    /// Its daemon is not there: what is known of it is what it said last.
    Away,
    Flawed(String),
}

async fn check_replica(term: &Term, id: ChunkId, length: ByteLen, node: NodeId, deep: bool) -> Replica {
    if !term.nodes.is_attached(node) || term.nodes.health(node) == Health::Dead {
        return Replica::Away;
    }
    let mut whole = sealing::is_there(term, id, node).await;
    if whole && deep {
        let verify = order::Op::Verify(VerifyOrder { chunk: id.get() });
        let wait = Duration::from_millis(COPY_WAIT_MS) + Duration::from_secs(length.get() / SLOWEST_COPY);
        let verified = term.nodes.order(term.number, node, &verify, Instant::now() + wait).await;
        whole = sealing::judge_answer(term, id, node, verified.map(drop));
    }
    if whole && !term.repairs.flaws(id).contains_key(&node) {
        return Replica::Whole;
    }
    super::repairing::consider(term, id);
    // It may have been dropped, or moved, or its daemon may have gone while it was asked for.
    let listed = sealing::read(term, id).is_some_and(|chunk| chunk.nodes.contains(&node.get()));
    match term.repairs.flaws(id).get(&node) {
        Some(flaw) if listed => {
            let what = if flaw.missing { "missing" } else { "damaged" };
            Replica::Flawed(format!("chunk {id}: its replica on chunk daemon {:016x} is {what}", node.get()))
        }
        Some(_) | None if listed => Replica::Away,
        Some(_) | None => Replica::Whole,
    }
}
