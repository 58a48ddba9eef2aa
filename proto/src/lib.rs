//! What every part of dfs must agree on: protocols, identifiers, units, errors, limits, checksums and tokens. No I/O.

pub mod checksum;
pub mod cred;
pub mod error;
pub mod ids;
pub mod limits;
pub mod time;
pub mod token;
pub mod units;

pub use error::{FsError, FsResult};
pub use ids::{ByteLen, ByteOffset, ChunkId, Epoch, InodeNo, NodeId, SessionId};

/// The version of every protocol between dfs processes. A peer that speaks another one is refused with one clear line.
pub const PROTOCOL_VERSION: u32 = 1;

/// The generated messages and services of `proto/*.proto`.
pub mod v1 {
    #![allow(clippy::all, clippy::pedantic, missing_docs)]
    tonic::include_proto!("dfs.v1");
}
