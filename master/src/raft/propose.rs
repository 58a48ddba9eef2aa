//! Group commit: one task packs all commands that wait into one entry of the log.
//!
//! Two entries are under way at a time: while the first is being synced and replicated, the second is ready to follow
//! without a pause; what comes meanwhile makes the third. More would only make entries smaller.

use super::room::Level;
use super::store::Shared;
use super::types::{Payload, Raft, TypeConfig};
use super::{Leadership, NotLeader};
use crate::state::{Applied, BATCH_VERSION, Kv, cluster_row, is_answered, is_undecided};
use dfs_env::Env;
use dfs_proto::v1::{self, Batch, ErrorCode, Timestamp};
use dfs_proto::{FsError, SessionId, limits};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use openraft::error::ClientWriteError;
use openraft::raft::ClientWriteResult;
use prost::Message;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Entries under way at a time.
const PIPELINE: usize = 2;
/// How long an entry may take to be committed and applied before its callers are told that nobody knows.
const COMMIT_TIME: Duration = Duration::from_secs(10);

/// A command and who waits for its answer.
pub struct Proposal {
    pub command: v1::Command,
    pub answer: oneshot::Sender<Result<Applied, NotLeader>>,
}

type Waiters = Vec<oneshot::Sender<Result<Applied, NotLeader>>>;

pub struct Batcher {
    pub env: Env,
    pub raft: Raft,
    pub kv: Arc<dyn Kv>,
    pub leadership: watch::Receiver<Leadership>,
    pub proposals: mpsc::Receiver<Proposal>,
    pub shared: Arc<Shared>,
    /// This master is the only one.
    pub alone: Arc<AtomicBool>,
}

/// What is not taken because there is no room on the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refuses {
    Nothing,
    /// Those of clients.
    Changes,
    Everything,
}

/// Stamps commands with the leader's time, always later than the stamp before.
struct Stamps {
    term: u64,
    last: Timestamp,
}

impl Stamps {
    /// The next stamp: the clock's time, or the least time after the last stamp when the clock is behind.
    fn next(&mut self, clock: Timestamp) -> Timestamp {
        let after = if self.last.nanos == 999_999_999 {
            Timestamp { seconds: self.last.seconds + 1, nanos: 0 }
        } else {
            Timestamp { nanos: self.last.nanos + 1, ..self.last }
        };
        self.last = if clock.key() > after.key() { clock } else { after };
        self.last
    }
}

impl Batcher {
    /// Runs until nobody can propose any more.
    pub async fn run(mut self) {
        let mut waiting: VecDeque<Proposal> = VecDeque::new();
        let mut arrived = Vec::new();
        let mut under_way: FuturesUnordered<BoxFuture<'static, ()>> = FuturesUnordered::new();
        let mut stamps = Stamps { term: 0, last: Timestamp::default() };
        loop {
            tokio::select! {
                biased;
                changed = self.leadership.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = self.leadership.borrow_and_update().clone();
                    if !now.leading || now.term != stamps.term {
                        // Dropping them tells their callers that the outcome is unknown.
                        under_way.clear();
                        waiting.clear();
                    }
                }
                Some(()) = under_way.next(), if !under_way.is_empty() => {}
                count = self.proposals.recv_many(&mut arrived, limits::BATCH_COMMANDS_MAX),
                    if under_way.len() < PIPELINE && waiting.is_empty() =>
                {
                    if count == 0 {
                        return;
                    }
                    waiting.extend(arrived.drain(..));
                }
            }
            while under_way.len() < PIPELINE && !waiting.is_empty() {
                let refuses = self.refuses();
                if refuses == Refuses::Nothing {
                    // What came since belongs into the same entry.
                    while waiting.len() < limits::BATCH_COMMANDS_MAX {
                        let Ok(proposal) = self.proposals.try_recv() else { break };
                        waiting.push_back(proposal);
                    }
                } else if under_way.is_empty() {
                    self.refuse_for_want_of_room(refuses, &mut waiting);
                } else {
                    // What is under way may be what a command that is repeated did.
                    break;
                }
                if waiting.is_empty() {
                    break;
                }
                match self.pack(&mut waiting, &mut stamps) {
                    Ok(None) => {}
                    Ok(Some((batch, waiters))) => match self.raft.client_write_ff(batch).await {
                        Ok(result) => under_way.push(Box::pin(deliver(result, waiters))),
                        Err(_) => refuse(waiters, &self.not_leader(false)),
                    },
                    Err(error) => {
                        tracing::error!(%error, "cannot read the cluster's time from the state store");
                        let refusal = self.not_leader(false);
                        refuse(waiting.drain(..).map(|proposal| proposal.answer), &refusal);
                    }
                }
            }
        }
    }

    /// What there is no room for on the disks.
    fn refuses(&self) -> Refuses {
        let crowded = self.shared.crowded.load(Ordering::Acquire);
        match self.shared.room.look() {
            Level::None => Refuses::Everything,
            // Of several masters another one may have room, and lead soon.
            Level::Short if crowded || self.alone.load(Ordering::Acquire) => Refuses::Changes,
            Level::Short | Level::Plenty if crowded => Refuses::Changes,
            Level::Short | Level::Plenty => Refuses::Nothing,
        }
    }

    /// Answers what there is no room for. Nothing is under way.
    fn refuse_for_want_of_room(&self, refuses: Refuses, waiting: &mut VecDeque<Proposal>) {
        let everything = refuses == Refuses::Everything;
        let metrics = self.raft.metrics();
        let settled = {
            let now = metrics.borrow();
            now.last_applied.map(|id| id.index) >= now.last_log_index
        };
        if !settled {
            // An entry whose callers wait no more may still be applied: what it did must not be refused.
            let refusal = self.not_leader(true);
            return refuse(waiting.drain(..).map(|proposal| proposal.answer), &refusal);
        }
        for proposal in std::mem::take(waiting) {
            let command = &proposal.command;
            let mutates = matches!(command.body, Some(v1::command::Body::Mutation(_)));
            let sessions =
                command.earlier.iter().map(|before| before.session).chain([command.session]).map(SessionId);
            let answered = mutates && is_answered(&*self.kv, sessions, command.seq).unwrap_or(true);
            // Whoever repeats what was done is told what came of it.
            if !everything && (answered || !mutates) {
                waiting.push_back(proposal);
                continue;
            }
            // It was done, or an earlier session of the client may do it yet, or nobody knows: then it is not told that it was refused.
            let undecided = answered || is_undecided(&*self.kv, command).unwrap_or(true);
            let code = if undecided { ErrorCode::ErrorUnavailable } else { ErrorCode::ErrorNoSpace };
            let failure: v1::Failure = FsError::new(code, "the masters have no room for changes").into();
            let refusal = match proposal.command.body {
                Some(v1::command::Body::System(_)) => {
                    let body = Some(v1::system_answer::Body::Failure(failure));
                    Applied::System(v1::SystemAnswer { body })
                }
                Some(v1::command::Body::Mutation(_)) | None => {
                    Applied::Answer(v1::Answer { body: Some(v1::answer::Body::Failure(failure)) })
                }
            };
            drop(proposal.answer.send(Ok(refusal)));
        }
    }

    fn not_leader(&self, unknown: bool) -> NotLeader {
        NotLeader { leader: self.leadership.borrow().leader.clone(), unknown }
    }

    /// Packs as many waiting commands as an entry holds; None when this master does not lead and all were refused.
    fn pack(
        &self,
        waiting: &mut VecDeque<Proposal>,
        stamps: &mut Stamps,
    ) -> io::Result<Option<(Payload, Waiters)>> {
        let leadership = self.leadership.borrow().clone();
        if !leadership.leading {
            let refusal = NotLeader { leader: leadership.leader, unknown: false };
            refuse(waiting.drain(..).map(|proposal| proposal.answer), &refusal);
            return Ok(None);
        }
        if stamps.term != leadership.term {
            // All entries of earlier leaders are applied before this one leads: their last stamp is in the state.
            let row = cluster_row(&*self.kv)?;
            stamps.last = row.and_then(|row| row.now).unwrap_or_default();
            stamps.term = leadership.term;
        }
        let clock = Timestamp::from_system(self.env.clock.system());
        let (mut commands, mut waiters, mut bytes) = (Vec::new(), Vec::new(), 0);
        while let Some(mut proposal) = waiting.pop_front() {
            bytes += proposal.command.encoded_len() + 16;
            if !commands.is_empty()
                && (bytes > limits::BATCH_BYTES_MAX || commands.len() == limits::BATCH_COMMANDS_MAX)
            {
                waiting.push_front(proposal);
                break;
            }
            proposal.command.now = Some(stamps.next(clock));
            commands.push(proposal.command);
            waiters.push(proposal.answer);
        }
        let batch = Batch { version: BATCH_VERSION, commands };
        Ok(Some((Payload(batch.encode_to_vec().into()), waiters)))
    }
}

fn refuse(
    waiters: impl IntoIterator<Item = oneshot::Sender<Result<Applied, NotLeader>>>,
    refusal: &NotLeader,
) {
    for waiter in waiters {
        // A caller that went away needs no answer.
        drop(waiter.send(Err(refusal.clone())));
    }
}

/// Waits until an entry is applied and hands out its answers.
async fn deliver(result: oneshot::Receiver<ClientWriteResult<TypeConfig>>, waiters: Waiters) {
    match tokio::time::timeout(COMMIT_TIME, result).await {
        Ok(Ok(Ok(response))) => {
            let answers = response.data.0;
            if answers.len() != waiters.len() {
                tracing::error!(
                    answers = answers.len(),
                    commands = waiters.len(),
                    "a batch was not answered one by one"
                );
                return;
            }
            for (waiter, answer) in waiters.into_iter().zip(answers) {
                drop(waiter.send(Ok(answer)));
            }
        }
        // Refused before it was proposed, or its entry was taken out of the log: either way it is not applied, but
        // callers repeat by operation id anyway, so there is no need to tell the cases apart.
        Ok(Ok(Err(ClientWriteError::ForwardToLeader(forward)))) => {
            let leader = forward.leader_node.map(|node| node.addr);
            refuse(waiters, &NotLeader { leader, unknown: true });
        }
        Ok(Ok(Err(ClientWriteError::ChangeMembershipError(_))) | Err(_)) | Err(_) => {
            refuse(waiters, &NotLeader { leader: None, unknown: true });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn stamps_only_rise_and_follow_the_clock_when_they_can(
            start in (0_i64..9, 0_u32..1_000_000_000),
            clocks in prop::collection::vec((0_i64..9, prop_oneof![0_u32..3, 999_999_997_u32..1_000_000_000]), 1..30),
        ) {
            let mut stamps = Stamps { term: 1, last: Timestamp { seconds: start.0, nanos: start.1 } };
            for (seconds, nanos) in clocks {
                let (before, clock) = (stamps.last, Timestamp { seconds, nanos });
                let stamp = stamps.next(clock);
                prop_assert!(stamp.key() > before.key() && stamp.key() >= clock.key() && stamp.nanos < 1_000_000_000);
            }
        }
    }
}
