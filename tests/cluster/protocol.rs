//! What a stranger gets who reaches the ports: real daemons over TCP, spoken to without the client library's good manners.

use bytes::Bytes;
use dfs_client::{Client, ClientConfig, Cred, InodeNo, OpenFlags, Privileges};
use dfs_env::Env;
use dfs_env::rpc::{Tuning, connect};
use dfs_proto::checksum::unit_checksums;
use dfs_proto::limits::RECORD_MAX;
use dfs_proto::token::{ClusterKey, Rights};
use dfs_proto::v1::admin_client::AdminClient;
use dfs_proto::v1::chunk_client::ChunkClient;
use dfs_proto::v1::control_client::ControlClient;
use dfs_proto::v1::session_client::SessionClient;
use dfs_proto::v1::{self, ErrorCode, Failure};
use dfs_proto::{ChunkId, PROTOCOL_VERSION, SessionId};
use std::path::Path;
use std::time::Duration;

const KEY: &str = "0123456789abcdef0123456789abcdef";
const BOUND: Duration = Duration::from_secs(30);

struct Cluster {
    master: dfs_master::Master,
    chunkd: dfs_chunkd::Daemon,
    _dir: tempfile::TempDir,
}

impl Cluster {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let key = ClusterKey::new(KEY.as_bytes()).expect("long enough");
        let mut config = dfs_master::Config::new(1, "127.0.0.1:0", &dir.path().join("master"), key);
        config.replicas = 1;
        let master = dfs_master::start(Env::real(), config).await.expect("the master starts");
        let config = chunkd_config(dir.path(), master.address());
        let chunkd = dfs_chunkd::Daemon::start(Env::real(), config).await.expect("the chunk daemon starts");
        let cluster = Self { master, chunkd, _dir: dir };
        cluster.wait_until_usable().await;
        cluster
    }

    async fn wait_until_usable(&self) {
        let ready = async {
            loop {
                let channel =
                    connect(&Env::real(), self.master.address(), Tuning::default()).await.expect("connected");
                let status = AdminClient::new(channel).status(v1::StatusRequest { sessions: false }).await;
                if status.is_ok_and(|status| status.get_ref().nodes.iter().any(|node| node.state == "up")) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(BOUND, ready).await.expect("usable in time");
    }

    async fn stop(self) {
        self.chunkd.shutdown().await;
        self.master.shutdown().await;
    }

    /// What the master says first to a client that begins with `hello`.
    async fn greet(&self, hello: v1::Hello) -> v1::MasterFrame {
        let channel =
            connect(&Env::real(), self.master.address(), Tuning::default()).await.expect("connected");
        let frame = v1::ClientFrame { hello: Some(hello), ..v1::ClientFrame::default() };
        // The request stream stays open while the answer is awaited, as a client's does.
        let requests = futures::StreamExt::chain(futures::stream::iter([frame]), futures::stream::pending());
        let mut replies = SessionClient::new(channel).attach(requests).await.expect("a stream").into_inner();
        let reply = tokio::time::timeout(BOUND, replies.message()).await.expect("an answer in time");
        reply.expect("no broken stream").expect("not just the end")
    }

    async fn read(&self, request: v1::ReadRequest) -> v1::ReadReply {
        let channel =
            connect(&Env::real(), self.chunkd.address(), Tuning::default()).await.expect("connected");
        let requests =
            futures::StreamExt::chain(futures::stream::iter([request]), futures::stream::pending());
        let mut replies = ChunkClient::new(channel).read(requests).await.expect("a stream").into_inner();
        let reply = tokio::time::timeout(BOUND, replies.message()).await.expect("an answer in time");
        reply.expect("no broken stream").expect("not just the end")
    }

    async fn append(&self, request: v1::AppendRequest) -> v1::AppendReply {
        let channel =
            connect(&Env::real(), self.chunkd.address(), Tuning::default()).await.expect("connected");
        let requests =
            futures::StreamExt::chain(futures::stream::iter([request]), futures::stream::pending());
        let mut replies = ChunkClient::new(channel).append(requests).await.expect("a stream").into_inner();
        let reply = tokio::time::timeout(BOUND, replies.message()).await.expect("an answer in time");
        reply.expect("no broken stream").expect("not just the end")
    }
}

fn chunkd_config(dir: &Path, master: &str) -> dfs_chunkd::Config {
    let key = dir.join("key");
    std::fs::write(&key, KEY).expect("written");
    let text = format!(
        "listen = '127.0.0.1:0'\nmasters = ['{master}']\ndata = ['{}']\ncluster_key_file = '{}'\nhost = 'h'\n",
        dir.join("chunkd").display(),
        key.display()
    );
    dfs_chunkd::Config::parse(&text).expect("good settings")
}

/// A failure of the wanted kind whose cause is one line.
fn refused(failure: Option<Failure>, wanted: ErrorCode) {
    let failure = failure.expect("refused");
    assert_eq!(failure.code(), wanted, "{}", failure.message);
    assert!(!failure.message.is_empty() && !failure.message.contains('\n'), "{:?}", failure.message);
}

fn hello() -> v1::Hello {
    v1::Hello { version: PROTOCOL_VERSION, nonce: 1, client: "test".to_owned(), ..v1::Hello::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_another_version_or_cluster_is_refused_with_one_line() {
    let cluster = Cluster::start().await;
    for version in [0, PROTOCOL_VERSION + 1, u32::MAX] {
        refused(cluster.greet(v1::Hello { version, ..hello() }).await.refusal, ErrorCode::ErrorVersion);
    }
    let stranger = v1::Hello { cluster_id: "ffffffffffffffff".to_owned(), ..hello() };
    refused(cluster.greet(stranger).await.refusal, ErrorCode::ErrorWrongCluster);
    let unknown = v1::Hello { session: 4711, ..hello() };
    refused(cluster.greet(unknown).await.refusal, ErrorCode::ErrorSessionExpired);
    assert!(cluster.greet(hello()).await.welcome.is_some());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_reads_or_appends_without_the_masters_token() {
    let cluster = Cluster::start().await;
    let client =
        Client::connect(Env::real(), ClientConfig::new([cluster.master.address()])).await.expect("connected");
    let cred = Cred::default();
    let what = v1::Create {
        parent: InodeNo::ROOT.get(),
        name: Bytes::from_static(b"secret"),
        kind: v1::Kind::File.into(),
        mode: 0o600,
        ..v1::Create::default()
    };
    let flags = OpenFlags { write: true, ..OpenFlags::default() };
    let (entry, file) = client.create_open(&cred, what, flags).await.expect("created");
    client.write(&file, 0, b"for root's eyes only", &Privileges::Keep).await.expect("written");
    client.flush(&file).await.expect("flushed");
    let question = v1::GetSlices { ino: entry.attr.ino, offset: 0, length: 100, max_slices: 10 };
    let answer = client.master().query(&cred, v1::query::Op::GetSlices(question)).await.expect("a layout");
    let v1::answer::Body::Layout(layout) = answer else { panic!("not a layout: {answer:?}") };
    let (slice, chunk) = (&layout.slices[0], &layout.chunks[0]);

    let request = v1::ReadRequest {
        id: 1,
        version: PROTOCOL_VERSION,
        chunk: slice.chunk,
        offset: slice.chunk_offset,
        length: 20,
        token: chunk.token.clone(),
    };
    let reply = cluster.read(request.clone()).await;
    assert!(reply.failure.is_none(), "{:?}", reply.failure);
    let missing = v1::ReadRequest { token: Bytes::new(), ..request.clone() };
    refused(cluster.read(missing).await.failure, ErrorCode::ErrorBadToken);
    let mut forged = chunk.token.to_vec();
    forged[2] ^= 1;
    let forged = v1::ReadRequest { token: forged.into(), ..request.clone() };
    refused(cluster.read(forged).await.failure, ErrorCode::ErrorBadToken);
    let other = v1::ReadRequest { chunk: slice.chunk + 1, ..request.clone() };
    refused(cluster.read(other).await.failure, ErrorCode::ErrorBadToken);
    let version = v1::ReadRequest { version: PROTOCOL_VERSION + 1, ..request };
    refused(cluster.read(version).await.failure, ErrorCode::ErrorVersion);

    let payload = Bytes::from_static(b"graffiti");
    let append = v1::AppendRequest {
        id: 1,
        version: PROTOCOL_VERSION,
        chunk: slice.chunk,
        epoch: chunk.epoch,
        offset: slice.chunk_offset + slice.length,
        checksums: unit_checksums(&payload),
        payload,
        capacity: chunk.capacity,
        // Good for reading only.
        token: chunk.token.clone(),
        ..v1::AppendRequest::default()
    };
    refused(cluster.append(append.clone()).await.failure, ErrorCode::ErrorBadToken);
    let missing = v1::AppendRequest { token: Bytes::new(), ..append };
    refused(cluster.append(missing).await.failure, ErrorCode::ErrorBadToken);

    client.release(file).await.expect("released");
    client.shutdown().await.expect("nothing is left to write");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chunk_daemon_without_the_key_is_not_let_in() {
    let cluster = Cluster::start().await;
    let cluster_id = ClusterKey::new(KEY.as_bytes()).expect("long enough").cluster_id();
    let honest = v1::NodeHello {
        version: PROTOCOL_VERSION,
        cluster_id,
        node: 99,
        address: "127.0.0.1:9".to_owned(),
        host: "evil".to_owned(),
        instance: 1,
        proof: Bytes::from_static(&[7; 16]),
        ..v1::NodeHello::default()
    };
    let other_version = v1::NodeHello { version: PROTOCOL_VERSION + 1, ..honest.clone() };
    let other_cluster = v1::NodeHello { cluster_id: "ffffffffffffffff".to_owned(), ..honest.clone() };
    for hello in [honest, other_version, other_cluster] {
        let channel =
            connect(&Env::real(), cluster.master.address(), Tuning::default()).await.expect("connected");
        let frame = v1::NodeFrame { hello: Some(hello), ..v1::NodeFrame::default() };
        let requests = futures::StreamExt::chain(futures::stream::iter([frame]), futures::stream::pending());
        let mut orders = ControlClient::new(channel).attach(requests).await.expect("a stream").into_inner();
        let first = tokio::time::timeout(BOUND, orders.message()).await.expect("an answer in time");
        let first = first.expect("no broken stream").expect("not just the end");
        assert!(first.welcome.is_none() && first.refusal.is_some(), "{first:?}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replays_old_epochs_and_absurd_values_change_nothing() {
    let cluster = Cluster::start().await;
    let key = ClusterKey::new(KEY.as_bytes()).expect("long enough");
    let (chunk, now_ms) = (ChunkId(7_777), Env::real().clock.system_ms());
    let token = |rights, expiry_ms| Bytes::from(key.issue(SessionId(3), chunk, rights, expiry_ms));
    let (append, read) = (token(Rights::APPEND, now_ms + 60_000), token(Rights::READ, now_ms + 60_000));
    let payload = Bytes::from_static(b"written once");
    let first = v1::AppendRequest {
        id: 1,
        version: PROTOCOL_VERSION,
        chunk: chunk.get(),
        epoch: 5,
        checksums: unit_checksums(&payload),
        payload: payload.clone(),
        capacity: 1 << 20,
        token: append.clone(),
        sync: true,
        ..v1::AppendRequest::default()
    };
    assert!(cluster.append(first.clone()).await.failure.is_none());
    assert!(cluster.append(first.clone()).await.failure.is_none(), "a replay is what was done");

    let other = Bytes::from_static(b"written anew");
    let next = v1::AppendRequest { offset: payload.len() as u64, ..first.clone() };
    let appends = [
        (
            "other bytes in the same place",
            v1::AppendRequest { checksums: unit_checksums(&other), payload: other.clone(), ..first.clone() },
        ),
        ("an old epoch", v1::AppendRequest { epoch: 4, ..next.clone() }),
        ("the epoch 0", v1::AppendRequest { epoch: 0, ..next.clone() }),
        ("a gap", v1::AppendRequest { offset: 1 << 40, ..next.clone() }),
        ("the largest offset", v1::AppendRequest { offset: u64::MAX, ..next.clone() }),
        ("wrong checksums", v1::AppendRequest { payload: other, ..next.clone() }),
        ("too few checksums", v1::AppendRequest { checksums: Vec::new(), ..next.clone() }),
        ("too many checksums", v1::AppendRequest { checksums: vec![1; 100_000], ..next.clone() }),
        ("a payload longer than a record", {
            let payload = Bytes::from(vec![7; RECORD_MAX + 1]);
            v1::AppendRequest { checksums: unit_checksums(&payload), payload, ..next.clone() }
        }),
        (
            "a token that has expired",
            v1::AppendRequest { token: token(Rights::APPEND, now_ms - 1), ..next.clone() },
        ),
        ("a token to read", v1::AppendRequest { token: read.clone(), ..next.clone() }),
        ("a token of another length", v1::AppendRequest { token: Bytes::from(vec![1; 4096]), ..next }),
    ];
    for (what, request) in appends {
        assert!(cluster.append(request).await.failure.is_some(), "{what} was not refused");
    }
    let whole = v1::ReadRequest {
        id: 1,
        version: PROTOCOL_VERSION,
        chunk: chunk.get(),
        offset: 0,
        length: u32::try_from(payload.len()).expect("short"),
        token: read,
    };
    let reads = [
        ("nothing", v1::ReadRequest { length: 0, ..whole.clone() }),
        ("too much", v1::ReadRequest { length: u32::MAX, ..whole.clone() }),
        ("behind the end", v1::ReadRequest { offset: 10, ..whole.clone() }),
        ("the largest offset", v1::ReadRequest { offset: u64::MAX, ..whole.clone() }),
        ("with a token to append", v1::ReadRequest { token: append, ..whole.clone() }),
    ];
    for (what, request) in reads {
        assert!(cluster.read(request).await.failure.is_some(), "{what} was not refused");
    }
    let reply = cluster.read(whole).await;
    assert!(reply.failure.is_none(), "{:?}", reply.failure);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_without_a_fresh_proof_for_it_is_refused() {
    let cluster = Cluster::start().await;
    let key = ClusterKey::new(KEY.as_bytes()).expect("long enough");
    let now_ms = Env::real().clock.system_ms();
    let channel =
        connect(&Env::real(), cluster.master.address(), Tuning::default()).await.expect("connected");
    let mut admin = AdminClient::new(channel.clone());
    let status = async |admin: &mut AdminClient<_>| {
        admin.status(v1::StatusRequest { sessions: false }).await.expect("status").into_inner()
    };
    let challenge = status(&mut admin).await.challenge;
    let proof = |what: &str, at_ms| Bytes::from(key.proof(what, 0, at_ms, challenge).to_vec());
    let stranger = ClusterKey::new(b"fedcba9876543210fedcba9876543210").expect("long enough");
    let cases = [
        ("no proof", now_ms, Bytes::new()),
        ("another cluster's", now_ms, Bytes::from(stranger.proof("backup", 0, now_ms, challenge).to_vec())),
        ("a proof of an hour ago", now_ms - 3_600_000, proof("backup", now_ms - 3_600_000)),
        ("a proof of tomorrow", now_ms + 86_400_000, proof("backup", now_ms + 86_400_000)),
        ("a proof for another order", now_ms, proof("fsck", now_ms)),
        ("a proof of another time", now_ms + 1, proof("backup", now_ms)),
        (
            "a proof for another leader",
            now_ms,
            Bytes::from(key.proof("backup", 0, now_ms, challenge ^ 1).to_vec()),
        ),
    ];
    for (what, now_ms, proof) in cases {
        let mut admin = AdminClient::new(channel.clone());
        let status = admin.backup(v1::BackupRequest { now_ms, proof }).await.expect_err(what);
        assert_eq!(status.code(), tonic::Code::Unauthenticated, "{what}: {status}");
        assert!(!status.message().is_empty() && !status.message().contains('\n'), "{status}");
    }
    let request = v1::BackupRequest { now_ms, proof: proof("backup", now_ms) };
    assert!(admin.backup(request.clone()).await.is_ok(), "with the proof it is carried out");
    let again = admin.backup(request).await.expect_err("a replay");
    assert_eq!(again.code(), tonic::Code::Aborted, "{again}");
    // Any number of orders, each with its own; none of them twice.
    let order = |at_ms| v1::GcRequest { dry_run: false, now_ms: at_ms, proof: proof("gc", at_ms) };
    for at_ms in [now_ms, now_ms + 1, now_ms - 1] {
        assert!(admin.gc(order(at_ms)).await.is_ok());
        let again = admin.gc(order(at_ms)).await.expect_err("a replay");
        assert_eq!(again.code(), tonic::Code::Aborted, "{again}");
    }
    cluster.replays_end_with_the_term(order(now_ms)).await;
}

impl Cluster {
    /// What an earlier leader has obeyed, or could have, the next one does not.
    async fn replays_end_with_the_term(self, order: v1::GcRequest) {
        let Self { master, chunkd, _dir: dir } = self;
        let (address, key) =
            (master.address().to_owned(), ClusterKey::new(KEY.as_bytes()).expect("long enough"));
        master.shutdown().await;
        let mut config = dfs_master::Config::new(1, &address, &dir.path().join("master"), key.clone());
        config.replicas = 1;
        let master = dfs_master::start(Env::real(), config).await.expect("the master starts again");
        let cluster = Self { master, chunkd, _dir: dir };
        cluster.wait_until_usable().await;
        let channel = connect(&Env::real(), &address, Tuning::default()).await.expect("connected");
        let mut admin = AdminClient::new(channel);
        let refused = admin.gc(order.clone()).await.expect_err("of an earlier term");
        assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{refused}");
        let status = admin.status(v1::StatusRequest { sessions: false }).await.expect("status").into_inner();
        let proof = Bytes::from(key.proof("gc", 0, order.now_ms, status.challenge).to_vec());
        assert!(admin.gc(v1::GcRequest { proof, ..order }).await.is_ok());
        cluster.stop().await;
    }
}
