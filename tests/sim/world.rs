//! The simulated cluster: three masters, four chunk daemons and two clients, on turmoil's network, from one seed.

use crate::checkers::{Watch, i7, whole};
use crate::chunks::{chunk_of, is_sealed};
use crate::disk::{Losses, SimDisk};
use crate::env::env;
use crate::faults::{Fault, Plan};
use crate::seeds::Report;
use crate::workload::{Model, Violation, Workload, verify_dir};
use dfs_client::{Client, ClientConfig};
use dfs_env::Disk;
use dfs_master::raft::{SimStorage, Storage};
use dfs_proto::InodeNo;
use dfs_proto::token::ClusterKey;
use dfs_proto::units::ByteSize;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
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
/// How long a crash of a chunk daemon waits for unsynced writes on its disk.
const AMBUSH: Duration = Duration::from_secs(4);
const THINK: Duration = Duration::from_millis(15);
const SESSION_TTL: Duration = Duration::from_secs(20);
/// How many times in a row, a tenth of a second apart, masters must be alike to be at rest; and how often it is looked.
const QUIET: u32 = 20;
const CATCH_UP: u32 = 600;
/// Seconds until everything must be whole again.
const HEALED: u32 = 150;
/// When every world begins.
const EPOCH: Duration = Duration::from_secs(1_700_000_000);
const RUN_END: Duration = Duration::from_secs(300);

pub struct Machine {
    host: String,
    disk: SimDisk,
}

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

/// Runs one seed to its end.
pub fn run(seed: u64) -> Result<Report, Violation> {
    let mut sim = network(seed);
    let storages: Vec<Arc<SimStorage>> = (0..MASTERS).map(|_| SimStorage::new()).collect();
    for id in 1..=MASTERS {
        let storage = Arc::clone(&storages[usize::try_from(id - 1).expect("small")]);
        start_master(&mut sim, id, storage, seed, SESSION_TTL);
    }
    let machines = start_chunkds(&mut sim, seed);
    let progress = Arc::new(Mutex::new(Progress::default()));
    for id in 1..=CLIENTS {
        let disks: Vec<_> = disks(&machines).collect();
        start_client(&mut sim, id, seed, Arc::clone(&progress), storages.clone(), disks);
    }
    let clients: Vec<String> = (1..=CLIENTS).map(|id| format!("client-{id}")).collect();
    let mut plan = Plan::new(seed, &masters(), &hosts(&machines), &clients);
    let mut watch = Watch::new(storages, disks(&machines));
    let losses = drive(&mut sim, &mut plan, &machines, &mut watch, seed)?;
    let progress = progress.lock().expect("one thread");
    watch.at_end(&progress.acknowledged)?;
    if !plan.missing().is_empty() {
        return Err(format!("faults that never fired: {:?}", plan.missing()));
    }
    if progress.operations < 50 {
        return Err(format!("only {} operations were done", progress.operations));
    }
    let mut report = report(progress.operations, &plan, &(&progress.models, sim.elapsed()));
    report.insert("crash lost a write".to_owned(), losses.writes_lost);
    report.insert("crash tore a write".to_owned(), losses.writes_torn);
    report.insert("crash lost a name".to_owned(), losses.names_lost);
    report.insert("a bit flipped".to_owned(), losses.bits_flipped);
    Ok(report)
}

/// What a seed did, with a digest of what happened.
pub fn report(operations: u64, plan: &Plan, happened: &impl Debug) -> Report {
    let mut trace = DefaultHasher::new();
    format!("{happened:?}").hash(&mut trace);
    let faults = plan.fired().iter().map(|(fault, count)| ((*fault).to_owned(), *count));
    let all = [("operations".to_owned(), operations), ("trace".to_owned(), trace.finish())];
    all.into_iter().chain(faults).collect()
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

/// The names of machines.
pub fn hosts(machines: &[Machine]) -> Vec<String> {
    machines.iter().map(|machine| machine.host.clone()).collect()
}

/// Their disks.
pub fn disks(machines: &[Machine]) -> impl Iterator<Item = (String, SimDisk)> {
    machines.iter().map(|machine| (machine.host.clone(), machine.disk.clone()))
}

/// What the world is to a client.
pub fn client_env(id: u64, seed: u64) -> dfs_env::Env {
    env(&SimDisk::default(), seed ^ (id << 24))
}

/// All chunk daemons.
pub fn start_chunkds(sim: &mut turmoil::Sim<'_>, seed: u64) -> Vec<Machine> {
    (1..=CHUNKDS).map(|id| start_chunkd(sim, id, seed)).collect()
}

/// Steps the world until every client is done, bringing faults and healing them, and checking as it goes.
pub fn drive(
    sim: &mut turmoil::Sim<'_>,
    plan: &mut Plan,
    machines: &[Machine],
    watch: &mut Watch,
    seed: u64,
) -> Result<Losses, Violation> {
    let mut losses = Losses::default();
    let mut active: Option<(Fault, Duration)> = None;
    let mut armed: Option<(Fault, Duration)> = None;
    let mut next_check = Duration::ZERO;
    loop {
        let now = sim.elapsed();
        if let Some((fault, end)) = active.take() {
            if now < end {
                active = Some((fault, end));
            } else {
                heal(sim, &fault);
            }
        } else if armed.is_none() && now < FAULTS_END {
            armed = plan.due(now).map(|fault| (fault, now));
        }
        // A crash waits a moment for writes that it can lose.
        if active.is_none()
            && let Some((fault, since)) =
                armed.take_if(|(fault, since)| now >= *since + AMBUSH || hurts(fault, machines))
        {
            let lost =
                strike(sim, &fault, machines, watch, seed ^ u64::try_from(now.as_nanos()).expect("short"));
            losses += lost;
            tracing::debug!(waited = ?(now - since), "struck");
            let end = now + fault.pause();
            active = Some((fault, end));
        }
        if now >= next_check {
            watch.observe()?;
            next_check = now + Duration::from_secs(2);
        }
        if sim.step().map_err(|error| format!("after {now:?}: {error}"))? {
            return Ok(losses);
        }
    }
}

fn disk_of<'a>(machines: &'a [Machine], host: &str) -> Option<&'a SimDisk> {
    machines.iter().find(|machine| machine.host == host).map(|machine| &machine.disk)
}

/// Whether a fault strikes where it hurts now.
fn hurts(fault: &Fault, machines: &[Machine]) -> bool {
    match fault {
        Fault::Crash { host, .. } => disk_of(machines, host).is_none_or(SimDisk::is_dirty),
        Fault::Rot { host } => disk_of(machines, host).is_some_and(|disk| {
            disk.files().iter().any(|(path, bytes)| chunk_of(path).is_some() && is_sealed(bytes))
        }),
        Fault::Wipe { .. }
        | Fault::Partition { .. }
        | Fault::Loss { .. }
        | Fault::Failover { .. }
        | Fault::Stall { .. } => true,
    }
}

fn strike(
    sim: &mut turmoil::Sim<'_>,
    fault: &Fault,
    machines: &[Machine],
    watch: &mut Watch,
    seed: u64,
) -> Losses {
    tracing::info!(?fault, "fault");
    match fault {
        Fault::Crash { host, .. } => {
            sim.crash(host.as_str());
            return disk_of(machines, host).map(|disk| disk.crash(seed)).unwrap_or_default();
        }
        Fault::Wipe { host, .. } => {
            sim.crash(host.as_str());
            if let Some(disk) = disk_of(machines, host) {
                disk.wipe(Path::new("/data"));
            }
        }
        Fault::Rot { host } => {
            let sealed = |path: &Path, bytes: &[u8]| chunk_of(path).is_some() && is_sealed(bytes);
            let rotten = disk_of(machines, host).and_then(|disk| disk.rot(seed, sealed));
            if let Some(chunk) = rotten.as_deref().and_then(chunk_of) {
                watch.rotten(host, chunk);
                return Losses { bits_flipped: 1, ..Losses::default() };
            }
        }
        Fault::Partition { a, b, .. } => sim.partition(a.as_str(), b.as_str()),
        Fault::Loss { a, b, .. } => sim.set_link_fail_rate(a.as_str(), b.as_str(), 0.3),
        Fault::Failover { host, others, client, .. } => {
            sim.crash(host.as_str());
            others.iter().for_each(|other| sim.partition(client.as_str(), other.as_str()));
        }
        Fault::Stall { client, others, .. } => {
            others.iter().for_each(|other| sim.hold(client.as_str(), other.as_str()));
        }
    }
    Losses::default()
}

fn heal(sim: &mut turmoil::Sim<'_>, fault: &Fault) {
    match fault {
        Fault::Crash { host, .. } | Fault::Wipe { host, .. } => sim.bounce(host.as_str()),
        Fault::Rot { .. } => {}
        Fault::Partition { a, b, .. } => sim.repair(a.as_str(), b.as_str()),
        Fault::Loss { a, b, .. } => {
            sim.set_link_fail_rate(a.as_str(), b.as_str(), 0.0);
            sim.repair(a.as_str(), b.as_str());
        }
        Fault::Failover { host, others, client, .. } => {
            others.iter().for_each(|other| sim.repair(client.as_str(), other.as_str()));
            sim.bounce(host.as_str());
        }
        Fault::Stall { client, others, .. } => {
            others.iter().for_each(|other| sim.release(client.as_str(), other.as_str()));
        }
    }
}

/// One master.
pub fn start_master(
    sim: &mut turmoil::Sim<'_>,
    id: u64,
    storage: Arc<SimStorage>,
    seed: u64,
    session_ttl: Duration,
) {
    let env = env(&SimDisk::default(), seed ^ (id << 8));
    sim.host(format!("master-{id}"), move || {
        let (env, storage) = (env.clone(), Arc::clone(&storage));
        async move {
            let listen = format!("master-{id}:{MASTER_PORT}");
            let mut config = dfs_master::Config::new(id, &listen, Path::new("/data"), key());
            config.peers = (1..=MASTERS).zip(addresses()).collect();
            config.chunk_size = CHUNK_SIZE;
            // Snapshots and purges must happen within a short run.
            config.snapshot_every_entries = 200;
            config.session_ttl_ms = u64::try_from(session_ttl.as_millis()).expect("short");
            config.raft_heartbeat_ms = 100;
            config.raft_election_ms = 500;
            config.storage = Storage::Sim(storage);
            let _master = dfs_master::start(env, config).await?;
            std::future::pending::<()>().await;
            Ok(())
        }
    });
}

fn start_chunkd(sim: &mut turmoil::Sim<'_>, id: u64, seed: u64) -> Machine {
    let (host, disk) = (format!("chunkd-{id}"), SimDisk::default());
    disk.replace(Path::new("/etc/key"), KEY).expect("an empty disk takes a file");
    let env = env(&disk, seed ^ (id << 16));
    let name = host.clone();
    sim.host(host.as_str(), move || {
        let (env, name) = (env.clone(), name.clone());
        async move {
            let config = dfs_chunkd::Config {
                listen: format!("{name}:{CHUNKD_PORT}"),
                advertise: Some(format!("{name}:{CHUNKD_PORT}")),
                masters: addresses(),
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
    Machine { host, disk }
}

/// Waits until all masters have applied the same entries, and no more come.
async fn rest(masters: &[Arc<SimStorage>]) -> Result<(), Violation> {
    let mut alike = 0;
    for _ in 0..CATCH_UP {
        tokio::time::sleep(Duration::from_millis(100)).await;
        alike = if i7::alike(masters)? { alike + 1 } else { 0 };
        if alike == QUIET {
            return Ok(());
        }
    }
    Err(format!("after {CATCH_UP} tenths of a second the masters are not at rest"))
}

/// Waits until everything that faults took has been made up for: a dead daemon is given up after some time, and a scrub finds
/// bits that flipped.
async fn healed(masters: &[Arc<SimStorage>], disks: &[(String, SimDisk)]) -> Result<(), Violation> {
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
    masters: Vec<Arc<SimStorage>>,
    disks: Vec<(String, SimDisk)>,
) {
    let env = client_env(id, seed);
    sim.client(format!("client-{id}"), async move {
        let config = ClientConfig {
            name: format!("client-{id}"),
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
}
