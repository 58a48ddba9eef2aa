use super::*;
use crate::leases::testing::leases;

const NOW: Duration = Duration::from_secs(1_000);

fn mutation() -> request::Op {
    request::Op::Mutation(v1::Mutation { op: Some(mutation::Op::Unlink(v1::Unlink::default())) })
}

fn query() -> request::Op {
    request::Op::Query(v1::Query { op: Some(v1::query::Op::StatFs(v1::StatFs {})) })
}

fn hold(op: hold::Op) -> request::Op {
    request::Op::Hold(v1::Hold { op: Some(op) })
}

fn lock(owner: u64) -> v1::Lock {
    v1::Lock { ino: 1, owner, end: 9, r#type: 1, wait: true, ..v1::Lock::default() }
}

fn welcome(session: u64) -> v1::Welcome {
    v1::Welcome { session, cluster_id: "c".into(), ..v1::Welcome::default() }
}

fn connected() -> State {
    let mut state = State::new(7, String::new(), leases().0);
    state.hello("n", "h", NOW);
    state.welcome(&welcome(3), &mut 0);
    state
}

fn submit(state: &mut State, op: request::Op) -> (u64, oneshot::Receiver<Heard>) {
    let (reply, receiver) = oneshot::channel();
    (state.submit(&Cred::default(), op, Some(reply), None, true), receiver)
}

fn reply(seq: u64, body: Body) -> Reply {
    Reply { seq, answer: Some(Answer { body: Some(body) }), ..Reply::default() }
}

fn answered(state: &mut State, replies: Vec<Reply>) -> Outcome {
    state.received(MasterFrame { replies, ..MasterFrame::default() })
}

fn failure(seq: u64, code: ErrorCode) -> Reply {
    reply(seq, Body::Failure(FsError::from(code).into()))
}

fn done(outcome: Outcome) -> usize {
    let count = outcome.completions.len();
    outcome.completions.into_iter().for_each(|c| drop(c.reply.send(c.heard)));
    count
}

fn sent(state: &mut State) -> Vec<u64> {
    state.frame(NOW).map_or(Vec::new(), |frame| frame.requests.iter().map(|request| request.seq).collect())
}

#[test]
fn what_waits_goes_in_one_frame_and_again_in_order_after_a_reconnect() {
    let mut state = connected();
    let (first, _a) = submit(&mut state, mutation());
    let (second, _b) = submit(&mut state, query());
    let (third, mut c) = submit(&mut state, mutation());
    assert_eq!(sent(&mut state), [first, second, third]);
    assert!(sent(&mut state).is_empty());
    assert_eq!(done(answered(&mut state, vec![reply(first, Body::Empty(v1::Empty {}))])), 1);
    state.hello("n", "h", NOW);
    assert!(state.frame(NOW).is_none(), "nothing is sent before the welcome");
    state.welcome(&welcome(3), &mut 0);
    let frame = state.frame(NOW).expect("the unanswered");
    assert_eq!(frame.requests.iter().map(|r| r.seq).collect::<Vec<_>>(), [second, third]);
    assert_eq!(frame.lowest_unanswered, third, "a query keeps no answers alive");
    // Answered twice: once by the old stream's leader, once by the new one's.
    let twice = vec![reply(third, Body::Empty(v1::Empty {})), reply(third, Body::Empty(v1::Empty {}))];
    assert_eq!(done(answered(&mut state, twice)), 1);
    assert!(c.try_recv().expect("answered").result.is_ok());
}

#[test]
fn a_frame_is_bounded_in_number_and_bytes() {
    let mut state = connected();
    for _ in 0..limits::FRAME_REQUESTS_MAX + 1 {
        state.submit(&Cred::default(), query(), None, None, true);
    }
    assert_eq!(sent(&mut state).len(), limits::FRAME_REQUESTS_MAX);
    assert_eq!(sent(&mut state).len(), 1);
    let value = bytes::Bytes::from(vec![0; limits::FRAME_BYTES_MAX]);
    for _ in 0..2 {
        let change = v1::SetXattr { value: value.clone(), ..v1::SetXattr::default() };
        let op = request::Op::Mutation(v1::Mutation { op: Some(mutation::Op::SetXattr(change)) });
        state.submit(&Cred::default(), op, None, None, true);
    }
    assert_eq!(sent(&mut state).len(), 1);
    assert_eq!(sent(&mut state).len(), 1);
}

#[test]
fn a_refusal_by_a_master_without_the_lead_is_no_answer() {
    let mut state = connected();
    let (seq, mut receiver) = submit(&mut state, mutation());
    sent(&mut state);
    assert!(answered(&mut state, vec![failure(seq, ErrorCode::ErrorNotLeader)]).not_leader);
    assert!(!answered(&mut state, vec![failure(seq, ErrorCode::ErrorUnavailable)]).not_leader);
    assert!(receiver.try_recv().is_err());
    assert!(sent(&mut state).is_empty());
    state.retry_deferred();
    assert_eq!(sent(&mut state), [seq]);
    done(answered(&mut state, vec![failure(seq, ErrorCode::ErrorExists)]));
    let error = receiver.try_recv().expect("answered").result.expect_err("failed");
    assert_eq!(error.code, ErrorCode::ErrorExists);
}

#[test]
fn the_hello_asserts_opens_and_locks_again() {
    let mut state = connected();
    let (open, _a) = submit(&mut state, hold(hold::Op::Open(v1::Open { ino: 5, ..v1::Open::default() })));
    let create = v1::Create { open: true, ..v1::Create::default() };
    let create = request::Op::Mutation(v1::Mutation { op: Some(mutation::Op::Create(create)) });
    let (create, _b) = submit(&mut state, create);
    let (locked, _c) = submit(&mut state, hold(hold::Op::Lock(lock(2))));
    assert!(state.may_have_locks(1, 2) && !state.may_have_locks(1, 3));
    sent(&mut state);
    let made = v1::Entry {
        attr: Some(v1::Attr { ino: 6, ..v1::Attr::default() }),
        created: true,
        ..v1::Entry::default()
    };
    done(answered(
        &mut state,
        vec![
            reply(open, Body::Opened(v1::Opened::default())),
            reply(create, Body::Entry(made)),
            reply(locked, Body::Empty(v1::Empty {})),
        ],
    ));
    let hello = state.hello("n", "h", NOW);
    assert_eq!((hello.session, hello.nonce, hello.cluster_id.as_str()), (3, 7, "c"));
    assert_eq!(hello.opens.iter().map(|open| open.ino).collect::<Vec<_>>(), [5, 6]);
    assert_eq!(hello.locks.len(), 1);
}

#[test]
fn what_an_expired_session_did_not_answer_is_asked_for_in_the_next_ones() {
    let mut state = connected();
    let (change, mut a) = submit(&mut state, mutation());
    let commit = |slices| {
        let commit = v1::Commit { slices, set: Some(v1::SetAttr::default()), ..v1::Commit::default() };
        request::Op::Mutation(v1::Mutation { op: Some(mutation::Op::Commit(commit)) })
    };
    // Its chunk is fenced. Without one it would set attributes that others may have set since.
    let (with_bytes, _b) = submit(&mut state, commit(vec![v1::CommitSlice::default()]));
    let (without, mut e) = submit(&mut state, commit(vec![]));
    let (asked, _c) = submit(&mut state, query());
    assert_eq!(sent(&mut state), [change, with_bytes, without, asked]);
    let (unsent, _d) = submit(&mut state, mutation());
    let (unsent_without, mut f) = submit(&mut state, commit(vec![]));
    assert!(unsent < unsent_without);
    let mut before = Vec::new();
    for number in 0..limits::EARLIER_SESSIONS_MAX as u64 {
        before.push(EarlierSession { session: 3 + number, nonce: 7 + number });
        assert_eq!(done(state.expired(8 + number)), if number == 0 { 2 } else { 0 });
        let hello = state.hello("n", "h", NOW);
        assert_eq!((hello.session, hello.nonce), (0, 8 + number));
        state.welcome(&welcome(4 + number), &mut 0);
        let frame = state.frame(NOW).expect("all of them");
        let again: Vec<_> =
            frame.requests.iter().map(|request| (request.seq, &request.earlier[..])).collect();
        // The last one was first sent after the first session had ended.
        let later = &before[1..];
        assert_eq!(again, [(change, &before[..]), (with_bytes, &[]), (asked, &[]), (unsent, later)]);
    }
    for answer in [&mut e, &mut f] {
        let error = answer.try_recv().expect("answered").result.expect_err("not made");
        assert_eq!(error.code, ErrorCode::ErrorSessionExpired);
    }
    // It may not have ended yet, for the master.
    assert_eq!(done(answered(&mut state, vec![failure(change, ErrorCode::ErrorUnavailable)])), 0);
    state.retry_deferred();
    assert_eq!(state.frame(NOW).expect("again").requests[0].earlier, before);
    // That is bounded.
    let outcome = state.expired(99);
    assert_eq!((outcome.freed, done(outcome)), (1, 1));
    let error = a.try_recv().expect("answered").result.expect_err("failed");
    assert_eq!(error.code, ErrorCode::ErrorIo);
}

#[test]
fn a_lock_nobody_waits_for_is_cancelled_and_taken_back_if_it_was_granted_all_the_same() {
    let mut state = connected();
    let (waiting, a) = submit(&mut state, hold(hold::Op::Lock(lock(2))));
    assert_eq!(sent(&mut state), [waiting]);
    drop(a);
    state.cancel(waiting, &mut 0);
    let frame = state.frame(NOW).expect("the cancelling");
    assert_eq!(frame.requests[0].op, Some(hold(hold::Op::CancelLock(CancelLock { seq: waiting }))));
    done(answered(&mut state, vec![reply(waiting, Body::Empty(v1::Empty {}))]));
    let frame = state.frame(NOW).expect("the way back");
    let Some(request::Op::Hold(v1::Hold { op: Some(hold::Op::Lock(step)) })) = &frame.requests[0].op else {
        panic!("{frame:?}")
    };
    assert_eq!((step.start, step.end, step.r#type), (0, 9, v1::lock::Type::Unlock as i32));
    // One that was never sent is simply gone, and after a reconnect nothing of either is left.
    let (unsent, _b) = submit(&mut state, hold(hold::Op::Lock(lock(3))));
    let mut freed = 0;
    state.cancel(unsent, &mut freed);
    assert_eq!(freed, 1);
    let (waiting, _c) = submit(&mut state, hold(hold::Op::Lock(lock(4))));
    sent(&mut state);
    state.cancel(waiting, &mut 0);
    state.hello("n", "h", NOW);
    let mut freed = 0;
    state.welcome(&welcome(3), &mut freed);
    assert_eq!(freed, 1);
    let left = state.frame(NOW).expect("the way back of the first");
    assert_eq!(left.requests.len(), 1);
}

#[test]
fn an_open_nobody_waits_for_is_closed_again() {
    let mut state = connected();
    let (open, a) = submit(&mut state, hold(hold::Op::Open(v1::Open { ino: 5, ..v1::Open::default() })));
    sent(&mut state);
    drop(a);
    done(answered(&mut state, vec![reply(open, Body::Opened(v1::Opened::default()))]));
    let frame = state.frame(NOW).expect("the close");
    assert_eq!(frame.requests[0].op, Some(hold(hold::Op::Close(v1::Close { ino: 5 }))));
}

#[tokio::test(start_paused = true)]
async fn whose_time_is_up_is_told_the_cause() {
    let mut state = connected();
    let deadline = Instant::now() + std::time::Duration::from_secs(1);
    let (reply, mut receiver) = oneshot::channel();
    state.submit(&Cred::default(), mutation(), Some(reply), Some(deadline), true);
    let (_, mut patient) = submit(&mut state, mutation());
    state.hello("n", "h", NOW);
    state.cause = "a:1: Connection refused".into();
    assert_eq!(done(state.overdue(Instant::now(), None, String::new)), 0);
    tokio::time::advance(std::time::Duration::from_secs(1)).await;
    let outcome = state.overdue(Instant::now(), None, || "no answer within 1s".into());
    assert_eq!((outcome.freed, done(outcome)), (1, 1));
    let error = receiver.try_recv().expect("answered").result.expect_err("failed");
    assert_eq!(error.to_string(), "no answer within 1s: a:1: Connection refused (timed out)");
    assert!(patient.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_lock_waits_as_long_as_masters_answer() {
    let mut state = connected();
    let (_, mut patient) = submit(&mut state, hold(hold::Op::Lock(lock(4))));
    let second = Duration::from_secs(1);
    let late = |state: &mut State, silence| done(state.overdue(Instant::now(), silence, String::new));
    tokio::time::advance(100 * second).await;
    assert_eq!(late(&mut state, Some(second)), 0, "the masters are there");
    state.disconnected("a:1: Connection refused".into());
    state.hello("n", "h", NOW);
    assert_eq!(late(&mut state, Some(second)), 0);
    tokio::time::advance(second).await;
    assert_eq!(late(&mut state, None), 0, "for ever");
    let (_, mut later) = submit(&mut state, hold(hold::Op::Lock(lock(5))));
    assert_eq!(late(&mut state, Some(second)), 1);
    let error = patient.try_recv().expect("answered").result.expect_err("failed");
    assert_eq!(error.code, ErrorCode::ErrorTimedOut);
    assert!(later.try_recv().is_err(), "it has only begun");
    tokio::time::advance(second).await;
    state.disconnected("a:1: Connection refused".into());
    assert_eq!(late(&mut state, Some(second)), 1, "further attempts that fail change nothing");
}

#[test]
fn after_a_lasting_failure_everybody_is_told() {
    let mut state = connected();
    let (_, mut a) = submit(&mut state, query());
    let outcome = state.fail_all(&ErrorCode::ErrorVersion.into());
    assert_eq!((outcome.freed, done(outcome)), (1, 1));
    assert!(a.try_recv().expect("answered").result.is_err());
    assert!(state.broken.is_some() && state.frame(NOW).is_none());
}

#[test]
fn the_goodbye_follows_everything_else() {
    let mut state = connected();
    let (seq, _a) = submit(&mut state, mutation());
    state.say_goodbye();
    assert!(state.has_work());
    let frame = state.frame(NOW).expect("last frame");
    assert_eq!((frame.requests[0].seq, frame.goodbye), (seq, Some(Goodbye {})));
    assert!(state.goodbye_sent() && state.frame(NOW).is_none());
}

#[test]
fn leases_count_before_their_answers_and_are_given_back_under_their_numbers() {
    let mut state = connected();
    let (seq, mut receiver) = submit(&mut state, query());
    sent(&mut state);
    let granted = Reply { grant: 4, read_leases: vec![5, 6], ..reply(seq, Body::Empty(v1::Empty {})) };
    let recall = v1::Recall { ino: 5, grant: 4, ..v1::Recall::default() };
    let unknown = v1::Recall { ino: 9, grant: 3, ..v1::Recall::default() };
    let outcome = state.received(MasterFrame {
        replies: vec![granted],
        recalls: vec![recall, recall, unknown],
        ..MasterFrame::default()
    });
    assert_eq!(outcome.leaving, [Leaving { ino: InodeNo(5), held: Kind::Read, keep: None }]);
    done(outcome);
    assert!(receiver.try_recv().is_ok());
    assert_eq!((state.leases.kind(InodeNo(5)), state.leases.kind(InodeNo(6))), (None, Some(Kind::Read)));
    let returned = |ino, grant| LeaseReturn { ino, grant, ..LeaseReturn::default() };
    assert_eq!(state.frame(NOW).expect("not held").returned, [returned(9, 3)]);
    assert_eq!(state.give_back(InodeNo(5), None, || true), Ok(()));
    assert_eq!(state.frame(NOW).expect("given back").returned, [returned(5, 4)]);
    let hello = state.hello("n", "h", NOW);
    assert_eq!((hello.read_leases, hello.takes_leases), (vec![6], true));
    assert_eq!(state.expired(8).leaving, [Leaving { ino: InodeNo(6), held: Kind::Read, keep: None }]);
    assert!(state.hello("n", "h", NOW).read_leases.is_empty());
}

#[test]
fn leases_count_from_when_a_message_was_sent_that_the_master_confirmed() {
    let mut state = connected();
    let ttl = v1::Welcome { ttl_ms: 20_000, ..welcome(3) };
    state.hello("n", "h", NOW);
    state.welcome(&ttl, &mut 0);
    let left = |state: &State| state.leases.left();
    // NOW, the time to live and no margin yet: the clock of the test stands still there.
    assert_eq!(left(&state), Duration::from_secs(18));
    state.want_keep_alive();
    let alive = state.frame(NOW + Duration::from_secs(2)).expect("a keep-alive").keep_alive;
    state.want_keep_alive();
    state.frame(NOW + Duration::from_secs(4)).expect("another");
    state.received(MasterFrame { keep_alive: alive, ..MasterFrame::default() });
    assert_eq!(left(&state), Duration::from_secs(20));
}
