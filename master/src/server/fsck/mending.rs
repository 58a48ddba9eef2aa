//! What `dfs fsck --repair` does about what was found.

use super::{Replies, Stop, check_state, send};
use crate::server::change::Claim;
use crate::server::sealing;
use crate::server::term::Term;
use crate::state;
use dfs_proto::limits::{COPY_WAIT_MS, MEND_FAULTS_MAX, SLOWEST_COPY};
use dfs_proto::v1::{self, ErrorCode, FsckReply, fault::What, system, system_answer};
use dfs_proto::{ByteLen, ChunkId, FsError, NodeId, SessionId};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How often the state is checked and mended at most. Damage that shows only when other damage is mended takes a few; a state that
/// is still being damaged takes for ever.
const ROUNDS: usize = 6;
/// How often it is looked whether replicas have been made anew.
const LOOK: Duration = Duration::from_millis(250);

/// Checks the state and mends what was found, until there is nothing left that can be.
pub async fn mend_state(term: &Arc<Term>, replies: &Replies, reply: &mut FsckReply) -> Result<(), Stop> {
    for _ in 0..ROUNDS {
        let findings = check_state(term, reply).await?;
        let (mut seen, mut any) = (findings.mended, false);
        for faults in findings.faults.chunks(MEND_FAULTS_MAX) {
            // Whoever asked may go at any time: what is proposed is not left without its claim for that.
            let mending = tokio::spawn(mend(Arc::clone(term), seen, faults.to_vec()));
            let lines = mending.await.map_err(|error| Stop::Failed(unfinished(&error)))??;
            seen += 1;
            for line in &lines {
                tracing::warn!("mended: {line}");
            }
            any |= !lines.is_empty();
            reply.mended = lines;
            send(replies, reply).await?;
        }
        if !any {
            break;
        }
    }
    Ok(())
}

fn unfinished(error: &tokio::task::JoinError) -> FsError {
    FsError::new(ErrorCode::ErrorIo, format!("mending was not finished: {error}"))
}

/// Has some faults mended, while nobody caches anything of the inodes that they are about.
async fn mend(term: Arc<Term>, mended: u64, faults: Vec<v1::Fault>) -> Result<Vec<String>, Stop> {
    let term = &term;
    let touched = state::mended_inodes(&*term.kv(), &faults);
    let touched = touched.map_err(|error| crate::server::store_failed("reading what is mended", &error))?;
    let claim = Claim::of_the_cluster(term, &touched).await.map_err(|_| Stop::Gone)?;
    let op = v1::Mend { mended, faults: faults.clone() };
    let answer = term.shared.system(system::Op::Mend(op)).await.map_err(|_| Stop::Gone)??;
    drop(claim);
    let system_answer::Body::Mended(v1::Mended { lines }) = answer else { return Ok(Vec::new()) };
    // Who looks after chunks knows them by rows that may only now be there.
    for what in faults.iter().filter_map(|fault| fault.what.as_ref()) {
        if let What::Chunk(chunk) = what
            && let Some(state) = sealing::read(term, ChunkId(*chunk))
        {
            if state.phase() == v1::chunk_state::Phase::Sealed {
                crate::server::repairing::consider(term, ChunkId(*chunk));
            } else {
                term.resume_seal(SessionId(state.session), ChunkId(*chunk));
            }
        }
    }
    Ok(lines)
}

/// A replica that is missing or damaged.
pub struct Flawed {
    pub chunk: ChunkId,
    pub length: ByteLen,
    pub node: NodeId,
    /// In words.
    pub problem: String,
}

impl Flawed {
    /// As a problem, while it is not made anew or dropped.
    fn is_left(&self, term: &Term) -> bool {
        let listed =
            sealing::read(term, self.chunk).is_some_and(|state| state.nodes.contains(&self.node.get()));
        listed && term.repairs.flaws(self.chunk).contains_key(&self.node)
    }
}

/// Waits until flawed replicas have been made anew, for as long as that may take.
pub async fn await_replicas(
    term: &Term,
    replies: &Replies,
    mut flawed: Vec<Flawed>,
    reply: &mut FsckReply,
) -> Result<(), Stop> {
    let bytes: u64 = flawed.iter().map(|flawed| flawed.length.get()).sum();
    let end =
        Instant::now() + Duration::from_millis(COPY_WAIT_MS) + Duration::from_secs(bytes / SLOWEST_COPY);
    while !flawed.is_empty() {
        let (left, gone): (Vec<_>, Vec<_>) = flawed.into_iter().partition(|flawed| flawed.is_left(term));
        flawed = left;
        reply.mended =
            gone.into_iter().map(|flawed| format!("{}, and was made anew", flawed.problem)).collect();
        if !reply.mended.is_empty() {
            send(replies, reply).await?;
        }
        if flawed.is_empty() || Instant::now() >= end {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    reply.problems.extend(flawed.into_iter().map(|flawed| flawed.problem));
    Ok(())
}
