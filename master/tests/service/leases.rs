//! Leases between sessions: granted with answers, recalled before others change anything, asserted after a restart.

use crate::harness::*;
use dfs_proto::v1::{
    Access, Attr, Commit, ErrorCode, GetAttr, Hello, LeaseKind, Leased, Open, ReadDir, Recall, SetAttr,
    TakeLease, Unlink, answer::Body, hold, mutation, query,
};
use std::time::Duration;

fn leasing() -> Hello {
    Hello { takes_leases: true, ..hello() }
}

fn chmod(ino: u64, mode: u32) -> mutation::Op {
    mutation::Op::SetAttr(SetAttr { ino, mode: Some(mode), ..SetAttr::default() })
}

fn unlink(name: &str) -> mutation::Op {
    mutation::Op::Unlink(Unlink { parent: ROOT, name: name.to_owned().into(), directory: false })
}

/// A commit without bytes: what a flush of times and mode is.
fn commit(ino: u64) -> mutation::Op {
    let set = SetAttr { ino, mode: Some(0o600), ..SetAttr::default() };
    mutation::Op::Commit(Commit { ino, set: Some(set), ..Commit::default() })
}

fn open(ino: u64, write: bool) -> hold::Op {
    hold::Op::Open(Open { ino, read: true, write, ..Open::default() })
}

fn take(ino: u64, kind: LeaseKind) -> hold::Op {
    hold::Op::TakeLease(TakeLease { ino, kind: kind.into() })
}

fn mode(body: &Body) -> u32 {
    match body {
        Body::Entry(entry) => entry.attr.expect("an entry has attributes").mode,
        other => panic!("no attributes but {other:?}"),
    }
}

async fn getattr(client: &mut Client, ino: u64) -> Body {
    client.query(query::Op::GetAttr(GetAttr { ino, generation: 0 })).await
}

/// Asks until the answer brings a lease: the first one in a region takes a command, and nobody waits for that.
async fn lease(client: &mut Client, ino: u64) {
    for _ in 0..200 {
        getattr(client, ino).await;
        if client.holds(ino) != LeaseKind::LeaseNone {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no lease on {ino}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_waits_until_others_have_dropped_what_it_makes_old() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let (mut a, mut b) = (serve(master.address(), leasing()).await, serve(master.address(), leasing()).await);
    let mut plain = client(master.address()).await;
    let ino = a.create("f", false).await.ino;
    lease(&mut a, ino).await;
    lease(&mut b, ino).await;
    lease(&mut b, ROOT).await;
    // Absent names too: the directory is what is held.
    assert_eq!(b.lookup("g").await.unwrap_err(), ErrorCode::ErrorNotFound);
    getattr(&mut plain, ino).await;
    assert_eq!(plain.holds(ino), LeaseKind::LeaseNone, "it did not ask for any");

    // One's own lease is not in the way of one's own change.
    let changing = a.send(mutation_op(chmod(ino, 0o600))).await;
    let recall = b.recall().await;
    assert_eq!((recall.ino, recall.keep()), (ino, LeaseKind::LeaseNone));
    // What is under way is not seen, not leased, and holds up nothing else.
    assert_eq!(mode(&getattr(&mut plain, ino).await), 0o644);
    assert!(plain.lookup("f").await.is_ok());
    b.give_back(&recall).await;
    assert_eq!(mode(&a.answer(changing).await), 0o600);
    assert_eq!(mode(&getattr(&mut b, ino).await), 0o600);
    assert_eq!(b.holds(ino), LeaseKind::LeaseRead);

    // A new name, and the removal of one: the directory is recalled, and the inode behind the name.
    let making = plain.send(mutation_op(create("g", false))).await;
    let recall = b.recall().await;
    assert_eq!(recall.ino, ROOT);
    b.give_back(&recall).await;
    while a.holds(ROOT) != LeaseKind::LeaseNone {
        let recall = a.recall().await;
        a.give_back(&recall).await;
    }
    assert_eq!(code(&plain.answer(making).await), ErrorCode::ErrorOk);
    let removing = plain.send(mutation_op(unlink("f"))).await;
    for client in [&mut a, &mut b] {
        let recall = client.recall().await;
        assert_eq!(recall.ino, ino);
        client.give_back(&recall).await;
    }
    assert_eq!(code(&plain.answer(removing).await), ErrorCode::ErrorOk);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_a_directory_brings_leases_on_everything_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let (mut a, mut b) = (serve(master.address(), leasing()).await, serve(master.address(), leasing()).await);
    let mut inos = Vec::new();
    for n in 0..300 {
        inos.push(a.create(&format!("f{n}"), false).await.ino);
    }
    lease(&mut b, ROOT).await;
    lease(&mut b, inos[0]).await;
    let list = ReadDir { ino: ROOT, cookie: 0, max_entries: 1000, plus: true };
    let Body::DirPage(page) = b.query(query::Op::ReadDir(list)).await else { panic!("no page") };
    assert_eq!(page.entries.len(), 300);
    for ino in inos {
        assert_eq!(b.holds(ino), LeaseKind::LeaseRead, "{ino}");
    }
    let sessions = status(master.address()).await.sessions;
    assert!(sessions.iter().any(|session| session.leases == 301), "{sessions:?}");
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_writer_buffers_is_flushed_before_others_look() {
    let dir = tempfile::tempdir().unwrap();
    let master = start_with(dfs_master::Config { session_ttl_ms: 20_000, ..config(dir.path()) }).await;
    let (mut a, mut b) = (serve(master.address(), leasing()).await, serve(master.address(), leasing()).await);
    let made = a.create("f", true).await;
    let ino = made.ino;
    assert_eq!(code(&b.hold(take(ino, LeaseKind::LeaseWrite)).await), ErrorCode::ErrorAccess);
    let Body::Leased(Leased { attr: Some(_) }) = a.hold(take(ino, LeaseKind::LeaseWrite)).await else {
        panic!("nobody else has it open")
    };
    assert_eq!(a.holds(ino), LeaseKind::LeaseWrite);
    // What it looks like, the writer says, and goes on writing.
    let looking = b.send(query_op(query::Op::GetAttr(GetAttr { ino, generation: 0 }))).await;
    a.tell(|ask| Some(Attr { ino: ask.ino, size: 77, mode: 0o640, ..made })).await;
    let Body::Entry(seen) = b.answer(looking).await else { panic!("no attributes") };
    let seen = seen.attr.expect("attributes");
    assert_eq!((seen.size, seen.mode, seen.nlink), (77, 0o640, 1));
    assert_eq!((a.holds(ino), b.holds(ino)), (LeaseKind::LeaseWrite, LeaseKind::LeaseNone));
    // Whoever needs more has it flushed, and may go on reading himself; so has whoever gets no answer.
    let looking = b.send(query_op(query::Op::Access(Access { ino, mask: 4 }))).await;
    let recall = a.recall().await;
    assert_eq!((recall.ino, recall.keep()), (ino, LeaseKind::LeaseRead));
    assert_eq!(mode(&a.mutate(commit(ino)).await), 0o600);
    a.give_back(&recall).await;
    assert_eq!(mode(&b.answer(looking).await), 0o600);
    lease(&mut b, ino).await;

    // Back to writing: the reader is recalled.
    let taking = a.send(hold_op(take(ino, LeaseKind::LeaseWrite))).await;
    let recall = b.recall().await;
    b.give_back(&recall).await;
    assert_eq!(code(&a.answer(taking).await), ErrorCode::ErrorOk);
    assert_eq!(a.holds(ino), LeaseKind::LeaseWrite);

    // Two that write take turns: each flushes when the other one wants to.
    let opening = b.send(hold_op(open(ino, true))).await;
    let recall = a.recall().await;
    assert_eq!(recall.keep(), LeaseKind::LeaseRead);
    a.give_back(&recall).await;
    assert_eq!(code(&b.answer(opening).await), ErrorCode::ErrorOk);
    for turn in 0..4 {
        let (one, other) = if turn % 2 == 0 { (&mut b, &mut a) } else { (&mut a, &mut b) };
        let taking = one.send(hold_op(take(ino, LeaseKind::LeaseWrite))).await;
        let recall = other.recall().await;
        if other.holds(ino) == LeaseKind::LeaseWrite {
            other.mutate(commit(ino)).await;
        }
        other.give_back(&recall).await;
        assert_eq!(code(&one.answer(taking).await), ErrorCode::ErrorOk);
        assert_eq!((one.holds(ino), other.holds(ino)), (LeaseKind::LeaseWrite, LeaseKind::LeaseNone));
    }
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restart_leases_are_asserted_and_only_who_may_hold_some_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    // Long enough that nothing here ends because a session expired.
    let config = || dfs_master::Config { session_ttl_ms: 20_000, ..config(dir.path()) };
    let master = start_with(config()).await;
    let (mut a, mut b) = (serve(master.address(), leasing()).await, serve(master.address(), leasing()).await);
    let silent = client(master.address()).await;
    let ino = a.create("f", false).await.ino;
    lease(&mut a, ino).await;
    lease(&mut b, ino).await;
    let held = b.leases.keys().copied().collect::<Vec<_>>();
    master.shutdown().await;
    let master = start_with(config()).await;
    let mut a = serve(master.address(), Hello { takes_leases: true, ..a.resume() }).await.after(&a);
    // The one that never had any is not waited for, the other one is.
    let changing = a.send(mutation_op(chmod(ino, 0o600))).await;
    assert_eq!(mode(&getattr(&mut a, ino).await), 0o644);
    let hello = Hello { takes_leases: true, read_leases: held.clone(), ..b.resume() };
    let mut again = serve(master.address(), hello).await.after(&b);
    again.leases = held.iter().map(|ino| (*ino, (LeaseKind::LeaseRead, 0))).collect();
    let recall: Recall = again.recall().await;
    assert_eq!(recall.ino, ino);
    again.give_back(&recall).await;
    assert_eq!(mode(&a.answer(changing).await), 0o600);
    drop(silent);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_session_ends_its_leases_and_a_new_stream_says_which_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let master = start_with(dfs_master::Config { session_ttl_ms: 2_000, ..config(dir.path()) }).await;
    let (mut a, mut b) = (serve(master.address(), leasing()).await, serve(master.address(), leasing()).await);
    let ino = a.create("f", false).await.ino;
    lease(&mut b, ino).await;
    lease(&mut b, ROOT).await;
    // A new stream that names one of the two: the other one is free.
    let hello = Hello { takes_leases: true, read_leases: vec![ino], ..b.resume() };
    let _silent = serve(master.address(), hello).await;
    assert_eq!(code(&a.mutate(create("g", false)).await), ErrorCode::ErrorOk);
    a.stay_alive();
    // It neither gives back nor says anything: it expires, and the change goes on.
    assert_eq!(mode(&a.mutate(chmod(ino, 0o600)).await), 0o600);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_repeated_brings_no_lease() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let (mut a, mut b) = (serve(master.address(), leasing()).await, serve(master.address(), leasing()).await);
    let warm = a.create("warm", false).await.ino;
    lease(&mut a, warm).await;
    let seq = a.send(mutation_op(create("f", false))).await;
    let Body::Entry(made) = a.answer(seq).await else { panic!("not made") };
    let ino = made.attr.expect("attributes").ino;
    // Its stream breaks and it says that it holds nothing: the answer was lost. Meanwhile the file is removed.
    let mut again = serve(master.address(), Hello { takes_leases: true, ..a.resume() }).await.after(&a);
    assert_eq!(code(&b.mutate(unlink("f")).await), ErrorCode::ErrorOk);
    again.send_again(seq, mutation_op(create("f", false))).await;
    let Body::Entry(made) = again.answer(seq).await else { panic!("another answer") };
    assert_eq!(made.attr.expect("attributes").ino, ino);
    assert_eq!((again.holds(ino), again.holds(ROOT)), (LeaseKind::LeaseNone, LeaseKind::LeaseNone));
    master.shutdown().await;
}
