//! The master: namespace, permissions, chunk map and placement, replicated by Raft.

pub mod raft;
pub mod server;
pub mod state;
