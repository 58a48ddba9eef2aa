//! Several clients at work on the same few names and files. What each saw and did, and when, is recorded; every object's
//! history must be linearizable (`linear.rs`). That is I5 as programs see it: a cache that answered with something old is an
//! operation that fits nowhere.

use crate::checkers::Watch;
use crate::env::Clocks;
use crate::linear::{self, Event, Object};
use crate::seeds::Report;
use crate::strikes;
use crate::workload::Violation;
use crate::world;
use dfs_client::{Client, ClientConfig, OpenFile, OpenFlags, Privileges};
use dfs_proto::v1::{Attr, Create, Cred, ErrorCode, Kind, SetAttr};
use dfs_proto::{FsResult, InodeNo};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use std::sync::Arc;
use std::sync::Mutex as StdMutex;
use std::time::Duration;
use tokio::sync::Mutex;

const NAMES: usize = 3;
const FILES: usize = 2;
/// A file is at most this many slots long; a write fills one.
const SLOTS: usize = 4;
const SLOT: usize = 8;
const THINK: Duration = Duration::from_millis(20);
/// How long a session lives in every second seed: so short that clients that are cut off lose theirs, and with them what
/// they have not flushed; so they flush every write. In the others nobody is cut off for that long, and writes are kept.
const SHORT_TTL: Duration = Duration::from_secs(4);
const LONG_TTL: Duration = Duration::from_secs(20);
/// How long an operation may take before its client gives it up.
const PATIENCE: Duration = Duration::from_secs(12);
/// The same for one that changes nothing: nothing is unknown when it is given up.
const READ_PATIENCE: Duration = Duration::from_millis(300);

// ---- the objects ----

/// A directory of a few names, each with a number for what it stands for.
#[derive(Clone, Debug)]
pub struct Dir;

#[derive(Clone, Debug)]
pub enum DirOp {
    Make(usize, u32),
    Remove(usize),
    Rename(usize, usize),
    Look(usize),
    List,
}

#[derive(Clone, Debug, PartialEq)]
pub enum DirResult {
    Done,
    Refused,
    Seen(Option<u32>),
    Listed([bool; NAMES]),
}

impl Object for Dir {
    type State = [Option<u32>; NAMES];
    type Op = DirOp;
    type Result = DirResult;

    fn initial() -> Self::State {
        [None; NAMES]
    }

    fn apply(state: &Self::State, op: &DirOp) -> (Self::State, DirResult) {
        let mut now = *state;
        let result = match *op {
            DirOp::Make(name, _) if state[name].is_some() => DirResult::Refused,
            DirOp::Make(name, number) => {
                now[name] = Some(number);
                DirResult::Done
            }
            DirOp::Remove(name) | DirOp::Rename(name, _) if state[name].is_none() => DirResult::Refused,
            DirOp::Remove(name) => {
                now[name] = None;
                DirResult::Done
            }
            DirOp::Rename(from, to) => {
                now[to] = now[from].take();
                DirResult::Done
            }
            DirOp::Look(name) => DirResult::Seen(state[name]),
            DirOp::List => DirResult::Listed(state.map(|name| name.is_some())),
        };
        (now, result)
    }
}

/// A file of a few slots.
#[derive(Clone, Debug)]
pub struct File;

#[derive(Clone, Debug)]
pub enum FileOp {
    Write(usize, u64),
    Truncate(usize),
    Chmod(u32),
    Read,
    Stat,
}

#[derive(Clone, Debug, PartialEq)]
pub enum FileResult {
    Done,
    Bytes(Vec<u64>),
    Shown(usize, u32),
}

impl Object for File {
    type State = (Vec<u64>, u32);
    type Op = FileOp;
    type Result = FileResult;

    fn initial() -> Self::State {
        (Vec::new(), 0o644)
    }

    fn apply(state: &Self::State, op: &FileOp) -> (Self::State, FileResult) {
        let (mut slots, mut mode) = state.clone();
        let result = match *op {
            FileOp::Write(slot, value) => {
                slots.resize(slots.len().max(slot + 1), 0);
                slots[slot] = value;
                FileResult::Done
            }
            FileOp::Truncate(size) => {
                slots.resize(size, 0);
                FileResult::Done
            }
            FileOp::Chmod(to) => {
                mode = to;
                FileResult::Done
            }
            FileOp::Read => FileResult::Bytes(slots.clone()),
            FileOp::Stat => FileResult::Shown(slots.len(), mode),
        };
        ((slots, mode), result)
    }
}

// ---- the clients ----

#[derive(Default)]
struct Histories {
    dir: Vec<Event<Dir>>,
    files: [Vec<Event<File>>; FILES],
    /// Operations that ended well.
    done: u64,
    finished: u64,
    /// Numbers that were handed out: every value is written once.
    next: u64,
}

struct Worker {
    number: u64,
    client: Client,
    cred: Cred,
    dir: InodeNo,
    files: Vec<Arc<OpenFile>>,
    random: SmallRng,
    histories: Arc<StdMutex<Histories>>,
    /// Writes are flushed before they count, and nobody looks at the file here meanwhile: bytes that are not flushed may be lost
    /// with a session, and that is told later. By file: whether some may be left of a write that was given up.
    flush: Option<Arc<[Mutex<bool>; FILES]>>,
    /// Reads go on while changes wait for a cluster that does not answer.
    only_reads: bool,
}

fn now() -> Duration {
    turmoil::sim_elapsed().expect("in the simulation")
}

fn name(name: usize) -> Vec<u8> {
    format!("n{name}").into_bytes()
}

/// What an operation ended with: an answer, a refusal, or nobody knows.
fn seen<T>(result: Result<FsResult<T>, tokio::time::error::Elapsed>) -> Option<Result<T, ErrorCode>> {
    match result {
        Ok(Ok(value)) => Some(Ok(value)),
        Ok(Err(error)) => match error.code {
            ErrorCode::ErrorNotFound | ErrorCode::ErrorExists => Some(Err(error.code)),
            _ => None,
        },
        Err(_) => None,
    }
}

impl Worker {
    fn fresh(&self) -> u64 {
        let mut histories = self.histories.lock().expect("one thread");
        histories.next += 1;
        histories.next
    }

    async fn step(&mut self) {
        if self.random.random_range(0..2) == 0 { self.dir_step().await } else { self.file_step().await }
    }

    async fn dir_step(&mut self) {
        let (one, other) = (self.random.random_range(0..NAMES), self.random.random_range(0..NAMES - 1));
        let other = if other >= one { other + 1 } else { other };
        let op = match self.random.random_range(if self.only_reads { 5..10 } else { 0..10 }) {
            0..3 => DirOp::Make(one, u32::try_from(self.fresh()).expect("few")),
            3 => DirOp::Remove(one),
            4 => DirOp::Rename(one, other),
            5..9 => DirOp::Look(one),
            _ => DirOp::List,
        };
        let called = now();
        let reads = matches!(op, DirOp::Look(_) | DirOp::List);
        let patience = if reads { READ_PATIENCE } else { PATIENCE };
        let ended = tokio::time::timeout(patience, self.dir_op(&op)).await;
        let result = seen(ended).map(|result| result.unwrap_or(DirResult::Refused));
        tracing::trace!(?op, ?called, ?result, "ended");
        let mut histories = self.histories.lock().expect("one thread");
        histories.done += u64::from(result.is_some());
        let returned = result.map(|result| (now(), result));
        if returned.is_some() || !reads {
            histories.dir.push(Event { client: self.number, called, returned, op });
        }
    }

    async fn dir_op(&self, op: &DirOp) -> FsResult<DirResult> {
        let (client, cred, dir) = (&self.client, &self.cred, self.dir);
        match *op {
            DirOp::Make(one, number) => {
                let make = Create {
                    parent: dir.get(),
                    name: name(one).into(),
                    kind: Kind::Char.into(),
                    rdev: number,
                    mode: 0o644,
                    exclusive: true,
                    ..Create::default()
                };
                client.create(cred, make).await.map(|_| DirResult::Done)
            }
            DirOp::Remove(one) => client.unlink(cred, dir, &name(one)).await.map(|()| DirResult::Done),
            DirOp::Rename(from, to) => {
                let renamed = client.rename(cred, dir, &name(from), dir, &name(to), false, false).await;
                renamed.map(|()| DirResult::Done)
            }
            DirOp::Look(one) => match client.lookup(cred, dir, &name(one)).await {
                Ok(attr) => Ok(DirResult::Seen(Some(attr.rdev))),
                Err(error) if error.code == ErrorCode::ErrorNotFound => Ok(DirResult::Seen(None)),
                Err(error) => Err(error),
            },
            DirOp::List => {
                let page = client.read_dir(cred, dir, 0, 100, true).await?;
                let mut names = [false; NAMES];
                for (at, listed) in names.iter_mut().enumerate() {
                    *listed = page.entries.iter().any(|entry| entry.name == name(at));
                }
                Ok(DirResult::Listed(names))
            }
        }
    }

    async fn file_step(&mut self) {
        let which = self.random.random_range(0..FILES);
        let op = match self.random.random_range(if self.only_reads { 6..10 } else { 0..10 }) {
            0..4 => FileOp::Write(self.random.random_range(0..SLOTS), self.fresh()),
            4 => FileOp::Truncate(self.random.random_range(0..=SLOTS)),
            5 => FileOp::Chmod([0o600, 0o644, 0o640][self.random.random_range(0..3)]),
            6..9 => FileOp::Read,
            _ => FileOp::Stat,
        };
        let called = now();
        let reads = matches!(op, FileOp::Read | FileOp::Stat);
        let patience = if reads { READ_PATIENCE } else { PATIENCE };
        let ended = tokio::time::timeout(patience, self.file_op(which, &op)).await;
        let result = seen(ended).and_then(Result::ok);
        tracing::trace!(which, ?op, ?called, ?result, "ended");
        let mut histories = self.histories.lock().expect("one thread");
        histories.done += u64::from(result.is_some());
        let returned = result.map(|result| (now(), result));
        if returned.is_some() || !reads {
            histories.files[which].push(Event { client: self.number, called, returned, op });
        }
    }

    async fn file_op(&self, which: usize, op: &FileOp) -> FsResult<FileResult> {
        let Some(flush) = &self.flush else { return self.file_op_now(which, op).await };
        let (client, file) = (&self.client, &self.files[which]);
        let mut left = flush[which].lock().await;
        if *left {
            client.fsync(file.ino).await?;
        }
        *left = matches!(op, FileOp::Write(..));
        let result = self.file_op_now(which, op).await?;
        client.fsync(file.ino).await?;
        *left = false;
        Ok(result)
    }

    async fn file_op_now(&self, which: usize, op: &FileOp) -> FsResult<FileResult> {
        let (client, cred, file) = (&self.client, &self.cred, &self.files[which]);
        match *op {
            FileOp::Write(slot, value) => {
                client.write(file, (slot * SLOT) as u64, &value.to_le_bytes(), &Privileges::Keep).await?;
                Ok(FileResult::Done)
            }
            FileOp::Truncate(size) => {
                let set =
                    SetAttr { ino: file.ino.get(), size: Some((size * SLOT) as u64), ..SetAttr::default() };
                client.setattr(cred, set).await.map(|_| FileResult::Done)
            }
            FileOp::Chmod(mode) => {
                let set = SetAttr { ino: file.ino.get(), mode: Some(mode), ..SetAttr::default() };
                client.setattr(cred, set).await.map(|_| FileResult::Done)
            }
            FileOp::Read => {
                let bytes = client.read(file, 0, SLOTS * SLOT + 1).await?;
                let slots = bytes.chunks(SLOT).map(|slot| {
                    let mut value = [0; SLOT];
                    value[..slot.len()].copy_from_slice(slot);
                    u64::from_le_bytes(value)
                });
                Ok(FileResult::Bytes(slots.collect()))
            }
            FileOp::Stat => {
                let attr = client.getattr(file.ino).await?;
                Ok(FileResult::Shown(usize::try_from(attr.size).expect("small") / SLOT, attr.mode))
            }
        }
    }
}

// ---- the world ----

/// Runs one seed: three to five clients under faults, for half a minute.
pub fn run(seed: u64, faults: world::Faults) -> Result<Report, Violation> {
    let mut sim = world::network(seed);
    let mut cluster =
        world::start_cluster(&mut sim, seed, if loses_sessions(seed) { SHORT_TTL } else { LONG_TTL });
    let histories = Arc::new(StdMutex::new(Histories::default()));
    let clients: Vec<String> = (1..=3 + seed % 3).map(|id| format!("client-{id}")).collect();
    for (id, host) in (1..).zip(&clients) {
        let clocks = start_client(&mut sim, id, host, clients.len() as u64, seed, Arc::clone(&histories));
        cluster.clients.push((host.clone(), clocks));
    }
    let mut plan = faults(seed, &world::masters(), &cluster.chunkds(), &clients);
    let mut watch = Watch::new(cluster.storages(), cluster.disks());
    strikes::drive(&mut sim, &mut plan, &cluster, &mut watch, seed)?;
    let histories = histories.lock().expect("one thread");
    linear::check(histories.dir.clone()).map_err(|why| format!("the directory's history: {why}"))?;
    for (which, history) in histories.files.iter().enumerate() {
        linear::check(history.clone()).map_err(|why| format!("the history of file {which}: {why}"))?;
    }
    if histories.done < 100 {
        return Err(format!("only {} operations ended", histories.done));
    }
    Ok(world::report(histories.done, &plan, &format!("{:?}", (&histories.dir, &histories.files))))
}

fn loses_sessions(seed: u64) -> bool {
    seed.is_multiple_of(2)
}

fn start_client(
    sim: &mut turmoil::Sim<'_>,
    id: u64,
    host: &str,
    clients: u64,
    seed: u64,
    histories: Arc<StdMutex<Histories>>,
) -> Arc<Clocks> {
    let (env, clocks) = world::client_env(id, seed);
    let name = host.to_owned();
    sim.client(host, async move {
        let config = ClientConfig {
            name,
            connect_timeout: Duration::from_secs(60),
            operation_timeout: Some(Duration::from_secs(60)),
            ..ClientConfig::new(world::addresses())
        };
        let client = Client::connect(env, config).await?;
        let cred = Cred::default();
        let dir = shared(&client, &cred, InodeNo::ROOT, b"shared", Kind::Dir).await?;
        let mut files = Vec::new();
        for which in 0..FILES {
            let ino =
                shared(&client, &cred, InodeNo::ROOT, format!("f{which}").as_bytes(), Kind::File).await?;
            let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
            files.push(client.open(&cred, ino, flags).await?);
        }
        let flush = loses_sessions(seed).then(|| Arc::new([const { Mutex::const_new(false) }; FILES]));
        let worker = |only_reads: bool| Worker {
            number: id,
            client: client.clone(),
            cred: cred.clone(),
            dir,
            files: files.clone(),
            random: SmallRng::seed_from_u64(seed ^ (id << 40) ^ u64::from(only_reads)),
            histories: Arc::clone(&histories),
            flush: flush.clone(),
            only_reads,
        };
        tokio::join!(work(worker(false)), work(worker(true)));
        histories.lock().expect("one thread").finished += 1;
        // Nobody leaves while others work: a session that ends says nothing about leases.
        while histories.lock().expect("one thread").finished < clients {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        Ok(())
    });
    clocks
}

async fn work(mut worker: Worker) {
    while now() < world::FAULTS_END + Duration::from_secs(5) {
        worker.step().await;
        let pause = THINK * (worker.random.next_u32() % 4);
        tokio::time::sleep(pause).await;
    }
}

/// What all clients share: whoever comes first makes it.
async fn shared(client: &Client, cred: &Cred, dir: InodeNo, name: &[u8], kind: Kind) -> FsResult<InodeNo> {
    let make = Create {
        parent: dir.get(),
        name: name.to_vec().into(),
        kind: kind.into(),
        mode: if kind == Kind::Dir { 0o755 } else { 0o644 },
        exclusive: true,
        ..Create::default()
    };
    let number = |attr: Attr| InodeNo(attr.ino);
    match client.create(cred, make).await {
        Err(error) if error.code == ErrorCode::ErrorExists => {
            client.lookup(cred, dir, name).await.map(number)
        }
        made => made.map(|made| number(made.attr)),
    }
}
