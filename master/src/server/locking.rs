//! Locks: taken, waited for, asked about and given back.

use super::connection::{Done, Link};
use super::memory::Verdict;
use super::questions::empty;
use super::requests::reply;
use super::{Gone, answer, failed};
use crate::leases::locks::{self, Lock, Outcome, Owner, Range, WaiterId};
use dfs_proto::v1::{self, ErrorCode, answer::Body};
use dfs_proto::{FsError, InodeNo};
use std::sync::Arc;

fn wanted(link: &Link, lock: &v1::Lock, kind: locks::Kind) -> Result<Lock, FsError> {
    if lock.start > lock.end {
        return Err(FsError::new(ErrorCode::ErrorInvalid, "a lock that ends before it begins"));
    }
    let owner = Owner { session: link.session, key: lock.owner };
    Ok(Lock { owner, range: Range { start: lock.start, end: lock.end }, kind, pid: lock.pid })
}

/// Takes a lock, waits for it, or gives it back.
pub async fn lock(link: Arc<Link>, seq: u64, lock: v1::Lock) -> Result<Done, Gone> {
    let done = |answer| Ok(Done::Reply(reply(seq, answer)));
    let ino = InodeNo(lock.ino);
    let kind = match lock.r#type() {
        v1::lock::Type::Read => locks::Kind::Read,
        v1::lock::Type::Write => locks::Kind::Write,
        v1::lock::Type::Unlock => {
            let range = Range { start: lock.start, end: lock.end };
            if lock.start > lock.end {
                return done(failed(ErrorCode::ErrorInvalid));
            }
            let owner = Owner { session: link.session, key: lock.owner };
            let mut memory = link.term.memory();
            let granted = memory.locks.unlock(ino, owner, range);
            memory.wake(granted);
            return done(empty());
        }
    };
    let wanted = match wanted(&link, &lock, kind) {
        Ok(wanted) => wanted,
        Err(error) => return done(failed(error)),
    };
    // A lock that its holder is yet to assert must not be given to somebody else.
    link.term.reclaimed().await?;
    link.term.shared.confirm().await?;
    let outcome = {
        let mut memory = link.term.memory();
        if !memory.serves(link.session, link.generation) {
            return Err(Gone::default());
        }
        memory.lock(ino, wanted, lock.wait, seq)
    };
    let verdict = match outcome {
        Ok(Outcome::Held) => return done(empty()),
        Ok(Outcome::WouldBlock | Outcome::Waiting(_)) => return done(failed(ErrorCode::ErrorWouldBlock)),
        Ok(Outcome::Deadlock) => return done(failed(ErrorCode::ErrorDeadlock)),
        Ok(Outcome::TooMany) => return done(failed(ErrorCode::ErrorNoLocks)),
        Err((id, verdict)) => {
            let _wait = Wait { link: Arc::clone(&link), id };
            verdict.await
        }
    };
    match verdict {
        Ok(Verdict::Held) => {
            // The grant may have taken hours: it counts only if this master still leads.
            link.term.shared.confirm().await?;
            done(empty())
        }
        Ok(Verdict::Interrupted) => done(failed(ErrorCode::ErrorInterrupted)),
        // The session was asserted anew or has ended: whoever serves it now is asked again.
        Err(_) => Err(Gone::default()),
    }
}

/// A wait for a lock; it ends with its stream.
struct Wait {
    link: Arc<Link>,
    id: WaiterId,
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.link.term.memory().forget_wait(self.id);
    }
}

/// Tells whose lock is in the way.
pub async fn get_lock(link: Arc<Link>, seq: u64, lock: v1::GetLock) -> Result<Done, Gone> {
    let done = |answer| Ok(Done::Reply(reply(seq, answer)));
    let kind = match lock.r#type() {
        v1::lock::Type::Read => locks::Kind::Read,
        v1::lock::Type::Write => locks::Kind::Write,
        v1::lock::Type::Unlock => return done(failed(ErrorCode::ErrorInvalid)),
    };
    let owner = Owner { session: link.session, key: lock.owner };
    let range = Range { start: lock.start, end: lock.end };
    if lock.start > lock.end {
        return done(failed(ErrorCode::ErrorInvalid));
    }
    link.term.reclaimed().await?;
    link.term.shared.confirm().await?;
    let conflict = link.term.memory().locks.conflict(InodeNo(lock.ino), &Lock { owner, range, kind, pid: 0 });
    let state = conflict.map_or(v1::LockState::default(), |held| v1::LockState {
        held: true,
        start: held.range.start,
        end: held.range.end,
        r#type: match held.kind {
            locks::Kind::Read => v1::lock::Type::Read.into(),
            locks::Kind::Write => v1::lock::Type::Write.into(),
        },
        // A process of another machine means nothing here; fcntl(2) shows it as -1 or 0.
        pid: if held.owner.session == link.session { held.pid } else { 0 },
    });
    done(answer(Body::Lock(state)))
}
