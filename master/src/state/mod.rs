//! The state machine: what a Raft entry does to the store, and what the store answers. No clock, no randomness, no I/O.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod keys;
pub mod kv;
pub mod read;
mod rows;

use dfs_proto::v1;
use dfs_proto::{FsError, FsResult};
pub use kv::{Kv, MemKv, WriteSet};
pub use read::*;
use std::io;

/// The version of the log's batches.
pub const BATCH_VERSION: u32 = 1;

/// What one command answered.
#[derive(Debug, Clone, PartialEq)]
pub enum Applied {
    Answer(v1::Answer),
    System(v1::SystemAnswer),
}

/// Pure: reads `kv`, writes nothing. One result per command.
pub fn apply(kv: &dyn Kv, batch: &v1::Batch) -> io::Result<(WriteSet, Vec<Applied>)> {
    let _ = (kv, batch);
    Err(io::ErrorKind::Unsupported.into())
}

pub fn query(kv: &dyn Kv, cred: &v1::Cred, query: &v1::Query) -> io::Result<v1::Answer> {
    let _ = (kv, cred, query);
    Err(io::ErrorKind::Unsupported.into())
}

pub fn check_open(kv: &dyn Kv, cred: &v1::Cred, open: &v1::Open) -> io::Result<FsResult<v1::Attr>> {
    let _ = (kv, cred, open);
    Ok(Err(FsError::from(v1::ErrorCode::ErrorNotSupported)))
}

pub fn check_invariants(kv: &dyn Kv) -> Vec<String> {
    let _ = kv;
    Vec::new()
}
