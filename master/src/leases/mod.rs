//! What sessions hold in the leader's memory: open files and byte-range locks, and later leases.
//!
//! Nothing here is in the Raft log. A client asserts what it holds again when it attaches to a new leader; until every
//! session that existed at the election has done so or has expired, nothing is granted or freed that an assertion yet
//! to come could contradict (`server/term.rs`, the *reclaim gate*).
//!
//! Each table is a pure core: methods take events and return what follows from them. `server/` owns one of each per
//! term, behind a mutex that is never held across an await.
//!
//! Leases (DESIGN section 6) come as further files here: `table.rs` for who holds which read or write lease on which
//! inode, with grants and recalls as returned actions; `buckets.rs` for the replicated coarse bitmap of where a session
//! holds leases, so that after a failover only commands touching a bucket not asserted again must wait; `recall.rs` for
//! commands parked behind a recall. A lease given back on an open inode becomes an open of `opens.rs`, as it is now.

pub mod locks;
pub mod opens;
