//! The simulated cluster: three masters, four chunk daemons and two clients, on turmoil's network, from one seed.

use crate::checkers::{Watch, i7, whole};
use crate::disk::SimDisk;
use crate::env::{Clocks, env};
use crate::faults::Plan;
use crate::ghost;
use crate::seeds::Report;
use crate::strikes::{self, Cluster, Machine, Master};
use crate::workload::{Model, Violation, Workload, verify_dir};
use dfs_client::{Client, ClientConfig};
use dfs_env::Disk;
use dfs_master::raft::{SimStorage, Storage};
use dfs_proto::InodeNo;
use dfs_proto::token::ClusterKey;
use dfs_proto::units::ByteSize;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

const MASTERS: u64 = 3;
const CHUNKDS: u64 = 4;
const CLIENTS: u64 = 2;
const MASTER_PORT: u16 = 7100;
const CHUNKD_PORT: u16 = 7200;
/// Small chunks, so that many are sealed in a short run; larger than a record, so that crashes find some in the middle.
const CHUNK_SIZE: u64 = 3 << 19;
/// Faults stop here; what follows must be quiet and whole.
pub const FAULTS_END: Duration = Duration::from_secs(25);
/// How often a daemon came by at a leader that was replaced, and how often two masters' states were compared.
pub const OLD_LEADER: &str = "an old leader was met";
pub const COMPARED: &str = "states compared";
pub const COMPACTED: &str = "a chunk was compacted";
const THINK: Duration = Duration::from_millis(15);
/// Compaction must happen within a short run, too.
const COMPACT_AFTER_MS: u64 = 1_000;
const SESSION_TTL: Duration = Duration::from_secs(20);
/// How many times in a row, a tenth of a second apart, masters must be alike to be at rest; and how often it is looked.
const QUIET: u32 = 20;
const CATCH_UP: u32 = 600;
/// Seconds until everything must be whole again.
const HEALED: u32 = 150;
/// When every world begins.
const EPOCH: Duration = Duration::from_secs(1_700_000_000);
const RUN_END: Duration = Duration::from_secs(300);

#[derive(Default)]
struct Progress {
    operations: u64,
    models: Vec<(String, Model)>,
    /// Of each directory, how many changes of its names.
    acknowledged: BTreeMap<InodeNo, u64>,
    finished: u64,
}

const KEY: &[u8] = b"a key for simulated clusters";

fn key() -> ClusterKey {
    ClusterKey::new(KEY).expect("long enough")
}

pub fn masters() -> Vec<String> {
    (1..=MASTERS).map(|id| format!("master-{id}")).collect()
}

pub fn addresses() -> Vec<String> {
    masters().iter().map(|host| format!("{host}:{MASTER_PORT}")).collect()
}

/// What makes the faults of a seed, from masters, chunk daemons and clients.
pub type Faults = fn(u64, &[String], &[String], &[String]) -> Plan;

/// Runs one seed to its end.
pub fn run(seed: u64, faults: Faults) -> Result<Report, Violation> {
    let mut sim = network(seed);
    let mut cluster = start_cluster(&mut sim, seed, SESSION_TTL);
    let progress = Arc::new(Mutex::new(Progress::default()));
    for id in 1..=CLIENTS {
        let clocks = start_client(&mut sim, id, seed, Arc::clone(&progress), &cluster);
        cluster.clients.push((client_name(id), clocks));
    }
    let clients: Vec<String> = (1..=CLIENTS).map(client_name).collect();
    let mut plan = faults(seed, &masters(), &cluster.chunkds(), &clients);
    let mut watch = Watch::new(cluster.storages(), cluster.disks());
    let damage = strikes::drive(&mut sim, &mut plan, &cluster, &mut watch, seed)?;
    let progress = progress.lock().expect("one thread");
    watch.at_end(&progress.acknowledged)?;
    if progress.operations < 50 {
        return Err(format!("only {} operations were done", progress.operations));
    }
    let mut report = report(progress.operations, &plan, &(&progress.models, sim.elapsed()));
    report.extend(damage.0.into_iter().map(|(what, count)| (what.to_owned(), count)));
    report.insert(OLD_LEADER.to_owned(), cluster.greeted.load(Ordering::Relaxed));
    report.insert(COMPARED.to_owned(), watch.compared());
    report.insert(COMPACTED.to_owned(), watch.compacted());
    Ok(report)
}

/// Masters and chunk daemons, running, and no clients yet.
pub fn start_cluster(sim: &mut turmoil::Sim<'_>, seed: u64, session_ttl: Duration) -> Cluster {
    let masters = (1..=MASTERS).map(|id| start_master(sim, id, seed, session_ttl)).collect();
    let machines = (1..=CHUNKDS).map(|id| start_chunkd(sim, id, seed)).collect();
    let greeted = Arc::new(AtomicU64::new(0));
    ghost::start(sim, MASTER_PORT, Arc::clone(&greeted));
    Cluster { masters, machines, clients: Vec::new(), greeted }
}

/// A client's machine.
pub fn client_name(id: u64) -> String {
    format!("client-{id}")
}

/// What a seed did, with a digest of what happened.
pub fn report(operations: u64, plan: &Plan, happened: &impl Hash) -> Report {
    let faults = plan.fired().iter().map(|(fault, count)| ((*fault).to_owned(), *count));
    let all = [("operations".to_owned(), operations), ("trace".to_owned(), digest(happened))];
    all.into_iter().chain(faults).collect()
}

/// A digest of what happened.
pub fn digest(happened: &impl Hash) -> u64 {
    let mut trace = DefaultHasher::new();
    happened.hash(&mut trace);
    trace.finish()
}

/// The network, and the order of everything, from a seed.
pub fn network<'a>(seed: u64) -> turmoil::Sim<'a> {
    turmoil::Builder::new()
        .rng_seed(seed)
        // Not that of this machine, which is another every time.
        .epoch(SystemTime::UNIX_EPOCH + EPOCH)
        .enable_random_order()
        .tick_duration(Duration::from_millis(1))
        .simulation_duration(RUN_END)
        .min_message_latency(Duration::from_micros(100))
        .max_message_latency(Duration::from_millis(5))
        .tcp_capacity(1 << 16)
        .build()
}

/// What the world is to a client.
pub fn client_env(id: u64, seed: u64) -> (dfs_env::Env, Arc<Clocks>) {
    let clocks = Clocks::new(seed ^ (id << 24));
    (env(&SimDisk::default(), &clocks, seed ^ (id << 24)), clocks)
}

/// One master.
fn start_master(sim: &mut turmoil::Sim<'_>, id: u64, seed: u64, session_ttl: Duration) -> Master {
    // In every third world a sync takes no time: then more is done.
    let storage = SimStorage::with_sync_time(Duration::from_millis(seed % 3));
    let clocks = Clocks::new(seed ^ (id << 8));
    let env = env(&SimDisk::default(), &clocks, seed ^ (id << 8));
    let host = format!("master-{id}");
    let kept = Arc::clone(&storage);
    sim.host(host.as_str(), move || {
        let (env, storage) = (env.clone(), Arc::clone(&kept));
        async move {
            let listen = format!("master-{id}:{MASTER_PORT}");
            let mut config = dfs_master::Config::new(id, &listen, Path::new("/data"), key());
            config.peers = (1..=MASTERS).zip(addresses()).collect();
            config.chunk_size = CHUNK_SIZE;
            // Snapshots and purges must happen within a short run.
            config.snapshot_every_entries = 200;
            config.compact_after_ms = COMPACT_AFTER_MS;
            config.session_ttl_ms = u64::try_from(session_ttl.as_millis()).expect("short");
            config.raft_heartbeat_ms = 100;
            config.raft_election_ms = 500;
            config.storage = Storage::Sim(storage);
            let _master = dfs_master::start(env, config).await?;
            std::future::pending::<()>().await;
            Ok(())
        }
    });
    Master { host, storage, clocks }
}

fn start_chunkd(sim: &mut turmoil::Sim<'_>, id: u64, seed: u64) -> Machine {
    let (host, disk) = (format!("chunkd-{id}"), SimDisk::default());
    disk.replace(Path::new("/etc/key"), KEY).expect("an empty disk takes a file");
    let clocks = Clocks::new(seed ^ (id << 16));
    let env = env(&disk, &clocks, seed ^ (id << 16));
    let name = host.clone();
    sim.host(host.as_str(), move || {
        let (env, name) = (env.clone(), name.clone());
        async move {
            let config = dfs_chunkd::Config {
                listen: format!("{name}:{CHUNKD_PORT}"),
                advertise: Some(format!("{name}:{CHUNKD_PORT}")),
                masters: addresses().into_iter().chain([format!("{}:{MASTER_PORT}", ghost::HOST)]).collect(),
                data: vec!["/data".into()],
                cluster_key_file: "/etc/key".into(),
                host: Some(name),
                rack: String::new(),
                capacity: None,
                reserve: ByteSize(0),
                scrub_bandwidth: ByteSize(16 << 20),
            };
            let _daemon = dfs_chunkd::Daemon::start(env, config).await?;
            std::future::pending::<()>().await;
            Ok(())
        }
    });
    Machine { host, disk, clocks }
}

/// Waits until all masters have applied the same entries, and no more come; then they must have the same state. Compared at that
/// moment: a chunk may be compacted in the very next one.
pub async fn rest(masters: &[Arc<SimStorage>]) -> Result<(), Violation> {
    let mut alike = 0;
    for _ in 0..CATCH_UP {
        tokio::time::sleep(Duration::from_millis(100)).await;
        alike = if i7::alike(masters)? { alike + 1 } else { 0 };
        if alike == QUIET {
            return i7::check(masters);
        }
    }
    Err(format!("after {CATCH_UP} tenths of a second the masters are not at rest"))
}

/// Waits until everything that faults took has been made up for: a dead daemon is given up after some time, and a scrub finds
/// bits that flipped.
pub async fn healed(masters: &[Arc<SimStorage>], disks: &[(String, SimDisk)]) -> Result<(), Violation> {
    let mut left = Ok(());
    for _ in 0..HEALED {
        // They need not be alike: the checkers of the end look at all of them.
        left = masters.iter().try_for_each(|master| whole::check(master, disks));
        if left.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    left.map_err(|what| format!("after {HEALED} seconds: {what}"))
}

fn start_client(
    sim: &mut turmoil::Sim<'_>,
    id: u64,
    seed: u64,
    progress: Arc<Mutex<Progress>>,
    cluster: &Cluster,
) -> Arc<Clocks> {
    let (env, clocks) = client_env(id, seed);
    let (masters, disks) = (cluster.storages(), cluster.disks().collect::<Vec<_>>());
    sim.client(client_name(id), async move {
        let config = ClientConfig {
            name: client_name(id),
            connect_timeout: Duration::from_secs(60),
            ..ClientConfig::new(addresses())
        };
        let client = Client::connect(env, config).await?;
        let name = format!("dir-{id}");
        let mut workload = Workload::new(client.clone(), &name, seed ^ id).await?;
        while turmoil::sim_elapsed().expect("in the simulation") < FAULTS_END + Duration::from_secs(5) {
            workload.step().await.map_err(|violation| format!("{name}: {violation}"))?;
            // A program thinks between two operations; without this a run is thousands of them and takes minutes.
            tokio::time::sleep(THINK).await;
        }
        {
            let mut progress = progress.lock().expect("one thread");
            progress.operations += workload.done;
            let (dir, changes) = workload.name_changes();
            progress.acknowledged.insert(dir, changes);
            progress.models.push((name, workload.into_model()));
            progress.finished += 1;
        }
        // Both clients are done: each must see what the other did.
        while progress.lock().expect("one thread").finished < CLIENTS {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let models = progress.lock().expect("one thread").models.clone();
        for (name, model) in &models {
            verify_dir(&client, name, model)
                .await
                .map_err(|violation| format!("client-{id} in {name}: {violation}"))?;
        }
        client.shutdown().await?;
        healed(&masters, &disks).await?;
        rest(&masters).await?;
        Ok(())
    });
    clocks
}
