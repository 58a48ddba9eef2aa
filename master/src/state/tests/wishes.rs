//! How many replicas chunks are to have follows what files want: one case after the other, and while the leader looks.

use super::*;
use crate::review::{Looked, Noted, Review, Todo};
use crate::state::kv::Each;
use futures::executor::block_on;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// What a look at files came to.
pub struct Seen {
    pub looked: Looked,
    pub seals: Vec<ChunkId>,
}

impl World {
    /// What is to be told first.
    pub fn plan(&self, files: &[Noted]) -> Todo {
        block_on(Review::of(files).next(&self.kv)).unwrap().unwrap_or_default()
    }

    /// Looks at files as the leader does, and tells their chunks.
    pub fn look(&self, files: &[Noted]) -> Seen {
        let (mut review, mut seals) = (Review::of(files), Vec::new());
        while let Some(todo) = block_on(review.next(&self.kv)).unwrap() {
            seals.extend(todo.seals);
            self.tell(todo.wishes).unwrap();
        }
        Seen { looked: review.end(), seals }
    }

    pub fn reviewed(&self, files: impl IntoIterator<Item = Noted>) {
        let file = |(ino, version): Noted| v1::ReviewedFile { ino: ino.get(), version };
        let files = files.into_iter().map(file).collect();
        self.system(system::Op::Reviewed(v1::Reviewed { files })).unwrap();
    }

    /// Tells chunks; answers those that were left as they are.
    fn tell(&self, wishes: Vec<v1::Wish>) -> FsResult<Vec<u64>> {
        match self.system(system::Op::SetWishes(v1::SetWishes { wishes }))? {
            system_answer::Body::Chunks(left) => Ok(left.chunks),
            other => panic!("{other:?}"),
        }
    }

    fn noted(&self) -> Vec<Noted> {
        reviews(&self.kv, InodeNo(0), 99).unwrap()
    }

    /// The leader looks at all that is noted, once, and has done with what it can.
    fn review(&self) -> Vec<ChunkId> {
        let first = self.look(&self.noted());
        let second = self.look(&first.looked.told);
        self.reviewed(first.looked.done.iter().chain(&second.looked.done).copied());
        self.check();
        first.seals
    }

    fn set(&self, ino: u64, replicas: u32) -> Attr {
        self.set_attr(&root(), v1::SetAttr { ino, replicas: Some(replicas), ..Default::default() }).unwrap()
    }

    fn file_of(&self, name: &str) -> u64 {
        self.make(&root(), ROOT, name, Kind::File, 0o644).unwrap().ino
    }

    fn write(&self, ino: u64, at: u64, chunk: u64, (offset, length): (u64, u64)) {
        let slice = v1::CommitSlice {
            file_offset: at,
            chunk,
            chunk_offset: offset,
            length,
            epoch: 1,
            record_end: offset + length,
        };
        self.commit(ino, vec![slice]).unwrap();
    }

    fn copy(&self, from: u64, to: u64, length: u64) {
        let op = v1::CopyRange { from, to, length, ..Default::default() };
        self.mutate(&root(), mutation::Op::CopyRange(op)).unwrap();
    }

    fn state(&self, chunk: u64) -> v1::ChunkState {
        chunk_state(&self.kv, ChunkId(chunk)).unwrap().unwrap()
    }

    fn wanted(&self, chunk: u64) -> u32 {
        self.state(chunk).wanted_replicas
    }
}

/// A world with two files in one chunk: a has [0, 100) of it, b [100, 200).
fn shared() -> (World, u64, u64, u64) {
    let w = World::new();
    let (a, b, chunk) = (w.file_of("a"), w.file_of("b"), w.alloc(1)[0].chunk);
    w.write(a, 0, chunk, (0, 100));
    w.write(b, 0, chunk, (100, 100));
    assert_eq!((w.wanted(chunk), w.noted()), (3, vec![]));
    (w, a, b, chunk)
}

#[test]
fn a_wish_for_more_is_noted_told_and_done() {
    let (w, a, _, chunk) = shared();
    let version = w.set(a, 5).version;
    assert_eq!((w.noted(), w.wanted(chunk)), (vec![(InodeNo(a), version)], 3));
    w.check();
    // It needs no seal: whoever looks after chunks seals one that is to have more.
    assert_eq!(w.review(), vec![]);
    assert_eq!((w.noted(), w.wanted(chunk)), (vec![], 5));
    // What is written from now on gets it at once.
    let next = w.alloc(1)[0].chunk;
    w.write(a, 100, next, (0, 10));
    assert_eq!((w.noted(), w.wanted(next)), (vec![], 5));
    w.check();
}

#[test]
fn a_wish_for_less_waits_for_the_seal_and_for_all_who_use_the_chunk() {
    let (w, a, b, chunk) = shared();
    w.set(a, 1);
    w.set(b, 2);
    assert_eq!((w.review(), w.wanted(chunk), w.noted().len()), (vec![ChunkId(chunk)], 3, 2));
    let joined = w.state(chunk).joined;
    let wish = v1::Wish { chunk, replicas: 2, joined };
    assert_eq!(w.tell(vec![wish]).unwrap(), [chunk], "it is open");
    w.seal(chunk);
    assert_eq!(w.tell(vec![v1::Wish { joined: joined - 1, ..wish }]).unwrap(), [chunk], "others have joined");
    assert_eq!((w.review(), w.wanted(chunk), w.noted()), (vec![], 2, vec![]));
    w.set(b, 0);
    w.review();
    assert_eq!((w.wanted(chunk), w.noted()), (3, vec![]));
    w.set(a, 1);
    w.review();
    assert_eq!((w.wanted(chunk), w.noted()), (3, vec![]), "the other one wants that many");
}

#[test]
fn who_wants_more_raises_what_he_begins_to_use() {
    let (w, a, _, chunk) = shared();
    let (more, less) = (w.file_of("more"), w.file_of("less"));
    w.set(more, 4);
    w.set(less, 1);
    assert_eq!(w.noted(), vec![], "there is nothing to look at");
    w.copy(a, less, 50);
    assert_eq!(w.wanted(chunk), 3);
    w.copy(a, more, 50);
    assert_eq!(w.wanted(chunk), 4);
    w.write(more, 50, chunk, (200, 10));
    w.check();
    // The greatest one leaves: what is too high is found with the next wish of a file that is left.
    w.unlink(&root(), ROOT, "more", false).unwrap();
    w.reap_all();
    w.seal(chunk);
    assert_eq!(w.wanted(chunk), 4);
    w.set(a, 3);
    w.review();
    assert_eq!((w.wanted(chunk), w.noted()), (3, vec![]));
}

#[test]
fn a_file_that_goes_is_not_noted_any_more() {
    let (w, a, _, chunk) = shared();
    w.set(a, 5);
    w.unlink(&root(), ROOT, "a", false).unwrap();
    assert_eq!(w.noted().len(), 1, "somebody may have it open");
    w.reap_all();
    assert_eq!((w.noted(), w.wanted(chunk)), (vec![], 3));
    w.reviewed([(InodeNo(a), 1)]);
    w.check();
}

#[test]
fn a_wish_that_changes_under_way_stays_noted() {
    let (w, a, _, chunk) = shared();
    w.set(a, 5);
    let noted = w.noted();
    let first = w.look(&noted);
    assert_eq!((first.looked.told.clone(), w.wanted(chunk)), (noted.clone(), 5));
    w.set(a, 6);
    w.reviewed(noted);
    assert_eq!(w.noted().len(), 1, "it was set again");
    w.review();
    assert_eq!((w.noted(), w.wanted(chunk)), (vec![], 6));
    // The extended attribute is another way to say it.
    w.seal(chunk);
    w.set_xattr(&root(), a, "user.dfs.replication", b"2").unwrap();
    w.review();
    assert_eq!((w.noted(), w.wanted(chunk)), (vec![], 3));
}

#[test]
fn nothing_is_lowered_behind_the_back_of_who_joins() {
    let (w, a, b, chunk) = shared();
    w.seal(chunk);
    let plan = |ino| {
        w.set(ino, 1);
        w.plan(&w.noted()).wishes
    };
    w.set(b, 1);
    let wishes = plan(a);
    assert_eq!(wishes.len(), 1);
    let late = w.file_of("late");
    w.copy(a, late, 10);
    assert_eq!((w.tell(wishes).unwrap(), w.wanted(chunk)), (vec![chunk], 3));
    w.check();
    // A slice that is cut in two is another user.
    w.set(late, 1);
    let wishes = plan(a);
    w.punch(a, 40, 10);
    assert_eq!((w.tell(wishes).unwrap(), w.wanted(chunk)), (vec![chunk], 3));
    w.review();
    assert_eq!((w.wanted(chunk), w.noted()), (1, vec![]));
}

#[test]
fn what_is_compacted_is_to_have_what_its_sources_are() {
    let (w, a, b, chunk) = shared();
    w.set(a, 2);
    w.set(b, 2);
    w.seal(chunk);
    w.review();
    assert_eq!(w.wanted(chunk), 2);
    let reserved = w.system(system::Op::ReserveChunk(v1::ReserveChunk {})).unwrap();
    let system_answer::Body::Chunks(list) = reserved else { panic!("{reserved:?}") };
    let to = list.chunks[0];
    let relocate = |extent, new| {
        let moves = vec![v1::Move { chunk, extent, length: 100, to_offset: extent }];
        w.system(system::Op::Relocate(v1::Relocate { to, new, moves })).unwrap();
        w.check();
    };
    // Ordered when three were wanted.
    relocate(0, Some(v1::NewChunk { length: 200, nodes: vec![1, 2], replicas: 3 }));
    assert_eq!(w.wanted(to), 2);
    let joined = w.state(to).joined;
    w.set(b, 5);
    w.review();
    relocate(100, None);
    assert_eq!((w.wanted(to), w.state(to).joined > joined), (5, true));
}

#[test]
fn wishes_out_of_range_and_for_nothing_are_refused() {
    let (w, _, _, chunk) = shared();
    for replicas in [0, 10] {
        assert_eq!(code(w.tell(vec![v1::Wish { chunk, replicas, joined: 0 }])), ErrorCode::ErrorInvalid);
    }
    let many = vec![v1::Wish { chunk, replicas: 1, joined: 0 }; REAP_ROWS_MAX + 1];
    assert_eq!(code(w.tell(many)), ErrorCode::ErrorInvalid);
    assert_eq!(w.tell(vec![v1::Wish { chunk: 99, replicas: 1, joined: 0 }]), Ok(vec![]));
    assert_eq!(w.wanted(chunk), 3);
}

/// A log that was written before: whoever applies it now comes to what it came to then.
#[test]
fn entries_of_the_first_version_do_what_they_did() {
    let (w, a, _, chunk) = shared();
    w.set(a, 5);
    let old = MemKv::new();
    for command in w.log.borrow().iter() {
        let batch = v1::Batch { version: 1, commands: vec![command.clone()] };
        let (writes, _) = apply(&old, &batch).unwrap();
        old.apply(&writes).unwrap();
    }
    assert_eq!(reviews(&old, InodeNo(0), 9).unwrap(), vec![]);
    let state = chunk_state(&old, ChunkId(chunk)).unwrap().unwrap();
    assert_eq!((state.wanted_replicas, state.joined), (3, 0));
    assert_eq!(check_invariants(&old), Vec::<String>::new(), "nothing was promised then");
    // From now on it is kept.
    let mut now = World::over(old, 2_000_000);
    now.session = now.open_session();
    now.set(a, 4);
    now.review();
    assert_eq!((now.wanted(chunk), now.noted()), (4, vec![]));
}

#[test]
fn damage_of_wishes_is_found_and_mended() {
    let (w, a, b, chunk) = shared();
    w.set(a, 5);
    let edit = |wanted| {
        let state = v1::ChunkState { wanted_replicas: wanted, ..w.state(chunk) };
        let row = (keys::chunk(ChunkId(chunk)), Some(prost::Message::encode_to_vec(&state)));
        w.kv.apply(&WriteSet::from([row])).unwrap();
    };
    let mend = |mended| {
        let mut check = Check::default();
        let (from, to) = keys::everything();
        w.kv.scan(&from, &to, &mut |key, value| {
            check.row(key, value);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
        let findings = check.findings();
        assert!(!findings.problems.is_empty() && findings.mended == mended);
        let op = v1::Mend { mended, faults: findings.faults };
        w.system(system::Op::Mend(op)).unwrap();
        w.check();
    };
    // Only the one that is not noted is a fault.
    edit(2);
    mend(0);
    assert_eq!(w.noted().len(), 2);
    w.review();
    assert_eq!((w.noted(), w.wanted(chunk)), (vec![], 5));
    edit(0);
    mend(1);
    w.review();
    assert_eq!((w.noted(), w.wanted(chunk)), (vec![], 5));
    w.kv.apply(&WriteSet::from([(keys::review(InodeNo(ROOT)), Some(vec![0; 8]))])).unwrap();
    mend(2);
    assert_eq!(w.noted(), vec![]);
    // Naming what is well changes nothing.
    let op = v1::Mend {
        mended: 3,
        faults: [a, b, ROOT, 99].map(|ino| v1::Fault { what: Some(v1::fault::What::Wish(ino)) }).to_vec(),
    };
    let answer = w.system(system::Op::Mend(op)).unwrap();
    assert_eq!(answer, system_answer::Body::Mended(v1::Mended { lines: vec![] }));
    // A file that is made again wants what is the default.
    w.set(a, 1);
    w.set(b, 1);
    w.seal(chunk);
    w.review();
    assert_eq!(w.wanted(chunk), 1);
    w.kv.apply(&WriteSet::from([(keys::inode(InodeNo(a)), None)])).unwrap();
    mend(4);
    w.review();
    assert_eq!((w.noted(), w.wanted(chunk)), (vec![], 3));
}

/// The store of a leader that reads while others change it: before every so-manieth read a command is applied.
struct Racing {
    kv: Arc<MemKv>,
    /// How many reads come first.
    coming: Mutex<VecDeque<(usize, v1::Command)>>,
}

impl Racing {
    fn race(&self) {
        let mut coming = self.coming.lock().unwrap();
        if let Some((reads, _)) = coming.front_mut()
            && *reads > 0
        {
            *reads -= 1;
        } else if let Some((_, command)) = coming.pop_front() {
            self.run(command);
        }
    }

    fn run(&self, command: v1::Command) {
        let batch = v1::Batch { version: BATCH_VERSION, commands: vec![command] };
        let (writes, _) = apply(&*self.kv, &batch).unwrap();
        self.kv.apply(&writes).unwrap();
        assert_eq!(check_invariants(&*self.kv), Vec::<String>::new());
    }

    fn system(&self, op: system::Op) {
        let body = Some(command::Body::System(v1::System { op: Some(op) }));
        self.run(v1::Command { body, ..Default::default() });
    }

    fn look(&self, files: &[Noted]) -> Looked {
        let mut review = Review::of(files);
        while let Some(todo) = block_on(review.next(self)).unwrap() {
            self.system(system::Op::SetWishes(v1::SetWishes { wishes: todo.wishes }));
        }
        review.end()
    }

    fn review(&self) {
        let first = self.look(&reviews(self, InodeNo(0), 99).unwrap());
        let second = self.look(&first.told);
        let done = first.done.into_iter().chain(second.done);
        let files = done.map(|(ino, version)| v1::ReviewedFile { ino: ino.get(), version }).collect();
        self.system(system::Op::Reviewed(v1::Reviewed { files }));
    }
}

impl Kv for Racing {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.race();
        self.kv.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        self.race();
        self.kv.scan(from, to, each)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        self.race();
        self.kv.last(from, to)
    }

    fn apply(&self, writes: &WriteSet) -> io::Result<()> {
        self.kv.apply(writes)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Race {
    Set(usize, u32),
    Copy(usize, usize, u64, u64, u64),
    Punch(usize, u64, u64),
    Truncate(usize, u64),
    Move(usize),
}

fn race() -> impl Strategy<Value = Race> {
    let (file, at) = (|| 0_usize..4, || 0_u64..40);
    prop_oneof![
        4 => (file(), 1_u32..6).prop_map(|(file, replicas)| Race::Set(file, replicas)),
        4 => (file(), file(), at(), at(), 1_u64..20).prop_map(|(f, t, a, b, l)| Race::Copy(f, t, a, b, l)),
        3 => (file(), at(), 1_u64..10).prop_map(|(file, at, length)| Race::Punch(file, at, length)),
        1 => (file(), at()).prop_map(|(file, size)| Race::Truncate(file, size)),
        2 => (0_usize..4).prop_map(Race::Move),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Whatever is set, copied, cut and compacted between any two reads of the leader: no chunk is to have less than a file
    /// wants that is not noted, after every command; and once all is quiet, every chunk is to have what is wanted most.
    #[test]
    fn a_review_may_be_overtaken_by_anything(
        before in prop::collection::vec(race(), 0..12),
        during in prop::collection::vec((0_usize..12, race()), 0..16),
    ) {
        let w = World::new();
        let inos: Vec<u64> = ["a", "b", "c", "d"].map(|name| w.file_of(name)).to_vec();
        let chunks: Vec<u64> = w.alloc(2).iter().map(|chunk| chunk.chunk).collect();
        for (place, ino) in (0..).zip(&inos) {
            for piece in 0..3 {
                w.write(*ino, piece * 10, chunks[(place as usize + piece as usize) % 2], ((place * 3 + piece) * 10, 10));
            }
        }
        for chunk in &chunks {
            w.seal(*chunk);
        }
        let reserved = w.system(system::Op::ReserveChunk(v1::ReserveChunk {})).unwrap();
        let system_answer::Body::Chunks(list) = reserved else { panic!("{reserved:?}") };
        let to = list.chunks[0];
        let new = v1::NewChunk { length: 400, nodes: vec![1, 2], replicas: 1 };
        w.system(system::Op::Relocate(v1::Relocate { to, new: Some(new), moves: vec![] })).unwrap();
        let command = |race: &Race| {
            let op = match *race {
                Race::Set(file, replicas) => mutation::Op::SetAttr(v1::SetAttr { ino: inos[file], replicas: Some(replicas), ..Default::default() }),
                Race::Copy(from, to, from_offset, to_offset, length) => mutation::Op::CopyRange(v1::CopyRange {
                    from: inos[from], to: inos[to], from_offset, to_offset, length, ..Default::default()
                }),
                Race::Punch(file, offset, length) => mutation::Op::Fallocate(v1::Fallocate {
                    ino: inos[file], offset, length, punch_hole: true, keep_size: true, ..Default::default()
                }),
                Race::Truncate(file, size) => mutation::Op::SetAttr(v1::SetAttr { ino: inos[file], size: Some(size), ..Default::default() }),
                Race::Move(file) => {
                    // The first piece of each file, wherever it is: each is an extent of ten bytes.
                    let (chunk, extent) = (chunks[file % 2], file as u64 * 30);
                    let moves = vec![v1::Move { chunk, extent, length: 10, to_offset: extent }];
                    let op = system::Op::Relocate(v1::Relocate { to, new: None, moves });
                    let body = Some(command::Body::System(v1::System { op: Some(op) }));
                    return v1::Command { now: Some(w.now()), body, ..Default::default() };
                }
            };
            w.command(&root(), op)
        };
        for race in &before {
            w.run(command(race));
            w.check();
        }
        let coming = during.iter().map(|(reads, race)| (*reads, command(race))).collect();
        let racing = Racing { kv: Arc::new(w.kv), coming: Mutex::new(coming) };
        while !racing.coming.lock().unwrap().is_empty() {
            racing.review();
        }
        for (seq, (ino, replicas)) in (1_000_000..).zip(inos.iter().zip([1, 2, 4, 1])) {
            let op = v1::SetAttr { ino: *ino, replicas: Some(replicas), ..Default::default() };
            let body = Some(command::Body::Mutation(v1::Mutation { op: Some(mutation::Op::SetAttr(op)) }));
            racing.run(v1::Command { session: w.session, seq, lowest_unanswered: seq, cred: Some(root()), body, ..Default::default() });
        }
        racing.review();
        prop_assert_eq!(reviews(&*racing.kv, InodeNo(0), 99).unwrap(), vec![]);
        for chunk in super::chunks(&*racing.kv, ChunkId(0), 99).unwrap().iter().filter(|chunk| chunk.live > 0) {
            let users = inos.iter().zip([1, 2, 4, 1]).filter(|(ino, _)| {
                let slices = super::slices(&*racing.kv, InodeNo(**ino), dfs_proto::ByteOffset(0), 999).unwrap();
                slices.iter().any(|(_, slice)| slice.chunk == chunk.chunk)
            });
            prop_assert_eq!(Some(chunk.wanted_replicas), users.map(|(_, wish)| wish).max());
        }
    }
}
