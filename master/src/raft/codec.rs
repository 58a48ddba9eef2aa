//! How Raft's own data looks on disk and on the wire: entries, votes, membership, messages between masters.
//!
//! Everything is protobuf (the messages below, field numbers never reused), so that fields can be added. The payload of
//! a normal entry is an encoded `v1::Batch`; it is encoded once by the leader and carried as bytes from there on.

use super::types::{Entry, LogId, Membership, Payload, SnapshotMeta, StoredMembership, Vote};
use bytes::Bytes;
use openraft::{BasicNode, CommittedLeaderId, EntryPayload};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// The version of everything in this file.
pub const VERSION: u32 = 1;

#[derive(Clone, PartialEq, Message)]
pub struct LogIdRow {
    #[prost(uint64, tag = "1")]
    pub term: u64,
    #[prost(uint64, tag = "2")]
    pub node: u64,
    #[prost(uint64, tag = "3")]
    pub index: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct VoteRow {
    #[prost(uint64, tag = "1")]
    pub term: u64,
    #[prost(uint64, tag = "2")]
    pub node: u64,
    #[prost(bool, tag = "3")]
    pub committed: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct VotersRow {
    #[prost(uint64, repeated, tag = "1")]
    pub ids: Vec<u64>,
}

/// One configuration of voters, or two while it changes; the nodes that are in none are learners.
#[derive(Clone, PartialEq, Message)]
pub struct MembershipRow {
    #[prost(message, repeated, tag = "1")]
    pub configs: Vec<VotersRow>,
    #[prost(btree_map = "uint64, string", tag = "2")]
    pub nodes: BTreeMap<u64, String>,
}

/// What the state store keeps under its one Raft key, and what a snapshot's header says: the last entry applied.
#[derive(Clone, PartialEq, Message)]
pub struct AppliedRow {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    #[prost(message, optional, tag = "2")]
    pub last: Option<LogIdRow>,
    #[prost(message, optional, tag = "3")]
    pub membership_at: Option<LogIdRow>,
    #[prost(message, optional, tag = "4")]
    pub membership: Option<MembershipRow>,
    #[prost(string, tag = "5")]
    pub snapshot: String,
    #[prost(string, tag = "6")]
    pub cluster: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct EntryRow {
    #[prost(message, optional, tag = "1")]
    pub id: Option<LogIdRow>,
    #[prost(uint32, tag = "2")]
    pub kind: u32,
    #[prost(bytes = "bytes", tag = "3")]
    pub data: Bytes,
}

/// What travels in `RaftMessage.body`; the proof there is the MAC of these bytes under the cluster key.
#[derive(Clone, PartialEq, Message)]
pub struct Envelope {
    #[prost(uint64, tag = "1")]
    pub from: u64,
    #[prost(uint64, tag = "2")]
    pub to: u64,
    /// Equal in a request and its reply.
    #[prost(uint64, tag = "3")]
    pub call: u64,
    #[prost(oneof = "Body", tags = "4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16")]
    pub body: Option<Body>,
    /// Which restore or recovery began the sender's group; 0: none.
    #[prost(uint64, tag = "20")]
    pub group: u64,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Body {
    #[prost(message, tag = "4")]
    Append(AppendRow),
    #[prost(message, tag = "5")]
    Appended(AppendedRow),
    #[prost(message, tag = "6")]
    Vote(VoteRequestRow),
    #[prost(message, tag = "7")]
    Voted(VotedRow),
    #[prost(message, tag = "8")]
    Snapshot(SnapshotRow),
    #[prost(message, tag = "9")]
    Installed(InstalledRow),
    /// Is there a cluster already?
    #[prost(message, tag = "10")]
    Probe(ProbeRow),
    #[prost(message, tag = "11")]
    Probed(ProbedRow),
    #[prost(string, tag = "12")]
    Failed(String),
    /// The leader hands over: want to lead, now.
    #[prost(message, tag = "13")]
    TakeOver(TakeOverRow),
    #[prost(message, tag = "14")]
    TakingOver(TakingOverRow),
    /// The leader hands over: from now on it may not be relied on, and this candidate may be voted for.
    #[prost(message, tag = "15")]
    Expect(ExpectRow),
    #[prost(message, tag = "16")]
    Expecting(ExpectingRow),
}

#[derive(Clone, PartialEq, Message)]
pub struct AppendRow {
    #[prost(message, optional, tag = "1")]
    pub vote: Option<VoteRow>,
    #[prost(message, optional, tag = "2")]
    pub previous: Option<LogIdRow>,
    #[prost(message, optional, tag = "3")]
    pub commit: Option<LogIdRow>,
    #[prost(message, repeated, tag = "4")]
    pub entries: Vec<EntryRow>,
}

/// Exactly one of: success, partial success up to `matched`, conflict, or a higher vote.
#[derive(Clone, PartialEq, Message)]
pub struct AppendedRow {
    #[prost(bool, tag = "1")]
    pub success: bool,
    #[prost(bool, tag = "2")]
    pub partial: bool,
    #[prost(message, optional, tag = "3")]
    pub matched: Option<LogIdRow>,
    #[prost(message, optional, tag = "4")]
    pub higher: Option<VoteRow>,
}

#[derive(Clone, PartialEq, Message)]
pub struct VoteRequestRow {
    #[prost(message, optional, tag = "1")]
    pub vote: Option<VoteRow>,
    #[prost(message, optional, tag = "2")]
    pub last: Option<LogIdRow>,
}

#[derive(Clone, PartialEq, Message)]
pub struct VotedRow {
    #[prost(message, optional, tag = "1")]
    pub vote: Option<VoteRow>,
    #[prost(bool, tag = "2")]
    pub granted: bool,
    #[prost(message, optional, tag = "3")]
    pub last: Option<LogIdRow>,
    /// Whoever asked is none of the masters any more.
    #[prost(bool, tag = "4")]
    pub removed: bool,
}

#[derive(Clone, PartialEq, Message)]
pub struct SnapshotRow {
    #[prost(message, optional, tag = "1")]
    pub vote: Option<VoteRow>,
    #[prost(message, optional, tag = "2")]
    pub meta: Option<AppliedRow>,
}

#[derive(Clone, PartialEq, Message)]
pub struct InstalledRow {
    #[prost(message, optional, tag = "1")]
    pub vote: Option<VoteRow>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ProbeRow {
    /// A master whose address by the other's settings is asked for; 0: none.
    #[prost(uint64, tag = "1")]
    pub about: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct ProbedRow {
    #[prost(bool, tag = "1")]
    pub initialized: bool,
    /// Who answers; 0 from masters that do not say.
    #[prost(uint64, tag = "2")]
    pub id: u64,
    /// It has not caught up and does not vote yet.
    #[prost(bool, tag = "3")]
    pub joining: bool,
    /// Where it looks for the master that was asked about, by its own settings; empty: where the group says.
    #[prost(string, tag = "4")]
    pub looks_at: String,
    /// It has no room for changes.
    #[prost(bool, tag = "5")]
    pub short: bool,
}

/// The vote of the leader that hands over.
#[derive(Clone, PartialEq, Message)]
pub struct TakeOverRow {
    #[prost(message, optional, tag = "1")]
    pub vote: Option<VoteRow>,
}

#[derive(Clone, PartialEq, Message)]
pub struct TakingOverRow {}

/// The vote that the next leader is about to ask for.
#[derive(Clone, PartialEq, Message)]
pub struct ExpectRow {
    #[prost(message, optional, tag = "1")]
    pub vote: Option<VoteRow>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ExpectingRow {}

/// Kinds of entries, as they stand in log and messages.
const BLANK: u32 = 0;
const BATCH: u32 = 1;
const MEMBERSHIP: u32 = 2;

/// An error about bytes that this version cannot read.
pub fn invalid(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

fn required<T>(field: Option<T>, what: &str) -> io::Result<T> {
    field.ok_or_else(|| invalid(format!("a Raft message without its {what}")))
}

impl From<&LogId> for LogIdRow {
    fn from(id: &LogId) -> Self {
        Self { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
    }
}

impl From<&LogIdRow> for LogId {
    fn from(row: &LogIdRow) -> Self {
        Self::new(CommittedLeaderId::new(row.term, row.node), row.index)
    }
}

pub fn log_id_row(id: Option<&LogId>) -> Option<LogIdRow> {
    id.map(Into::into)
}

pub fn log_id(row: Option<&LogIdRow>) -> Option<LogId> {
    row.map(Into::into)
}

impl From<&Vote> for VoteRow {
    fn from(vote: &Vote) -> Self {
        let leader = vote.leader_id();
        Self { term: leader.term, node: leader.node_id, committed: vote.is_committed() }
    }
}

impl From<&VoteRow> for Vote {
    fn from(row: &VoteRow) -> Self {
        if row.committed { Self::new_committed(row.term, row.node) } else { Self::new(row.term, row.node) }
    }
}

/// A vote that must be there.
///
/// # Errors
/// When it is not.
pub fn vote(row: Option<&VoteRow>) -> io::Result<Vote> {
    required(row, "vote").map(Into::into)
}

fn membership_row(membership: &Membership) -> MembershipRow {
    MembershipRow {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|voters| VotersRow { ids: voters.iter().copied().collect() })
            .collect(),
        nodes: membership.nodes().map(|(id, node)| (*id, node.addr.clone())).collect(),
    }
}

fn membership(row: &MembershipRow) -> Membership {
    let configs: Vec<BTreeSet<u64>> =
        row.configs.iter().map(|voters| voters.ids.iter().copied().collect()).collect();
    let nodes: BTreeMap<u64, BasicNode> =
        row.nodes.iter().map(|(id, address)| (*id, BasicNode::new(address))).collect();
    Membership::new(configs, nodes)
}

/// The last entry applied and the membership as of it, as bytes.
pub fn applied_row(last: Option<&LogId>, stored: &StoredMembership) -> AppliedRow {
    AppliedRow {
        version: VERSION,
        last: log_id_row(last),
        membership_at: log_id_row(stored.log_id().as_ref()),
        membership: Some(membership_row(stored.membership())),
        snapshot: String::new(),
        cluster: String::new(),
    }
}

impl AppliedRow {
    /// Reads the row back.
    ///
    /// # Errors
    /// When it is damaged or of another version.
    pub fn read(bytes: &[u8]) -> io::Result<Self> {
        let row = Self::decode(bytes).map_err(invalid)?;
        if row.version != VERSION {
            return Err(invalid(format!("version {} where this program knows {VERSION}", row.version)));
        }
        Ok(row)
    }

    pub fn last(&self) -> Option<LogId> {
        log_id(self.last.as_ref())
    }

    pub fn membership(&self) -> StoredMembership {
        let inner = self.membership.as_ref().map(membership).unwrap_or_default();
        StoredMembership::new(log_id(self.membership_at.as_ref()), inner)
    }

    pub fn snapshot_meta(&self) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: self.last(),
            last_membership: self.membership(),
            snapshot_id: self.snapshot.clone(),
        }
    }

    pub fn of_snapshot(meta: &SnapshotMeta, cluster: &str) -> Self {
        let row = applied_row(meta.last_log_id.as_ref(), &meta.last_membership);
        Self { snapshot: meta.snapshot_id.clone(), cluster: cluster.to_owned(), ..row }
    }
}

/// An entry's payload as kind and bytes; a batch is not copied.
pub fn payload_parts(payload: &EntryPayload<super::types::TypeConfig>) -> (u32, Bytes) {
    match payload {
        EntryPayload::Blank => (BLANK, Bytes::new()),
        EntryPayload::Normal(batch) => (BATCH, batch.0.clone()),
        EntryPayload::Membership(members) => (MEMBERSHIP, membership_row(members).encode_to_vec().into()),
    }
}

/// An entry from its parts.
///
/// # Errors
/// When the kind is unknown (a newer master's) or a membership is damaged.
pub fn entry(log_id: LogId, kind: u32, data: Bytes) -> io::Result<Entry> {
    let payload = match kind {
        BLANK => EntryPayload::Blank,
        BATCH => EntryPayload::Normal(Payload(data)),
        MEMBERSHIP => EntryPayload::Membership(membership(&MembershipRow::decode(data).map_err(invalid)?)),
        other => return Err(invalid(format!("a log entry of the unknown kind {other}"))),
    };
    Ok(Entry { log_id, payload })
}

pub fn entry_row(entry: &Entry) -> EntryRow {
    let (kind, data) = payload_parts(&entry.payload);
    EntryRow { id: Some((&entry.log_id).into()), kind, data }
}

impl TryFrom<EntryRow> for Entry {
    type Error = io::Error;
    fn try_from(row: EntryRow) -> io::Result<Self> {
        let id = required(row.id.as_ref(), "log id")?.into();
        entry(id, row.kind, row.data)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn any_log_id() -> impl Strategy<Value = LogId> {
        (any::<u64>(), any::<u64>(), any::<u64>())
            .prop_map(|(term, node, index)| LogId::new(CommittedLeaderId::new(term, node), index))
    }

    fn any_membership() -> impl Strategy<Value = Membership> {
        prop::collection::vec(prop::collection::btree_map(0_u64..9, "[a-z]{0,9}", 1..5), 1..3).prop_map(
            |configs| {
                let nodes: BTreeMap<u64, BasicNode> =
                    configs.iter().flatten().map(|(id, address)| (*id, BasicNode::new(address))).collect();
                Membership::new(
                    configs.iter().map(|config| config.keys().copied().collect()).collect(),
                    nodes,
                )
            },
        )
    }

    pub fn any_entry() -> impl Strategy<Value = Entry> {
        let payload = prop_oneof![
            Just(EntryPayload::Blank),
            any::<Vec<u8>>().prop_map(|bytes| EntryPayload::Normal(Payload(bytes.into()))),
            any_membership().prop_map(EntryPayload::Membership),
        ];
        (any_log_id(), payload).prop_map(|(log_id, payload)| Entry { log_id, payload })
    }

    proptest! {
        #[test]
        fn entries_votes_and_the_applied_row_survive_the_way_through_bytes(
            entry in any_entry(), members in any_membership(), last in prop::option::of(any_log_id()),
            term: u64, node: u64, committed: bool,
        ) {
            let bytes = entry_row(&entry).encode_to_vec();
            let back = Entry::try_from(EntryRow::decode(bytes.as_slice()).unwrap()).unwrap();
            prop_assert_eq!(back, entry);
            let cast = if committed { Vote::new_committed(term, node) } else { Vote::new(term, node) };
            prop_assert_eq!(Vote::from(&VoteRow::from(&cast)), cast);
            let stored = StoredMembership::new(last, members);
            let row = AppliedRow::read(&applied_row(last.as_ref(), &stored).encode_to_vec()).unwrap();
            prop_assert_eq!((row.last(), row.membership()), (last, stored));
        }

        #[test]
        fn garbage_never_panics(bytes: Vec<u8>, kind: u32) {
            let _ = Envelope::decode(bytes.as_slice());
            let _ = AppliedRow::read(&bytes);
            let _ = entry(LogId::default(), kind, bytes.into());
        }
    }

    #[test]
    fn a_row_of_another_version_is_refused() {
        let row = AppliedRow { version: VERSION + 1, ..AppliedRow::default() };
        assert!(AppliedRow::read(&row.encode_to_vec()).unwrap_err().to_string().contains("version 2"));
        assert!(entry(LogId::default(), 3, Bytes::new()).is_err());
    }
}
