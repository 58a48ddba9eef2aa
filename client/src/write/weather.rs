//! Whether what was written may be stored after close(2) has returned.
//!
//! A program that does not fsync is told of an error by its next call on the file, and close is the last one. So close waits whenever
//! anything suggests that the bytes might not get where they should: something failed lately, an answer is late, a daemon has little
//! room. While nothing does, nobody needs to wait for a small file, and many of them are stored side by side.

use super::core::Core;
use dfs_proto::InodeNo;
use dfs_proto::limits::ROOMY_BYTES;
use std::time::Duration;

/// Bytes of a file for which close does not wait.
const SMALL: u64 = 4 << 20;
/// Within which answers come while all is well.
const LATE: Duration = Duration::from_millis(500);
/// For how long a failure is remembered, and what a daemon said of its room.
const LATELY: Duration = Duration::from_secs(10);

/// What is remembered of how it went.
#[derive(Debug, Default)]
pub(super) struct Weather {
    failed_at: Option<Duration>,
    /// Commits that the master has not answered, and when it last answered one, or the first of them went out.
    commits: usize,
    answered_at: Duration,
}

impl Weather {
    pub fn failed(&mut self, now: Duration) {
        self.failed_at = Some(now);
    }

    pub fn commit_began(&mut self, now: Duration) {
        if self.commits == 0 {
            self.answered_at = now;
        }
        self.commits += 1;
    }

    pub fn commit_ended(&mut self, went_well: bool, now: Duration) {
        self.commits = self.commits.saturating_sub(1);
        self.answered_at = now;
        if !went_well {
            self.failed(now);
        }
    }

    fn is_fine(&self, now: Duration) -> bool {
        let failed = self.failed_at.is_some_and(|at| now.saturating_sub(at) < LATELY);
        let late = self.commits > 0 && now.saturating_sub(self.answered_at) > LATE;
        !failed && !late
    }
}

impl Core {
    /// A daemon said how many bytes all that hold a chunk take besides.
    pub(super) fn learn_room(&mut self, policy: super::Policy, free_bytes: u64, now: Duration) {
        self.pools.entry(policy).or_default().roomy_at = (free_bytes >= ROOMY_BYTES).then_some(now);
    }

    /// Whether nobody needs to wait until an inode's bytes are stored.
    #[must_use]
    pub fn may_be_left(&self, ino: InodeNo, now: Duration) -> bool {
        let Some(inode) = self.inodes.get(&ino).filter(|inode| !inode.is_clean()) else { return true };
        let roomy_at = self.pools.get(&inode.policy).and_then(|pool| pool.roomy_at);
        let on_time = |since: Duration| now.saturating_sub(since) <= LATE;
        roomy_at.is_some_and(|at| now.saturating_sub(at) < LATELY)
            && inode.held_bytes() <= SMALL
            && self.used() <= self.settings.memory / 4
            && self.weather.is_fine(now)
            && self.chunks.values().all(|chunk| !chunk.is_waiting() || on_time(chunk.progress_at))
    }
}
