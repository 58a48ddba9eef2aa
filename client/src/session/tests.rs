//! The session against scripted masters, over streams in memory and with a clock that jumps.

use super::*;
use dfs_env::rpc::{self, Tuning};
use dfs_env::{Listener, Net, Stream};
use dfs_proto::v1::session_server::{Session as Service, SessionServer};
use dfs_proto::v1::{Answer, ClientFrame, Mutation, Reply, Request, mutation, query};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::pin::Pin;
use tokio::sync::mpsc;

/// A network in memory: no sockets, so that the clock may be paused.
#[derive(Default)]
struct MemNet {
    listening: Mutex<HashMap<String, mpsc::Sender<Box<dyn Stream>>>>,
}

struct MemListener {
    address: String,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Box<dyn Stream>>>,
}

#[async_trait]
impl Net for MemNet {
    async fn dial(&self, address: &str) -> io::Result<Box<dyn Stream>> {
        let listener = lock(&self.listening).get(address).cloned();
        let refused = || io::Error::new(io::ErrorKind::ConnectionRefused, "Connection refused");
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        listener.ok_or_else(refused)?.send(Box::new(theirs)).await.map_err(|_| refused())?;
        Ok(Box::new(ours))
    }

    async fn listen(&self, address: &str) -> io::Result<Box<dyn Listener>> {
        let (sender, receiver) = mpsc::channel(16);
        lock(&self.listening).insert(address.to_owned(), sender);
        Ok(Box::new(MemListener { address: address.to_owned(), incoming: tokio::sync::Mutex::new(receiver) }))
    }
}

#[async_trait]
impl Listener for MemListener {
    async fn accept(&self) -> io::Result<(Box<dyn Stream>, String)> {
        let stream = self.incoming.lock().await.recv().await;
        stream.map(|stream| (stream, "peer".to_owned())).ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    fn address(&self) -> io::Result<String> {
        Ok(self.address.clone())
    }
}

/// What a master's script may do with a frame.
#[allow(clippy::large_enum_variant, reason = "nearly all of them are frames")]
enum Act {
    Send(MasterFrame),
    /// Ends the stream.
    Drop,
    Silent,
}

/// What all scripted masters of a test know.
#[derive(Default)]
struct World {
    /// Mutations by sequence: the answer given, as a master's record keeps it.
    recorded: BTreeMap<u64, Answer>,
    /// Names in the order in which they were carried out.
    carried_out: Vec<String>,
    /// How often a mutation arrived that was recorded already.
    repeated: usize,
    frames: usize,
    hellos: Vec<Hello>,
    requests: Vec<Request>,
    lowest: u64,
    goodbyes: usize,
}

impl World {
    /// Carries a request out, once.
    fn carry_out(&mut self, request: &Request) -> Reply {
        self.requests.push(request.clone());
        let answer = match &request.op {
            Some(request::Op::Mutation(Mutation { op: Some(mutation::Op::Unlink(unlink)) })) => {
                assert!(request.seq >= self.lowest, "the answer may have been forgotten");
                if let Some(answer) = self.recorded.get(&request.seq) {
                    self.repeated += 1;
                    answer.clone()
                } else {
                    self.carried_out.push(String::from_utf8_lossy(&unlink.name).into_owned());
                    let answer = Answer { body: Some(answer::Body::Data(unlink.name.clone())) };
                    self.recorded.insert(request.seq, answer.clone());
                    answer
                }
            }
            _ => Answer { body: Some(answer::Body::Empty(v1::Empty {})) },
        };
        Reply { seq: request.seq, answer: Some(answer), ..Reply::default() }
    }

    fn answer(&mut self, frame: &ClientFrame) -> MasterFrame {
        let replies = frame.requests.iter().map(|request| self.carry_out(request)).collect();
        self.lowest = self.lowest.max(frame.lowest_unanswered);
        MasterFrame { replies, keep_alive: frame.keep_alive, ..MasterFrame::default() }
    }
}

type Script = Arc<dyn Fn(&mut World, &ClientFrame) -> Act + Send + Sync>;

#[derive(Clone)]
struct Scripted {
    world: Arc<Mutex<World>>,
    script: Script,
}

#[tonic::async_trait]
impl Service for Scripted {
    type AttachStream = Pin<Box<dyn futures::Stream<Item = Result<MasterFrame, tonic::Status>> + Send>>;

    async fn attach(
        &self,
        request: tonic::Request<tonic::Streaming<ClientFrame>>,
    ) -> Result<tonic::Response<Self::AttachStream>, tonic::Status> {
        let this = self.clone();
        let frames = futures::stream::unfold(request.into_inner(), move |mut inbound| {
            let this = this.clone();
            async move {
                loop {
                    let frame = inbound.message().await.ok()??;
                    let act = {
                        let mut world = lock(&this.world);
                        world.frames += 1;
                        world.hellos.extend(frame.hello.clone());
                        world.goodbyes += usize::from(frame.goodbye.is_some());
                        if frame.goodbye.is_some() { Act::Drop } else { (this.script)(&mut world, &frame) }
                    };
                    match act {
                        Act::Send(reply) => return Some((Ok(reply), inbound)),
                        Act::Drop => return None,
                        Act::Silent => {}
                    }
                }
            }
        });
        Ok(tonic::Response::new(Box::pin(frames)))
    }
}

struct Test {
    env: Env,
    world: Arc<Mutex<World>>,
}

fn test() -> Test {
    let random = std::sync::atomic::AtomicU64::new(1);
    let random = move || random.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let env = Env { net: Arc::new(MemNet::default()), random: Arc::new(random), ..Env::real() };
    Test { env, world: Arc::default() }
}

impl Test {
    async fn master(
        &self,
        address: &str,
        script: impl Fn(&mut World, &ClientFrame) -> Act + Send + Sync + 'static,
    ) {
        let listener = self.env.net.listen(address).await.expect("listening");
        let service = Scripted { world: Arc::clone(&self.world), script: Arc::new(script) };
        let server = rpc::server(Tuning::default()).add_service(SessionServer::new(service));
        tokio::spawn(server.serve_with_incoming(rpc::incoming(listener)));
    }

    async fn connect(&self, masters: &[&str]) -> FsResult<Arc<Session>> {
        let config = ClientConfig::new(masters.iter().copied());
        Session::connect(self.env.clone(), &config).await.map(|(session, _)| session)
    }

    fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }
}

fn welcome(session: u64) -> Act {
    let now = Some(Timestamp { seconds: 1000, nanos: 0 });
    let (cluster_id, version) = ("c".to_owned(), dfs_proto::PROTOCOL_VERSION);
    let welcome = Welcome {
        ttl_ms: 20_000,
        session,
        cluster_id,
        version,
        now,
        replicas: 3,
        chunk_size: 8,
        ..Welcome::default()
    };
    Act::Send(MasterFrame { welcome: Some(welcome), ..MasterFrame::default() })
}

fn refuse(code: ErrorCode, leader: &str) -> Act {
    let refusal = Some(FsError::new(code, "because").into());
    Act::Send(MasterFrame { refusal, leader: leader.to_owned(), ..MasterFrame::default() })
}

fn obedient(world: &mut World, frame: &ClientFrame) -> Act {
    match &frame.hello {
        Some(_) => welcome(7),
        None => Act::Send(world.answer(frame)),
    }
}

/// A welcome of a leader of this term.
fn welcome_of(term: u64, session: u64) -> Act {
    let Act::Send(mut frame) = welcome(session) else { panic!("a welcome is sent") };
    if let Some(welcome) = &mut frame.welcome {
        welcome.term = term;
    }
    Act::Send(frame)
}

#[tokio::test(start_paused = true)]
async fn masters_of_an_earlier_history_are_not_listened_to() {
    let test = test();
    let (moved, crash) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (was_moved, crashes) = (Arc::clone(&moved), Arc::clone(&crash));
    // The leader of the restored cluster; it goes away once, and comes back.
    test.master("new:1", move |world, frame| match &frame.hello {
        _ if crashes.swap(false, Ordering::Relaxed) => Act::Drop,
        Some(_) if was_moved.load(Ordering::Relaxed) => welcome_of(1001, 7),
        Some(_) => welcome_of(1000, 7),
        None => Act::Send(world.answer(frame)),
    })
    .await;
    // One of before would take the session; another knows nothing of it, and would have it given up.
    test.master("old:1", |_, _| welcome_of(5, 7)).await;
    test.master("old:2", |_, _| {
        let Act::Send(mut frame) = refuse(ErrorCode::ErrorSessionExpired, "") else { panic!("it is sent") };
        frame.term = 999;
        Act::Send(frame)
    })
    .await;
    let session = test.connect(&["new:1", "old:1", "old:2"]).await.expect("connected");
    assert_eq!(unlink(&session, "x").await, Ok("x".to_owned()));
    for name in ["y", "z", "a"] {
        moved.store(true, Ordering::Relaxed);
        crash.store(true, Ordering::Relaxed);
        assert_eq!(unlink(&session, name).await, Ok(name.to_owned()));
        assert_eq!((session.leader().as_str(), Master::session(&*session)), ("new:1", SessionId(7)));
    }
    let world = test.world();
    assert_eq!(world.carried_out, ["x", "y", "z", "a"]);
    let asked = world.hellos.iter().filter(|hello| hello.session == 7).count();
    assert!(asked > 3, "the old ones were asked, too: {asked}");
}

async fn unlink(session: &Session, name: &str) -> FsResult<String> {
    let name = bytes::Bytes::copy_from_slice(name.as_bytes());
    let change = mutation::Op::Unlink(v1::Unlink { name, ..v1::Unlink::default() });
    match session.mutate(&Cred::default(), change).await? {
        answer::Body::Data(name) => Ok(String::from_utf8_lossy(&name).into_owned()),
        other => panic!("{other:?}"),
    }
}

fn waiting_lock() -> hold::Op {
    hold::Op::Lock(v1::Lock { ino: 1, owner: 2, end: 9, r#type: 1, wait: true, pid: 3, start: 0 })
}

#[tokio::test(start_paused = true)]
async fn a_redirect_is_followed_and_the_welcome_is_kept() {
    let test = test();
    test.master("a:1", |_, _| refuse(ErrorCode::ErrorNotLeader, "z:1")).await;
    test.master("z:1", obedient).await;
    let session = test.connect(&["nobody:1", "a:1"]).await.expect("connected");
    assert_eq!((session.cluster_id().as_str(), session.leader().as_str()), ("c", "z:1"));
    assert_eq!(Master::session(&*session), SessionId(7));
    assert_eq!(session.defaults(), Defaults { replicas: 3, chunk_size: 8 });
    let first = session.now();
    assert!(first.seconds >= 1000 && first.seconds < 1010, "{first:?}");
    assert!(first.key() <= session.now().key());
    assert_eq!(unlink(&session, "x").await, Ok("x".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn every_change_is_made_once_while_streams_break_and_answers_repeat() {
    let test = test();
    // Each master loses the stream at some frames: before it carried them out, or after it did, with no answer.
    for (address, other) in [("a:1", "b:1"), ("b:1", "a:1")] {
        test.master(address, move |world, frame| match (&frame.hello, world.frames % 7) {
            (Some(_), 3) => refuse(ErrorCode::ErrorNotLeader, other),
            (Some(_), _) => welcome(7),
            (None, 1) => Act::Drop,
            (None, 2) => {
                world.answer(frame);
                Act::Drop
            }
            (None, 4) => {
                let mut answer = world.answer(frame);
                answer.replies.extend(answer.replies.clone());
                Act::Send(answer)
            }
            (None, 5) => {
                let failure = |seq: u64| Reply {
                    seq,
                    answer: Some(Answer {
                        body: Some(answer::Body::Failure(FsError::from(ErrorCode::ErrorNotLeader).into())),
                    }),
                    ..Reply::default()
                };
                let replies = frame.requests.iter().map(|request| failure(request.seq)).collect();
                Act::Send(MasterFrame { replies, ..MasterFrame::default() })
            }
            (None, _) => Act::Send(world.answer(frame)),
        })
        .await;
    }
    let session = test.connect(&["a:1", "b:1"]).await.expect("connected");
    let calls = (0..40).map(|caller| {
        let session = Arc::clone(&session);
        tokio::spawn(async move {
            for round in 0..25 {
                let name = format!("{caller}-{round}");
                assert_eq!(unlink(&session, &name).await, Ok(name));
                if round % 5 == 0 {
                    tokio::time::sleep(Duration::from_millis(caller)).await;
                }
            }
        })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.expect("no caller saw an error");
    }
    let world = test.world();
    let mut names = world.carried_out.clone();
    names.sort();
    names.dedup();
    assert_eq!((names.len(), world.carried_out.len()), (1000, 1000), "each once");
    assert!(world.repeated > 0 && world.hellos.len() > 10, "the script was harmless: {}", world.hellos.len());
    assert!(
        world.hellos.iter().skip(1).all(|hello| hello.session == 7 && hello.nonce == world.hellos[0].nonce)
    );
}

#[tokio::test(start_paused = true)]
async fn what_waits_together_goes_together() {
    let test = test();
    test.master("a:1", obedient).await;
    let session = test.connect(&["a:1"]).await.expect("connected");
    let calls: Vec<_> = (0..100).map(|_| session.query(&OWN, query::Op::StatFs(v1::StatFs {}))).collect();
    let answers = futures::future::join_all(calls).await;
    assert!(answers.iter().all(Result::is_ok));
    assert!(test.world().frames <= 4, "{} frames for 100 requests", test.world().frames);
}

static OWN: Cred = Cred { uid: 0, gid: 0, groups: Vec::new() };

#[tokio::test(start_paused = true)]
async fn a_dead_master_is_noticed_by_its_silence() {
    let test = test();
    test.master("a:1", |world, frame| match frame.hello {
        Some(_) => welcome(7),
        None if world.hellos.len() == 1 => Act::Silent,
        None => Act::Send(world.answer(frame)),
    })
    .await;
    let session = test.connect(&["a:1"]).await.expect("connected");
    let before = Instant::now();
    assert_eq!(unlink(&session, "x").await, Ok("x".to_owned()));
    assert!(before.elapsed() < Duration::from_secs(7), "{:?}", before.elapsed());
    assert_eq!(test.world().hellos.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn keep_alives_keep_an_idle_stream() {
    let test = test();
    test.master("a:1", obedient).await;
    let session = test.connect(&["a:1"]).await.expect("connected");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(test.world().hellos.len(), 1);
    assert!(test.world().frames >= 25);
    assert_eq!(unlink(&session, "x").await, Ok("x".to_owned()));
}

#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_ends_with_the_cause() {
    let test = test();
    test.master("a:1", |world, frame| match frame.hello {
        Some(_) if world.hellos.len() == 1 => welcome(7),
        Some(_) => refuse(ErrorCode::ErrorNotLeader, ""),
        None => Act::Drop,
    })
    .await;
    let session = test.connect(&["a:1"]).await.expect("connected");
    let before = Instant::now();
    let error = unlink(&session, "x").await.expect_err("nobody answers");
    assert_eq!(error.code, ErrorCode::ErrorTimedOut);
    assert!(error.message.contains("within 60s") && error.message.contains("a:1: does not lead"), "{error}");
    assert_eq!(before.elapsed().as_secs(), 60);
}

#[tokio::test(start_paused = true)]
async fn connecting_fails_with_the_addresses_and_their_causes() {
    let test = test();
    test.master("b:1", |_, _| refuse(ErrorCode::ErrorNotLeader, "")).await;
    let before = Instant::now();
    let error = test.connect(&["a:1", "b:1"]).await.err().expect("nobody leads");
    assert_eq!(before.elapsed().as_secs(), 10);
    assert!(!error.message.contains('\n'));
    for part in ["10s", "a:1: Connection refused", "b:1: does not lead; no leader is known"] {
        assert!(error.message.contains(part), "{error}");
    }
    assert!(test.connect(&[]).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn another_version_or_cluster_is_refused_at_once_and_for_good() {
    for code in [ErrorCode::ErrorVersion, ErrorCode::ErrorWrongCluster] {
        let test = test();
        test.master("a:1", move |_, _| refuse(code, "")).await;
        let before = Instant::now();
        let error = test.connect(&["a:1"]).await.err().expect("refused");
        assert_eq!(error.code, code);
        assert!(error.message.starts_with("a:1: because"), "{error}");
        assert!(before.elapsed() < Duration::from_secs(1));
    }
}

#[tokio::test(start_paused = true)]
async fn an_expired_session_is_replaced_and_that_is_told() {
    let test = test();
    test.master("a:1", |world, frame| match &frame.hello {
        Some(hello) if hello.session == 7 => refuse(ErrorCode::ErrorSessionExpired, ""),
        Some(_) => welcome(if world.hellos.len() == 1 { 7 } else { 8 }),
        None if world.hellos.len() == 1 && world.frames > 2 => Act::Drop,
        None => Act::Send(world.answer(frame)),
    })
    .await;
    let session = test.connect(&["a:1"]).await.expect("connected");
    let mut changed = session.session_changed();
    assert_eq!(*changed.borrow_and_update(), SessionId(7));
    let open = hold::Op::Open(v1::Open { ino: 5, ..v1::Open::default() });
    session.hold(&OWN, open).await.expect("open");
    assert_eq!(unlink(&session, "lost").await, Ok("lost".to_owned()), "asked for in the new session");
    changed.changed().await.expect("told");
    assert_eq!(*changed.borrow_and_update(), SessionId(8));
    assert_eq!(unlink(&session, "x").await, Ok("x".to_owned()));
    let world = test.world();
    let hello = world.hellos.last().expect("three hellos");
    assert_eq!((hello.session, hello.opens.len()), (0, 1), "files stay open");
    assert_ne!(hello.nonce, world.hellos[0].nonce);
    let before = v1::EarlierSession { session: 7, nonce: world.hellos[0].nonce };
    assert!(world.requests.iter().any(|request| request.earlier == [before]));
}

#[tokio::test(start_paused = true)]
async fn a_waiting_lock_waits_on_and_is_cancelled_with_its_future() {
    let test = test();
    test.master("a:1", |world, frame| match frame.hello {
        Some(_) => welcome(7),
        None => {
            let mut answer = world.answer(frame);
            let waits = |seq: &u64| {
                frame.requests.iter().any(|request| {
                    request.seq == *seq
                        && matches!(
                            &request.op,
                            Some(request::Op::Hold(v1::Hold { op: Some(hold::Op::Lock(_)) }))
                        )
                })
            };
            answer.replies.retain(|reply| !waits(&reply.seq));
            Act::Send(answer)
        }
    })
    .await;
    let session = test.connect(&["a:1"]).await.expect("connected");
    let wait = session.hold(&OWN, waiting_lock());
    assert!(timeout(Duration::from_secs(300), wait).await.is_err(), "beyond the operation time-out");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let world = test.world();
    let lock = world
        .requests
        .iter()
        .find(|r| matches!(&r.op, Some(request::Op::Hold(v1::Hold { op: Some(hold::Op::Lock(_)) }))))
        .expect("the lock");
    let cancel = hold::Op::CancelLock(v1::CancelLock { seq: lock.seq });
    assert!(
        world.requests.iter().any(|r| r.op == Some(request::Op::Hold(v1::Hold { op: Some(cancel.clone()) })))
    );
}

#[tokio::test(start_paused = true)]
async fn goodbye_ends_the_session_and_what_comes_later_fails() {
    let test = test();
    test.master("a:1", obedient).await;
    let session = test.connect(&["a:1"]).await.expect("connected");
    let close = hold::Op::Close(v1::Close { ino: 5 });
    session.hold_later(&OWN, close.clone()).await.expect("sent");
    session.goodbye(Duration::from_secs(2)).await;
    assert_eq!(test.world().goodbyes, 1);
    assert!(unlink(&session, "x").await.is_err());
    assert!(session.hold_later(&OWN, close).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn the_window_bounds_what_is_under_way() {
    let test = test();
    test.master("a:1", |world, frame| match frame.hello {
        Some(_) => welcome(7),
        None => {
            world.requests.extend(frame.requests.iter().cloned());
            Act::Send(MasterFrame { keep_alive: frame.keep_alive, ..MasterFrame::default() })
        }
    })
    .await;
    let session = test.connect(&["a:1"]).await.expect("connected");
    let calls: Vec<_> = (0..limits::SESSION_WINDOW + 10)
        .map(|_| {
            let session = Arc::clone(&session);
            tokio::spawn(async move { session.query(&OWN, query::Op::StatFs(v1::StatFs {})).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(test.world().requests.len(), limits::SESSION_WINDOW);
    let urgent = Arc::clone(&session);
    let commit = v1::mutation::Op::Commit(v1::Commit::default());
    let urgent = tokio::spawn(async move { urgent.mutate(&OWN, commit).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        test.world().requests.len(),
        limits::SESSION_WINDOW + 1,
        "others may wait for what it commits"
    );
    urgent.abort();
    for call in calls {
        let error = call.await.expect("no panic").expect_err("never answered");
        assert_eq!(error.code, ErrorCode::ErrorTimedOut);
    }
}
