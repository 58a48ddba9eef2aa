//! A leader that stops, or is removed, hands over: nobody has to wait until it is missed.
//!
//! openraft 0.9 has no call for that. A follower that is made to want the lead would be refused: for as long as an
//! election takes at least, followers keep to the leader that they heard last. So the leader takes that away first.
//!
//! ```text
//! leader A, term T                        follower B                     other followers
//!   waits until B lacks nothing
//!   says no more that it leads
//!   waits until B has all of its log
//!   Expect (T+1, B) ───────────────────────────────────────────────────► note the vote of B, durably: A is nobody's
//!   notes the vote of B itself: it is no leader any more                 leader any more
//!   TakeOver ────────────────────────────► wants to lead, in term T+1 ─► vote as in any election
//! ```
//!
//! Whoever expects B has voted in term T+1 and looks at B's log once more when B asks: what is a majority, and who may be
//! voted for, is decided by the rules of any election. If B dies in between, an election comes after the usual time.

use super::codec::{Body, ExpectRow, TakeOverRow};
use super::elections::Bar;
use super::node::Node;
use super::snapshot::SnapshotData;
use super::store::Shared;
use super::types::{Raft, SnapshotMeta, Vote};
use dfs_proto::limits;
use futures::future::join_all;
use openraft::Snapshot;
use openraft::error::Fatal;
use std::io;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long the log must have stayed as it is: what was on its way into it is there then.
const QUIET: Duration = Duration::from_millis(20);
/// How long the others may take to note something.
const NOTE_TIME: Duration = Duration::from_millis(500);

/// Takes note of the vote that a candidate is about to ask for, in the name of the leader that wants no more.
///
/// # Errors
/// When Raft has stopped.
pub async fn expect(raft: &Raft, vote: Vote) -> Result<(), Fatal<u64>> {
    // Nobody becomes a leader by this: it is a vote that was asked for, not one that was won.
    let vote = Vote { committed: false, ..vote };
    // Of all messages only a snapshot's vote is noted whether there is a leader or not; one that holds nothing is older
    // than what is here, and is not installed.
    let nothing = Snapshot { meta: SnapshotMeta::default(), snapshot: Box::new(SnapshotData::empty()) };
    raft.install_full_snapshot(vote, nothing).await.map(drop)
}

/// Has this master want to lead, if whoever asks for that is the leader.
///
/// # Errors
/// When it is not, or this master may not lead. `NotConnected` when Raft has stopped.
pub async fn take_over(raft: &Raft, shared: &Shared, leader: &Vote) -> io::Result<()> {
    let known = raft.server_metrics().borrow().vote;
    if known != *leader || !leader.is_committed() {
        return Err(io::Error::other("the leader that hands over is not the one that is known here"));
    }
    if !shared.elections.allowed() {
        return Err(io::Error::other("this master may not lead at the moment"));
    }
    raft.trigger()
        .elect()
        .await
        .map_err(|error| io::Error::new(io::ErrorKind::NotConnected, error.to_string()))
}

/// Says again that this master leads, unless the hand-over came about.
struct Stay<'n>(&'n Node, bool);

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        if self.1 {
            self.0.lead.stay();
        }
    }
}

impl Node {
    /// Hands the lead over to the follower that has most of the log; answers its address once it leads, `None` when this
    /// master did not lead, or is the only one. It takes part as a follower from then on; with `for_good` it does not want
    /// to lead again.
    ///
    /// # Errors
    /// One line that says why it still leads, or that the lead was given up and the next leader is not known yet.
    pub async fn hand_over(&self, for_good: bool) -> Result<Option<String>, String> {
        let deadline = Instant::now() + Duration::from_millis(limits::HAND_OVER_MS);
        let alone = timeout_at(deadline, self.changing.lock()).await;
        let _alone = alone.map_err(|_| "the group of masters is being changed")?;
        if !self.leadership().borrow().leading || self.voters().len() == 1 {
            return Ok(None);
        }
        let (to, address) = self.successor().await.ok_or("no other master that votes is up to date")?;
        let mut metrics = self.raft.metrics();
        let reached = |upto: Option<u64>, metrics: &super::types::Metrics| {
            let matched = metrics.replication.as_ref().and_then(|of| of.get(&to).copied().flatten());
            matched.map(|id| id.index) >= upto
        };
        let late = || format!("master {to} does not catch up");
        let first = metrics.borrow().last_log_index;
        let caught_up = metrics.wait_for(|now| reached(first, now));
        timeout_at(deadline, caught_up).await.map_err(|_| late())?.map_err(|_| "Raft has stopped")?;
        self.lead.leave();
        let mut stay = Stay(self, true);
        // What was proposed before goes along; whoever waits for it asks again and hears of it from the next leader. An entry
        // that is written after this look is one that the next leader lacks, and for which it is not voted for.
        let mut last = None;
        loop {
            let all = metrics.wait_for(|now| {
                reached(now.last_log_index, now) && now.last_applied.map(|id| id.index) >= now.last_log_index
            });
            let now = timeout_at(deadline, all).await.map_err(|_| late())?;
            let now = now.map_err(|_| "Raft has stopped")?.last_log_index;
            if last.replace(now) == Some(now) {
                break;
            }
            tokio::time::sleep(QUIET).await;
        }
        if for_good {
            stay.1 = false;
            self.shared.elections.bar(Bar::Leaving);
        }
        self.give_up_lead(to, &address).await?;
        drop(stay);
        let leads = metrics.wait_for(|now| now.current_leader.is_some_and(|leader| leader != self.id));
        let now = timeout_at(deadline, leads).await.map_err(|_| "no other master leads yet")?;
        let leader = now.map_err(|_| "Raft has stopped")?.current_leader;
        tracing::info!(?leader, "handed over");
        Ok(leader.and_then(|leader| self.address_of(leader)))
    }

    /// The voter with most of the log among those that live and may lead.
    async fn successor(&self) -> Option<(u64, String)> {
        let status = self.status();
        let others = status.members.iter().filter(|member| member.voter && member.id != self.id);
        let asked = join_all(others.map(|member| async move {
            let answer = self.probe(member.id, &member.address, 0).await.ok()?;
            (!answer.joining && !answer.short).then_some(member)
        }));
        let best = asked.await.into_iter().flatten().max_by_key(|member| member.matched)?;
        Some((best.id, best.address.clone()))
    }

    async fn give_up_lead(&self, to: u64, address: &str) -> Result<(), String> {
        let seen = self.raft.server_metrics().borrow().clone();
        if seen.vote.leader_id().node_id != self.id || !seen.vote.is_committed() {
            return Err("this master does not lead any more".to_owned());
        }
        let next = Vote::new(seen.vote.leader_id().term + 1, to);
        let membership = seen.membership_config.membership();
        let voters: Vec<u64> =
            membership.voter_ids().filter(|voter| *voter != self.id && *voter != to).collect();
        let notes = voters.into_iter().filter_map(|voter| {
            let address = &membership.get_node(&voter)?.addr;
            let body = Body::Expect(ExpectRow { vote: Some((&next).into()) });
            Some(async move { (voter, self.network.peer(voter, address).call(body, NOTE_TIME).await) })
        });
        for (voter, noted) in join_all(notes).await {
            if let Err(error) = noted {
                tracing::info!(voter, %error, "a master does not hear of the hand-over");
            }
        }
        let body = Body::TakeOver(TakeOverRow { vote: Some((&seen.vote).into()) });
        // Its own vote counts, too, and may be needed.
        expect(&self.raft, next).await.map_err(|error| error.to_string())?;
        let taken = self.network.peer(to, address).call(body, NOTE_TIME).await;
        taken.map(drop).map_err(|error| format!("master {to} does not take over: {error}"))
    }
}
