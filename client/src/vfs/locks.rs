//! Advisory locks: fcntl and flock, held at the master. The session asserts them again after a failover.

use super::{Client, own_cred, unexpected};
use dfs_proto::v1::{self, answer, hold};
use dfs_proto::{FsResult, InodeNo};

impl Client {
    /// The lock that is in the way of `lock`, if any (`held`).
    ///
    /// # Errors
    /// The session's.
    pub async fn getlk(&self, ino: InodeNo, lock: v1::Lock) -> FsResult<v1::LockState> {
        let question = v1::GetLock {
            ino: ino.get(),
            owner: lock.owner,
            start: lock.start,
            end: lock.end,
            r#type: lock.r#type,
        };
        match self.inner.master.hold(&own_cred(), hold::Op::GetLock(question)).await? {
            answer::Body::Lock(state) => Ok(state),
            other => Err(unexpected(&other)),
        }
    }

    /// Takes or gives up a lock. With `wait` it waits as long as it takes; dropping the future takes the wait back.
    ///
    /// # Errors
    /// ErrorWouldBlock, ErrorDeadlock, ErrorNoLocks, and the session's.
    pub async fn setlk(&self, ino: InodeNo, lock: v1::Lock) -> FsResult<()> {
        let lock = v1::Lock { ino: ino.get(), ..lock };
        self.inner.master.hold(&own_cred(), hold::Op::Lock(lock)).await.map(drop)
    }

    /// Gives up everything an owner has on an inode, as close(2) does.
    ///
    /// # Errors
    /// The session's.
    pub async fn release_locks(&self, ino: InodeNo, owner: u64) -> FsResult<()> {
        if !self.inner.session.has_locks(ino, owner) {
            return Ok(());
        }
        let release = v1::ReleaseLocks { ino: ino.get(), owner };
        self.inner.master.hold(&own_cred(), hold::Op::ReleaseLocks(release)).await.map(drop)
    }
}
