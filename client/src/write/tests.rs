//! The core against a model cluster: whatever fails and however events interleave, flushed bytes are committed.

use super::attrs::AttrSet;
use super::core::Core;
use super::{Action, CommitId, Policy, Settings, WaiterId};
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::ROOMY_BYTES;
use dfs_proto::v1::{self, AppendReply, ChunkAccess, Failure, Replica, Timestamp};
use dfs_proto::{FsError, InodeNo};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

#[derive(Default)]
struct ModelChunk {
    data: Vec<u8>,
    fenced: bool,
    sealed: bool,
    address: String,
}

/// The masters, the daemons and the programs.
struct World {
    core: Core,
    now: Duration,
    chunks: BTreeMap<u64, ModelChunk>,
    appends: Vec<v1::AppendRequest>,
    commits: Vec<(InodeNo, CommitId, v1::Commit)>,
    allocs: Vec<(Policy, u32)>,
    seals: usize,
    /// What programs wrote and what is committed; the bytes are the numbers of the writes.
    written: HashMap<InodeNo, Vec<u8>>,
    committed: HashMap<InodeNo, Vec<u8>>,
    /// What a flush must have brought to the master when it returns.
    flushes: HashMap<WaiterId, (InodeNo, Vec<u8>)>,
    lost: Vec<FsError>,
    /// The time that each file has at the master, and the one that it must have when everything is committed: seconds,
    /// positive when it is a write's.
    times: HashMap<InodeNo, i64>,
    due_times: HashMap<InodeNo, i64>,
    next_time: i64,
    capacity: u64,
    refuse: bool,
    next_write: u8,
    /// What the daemons say that they take besides.
    room: u64,
    /// Up to where files have no holes.
    dense: Option<u64>,
}

fn settings(memory: u64) -> Settings {
    Settings {
        memory,
        append_progress: Duration::from_secs(2),
        operation_timeout: Duration::from_secs(60),
        write_behind: Duration::from_secs(1),
    }
}

impl World {
    fn new(capacity: u64, memory: u64) -> Self {
        let policy = Policy { replicas: 2, chunk_size: capacity };
        Self {
            core: Core::new(settings(memory), policy),
            now: Duration::from_secs(100),
            chunks: BTreeMap::new(),
            appends: Vec::new(),
            commits: Vec::new(),
            allocs: Vec::new(),
            seals: 0,
            written: HashMap::new(),
            committed: HashMap::new(),
            flushes: HashMap::new(),
            lost: Vec::new(),
            times: HashMap::new(),
            due_times: HashMap::new(),
            next_time: 0,
            capacity,
            refuse: false,
            next_write: 0,
            room: ROOMY_BYTES,
            dense: Some(0),
        }
    }

    fn act(&mut self) {
        for action in self.core.take_actions() {
            match action {
                Action::Append { address, request } => {
                    assert_eq!(address, self.chunks[&request.chunk].address);
                    self.appends.push(request);
                }
                Action::Commit { ino, id, commit, .. } => self.commits.push((ino, id, commit)),
                Action::Alloc { policy, count } => self.allocs.push((policy, count)),
                Action::Seal { chunk, failed, .. } => {
                    let chunk = self.chunks.get_mut(&chunk.get()).unwrap();
                    assert!(!chunk.sealed, "sealed once");
                    chunk.sealed = true;
                    chunk.fenced |= failed;
                    self.seals += 1;
                }
                Action::Wake { waiter, result } => {
                    let (ino, wanted) = self.flushes.remove(&waiter).expect("woken once");
                    match result {
                        Ok(_) => self.check_flushed(ino, &wanted),
                        Err(error) => self.lost.push(error),
                    }
                }
                Action::Keep { chunk, offset, bytes } => {
                    let offset = offset as usize;
                    assert_eq!(self.chunks[&chunk.get()].data[offset..offset + bytes.len()], bytes[..]);
                }
            }
        }
        self.core.validate();
    }

    /// Every byte is what it was at the flush, or newer.
    fn check_flushed(&self, ino: InodeNo, wanted: &[u8]) {
        let committed = &self.committed[&ino];
        assert!(committed.len() >= wanted.len());
        assert!(
            wanted.iter().zip(committed).all(|(wanted, have)| have >= wanted),
            "a flushed byte is missing"
        );
    }

    fn write(&mut self, ino: u64, offset: u64, len: usize) {
        let ino = InodeNo(ino);
        self.next_write += 1;
        let data = vec![self.next_write; len];
        let time = Timestamp { seconds: i64::from(self.next_write), nanos: 0 };
        match self.core.write(ino, offset, &data, time, self.now) {
            Some(Ok(())) => {
                self.due_times.insert(ino, time.seconds);
                let file = self.written.entry(ino).or_default();
                file.resize(file.len().max(offset as usize + len), 0);
                file[offset as usize..offset as usize + len].copy_from_slice(&data);
            }
            Some(Err(error)) => self.lost.push(error),
            None => assert!(self.core.used() > 0),
        }
        self.act();
        self.check_read(ino);
    }

    /// Committed bytes with the dirty ones over them are what was written.
    fn check_read(&self, ino: InodeNo) {
        let Some(written) = self.written.get(&ino) else { return };
        let mut shown = self.committed.get(&ino).cloned().unwrap_or_default();
        shown.resize(written.len(), 0);
        for (offset, bytes) in self.core.read(ino, 0, written.len()) {
            shown[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
        }
        assert!(shown == *written, "a reader sees something else than was written");
    }

    fn flush(&mut self, ino: u64) {
        let ino = InodeNo(ino);
        let wanted = self.written.get(&ino).cloned().unwrap_or_default();
        match self.core.flush(ino, self.now) {
            Ok(Some(waiter)) => {
                self.flushes.insert(waiter, (ino, wanted));
            }
            Ok(None) if wanted.is_empty() => {}
            Ok(None) => self.check_flushed(ino, &wanted),
            Err(error) => self.lost.push(error),
        }
        self.act();
    }

    /// A program closes a file. True: it does not wait.
    fn leave(&mut self, ino: u64) -> bool {
        let left = match self.core.leave(InodeNo(ino), self.dense, self.now) {
            Ok(left) => left,
            Err(error) => {
                self.lost.push(error);
                false
            }
        };
        self.act();
        left
    }

    /// Stores everything, which takes no time.
    fn store(&mut self) {
        while !self.appends.is_empty() || !self.commits.is_empty() || !self.allocs.is_empty() {
            self.deliver_alloc();
            self.deliver_append(0);
            self.deliver_commit(0);
        }
    }

    /// A program sets a file's times. False: only the master can.
    fn set_times(&mut self, ino: u64) -> bool {
        let ino = InodeNo(ino);
        let time = Timestamp { seconds: self.next_time - 1, nanos: 0 };
        let set = AttrSet { mtime: Some(time), ..AttrSet::default() };
        let kept = self.core.set_attrs(ino, &v1::Cred::default(), set, Timestamp::default(), self.now);
        if kept {
            self.next_time -= 1;
            self.due_times.insert(ino, time.seconds);
        }
        self.act();
        kept
    }

    fn deliver_append(&mut self, nth: usize) {
        if self.appends.is_empty() {
            return;
        }
        // Appends of one chunk keep their order.
        let chunk = self.appends[nth % self.appends.len()].chunk;
        let at = self.appends.iter().position(|request| request.chunk == chunk).unwrap();
        let request = self.appends.remove(at);
        let model = self.chunks.get_mut(&chunk).unwrap();
        let mut reply = AppendReply { id: request.id, chunk, ..AppendReply::default() };
        if model.fenced || request.offset != model.data.len() as u64 {
            reply.failure = Some(FsError::new(ErrorCode::ErrorStaleEpoch, "fenced").into());
        } else {
            model.data.extend_from_slice(&request.payload);
            assert!(model.data.len() as u64 <= self.capacity);
            reply.length = model.data.len() as u64;
            reply.synced = if request.sync { reply.length } else { 0 };
            reply.free_bytes = self.room;
        }
        self.core.append_replied(reply, self.now);
        self.act();
    }

    fn deliver_commit(&mut self, nth: usize) {
        if self.commits.is_empty() {
            return;
        }
        let (ino, id, commit) = self.commits.remove(nth % self.commits.len());
        let stale = commit.slices.iter().any(|slice| self.chunks[&slice.chunk].fenced);
        let result = if stale {
            Err(ErrorCode::ErrorStaleEpoch.into())
        } else {
            let set = commit.set.and_then(|set| set.mtime);
            if let Some(time) = set.or(commit.mtime.filter(|_| !commit.slices.is_empty())) {
                self.times.insert(ino, time.seconds);
            }
            let file = self.committed.entry(ino).or_default();
            for slice in &commit.slices {
                let (from, to) = (slice.file_offset as usize, (slice.file_offset + slice.length) as usize);
                let start = slice.chunk_offset as usize;
                let data = &self.chunks[&slice.chunk].data[start..start + slice.length as usize];
                assert!(slice.record_end >= slice.chunk_offset + slice.length);
                file.resize(file.len().max(to), 0);
                assert!(
                    file[from..to].iter().zip(data).all(|(old, new)| old <= new),
                    "an older write came back"
                );
                file[from..to].copy_from_slice(data);
            }
            Ok(Some(v1::Attr { ino: ino.get(), size: file.len() as u64, ..v1::Attr::default() }))
        };
        self.core.committed(ino, id, result, self.now);
        self.act();
        self.check_read(ino);
    }

    fn deliver_alloc(&mut self) {
        let Some((policy, count)) = self.allocs.pop() else { return };
        let result = if self.refuse {
            Err(ErrorCode::ErrorNoNodes.into())
        } else {
            Ok((0..count.min(8)).map(|_| self.new_chunk()).collect())
        };
        self.core.allocated(policy, result, self.now);
        self.act();
    }

    fn new_chunk(&mut self) -> ChunkAccess {
        let chunk = self.chunks.len() as u64 + 1;
        let replica = |node: u64| Replica { node, address: format!("node{node}:1"), host: String::new() };
        let replicas = vec![replica(chunk % 3 + 1), replica((chunk + 1) % 3 + 1)];
        let address = replicas[0].address.clone();
        self.chunks.insert(chunk, ModelChunk { address, ..ModelChunk::default() });
        ChunkAccess { chunk, epoch: 1, replicas, capacity: self.capacity, ..ChunkAccess::default() }
    }

    /// The chunk answers the next append with a failure.
    fn fail_append(&mut self, nth: usize) {
        if self.appends.is_empty() {
            return;
        }
        let at = nth % self.appends.len();
        let request = self.appends.remove(at);
        let failure: Failure = FsError::new(ErrorCode::ErrorIo, "disk").into();
        let reply = AppendReply {
            id: request.id,
            chunk: request.chunk,
            failure: Some(failure),
            failed_node: 2,
            ..AppendReply::default()
        };
        self.core.append_replied(reply, self.now);
        self.act();
    }

    fn link_down(&mut self, nth: usize) {
        let address = format!("node{}:1", nth % 3 + 1);
        let chunks = &self.chunks;
        self.appends.retain(|request| chunks[&request.chunk].address != address);
        self.core.link_down(&address, &ErrorCode::ErrorUnavailable.into(), self.now);
        self.act();
    }

    fn tick(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
        self.core.tick(self.now);
        self.act();
        for _ in 0..std::mem::take(&mut self.seals) {
            self.core.sealed(self.now);
        }
        self.act();
    }

    /// From here on everything works.
    fn settle(&mut self) {
        self.refuse = false;
        for _ in 0..20_000 {
            if self.core.is_idle() && self.appends.is_empty() && self.commits.is_empty() {
                break;
            }
            if self.appends.is_empty() && self.commits.is_empty() && self.allocs.is_empty() {
                self.tick(50);
            }
            self.deliver_alloc();
            self.deliver_append(0);
            self.deliver_commit(0);
        }
        assert_eq!(self.core.used(), 0, "everything leaves memory");
        assert!(self.flushes.is_empty(), "every flush returns");
    }
}

#[derive(Clone, Debug)]
enum Event {
    Write { ino: u64, offset: u64, len: usize },
    Flush(u64),
    Leave(u64),
    Append(usize),
    Commit(usize),
    Alloc,
    Fail(usize),
    LinkDown(usize),
    Tick(u64),
    Session,
    Refuse(bool),
    SetTimes(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        8 => (1_u64..4, 0_u64..5000, 1_usize..3000).prop_map(|(ino, offset, len)| Event::Write { ino, offset, len }),
        4 => (1_u64..4).prop_map(Event::Flush),
        2 => (1_u64..4).prop_map(Event::Leave),
        12 => (0_usize..9).prop_map(Event::Append),
        6 => (0_usize..9).prop_map(Event::Commit),
        4 => Just(Event::Alloc),
        1 => (0_usize..9).prop_map(Event::Fail),
        1 => (0_usize..9).prop_map(Event::LinkDown),
        3 => prop_oneof![Just(50_u64), Just(600), Just(2500)].prop_map(Event::Tick),
        1 => Just(Event::Session),
        1 => any::<bool>().prop_map(Event::Refuse),
        3 => (1_u64..4).prop_map(Event::SetTimes),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn flushed_bytes_are_committed_whatever_fails(
        events in proptest::collection::vec(event(), 1..120),
        capacity in prop_oneof![Just(8_u64), Just(1000), Just(100_000)],
    ) {
        let mut world = World::new(capacity, 20_000);
        for event in events {
            match event {
                // Tiny chunks: fewer bytes, or the model takes for ever.
                Event::Write { ino, offset, len } => world.write(ino, offset, if capacity == 8 { len % 50 + 1 } else { len }),
                Event::Flush(ino) => world.flush(ino),
                Event::Leave(ino) => drop(world.leave(ino)),
                Event::Append(nth) => world.deliver_append(nth),
                Event::Commit(nth) => world.deliver_commit(nth),
                Event::Alloc => world.deliver_alloc(),
                Event::Fail(nth) => world.fail_append(nth),
                Event::LinkDown(nth) => world.link_down(nth),
                Event::Tick(millis) => world.tick(millis),
                Event::Session => {
                    for chunk in world.chunks.values_mut() { chunk.fenced = true; }
                    world.core.session_changed(world.now);
                    world.act();
                    // Of those without bytes the session says that they were not made.
                    let bare = world.commits.extract_if(.., |(_, _, commit)| commit.slices.is_empty()).collect::<Vec<_>>();
                    for (ino, id, _) in bare {
                        world.core.committed(ino, id, Err(ErrorCode::ErrorSessionExpired.into()), world.now);
                        world.act();
                    }
                }
                Event::Refuse(refuse) => world.refuse = refuse,
                Event::SetTimes(ino) => {
                    world.set_times(ino);
                }
            }
        }
        world.settle();
        let written = std::mem::take(&mut world.written);
        for (ino, bytes) in &written {
            prop_assert_eq!(&world.committed[ino], bytes);
        }
        prop_assert!(world.lost.is_empty(), "{:?}", world.lost);
        prop_assert_eq!(world.times, world.due_times);
    }
}

#[test]
fn what_is_set_after_a_write_goes_with_its_bytes() {
    let mut world = World::new(1 << 20, 1 << 20);
    let (ino, root) = (InodeNo(1), v1::Cred::default());
    assert!(!world.set_times(1), "nothing waits to be committed");
    world.write(1, 0, 100);
    assert!(world.set_times(1));
    let mode = AttrSet { mode: Some(0o600), ..AttrSet::default() };
    assert!(!world.core.set_attrs(
        ino,
        &v1::Cred { uid: 7, ..root.clone() },
        mode,
        Timestamp::default(),
        world.now
    ));
    assert!(world.core.set_attrs(ino, &root, mode, Timestamp::default(), world.now));
    let shown = world.core.dirty(ino).unwrap().set.unwrap().0;
    assert_eq!((shown.mode, shown.mtime.map(|time| time.seconds)), (Some(0o600), Some(-1)));
    world.deliver_alloc();
    world.deliver_append(0);
    assert_eq!(world.commits.len(), 1);
    assert_eq!(world.commits[0].2.set, Some(shown.change()));
    // Set while that is on its way: a commit without bytes follows it.
    assert!(world.set_times(1));
    world.flush(1);
    world.deliver_commit(0);
    assert!(world.commits[0].2.slices.is_empty() && !world.flushes.is_empty());
    world.deliver_commit(0);
    assert!(world.flushes.is_empty() && world.core.dirty(ino).is_none());
    // Written again: the time that was set before does not count.
    world.write(1, 0, 10);
    world.set_times(1);
    world.write(1, 0, 10);
    assert_eq!(world.core.dirty(ino).unwrap().set.unwrap().0.mtime, None);
    world.settle();
    assert_eq!(world.times, world.due_times);
}

#[test]
fn attributes_that_are_refused_are_reported_and_the_bytes_go_without_them() {
    let mut world = World::new(1 << 20, 1 << 20);
    for waits in [true, false] {
        world.write(1, 0, 100);
        world.set_times(1);
        if waits {
            world.flush(1);
        }
        world.deliver_alloc();
        world.deliver_append(0);
        let (ino, id, _) = world.commits.remove(0);
        world.core.committed(ino, id, Err(ErrorCode::ErrorNotPermitted.into()), world.now);
        world.act();
        assert_eq!(world.commits[0].2.set, None);
        world.deliver_commit(0);
        assert_eq!(world.lost.len(), usize::from(waits));
        assert_eq!(world.core.flush(ino, world.now).is_err(), !waits);
        world.lost.clear();
    }
    // Reported to somebody who could tell nobody.
    world.core.keep_error(InodeNo(1), ErrorCode::ErrorIo.into(), false, world.now);
    assert_eq!(world.core.dirty_inodes(), [InodeNo(1)]);
    assert!(world.core.flush(InodeNo(1), world.now).is_err());
    assert!(world.core.flush(InodeNo(1), world.now).is_ok() && world.core.dirty_inodes().is_empty());
    // A sync of everything was told of it: not again, but the writer is.
    world.core.keep_error(InodeNo(1), ErrorCode::ErrorIo.into(), true, world.now);
    assert!(world.core.dirty_inodes().is_empty() && world.core.flush(InodeNo(1), world.now).is_err());
}

#[test]
fn closing_a_small_file_takes_one_append_and_one_commit() {
    let mut world = World::new(1 << 20, 1 << 20);
    world.write(1, 0, 100);
    assert!(world.appends.is_empty() && world.allocs.is_empty());
    world.flush(1);
    world.deliver_alloc();
    assert_eq!(world.appends.len(), 1);
    assert!(world.appends[0].sync && world.appends[0].payload.len() == 100);
    world.deliver_append(0);
    assert_eq!(world.commits.len(), 1);
    assert_eq!(world.commits[0].2.mtime, Some(Timestamp { seconds: 1, nanos: 0 }));
    world.deliver_commit(0);
    assert!(world.flushes.is_empty() && world.core.used() == 0);
    // The next one goes into the same chunk.
    world.write(2, 0, 50);
    world.flush(2);
    assert_eq!(
        (world.appends[0].chunk, world.appends[0].offset),
        (world.chunks.keys().copied().min().unwrap(), 100)
    );
    world.settle();
}

#[test]
fn a_close_waits_for_what_might_not_be_stored_and_for_nothing_else() {
    let mut world = World::new(64 << 20, 256 << 20);
    let written = |world: &mut World, len: usize| {
        world.write(1, 0, len);
        world.leave(1)
    };
    assert!(!written(&mut world, 100), "nobody has said how much room there is");
    world.flush(1);
    world.store();
    assert!(written(&mut world, 100));
    assert_eq!(world.appends.len(), 1, "it is on its way");
    assert!(world.appends[0].sync);
    world.store();
    assert!(world.core.used() == 0 && world.leave(1), "nothing is left to do");

    assert!(!written(&mut world, 5 << 20), "there is much of it");
    world.flush(1);
    world.store();
    world.dense = None;
    assert!(!written(&mut world, 100), "it may have holes");
    world.dense = Some(0);
    world.write(1, 200, 10);
    assert!(!world.leave(1), "it has one now");
    world.dense = Some(200);
    assert!(world.leave(1), "it was as long before");
    world.flush(1);
    world.store();
    world.room = ROOMY_BYTES - 1;
    assert!(written(&mut world, 100));
    world.store();
    assert!(!written(&mut world, 100), "a daemon is nearly full");
    world.room = ROOMY_BYTES;
    world.flush(1);
    world.store();
    assert!(written(&mut world, 100));

    // An answer that does not come: of a daemon, then of the master.
    world.now += Duration::from_millis(90);
    world.write(2, 0, 100);
    world.flush(2);
    let others = world.appends.split_off(1);
    world.now += Duration::from_millis(20);
    assert!(!written(&mut world, 100), "nothing was heard for a moment");
    world.appends.extend(others);
    world.flush(1);
    world.store();
    assert!(written(&mut world, 100));
    while !world.appends.is_empty() {
        world.deliver_append(0);
    }
    world.now += Duration::from_millis(90);
    world.write(2, 0, 100);
    world.flush(2);
    world.deliver_append(0);
    world.now += Duration::from_millis(20);
    assert!(!written(&mut world, 100), "the master has not answered for a moment");
    world.flush(1);
    world.store();
    assert!(written(&mut world, 100));

    world.fail_append(0);
    world.flush(1);
    world.store();
    assert!(!written(&mut world, 100), "a chunk was given up");
    world.flush(1);
    world.store();
    world.now += Duration::from_secs(11);
    assert!(!written(&mut world, 100), "the failure was long ago, but so was everything else");
    world.flush(1);
    world.store();
    assert!(written(&mut world, 100));
    world.settle();
}

#[test]
fn an_error_of_a_file_that_was_left_is_told_to_the_next_call() {
    let mut world = World::new(1 << 20, 1 << 20);
    for _ in 0..2 {
        world.write(1, 0, 100);
        world.flush(1);
        world.store();
    }
    world.write(1, 0, 100);
    assert!(world.leave(1));
    world.deliver_append(0);
    let (ino, id, _) = world.commits.remove(0);
    world.core.committed(ino, id, Err(ErrorCode::ErrorNoSpace.into()), world.now);
    world.act();
    assert!(!world.leave(1) && world.lost.len() == 1);
    assert_eq!(world.lost[0].code, ErrorCode::ErrorNoSpace);
    world.write(1, 0, 100);
    assert!(!world.leave(1), "one was refused lately");
}

#[test]
fn full_runs_are_sent_unsynced_while_the_program_goes_on_and_a_flush_asks_for_one_sync() {
    let mut world = World::new(64 << 20, 256 << 20);
    for mib in 0..3 {
        world.write(1, mib << 20, 1 << 20);
        world.deliver_alloc();
    }
    assert_eq!(world.appends.len(), 3);
    assert!(world.appends.iter().all(|request| !request.sync));
    world.flush(1);
    assert_eq!(world.appends.len(), 4);
    let last = &world.appends[3];
    assert!(last.sync && last.payload.is_empty() && last.offset == 3 << 20);
    for _ in 0..4 {
        world.deliver_append(0);
    }
    assert_eq!(world.commits[0].2.slices.len(), 1, "neighbours become one slice");
    assert_eq!(world.commits[0].2.slices[0].length, 3 << 20);
    world.settle();
}

#[test]
fn uncommitted_bytes_are_committed_within_the_write_behind_time() {
    let mut world = World::new(1 << 20, 1 << 20);
    world.write(1, 0, 10);
    world.tick(400);
    assert!(world.allocs.is_empty());
    world.tick(150);
    world.deliver_alloc();
    assert!(world.appends[0].sync);
    world.settle();
}

#[test]
fn without_daemons_the_error_comes_after_the_bound_and_once() {
    let mut world = World::new(1000, 1 << 20);
    world.refuse = true;
    world.write(1, 0, 10);
    world.flush(1);
    for _ in 0..1300 {
        world.deliver_alloc();
        world.tick(50);
    }
    assert_eq!(world.lost.len(), 1);
    assert_eq!(world.lost[0].code, ErrorCode::ErrorNoSpace);
    assert_eq!(world.core.used(), 0);
    // Nobody waits for this one: the next call hears of it, once.
    world.write(1, 0, 10);
    for _ in 0..1300 {
        world.deliver_alloc();
        world.tick(50);
    }
    assert_eq!(world.lost.len(), 1);
    world.flush(1);
    assert_eq!(world.lost.len(), 2);
    world.written.clear();
    world.flush(1);
    assert_eq!(world.lost.len(), 2);
}

#[test]
fn a_silent_daemon_costs_its_chunk_and_no_bytes() {
    let mut world = World::new(1 << 20, 1 << 20);
    world.write(1, 0, 10);
    world.flush(1);
    world.deliver_alloc();
    let first = world.appends.remove(0);
    world.tick(3000);
    assert!(world.appends.is_empty() && !world.chunks[&first.chunk].fenced, "a sync has twice the time");
    world.tick(1500);
    assert!(world.chunks[&first.chunk].fenced);
    world.settle();
    assert_eq!(world.committed[&InodeNo(1)], world.written[&InodeNo(1)]);
}

#[test]
fn a_busy_daemon_gets_more_time_than_a_silent_one() {
    let mut world = World::new(10, 1 << 20);
    world.write(1, 0, 80);
    world.flush(1);
    world.deliver_alloc();
    assert!(world.appends.len() >= 4);
    let chunks: Vec<u64> = world.appends.iter().map(|request| request.chunk).collect();
    let same =
        chunks.iter().rposition(|chunk| world.chunks[chunk].address == world.chunks[&chunks[0]].address);
    let last = chunks[same.unwrap()];
    assert_ne!(last, chunks[0]);
    world.tick(3500);
    world.deliver_append(0);
    world.tick(1500);
    assert!(!world.chunks[&last].fenced, "its daemon has just answered");
    // The other daemon's chunks were given up meanwhile, so there is more patience now; it ends all the same.
    world.tick(20_000);
    assert!(world.chunks[&last].fenced);
    world.settle();
}

#[test]
fn full_memory_makes_writers_wait_and_discarded_bytes_are_not_written() {
    let mut world = World::new(1 << 20, 1000);
    world.write(1, 0, 900);
    let time = Timestamp::default();
    assert!(world.core.write(InodeNo(2), 0, &[0; 200], time, world.now).is_none());
    world.core.discard(InodeNo(1), world.now);
    world.act();
    assert_eq!(world.core.used(), 0);
    assert!(world.core.write(InodeNo(2), 0, &[0; 200], time, world.now).is_some());
    assert_eq!(world.core.dirty(InodeNo(2)).unwrap().end, 200);
    assert_eq!(world.core.dirty(InodeNo(1)), None);
}
