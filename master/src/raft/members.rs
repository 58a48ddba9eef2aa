//! Which masters there are: added and removed while the cluster works.
//!
//! ```text
//!   add ──► learner ──(lacks little, votes by its own word)──► voter ──► remove: two configurations, then one without it
//!              the leader, whoever that is by then, sees to this        a leader hands over before it is removed
//! ```
//!
//! [`Group`] decides, purely; [`Node`] asks the masters how they are, and has openraft carry out what was decided. Every
//! step may be repeated, by this leader or the next.

use super::codec::ProbedRow;
use super::network;
use super::node::Node;
use super::room::Level;
use super::types::{LogId, Membership, StoredMembership};
use super::{Member, RaftStatus};
use dfs_proto::limits;
use futures::future::join_all;
use openraft::error::{ClientWriteError, RaftError};
use openraft::{BasicNode, ChangeMembers};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::timeout;

/// How long a master with a full disk that could not hand over leads on before it tries again.
const LEAVE_AGAIN: Duration = Duration::from_secs(2);

/// Why the group was not changed; one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// It must not be, or not now.
    #[error("{0}")]
    Refused(String),
    /// This master does not lead, or hands over: whoever leads is to be asked.
    #[error("{0}")]
    Elsewhere(String),
}

/// Whether a candidate is none of the masters any more, by what was agreed on after all that it knows.
pub fn was_removed(agreed: &StoredMembership, candidate: u64, last: Option<&LogId>) -> bool {
    agreed.log_id().as_ref() > last && agreed.membership().get_node(&candidate).is_none()
}

/// The masters as the leader sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Group {
    /// One configuration, or two while it changes.
    configs: Vec<BTreeSet<u64>>,
    nodes: BTreeMap<u64, String>,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// The change to the later of two configurations is to be finished.
    Finish(BTreeSet<u64>),
    AddLearner(u64, String),
    Promote(u64),
    RemoveVoter(u64),
    RemoveLearner(u64),
}

fn most(of: &BTreeSet<u64>, alive: &BTreeSet<u64>) -> bool {
    of.intersection(alive).count() > of.len() / 2
}

/// Whether a master has most of a log that ends with `last`.
fn lacks_little(member: &Member, last: u64) -> bool {
    member.matched > 0 && member.matched + limits::LEARNER_LAG_ENTRIES >= last
}

impl Group {
    fn of(membership: &Membership, address: impl Fn(u64, &str) -> String) -> Self {
        Self {
            configs: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, node)| (*id, address(*id, &node.addr))).collect(),
        }
    }

    fn voters(&self) -> BTreeSet<u64> {
        self.configs.iter().flatten().copied().collect()
    }

    /// A change that was begun is finished before another one.
    fn unfinished(&self) -> Option<Step> {
        match &self.configs[..] {
            [_, later] => Some(Step::Finish(later.clone())),
            _ => None,
        }
    }

    /// How the master that answers at `address` is added. `None`: it is there.
    fn add(&self, address: &str, asked: &ProbedRow) -> Result<Option<Step>, String> {
        let id = asked.id;
        if id == 0 {
            return Err(format!("{address}: the master there does not tell its number: it is too old"));
        }
        if let Some((other, _)) = self.nodes.iter().find(|(other, known)| **other != id && *known == address)
        {
            return Err(format!("master {other} has the address {address}: remove it first"));
        }
        match self.nodes.get(&id) {
            Some(known) if known == address => Ok(None),
            Some(known) => {
                Err(format!("there is a master {id} already, at {known}: give the new one another id"))
            }
            None if self.nodes.len() >= limits::MASTERS_MAX => {
                Err(format!("{} masters are the most: remove one first", limits::MASTERS_MAX))
            }
            None if asked.initialized => Err(format!(
                "master {id} at {address} has been in a group already: stop it, remove its data directory, start it again"
            )),
            None => Ok(Some(Step::AddLearner(id, address.to_owned()))),
        }
    }

    /// How a master is removed while those that are `alive` are, of which some lack little of the log: who is far behind
    /// cannot make up for the one that goes. `None`: it is not there.
    fn remove(
        &self,
        id: u64,
        alive: &BTreeSet<u64>,
        current: &BTreeSet<u64>,
    ) -> Result<Option<Step>, String> {
        if !self.nodes.contains_key(&id) {
            return Ok(None);
        }
        let voters = self.voters();
        if !voters.contains(&id) {
            return Ok(Some(Step::RemoveLearner(id)));
        }
        let left: BTreeSet<u64> = voters.iter().copied().filter(|voter| *voter != id).collect();
        if left.is_empty() {
            return Err(format!("master {id} is the only one that votes"));
        }
        if !most(&left, current) || !most(&voters, alive) {
            let (up, of) = (left.intersection(current).count(), left.len());
            return Err(format!(
                "without master {id} there is no majority: {up} of the other {of} answer and are up to date, {} must",
                of / 2 + 1
            ));
        }
        Ok(Some(Step::RemoveVoter(id)))
    }

    /// The learner that may vote: it lacks little of a log that ends with `last`.
    fn ready(&self, members: &[Member], last: u64) -> Option<u64> {
        let voters = self.voters();
        let mut learners = members.iter().filter(|member| !voters.contains(&member.id));
        learners.find(|member| lacks_little(member, last)).map(|member| member.id)
    }
}

impl Node {
    fn group(&self) -> Group {
        let seen = self.raft.server_metrics().borrow().clone();
        Group::of(seen.membership_config.membership(), |id, known| self.network.address(id, known))
    }

    /// Where a master of the group is.
    pub(super) fn address_of(&self, id: u64) -> Option<String> {
        self.group().nodes.get(&id).cloned()
    }

    /// Where the masters that vote are, as far as this one knows.
    #[must_use]
    pub fn voters(&self) -> Vec<String> {
        let group = self.group();
        group.voters().iter().filter_map(|id| group.nodes.get(id).cloned()).collect()
    }

    /// Asks a master how it is, and where it looks for the master `about`; 0 for whichever is at the address.
    pub(super) async fn probe(&self, id: u64, address: &str, about: u64) -> io::Result<ProbedRow> {
        let bound = Duration::from_millis(limits::MASTER_PROBE_MS);
        network::probe(&self.network.peer_at(id, address), about, bound).await
    }

    /// Refuses a master whom another one's settings say to be elsewhere: two would then act under one number, each heard by
    /// some of the others.
    async fn check_settings(&self, id: u64, address: &str) -> Result<(), String> {
        let differs =
            |of: u64, at: &str| format!("the settings of master {of} say that master {id} is at {at}");
        if let Some(own) = self.network.settings().get(&id).filter(|own| *own != address) {
            return Err(differs(self.id, own));
        }
        let group = self.group();
        let others = group.nodes.iter().filter(|(other, _)| **other != self.id && **other != id);
        let asked =
            join_all(others.map(|(other, at)| async move { (*other, self.probe(*other, at, id).await) }));
        for (other, answer) in asked.await {
            let row = answer.map_err(|error| {
                format!("master {other} cannot be asked where it looks for master {id}: {error}")
            })?;
            if !row.looks_at.is_empty() && row.looks_at != address {
                return Err(differs(other, &row.looks_at));
            }
        }
        Ok(())
    }

    fn leading(&self) -> Result<(), ChangeError> {
        if self.leadership().borrow().leading {
            return Ok(());
        }
        Err(ChangeError::Elsewhere("this master does not lead".to_owned()))
    }

    /// Takes the master at an address into the group, as a learner that will vote when it has caught up. Answers its id and
    /// whether it votes.
    ///
    /// # Errors
    /// When it does not answer or cannot be taken in, or this master does not lead.
    pub async fn add_master(&self, address: &str) -> Result<(u64, bool), ChangeError> {
        let _alone = self.changing.lock().await;
        self.leading()?;
        self.finish_change().await?;
        let refused = ChangeError::Refused;
        let asked =
            self.probe(0, address, 0).await.map_err(|error| refused(format!("{address}: {error}")))?;
        if let Some(step) = self.group().add(address, &asked).map_err(refused)? {
            self.check_settings(asked.id, address).await.map_err(refused)?;
            self.carry_out(step).await?;
        }
        Ok((asked.id, self.group().voters().contains(&asked.id)))
    }

    /// Takes a master out of the group. False: it was none of it.
    ///
    /// # Errors
    /// When the others would be without a majority; when this master does not lead, or no more: it hands over before it
    /// is removed.
    pub async fn remove_master(&self, id: u64) -> Result<bool, ChangeError> {
        let alone = self.changing.lock().await;
        self.leading()?;
        self.finish_change().await?;
        let group = self.group();
        let (alive, current) = self.alive(&group).await;
        let step = group.remove(id, &alive, &current).map_err(ChangeError::Refused)?;
        let Some(step) = step else { return Ok(false) };
        if id == self.id {
            drop(alone);
            return Err(self.hand_over_repeatedly(id).await);
        }
        self.carry_out(step).await?;
        Ok(true)
    }

    /// The other one may not win, or die at that moment: then this master leads again soon, and tries again.
    async fn hand_over_repeatedly(&self, id: u64) -> ChangeError {
        let mut reason = String::new();
        for _ in 0..limits::HAND_OVERS_MAX {
            reason = match self.hand_over(false).await {
                Ok(_) => return ChangeError::Elsewhere("this master has handed over".to_owned()),
                Err(reason) => reason,
            };
            tracing::info!(%reason, "the hand-over did not come about");
            let mut leadership = self.leadership();
            let bound = Duration::from_millis(limits::HAND_OVER_MS);
            let decided = leadership.wait_for(|now| now.leading || now.leader.is_some());
            if timeout(bound, decided).await.is_ok_and(|now| now.is_ok_and(|now| !now.leading)) {
                return ChangeError::Elsewhere("another master leads".to_owned());
            }
        }
        ChangeError::Refused(format!("master {id} leads and cannot hand over: {reason}"))
    }

    /// Finishes what an earlier leader began, and lets learners vote that have caught up.
    ///
    /// # Errors
    /// When this master does not lead any more, or no majority agrees in time.
    pub async fn tend_members(&self) -> Result<(), ChangeError> {
        let group = self.group();
        if group.configs.len() == 1 && group.voters().len() == group.nodes.len() {
            return Ok(());
        }
        let _alone = self.changing.lock().await;
        self.leading()?;
        self.finish_change().await?;
        let RaftStatus { members, last_log, .. } = self.status();
        let group = self.group();
        let Some(id) = group.ready(&members, last_log) else { return Ok(()) };
        let Some(address) = group.nodes.get(&id) else { return Ok(()) };
        match self.probe(id, address, 0).await {
            Ok(row) if !row.joining => self.carry_out(Step::Promote(id)).await,
            // It may have caught up and not have noticed yet, or have gone: later.
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Sees to it that changes are taken as long as a majority of the masters has room for them: by one that has room itself.
    pub async fn tend_room(self: &Arc<Self>) {
        let (group, short) = (self.group(), self.shared.room.level() != Level::Plenty);
        let voters = group.voters();
        let asked = group.nodes.iter().filter(|(id, _)| voters.contains(id) && **id != self.id);
        let answers = join_all(asked.map(|(id, address)| self.probe(*id, address, 0))).await;
        let others = answers.iter().flatten().filter(|row| row.short).count();
        let roomy = answers.iter().flatten().any(|row| !row.short && !row.joining);
        let crowded = voters.len() - others - usize::from(short) <= voters.len() / 2;
        self.shared.crowded.store(crowded || (short && !roomy), Ordering::Release);
        if short && roomy && !crowded {
            self.leave_to_one_with_room();
        }
    }

    /// Hands over in a task of its own: whoever asks for it does so as the leader, and ends in the middle of it.
    fn leave_to_one_with_room(self: &Arc<Self>) {
        if self.giving_way.swap(true, Ordering::AcqRel) {
            return;
        }
        let node = Arc::clone(self);
        tokio::spawn(async move {
            tracing::info!("this master's disk is full: another one with room is to lead");
            if let Err(reason) = node.hand_over(false).await {
                tracing::warn!(%reason, "the lead stays with a master whose disk is full");
                // Each attempt is a pause for the clients.
                tokio::time::sleep(LEAVE_AGAIN).await;
            }
            node.giving_way.store(false, Ordering::Release);
        });
    }

    /// Whether this master's own disk has room for changes.
    pub fn has_room(&self) -> bool {
        self.shared.room.level() == Level::Plenty
    }

    /// What was found out about the others' room is not known any more.
    pub fn forget_room(&self) {
        self.shared.crowded.store(false, Ordering::Release);
    }

    /// The masters that answer, and those of them that lack little of the log.
    async fn alive(&self, group: &Group) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let asked = group.nodes.iter().filter(|(id, _)| **id != self.id).map(|(id, address)| async move {
            self.probe(*id, address, 0).await.ok().map(|row| (*id, row.joining))
        });
        let answers: Vec<(u64, bool)> = join_all(asked).await.into_iter().flatten().collect();
        let RaftStatus { members, last_log, .. } = self.status();
        let near = |id: u64| members.iter().any(|member| member.id == id && lacks_little(member, last_log));
        let mut alive = BTreeSet::from([self.id]);
        let mut current = alive.clone();
        for (id, joining) in answers {
            alive.insert(id);
            if !joining && near(id) {
                current.insert(id);
            }
        }
        (alive, current)
    }

    async fn finish_change(&self) -> Result<(), ChangeError> {
        match self.group().unfinished() {
            Some(step) => self.carry_out(step).await,
            None => Ok(()),
        }
    }

    async fn carry_out(&self, step: Step) -> Result<(), ChangeError> {
        tracing::info!(?step, "the group of masters changes");
        let one = |id: u64| BTreeSet::from([id]);
        let (change, retain) = match step {
            Step::Finish(voters) => (ChangeMembers::ReplaceAllVoters(voters), false),
            Step::AddLearner(id, address) => {
                (ChangeMembers::AddNodes(BTreeMap::from([(id, BasicNode::new(address))])), true)
            }
            Step::Promote(id) => (ChangeMembers::AddVoterIds(one(id)), true),
            Step::RemoveVoter(id) => (ChangeMembers::RemoveVoters(one(id)), false),
            Step::RemoveLearner(id) => (ChangeMembers::RemoveNodes(one(id)), true),
        };
        let bound = Duration::from_millis(limits::MASTER_CHANGE_MS);
        match timeout(bound, self.raft.change_membership(change, retain)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)) | RaftError::Fatal(_))) => {
                Err(ChangeError::Elsewhere("this master does not lead any more".to_owned()))
            }
            Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error)))) => {
                Err(ChangeError::Refused(error.to_string()))
            }
            Err(_) => Err(ChangeError::Refused(format!(
                "no majority agreed within {bound:?}; what was begun is finished when there is one"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::CommittedLeaderId;

    fn set(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    fn group(voters: &[u64], learners: &[u64]) -> Group {
        let nodes = voters.iter().chain(learners).map(|id| (*id, format!("m{id}:1"))).collect();
        Group { configs: vec![set(voters)], nodes }
    }

    fn asked(id: u64, initialized: bool) -> ProbedRow {
        ProbedRow { initialized, id, joining: true, ..ProbedRow::default() }
    }

    #[test]
    fn a_master_is_added_once_under_one_number_and_one_address_and_with_an_empty_disk() {
        let three = group(&[1, 2, 3], &[4]);
        let step = three.add("m5:1", &asked(5, false));
        assert_eq!(step, Ok(Some(Step::AddLearner(5, "m5:1".to_owned()))));
        assert_eq!(three.add("m4:1", &asked(4, true)), Ok(None), "again");
        assert_eq!(three.add("m2:1", &asked(2, true)), Ok(None));
        for (address, row, reason) in [
            ("n2:1", asked(2, false), "master 2 already, at m2:1"),
            ("m2:1", asked(6, false), "master 2 has the address"),
            ("m6:1", asked(6, true), "remove its data directory"),
            ("m6:1", asked(0, false), "too old"),
        ] {
            let error = three.add(address, &row).unwrap_err();
            assert!(error.contains(reason) && !error.contains('\n'), "{error}");
        }
        let seven = group(&[1, 2, 3, 4, 5, 6, 7], &[]);
        assert!(seven.add("m8:1", &asked(8, false)).unwrap_err().contains("7 masters are the most"));
    }

    #[test]
    fn nobody_is_removed_whom_a_majority_needs() {
        let three = group(&[1, 2, 3], &[4]);
        let remove = |of: &Group, id, alive: &[u64]| of.remove(id, &set(alive), &set(alive));
        assert_eq!(remove(&three, 3, &[1, 2]), Ok(Some(Step::RemoveVoter(3))), "the dead one");
        assert_eq!(remove(&three, 9, &[1, 2, 3]), Ok(None), "again");
        assert_eq!(remove(&three, 4, &[1, 2]), Ok(Some(Step::RemoveLearner(4))));
        let error = remove(&three, 2, &[1, 2]).unwrap_err();
        let text =
            "without master 2 there is no majority: 1 of the other 2 answer and are up to date, 2 must";
        assert_eq!(error, text);
        assert!(three.remove(2, &set(&[1, 2, 3]), &set(&[1, 2])).is_err(), "3 is far behind");
        assert!(remove(&group(&[1], &[2]), 1, &[1, 2]).unwrap_err().contains("the only one"));
        assert_eq!(remove(&group(&[1, 2], &[]), 2, &[1, 2]), Ok(Some(Step::RemoveVoter(2))));
        assert!(remove(&group(&[1, 2], &[]), 2, &[1]).is_err(), "it would have to agree");
    }

    #[test]
    fn a_learner_votes_when_it_lacks_little_and_a_change_is_finished_first() {
        let group = group(&[1, 2], &[3]);
        let member =
            |id, matched| Member { id, address: String::new(), leader: false, voter: id != 3, matched };
        let ready = |matched| group.ready(&[member(1, 5000), member(2, 0), member(3, matched)], 5000);
        assert_eq!((ready(0), ready(3999), ready(4000)), (None, None, Some(3)));
        let joint = Group { configs: vec![set(&[1, 2]), set(&[1])], ..group };
        assert_eq!(joint.unfinished(), Some(Step::Finish(set(&[1]))));
    }

    #[test]
    fn only_what_was_agreed_on_after_all_that_a_candidate_knows_removes_it() {
        let id = |index| LogId::new(CommittedLeaderId::new(1, 1), index);
        let membership = Membership::new(vec![set(&[1, 2])], set(&[1, 2]));
        let agreed = StoredMembership::new(Some(id(7)), membership);
        assert!(was_removed(&agreed, 3, Some(&id(6))) && was_removed(&agreed, 3, None));
        assert!(!was_removed(&agreed, 2, Some(&id(6))) && !was_removed(&agreed, 3, Some(&id(8))));
        assert!(!was_removed(&StoredMembership::default(), 3, None));
    }
}
