//! Carries out what the plan of faults says, on machines, disks and links, and undoes it.

use crate::checkers::Watch;
use crate::chunks::{chunk_of, is_sealed};
use crate::disk::{Losses, SimDisk};
use crate::env::Clocks;
use crate::faults::{Fault, Plan};
use crate::workload::Violation;
use crate::world::FAULTS_END;
use dfs_master::raft::SimStorage;
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// How long a crash of a chunk daemon waits for unsynced writes on its disk.
const AMBUSH: Duration = Duration::from_secs(4);
/// How long after it has found some it strikes, at most, in milliseconds.
const SURPRISE_MS: u64 = 40;
/// How slow slow disks are, in milliseconds.
const SLOW_MS: std::ops::Range<u64> = 20..400;
/// How often the invariants are looked at.
const OBSERVED_EVERY: Duration = Duration::from_secs(2);

/// One master's machine.
pub struct Master {
    pub host: String,
    pub storage: Arc<SimStorage>,
    pub clocks: Arc<Clocks>,
}

/// One chunk daemon's machine.
pub struct Machine {
    pub host: String,
    pub disk: SimDisk,
    pub clocks: Arc<Clocks>,
}

/// What faults befall.
pub struct Cluster {
    pub masters: Vec<Master>,
    pub machines: Vec<Machine>,
    pub clients: Vec<(String, Arc<Clocks>)>,
    /// How many daemons came to the leader that was replaced.
    pub greeted: Arc<AtomicU64>,
}

impl Cluster {
    pub fn storages(&self) -> Vec<Arc<SimStorage>> {
        self.masters.iter().map(|master| Arc::clone(&master.storage)).collect()
    }

    /// The disks of the chunk daemons.
    pub fn disks(&self) -> impl Iterator<Item = (String, SimDisk)> {
        self.machines.iter().map(|machine| (machine.host.clone(), machine.disk.clone()))
    }

    pub fn chunkds(&self) -> Vec<String> {
        self.machines.iter().map(|machine| machine.host.clone()).collect()
    }

    fn disk(&self, host: &str) -> Option<&SimDisk> {
        self.machines.iter().find(|machine| machine.host == host).map(|machine| &machine.disk)
    }

    fn storage(&self, host: &str) -> Option<&SimStorage> {
        self.masters.iter().find(|master| master.host == host).map(|master| &*master.storage)
    }

    fn clocks(&self, host: &str) -> Option<&Clocks> {
        let masters = self.masters.iter().map(|master| (&master.host, &master.clocks));
        let machines = self.machines.iter().map(|machine| (&machine.host, &machine.clocks));
        let clients = self.clients.iter().map(|(host, clocks)| (host, clocks));
        masters.chain(machines).chain(clients).find(|(other, _)| *other == host).map(|(_, clocks)| &**clocks)
    }
}

/// What came of faults: what, and how often.
#[derive(Default)]
pub struct Damage(pub BTreeMap<&'static str, u64>);

/// What many seeds together must have done, or they tested nothing.
pub const MUST: [&str; 9] = [
    "crash lost a write",
    "crash tore a write",
    "crash lost a name",
    "crash lost a log entry",
    "crash lost a state",
    "a bit flipped",
    "a snapshot was damaged",
    "a full disk refused a write",
    "everything lost its power",
];

impl Damage {
    fn count(&mut self, what: &'static str, times: u64) {
        *self.0.entry(what).or_default() += times;
    }

    fn crash(&mut self, lost: Losses) {
        self.count("crash lost a write", lost.writes_lost);
        self.count("crash tore a write", lost.writes_torn);
        self.count("crash lost a name", lost.names_lost);
    }
}

/// Steps the world until every client is done, bringing faults and healing them, and checking as it goes.
pub fn drive(
    sim: &mut turmoil::Sim<'_>,
    plan: &mut Plan,
    cluster: &Cluster,
    watch: &mut Watch,
    seed: u64,
) -> Result<Damage, Violation> {
    let mut striker = Striker { cluster, random: SmallRng::seed_from_u64(!seed), damage: Damage::default() };
    let mut active: Option<(Fault, Duration)> = None;
    let mut armed: Option<(Fault, Duration, Duration)> = None;
    let mut next_check = Duration::ZERO;
    loop {
        let now = sim.elapsed();
        if let Some((fault, _)) = active.take_if(|(_, end)| now >= *end) {
            striker.heal(sim, &fault);
        } else if active.is_none() && armed.is_none() && now < FAULTS_END {
            armed = plan.due(now).map(|fault| (fault, now + AMBUSH, Duration::MAX));
            if let Some((fault, ..)) = &armed {
                striker.prepare(fault);
            }
        }
        // A crash waits for writes that it can lose, and then for a moment.
        if let Some((fault, latest, at)) = &mut armed
            && *at == Duration::MAX
            && (now >= *latest || striker.hurts(fault))
        {
            *at = now + striker.surprise(fault);
        }
        if let Some((fault, ..)) = armed.take_if(|(_, _, at)| now >= *at) {
            striker.strike(sim, &fault, watch)?;
            let end = now + fault.pause();
            active = Some((fault, end));
            // What is on the disks now is all there is.
            watch.observe()?;
        }
        if now >= next_check {
            watch.observe()?;
            next_check = now + OBSERVED_EVERY;
        }
        if sim.step().map_err(|error| format!("after {now:?}: {error}"))? {
            return Ok(striker.damage);
        }
    }
}

/// Cuts the power of everything that these machines are: all forget what was not synced.
pub fn cut_power(
    sim: &mut turmoil::Sim<'_>,
    cluster: &Cluster,
    random: &mut SmallRng,
    damage: &mut Damage,
) -> Result<(), Violation> {
    for master in &cluster.masters {
        sim.crash(master.host.as_str());
        crash_master(&master.storage, random, damage)?;
    }
    for machine in &cluster.machines {
        sim.crash(machine.host.as_str());
        damage.crash(machine.disk.crash(random.next_u64()));
    }
    damage.count("everything lost its power", 1);
    Ok(())
}

/// Starts everything again.
pub fn restore_power(sim: &mut turmoil::Sim<'_>, cluster: &Cluster) {
    cluster.masters.iter().for_each(|master| sim.bounce(master.host.as_str()));
    cluster.machines.iter().for_each(|machine| sim.bounce(machine.host.as_str()));
}

fn crash_master(storage: &SimStorage, random: &mut SmallRng, damage: &mut Damage) -> Result<(), Violation> {
    let crashed = storage
        .crash(&mut || random.next_u64())
        .map_err(|error| format!("a simulated storage cannot be read: {error}"))?;
    damage.count("crash lost a log entry", crashed.entries_lost);
    damage.count("crash lost a state", u64::from(crashed.state_lost));
    Ok(())
}

struct Striker<'c> {
    cluster: &'c Cluster,
    random: SmallRng,
    damage: Damage,
}

impl Striker<'_> {
    /// Makes a machine as it is before some crashes: half of the time its disk is slow, so that much is under way.
    fn prepare(&mut self, fault: &Fault) {
        if let Fault::Crash { host, .. } = fault
            && self.random.next_u32().is_multiple_of(2)
        {
            self.slow_down(host, true);
        }
    }

    /// How long a fault waits once it would hurt.
    fn surprise(&mut self, fault: &Fault) -> Duration {
        match fault {
            Fault::Crash { .. } | Fault::PowerCut { .. } | Fault::Freeze { .. } => {
                Duration::from_micros(self.random.random_range(0..SURPRISE_MS * 1000))
            }
            _ => Duration::ZERO,
        }
    }

    /// Whether a fault strikes where it hurts now.
    fn hurts(&self, fault: &Fault) -> bool {
        let disk = |host: &str| self.cluster.disk(host);
        match fault {
            Fault::Crash { host, .. } | Fault::Freeze { host, .. } | Fault::LateAppends { host, .. } => {
                disk(host).is_none_or(SimDisk::is_dirty)
            }
            Fault::PowerCut { .. } => self.cluster.machines.iter().any(|machine| machine.disk.is_dirty()),
            Fault::Rot { host } => disk(host)
                .is_some_and(|disk| disk.any(|path, bytes| chunk_of(path).is_some() && is_sealed(bytes))),
            Fault::RotSnapshot { host, .. } => {
                self.cluster.storage(host).is_some_and(|storage| storage.snapshots_kept() > 1)
            }
            _ => true,
        }
    }

    fn strike(
        &mut self,
        sim: &mut turmoil::Sim<'_>,
        fault: &Fault,
        watch: &mut Watch,
    ) -> Result<(), Violation> {
        tracing::info!(?fault, "fault");
        match fault {
            Fault::Crash { host, .. } => {
                sim.crash(host.as_str());
                self.slow_down(host, false);
                if let Some(disk) = self.cluster.disk(host) {
                    self.damage.crash(disk.crash(self.random.next_u64()));
                }
                if let Some(storage) = self.cluster.storage(host) {
                    crash_master(storage, &mut self.random, &mut self.damage)?;
                }
            }
            Fault::RotSnapshot { host, .. } => {
                sim.crash(host.as_str());
                if let Some(storage) = self.cluster.storage(host) {
                    crash_master(storage, &mut self.random, &mut self.damage)?;
                    let random = &mut self.random;
                    let rotten = storage
                        .rot_snapshot(&mut || random.next_u64())
                        .map_err(|error| format!("a simulated storage cannot be read: {error}"))?;
                    self.damage.count("a snapshot was damaged", u64::from(rotten));
                }
            }
            Fault::PowerCut { .. } => cut_power(sim, self.cluster, &mut self.random, &mut self.damage)?,
            Fault::Wipe { host, .. } => {
                sim.crash(host.as_str());
                if let Some(disk) = self.cluster.disk(host) {
                    disk.wipe(Path::new("/data"));
                }
            }
            Fault::Rot { host } => {
                let sealed = |path: &Path, bytes: &_| chunk_of(path).is_some() && is_sealed(bytes);
                let rotten =
                    self.cluster.disk(host).and_then(|disk| disk.rot(self.random.next_u64(), sealed));
                if let Some(chunk) = rotten.as_deref().and_then(chunk_of) {
                    watch.rotten(host, chunk);
                    self.damage.count("a bit flipped", 1);
                }
            }
            Fault::Slow { host, .. } => self.slow_down(host, true),
            Fault::Full { host, .. } => drop(self.cluster.disk(host).map(|disk| disk.fill(true))),
            Fault::LogFails { host, .. } => {
                self.cluster.storage(host).iter().for_each(|storage| storage.fail_syncs(true));
            }
            Fault::ClockJump { host, by_ms } => {
                self.cluster.clocks(host).iter().for_each(|clocks| clocks.jump(*by_ms));
            }
            Fault::Partition { .. }
            | Fault::OneWay { .. }
            | Fault::Loss { .. }
            | Fault::Failover { .. }
            | Fault::Stall { .. }
            | Fault::Freeze { .. }
            | Fault::LateAppends { .. } => self.strike_links(sim, fault),
        }
        Ok(())
    }

    fn strike_links(&self, sim: &mut turmoil::Sim<'_>, fault: &Fault) {
        match fault {
            Fault::Partition { a, b, .. } => sim.partition(a.as_str(), b.as_str()),
            Fault::OneWay { from, to, .. } => sim.partition_oneway(from.as_str(), to.as_str()),
            Fault::Loss { a, b, .. } => sim.set_link_fail_rate(a.as_str(), b.as_str(), 0.3),
            Fault::Failover { host, others, client, .. } => {
                sim.crash(host.as_str());
                others.iter().for_each(|other| sim.partition(client.as_str(), other.as_str()));
            }
            Fault::Stall { client: host, others, .. } | Fault::Freeze { host, others, .. } => {
                others.iter().for_each(|other| sim.hold(host.as_str(), other.as_str()));
            }
            Fault::LateAppends { host, peers, deaf, masters, .. } => {
                peers.iter().for_each(|peer| sim.hold(host.as_str(), peer.as_str()));
                masters.iter().for_each(|master| sim.partition(deaf.as_str(), master.as_str()));
            }
            _ => {}
        }
    }

    fn slow_down(&mut self, host: &str, slow: bool) {
        let lag =
            if slow { Duration::from_millis(self.random.random_range(SLOW_MS)) } else { Duration::ZERO };
        if let Some(disk) = self.cluster.disk(host) {
            disk.slow_down(lag);
        }
        if let Some(storage) = self.cluster.storage(host) {
            storage.set_sync_time(lag);
        }
    }

    fn heal(&mut self, sim: &mut turmoil::Sim<'_>, fault: &Fault) {
        tracing::info!(?fault, "healed");
        match fault {
            Fault::Crash { host, .. } | Fault::Wipe { host, .. } | Fault::RotSnapshot { host, .. } => {
                sim.bounce(host.as_str());
            }
            Fault::PowerCut { .. } => restore_power(sim, self.cluster),
            Fault::Rot { .. } | Fault::ClockJump { .. } => {}
            Fault::Slow { host, .. } => self.slow_down(host, false),
            Fault::Full { host, .. } => {
                let refused = self.cluster.disk(host).map_or(0, |disk| disk.fill(false));
                self.damage.count("a full disk refused a write", refused);
            }
            Fault::LogFails { host, .. } => {
                self.cluster.storage(host).iter().for_each(|storage| storage.fail_syncs(false));
                sim.bounce(host.as_str());
            }
            Fault::Partition { a, b, .. } => sim.repair(a.as_str(), b.as_str()),
            Fault::OneWay { from, to, .. } => sim.repair_oneway(from.as_str(), to.as_str()),
            Fault::Loss { a, b, .. } => {
                sim.set_link_fail_rate(a.as_str(), b.as_str(), 0.0);
                sim.repair(a.as_str(), b.as_str());
            }
            Fault::Failover { host, others, client, .. } => {
                others.iter().for_each(|other| sim.repair(client.as_str(), other.as_str()));
                sim.bounce(host.as_str());
            }
            Fault::Stall { client: host, others, .. } | Fault::Freeze { host, others, .. } => {
                others.iter().for_each(|other| sim.release(host.as_str(), other.as_str()));
            }
            Fault::LateAppends { host, peers, deaf, masters, .. } => {
                peers.iter().for_each(|peer| sim.release(host.as_str(), peer.as_str()));
                masters.iter().for_each(|master| sim.repair(deaf.as_str(), master.as_str()));
            }
        }
    }
}
