//! The file system as a library: one session with the masters, caches, write-behind, readahead. No FUSE in it.
//!
//! A program makes a [`Client`] and calls it as it would call the kernel; `vfs/` has one family of operations a file.
//! Metadata goes through `session/` to the leading master, bytes through `data/`, `write/` and `read/` to the chunk
//! daemons, and what was learned lately is kept in `cache/`.

pub mod cache;
pub mod config;
pub mod data;
pub mod leases;
pub mod master;
pub mod read;
pub mod session;
pub mod settings;
pub mod vfs;
pub mod write;

pub use cache::Edition;
pub use config::ClientConfig;
pub use dfs_proto::v1::{self, Attr, Cred};
pub use dfs_proto::{FsError, FsResult, InodeNo, SessionId};
pub use master::{Defaults, Master};
pub use vfs::{Client, Closing, Entry, Kernel, OpenFile, OpenFlags, Privileges, SeekKind};
