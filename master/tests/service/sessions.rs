//! Sessions: hello, requests, exactly-once, reconnects, the end.

use crate::harness::*;
use dfs_proto::v1::{
    ClientFrame, Close, Cred, EarlierSession, ErrorCode, GetAttr, Hello, Open, OpenFile, Query, ReadDir,
    Request, StatFs, Unlink, answer::Body, hold, mutation, query, request,
};
use dfs_proto::{PROTOCOL_VERSION, limits};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn a_session_creates_looks_up_lists_and_removes() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut client = client(master.address()).await;
    assert_eq!(client.welcome.replicas, 3);
    assert_eq!(client.welcome.chunk_size, 64 << 20);
    assert_eq!(client.welcome.ttl_ms, 1000);
    assert_eq!(client.welcome.cluster_id, key().cluster_id());
    let made = client.create("a", false).await;
    assert_eq!(client.lookup("a").await.unwrap().ino, made.ino);
    assert_eq!(client.lookup("b").await, Err(ErrorCode::ErrorNotFound));
    assert_eq!(code(&client.mutate(create("a", false)).await), ErrorCode::ErrorExists);
    let page = ReadDir { ino: ROOT, max_entries: 10, ..ReadDir::default() };
    let Body::DirPage(page) = client.query(query::Op::ReadDir(page)).await else { panic!("no page") };
    assert_eq!((page.entries.len(), page.end), (1, true));
    client.keep_alive(9).await;
    let unlink = Unlink { parent: ROOT, name: "a".into(), directory: false };
    assert_eq!(code(&client.mutate(mutation::Op::Unlink(unlink)).await), ErrorCode::ErrorOk);
    assert_eq!(client.lookup("a").await, Err(ErrorCode::ErrorNotFound));
    client.goodbye().await;
    eventually("only the root is left", || async { status(master.address()).await.files == 1 }).await;
    let status = status(master.address()).await;
    assert_eq!((status.sessions.len(), status.masters.len()), (0, 1));
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_one_frame_run_side_by_side_and_all_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut client = client(master.address()).await;
    let cred = Some(dfs_proto::v1::Cred::default());
    let requests = (1..=500)
        .map(|seq| {
            let op = if seq % 2 == 0 {
                mutation_op(create(&format!("f{seq}"), false))
            } else {
                let get = GetAttr { ino: ROOT, generation: 0 };
                request::Op::Query(Query { op: Some(query::Op::GetAttr(get)) })
            };
            Request { seq, cred: cred.clone(), op: Some(op), ..Default::default() }
        })
        .collect();
    client.send_frame(ClientFrame { requests, ..ClientFrame::default() }).await;
    for seq in 1..=500 {
        assert_eq!(code(&client.answer(seq).await), ErrorCode::ErrorOk, "{seq}");
    }
    assert_eq!(status(master.address()).await.files, 251);
    // A request of a kind that is not known is answered too.
    let request = Request { seq: 501, cred, op: None, ..Default::default() };
    client.send_frame(ClientFrame { requests: vec![request], ..ClientFrame::default() }).await;
    assert_eq!(code(&client.answer(501).await), ErrorCode::ErrorNotSupported);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_mutation_is_applied_once_over_streams_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut first = client(master.address()).await;
    let seq = first.send(mutation_op(create("once", false))).await;
    let answer = first.answer(seq).await;
    first.send_again(seq, mutation_op(create("once", false))).await;
    assert_eq!(first.answer(seq).await, answer);

    let mut second = serve(master.address(), first.resume()).await;
    second.send_again(seq, mutation_op(create("once", false))).await;
    assert_eq!(second.answer(seq).await, answer);
    assert!(first.frame().await.is_none(), "the older stream of a session ends");
    assert_eq!(second.welcome.session, first.welcome.session);
    let resume = second.resume();
    master.shutdown().await;
    drop(second);

    let master = start(dir.path()).await;
    let mut third = serve(master.address(), resume).await;
    third.send_again(seq, mutation_op(create("once", false))).await;
    assert_eq!(third.answer(seq).await, answer);
    assert_eq!(status(master.address()).await.files, 2);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_with_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let old = refused(master.address(), Hello { version: 99, ..hello() }).await;
    assert_eq!(old.code(), ErrorCode::ErrorVersion);
    assert_eq!(
        old.message,
        format!("the client speaks protocol version 99, this master version {PROTOCOL_VERSION}")
    );
    let lost = refused(master.address(), Hello { cluster_id: "0123".to_owned(), ..hello() }).await;
    assert_eq!(lost.code(), ErrorCode::ErrorWrongCluster);
    let unknown = refused(master.address(), Hello { session: 4711, ..hello() }).await;
    assert_eq!(unknown.code(), ErrorCode::ErrorSessionExpired);
    let owner = client(master.address()).await;
    let thief = refused(master.address(), Hello { nonce: 1, ..owner.resume() }).await;
    assert_eq!(thief.code(), ErrorCode::ErrorSessionExpired);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_session_expires_and_a_lively_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let silent = client(master.address()).await;
    let mut lively = client(master.address()).await;
    for number in 1..=20 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        lively.keep_alive(number).await;
    }
    let failure = refused(master.address(), silent.resume()).await;
    assert_eq!(failure.code(), ErrorCode::ErrorSessionExpired);
    assert!(lively.lookup("x").await.is_err());
    assert_eq!(status(master.address()).await.sessions.len(), 1);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_session_did_before_it_expired_its_client_hears_in_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut silent = client(master.address()).await;
    let done = silent.send(mutation_op(create("done", true))).await;
    let Body::Entry(made) = silent.answer(done).await else { panic!("not made") };
    let ino = made.attr.unwrap().ino;
    let earlier = EarlierSession { session: silent.welcome.session, nonce: hello().nonce };
    // Another nonce than the first one's: it is another session.
    let mut again = serve(master.address(), Hello { nonce: 77, ..hello() }).await;
    let request = |seq: u64, name: &str| Request {
        seq,
        cred: Some(Cred::default()),
        op: Some(mutation_op(create(name, true))),
        earlier: vec![earlier],
    };
    let ask = |requests| ClientFrame { requests, ..ClientFrame::default() };
    // While the first one lives nobody can say.
    again.send_frame(ask(vec![request(done + 1, "new")])).await;
    assert_eq!(code(&again.answer(done + 1).await), ErrorCode::ErrorUnavailable);
    for number in 1..=20 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        again.keep_alive(number).await;
    }
    let failure = refused(master.address(), silent.resume()).await;
    assert_eq!(failure.code(), ErrorCode::ErrorSessionExpired);
    again.send_frame(ask(vec![request(done, "done"), request(done + 1, "new")])).await;
    let Body::Entry(told) = again.answer(done).await else { panic!("it was made, and exists") };
    assert_eq!((told.created, told.attr.unwrap().ino), (true, ino));
    let Body::Entry(new) = again.answer(done + 1).await else { panic!("not made") };
    assert!(new.created);
    let sessions = status(master.address()).await.sessions;
    assert_eq!((sessions.len(), sessions[0].opens), (1, 2), "both are open in the new session");
    let many = vec![earlier; limits::EARLIER_SESSIONS_MAX + 1];
    again.send_frame(ask(vec![Request { earlier: many, ..request(done + 2, "x") }])).await;
    assert_eq!(code(&again.answer(done + 2).await), ErrorCode::ErrorInvalid);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unlinked_file_lives_until_it_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut client = client(master.address()).await;
    let attr = client.create("held", true).await;
    let unlink = Unlink { parent: ROOT, name: "held".into(), directory: false };
    client.mutate(mutation::Op::Unlink(unlink)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let get = query::Op::GetAttr(GetAttr { ino: attr.ino, generation: 0 });
    let Body::Entry(entry) = client.query(get.clone()).await else { panic!("it is gone") };
    assert_eq!(entry.attr.unwrap().nlink, 0);
    assert_eq!(status(master.address()).await.orphans, 1);
    assert_eq!(status(master.address()).await.sessions[0].opens, 1);
    let open = hold::Op::Open(dfs_proto::v1::Open { ino: attr.ino, read: true, ..Default::default() });
    assert!(matches!(client.hold(open.clone()).await, Body::Opened(_)), "by its handle");
    for _ in 0..2 {
        client.hold(hold::Op::Close(dfs_proto::v1::Close { ino: attr.ino })).await;
    }
    eventually("the orphan is freed", || async { status(master.address()).await.orphans == 0 }).await;
    assert_eq!(code(&client.query(get).await), ErrorCode::ErrorStale);
    assert_eq!(code(&client.hold(open).await), ErrorCode::ErrorStale);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_file_survives_a_restart_of_the_master_and_goes_with_its_session() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut first = client(master.address()).await;
    let attr = first.create("held", true).await;
    let unlink = Unlink { parent: ROOT, name: "held".into(), directory: false };
    first.mutate(mutation::Op::Unlink(unlink)).await;
    let resume =
        Hello { opens: vec![OpenFile { ino: attr.ino, count: 1, ..OpenFile::default() }], ..first.resume() };
    master.shutdown().await;

    let master = start(dir.path()).await;
    let mut second = serve(master.address(), resume).await.after(&first);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let get = query::Op::GetAttr(GetAttr { ino: attr.ino, generation: 0 });
    assert_eq!(code(&second.query(get).await), ErrorCode::ErrorOk);
    second.goodbye().await;
    eventually("the orphan is freed", || async { status(master.address()).await.orphans == 0 }).await;
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statfs_never_shows_zero_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut client = client(master.address()).await;
    let Body::StatFs(stats) = client.query(query::Op::StatFs(StatFs {})).await else { panic!("no stats") };
    assert!(stats.total_bytes > 0);
    assert_eq!(stats.used_bytes, stats.total_bytes);
    assert_eq!(stats.files, 1);
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn root_of_a_squashed_network_is_nobody() {
    for (network, squashed) in [("127.0.0.0/8", true), ("10.0.0.0/8", false)] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        config.root_squash = vec![network.parse().unwrap()];
        let master = start_with(config).await;
        let mut root = client(master.address()).await;
        assert_eq!(root.welcome.root_squash, squashed);
        let wanted = if squashed { ErrorCode::ErrorAccess } else { ErrorCode::ErrorOk };
        assert_eq!(code(&root.mutate(create("file", false)).await), wanted, "{network}");
        master.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inode_may_be_opened_by_number_while_it_is_being_freed() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let (mut owner, mut other) = (client(master.address()).await, client(master.address()).await);
    let mut stale = 0;
    for round in 0..100 {
        let name = format!("f{round}");
        let ino = owner.create(&name, true).await.ino;
        let unlink = Unlink { parent: ROOT, name: name.into(), directory: false };
        owner.mutate(mutation::Op::Unlink(unlink)).await;
        // The last close lets it be freed; meanwhile somebody goes on opening it.
        owner.send(hold_op(hold::Op::Close(Close { ino }))).await;
        for _ in 0..1000 {
            let open = Open { ino, read: true, ..Open::default() };
            if code(&other.hold(hold::Op::Open(open)).await) == ErrorCode::ErrorStale {
                stale += 1;
                break;
            }
            other.hold(hold::Op::Close(Close { ino })).await;
        }
    }
    assert!(stale > 0, "it was never met while it was being freed");
    master.shutdown().await;
}
