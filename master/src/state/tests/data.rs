//! The slice map against files that are plain arrays, chunks through their lives, and reaping in steps.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Where bytes come from: a chunk that is being filled. A byte's value in the model is its place: (chunk, offset) + 1.
struct Writer {
    chunk: ChunkAccess,
    offset: u64,
}

impl World {
    fn writer(&self) -> Writer {
        Writer { chunk: self.alloc(1).remove(0), offset: 0 }
    }

    fn file(&self, name: &str) -> u64 {
        self.make(&root(), ROOT, name, Kind::File, 0o644).unwrap().ino
    }

    /// Every byte of the file, as the layout tells where it lies; 0 is a hole.
    pub(super) fn bytes(&self, ino: u64) -> Vec<u64> {
        let size = self.attr(ino).unwrap().size;
        let mut bytes = vec![0; usize::try_from(size).unwrap()];
        let mut offset = 0;
        while offset < size {
            let op = v1::GetSlices { ino, offset, length: size - offset, max_slices: 3 };
            let answer::Body::Layout(layout) = self.ask(&root(), v1::query::Op::GetSlices(op)).unwrap()
            else {
                panic!("a layout was asked for")
            };
            for slice in &layout.slices {
                assert!(layout.chunks.iter().any(|chunk| chunk.chunk == slice.chunk));
                for at in 0..slice.length {
                    bytes[usize::try_from(slice.file_offset + at).unwrap()] =
                        place(slice.chunk, slice.chunk_offset + at);
                }
            }
            assert!(layout.complete_to > offset);
            offset = layout.complete_to;
        }
        bytes
    }
}

fn place(chunk: u64, offset: u64) -> u64 {
    chunk * CHUNK + offset + 1
}

impl Writer {
    fn slice(&mut self, file_offset: u64, length: u64) -> v1::CommitSlice {
        let chunk_offset = self.offset;
        self.offset += length;
        let (chunk, epoch) = (self.chunk.chunk, self.chunk.epoch);
        v1::CommitSlice { file_offset, chunk, chunk_offset, length, epoch, record_end: self.offset }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, u64, u64),
    WriteTwo(usize, u64, u64, u64, u64),
    Again(usize, u64),
    Truncate(usize, u64),
    Punch(usize, u64, u64),
    Zero(usize, u64, u64, bool),
    Allocate(usize, u64, u64),
    Copy(usize, u64, usize, u64, u64),
    NewChunk,
    Seal,
    Replace(usize),
    /// Begins to compact a sealed chunk; moves so many of the extents that it had then.
    Compact(usize),
    Move(usize),
    /// Another master leads: what was begun is given up.
    Forget,
    /// How many replicas a file wants; 0: the default.
    Set(usize, u32),
    /// The leader looks what is to be told, and tells it.
    Look,
    Tell,
    /// It looks at every file that is noted, and has done with some.
    Review,
}

fn step() -> impl Strategy<Value = Step> {
    let (file, at, len) = (|| 0_usize..3, || 0_u64..120, || 1_u64..60);
    prop_oneof![
        6 => (file(), at(), len()).prop_map(|(f, a, l)| Step::Write(f, a, l)),
        2 => (file(), at(), len(), at(), len()).prop_map(|(f, a, l, b, m)| Step::WriteTwo(f, a, l, b, m)),
        1 => (file(), at()).prop_map(|(f, a)| Step::Again(f, a)),
        2 => (file(), at()).prop_map(|(f, a)| Step::Truncate(f, a)),
        2 => (file(), at(), len()).prop_map(|(f, a, l)| Step::Punch(f, a, l)),
        1 => (file(), at(), len(), any::<bool>()).prop_map(|(f, a, l, k)| Step::Zero(f, a, l, k)),
        1 => (file(), at(), len()).prop_map(|(f, a, l)| Step::Allocate(f, a, l)),
        4 => (file(), at(), file(), at(), len()).prop_map(|(f, a, t, b, l)| Step::Copy(f, a, t, b, l)),
        1 => Just(Step::NewChunk),
        2 => Just(Step::Seal),
        2 => (0_usize..8).prop_map(Step::Compact),
        4 => (1_usize..6).prop_map(Step::Move),
        1 => Just(Step::Forget),
        1 => file().prop_map(Step::Replace),
        3 => (file(), 0_u32..6).prop_map(|(f, r)| Step::Set(f, r)),
        2 => Just(Step::Look),
        2 => Just(Step::Tell),
        2 => Just(Step::Review),
    ]
}

fn write_model(model: &mut Vec<u64>, at: u64, values: impl IntoIterator<Item = u64>) {
    for (index, value) in values.into_iter().enumerate() {
        let at = usize::try_from(at).unwrap() + index;
        if model.len() <= at {
            model.resize(at + 1, 0);
        }
        model[at] = value;
    }
}

/// A world of three files and their models.
struct Files {
    w: World,
    writer: Writer,
    inos: Vec<u64>,
    models: Vec<Vec<u64>>,
    last: Option<v1::CommitSlice>,
    names: u64,
    /// Where bytes that were moved come from, by where they are.
    moved: BTreeMap<u64, u64>,
    compaction: Option<Compaction>,
    /// How many replicas each file wants.
    wishes: Vec<u32>,
    /// What the leader has found and is about to tell.
    pending: Vec<v1::Wish>,
}

/// A chunk that is made of the extents of another: as a leader keeps it in mind.
struct Compaction {
    to: u64,
    length: u64,
    moves: Vec<v1::Move>,
    exists: bool,
}

impl Files {
    fn new() -> Self {
        let w = World::new();
        let inos = ["a", "b", "c"].map(|name| w.file(name)).to_vec();
        Self {
            writer: w.writer(),
            w,
            inos,
            models: vec![vec![]; 3],
            last: None,
            names: 0,
            moved: BTreeMap::new(),
            compaction: None,
            wishes: vec![3; 3],
            pending: Vec::new(),
        }
    }

    fn set(&mut self, file: usize, replicas: u32) {
        let op = v1::SetAttr { ino: self.inos[file], replicas: Some(replicas), ..Default::default() };
        self.w.set_attr(&root(), op).unwrap();
        self.wishes[file] = if replicas == 0 { 3 } else { replicas };
    }

    /// Seals chunks, which may be the one that is being filled.
    fn seal(&mut self, chunks: &[ChunkId]) {
        for chunk in chunks {
            self.w.seal(chunk.get());
            if chunk.get() == self.writer.chunk.chunk {
                self.writer = self.w.writer();
            }
        }
    }

    /// What the leader does with the files that are noted.
    fn review(&mut self) {
        self.pending.clear();
        let noted = reviews(&self.w.kv, InodeNo(0), 99).unwrap();
        let first = self.w.look(&noted);
        let seals: Vec<ChunkId> = first.seals.clone();
        let second = self.w.look(&first.looked.told);
        self.w.reviewed(first.looked.done.iter().chain(&second.looked.done).copied());
        self.seal(&seals);
    }

    /// The chunks that a file has bytes in.
    fn chunks_of(&self, file: usize) -> BTreeSet<u64> {
        let bytes = self.w.bytes(self.inos[file]);
        bytes.into_iter().filter(|place| *place != 0).map(|place| (place - 1) / CHUNK).collect()
    }

    /// What each chunk is to have and what those want that use it.
    fn check_wishes(&self, exactly: bool) {
        let noted: BTreeSet<u64> =
            reviews(&self.w.kv, InodeNo(0), 99).unwrap().into_iter().map(|(ino, _)| ino.get()).collect();
        let mut most: BTreeMap<u64, u32> = BTreeMap::new();
        for file in 0..3 {
            for chunk in self.chunks_of(file) {
                let wanted = chunk_state(&self.w.kv, ChunkId(chunk)).unwrap().unwrap().wanted_replicas;
                assert!(wanted >= self.wishes[file] || noted.contains(&self.inos[file]));
                let most = most.entry(chunk).or_default();
                *most = self.wishes[file].max(*most);
            }
        }
        for (chunk, most) in most.iter().filter(|_| exactly) {
            let state = chunk_state(&self.w.kv, ChunkId(*chunk)).unwrap().unwrap();
            assert_eq!(state.wanted_replicas, *most, "{state:?}");
        }
    }

    fn commit(&mut self, file: usize, slices: Vec<v1::CommitSlice>) {
        for slice in &slices {
            let values = (0..slice.length).map(|at| place(slice.chunk, slice.chunk_offset + at));
            write_model(&mut self.models[file], slice.file_offset, values);
            self.last = Some(*slice);
        }
        self.w.commit(self.inos[file], slices).unwrap();
    }

    fn fallocate(
        &mut self,
        file: usize,
        offset: u64,
        length: u64,
        keep_size: bool,
        punch_hole: bool,
        zero_range: bool,
    ) {
        let op = v1::Fallocate { ino: self.inos[file], offset, length, keep_size, punch_hole, zero_range };
        self.w.mutate(&root(), mutation::Op::Fallocate(op)).unwrap();
        let model = &mut self.models[file];
        let end = usize::try_from(offset + length).unwrap();
        if !keep_size && model.len() < end {
            model.resize(end, 0);
        }
        if punch_hole || zero_range {
            let (from, to) = (usize::try_from(offset).unwrap().min(model.len()), end.min(model.len()));
            model[from..to].fill(0);
        }
    }

    fn copy(&mut self, from: usize, from_offset: u64, to: usize, to_offset: u64, length: u64) {
        let op = v1::CopyRange {
            from: self.inos[from],
            from_offset,
            to: self.inos[to],
            to_offset,
            length,
            kill_priv: false,
        };
        let size = self.models[from].len() as u64;
        let expected = length.min(size.saturating_sub(from_offset));
        let overlaps = from == to && from_offset < to_offset + expected && to_offset < from_offset + expected;
        match self.w.mutate(&root(), mutation::Op::CopyRange(op)) {
            Err(error) => assert!(overlaps && error.code == ErrorCode::ErrorInvalid, "{error}"),
            Ok(answer::Body::Copied(copied)) => {
                assert!(!overlaps);
                assert_eq!(copied.length, expected);
                let start = usize::try_from(from_offset).unwrap();
                let values: Vec<u64> = self.models[from]
                    .iter()
                    .skip(start)
                    .take(usize::try_from(expected).unwrap())
                    .copied()
                    .collect();
                write_model(&mut self.models[to], to_offset, values);
            }
            Ok(other) => panic!("{other:?}"),
        }
    }

    fn compact(&mut self, which: usize) {
        let all = chunks(&self.w.kv, ChunkId(0), 1000).unwrap();
        let used =
            |chunk: &&v1::ChunkState| chunk.phase() == v1::chunk_state::Phase::Sealed && chunk.live > 0;
        let Some(chunk) = all.iter().filter(used).nth(which) else { return };
        self.forget();
        let rows = extents(&self.w.kv, ChunkId(chunk.chunk), dfs_proto::ByteOffset(0), 1000).unwrap();
        let (mut moves, mut length) = (Vec::new(), 0);
        for (at, row) in rows {
            moves.push(v1::Move {
                chunk: chunk.chunk,
                extent: at.get(),
                length: row.length,
                to_offset: length,
            });
            length += row.length;
        }
        assert_eq!(length, chunk.live);
        let reserved = self.w.system(system::Op::ReserveChunk(v1::ReserveChunk {})).unwrap();
        let system_answer::Body::Chunks(list) = reserved else { panic!("{reserved:?}") };
        self.compaction = Some(Compaction { to: list.chunks[0], length, moves, exists: false });
    }

    fn relocate(&mut self, count: usize) {
        let Some(mut plan) = self.compaction.take() else { return };
        let moves: Vec<v1::Move> = plan.moves.drain(..count.min(plan.moves.len())).collect();
        for extent in &moves {
            for at in 0..extent.length {
                let old = place(extent.chunk, extent.extent + at);
                let origin = self.moved.get(&old).copied().unwrap_or(old);
                self.moved.insert(place(plan.to, extent.to_offset + at), origin);
            }
        }
        let replicas = 3;
        let new =
            (!plan.exists).then(|| v1::NewChunk { length: plan.length, nodes: vec![1, 2, 3], replicas });
        let before: Vec<_> = self.inos.iter().map(|ino| self.w.attr(*ino).unwrap()).collect();
        self.w.system(system::Op::Relocate(v1::Relocate { to: plan.to, new, moves })).unwrap();
        let after: Vec<_> = self.inos.iter().map(|ino| self.w.attr(*ino).unwrap()).collect();
        assert_eq!(before, after, "not even the version");
        plan.exists = true;
        self.compaction = (!plan.moves.is_empty()).then_some(plan);
    }

    fn forget(&mut self) {
        let Some(plan) = self.compaction.take() else { return };
        let release = v1::ReleaseChunks { chunks: vec![plan.to] };
        let released = self.w.system(system::Op::ReleaseChunks(release)).unwrap();
        let expected = if plan.exists { vec![] } else { vec![plan.to] };
        assert_eq!(released, system_answer::Body::Chunks(v1::ChunkList { chunks: expected }));
        if !plan.exists {
            let new = Some(v1::NewChunk { length: plan.length, nodes: vec![1], replicas: 1 });
            let late = v1::Relocate { to: plan.to, new, moves: plan.moves };
            assert_eq!(code(self.w.system(system::Op::Relocate(late))), ErrorCode::ErrorNoChunk);
        }
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Write(file, at, len) => {
                let slice = self.writer.slice(at, len);
                self.commit(file, vec![slice]);
            }
            Step::WriteTwo(file, at, len, at2, len2) => {
                let slices = vec![self.writer.slice(at, len), self.writer.slice(at2, len2)];
                self.commit(file, slices);
            }
            Step::Again(file, file_offset) => {
                let same = self.last.filter(|last| last.chunk == self.writer.chunk.chunk);
                if let Some(slice) = same {
                    self.commit(file, vec![v1::CommitSlice { file_offset, ..slice }]);
                }
            }
            Step::Truncate(file, size) => {
                let op = v1::SetAttr { ino: self.inos[file], size: Some(size), ..Default::default() };
                self.w.set_attr(&root(), op).unwrap();
                self.models[file].resize(usize::try_from(size).unwrap(), 0);
            }
            Step::Punch(file, at, len) => self.fallocate(file, at, len, true, true, false),
            Step::Zero(file, at, len, keep) => self.fallocate(file, at, len, keep, false, true),
            Step::Allocate(file, at, len) => self.fallocate(file, at, len, false, false, false),
            Step::Copy(from, from_offset, to, to_offset, len) => {
                self.copy(from, from_offset, to, to_offset, len);
            }
            Step::NewChunk => self.writer = self.w.writer(),
            Step::Seal => self.seal(&[ChunkId(self.writer.chunk.chunk)]),
            Step::Set(file, replicas) => self.set(file, replicas),
            Step::Look => {
                let noted = reviews(&self.w.kv, InodeNo(0), 99).unwrap();
                self.pending = self.w.plan(&noted).wishes;
            }
            Step::Tell => {
                let wishes = std::mem::take(&mut self.pending);
                self.w.system(system::Op::SetWishes(v1::SetWishes { wishes })).unwrap();
            }
            Step::Review => self.review(),
            Step::Compact(which) => self.compact(which),
            Step::Move(count) => self.relocate(count),
            Step::Forget => self.forget(),
            Step::Replace(file) => {
                let name = ["a", "b", "c"][file];
                self.names += 1;
                let fresh = self.w.file(&format!("new{}", self.names));
                self.w.rename(&root(), (ROOT, &format!("new{}", self.names)), (ROOT, name), "").unwrap();
                self.w.reap_all();
                self.inos[file] = fresh;
                self.models[file].clear();
                self.wishes[file] = 3;
            }
        }
    }

    fn check(&self) {
        self.w.check();
        self.check_wishes(false);
        for (ino, model) in self.inos.iter().zip(&self.models) {
            let origin = |at: u64| self.moved.get(&at).copied().unwrap_or(at);
            let bytes: Vec<u64> = self.w.bytes(*ino).into_iter().map(origin).collect();
            assert_eq!(&bytes, model);
            let mapped = model.iter().filter(|byte| **byte != 0).count() as u64;
            assert_eq!(self.w.attr(*ino).unwrap().blocks, mapped.div_ceil(512));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn files_read_as_plain_arrays_whatever_is_done_to_them(steps in prop::collection::vec(step(), 1..60)) {
        let mut files = Files::new();
        for step in &steps {
            files.run(step);
            files.check();
        }
        files.forget();
        for file in 0..3 {
            files.set(file, [1, 4, 2][file]);
        }
        // A round seals, one tells.
        for _ in 0..3 {
            files.review();
            files.check();
        }
        prop_assert_eq!(reviews(&files.w.kv, InodeNo(0), 99).unwrap(), vec![]);
        files.check_wishes(true);
        for name in ["a", "b", "c"] {
            files.w.unlink(&root(), ROOT, name, false).unwrap();
        }
        files.w.reap_all();
        files.w.check();
        let cluster = cluster_row(&files.w.kv).unwrap().unwrap();
        prop_assert_eq!((cluster.live_bytes, cluster.files), (0, 1));
        prop_assert_eq!(files.w.seal(files.writer.chunk.chunk).live, 0);
        // All chunks may go now, but for those that were given up without being sealed.
        let idle: Vec<u64> = idle_chunks(&files.w.kv, ChunkId(0), 1000).unwrap().iter().map(|(id, _)| id.get()).collect();
        let dropped = files.w.system(system::Op::DropChunks(v1::DropChunks { chunks: idle.clone() })).unwrap();
        prop_assert_eq!(dropped, system_answer::Body::Chunks(v1::ChunkList { chunks: idle }));
        files.w.check();
        let left = chunks(&files.w.kv, ChunkId(0), 1000).unwrap();
        prop_assert_eq!(left.len(), unsealed_chunks(&files.w.kv).unwrap().len());
    }
}

#[test]
fn commits_are_refused_whole_when_a_chunk_is_fenced() {
    let w = World::new();
    let ino = w.file("f");
    let (mut good, mut fenced) = (w.writer(), w.writer());
    w.system(system::Op::FenceChunk(v1::FenceChunk { chunk: fenced.chunk.chunk })).unwrap();
    let slices = vec![good.slice(0, 10), fenced.slice(10, 10)];
    assert_eq!(code(w.commit(ino, slices.clone())), ErrorCode::ErrorStaleEpoch);
    assert_eq!(w.attr(ino).unwrap().size, 0);
    assert_eq!(chunk_state(&w.kv, ChunkId(good.chunk.chunk)).unwrap().unwrap().live, 0);
    w.check();
    assert_eq!(w.commit(ino, slices[..1].to_vec()).unwrap().size, 10);
    let state = w.seal(good.chunk.chunk);
    assert_eq!((state.committed, state.nodes.clone(), state.epoch), (10, vec![1, 3], 2));
    assert_eq!(w.seal(good.chunk.chunk), state, "sealing again changes nothing");
    assert_eq!(code(w.commit(ino, slices[..1].to_vec())), ErrorCode::ErrorStaleEpoch);
    w.check();
}

#[test]
fn append_only_files_take_commits_behind_their_end_and_immutable_ones_none() {
    let w = World::new();
    let (ino, mut writer) = (w.file("f"), w.writer());
    let mut commit = |places: &[(u64, u64)]| {
        let slices = places.iter().map(|(at, length)| writer.slice(*at, *length)).collect();
        let commit = v1::Commit { ino, slices, ..v1::Commit::default() };
        w.mutate(&root(), mutation::Op::Commit(commit)).map(drop).map_err(|error| error.code)
    };
    let flags = |flags| {
        w.set_attr(&root(), v1::SetAttr { ino, flags: Some(flags), ..v1::SetAttr::default() }).unwrap();
    };
    assert_eq!(commit(&[(0, 10)]), Ok(()));
    flags(rows::FLAG_APPEND);
    assert_eq!(commit(&[(5, 10)]), Err(ErrorCode::ErrorNotPermitted));
    assert_eq!(commit(&[(15, 5), (10, 5)]), Ok(()));
    flags(rows::FLAG_IMMUTABLE);
    assert_eq!(commit(&[(20, 5)]), Err(ErrorCode::ErrorNotPermitted));
    flags(0);
    assert_eq!(commit(&[(0, 5)]), Ok(()));
    w.check();
}

#[test]
fn commits_name_bytes_that_can_be_there_and_are_nobody_elses() {
    let w = World::new();
    let ino = w.file("f");
    let mut writer = w.writer();
    let slice = writer.slice(0, 100);
    let with = |change: &dyn Fn(&mut v1::CommitSlice)| {
        let mut slice = slice;
        change(&mut slice);
        code(w.commit(ino, vec![slice]))
    };
    assert_eq!(with(&|slice| slice.length = 0), ErrorCode::ErrorInvalid);
    assert_eq!(with(&|slice| slice.record_end = 99), ErrorCode::ErrorInvalid);
    assert_eq!(with(&|slice| slice.record_end = CHUNK + 1), ErrorCode::ErrorInvalid);
    assert_eq!(with(&|slice| slice.chunk = 99), ErrorCode::ErrorNoChunk);
    assert_eq!(with(&|slice| slice.epoch = 2), ErrorCode::ErrorStaleEpoch);
    assert_eq!(with(&|slice| slice.file_offset = i64::MAX as u64 - 99), ErrorCode::ErrorFileTooBig);
    w.commit(ino, vec![slice]).unwrap();
    let across = |slice: &mut v1::CommitSlice| {
        (slice.file_offset, slice.chunk_offset, slice.record_end) = (200, 50, 150);
    };
    assert_eq!(with(&across), ErrorCode::ErrorInvalid);
    let mut other = World::over(w.kv, 2_000_000);
    other.session = other.open_session();
    assert_eq!(code(other.commit(ino, vec![writer.slice(0, 10)])), ErrorCode::ErrorStaleEpoch);
    assert_eq!(code(other.commit(ROOT, vec![])), ErrorCode::ErrorIsDir);
    other.check();
}

#[test]
fn the_time_of_a_write_is_the_clients_but_never_ahead() {
    let w = World::new();
    let ino = w.file("f");
    let commit = |mtime| {
        let op = v1::Commit { ino, mtime: Some(mtime), ..Default::default() };
        attr_of(w.mutate(&root(), mutation::Op::Commit(op)).unwrap())
    };
    let past = Timestamp { seconds: 77, nanos: 5 };
    assert_eq!(commit(past).mtime, Some(past));
    let ahead = commit(Timestamp { seconds: i64::MAX, nanos: 0 });
    assert_eq!(ahead.mtime, ahead.ctime);
}

#[test]
fn sealing_is_refused_below_what_is_committed_and_idle_chunks_are_dropped() {
    let w = World::new();
    let ino = w.file("f");
    let mut writer = w.writer();
    w.commit(ino, vec![writer.slice(0, 100)]).unwrap();
    let chunk = writer.chunk.chunk;
    let seal = |epoch, length, nodes| {
        w.system(system::Op::SealedChunk(v1::SealedChunk { chunk, epoch, length, nodes }))
    };
    assert_eq!(code(seal(1, 100, vec![1])), ErrorCode::ErrorConflict, "not fenced");
    w.system(system::Op::FenceChunk(v1::FenceChunk { chunk })).unwrap();
    w.system(system::Op::FenceChunk(v1::FenceChunk { chunk })).unwrap();
    assert_eq!(code(seal(1, 100, vec![1])), ErrorCode::ErrorStaleEpoch);
    assert_eq!(code(seal(2, 99, vec![1])), ErrorCode::ErrorConflict);
    assert_eq!(code(seal(2, 100, vec![])), ErrorCode::ErrorInvalid);
    assert_eq!(code(seal(2, 100, vec![1, 9])), ErrorCode::ErrorNoNodes);
    seal(2, 100, vec![2]).unwrap();
    assert_eq!(chunks_on(&w.kv, dfs_proto::NodeId(1), ChunkId(0), 9).unwrap(), vec![]);
    w.system(system::Op::AddReplica(v1::AddReplica { chunk, node: 3 })).unwrap();
    assert_eq!(chunks_on(&w.kv, dfs_proto::NodeId(3), ChunkId(0), 9).unwrap(), vec![ChunkId(chunk)]);
    let drop = || w.system(system::Op::DropChunks(v1::DropChunks { chunks: vec![chunk] })).unwrap();
    assert_eq!(drop(), system_answer::Body::Chunks(v1::ChunkList::default()), "it is in use");
    w.check();
    w.unlink(&root(), ROOT, "f", false).unwrap();
    assert_eq!(idle_chunks(&w.kv, ChunkId(0), 9).unwrap(), vec![], "the orphan holds it");
    w.reap_all();
    assert_eq!(idle_chunks(&w.kv, ChunkId(0), 9).unwrap().len(), 1);
    w.check();
    assert_eq!(drop(), system_answer::Body::Chunks(v1::ChunkList { chunks: vec![chunk] }));
    assert_eq!(chunk_state(&w.kv, ChunkId(chunk)).unwrap(), None);
    w.check();
}

#[test]
fn what_is_compacted_moves_with_all_its_users_and_the_old_chunk_becomes_idle() {
    let mut files = Files::new();
    files.run(&Step::Write(0, 0, 50));
    files.run(&Step::Write(1, 0, 50));
    files.run(&Step::Copy(0, 0, 2, 10, 50));
    files.run(&Step::Punch(0, 10, 10));
    let old = files.writer.chunk.chunk;
    files.run(&Step::Seal);
    files.run(&Step::Compact(0));
    let to = files.compaction.as_ref().unwrap().to;
    assert!(is_reserved(&files.w.kv, ChunkId(to)).unwrap());
    // Since it was copied: one extent has lost a user, the other one all.
    files.run(&Step::Replace(1));
    files.run(&Step::Truncate(0, 30));
    files.run(&Step::Move(5));
    files.check();
    let state = |chunk| chunk_state(&files.w.kv, ChunkId(chunk)).unwrap().unwrap();
    assert_eq!((state(old).live, state(to).live, state(to).committed), (0, 50, 100));
    assert_eq!((state(to).nodes, state(to).wanted_replicas), (vec![1, 2, 3], 3));
    assert_eq!(reserved(&files.w.kv).unwrap(), vec![]);
    assert_eq!(idle_chunks(&files.w.kv, ChunkId(0), 9).unwrap().len(), 1);
    // Only what is sealed is moved, to where there is a place, and once.
    let relocate = |to, moved: v1::Move| {
        code(files.w.system(system::Op::Relocate(v1::Relocate { to, new: None, moves: vec![moved] })))
    };
    let own = v1::Move { chunk: to, extent: 0, length: 50, to_offset: 50 };
    assert_eq!(relocate(to, own), ErrorCode::ErrorConflict);
    assert_eq!(relocate(old, v1::Move { length: 49, to_offset: 0, ..own }), ErrorCode::ErrorConflict);
    assert_eq!(relocate(old, v1::Move { to_offset: 51, ..own }), ErrorCode::ErrorConflict);
    assert_eq!(relocate(files.writer.chunk.chunk, own), ErrorCode::ErrorConflict);
    assert_eq!(relocate(99, own), ErrorCode::ErrorNoChunk);
}

#[test]
fn an_extent_of_many_users_moves_in_steps() {
    let w = World::new();
    let (ino, mut writer) = (w.file("f"), w.writer());
    w.commit(ino, vec![writer.slice(0, 2)]).unwrap();
    let users = REAP_ROWS_MAX as u64 + 100;
    for at in 1..users {
        let op = v1::CopyRange {
            from: ino,
            from_offset: 0,
            to: ino,
            to_offset: at * 2,
            length: 1,
            ..Default::default()
        };
        w.mutate(&root(), mutation::Op::CopyRange(op)).unwrap();
    }
    let old = writer.chunk.chunk;
    w.seal(old);
    let reserved = w.system(system::Op::ReserveChunk(v1::ReserveChunk {})).unwrap();
    let system_answer::Body::Chunks(list) = reserved else { panic!("{reserved:?}") };
    let to = list.chunks[0];
    let mut new = Some(v1::NewChunk { length: 2, nodes: vec![1, 2], replicas: 2 });
    for (left, live) in [(2, 2), (0, 2)] {
        let moves = vec![v1::Move { chunk: old, extent: 0, length: 2, to_offset: 0 }];
        w.system(system::Op::Relocate(v1::Relocate { to, new: new.take(), moves })).unwrap();
        w.check();
        let live_of = |chunk| chunk_state(&w.kv, ChunkId(chunk)).unwrap().unwrap().live;
        assert_eq!((live_of(old), live_of(to)), (left, live));
    }
    assert_eq!(chunk_state(&w.kv, ChunkId(to)).unwrap().unwrap().wanted_replicas, 3, "the higher wish");
}

#[test]
fn a_big_file_is_freed_in_steps() {
    let w = World::new();
    let ino = w.file("f");
    let mut writer = w.writer();
    let total = REAP_ROWS_MAX as u64 * 2 + 10;
    for first in (0..total).step_by(1000) {
        let slices = (first..total.min(first + 1000)).map(|at| writer.slice(at * 2, 1)).collect();
        w.commit(ino, slices).unwrap();
    }
    w.set_xattr(&root(), ino, "user.x", b"y").unwrap();
    w.unlink(&root(), ROOT, "f", false).unwrap();
    let mut left: BTreeMap<usize, u64> = BTreeMap::new();
    for step in 0.. {
        if orphans(&w.kv, InodeNo(0), 1).unwrap().is_empty() {
            assert_eq!(step, 3);
            break;
        }
        w.system(system::Op::Reap(v1::Reap { inos: vec![ino, 999] })).unwrap();
        w.check();
        left.insert(step, cluster_row(&w.kv).unwrap().unwrap().live_bytes);
    }
    assert_eq!(left.into_values().collect::<Vec<_>>(), [total - REAP_ROWS_MAX as u64, 10, 0]);
}

#[test]
fn small_appends_make_one_slice_longer() {
    let w = World::new();
    let ino = w.file("log");
    let mut writer = w.writer();
    let rows = |ino| {
        let tx = kv::Tx::new(&w.kv);
        ops::slices::overlapping(
            &tx,
            InodeNo(ino),
            dfs_proto::ByteOffset(0),
            dfs_proto::ByteOffset(1 << 40),
            99,
        )
        .unwrap()
    };
    for at in 0..50 {
        w.commit(ino, vec![writer.slice(at * 100, 100)]).unwrap();
    }
    assert_eq!(rows(ino).len(), 1);
    // A clone keeps what it was cloned from: what comes later is an extent of its own.
    let copy = w.file("copy");
    let op = v1::CopyRange { from: ino, to: copy, length: 5000, ..Default::default() };
    w.mutate(&root(), mutation::Op::CopyRange(op)).unwrap();
    w.commit(ino, vec![writer.slice(5000, 100)]).unwrap();
    assert_eq!((rows(ino).len(), rows(copy).len()), (2, 1));
    w.check();
}

#[test]
fn a_small_file_costs_few_rows() {
    let w = World::new();
    let dir = w.make(&root(), ROOT, "d", Kind::Dir, 0o755).unwrap().ino;
    let create = w.command(&root(), mutation::Op::Create(new(dir, "f", Kind::File, 0o644)));
    let (writes, _) = apply(&w.kv, &v1::Batch { version: BATCH_VERSION, commands: vec![create] }).unwrap();
    let rows = writes.values().filter(|value| value.is_some()).count();
    assert_eq!(rows, 6, "inode, dentry, parent, answer, session, cluster");
}
