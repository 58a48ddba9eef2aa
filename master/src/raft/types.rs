//! The types that openraft is told to work with.

use super::snapshot::SnapshotData;
use crate::state::Applied;
use bytes::Bytes;
use openraft::BasicNode;

openraft::declare_raft_types!(
    /// This crate's Raft: entries are encoded batches, answers are what the batch's commands answered.
    pub TypeConfig:
        D = Payload,
        R = Answers,
        NodeId = u64,
        Node = BasicNode,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = SnapshotData,
        Responder = openraft::impls::OneshotResponder<TypeConfig>,
        AsyncRuntime = openraft::TokioRuntime,
);

/// An encoded `v1::Batch`.
#[derive(Clone, PartialEq, Eq)]
pub struct Payload(pub Bytes);

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a batch of {} bytes", self.0.len())
    }
}

/// What the commands of one entry answered, in their order; empty for entries without commands.
#[derive(Debug, Default)]
pub struct Answers(pub Vec<Applied>);

pub type Raft = openraft::Raft<TypeConfig>;
pub type Entry = openraft::Entry<TypeConfig>;
pub type LogId = openraft::LogId<u64>;
pub type Vote = openraft::Vote<u64>;
pub type Membership = openraft::Membership<u64, BasicNode>;
pub type StoredMembership = openraft::StoredMembership<u64, BasicNode>;
pub type Metrics = openraft::RaftMetrics<u64, BasicNode>;
pub type SnapshotMeta = openraft::SnapshotMeta<u64, BasicNode>;
pub type StorageError = openraft::StorageError<u64>;
pub type StorageIOError = openraft::StorageIOError<u64>;
