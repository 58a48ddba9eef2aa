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
            if let Some(done) = self.frame().await.done {
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
        let attached = Attached { frames: request.into_inner(), orders };
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
