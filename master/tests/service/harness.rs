//! A master of its own for each test, and clients that speak raw frames.

use dfs_env::{Env, rpc};
use dfs_master::{Config, Master, StartError};
use dfs_proto::token::ClusterKey;
use dfs_proto::v1::{
    Answer, Attr, ClientFrame, Cred, ErrorCode, Failure, Goodbye, Hello, Hold, MasterFrame, Mutation, Query,
    Request, StatusReply, StatusRequest, Welcome, admin_client::AdminClient, answer::Body, hold, mutation,
    query, request, session_client::SessionClient,
};
use dfs_proto::v1::{Ask, Create, Kind, LeaseKind, LeaseReturn, Lookup, Recall, Told};
use dfs_proto::{PROTOCOL_VERSION, limits};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::path::Path;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

pub const ROOT: u64 = 1;
/// Longer than anything should take, shorter than patience.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn key() -> ClusterKey {
    ClusterKey::new(b"a cluster key for tests").expect("long enough")
}

/// Fails the test when something takes too long.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("took too long")
}

/// Asks again until the answer is yes.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    for _ in 0..600 {
        if ask().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never happened: {what}");
}

pub fn config(dir: &Path) -> Config {
    let mut config = Config::new(1, "127.0.0.1:0", dir, key());
    config.session_ttl_ms = 1000;
    config
}

pub async fn start(dir: &Path) -> Master {
    start_with(config(dir)).await
}

pub async fn start_with(config: Config) -> Master {
    // A port that a stopped master leaves is free again at once, but its directory only when the log is closed.
    match dfs_master::start(Env::real(), config).await {
        Ok(master) => master,
        Err(StartError::Usage(text) | StartError::Failed(text)) => panic!("the master did not start: {text}"),
    }
}

pub async fn status(address: &str) -> StatusReply {
    let channel = rpc::connect(&Env::real(), address, rpc::Tuning::default()).await.expect("connects");
    for _ in 0..200 {
        match AdminClient::new(channel.clone()).status(StatusRequest { sessions: true }).await {
            Ok(reply) => return reply.into_inner(),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    panic!("no status");
}

pub fn hello() -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        nonce: 77,
        client: "test".to_owned(),
        host: "here".to_owned(),
        ..Hello::default()
    }
}

/// An attached session.
pub struct Client {
    out: mpsc::Sender<ClientFrame>,
    inbound: Streaming<MasterFrame>,
    pub welcome: Welcome,
    next_seq: u64,
    answers: BTreeMap<u64, Answer>,
    /// Leases that it was given and did not give back: what kind, under which number.
    pub leases: BTreeMap<u64, (LeaseKind, u64)>,
    /// What it was asked to give back.
    recalls: VecDeque<Recall>,
    /// What it was asked about files that it writes.
    asks: VecDeque<Ask>,
    cred: Cred,
}

/// What an attach ended with.
pub enum Attach {
    Served(Box<Client>),
    Refused(Failure, String),
}

/// Says hello, once.
pub async fn attach(address: &str, hello: Hello) -> Attach {
    let channel = rpc::connect(&Env::real(), address, rpc::Tuning::default()).await.expect("connects");
    let (out, frames) = mpsc::channel(64);
    out.send(ClientFrame { hello: Some(hello), ..ClientFrame::default() }).await.expect("open");
    let mut client = SessionClient::new(channel).max_decoding_message_size(limits::MESSAGE_MAX);
    let mut inbound = client.attach(ReceiverStream::new(frames)).await.expect("attaches").into_inner();
    let first = soon(inbound.message()).await.expect("a frame").expect("not the end");
    match (first.welcome, first.refusal) {
        (Some(welcome), None) => Attach::Served(Box::new(Client {
            out,
            inbound,
            welcome,
            next_seq: 1,
            answers: BTreeMap::new(),
            leases: BTreeMap::new(),
            recalls: VecDeque::new(),
            asks: VecDeque::new(),
            cred: Cred::default(),
        })),
        (None, Some(refusal)) => Attach::Refused(refusal, first.leader),
        other => panic!("neither welcome nor refusal: {other:?}"),
    }
}

/// Says hello until the master serves.
pub async fn serve(address: &str, hello: Hello) -> Client {
    for _ in 0..200 {
        match attach(address, hello.clone()).await {
            Attach::Served(client) => return *client,
            Attach::Refused(failure, _) if failure.code() == ErrorCode::ErrorNotLeader => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Attach::Refused(failure, _) => panic!("refused: {failure:?}"),
        }
    }
    panic!("nobody leads");
}

pub async fn client(address: &str) -> Client {
    serve(address, hello()).await
}

pub async fn refused(address: &str, hello: Hello) -> Failure {
    for _ in 0..200 {
        match attach(address, hello.clone()).await {
            Attach::Served(_) => panic!("it was served"),
            Attach::Refused(failure, _) if failure.code() == ErrorCode::ErrorNotLeader => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Attach::Refused(failure, _) => return failure,
        }
    }
    panic!("nobody leads");
}

pub fn code(body: &Body) -> ErrorCode {
    match body {
        Body::Failure(failure) => failure.code(),
        _ => ErrorCode::ErrorOk,
    }
}

impl Client {
    /// Takes a session up again after its stream broke.
    pub fn resume(&self) -> Hello {
        Hello { session: self.welcome.session, ..hello() }
    }

    /// Continues with the sequence numbers of an earlier stream.
    pub fn after(mut self, earlier: &Self) -> Self {
        self.next_seq = earlier.next_seq;
        self
    }

    pub async fn send_frame(&self, frame: ClientFrame) {
        self.out.send(frame).await.expect("the stream is open");
    }

    /// Sends a request and returns its sequence number.
    pub async fn send(&mut self, op: request::Op) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.send_again(seq, op).await;
        seq
    }

    pub async fn send_again(&mut self, seq: u64, op: request::Op) {
        let request = Request { seq, cred: Some(self.cred.clone()), op: Some(op), ..Default::default() };
        self.send_frame(ClientFrame { requests: vec![request], ..ClientFrame::default() }).await;
    }

    /// The next frame; None at the end of the stream.
    pub async fn frame(&mut self) -> Option<MasterFrame> {
        soon(self.inbound.message()).await.unwrap_or(None)
    }

    /// The answer to a request.
    pub async fn answer(&mut self, seq: u64) -> Body {
        loop {
            if let Some(answer) = self.answers.remove(&seq) {
                return answer.body.expect("an answer has a body");
            }
            self.take_frame().await;
        }
    }

    async fn take_frame(&mut self) {
        let frame = self.frame().await.expect("the stream ended before the answer");
        assert_eq!(frame.refusal, None, "the stream was refused before the answer");
        for reply in frame.replies {
            for (kind, inos) in
                [(LeaseKind::LeaseRead, &reply.read_leases), (LeaseKind::LeaseWrite, &reply.write_leases)]
            {
                self.leases.extend(inos.iter().map(|ino| (*ino, (kind, reply.grant))));
            }
            self.answers.insert(reply.seq, reply.answer.expect("a reply has an answer"));
        }
        self.recalls.extend(frame.recalls);
        self.asks.extend(frame.asks);
    }

    /// Answers the next question about a file that it writes.
    pub async fn tell(&mut self, attr: impl FnOnce(&Ask) -> Option<Attr>) {
        let ask = loop {
            if let Some(ask) = self.asks.pop_front() {
                break ask;
            }
            self.take_frame().await;
        };
        let told = vec![Told { ask: ask.ask, attr: attr(&ask) }];
        self.send_frame(ClientFrame { told, ..ClientFrame::default() }).await;
    }

    /// The next recall.
    pub async fn recall(&mut self) -> Recall {
        loop {
            if let Some(recall) = self.recalls.pop_front() {
                return recall;
            }
            self.take_frame().await;
        }
    }

    /// Gives back what a recall asks for.
    pub async fn give_back(&mut self, recall: &Recall) {
        let (_, grant) = self.leases.remove(&recall.ino).expect("it holds what is recalled");
        if recall.keep() != LeaseKind::LeaseNone {
            self.leases.insert(recall.ino, (recall.keep(), grant));
        }
        let returned =
            vec![LeaseReturn { ino: recall.ino, grant, keep: recall.keep, ..LeaseReturn::default() }];
        self.send_frame(ClientFrame { returned, ..ClientFrame::default() }).await;
    }

    /// What it holds on an inode.
    pub fn holds(&self, ino: u64) -> LeaseKind {
        self.leases.get(&ino).map_or(LeaseKind::LeaseNone, |(kind, _)| *kind)
    }

    pub async fn call(&mut self, op: request::Op) -> Body {
        let seq = self.send(op).await;
        self.answer(seq).await
    }

    pub async fn mutate(&mut self, op: mutation::Op) -> Body {
        self.call(request::Op::Mutation(Mutation { op: Some(op) })).await
    }

    pub async fn query(&mut self, op: query::Op) -> Body {
        self.call(request::Op::Query(Query { op: Some(op) })).await
    }

    pub async fn hold(&mut self, op: hold::Op) -> Body {
        self.call(hold_op(op)).await
    }

    /// Makes a file; it stays open if so wished.
    pub async fn create(&mut self, name: &str, open: bool) -> Attr {
        match self.mutate(create(name, open)).await {
            Body::Entry(entry) => entry.attr.expect("an entry has attributes"),
            other => panic!("create was answered {other:?}"),
        }
    }

    pub async fn lookup(&mut self, name: &str) -> Result<Attr, ErrorCode> {
        let name = bytes::Bytes::copy_from_slice(name.as_bytes());
        match self.query(query::Op::Lookup(Lookup { parent: ROOT, name })).await {
            Body::Entry(entry) => Ok(entry.attr.expect("an entry has attributes")),
            other => Err(code(&other)),
        }
    }

    /// Whether keep-alives are answered.
    pub async fn keep_alive(&mut self, number: u64) {
        self.send_frame(ClientFrame { keep_alive: number, ..ClientFrame::default() }).await;
        loop {
            let frame = self.frame().await.expect("the stream ended");
            if frame.keep_alive == number {
                return;
            }
        }
    }

    /// Says every now and then that it lives, until the stream ends.
    pub fn stay_alive(&self) {
        let out = self.out.clone();
        tokio::spawn(async move {
            let mut number = 1_000_000;
            loop {
                number += 1;
                let frame = ClientFrame { keep_alive: number, ..ClientFrame::default() };
                if out.send(frame).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
    }

    /// Says goodbye and waits for the end.
    pub async fn goodbye(mut self) {
        self.send_frame(ClientFrame { goodbye: Some(Goodbye {}), ..ClientFrame::default() }).await;
        while self.frame().await.is_some() {}
    }
}

pub fn create(name: &str, open: bool) -> mutation::Op {
    mutation::Op::Create(Create {
        parent: ROOT,
        name: bytes::Bytes::copy_from_slice(name.as_bytes()),
        kind: Kind::File.into(),
        mode: 0o644,
        exclusive: true,
        open,
        ..Create::default()
    })
}

pub fn mutation_op(op: mutation::Op) -> request::Op {
    request::Op::Mutation(Mutation { op: Some(op) })
}

pub fn hold_op(op: hold::Op) -> request::Op {
    request::Op::Hold(Hold { op: Some(op) })
}

pub fn query_op(op: query::Op) -> request::Op {
    request::Op::Query(Query { op: Some(op) })
}
