//! What sessions hold in the leader's memory: leases, open files and byte-range locks.
//!
//! Nothing here is in the Raft log. A client asserts what it holds again when it attaches to a new leader; until every
//! session that existed at the election has done so or has expired, nothing is granted or freed that an assertion yet
//! to come could contradict (`server/term.rs`, the *reclaim gate*).
//!
//! Each table is a pure core: methods take events and return what follows from them. `server/` owns one of each per
//! term, behind a mutex that is never held across an await.
//!
//! * `table.rs`: who holds which read or write lease on which inode, and how changes get past them;
//! * `buckets.rs`: where a session may hold leases, coarsely, which is in the log;
//! * `names.rs`: names that changes under way are about;
//! * `opens.rs`: who has which inode open; a lease given back on an open inode leaves its open behind;
//! * `locks.rs`: byte-range locks.

pub mod buckets;
pub mod locks;
pub mod names;
pub mod opens;
pub mod table;
