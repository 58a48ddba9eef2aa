//! Whether what was written may be stored after close(2) has returned.
//!
//! A program that does not fsync is told of an error by its next call on the file, and close is the last one. So close waits whenever
//! anything suggests that the bytes might not get where they should, and whenever nothing was heard for a moment that suggests that
//! they will: a cluster that has just died says nothing. While answers come in all the time, nobody needs to wait for a small file, and
//! many of them are stored side by side.

use super::Policy;
use super::core::Core;
use dfs_proto::InodeNo;
use dfs_proto::limits::ROOMY_BYTES;
use std::time::Duration;

/// Bytes of a file for which close does not wait.
const SMALL: u64 = 4 << 20;
/// Within which both the master and the daemons must have answered, and a daemon that owes an answer must have given one.
const RECENT: Duration = Duration::from_millis(100);
/// For how long a failure is remembered.
const REMEMBERED: Duration = Duration::from_secs(10);

/// How it went lately.
#[derive(Debug, Default)]
pub(super) struct Weather {
    failed_at: Option<Duration>,
    /// When the master last took a commit.
    committed_at: Option<Duration>,
}

impl Weather {
    pub fn failed(&mut self, now: Duration) {
        self.failed_at = Some(now);
    }

    pub fn commit_ended(&mut self, went_well: bool, now: Duration) {
        if went_well {
            self.committed_at = Some(now);
        } else {
            self.failed(now);
        }
    }
}

fn within(at: Option<Duration>, bound: Duration, now: Duration) -> bool {
    at.is_some_and(|at| now.saturating_sub(at) <= bound)
}

impl Core {
    /// The daemons that hold a chunk said how many bytes all of them take besides.
    pub(super) fn learn_room(&mut self, policy: Policy, free_bytes: u64, now: Duration) {
        self.pools.entry(policy).or_default().roomy_at = (free_bytes >= ROOMY_BYTES).then_some(now);
    }

    /// Whether nobody needs to wait until an inode's bytes are stored.
    #[must_use]
    pub fn may_be_left(&self, ino: InodeNo, now: Duration) -> bool {
        let Some(inode) = self.inodes.get(&ino).filter(|inode| !inode.is_clean()) else { return true };
        let roomy_at = self.pools.get(&inode.policy).and_then(|pool| pool.roomy_at);
        within(roomy_at, RECENT, now)
            && within(self.weather.committed_at, RECENT, now)
            && !within(self.weather.failed_at, REMEMBERED, now)
            && inode.held_bytes() <= SMALL
            && self.used() <= self.settings.memory / 4
            && self
                .chunks
                .values()
                .all(|chunk| !chunk.is_waiting() || within(Some(chunk.progress_at), RECENT, now))
    }
}
