//! Chunks from their allocation to their deletion, and the daemons that keep them.

use crate::daemon::{self, Daemon, Memory};
use crate::harness::*;
use dfs_master::Config;
use dfs_proto::token::Rights;
use dfs_proto::v1::{
    AllocChunks, ChunkAccess, Commit, CommitSlice, CopyRange, Cred, ErrorCode, Fallocate, GetChunks,
    GetSlices, Hello, NodeHello, Open, OpenFile, SealChunk, SetAttr, StatFs, Unlink, answer::Body, hold,
    mutation, query,
};
use dfs_proto::{ChunkId, SessionId};
use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

async fn daemons(address: &str, nodes: &[u64]) -> Vec<Daemon> {
    let mut daemons = Vec::new();
    for node in nodes {
        daemons.push(daemon::start(address, *node, Memory::default()).await);
    }
    // Nothing is placed where the master does not know how much room there is.
    let end = Instant::now() + Duration::from_secs(10);
    while status(address).await.nodes.iter().filter(|node| node.free_bytes > 0).count() < nodes.len() {
        assert!(Instant::now() < end, "the daemons' heartbeats do not come");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    daemons
}

async fn alloc(client: &mut Client, count: u32) -> Vec<ChunkAccess> {
    let alloc = AllocChunks { count, ..AllocChunks::default() };
    match client.mutate(mutation::Op::AllocChunks(alloc)).await {
        Body::Chunks(chunks) => chunks.chunks,
        other => panic!("alloc was answered {other:?}"),
    }
}

async fn commit(client: &mut Client, ino: u64, chunk: &ChunkAccess, length: u64) -> ErrorCode {
    let slice = CommitSlice {
        file_offset: 0,
        chunk: chunk.chunk,
        chunk_offset: 0,
        length,
        epoch: chunk.epoch,
        record_end: length,
    };
    let commit = Commit { ino, slices: vec![slice], ..Commit::default() };
    code(&client.mutate(mutation::Op::Commit(commit)).await)
}

/// A chunk that the beginning of an open file lies in.
async fn chunk(client: &mut Client, ino: u64, chunk: u64) -> ChunkAccess {
    let question = GetChunks { chunks: vec![chunk], ino, offsets: vec![0] };
    match client.query(query::Op::GetChunks(question)).await {
        Body::Chunks(mut chunks) => chunks.chunks.remove(0),
        other => panic!("get chunks was answered {other:?}"),
    }
}

fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

fn may(access: &ChunkAccess, right: Rights) -> bool {
    key().check(&access.token, ChunkId(access.chunk), right, now_ms()).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_placed_on_distinct_hosts_with_tokens_for_their_owner() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut owner = client(master.address()).await;
    let none = owner.mutate(mutation::Op::AllocChunks(AllocChunks { count: 1, ..Default::default() })).await;
    assert_eq!(code(&none), ErrorCode::ErrorNoNodes);
    let _daemons = daemons(master.address(), &[1, 2, 3, 4]).await;
    let chunks = alloc(&mut owner, 5).await;
    assert_eq!(chunks.len(), 5);
    for access in &chunks {
        let hosts: BTreeSet<&str> = access.replicas.iter().map(|replica| replica.host.as_str()).collect();
        assert_eq!(hosts.len(), 3, "{access:?}");
        assert!(access.replicas.iter().all(|replica| !replica.address.is_empty()));
        assert_eq!((access.epoch, access.capacity), (1, 64 << 20));
        let session = key().check(&access.token, ChunkId(access.chunk), Rights::APPEND, now_ms());
        assert_eq!(session, Ok(SessionId(owner.welcome.session)));
    }
    let mut other = client(master.address()).await;
    let file = owner.create("f", true).await;
    assert_eq!(commit(&mut owner, file.ino, &chunks[0], 100).await, ErrorCode::ErrorOk);
    let open = Open { ino: file.ino, read: true, ..Open::default() };
    let Body::Opened(opened) = other.hold(hold::Op::Open(open)).await else { panic!("not opened") };
    let layout = opened.layout.expect("a file with bytes has slices");
    assert_eq!((layout.slices.len(), layout.slices[0].length), (1, 100));
    assert!(may(&layout.chunks[0], Rights::READ) && !may(&layout.chunks[0], Rights::APPEND));
    assert_eq!(layout.chunks[0].replicas.len(), 3);
    let slices = GetSlices { ino: file.ino, offset: 0, length: 1000, max_slices: 10 };
    let Body::Layout(asked) = other.query(query::Op::GetSlices(slices)).await else { panic!("no layout") };
    assert_eq!(asked.slices, layout.slices);
    let seen = chunk(&mut other, file.ino, chunks[0].chunk).await;
    assert!(may(&seen, Rights::READ) && !may(&seen, Rights::APPEND));

    let Body::StatFs(stats) = other.query(query::Op::StatFs(StatFs {})).await else { panic!("no stats") };
    assert_eq!((stats.total_bytes, stats.free_bytes), ((400 << 30) / 3, (240 << 30) / 3));
    let status = status(master.address()).await;
    assert_eq!(status.nodes.len(), 4);
    assert!(status.nodes.iter().all(|node| node.state == "up"));
    assert_eq!(status.warnings, Vec::<String>::new());
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_chunk_is_sealed_without_the_short_replica_which_comes_back_when_it_is_long_enough() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut client = client(master.address()).await;
    let mut daemons = daemons(master.address(), &[1, 2, 3]).await;
    let access = alloc(&mut client, 1).await.remove(0);
    let file = client.create("f", true).await;
    assert_eq!(commit(&mut client, file.ino, &access, 100).await, ErrorCode::ErrorOk);
    // One has more than is committed, one all of it, and the third was killed.
    daemons[0].hold(access.chunk, 150);
    daemons[1].hold(access.chunk, 100);
    drop(daemons.pop());
    let seal = SealChunk { chunk: access.chunk, failed: true, suspects: vec![3] };
    assert_eq!(code(&client.hold(hold::Op::SealChunk(seal)).await), ErrorCode::ErrorOk);
    // The dead daemon is waited for, as it may only be coming back after the election.
    let mut alive = 0;
    while daemons[0].sealed(access.chunk).is_none() || daemons[1].sealed(access.chunk).is_none() {
        tokio::time::sleep(Duration::from_millis(200)).await;
        alive += 1;
        client.keep_alive(alive).await;
        assert!(alive < 120, "never sealed");
    }
    assert_eq!(daemons[0].sealed(access.chunk), Some(100), "cut to what is committed");
    let sealed = chunk(&mut client, file.ino, access.chunk).await;
    assert!(sealed.sealed && sealed.length == 100 && sealed.epoch == 2);
    let nodes: BTreeSet<u64> = sealed.replicas.iter().map(|replica| replica.node).collect();
    assert_eq!(nodes, BTreeSet::from([1, 2]));
    assert_eq!(commit(&mut client, file.ino, &access, 120).await, ErrorCode::ErrorStaleEpoch);

    let mut memory = Memory::default();
    memory.lengths.insert(access.chunk, 130);
    memory.lengths.insert(4711, 5);
    let third = daemon::start(master.address(), 3, memory).await;
    for number in 200.. {
        client.keep_alive(number).await;
        if chunk(&mut client, file.ino, access.chunk).await.replicas.len() == 3 {
            break;
        }
        assert!(number < 500, "never added");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(third.sealed(access.chunk), Some(100));
    assert!(third.has(4711), "what is not known is left alone");
    let warnings = status(master.address()).await.warnings;
    assert!(
        warnings.iter().any(|line| line.contains("1 chunks that this cluster does not know")),
        "{warnings:?}"
    );
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_was_born_with_too_few_replicas_gets_them_though_its_writer_stays() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut client = client(master.address()).await;
    let early = daemons(master.address(), &[1, 2]).await;
    let access = alloc(&mut client, 1).await.remove(0);
    assert_eq!(access.replicas.len(), 2);
    let file = client.create("f", true).await;
    assert_eq!(commit(&mut client, file.ino, &access, 100).await, ErrorCode::ErrorOk);
    early.iter().for_each(|daemon| daemon.hold(access.chunk, 100));
    let third = daemon::start(master.address(), 3, Memory::default()).await;
    for number in 1.. {
        client.keep_alive(number).await;
        if chunk(&mut client, file.ino, access.chunk).await.replicas.len() == 3 {
            break;
        }
        assert!(number < 500, "never copied");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(third.sealed(access.chunk), Some(100));
    let status = status(master.address()).await;
    assert_eq!(status.warnings, Vec::<String>::new());
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_no_replica_of_which_is_long_enough_waits() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut client = client(master.address()).await;
    let mut daemons = daemons(master.address(), &[1]).await;
    let access = alloc(&mut client, 1).await.remove(0);
    let file = client.create("f", true).await;
    assert_eq!(commit(&mut client, file.ino, &access, 100).await, ErrorCode::ErrorOk);
    daemons[0].hold(access.chunk, 99);
    let seal = SealChunk { chunk: access.chunk, failed: true, suspects: vec![1] };
    client.hold(hold::Op::SealChunk(seal)).await;
    eventually("it is parked", || async {
        status(master.address()).await.warnings.iter().any(|line| line.contains("1 chunks wait for a daemon"))
    })
    .await;
    assert_eq!(daemons[0].sealed(access.chunk), None);
    drop(daemons.pop());
    // The replica turns out to be whole after all (a directory was mounted late, say).
    let mut memory = Memory::default();
    memory.lengths.insert(access.chunk, 100);
    let daemon = daemon::start(master.address(), 1, memory).await;
    eventually("it is sealed", || async { daemon.sealed(access.chunk) == Some(100) }).await;
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_a_file_deletes_its_chunks_and_a_dead_sessions_chunks_are_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut writer = client(master.address()).await;
    let daemons = daemons(master.address(), &[1, 2, 3]).await;
    let access = alloc(&mut writer, 2).await;
    let file = writer.create("f", true).await;
    assert_eq!(commit(&mut writer, file.ino, &access[0], 100).await, ErrorCode::ErrorOk);
    for daemon in &daemons {
        daemon.hold(access[0].chunk, 100);
        daemon.hold(access[1].chunk, 7);
    }
    writer.goodbye().await;
    for daemon in &daemons {
        eventually("the session's chunk is sealed", || async { daemon.sealed(access[0].chunk) == Some(100) })
            .await;
        // Nothing was ever committed in it.
        eventually("the unused chunk is deleted", || async { !daemon.has(access[1].chunk) }).await;
    }
    let mut other = client(master.address()).await;
    let unlink = Unlink { parent: ROOT, name: "f".into(), directory: false };
    assert_eq!(code(&other.mutate(mutation::Op::Unlink(unlink)).await), ErrorCode::ErrorOk);
    for daemon in &daemons {
        eventually("the chunk is deleted", || async { !daemon.has(access[0].chunk) }).await;
    }
    let status = status(master.address()).await;
    assert_eq!((status.chunks, status.live_bytes), (0, 0));
    let kv = master.node().kv();
    assert_eq!(dfs_master::state::check_invariants(&*kv), Vec::<String>::new());
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_is_kept_for_keep_deleted_and_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    // A session lives for a second here: it is not that which keeps the chunk.
    let keep = Duration::from_secs(4);
    let master = start_with(Config { keep_deleted: keep, ..config(dir.path()) }).await;
    let mut writer = client(master.address()).await;
    let daemons = daemons(master.address(), &[1, 2, 3]).await;
    let access = alloc(&mut writer, 1).await;
    let chunk = access[0].chunk;
    let file = writer.create("f", true).await;
    assert_eq!(commit(&mut writer, file.ino, &access[0], 100).await, ErrorCode::ErrorOk);
    daemons.iter().for_each(|daemon| daemon.hold(chunk, 100));
    writer.goodbye().await;
    for daemon in &daemons {
        eventually("the chunk is sealed", || async { daemon.sealed(chunk) == Some(100) }).await;
    }
    let mut other = client(master.address()).await;
    let unlink = Unlink { parent: ROOT, name: "f".into(), directory: false };
    let began = Instant::now();
    assert_eq!(code(&other.mutate(mutation::Op::Unlink(unlink)).await), ErrorCode::ErrorOk);
    let kv = master.node().kv();
    eventually("no file uses the chunk", || async {
        !dfs_master::state::idle_chunks(&*kv, ChunkId(0), 1).unwrap().is_empty()
    })
    .await;
    let idle = Instant::now();
    for daemon in &daemons {
        eventually("the chunk is deleted", || async { !daemon.has(chunk) }).await;
        assert!(began.elapsed() >= keep, "a backup may still need it: {:?}", began.elapsed());
    }
    // It is looked for each second.
    assert!(idle.elapsed() < keep + Duration::from_secs(10), "kept for {:?}", idle.elapsed());
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_goes_on_sealing() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut writer = client(master.address()).await;
    let daemons = daemons(master.address(), &[1]).await;
    let access = alloc(&mut writer, 1).await.remove(0);
    let file = writer.create("f", true).await;
    assert_eq!(commit(&mut writer, file.ino, &access, 100).await, ErrorCode::ErrorOk);
    drop(daemons);
    writer.goodbye().await;
    master.shutdown().await;

    let master = start(dir.path()).await;
    let mut memory = Memory::default();
    memory.lengths.insert(access.chunk, 164);
    let daemon = daemon::start(master.address(), 1, memory).await;
    eventually("it is sealed", || async { daemon.sealed(access.chunk) == Some(100) }).await;
    master.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_must_prove_who_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let _session = client(master.address()).await;
    let refused = |hello: NodeHello| async {
        match daemon::attach(master.address(), hello).await {
            Ok(_) => panic!("it was served"),
            Err((failure, _)) => failure,
        }
    };
    let old = refused(NodeHello { version: 9, ..daemon::hello(1, 1) }).await;
    assert_eq!(old.code(), ErrorCode::ErrorVersion);
    let lost = refused(NodeHello { cluster_id: "x".to_owned(), ..daemon::hello(1, 1) }).await;
    assert_eq!(lost.code(), ErrorCode::ErrorWrongCluster);
    let forged = refused(NodeHello { instance: 2, ..daemon::hello(1, 1) }).await;
    assert_eq!(forged.code(), ErrorCode::ErrorBadToken);
    let _one = daemon::start(master.address(), 1, Memory::default()).await;
    let twin = refused(daemon::hello(1, 2)).await;
    assert_eq!(twin.code(), ErrorCode::ErrorConflict);
    assert_eq!(twin.message, "node 0000000000000001 is in use by another daemon at 127.0.0.1:9001");
    master.shutdown().await;
}

/// What only an open file allows: each by the number of a file, and with which right.
async fn by_number(client: &mut Client, ino: u64, chunk: &ChunkAccess, other: u64) -> [ErrorCode; 7] {
    let slices = GetSlices { ino, offset: 0, length: 1000, max_slices: 10 };
    let chunks = GetChunks { chunks: vec![chunk.chunk], ino, offsets: vec![0] };
    let cut = SetAttr { ino, size: Some(50), by_handle: true, ..SetAttr::default() };
    let punch =
        Fallocate { ino, offset: 0, length: 10, keep_size: true, punch_hole: true, ..Fallocate::default() };
    let copy = |from, to| CopyRange { from, from_offset: 0, to, to_offset: 0, length: 10, kill_priv: false };
    let empty = Commit { ino, ..Commit::default() };
    [
        code(&client.query(query::Op::GetSlices(slices)).await),
        code(&client.query(query::Op::GetChunks(chunks)).await),
        code(&client.mutate(mutation::Op::CopyRange(copy(ino, other))).await),
        code(&client.mutate(mutation::Op::CopyRange(copy(other, ino))).await),
        code(&client.mutate(mutation::Op::SetAttr(cut)).await),
        code(&client.mutate(mutation::Op::Fallocate(punch)).await),
        code(&client.mutate(mutation::Op::Commit(empty)).await),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_an_open_file_allows_is_refused_to_whoever_has_not_opened_it_for_that() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let mut owner = client(master.address()).await;
    let _daemons = daemons(master.address(), &[1, 2, 3]).await;
    let access = alloc(&mut owner, 1).await.remove(0);
    let file = owner.create("f", true).await;
    assert_eq!(commit(&mut owner, file.ino, &access, 100).await, ErrorCode::ErrorOk);

    let mut liar = client(master.address()).await;
    let mine = liar.create("mine", true).await;
    let (ok, no) = (ErrorCode::ErrorOk, ErrorCode::ErrorAccess);
    assert_eq!(by_number(&mut liar, file.ino, &access, mine.ino).await, [no; 7]);
    let open = |read, write| hold::Op::Open(Open { ino: file.ino, read, write, ..Open::default() });
    assert_eq!(code(&liar.hold(open(false, false)).await), ErrorCode::ErrorInvalid);
    assert_eq!(by_number(&mut liar, file.ino, &access, mine.ino).await, [no; 7]);
    assert_eq!(code(&liar.hold(open(true, false)).await), ok);
    assert_eq!(by_number(&mut liar, file.ino, &access, mine.ino).await, [ok, ok, ok, no, no, no, no]);
    assert_eq!(code(&liar.hold(open(false, true)).await), ok);
    assert_eq!(by_number(&mut liar, file.ino, &access, mine.ino).await, [ok; 7]);

    // After a failover nobody has more than he can show to be his.
    let user = Cred { uid: 9, gid: 9, groups: Vec::new() };
    let held = |cred: Cred| {
        vec![OpenFile { ino: file.ino, count: 1, reader: Some(cred.clone()), writer: Some(cred) }]
    };
    let resume = |cred: Cred| Hello { opens: held(cred), ..liar.resume() };
    let (theirs, roots) = (resume(user), resume(Cred::default()));
    master.shutdown().await;
    let master = start(dir.path()).await;
    let mut liar = serve(master.address(), theirs).await.after(&liar);
    // Made by root with mode 0644: anybody may read it, nobody else write.
    let after = by_number(&mut liar, file.ino, &access, file.ino).await;
    assert_eq!((after[0], after[4], after[5], after[6]), (ok, no, no, no));
    let mut liar = serve(master.address(), roots).await.after(&liar);
    assert_eq!(by_number(&mut liar, file.ino, &access, file.ino).await[4..], [ok; 3]);
    master.shutdown().await;
}
