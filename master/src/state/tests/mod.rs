//! The state machine against plain models, and the rules of Linux one by one.

mod data;
mod dedup;
mod mend;
mod model;
mod permissions;
mod rules;
mod wishes;

use super::*;
use dfs_proto::limits::{NAME_MAX, REAP_ROWS_MAX};
use dfs_proto::v1::{Attr, ChunkAccess, Cred, Kind};
use dfs_proto::{ChunkId, FsResult, InodeNo};
use std::cell::{Cell, RefCell};

const ROOT: u64 = 1;
const CHUNK: u64 = 1 << 20;

fn root() -> Cred {
    Cred { uid: 0, gid: 0, groups: vec![] }
}

fn user(uid: u32) -> Cred {
    Cred { uid, gid: uid, groups: vec![] }
}

/// A cluster with a session and three chunk daemons, one command a batch.
struct World {
    kv: MemKv,
    session: u64,
    seq: Cell<u64>,
    clock: Cell<i64>,
    /// Every command that ran.
    log: RefCell<Vec<v1::Command>>,
}

impl World {
    fn new() -> Self {
        let mut world = Self::over(MemKv::new(), 1_000_000);
        let hash_key = bytes::Bytes::from_static(b"0123456789abcdef");
        world.system(system::Op::Init(v1::Init { hash_key, replicas: 3, chunk_size: CHUNK })).unwrap();
        for node in 1..=3 {
            let op = v1::RegisterNode {
                node,
                address: format!("10.0.0.{node}:7200"),
                host: format!("host{node}"),
                rack: String::new(),
            };
            world.system(system::Op::RegisterNode(op)).unwrap();
        }
        world.session = world.open_session();
        world
    }

    fn over(kv: MemKv, clock: i64) -> Self {
        Self { kv, session: 0, seq: Cell::new(1), clock: Cell::new(clock), log: RefCell::default() }
    }

    fn open_session(&self) -> u64 {
        match self
            .system(system::Op::OpenSession(v1::OpenSession { nonce: 7, ..Default::default() }))
            .unwrap()
        {
            system_answer::Body::Session(session) => session,
            other => panic!("{other:?}"),
        }
    }

    fn now(&self) -> Timestamp {
        self.clock.set(self.clock.get() + 1);
        Timestamp { seconds: self.clock.get(), nanos: 0 }
    }

    fn run(&self, command: v1::Command) -> Applied {
        self.log.borrow_mut().push(command.clone());
        let batch = v1::Batch { version: BATCH_VERSION, commands: vec![command] };
        let (writes, mut results) = apply(&self.kv, &batch).unwrap();
        assert_eq!(apply(&self.kv, &batch).unwrap(), (writes.clone(), results.clone()), "I7");
        self.kv.apply(&writes).unwrap();
        results.pop().unwrap()
    }

    fn system(&self, op: system::Op) -> FsResult<system_answer::Body> {
        let body = Some(command::Body::System(v1::System { op: Some(op) }));
        match self.run(v1::Command { now: Some(self.now()), body, ..Default::default() }) {
            Applied::System(v1::SystemAnswer { body: Some(system_answer::Body::Failure(failure)) }) => {
                Err(failure.into())
            }
            Applied::System(v1::SystemAnswer { body: Some(body) }) => Ok(body),
            other => panic!("{other:?}"),
        }
    }

    fn command(&self, cred: &Cred, op: mutation::Op) -> v1::Command {
        self.seq.set(self.seq.get() + 1);
        v1::Command {
            session: self.session,
            seq: self.seq.get(),
            lowest_unanswered: self.seq.get(),
            now: Some(self.now()),
            cred: Some(cred.clone()),
            body: Some(command::Body::Mutation(v1::Mutation { op: Some(op) })),
            earlier: vec![],
        }
    }

    fn mutate(&self, cred: &Cred, op: mutation::Op) -> FsResult<answer::Body> {
        body(self.run(self.command(cred, op)))
    }

    fn ask(&self, cred: &Cred, op: v1::query::Op) -> FsResult<answer::Body> {
        match query(&self.kv, cred, &v1::Query { op: Some(op) }).unwrap().body.unwrap() {
            answer::Body::Failure(failure) => Err(failure.into()),
            body => Ok(body),
        }
    }

    fn create(&self, cred: &Cred, op: v1::Create) -> FsResult<Attr> {
        self.mutate(cred, mutation::Op::Create(op)).map(attr_of)
    }

    fn make(&self, cred: &Cred, parent: u64, name: &str, kind: Kind, mode: u32) -> FsResult<Attr> {
        self.create(cred, new(parent, name, kind, mode))
    }

    fn unlink(&self, cred: &Cred, parent: u64, name: &str, directory: bool) -> FsResult<Attr> {
        let op = v1::Unlink { parent, name: name.to_owned().into(), directory };
        self.mutate(cred, mutation::Op::Unlink(op)).map(|body| match body {
            answer::Body::Unlinked(unlinked) => unlinked.attr.unwrap(),
            other => panic!("{other:?}"),
        })
    }

    fn rename(&self, cred: &Cred, from: (u64, &str), to: (u64, &str), flags: &str) -> FsResult<v1::Renamed> {
        let op = v1::Rename {
            parent: from.0,
            name: from.1.to_owned().into(),
            new_parent: to.0,
            new_name: to.1.to_owned().into(),
            no_replace: flags == "noreplace",
            exchange: flags == "exchange",
        };
        self.mutate(cred, mutation::Op::Rename(op)).map(|body| match body {
            answer::Body::Renamed(renamed) => renamed,
            other => panic!("{other:?}"),
        })
    }

    fn link(&self, cred: &Cred, ino: u64, parent: u64, name: &str) -> FsResult<Attr> {
        let op = v1::Link { ino, new_parent: parent, new_name: name.to_owned().into() };
        self.mutate(cred, mutation::Op::Link(op)).map(attr_of)
    }

    fn set_attr(&self, cred: &Cred, op: v1::SetAttr) -> FsResult<Attr> {
        self.mutate(cred, mutation::Op::SetAttr(op)).map(attr_of)
    }

    /// Root makes a hole in a file.
    fn punch(&self, ino: u64, offset: u64, length: u64) {
        let op =
            v1::Fallocate { ino, offset, length, punch_hole: true, keep_size: true, ..Default::default() };
        self.mutate(&root(), mutation::Op::Fallocate(op)).unwrap();
    }

    fn chmod(&self, cred: &Cred, ino: u64, mode: u32) -> FsResult<Attr> {
        self.set_attr(cred, v1::SetAttr { ino, mode: Some(mode), ..Default::default() })
    }

    fn set_xattr(&self, cred: &Cred, ino: u64, name: &str, value: &[u8]) -> FsResult<Attr> {
        let value = bytes::Bytes::copy_from_slice(value);
        let op = v1::SetXattr { ino, name: name.to_owned().into(), value, create: false, replace: false };
        self.mutate(cred, mutation::Op::SetXattr(op)).map(attr_of)
    }

    fn get_xattr(&self, cred: &Cred, ino: u64, name: &str) -> FsResult<Vec<u8>> {
        let op = v1::GetXattr { ino, name: name.to_owned().into() };
        self.ask(cred, v1::query::Op::GetXattr(op)).map(|body| match body {
            answer::Body::Data(data) => data.to_vec(),
            other => panic!("{other:?}"),
        })
    }

    fn lookup(&self, cred: &Cred, parent: u64, name: &str) -> FsResult<Attr> {
        let op = v1::Lookup { parent, name: name.to_owned().into() };
        self.ask(cred, v1::query::Op::Lookup(op)).map(attr_of)
    }

    fn attr(&self, ino: u64) -> FsResult<Attr> {
        self.ask(&root(), v1::query::Op::GetAttr(v1::GetAttr { ino, generation: 0 })).map(attr_of)
    }

    fn page(&self, ino: u64, cookie: u64, max_entries: u32) -> v1::DirPage {
        let op = v1::ReadDir { ino, cookie, max_entries, plus: true };
        match self.ask(&root(), v1::query::Op::ReadDir(op)).unwrap() {
            answer::Body::DirPage(page) => page,
            other => panic!("{other:?}"),
        }
    }

    fn alloc(&self, count: usize) -> Vec<ChunkAccess> {
        let placements = vec![v1::Placement { nodes: vec![1, 2, 3] }; count];
        let op = v1::AllocChunks { count: 1, replicas: 3, chunk_size: 0, placements };
        match self.mutate(&root(), mutation::Op::AllocChunks(op)).unwrap() {
            answer::Body::Chunks(chunks) => chunks.chunks,
            other => panic!("{other:?}"),
        }
    }

    fn commit(&self, ino: u64, slices: Vec<v1::CommitSlice>) -> FsResult<Attr> {
        let op = v1::Commit { ino, slices, mtime: None, ..v1::Commit::default() };
        self.mutate(&root(), mutation::Op::Commit(op)).map(attr_of)
    }

    fn reap_all(&self) {
        loop {
            let inos = orphans(&self.kv, InodeNo(0), 100).unwrap();
            if inos.is_empty() {
                return;
            }
            let op = v1::Reap { inos: inos.into_iter().map(InodeNo::get).collect() };
            self.system(system::Op::Reap(op)).unwrap();
        }
    }

    fn seal(&self, chunk: u64) -> v1::ChunkState {
        let fenced = self.system(system::Op::FenceChunk(v1::FenceChunk { chunk })).unwrap();
        let system_answer::Body::Fenced(state) = fenced else { panic!("{fenced:?}") };
        let op = v1::SealedChunk { chunk, epoch: state.epoch, length: state.committed, nodes: vec![1, 3] };
        match self.system(system::Op::SealedChunk(op)).unwrap() {
            system_answer::Body::Fenced(state) => state,
            other => panic!("{other:?}"),
        }
    }

    fn check(&self) {
        assert_eq!(check_invariants(&self.kv), Vec::<String>::new());
    }
}

fn body(applied: Applied) -> FsResult<answer::Body> {
    match applied {
        Applied::Answer(v1::Answer { body: Some(answer::Body::Failure(failure)) }) => Err(failure.into()),
        Applied::Answer(v1::Answer { body: Some(body) }) => Ok(body),
        other => panic!("{other:?}"),
    }
}

fn attr_of(body: answer::Body) -> Attr {
    match body {
        answer::Body::Entry(entry) => entry.attr.unwrap(),
        other => panic!("{other:?}"),
    }
}

fn new(parent: u64, name: &str, kind: Kind, mode: u32) -> v1::Create {
    let target = if kind == Kind::Symlink { "target" } else { "" };
    v1::Create {
        parent,
        name: name.to_owned().into(),
        kind: kind.into(),
        mode,
        umask: 0o022,
        target: target.into(),
        exclusive: true,
        ..Default::default()
    }
}

fn code<T: std::fmt::Debug>(result: FsResult<T>) -> ErrorCode {
    result.expect_err("this must be refused").code
}
