//! Advisory locks. The FUSE library does not say whether a lock is flock's or fcntl's, so both share one space, as on NFS.

use super::answer::Answer;
use super::convert::{kernel_lock_end, lock_number};
use super::state::Shared;
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, lock};
use fuser::{ReplyEmpty, ReplyLock};

impl Shared {
    /// Tells which lock is in the way.
    pub async fn getlk(&self, ino: InodeNo, lock: v1::Lock, answer: Answer<ReplyLock>) {
        match self.client.getlk(ino, lock).await {
            Ok(state) if state.held => {
                let typ = lock_number(state.r#type());
                let end = kernel_lock_end(state.end);
                answer.send(|reply| reply.locked(state.start, end, typ, state.pid));
            }
            Ok(_) => {
                answer.send(|reply| reply.locked(lock.start, kernel_lock_end(lock.end), libc::F_UNLCK, 0));
            }
            Err(error) => answer.fail(&error),
        }
    }

    /// Takes or gives up a lock, waiting for it when `lock.wait` says so, until a signal comes or the masters have been silent
    /// for too long.
    pub async fn setlk(&self, ino: InodeNo, lock: v1::Lock, answer: Answer<ReplyEmpty>) {
        let taken = tokio::select! {
            biased;
            taken = self.client.setlk(ino, lock) => taken,
            // Dropping the wait takes it back at the master.
            () = answer.interrupted(), if lock.wait => return,
        };
        match taken {
            Ok(()) => {
                if !answer.send(ReplyEmpty::ok) && lock.r#type() != lock::Type::Unlock {
                    // Granted at the moment the signal came: nobody will give it up.
                    let back = v1::Lock { r#type: lock::Type::Unlock.into(), wait: false, ..lock };
                    if let Err(error) = self.client.setlk(ino, back).await {
                        tracing::warn!(%ino, %error, "a lock could not be given up");
                    }
                }
            }
            Err(error) => answer.fail(&error),
        }
    }
}
