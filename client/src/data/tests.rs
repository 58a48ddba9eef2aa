//! The data plane against real chunk daemons and a master that keeps its books in memory.

use super::{DataConfig, DataPlane};
use crate::master::{Defaults, Master};
use crate::read::ReadState;
use crate::read::layout::Layouts;
use crate::write::Under;
use async_trait::async_trait;
use dfs_chunkd::Daemon;
use dfs_env::Env;
use dfs_proto::error::ErrorCode;
use dfs_proto::token::{ClusterKey, Rights};
use dfs_proto::v1::answer::Body;
use dfs_proto::v1::{self, ChunkAccess, Cred, Replica, Timestamp};
use dfs_proto::{ChunkId, FsResult, InodeNo, SessionId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;

const KEY: &[u8] = b"a key that only tests know";

struct Books {
    replicas: u32,
    chunk_size: u64,
    nodes: Vec<Replica>,
    suspects: BTreeSet<u64>,
    chunks: BTreeMap<u64, ChunkAccess>,
    fenced: BTreeSet<u64>,
    ended: BTreeSet<u64>,
    sizes: BTreeMap<u64, u64>,
    commits: Vec<v1::Commit>,
    layout_questions: usize,
}

struct FakeMaster {
    key: ClusterKey,
    books: Mutex<Books>,
    layouts: Layouts,
    session: watch::Sender<SessionId>,
}

impl FakeMaster {
    fn access(&self, chunk: &ChunkAccess, rights: Rights) -> ChunkAccess {
        let token = self.key.issue(*self.session.borrow(), ChunkId(chunk.chunk), rights, u64::MAX / 2);
        ChunkAccess { token: token.into(), ..chunk.clone() }
    }

    fn alloc(&self, request: &v1::AllocChunks) -> FsResult<Body> {
        let mut books = self.books.lock().unwrap();
        let live: Vec<Replica> =
            books.nodes.iter().filter(|node| !books.suspects.contains(&node.node)).cloned().collect();
        if live.is_empty() {
            return Err(ErrorCode::ErrorNoNodes.into());
        }
        let mut chunks = Vec::new();
        for _ in 0..request.count {
            let chunk = books.chunks.len() as u64 + 1;
            let count = live.len().min(request.replicas as usize);
            let replicas = (0..count).map(|at| live[(chunk as usize + at) % live.len()].clone()).collect();
            let access = ChunkAccess {
                chunk,
                epoch: 1,
                replicas,
                capacity: request.chunk_size,
                ..ChunkAccess::default()
            };
            books.chunks.insert(chunk, access.clone());
            chunks.push(self.access(&access, Rights::APPEND));
        }
        Ok(Body::Chunks(v1::Chunks { chunks }))
    }

    fn commit(&self, commit: v1::Commit) -> FsResult<Body> {
        let mut books = self.books.lock().unwrap();
        if commit.slices.iter().any(|slice| books.fenced.contains(&slice.chunk)) {
            return Err(ErrorCode::ErrorStaleEpoch.into());
        }
        let ino = InodeNo(commit.ino);
        if !books.sizes.contains_key(&commit.ino) {
            let asked = self.layouts.asking(ino);
            self.layouts.learn(ino, &v1::Layout::default(), 0, u64::MAX, asked);
        }
        self.layouts.committed(ino, &commit.slices, None);
        let end = commit.slices.iter().map(|slice| slice.file_offset + slice.length).max().unwrap_or(0);
        let size = books.sizes.entry(commit.ino).or_default();
        *size = (*size).max(end);
        let attr = v1::Attr { ino: commit.ino, size: *size, ..v1::Attr::default() };
        books.commits.push(commit);
        Ok(Body::Entry(v1::Entry { attr: Some(attr), ..v1::Entry::default() }))
    }

    fn slices(&self, ask: &v1::GetSlices) -> Body {
        let mut books = self.books.lock().unwrap();
        books.layout_questions += 1;
        let segments = self.layouts.get(InodeNo(ask.ino), ask.offset, ask.offset + ask.length, 0);
        let mut slices: Vec<v1::Slice> =
            segments.unwrap_or_default().iter().filter_map(|segment| segment.slice).collect();
        let more = slices.len() > ask.max_slices as usize;
        slices.truncate(ask.max_slices as usize);
        let end = slices.last().map_or(0, |slice| slice.file_offset + slice.length);
        let complete_to = if more { end } else { ask.offset + ask.length };
        let used: BTreeSet<u64> = slices.iter().map(|slice| slice.chunk).collect();
        // Few accesses come along, so that the others must be asked for.
        let chunks =
            used.iter().take(2).map(|chunk| self.access(&books.chunks[chunk], Rights::READ)).collect();
        Body::Layout(v1::Layout { slices, chunks, complete_to, attr: None })
    }
}

#[async_trait]
impl Master for FakeMaster {
    async fn mutate(&self, _: &Cred, change: v1::mutation::Op) -> FsResult<Body> {
        match change {
            v1::mutation::Op::AllocChunks(request) => self.alloc(&request),
            v1::mutation::Op::Commit(commit) => self.commit(commit),
            other => panic!("not asked of a master by the data plane: {other:?}"),
        }
    }

    async fn query(&self, _: &Cred, question: v1::query::Op) -> FsResult<Body> {
        match question {
            v1::query::Op::GetSlices(ask) => Ok(self.slices(&ask)),
            v1::query::Op::GetChunks(ask) => {
                let books = self.books.lock().unwrap();
                let known = ask.chunks.iter().filter_map(|chunk| books.chunks.get(chunk));
                let chunks = known.map(|chunk| self.access(chunk, Rights::READ)).collect();
                Ok(Body::Chunks(v1::Chunks { chunks }))
            }
            other => panic!("not asked of a master by the data plane: {other:?}"),
        }
    }

    async fn hold(&self, _: &Cred, hold: v1::hold::Op) -> FsResult<Body> {
        let v1::hold::Op::SealChunk(seal) = hold else { panic!("not asked by the data plane: {hold:?}") };
        let mut books = self.books.lock().unwrap();
        books.suspects.extend(seal.suspects);
        books.fenced.insert(seal.chunk);
        books.ended.insert(seal.chunk);
        Ok(Body::Empty(v1::Empty {}))
    }

    fn now(&self) -> Timestamp {
        Timestamp { seconds: 1_700_000_000, nanos: 5 }
    }

    fn session(&self) -> SessionId {
        *self.session.borrow()
    }

    fn defaults(&self) -> Defaults {
        let books = self.books.lock().unwrap();
        Defaults { replicas: books.replicas, chunk_size: books.chunk_size }
    }

    fn session_changed(&self) -> watch::Receiver<SessionId> {
        self.session.subscribe()
    }
}

struct Cluster {
    dir: tempfile::TempDir,
    daemons: Vec<Option<Daemon>>,
    master: Arc<FakeMaster>,
}

impl Cluster {
    async fn start(daemons: usize, replicas: u32, chunk_size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("key"), KEY).unwrap();
        let mut running = Vec::new();
        let mut nodes = Vec::new();
        for at in 0..daemons {
            let data = dir.path().join(format!("data{at}"));
            let text = format!(
                "listen = \"127.0.0.1:0\"\nmasters = [\"127.0.0.1:1\"]\ndata = [{data:?}]\ncluster_key_file = {:?}\nreserve = \"0\"\nhost = \"h{at}\"\n",
                dir.path().join("key")
            );
            let daemon = Daemon::start(Env::real(), dfs_chunkd::Config::parse(&text).unwrap()).await.unwrap();
            nodes.push(Replica {
                node: daemon.node(),
                address: daemon.address().to_owned(),
                host: format!("h{at}"),
            });
            running.push(Some(daemon));
        }
        let books = Books {
            replicas,
            chunk_size,
            nodes,
            suspects: BTreeSet::new(),
            chunks: BTreeMap::new(),
            fenced: BTreeSet::new(),
            ended: BTreeSet::new(),
            sizes: BTreeMap::new(),
            commits: Vec::new(),
            layout_questions: 0,
        };
        let master = Arc::new(FakeMaster {
            key: ClusterKey::new(KEY).unwrap(),
            books: Mutex::new(books),
            layouts: Layouts::new(None),
            session: watch::channel(SessionId(1)).0,
        });
        Self { dir, daemons: running, master }
    }

    fn client(&self) -> Arc<DataPlane> {
        self.client_with(DataConfig::default())
    }

    fn client_with(&self, config: DataConfig) -> Arc<DataPlane> {
        let (leases, _) = crate::leases::testing::leases();
        for ino in (0..100).map(InodeNo) {
            assert_eq!(leases.granted(ino, crate::leases::Kind::Read, 1, crate::leases::testing::SEEN), None);
        }
        DataPlane::new(Env::real(), Arc::clone(&self.master) as Arc<dyn Master>, config, leases)
    }

    fn books<T>(&self, look: impl FnOnce(&Books) -> T) -> T {
        look(&self.master.books.lock().unwrap())
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(len).collect()
}

async fn write(data: &DataPlane, ino: u64, offset: u64, bytes: &[u8], step: usize) {
    for (at, part) in bytes.chunks(step).enumerate() {
        let offset = offset + (at * step) as u64;
        match data.try_write(InodeNo(ino), offset, part) {
            Some(result) => result.unwrap(),
            None => drop(data.write(InodeNo(ino), offset, part, Under::Nothing).await.unwrap()),
        }
    }
}

async fn read(data: &DataPlane, ino: u64, size: usize, step: usize) -> Vec<u8> {
    let state = ReadState::default();
    let mut all = Vec::new();
    while all.len() < size {
        let part =
            data.read(InodeNo(ino), &state, &sized(size as u64), all.len() as u64, step).await.unwrap();
        assert!(!part.is_empty());
        all.extend_from_slice(&part);
    }
    all
}

fn chunk_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(chunk_files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn sized(size: u64) -> v1::Attr {
    v1::Attr { size, ..v1::Attr::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_file_comes_back_from_memory_and_from_the_daemons() {
    let cluster = Cluster::start(2, 2, 4 << 20).await;
    let data = cluster.client();
    let bytes = pattern(1, (9 << 20) + 12_345);
    write(&data, 7, 0, &bytes, 100_000).await;
    assert_eq!(data.dirty(InodeNo(7)).unwrap().end, bytes.len() as u64);
    assert!(read(&data, 7, bytes.len(), 70_000).await == bytes, "before the flush");
    let attr = data.flush(InodeNo(7)).await.unwrap().unwrap();
    assert_eq!(attr.size, bytes.len() as u64);
    assert_eq!(data.dirty(InodeNo(7)), None);
    assert!(data.flush(InodeNo(7)).await.unwrap().is_none());
    assert!(read(&data, 7, bytes.len(), 1 << 20).await == bytes, "after the flush");
    let other = cluster.client();
    assert!(read(&other, 7, bytes.len(), 128 << 10).await == bytes, "another client");
    let state = ReadState::default();
    let at = 5_000_001;
    let part = other.read(InodeNo(7), &state, &sized(bytes.len() as u64), at, 4096).await.unwrap();
    assert!(part == bytes[at as usize..at as usize + 4096]);
    assert!(
        other
            .read(InodeNo(7), &state, &sized(bytes.len() as u64), bytes.len() as u64, 10)
            .await
            .unwrap()
            .is_empty()
    );
    // Neighbouring records are one slice, full chunks are given back for sealing.
    assert!(
        cluster.books(|books| books.commits.iter().map(|commit| commit.slices.len()).sum::<usize>()) <= 8
    );
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(cluster.books(|books| books.ended.len()) >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overwrites_and_holes_read_right_at_every_stage() {
    let cluster = Cluster::start(2, 2, 1 << 20).await;
    let data = cluster.client();
    let mut model = vec![0_u8; 300_000];
    let size = model.len() as u64;
    for round in 0..30_u64 {
        let random = pattern(round + 100, 16);
        let offset = u64::from(u32::from_le_bytes(random[..4].try_into().unwrap())) % 250_000;
        let bytes =
            pattern(round, 1 + usize::from(u16::from_le_bytes(random[4..6].try_into().unwrap())) % 40_000);
        write(&data, 9, offset, &bytes, 7000).await;
        model[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
        if round % 3 == 0 {
            data.flush(InodeNo(9)).await.unwrap();
        }
        let state = ReadState::default();
        let whole = data.read(InodeNo(9), &state, &sized(size), 0, model.len()).await.unwrap();
        assert!(whole == model, "round {round}");
    }
    data.flush_all().await.unwrap();
    assert!(read(&cluster.client(), 9, model.len(), 33_333).await == model);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_files_share_a_chunk_and_cost_one_commit_each() {
    let cluster = Cluster::start(2, 2, 64 << 20).await;
    let data = cluster.client();
    let mut flushes = Vec::new();
    for ino in 1..=200_u64 {
        write(&data, ino, 0, &pattern(ino, 3000), 4096).await;
        let data = Arc::clone(&data);
        flushes.push(tokio::spawn(async move { data.flush(InodeNo(ino)).await }));
    }
    for flush in flushes {
        flush.await.unwrap().unwrap().unwrap();
    }
    cluster.books(|books| {
        assert_eq!(books.commits.len(), 200);
        let used: BTreeSet<u64> =
            books.commits.iter().flat_map(|commit| &commit.slices).map(|slice| slice.chunk).collect();
        assert_eq!(used.len(), 1);
        assert!(books.commits.iter().all(|commit| commit.mtime.is_some()));
    });
    let other = cluster.client();
    for ino in 1..=200 {
        assert!(read(&other, ino, 3000, 4096).await == pattern(ino, 3000));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_of_eight_bytes_work() {
    let cluster = Cluster::start(2, 2, 8).await;
    let data = cluster.client();
    let bytes = pattern(3, 3003);
    write(&data, 5, 0, &bytes, 500).await;
    data.flush(InodeNo(5)).await.unwrap();
    assert!(read(&cluster.client(), 5, bytes.len(), 1000).await == bytes);
    write(&data, 5, 1001, b"overwritten", 100).await;
    data.flush(InodeNo(5)).await.unwrap();
    let mut bytes = bytes;
    bytes[1001..1012].copy_from_slice(b"overwritten");
    assert!(read(&cluster.client(), 5, bytes.len(), 4096).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_replica_dies_in_the_middle_and_every_byte_arrives() {
    let mut cluster = Cluster::start(3, 2, 64 << 20).await;
    let data = cluster.client();
    let bytes = pattern(4, 12 << 20);
    let (front, back) = bytes.split_at(5 << 20);
    write(&data, 6, 0, front, 128 << 10).await;
    // Appends are under way from here on.
    let first = loop {
        if let Some(node) = cluster.books(|books| books.chunks.get(&1).map(|chunk| chunk.replicas[0].node)) {
            break node;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let at = cluster.daemons.iter().position(|daemon| daemon.as_ref().unwrap().node() == first).unwrap();
    drop(cluster.daemons[at].take());
    write(&data, 6, front.len() as u64, back, 128 << 10).await;
    data.flush(InodeNo(6)).await.unwrap();
    assert!(cluster.books(|books| books.suspects.contains(&first)), "the master was told who failed");
    // Also what was committed to a replica that died is read from the other one.
    assert!(read(&cluster.client(), 6, bytes.len(), 128 << 10).await == bytes);
    assert!(read(&data, 6, bytes.len(), 128 << 10).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_bytes_of_one_replica_are_never_shown() {
    let cluster = Cluster::start(2, 2, 64 << 20).await;
    let data = cluster.client();
    let bytes = pattern(5, 3 << 20);
    write(&data, 6, 0, &bytes, 128 << 10).await;
    data.flush(InodeNo(6)).await.unwrap();
    let mut flipped = 0;
    for path in chunk_files(&cluster.dir.path().join("data0")) {
        let mut file = std::fs::read(&path).unwrap();
        if file.len() > 1 << 20 {
            for at in (100_000..file.len()).step_by(50_000) {
                file[at] ^= 1;
            }
            std::fs::write(&path, file).unwrap();
            flipped += 1;
        }
    }
    assert!(flipped > 0);
    assert!(read(&cluster.client(), 6, bytes.len(), 128 << 10).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_session_costs_nothing_but_another_chunk() {
    let cluster = Cluster::start(2, 2, 64 << 20).await;
    let data = cluster.client();
    let bytes = pattern(8, 4 << 20);
    write(&data, 6, 0, &bytes, 128 << 10).await;
    {
        let mut books = cluster.master.books.lock().unwrap();
        let all: Vec<u64> = books.chunks.keys().copied().collect();
        books.fenced.extend(all);
    }
    cluster.master.session.send_replace(SessionId(2));
    data.flush(InodeNo(6)).await.unwrap();
    assert!(read(&cluster.client(), 6, bytes.len(), 128 << 10).await == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_nobody_takes_end_in_an_error_and_memory_stays_bounded() {
    let mut cluster = Cluster::start(1, 1, 64 << 20).await;
    cluster.daemons.clear();
    let config = DataConfig {
        operation_timeout: Some(Duration::from_secs(2)),
        write_memory: 1 << 20,
        ..DataConfig::default()
    };
    let data = cluster.client_with(config);
    write(&data, 6, 0, &[1; 1 << 20], 128 << 10).await;
    assert!(data.try_write(InodeNo(6), 1 << 20, &[1; 4096]).is_none());
    let error = data.flush(InodeNo(6)).await.unwrap_err();
    assert!(matches!(error.code, ErrorCode::ErrorIo | ErrorCode::ErrorNoSpace), "{error}");
    // Reported once; memory is free again.
    data.try_write(InodeNo(6), 0, &[1; 4096]).unwrap().unwrap();
    data.discard(InodeNo(6));
    data.flush(InodeNo(6)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_wait_for_memory_and_everything_gets_through() {
    let cluster = Cluster::start(2, 2, 64 << 20).await;
    let config = DataConfig { write_memory: 2 << 20, read_cache: 1 << 20, ..DataConfig::default() };
    let data = cluster.client_with(config);
    let mut writers = Vec::new();
    for ino in 1..=4 {
        let data = Arc::clone(&data);
        writers.push(tokio::spawn(async move {
            let bytes = pattern(ino, 6 << 20);
            write(&data, ino, 0, &bytes, 100_000).await;
            data.flush(InodeNo(ino)).await.unwrap();
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    for ino in 1..=4 {
        assert!(read(&data, ino, 6 << 20, 300_000).await == pattern(ino, 6 << 20));
    }
}

/// Figures, not a test: `cargo test --release -p dfs-client --lib -- --ignored throughput --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn throughput() {
    const MIB: usize = 1 << 20;
    let clock = Env::real().clock;
    let cluster = Cluster::start(3, 3, 64 << 20).await;
    let data = cluster.client();
    let piece = pattern(1, MIB);
    let total = 1024;
    let rate = |since: Duration| total as f64 / (clock.boot() - since).as_secs_f64();
    let began = clock.boot();
    for at in 0..total {
        write(&data, 1, (at * MIB) as u64, &piece, MIB).await;
    }
    println!("written to memory: {:.0} MiB/s", rate(began));
    data.flush(InodeNo(1)).await.unwrap();
    println!("written and synced, 3 replicas: {:.0} MiB/s", rate(began));
    let other = cluster.client();
    let state = ReadState::default();
    let began = clock.boot();
    let mut at = 0;
    while at < total * MIB {
        at += other
            .read(InodeNo(1), &state, &sized((total * MIB) as u64), at as u64, 128 << 10)
            .await
            .unwrap()
            .len();
    }
    println!("read: {:.0} MiB/s", rate(began));
    let began = clock.boot();
    for ino in 2..1002_u64 {
        write(&data, ino, 0, &piece[..4096], 4096).await;
        data.flush(InodeNo(ino)).await.unwrap();
    }
    println!("small files, one after the other: {:.0}/s", 1000.0 / (clock.boot() - began).as_secs_f64());
}
