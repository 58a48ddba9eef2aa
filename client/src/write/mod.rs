//! The write side: bytes wait in memory, are packed into records of open chunks, and become part of their files by
//! commits that name only what is on disk on every replica.
//!
//! ```text
//!            write()                cut: 1 MiB full,             dispatch: a chunk has room
//!                                   old, or flushed              and its window is open
//! program ───────────▶ unsent piece ────────────────▶ queued run ────────────────────────▶ sent record
//!                      (merged, overwritten           (never changes                           │
//!                       in place)                      again)  ▲                               │ acknowledged by all,
//!                                                              │ requeued: its chunk           │ synced on all
//!                                                              │ was given up                  ▼
//!                      dropped from memory ◀────────────── committed ◀──── commit in flight (one an inode)
//! ```
//!
//! [`core::Core`] decides (events in, [`Action`]s out, no runtime, no clock); [`driver::Writer`] acts. The invariants:
//!
//! * every byte written stays in memory until the master has committed it, or until the error that replaces it is
//!   kept to be reported: a chunk that fails costs time, never bytes;
//! * an inode's records are committed in the order in which they were cut, so a later write is never undone by an
//!   earlier one that took longer;
//! * a commit names a record only when every replica has it on disk;
//! * memory is bounded: unsent bytes + every run and record that is not committed.

pub mod attrs;
pub mod chunk;
pub mod commit;
pub mod core;
mod dispatch;
pub(crate) mod driver;
pub mod extents;
pub mod inode;
#[cfg(test)]
mod tests;
mod weather;

use crate::leases::Leases;
use dfs_proto::v1;
use dfs_proto::{ChunkId, FsResult, InodeNo, NodeId};
use std::time::Duration;

/// What allows bytes to be kept.
#[derive(Clone, Copy)]
pub enum Under<'l> {
    /// A write lease that is not being given up.
    WriteLease(&'l Leases),
    /// Any lease, also one that is being given up: for what the kernel writes back of a shared mapping.
    AnyLease(&'l Leases),
    #[cfg(test)]
    Nothing,
}

/// Numbers the runs of an inode in the order in which they were cut. 0 stands before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunNo(pub u64);

/// Which chunks an inode's bytes go into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Policy {
    /// Replicas a chunk shall have.
    pub replicas: u32,
    /// Payload bytes a chunk holds.
    pub chunk_size: u64,
}

/// Somebody who waits for a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WaiterId(pub u64);

/// One commit in flight: its answer names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CommitId(pub u64);

/// The write side's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes that may wait in memory.
    pub memory: u64,
    /// How long an append may make no progress before its chunk is given up.
    pub append_progress: Duration,
    /// How long an inode's bytes may make no progress before they are dropped and the error is kept. Zero: for ever.
    pub operation_timeout: Duration,
    /// How old uncommitted bytes grow before they are sent, synced and committed without being asked.
    pub write_behind: Duration,
}

/// What the core wants done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send an append to the chunk's first replica, in this order. The checksums are still to be filled in.
    Append { address: String, request: v1::AppendRequest },
    /// Ask the master to commit, on somebody's behalf; answer with [`core::Core::committed`].
    Commit { ino: InodeNo, id: CommitId, cred: v1::Cred, commit: v1::Commit },
    /// Ask the master for chunks; answer with [`core::Core::allocated`].
    Alloc { policy: Policy, count: u32 },
    /// Tell the master that nothing more is appended to a chunk; answer with [`core::Core::sealed`].
    Seal { chunk: ChunkId, failed: bool, suspects: Vec<NodeId> },
    /// A flush has ended.
    Wake { waiter: WaiterId, result: FsResult<Option<v1::Attr>> },
    /// Small committed bytes, worth keeping for reads.
    Keep { chunk: ChunkId, offset: u64, bytes: bytes::Bytes },
}
