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
        let mut count = 0;
        let (from, to) = keys::table(keys::tag::ANSWER);
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
    let closed = w.system(system::Op::CloseSession(v1::CloseSession { target: w.session })).unwrap();
    assert_eq!(closed, system_answer::Body::Chunks(v1::ChunkList { chunks: vec![chunk] }));
    assert_eq!(code(body(w.run(create(&w, "a")))), ErrorCode::ErrorSessionExpired);
    assert_eq!(w.recorded(), 0);
    assert_eq!(sessions(&w.kv).unwrap(), vec![]);
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
    w.system(system::Op::CloseSession(v1::CloseSession { target: session.get() })).unwrap();
    assert_eq!(leased(&w.kv).unwrap(), []);
}
