//! A daemon and its masters: hello, report, heartbeats, orders, terms, a change of the leader.

mod common;

use common::*;
use dfs_env::Env;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::error::ErrorCode;
use dfs_proto::{FsError, v1};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// What a master sees of one attached daemon, and how it gives orders.
struct Attached {
    frames: Streaming<v1::NodeFrame>,
    orders: mpsc::Sender<Result<v1::OrderFrame, Status>>,
    /// What it reported while it carried out orders.
    told: Vec<v1::ChunkFound>,
}

impl Attached {
    async fn frame(&mut self) -> v1::NodeFrame {
        tokio::time::timeout(Duration::from_secs(10), self.frames.message())
            .await
            .expect("a frame in time")
            .expect("the stream lives")
            .expect("the stream goes on")
    }

    async fn send(&self, frame: v1::OrderFrame) {
        self.orders.send(Ok(frame)).await.expect("the stream lives");
    }

    async fn hello(&mut self, term: u64) -> v1::NodeHello {
        let hello = self.frame().await.hello.expect("the first frame is a hello");
        let welcome = Some(v1::NodeWelcome { term, heartbeat_ms: 50 });
        self.send(v1::OrderFrame { welcome, ..Default::default() }).await;
        hello
    }

    async fn report(&mut self) -> Vec<v1::ChunkFound> {
        let mut chunks = Vec::new();
        loop {
            if let Some(report) = self.frame().await.report {
                chunks.extend(report.chunks);
                if report.last {
                    return chunks;
                }
            }
        }
    }

    async fn order(&mut self, term: u64, op: v1::order::Op) -> v1::OrderDone {
        self.send(v1::OrderFrame {
            order: Some(v1::Order { id: 5, term, op: Some(op) }),
            ..Default::default()
        })
        .await;
        loop {
            let frame = self.frame().await;
            self.told.extend(frame.report.into_iter().flat_map(|report| report.chunks));
            if let Some(done) = frame.done {
                assert_eq!(done.id, 5);
                return done;
            }
        }
    }
}

struct Master(mpsc::Sender<Attached>);

#[tonic::async_trait]
impl v1::control_server::Control for Master {
    type AttachStream = ReceiverStream<Result<v1::OrderFrame, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::NodeFrame>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let (orders, outgoing) = mpsc::channel(16);
        let attached = Attached { frames: request.into_inner(), orders, told: Vec::new() };
        self.0.send(attached).await.map_err(|_| Status::unavailable("the test ended"))?;
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

async fn master() -> (String, mpsc::Receiver<Attached>) {
    let listener = Env::real().net.listen("127.0.0.1:0").await.expect("bound");
    let address = listener.address().expect("an address");
    let (attached, attaching) = mpsc::channel(4);
    let server = rpc::server(Tuning::default())
        .add_service(v1::control_server::ControlServer::new(Master(attached)))
        .serve_with_incoming(rpc::incoming(listener));
    tokio::spawn(server);
    (address, attaching)
}

async fn next(attaching: &mut mpsc::Receiver<Attached>) -> Attached {
    tokio::time::timeout(Duration::from_secs(10), attaching.recv()).await.expect("in time").expect("attached")
}

fn refused(done: v1::OrderDone) -> ErrorCode {
    FsError::from(done.failure.expect("refused")).code
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hello_report_heartbeats_and_orders() {
    use v1::order::Op;
    let dir = tempfile::tempdir().expect("temporary directory");
    let (address, mut attaching) = master().await;
    let mut config = config(dir.path(), "d0");
    config.masters = vec!["127.0.0.1:1".to_owned(), address];
    let daemon = start(config.clone()).await;
    let mut attached = next(&mut attaching).await;
    let hello = attached.hello(3).await;
    let message = [hello.node.to_le_bytes(), hello.instance.to_le_bytes()].concat();
    assert!(key().verify("node hello", &message, &hello.proof));
    assert_eq!((hello.node, hello.cluster_id), (daemon.node(), key().cluster_id()));
    assert_eq!((hello.address.as_str(), hello.host.as_str()), (daemon.address(), "d0"));
    assert!(attached.report().await.is_empty());
    let mut client = Client::connect(&daemon).await;
    for chunk in [1, 2] {
        for offset in [0, 10] {
            let mut request = append(chunk, offset, payload(offset, 10), &[]);
            request.id = chunk * 100 + offset;
            assert_eq!(client.append(request).await.failure, None);
        }
    }
    let beat = loop {
        match attached.frame().await.heartbeat {
            Some(beat) if beat.chunks == 2 => break beat,
            _ => {}
        }
    };
    assert!(beat.total_bytes > 0 && beat.free_bytes > 0 && beat.used_bytes > 40);
    assert_eq!((beat.dirs.len(), beat.dirs[0].failed), (1, false));

    let fence = |chunk, epoch| Op::Fence(v1::FenceOrder { chunk, epoch });
    let seal = |chunk, epoch, length| Op::Seal(v1::SealOrder { chunk, epoch, length });
    let done = attached.order(3, fence(1, 2)).await;
    assert_eq!((done.failure, done.epoch, done.length), (None, 2, 20));
    let late = client.append(append(1, 20, payload(20, 10), &[])).await;
    assert_eq!(code(late), ErrorCode::ErrorStaleEpoch);
    let done = attached.order(3, seal(1, 2, 10)).await;
    assert_eq!((done.failure.clone(), done.length), (None, 10));
    assert_eq!(attached.order(3, seal(1, 2, 10)).await, done, "again");
    let short = attached.order(3, seal(2, 2, 30)).await;
    assert_eq!(short.length, 20, "what is here is told");
    assert_eq!(refused(short), ErrorCode::ErrorRange);
    assert_eq!(attached.order(4, fence(9, 2)).await.length, 0);
    // A leader that was replaced.
    let old = attached.order(3, Op::Delete(v1::DeleteOrder { chunk: 2 })).await;
    assert_eq!(refused(old), ErrorCode::ErrorNotLeader);
    assert_eq!(attached.order(4, Op::Delete(v1::DeleteOrder { chunk: 2 })).await.failure, None);
    assert_eq!(client.read(2, 0, 1).await.expect_err("deleted").code, ErrorCode::ErrorNoChunk);
    drop(client);
    daemon.shutdown().await;

    // After a restart it knows its chunks, its number, and the highest term.
    let daemon = start(config).await;
    let mut attached = next(&mut attaching).await;
    assert_eq!(attached.hello(3).await.node, daemon.node());
    drop(attached);
    let mut attached = next(&mut attaching).await;
    let again = attached.hello(4).await;
    assert_ne!(again.instance, hello.instance);
    let found: Vec<_> = attached
        .report()
        .await
        .iter()
        .map(|found| (found.chunk, found.epoch, found.length, found.sealed, found.damaged))
        .collect();
    assert_eq!(found, [(1, 2, 10, true, false), (9, 2, 0, false, false)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_does_not_lead_sends_it_to_the_leader() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (follower_address, mut follower) = master().await;
    let (leader_address, mut leader) = master().await;
    let mut config = config(dir.path(), "d0");
    config.masters = vec![follower_address];
    let _daemon = start(config).await;
    for hint in ["", leader_address.as_str()] {
        let mut asked = next(&mut follower).await;
        asked.frame().await.hello.expect("a hello");
        let refusal = Some(v1::Failure { code: ErrorCode::ErrorNotLeader.into(), message: String::new() });
        asked.send(v1::OrderFrame { refusal, leader: hint.to_owned(), ..Default::default() }).await;
    }
    let mut attached = next(&mut leader).await;
    attached.hello(1).await;
    attached.report().await;
    // The leader goes; the daemon begins again with its list.
    drop(attached);
    next(&mut follower).await;
}

/// A daemon of a cluster with one sealed chunk of four records of 100,000 bytes, attached.
async fn holder(
    dir: &std::path::Path,
    name: &str,
    chunk: u64,
) -> (dfs_chunkd::Daemon, Attached, mpsc::Receiver<Attached>) {
    let (address, mut attaching) = master().await;
    let mut config = config(dir, name);
    config.masters = vec![address];
    let daemon = start(config).await;
    let mut attached = next(&mut attaching).await;
    attached.hello(1).await;
    attached.report().await;
    let mut client = Client::connect(&daemon).await;
    for record in 0..4 {
        let offset = record * 100_000;
        let reply = client.append(append(chunk, offset, payload(offset, 100_000), &[])).await;
        assert_eq!(reply.failure, None);
    }
    let seal = v1::order::Op::Seal(v1::SealOrder { chunk, epoch: 2, length: 400_000 });
    assert_eq!(attached.order(1, seal).await.failure, None);
    (daemon, attached, attaching)
}

/// Changes a byte of the record at this payload offset. Headers are small beside payloads.
fn damage(dir: &std::path::Path, name: &str, offset: usize) {
    let files = chunk_files(&dir.join(name));
    let mut bytes = std::fs::read(&files[0]).expect("read");
    bytes[offset + 50_000] ^= 1;
    std::fs::write(&files[0], bytes).expect("written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_are_damaged_in_different_places_make_a_whole_one() {
    use v1::order::Op;
    let dir = tempfile::tempdir().expect("temporary directory");
    let (first, mut first_master, _keep) = holder(dir.path(), "d0", 7).await;
    let (second, _second_master, _keep_too) = holder(dir.path(), "d1", 7).await;
    let (third, mut third_master, _keep_all) = holder(dir.path(), "d2", 8).await;
    let copy = |chunk, sources: &[&dfs_chunkd::Daemon], anew| {
        Op::Copy(v1::CopyOrder {
            chunk,
            epoch: 2,
            length: 400_000,
            capacity: 64 << 20,
            sources: sources.iter().map(|daemon| daemon.address().to_owned()).collect(),
            bytes_per_second: 0,
            anew,
        })
    };
    damage(dir.path(), "d0", 100_000);
    damage(dir.path(), "d0", 300_000);
    damage(dir.path(), "d1", 200_000);
    let done = third_master.order(1, copy(7, &[&first, &second], false)).await;
    assert_eq!((done.failure, done.length), (None, 400_000));
    let mut client = Client::connect(&third).await;
    for offset in [0, 100_000, 200_000, 300_000] {
        assert!(client.read(7, offset, 100_000).await.expect("whole") == payload(offset, 100_000));
    }
    assert_eq!(third_master.order(1, Op::Verify(v1::VerifyOrder { chunk: 7 })).await.failure, None);
    // Those that were found damaged tell their master.
    let told = loop {
        if let Some(report) = first_master.frame().await.report {
            break report;
        }
    };
    assert!(told.chunks.len() == 1 && told.chunks[0].damaged && !told.last, "{told:?}");
    let verified = first_master.order(1, Op::Verify(v1::VerifyOrder { chunk: 7 })).await;
    assert_eq!(refused(verified), ErrorCode::ErrorCorrupt);
    // One is made anew in its place, of what the other one has and of what it has itself.
    let done = first_master.order(1, copy(7, &[&second], true)).await;
    assert_eq!((done.failure, done.length), (None, 400_000));
    assert_eq!(first_master.order(1, Op::Verify(v1::VerifyOrder { chunk: 7 })).await.failure, None);
    assert!(first.store().report().iter().all(|found| !found.damaged));
    assert_eq!(chunk_files(&dir.path().join("d0")).len(), 1, "nothing is left over");
    // What nobody has cannot be made.
    damage(dir.path(), "d0", 200_000);
    let done = third_master.order(1, copy(7, &[&first, &second], true)).await;
    assert_eq!(done.failure, None, "it has that record itself");
    let done = third_master.order(1, copy(9, &[&first, &second], false)).await;
    assert_eq!(refused(done), ErrorCode::ErrorNoChunk);
    let (_fourth, mut fourth_master, _keep_every) = holder(dir.path(), "d3", 8).await;
    let done = fourth_master.order(1, copy(7, &[&first, &second], false)).await;
    assert_eq!(refused(done), ErrorCode::ErrorCorrupt);
    assert_eq!(chunk_files(&dir.path().join("d3")).len(), 1, "no half of it stays");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemons_gather_a_chunk_each_for_itself_of_what_is_good_and_say_the_same_of_it() {
    use v1::order::Op;
    let dir = tempfile::tempdir().expect("temporary directory");
    let (first, mut first_master, _keep) = holder(dir.path(), "d0", 7).await;
    let (second, _second_master, _keep_too) = holder(dir.path(), "d1", 7).await;
    let (third, mut third_master, _keep_all) = holder(dir.path(), "d2", 8).await;
    let piece =
        |source, offset, length| v1::GatherPiece { source, offset, length, ino: 9, file_offset: offset };
    let addresses = |daemons: &[&dfs_chunkd::Daemon]| {
        daemons.iter().map(|daemon| daemon.address().to_owned()).collect::<Vec<_>>()
    };
    let order = v1::GatherOrder {
        chunk: 20,
        epoch: 2,
        wait_ms: 30_000,
        length: 170_020,
        sources: vec![
            v1::GatherSource { chunk: 7, addresses: addresses(&[&first, &second]) },
            v1::GatherSource { chunk: 8, addresses: addresses(&[&third]) },
        ],
        // Across records, beside each other, of another chunk, and a few bytes in the middle of a unit.
        pieces: vec![
            piece(0, 50_000, 100_000),
            piece(0, 150_000, 20_000),
            piece(1, 350_000, 50_000),
            piece(0, 399_000, 20),
        ],
        bytes_per_second: 0,
    };
    // What is here is damaged: the other one has it.
    damage(dir.path(), "d0", 0);
    let here = first_master.order(1, Op::Gather(order.clone())).await;
    assert_eq!((here.failure.clone(), here.length, here.epoch), (None, 170_020, 2));
    let there = third_master.order(1, Op::Gather(order.clone())).await;
    assert_eq!((there.failure.clone(), there.length, there.checksum), (None, here.length, here.checksum));
    let again = third_master.order(1, Op::Gather(order.clone())).await;
    assert_eq!(again, there, "again");
    let old = |chunk_offset: u64, length: usize| {
        let all: Vec<u8> = (0..4).flat_map(|record| payload(record * 100_000, 100_000)).collect();
        let from = usize::try_from(chunk_offset).expect("small");
        all[from..from + length].to_vec()
    };
    let expected = [old(50_000, 120_000), old(350_000, 50_000), old(399_000, 20)].concat();
    for daemon in [&first, &third] {
        let mut client = Client::connect(daemon).await;
        assert!(client.read(20, 0, 170_020).await.expect("whole") == expected);
    }
    assert_eq!(third_master.order(1, Op::Verify(v1::VerifyOrder { chunk: 20 })).await.failure, None);
    // The master hears of it also if it did not wait for it.
    while !third_master.told.iter().any(|found| found.chunk == 20 && found.sealed) {
        let report = third_master.frame().await.report;
        third_master.told.extend(report.into_iter().flat_map(|report| report.chunks));
    }
    // What nobody has is not made, and nothing of it stays.
    damage(dir.path(), "d1", 0);
    let lost = third_master.order(1, Op::Gather(v1::GatherOrder { chunk: 21, ..order.clone() })).await;
    assert_eq!(refused(lost), ErrorCode::ErrorCorrupt);
    let beyond =
        v1::GatherOrder { chunk: 22, length: 10, pieces: vec![piece(1, 399_995, 10)], ..order.clone() };
    let beyond = third_master.order(1, Op::Gather(beyond)).await;
    assert!(beyond.failure.is_some(), "{beyond:?}");
    let nonsense = third_master.order(1, Op::Gather(v1::GatherOrder { length: 5, ..order })).await;
    assert_eq!(refused(nonsense), ErrorCode::ErrorInvalid);
    assert_eq!(chunk_files(&dir.path().join("d2")).len(), 2, "chunks 8 and 20");
}
