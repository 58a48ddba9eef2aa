//! Whole masters: openraft's own storage suite, restarts over damage, and three masters over loopback.

use super::log::LogStore;
use super::recover::{open_disk, open_sim};
use super::snapshot::Snapshots;
use super::store::{Shared, StateMachine};
use super::types::{StorageError, StorageIOError, TypeConfig};
use super::*;
use crate::state::{Applied, Kv, keys, nodes};
use dfs_env::Env;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::v1::{self, system::Op};
use openraft::AnyError;
use openraft::testing::{StoreBuilder, Suite};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

pub const CACHE: u64 = 8 << 20;

struct Builder {
    sim: bool,
    /// openraft's suite drops its guard before the log's handles; directories live until the test ends.
    dirs: Mutex<Vec<tempfile::TempDir>>,
}

fn storage_error(error: impl std::fmt::Display) -> StorageError {
    StorageIOError::read(AnyError::error(error)).into()
}

impl StoreBuilder<TypeConfig, LogStore, StateMachine> for Builder {
    async fn build(&self) -> Result<((), LogStore, StateMachine), StorageError> {
        let opened = if self.sim {
            open_sim(&SimStorage::new(), "c", 0, false).map_err(storage_error)?
        } else {
            let dir = tempfile::tempdir().map_err(storage_error)?;
            let opened =
                open_disk(&Env::real(), dir.path(), "c", 0, false, CACHE, 0).map_err(storage_error)?;
            self.dirs.lock().unwrap().push(dir);
            opened
        };
        let shared = Shared::new(
            Env::real(),
            "c".to_owned(),
            opened.store,
            opened.snapshots,
            opened.joining,
            opened.room,
            u64::MAX,
        )
        .map_err(storage_error)?;
        Ok(((), opened.log, StateMachine(Arc::new(shared))))
    }
}

/// All of openraft's suite but two tests, which append an entry for the second time and leave a gap: the log on disk
/// refuses both, as nothing in Raft does either.
#[test]
fn openrafts_suite_passes_on_disk() {
    type Disk = Suite<TypeConfig, LogStore, StateMachine, Builder, ()>;
    let builder = Builder { sim: false, dirs: Mutex::default() };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    macro_rules! run {
        ($($name:ident)*) => {$(
            runtime.block_on(async {
                let ((), log, machine) = builder.build().await.unwrap();
                if let Err(error) = Disk::$name(log, machine).await {
                    panic!("{}: {error}", stringify!($name));
                }
            });
        )*};
    }
    run!(last_membership_in_log_initial last_membership_in_log get_membership_initial
        get_membership_from_log_and_empty_sm get_membership_from_empty_log_and_sm
        get_membership_from_log_le_sm_last_applied get_membership_from_log_gt_sm_last_applied_1
        get_membership_from_log_gt_sm_last_applied_2 get_initial_state_without_init get_initial_state_with_state
        get_initial_state_last_log_gt_sm get_initial_state_last_log_lt_sm get_initial_state_log_ids
        get_initial_state_re_apply_committed save_vote get_log_entries limited_get_log_entries try_get_log_entry
        initial_logs get_log_state get_log_id last_id_in_log last_applied_state purge_logs_upto_0 purge_logs_upto_5
        purge_logs_upto_20 delete_logs_since_11 delete_logs_since_0 append_to_log snapshot_meta apply_single
        apply_multiple);
    runtime.block_on(Disk::transfer_snapshot(&builder)).unwrap();
}

#[test]
fn openrafts_suite_passes_on_simulated_storage() {
    Suite::test_all(Builder { sim: true, dirs: Mutex::default() }).unwrap();
}

pub fn key() -> ClusterKey {
    ClusterKey::new(b"0123456789abcdef").unwrap()
}

fn config(id: u64, peers: BTreeMap<u64, String>, storage: Storage, dir: &Path) -> RaftConfig {
    RaftConfig {
        id,
        address: peers[&id].clone(),
        peers,
        join: false,
        dir: dir.to_owned(),
        cluster_id: key().cluster_id(),
        key: key(),
        reserve_bytes: 0,
        state_cache_bytes: CACHE,
        snapshot_every_entries: 1_000_000,
        heartbeat: RaftConfig::HEARTBEAT,
        election: RaftConfig::ELECTION,
        storage,
    }
}

pub fn alone(dir: &Path) -> RaftConfig {
    config(1, BTreeMap::from([(1, "localhost:1".to_owned())]), Storage::Disk, dir)
}

pub async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited too long until {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

pub async fn leads(node: &Node) {
    let mut leadership = node.leadership();
    timeout(Duration::from_secs(60), leadership.wait_for(|now| now.leading)).await.unwrap().unwrap();
}

fn command(op: Op) -> v1::Command {
    v1::Command {
        body: Some(v1::command::Body::System(v1::System { op: Some(op) })),
        ..v1::Command::default()
    }
}

pub async fn init(node: &Node) {
    let op = Op::Init(v1::Init { hash_key: vec![7; 16].into(), replicas: 1, chunk_size: 1 << 20 });
    node.propose(command(op)).await.unwrap();
}

pub fn register(id: u64) -> v1::Command {
    let address = format!("host-{id}:1");
    command(Op::RegisterNode(v1::RegisterNode { node: id, address, ..v1::RegisterNode::default() }))
}

/// Proposes all at once.
async fn register_all(node: &Node, ids: std::ops::Range<u64>) {
    for answer in futures::future::join_all(ids.map(|id| node.propose(register(id)))).await {
        assert!(matches!(answer, Ok(Applied::System(_))), "{answer:?}");
    }
}

fn registered(kv: &dyn Kv) -> Vec<u64> {
    nodes(kv).unwrap().into_iter().map(|row| row.node).collect()
}

fn everything(kv: &dyn Kv) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut rows = Vec::new();
    kv.scan(&[], &keys::everything().1, &mut |key, value| {
        rows.push((key.to_vec(), value.to_vec()));
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    rows
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        if path.is_dir() {
            copy_tree(&path, &to.join(name));
        } else {
            fs::copy(&path, to.join(name)).unwrap();
        }
    }
}

fn remove_state(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("state-") {
            fs::remove_dir_all(path).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_master_packs_commands_and_finds_everything_again_after_stop_and_kill() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("a");
    let node = Node::start(Env::real(), alone(&dir)).await.unwrap();
    leads(&node).await;
    node.confirm().await.unwrap();
    init(&node).await;
    let before = node.status().applied;
    register_all(&node, 1..501).await;
    let entries = node.status().applied - before;
    assert!(entries <= 20, "{entries} entries for 500 commands that came at once");
    // As a kill would leave the files.
    let killed = home.path().join("killed");
    copy_tree(&dir, &killed);
    let state = everything(&*node.kv());
    node.shutdown().await;
    assert!(matches!(node.propose(register(9)).await, Err(NotLeader { .. })));

    let all: Vec<u64> = (1..501).collect();
    for dir in [&dir, &killed] {
        let node = Node::start(Env::real(), alone(dir)).await.unwrap();
        leads(&node).await;
        assert_eq!(registered(&*node.kv()), all);
        register_all(&node, 501..502).await;
        node.shutdown().await;
    }
    // Without the state store, from the log alone; the entry of the new leader is the only difference.
    remove_state(&killed);
    let node = Node::start(Env::real(), alone(&killed)).await.unwrap();
    leads(&node).await;
    let rebuilt = everything(&*node.kv());
    assert_eq!(registered(&*node.kv()).len(), 501);
    assert!(rebuilt.len() == state.len() + 1);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_are_taken_while_commands_run_and_purge_the_log_up_to_the_older_one() {
    let home = tempfile::tempdir().unwrap();
    let mut settings = alone(home.path());
    settings.snapshot_every_entries = 20;
    let node = Node::start(Env::real(), settings.clone()).await.unwrap();
    leads(&node).await;
    init(&node).await;
    for id in 1..151 {
        node.propose(register(id)).await.unwrap();
    }
    until("the log is purged", || node.status().purged > 0).await;
    let snapshots = Snapshots::open(home.path().join("snapshots")).unwrap();
    let older = snapshots.list().unwrap()[1].0.last_log_id.unwrap().index;
    assert!(node.status().purged <= older);
    let state = registered(&*node.kv());
    node.shutdown().await;

    // The state store is gone and the newest snapshot is damaged: the older one and the log still hold everything.
    remove_state(home.path());
    let newest = snapshots.list().unwrap()[0].0.snapshot_id.clone();
    let file = home.path().join("snapshots").join(format!("{newest}.snapshot"));
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    let node = Node::start(Env::real(), settings.clone()).await.unwrap();
    leads(&node).await;
    assert_eq!(registered(&*node.kv()), state);
    node.shutdown().await;

    // Both are gone: refused, nothing is made up.
    remove_state(home.path());
    fs::remove_dir_all(home.path().join("snapshots")).unwrap();
    match Node::start(Env::real(), settings).await.err() {
        Some(StartError::Failed(line)) => {
            assert!(line.contains("no readable snapshot") && !line.contains('\n'), "{line}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_log_tail_loses_nothing_acknowledged_and_damage_in_the_middle_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let node = Node::start(Env::real(), alone(home.path())).await.unwrap();
    leads(&node).await;
    init(&node).await;
    register_all(&node, 1..21).await;
    node.shutdown().await;
    let file = fs::read_dir(home.path().join("log")).unwrap().map(|entry| entry.unwrap().path());
    let file = file.filter(|path| path.extension().is_some_and(|e| e == "wal")).max().unwrap();
    let whole = fs::read(&file).unwrap();
    // A record of which only the beginning was written.
    fs::write(&file, [whole.as_slice(), &whole[whole.len() / 2..whole.len() / 2 + 3]].concat()).unwrap();
    let node = Node::start(Env::real(), alone(home.path())).await.unwrap();
    leads(&node).await;
    assert_eq!(registered(&*node.kv()).len(), 20);
    node.shutdown().await;
    // The last record cut in two, acknowledged as it was: the state store still has it.
    let length = fs::metadata(&file).unwrap().len();
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(length - 10).unwrap();
    let files: Vec<_> =
        fs::read_dir(home.path().join("log")).unwrap().map(|entry| entry.unwrap().path()).collect();
    for later in files.iter().filter(|path| path.extension().is_some_and(|e| e == "wal") && **path > file) {
        fs::remove_file(later).unwrap();
    }
    let node = Node::start(Env::real(), alone(home.path())).await.unwrap();
    leads(&node).await;
    assert_eq!(registered(&*node.kv()).len(), 20);
    register_all(&node, 21..26).await;
    node.shutdown().await;

    let mut bytes = whole.clone();
    bytes[whole.len() / 2] ^= 4;
    fs::write(&file, bytes).unwrap();
    match Node::start(Env::real(), alone(home.path())).await.err() {
        Some(StartError::Failed(line)) => assert!(line.contains("damaged") && !line.contains('\n'), "{line}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_settings_and_foreign_directories_are_refused_in_one_line() {
    let home = tempfile::tempdir().unwrap();
    let node = Node::start(Env::real(), alone(home.path())).await.unwrap();
    let busy = Node::start(Env::real(), alone(home.path())).await.err();
    assert!(matches!(busy, Some(StartError::Failed(line)) if line.contains("another process")));
    node.shutdown().await;
    let mut other = alone(home.path());
    other.key = ClusterKey::new(b"fedcba9876543210").unwrap();
    other.cluster_id = other.key.cluster_id();
    assert!(
        matches!(Node::start(Env::real(), other).await.err(), Some(StartError::Usage(line)) if line.contains("cluster"))
    );
    let mut nobody = alone(home.path());
    nobody.id = 2;
    assert!(matches!(Node::start(Env::real(), nobody).await.err(), Some(StartError::Usage(_))));
    let mut hasty = alone(home.path());
    hasty.election = (Duration::from_millis(50), Duration::from_millis(90));
    assert!(matches!(Node::start(Env::real(), hasty).await.err(), Some(StartError::Usage(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_whose_disk_does_not_sync_stops_by_itself() {
    let home = tempfile::tempdir().unwrap();
    let storage = SimStorage::new();
    let settings = RaftConfig { storage: Storage::Sim(Arc::clone(&storage)), ..alone(home.path()) };
    let node = Node::start(Env::real(), settings.clone()).await.unwrap();
    leads(&node).await;
    init(&node).await;
    register_all(&node, 1..4).await;
    storage.fail_syncs(true);
    assert!(matches!(node.propose(register(4)).await, Err(NotLeader { unknown: true, .. })));
    let reason = timeout(Duration::from_secs(10), node.failed()).await.unwrap();
    assert!(reason.contains("does not sync"), "{reason}");
    assert!(matches!(node.confirm().await, Err(NotLeader { .. })));
    node.shutdown().await;
    storage.fail_syncs(false);
    let node = Node::start(Env::real(), settings).await.unwrap();
    leads(&node).await;
    assert_eq!(registered(&*node.kv()), [1, 2, 3]);
    node.shutdown().await;
}

/// Puts a pipe in the place of the log file that is being written: it takes bytes, and fdatasync of it fails.
fn break_syncs(dir: &Path) -> std::os::fd::OwnedFd {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    let log = dir.join("log").canonicalize().unwrap();
    let mut broken = 0;
    let mut ends = [0; 2];
    // SAFETY: there is room for the two descriptors that the call makes.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both were just made and are nobody else's.
    let (read, write) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let Ok(target) = fs::read_link(&path) else { continue };
        if target.parent() == Some(&log) && target.extension().is_some_and(|extension| extension == "wal") {
            let number = path.file_name().unwrap().to_string_lossy().parse().unwrap();
            // SAFETY: it replaces a descriptor of the log's file, whose owner goes on using the number.
            assert!(unsafe { libc::dup2(write.as_raw_fd(), number) } >= 0);
            broken += 1;
        }
    }
    assert!(broken > 0, "no log file is open");
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn a_master_never_goes_on_after_a_failed_fdatasync_of_its_log() {
    let home = tempfile::tempdir().unwrap();
    let node = Node::start(Env::real(), alone(home.path())).await.unwrap();
    leads(&node).await;
    init(&node).await;
    register_all(&node, 1..4).await;
    let _pipe = break_syncs(home.path());
    assert!(matches!(node.propose(register(4)).await, Err(NotLeader { unknown: true, .. })));
    let reason = timeout(Duration::from_secs(10), node.failed()).await.unwrap();
    assert!(reason.contains("Invalid argument") && !reason.contains('\n'), "{reason}");
    assert!(matches!(node.propose(register(5)).await, Err(NotLeader { .. })));
    assert!(matches!(node.confirm().await, Err(NotLeader { .. })));
    node.shutdown().await;
    // What is on the disk is what it begins with.
    let node = Node::start(Env::real(), alone(home.path())).await.unwrap();
    leads(&node).await;
    assert_eq!(registered(&*node.kv()), [1, 2, 3]);
    register_all(&node, 6..7).await;
    node.shutdown().await;
}

/// Three masters over loopback.
pub struct Cluster {
    home: tempfile::TempDir,
    pub peers: BTreeMap<u64, String>,
    pub nodes: BTreeMap<u64, (Arc<Node>, tokio::task::JoinHandle<()>)>,
    snapshot_every: u64,
    /// Simulated storage of each; empty: on disk.
    storage: BTreeMap<u64, Arc<SimStorage>>,
    /// The first is alone, the others are to be added.
    joins: bool,
}

impl Cluster {
    pub async fn start(snapshot_every: u64, sim: bool) -> Self {
        let mut cluster = Self::new(snapshot_every, sim).await;
        for id in 1..=3 {
            cluster.up(id).await;
        }
        cluster
    }

    /// A group of one; 2 and 3 may be started and added.
    pub async fn alone(snapshot_every: u64) -> Self {
        let mut cluster = Self::new(snapshot_every, false).await;
        cluster.joins = true;
        cluster.up(1).await;
        cluster
    }

    async fn new(snapshot_every: u64, sim: bool) -> Self {
        // What went on, when a test fails: RUST_LOG=info.
        drop(
            tracing_subscriber::fmt()
                .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
                .with_test_writer()
                .try_init(),
        );
        let env = Env::real();
        let mut peers = BTreeMap::new();
        for id in 1..=3 {
            let listener = env.net.listen("127.0.0.1:0").await.unwrap();
            peers.insert(id, listener.address().unwrap());
        }
        let home = tempfile::tempdir().unwrap();
        let storage = (1..=3)
            .filter(|_| sim)
            .map(|id| (id, SimStorage::with_sync_time(Duration::from_millis(1))))
            .collect();
        Self { home, peers, nodes: BTreeMap::new(), snapshot_every, storage, joins: false }
    }

    pub fn dir(&self, id: u64) -> PathBuf {
        self.home.path().join(id.to_string())
    }

    pub async fn up(&mut self, id: u64) {
        let env = Env::real();
        let storage =
            self.storage.get(&id).map_or(Storage::Disk, |storage| Storage::Sim(Arc::clone(storage)));
        let mut peers = self.peers.clone();
        if self.joins {
            peers.retain(|peer, _| *peer == id);
        }
        let mut settings = config(id, peers, storage, &self.dir(id));
        settings.join = self.joins && id > 1;
        settings.snapshot_every_entries = self.snapshot_every;
        // The machine that runs the tests may be busy.
        settings.election = (Duration::from_millis(600), Duration::from_millis(1500));
        let node = Node::start(env.clone(), settings).await.unwrap();
        let listener = env.net.listen(&self.peers[&id]).await.unwrap();
        let server = rpc::server(Tuning::default()).add_service(node.service());
        let served = tokio::spawn(async move {
            server.serve_with_incoming(rpc::incoming(listener)).await.unwrap();
        });
        self.nodes.insert(id, (node, served));
    }

    pub async fn down(&mut self, id: u64) {
        let (node, served) = self.nodes.remove(&id).unwrap();
        served.abort();
        drop(served.await);
        node.shutdown().await;
    }

    pub async fn leader(&self) -> u64 {
        let mut leader = None;
        until("one leads", || {
            leader = self
                .nodes
                .iter()
                .find(|(_, (node, _))| node.leadership().borrow().leading)
                .map(|(id, _)| *id);
            leader.is_some()
        })
        .await;
        leader.unwrap()
    }

    /// Proposes as a client does: at whoever leads, again and again.
    pub async fn register(&self, ids: std::ops::Range<u64>) {
        for id in ids {
            loop {
                let leader = self.leader().await;
                if self.nodes[&leader].0.propose(register(id)).await.is_ok() {
                    break;
                }
            }
        }
    }

    pub async fn agree(&self, expected: &[u64]) {
        until("all have the same state", || {
            self.nodes.values().all(|(node, _)| registered(&*node.kv()) == expected)
        })
        .await;
        until("all are byte-identical", || {
            let mut states = self.nodes.values().map(|(node, _)| everything(&*node.kv()));
            let first = states.next().unwrap();
            states.all(|state| state == first)
        })
        .await;
    }

    pub async fn stop(mut self) {
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.down(id).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_masters_agree_and_outlive_their_leader() {
    let mut cluster = Cluster::start(1_000_000, false).await;
    let first = cluster.leader().await;
    init(&cluster.nodes[&first].0).await;
    cluster.register(1..20).await;
    cluster.agree(&(1..20).collect::<Vec<_>>()).await;
    let leader = cluster.leader().await;
    cluster.nodes[&leader].0.confirm().await.unwrap();
    let follower = *cluster.nodes.keys().find(|id| **id != leader).unwrap();
    let refusal = cluster.nodes[&follower].0.confirm().await.unwrap_err();
    assert_eq!(refusal, NotLeader { leader: Some(cluster.peers[&leader].clone()), unknown: false });
    assert_eq!(cluster.nodes[&leader].0.status().members.len(), 3);

    cluster.down(leader).await;
    cluster.register(20..40).await;
    cluster.agree(&(1..40).collect::<Vec<_>>()).await;
    cluster.up(leader).await;
    cluster.agree(&(1..40).collect::<Vec<_>>()).await;

    // Two are down: the last one promises nothing.
    let leader = cluster.leader().await;
    for id in (1..=3).filter(|id| *id != leader) {
        cluster.down(id).await;
    }
    assert!(cluster.nodes[&leader].0.confirm().await.is_err());
    until("it no longer says that it leads", || !cluster.nodes[&leader].0.leadership().borrow().leading)
        .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_fell_behind_the_log_is_brought_up_by_a_snapshot() {
    let mut cluster = Cluster::start(15, false).await;
    let leader = cluster.leader().await;
    init(&cluster.nodes[&leader].0).await;
    cluster.register(1..5).await;
    let leader = cluster.leader().await;
    let behind = *cluster.nodes.keys().find(|id| **id != leader).unwrap();
    cluster.down(behind).await;
    cluster.register(5..80).await;
    let leader = cluster.leader().await;
    until("the log is purged", || cluster.nodes[&leader].0.status().purged > 15).await;
    // It even lost its disk.
    fs::remove_dir_all(cluster.dir(behind)).unwrap();
    cluster.up(behind).await;
    cluster.agree(&(1..80).collect::<Vec<_>>()).await;
    cluster.register(80..90).await;
    cluster.agree(&(1..90).collect::<Vec<_>>()).await;
    cluster.down(behind).await;
    cluster.up(behind).await;
    cluster.agree(&(1..90).collect::<Vec<_>>()).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_masters_on_simulated_storage_agree_after_each_was_restarted() {
    let mut cluster = Cluster::start(15, true).await;
    let leader = cluster.leader().await;
    init(&cluster.nodes[&leader].0).await;
    for round in 0..3_u64 {
        cluster.register(round * 10 + 1..round * 10 + 11).await;
        cluster.down(round + 1).await;
        cluster.register(round * 10 + 101..round * 10 + 111).await;
        cluster.up(round + 1).await;
    }
    cluster.agree(&(1..31).chain(101..131).collect::<Vec<_>>()).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_started_again_in_its_term_knows_all_that_it_acknowledged_when_it_says_that_it_leads()
 {
    let mut cluster = Cluster::start(1_000_000, false).await;
    init(&cluster.nodes[&cluster.leader().await].0).await;
    cluster.register(1..60).await;
    let leader = cluster.leader().await;
    // Without the others it can hand over to nobody.
    for id in (1..=3).filter(|id| *id != leader) {
        cluster.down(id).await;
    }
    cluster.down(leader).await;
    // Its state has to be made again from the log.
    remove_state(&cluster.dir(leader));
    for id in [leader].into_iter().chain((1..=3).filter(|id| *id != leader)) {
        cluster.up(id).await;
    }
    let node = &cluster.nodes[&cluster.leader().await].0;
    assert_eq!(registered(&*node.kv()), (1..60).collect::<Vec<_>>());
    cluster.stop().await;
}
