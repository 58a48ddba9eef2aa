//! Where a session may hold leases, coarsely: what the log knows of leases.
//!
//! Leases themselves are in the leader's memory alone. Before a session gets its first lease on an inode of a bucket, a
//! command notes the bucket; so a new leader knows which inodes a session may hold leases on that has not said yet which
//! ones they are, and lets everything else pass at once.

use dfs_proto::InodeNo;

/// How many buckets there are.
pub const BUCKETS: u32 = 4096;
/// So many inodes that follow each other share a bucket: those that one client makes at a time do.
const NEIGHBOURS: u64 = 512;

/// The bucket of an inode.
#[must_use]
pub fn bucket_of(ino: InodeNo) -> u32 {
    let bucket = ino.get() / NEIGHBOURS % u64::from(BUCKETS);
    u32::try_from(bucket).expect("below BUCKETS")
}

/// A set of buckets, a bit each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buckets(Vec<u8>);

impl Buckets {
    #[must_use]
    pub fn has(&self, bucket: u32) -> bool {
        self.0.get(bucket as usize / 8).is_some_and(|byte| byte & (1 << (bucket % 8)) != 0)
    }

    /// Adds a bucket; one that does not exist is left out.
    pub fn add(&mut self, bucket: u32) {
        if bucket >= BUCKETS {
            return;
        }
        let at = bucket as usize / 8;
        if self.0.len() <= at {
            self.0.resize(at + 1, 0);
        }
        self.0[at] |= 1 << (bucket % 8);
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_set_is_what_was_added(added in prop::collection::btree_set(0..BUCKETS + 10, 0..50)) {
            let mut buckets = Buckets::default();
            added.iter().for_each(|bucket| buckets.add(*bucket));
            let found: BTreeSet<u32> = (0..BUCKETS + 10).filter(|bucket| buckets.has(*bucket)).collect();
            let expected: BTreeSet<u32> = added.into_iter().filter(|bucket| *bucket < BUCKETS).collect();
            prop_assert_eq!(buckets.is_empty(), expected.is_empty());
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn neighbours_share_a_bucket_and_every_number_has_one() {
        assert_eq!(bucket_of(InodeNo(NEIGHBOURS)), bucket_of(InodeNo(2 * NEIGHBOURS - 1)));
        assert_ne!(bucket_of(InodeNo(NEIGHBOURS - 1)), bucket_of(InodeNo(NEIGHBOURS)));
        assert!(bucket_of(InodeNo(u64::MAX)) < BUCKETS);
    }
}
