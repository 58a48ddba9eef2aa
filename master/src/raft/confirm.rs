//! The read barrier: one round of heartbeats confirms the leader for all reads that wait.

use super::types::Raft;
use super::{Leadership, NotLeader};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};

/// Readers that may wait for one round.
pub const READERS_MAX: usize = 65_536;
/// How long a leader tries to reach a majority before it lets its readers look elsewhere.
const CONFIRM_TIME: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_millis(20);

pub type Reader = oneshot::Sender<Result<(), NotLeader>>;

/// Answers readers until there can be none any more. Those who come during a round wait for the next: a round counts only
/// for reads that were there when it began.
pub async fn run(
    raft: Raft,
    mut leadership: watch::Receiver<Leadership>,
    mut readers: mpsc::Receiver<Reader>,
) {
    let mut waiting = Vec::new();
    while readers.recv_many(&mut waiting, READERS_MAX).await > 0 {
        let result = confirm(&raft, &mut leadership).await;
        for reader in waiting.drain(..) {
            drop(reader.send(result.clone()));
        }
    }
}

async fn confirm(raft: &Raft, leadership: &mut watch::Receiver<Leadership>) -> Result<(), NotLeader> {
    let deadline = Instant::now() + CONFIRM_TIME;
    loop {
        // A heartbeat that came too late on a busy machine is no reason to send readers away.
        if let Ok(Ok(_)) = timeout_at(deadline, raft.ensure_linearizable()).await {
            return Ok(());
        }
        let now = leadership.borrow().clone();
        if !now.leading || Instant::now() >= deadline {
            return Err(NotLeader { leader: now.leader.filter(|_| !now.leading), unknown: false });
        }
        sleep(RETRY).await;
    }
}
