//! I6 and I7: what is repeated is done once and answered alike; what is forgotten is refused.

use super::*;
use dfs_proto::limits::DEDUP_WINDOW;

fn create(w: &World, name: &str) -> v1::Command {
    w.command(&root(), mutation::Op::Create(new(ROOT, name, Kind::File, 0o644)))
}

#[test]
fn a_repeated_command_gets_the_answer_of_then_and_does_nothing() {
    let w = World::new();
    let good = create(&w, "a");
    let first = w.run(good.clone());
    let bad = v1::Command { lowest_unanswered: good.seq, ..create(&w, "a") };
    let refused = w.run(bad.clone());
    assert_eq!(code(body(refused.clone())), ErrorCode::ErrorExists);
    w.unlink_keeping(good.seq, "a");
    assert_eq!(w.run(good.clone()), first, "although the name is free again");
    assert_eq!(w.run(bad), refused);
    assert_eq!(code(w.lookup(&root(), ROOT, "a")), ErrorCode::ErrorNotFound);
    // In one batch, too.
    let twice = v1::Command { lowest_unanswered: good.seq, ..create(&w, "b") };
    let batch = v1::Batch { version: BATCH_VERSION, commands: vec![twice.clone(), twice] };
    let (writes, results) = apply(&w.kv, &batch).unwrap();
    assert_eq!(results[0], results[1]);
    w.kv.apply(&writes).unwrap();
    assert!(w.lookup(&root(), ROOT, "b").is_ok());
    w.check();
}

impl World {
    fn unlink_keeping(&self, lowest_unanswered: u64, name: &str) {
        let op = v1::Unlink { parent: ROOT, name: name.to_owned().into(), directory: false };
        let command = v1::Command { lowest_unanswered, ..self.command(&root(), mutation::Op::Unlink(op)) };
        body(self.run(command)).unwrap();
    }

    fn recorded(&self) -> usize {
        self.rows(keys::tag::ANSWER)
    }

    fn rows(&self, tag: u8) -> usize {
        let mut count = 0;
        let (from, to) = keys::table(tag);
        self.kv
            .scan(&from, &to, &mut |_, _| {
                count += 1;
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        count
    }
}

#[test]
fn answers_are_forgotten_when_the_client_has_them() {
    let w = World::new();
    let first = v1::Command { lowest_unanswered: 0, ..create(&w, "a") };
    w.run(first.clone());
    for name in ["b", "c"] {
        w.run(v1::Command { lowest_unanswered: first.seq, ..create(&w, name) });
    }
    assert_eq!(w.recorded(), 3);
    w.run(create(&w, "d"));
    assert_eq!(w.recorded(), 1);
    assert_eq!(code(body(w.run(first))), ErrorCode::ErrorConflict);
    // A client that never says so is forgotten by distance.
    let far = v1::Command { seq: 10 + 2 * DEDUP_WINDOW as u64, lowest_unanswered: 0, ..create(&w, "e") };
    w.run(far);
    assert_eq!(w.recorded(), 1);
    w.check();
}

#[test]
fn an_ended_session_changes_nothing_any_more() {
    let w = World::new();
    let chunk = w.alloc(1)[0].chunk;
    let closed = w
        .system(system::Op::CloseSession(v1::CloseSession { target: w.session, ..Default::default() }))
        .unwrap();
    assert_eq!(closed, system_answer::Body::Chunks(v1::ChunkList { chunks: vec![chunk] }));
    assert_eq!(code(body(w.run(create(&w, "a")))), ErrorCode::ErrorSessionExpired);
    assert_eq!(w.recorded(), 0);
    assert_eq!(sessions(&w.kv).unwrap(), vec![]);
    w.check();
}

impl World {
    fn lose_session(&self) -> v1::EarlierSession {
        let close = v1::CloseSession { target: self.session, keep_answers: true };
        self.system(system::Op::CloseSession(close)).unwrap();
        v1::EarlierSession { session: self.session, nonce: 7 }
    }

    /// The same change, under the session of now.
    fn again(&self, command: &v1::Command, earlier: &[v1::EarlierSession]) -> v1::Command {
        v1::Command {
            session: self.session,
            lowest_unanswered: 0,
            earlier: earlier.to_vec(),
            ..command.clone()
        }
    }
}

#[test]
fn a_change_of_a_session_that_has_ended_has_its_answer_or_is_made_now() {
    let mut w = World::new();
    let (done, refused, lost) = (create(&w, "done"), create(&w, "done"), create(&w, "lost"));
    let made = w.run(v1::Command { lowest_unanswered: done.seq, ..done.clone() });
    let exists = w.run(v1::Command { lowest_unanswered: done.seq, ..refused.clone() });
    assert_eq!(code(body(exists.clone())), ErrorCode::ErrorExists);
    let first = v1::EarlierSession { session: w.session, nonce: 7 };
    let old = w.session;
    w.session = w.open_session();
    // It may still do everything.
    assert_eq!(code(body(w.run(w.again(&lost, &[first])))), ErrorCode::ErrorUnavailable);
    assert_eq!(code(w.lookup(&root(), ROOT, "lost")), ErrorCode::ErrorNotFound);
    let now = std::mem::replace(&mut w.session, old);
    assert_eq!(w.lose_session(), first);
    // Closing is repeated when its answer is lost.
    w.lose_session();
    w.session = now;
    assert_eq!(code(body(w.run(lost.clone()))), ErrorCode::ErrorSessionExpired);
    // Somebody else, in between: what was done then is not done again.
    w.unlink_keeping(done.seq, "done");
    assert_eq!(w.run(w.again(&done, &[first])), made);
    assert_eq!(w.run(w.again(&refused, &[first])), exists);
    assert_eq!(code(w.lookup(&root(), ROOT, "done")), ErrorCode::ErrorNotFound);
    let made = w.run(w.again(&lost, &[first]));
    assert!(body(made.clone()).is_ok());
    assert_eq!(w.run(w.again(&lost, &[first])), made);
    // And lost once more: whichever of them did it answers.
    let second = w.lose_session();
    w.session = w.open_session();
    assert_eq!(w.run(w.again(&lost, &[first, second])), made);
    let never = create(&w, "never");
    assert!(body(w.run(w.again(&never, &[first, second]))).is_ok());
    w.check();
}

#[test]
fn who_does_not_know_an_ended_session_is_not_answered_for_it() {
    let mut w = World::new();
    let done = create(&w, "a");
    w.run(done.clone());
    let before = w.lose_session();
    w.session = w.open_session();
    // An answer that the client had is not remembered.
    let early = v1::Command { seq: done.seq - 1, lowest_unanswered: 0, ..w.again(&done, &[before]) };
    assert_eq!(code(body(w.run(early))), ErrorCode::ErrorIo);
    let stranger = v1::EarlierSession { nonce: 8, ..before };
    let unheard_of = v1::EarlierSession { session: 99, ..before };
    for earlier in [vec![stranger], vec![unheard_of], vec![before, stranger], vec![unheard_of, before]] {
        let other = w.again(&create(&w, "b"), &earlier);
        assert_eq!(code(body(w.run(other.clone()))), ErrorCode::ErrorIo);
        assert_eq!(code(body(w.run(other))), ErrorCode::ErrorIo, "for good");
    }
    assert_eq!(code(w.lookup(&root(), ROOT, "b")), ErrorCode::ErrorNotFound);
    w.check();
}

#[test]
fn ended_sessions_are_forgotten_after_a_while_and_when_they_are_too_many() {
    use dfs_proto::limits::{ENDED_SESSION_KEPT_S, ENDED_SESSIONS_MAX};
    let mut w = World::new();
    let done = create(&w, "a");
    w.run(done.clone());
    let first = w.lose_session();
    w.session = w.open_session();
    assert_eq!(w.recorded(), 1);
    w.clock.set(w.clock.get() + ENDED_SESSION_KEPT_S);
    w.lose_session();
    assert_eq!(w.recorded(), 0);
    w.session = w.open_session();
    assert_eq!(code(body(w.run(w.again(&done, &[first])))), ErrorCode::ErrorIo);
    w.lose_session();
    for _ in 0..ENDED_SESSIONS_MAX + 2 {
        w.clock.set(w.clock.get() - 2);
        w.session = w.open_session();
        w.lose_session();
    }
    let kept = w.rows(keys::tag::ENDED);
    assert_eq!(kept, ENDED_SESSIONS_MAX);
    w.check();
}

#[test]
fn without_a_credential_nothing_is_allowed_that_nobody_may() {
    let w = World::new();
    let anonymous = v1::Command { cred: None, ..create(&w, "a") };
    assert_eq!(code(body(w.run(anonymous))), ErrorCode::ErrorAccess);
}

#[test]
fn time_never_runs_backwards() {
    let w = World::new();
    let late = w.make(&root(), ROOT, "a", Kind::File, 0o644).unwrap().ctime.unwrap();
    let early = v1::Command { now: Some(Timestamp { seconds: 5, nanos: 0 }), ..create(&w, "b") };
    let attr = attr_of(body(w.run(early)).unwrap());
    assert_eq!(attr.ctime.unwrap(), late);
}

#[test]
fn where_a_session_may_hold_leases_is_noted_until_it_ends() {
    use crate::state::{leased, sessions};
    let w = World::new();
    let session = sessions(&w.kv).unwrap()[0].0;
    let note = v1::LeaseNote { session: session.get(), read_buckets: vec![7, 4095], write_buckets: vec![7] };
    let nobody = v1::LeaseNote { session: 99, ..note.clone() };
    for _ in 0..2 {
        let notes = v1::NoteLeases { notes: vec![note.clone(), nobody.clone()] };
        w.system(system::Op::NoteLeases(notes)).unwrap();
    }
    let (read, write) = (v1::LeaseKind::LeaseRead, v1::LeaseKind::LeaseWrite);
    let noted = [(session, read, 7), (session, read, 4095), (session, write, 7)];
    assert_eq!(leased(&w.kv).unwrap(), noted);
    w.system(system::Op::CloseSession(v1::CloseSession { target: session.get(), ..Default::default() }))
        .unwrap();
    assert_eq!(leased(&w.kv).unwrap(), []);
}
