//! Advisory locks: fcntl and flock, held at the master. The session asserts them again after a failover.

use super::{Client, own_cred, unexpected};
use dfs_proto::v1::{self, ErrorCode, answer, hold};
use dfs_proto::{FsResult, InodeNo};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// How long a close that the kernel told of before this attempt may be on its way through this process.
const CLOSE_UNDER_WAY: Duration = Duration::from_millis(1);
/// How often an attempt is repeated because files were closed meanwhile.
const ATTEMPTS: u32 = 10;

/// Closes that give up locks. The kernel waits for none of them, but whoever closed a file and then asks for its lock
/// must find it free.
#[derive(Default)]
pub(super) struct Closings {
    state: Mutex<ClosingState>,
    ended: Notify,
}

#[derive(Default)]
struct ClosingState {
    under_way: HashMap<InodeNo, u32>,
    /// How many have ended so far.
    ended: u64,
}

impl Closings {
    // A poisoned table is whole: every change is a single step.
    fn state(&self) -> MutexGuard<'_, ClosingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> u64 {
        self.state().ended
    }

    /// Waits for what is under way on an inode; answers whether any close has ended since `ended` was counted.
    async fn settle(&self, ino: InodeNo, ended: u64) -> bool {
        loop {
            let notified = self.ended.notified();
            {
                let state = self.state();
                if !state.under_way.contains_key(&ino) {
                    return state.ended != ended;
                }
            }
            notified.await;
        }
    }
}

/// A close that gives up locks; over when it is dropped.
pub struct Closing {
    closings: Arc<Closings>,
    ino: InodeNo,
    owner: u64,
}

impl Drop for Closing {
    fn drop(&mut self) {
        let mut state = self.closings.state();
        if let Some(count) = state.under_way.get_mut(&self.ino) {
            *count -= 1;
            if *count == 0 {
                state.under_way.remove(&self.ino);
            }
        }
        state.ended += 1;
        drop(state);
        self.closings.ended.notify_waiters();
    }
}

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
        let closings = &self.inner.closings;
        for _ in 1..ATTEMPTS {
            let ended = closings.ended();
            match self.inner.master.hold(&own_cred(), hold::Op::Lock(lock)).await {
                Err(error) if error.code == ErrorCode::ErrorWouldBlock => {
                    let mut freed = closings.settle(ino, ended).await;
                    if !freed && self.inner.session.has_locks_on(ino) {
                        tokio::time::sleep(CLOSE_UNDER_WAY).await;
                        freed = closings.settle(ino, ended).await;
                    }
                    if !freed {
                        return Err(error);
                    }
                }
                other => return other.map(drop),
            }
        }
        self.inner.master.hold(&own_cred(), hold::Op::Lock(lock)).await.map(drop)
    }

    /// Says that a file is being closed whose locks of this owner are to be given up. To be called in the order of the
    /// closes and lock requests; [`Client::close_locks`] does it.
    #[must_use]
    pub fn closing(&self, ino: InodeNo, owner: u64) -> Closing {
        *self.inner.closings.state().under_way.entry(ino).or_default() += 1;
        Closing { closings: Arc::clone(&self.inner.closings), ino, owner }
    }

    /// Gives up the locks of a file that is being closed.
    ///
    /// # Errors
    /// The session's.
    pub async fn close_locks(&self, closing: Closing) -> FsResult<()> {
        self.release_locks(closing.ino, closing.owner).await
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
