//! Locks between sessions.

use crate::harness::*;
use dfs_proto::v1::{
    CancelLock, ErrorCode, GetLock, HeldLock, Hello, Lock, ReleaseLocks, answer::Body, hold, lock::Type,
};

fn lock(owner: u64, end: u64, kind: Type, wait: bool) -> hold::Op {
    hold::Op::Lock(Lock { ino: 9, owner, start: 0, end, r#type: kind.into(), wait, pid: 42 })
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_conflict_wait_and_are_released() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut a = client(master.address()).await;
    let mut b = client(master.address()).await;
    assert_eq!(code(&a.hold(lock(1, 9, Type::Write, false)).await), ErrorCode::ErrorOk);
    assert_eq!(code(&b.hold(lock(1, 9, Type::Read, false)).await), ErrorCode::ErrorWouldBlock);
    let get = GetLock { ino: 9, owner: 1, start: 5, end: 5, r#type: Type::Read.into() };
    let Body::Lock(held) = b.hold(hold::Op::GetLock(get)).await else { panic!("no lock state") };
    assert_eq!((held.held, held.start, held.end, held.r#type()), (true, 0, 9, Type::Write));

    let waiting = b.send(hold_op(lock(1, 4, Type::Write, true))).await;
    // Other requests of the session go on while one waits.
    assert!(b.lookup("nothing").await.is_err());
    assert_eq!(code(&a.hold(lock(1, 9, Type::Unlock, false)).await), ErrorCode::ErrorOk);
    assert_eq!(code(&b.answer(waiting).await), ErrorCode::ErrorOk);

    // Each would wait for the other.
    assert_eq!(code(&a.hold(other(1, false)).await), ErrorCode::ErrorOk);
    let waiting = b.send(hold_op(other(1, true))).await;
    assert!(b.lookup("nothing").await.is_err());
    assert_eq!(code(&a.hold(lock(1, 9, Type::Write, true)).await), ErrorCode::ErrorDeadlock);
    let cancelled = b.hold(hold::Op::CancelLock(CancelLock { seq: waiting })).await;
    assert_eq!(code(&cancelled), ErrorCode::ErrorOk);
    assert_eq!(code(&b.answer(waiting).await), ErrorCode::ErrorInterrupted);

    // The end of the holder's session lets the waiter in.
    let waiting = a.send(hold_op(lock(1, 9, Type::Write, true))).await;
    assert!(a.lookup("nothing").await.is_err());
    b.goodbye().await;
    assert_eq!(code(&a.answer(waiting).await), ErrorCode::ErrorOk);
    let release = ReleaseLocks { ino: 9, owner: 1 };
    assert_eq!(code(&a.hold(hold::Op::ReleaseLocks(release)).await), ErrorCode::ErrorOk);
    assert_eq!(status(master.address()).await.sessions[0].locks, 1);
    master.shutdown().await;
}

/// A lock on another file.
fn other(owner: u64, wait: bool) -> hold::Op {
    let kind = Type::Write.into();
    hold::Op::Lock(Lock { ino: 10, owner, start: 0, end: u64::MAX, r#type: kind, wait, pid: 1 })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_asserted_after_a_restart_is_not_given_to_somebody_who_was_quicker() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut holder = client(master.address()).await;
    assert_eq!(code(&holder.hold(lock(1, 9, Type::Write, false)).await), ErrorCode::ErrorOk);
    let held = HeldLock { ino: 9, owner: 1, start: 0, end: 9, r#type: Type::Write.into(), pid: 42 };
    let resume = Hello { locks: vec![held], ..holder.resume() };
    master.shutdown().await;

    let master = start(dir.path()).await;
    let mut quick = client(master.address()).await;
    let early = quick.send(hold_op(lock(1, 9, Type::Write, false))).await;
    assert!(quick.lookup("nothing").await.is_err());
    let _holder = serve(master.address(), resume).await;
    assert_eq!(code(&quick.answer(early).await), ErrorCode::ErrorWouldBlock);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_falls_silent_loses_its_locks() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut holder = client(master.address()).await;
    assert_eq!(code(&holder.hold(lock(1, 9, Type::Write, false)).await), ErrorCode::ErrorOk);
    let mut waiter = client(master.address()).await;
    let waiting = waiter.send(hold_op(lock(1, 9, Type::Write, true))).await;
    for number in 1..=30 {
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        if number < 12 {
            waiter.keep_alive(number).await;
        } else {
            break;
        }
    }
    let keep = async {
        assert_eq!(code(&waiter.answer(waiting).await), ErrorCode::ErrorOk);
    };
    soon(keep).await;
    drop(holder);
    master.shutdown().await;
}
