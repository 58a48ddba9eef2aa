//! Carries out [`crate::review`]'s decisions about files of which the number of replicas was set: tells their chunks. Repair makes
//! and drops the replicas.
//!
//! The notes of what is to be looked at are in the state, so a new leader goes on where the last one stopped.

use super::Gone;
use super::repairing;
use super::term::Term;
use crate::review::{Looked, Noted, Review};
use crate::state;
use dfs_proto::limits::REVIEW_FILES;
use dfs_proto::v1::{self, Wish, system};
use dfs_proto::{ChunkId, FsError, InodeNo};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked whether there are any, and how long those rest at most with which nothing can be done yet.
const TICK: Duration = Duration::from_secs(1);
const REST_MAX: Duration = Duration::from_secs(16);

/// Why a pass came to no end.
enum Stop {
    Gone,
    Store(io::Error),
    Refused(FsError),
}

impl From<Gone> for Stop {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Store(error)
    }
}

/// Looks at files until the term ends.
pub async fn run(term: Arc<Term>) {
    let mut rest = TICK;
    // What another leader proposed, or this master before and never heard of again, is applied before what is proposed from now
    // on. Once anything was, nothing lowers a chunk any more but what is decided here.
    let mut settled = false;
    loop {
        match pass(&term, &mut settled).await {
            Ok(Pass { done: 0, left }) if left > 0 => rest = (rest * 2).min(REST_MAX),
            Ok(_) => rest = TICK,
            Err(Stop::Gone) => return,
            Err(Stop::Store(error)) => {
                super::store_failed("looking at files whose replicas were set", &error);
                rest = (rest * 2).min(REST_MAX);
            }
            Err(Stop::Refused(error)) => {
                tracing::warn!(%error, "files whose replicas were set are looked at again");
                rest = (rest * 2).min(REST_MAX);
            }
        }
        tokio::time::sleep(rest).await;
    }
}

/// How many files a pass over all that are noted was done with, and how many stay noted.
#[derive(Default)]
struct Pass {
    done: usize,
    left: usize,
}

async fn pass(term: &Term, settled: &mut bool) -> Result<Pass, Stop> {
    let (mut pass, mut after) = (Pass::default(), InodeNo(0));
    loop {
        let page = state::reviews(&*term.kv(), after, REVIEW_FILES)?;
        let Some((last, _)) = page.last() else { return Ok(pass) };
        after = *last;
        if !*settled {
            set(term, Vec::new()).await?;
            *settled = true;
        }
        let first = look(term, &page).await?;
        // What was told is in the state by now: most of these are done.
        let second = look(term, &first.told).await?;
        let done = first.done.into_iter().chain(second.done);
        let files: Vec<_> = done.map(|(ino, version)| v1::ReviewedFile { ino: ino.get(), version }).collect();
        pass.left += page.len() - files.len();
        pass.done += files.len();
        if !files.is_empty() {
            propose(term, system::Op::Reviewed(v1::Reviewed { files })).await?;
        }
    }
}

/// Looks at files, and tells their chunks.
async fn look(term: &Term, files: &[Noted]) -> Result<Looked, Stop> {
    let (kv, mut review) = (term.kv(), Review::of(files));
    while let Some(todo) = review.next(&*kv).await? {
        for chunk in todo.seals {
            term.jobs.seal(chunk, false);
        }
        if !todo.wishes.is_empty() {
            set(term, todo.wishes).await?;
        }
    }
    Ok(review.end())
}

/// Tells chunks how many replicas they are to have, and repair of it. Those that are left as they are will be found again.
async fn set(term: &Term, wishes: Vec<Wish>) -> Result<(), Stop> {
    let chunks: Vec<_> = wishes.iter().map(|wish| ChunkId(wish.chunk)).collect();
    propose(term, system::Op::SetWishes(v1::SetWishes { wishes })).await?;
    for chunk in chunks {
        repairing::consider(term, chunk);
    }
    Ok(())
}

async fn propose(term: &Term, op: system::Op) -> Result<(), Stop> {
    term.shared.system(op).await?.map(drop).map_err(Stop::Refused)
}
