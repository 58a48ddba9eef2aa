//! The power of everything goes, clients included, again and again at random moments, and all machines forget what was not
//! synced. Whatever was acknowledged must be there afterwards: every name, and every byte that was fsynced (I8).

use crate::checkers::Watch;
use crate::env::Clocks;
use crate::seeds::Report;
use crate::strikes::{self, Cluster, Damage};
use crate::workload::{Violation, list, read_whole};
use crate::world;
use dfs_client::{Client, ClientConfig, OpenFlags, Privileges};
use dfs_proto::error::ErrorCode;
use dfs_proto::v1::{Create, Cred, Kind};
use dfs_proto::{FsResult, InodeNo};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a power cut waits for something to lose.
const AMBUSH: Duration = Duration::from_secs(3);
/// How long a call of a disk takes at most, in milliseconds: what is under way when the power goes.
const LAG_MS: u64 = 25;
/// Power cuts in one world.
const CUTS: u64 = 8;
const CLIENTS: u64 = 2;
const FILES_MAX: usize = 8;
const THINK: Duration = Duration::from_millis(10);
/// Sessions of clients that died end soon.
const SESSION_TTL: Duration = Duration::from_secs(4);
/// How long everything has been up, and everybody has found what must be there, when the power goes again; in milliseconds.
const UP_MS: std::ops::Range<u64> = 0..2_500;
/// How long it stays dark.
const DARK_MS: std::ops::Range<u64> = 50..1_500;

/// A file as it may be after a crash.
#[derive(Clone, Debug, Default, Hash)]
struct File {
    /// As it was fsynced last.
    base: Vec<u8>,
    /// What was written since, and may be there or not.
    later: Vec<(usize, Vec<u8>)>,
}

impl File {
    fn synced(&mut self) {
        for (offset, bytes) in std::mem::take(&mut self.later) {
            let end = offset + bytes.len();
            if self.base.len() < end {
                self.base.resize(end, 0);
            }
            self.base[offset..end].copy_from_slice(&bytes);
        }
    }

    fn end(&self) -> usize {
        let ends = self.later.iter().map(|(offset, bytes)| offset + bytes.len());
        ends.chain([self.base.len()]).max().unwrap_or_default()
    }

    /// Whether a file may read like this.
    fn check(&self, seen: &[u8]) -> Result<(), String> {
        if seen.len() < self.base.len() || seen.len() > self.end() {
            return Err(format!("{} bytes, {} to {} expected", seen.len(), self.base.len(), self.end()));
        }
        let may = |at: usize, byte: u8| {
            let later = |(offset, bytes): &(usize, Vec<u8>)| {
                at.checked_sub(*offset).and_then(|at| bytes.get(at)) == Some(&byte)
            };
            // Beyond the end that was synced, a hole that a later write left.
            self.base.get(at).copied().unwrap_or(0) == byte || self.later.iter().any(later)
        };
        match (0..seen.len()).find(|at| !may(*at, seen[*at])) {
            Some(at) => Err(format!("byte {at} of {} is none that was ever written there", seen.len())),
            None => Ok(()),
        }
    }
}

/// What a change under way may have done to the names.
#[derive(Clone, Debug, Hash)]
enum Doubt {
    Create(String),
    Unlink(String),
    Rename(String, String),
}

/// What a client knows of its directory. It outlives the client.
#[derive(Debug, Default, Hash)]
struct Dir {
    files: BTreeMap<String, File>,
    doubt: Option<Doubt>,
    names: u64,
    operations: u64,
    syncs: u64,
    /// Since the last power cut it has found all that must be there.
    verified: bool,
    /// It has ended.
    left: bool,
}

#[derive(Default)]
struct Shared {
    dirs: [Dir; CLIENTS as usize],
    over: bool,
}

type State = Arc<Mutex<Shared>>;

/// Runs one seed to its end.
pub fn run(seed: u64) -> Result<Report, Violation> {
    let mut sim = world::network(seed);
    let mut cluster = world::start_cluster(&mut sim, seed, SESSION_TTL);
    let state = State::default();
    for id in 1..=CLIENTS {
        let clocks = start_client(&mut sim, id, seed, Arc::clone(&state));
        cluster.clients.push((world::client_name(id), clocks));
    }
    start_auditor(&mut sim, seed, Arc::clone(&state), &cluster);
    let mut watch = Watch::new(cluster.storages(), cluster.disks());
    let (damage, cuts) = drive(&mut sim, &cluster, &mut watch, &state, seed)?;
    watch.at_end(&BTreeMap::new())?;
    let state = state.lock().expect("one thread");
    let sum = |what: fn(&Dir) -> u64| state.dirs.iter().map(what).sum::<u64>();
    let (operations, syncs) = (sum(|dir| dir.operations), sum(|dir| dir.syncs));
    if syncs < 20 {
        return Err(format!("only {syncs} files were synced"));
    }
    let mut report: Report = damage.0.into_iter().map(|(what, count)| (what.to_owned(), count)).collect();
    report.insert("operations".to_owned(), operations);
    report.insert("files synced".to_owned(), syncs);
    report.insert("power cuts survived".to_owned(), cuts);
    report.insert("trace".to_owned(), world::digest(&(&state.dirs, sim.elapsed())));
    Ok(report)
}

fn drive(
    sim: &mut turmoil::Sim<'_>,
    cluster: &Cluster,
    watch: &mut Watch,
    state: &State,
    seed: u64,
) -> Result<(Damage, u64), Violation> {
    let mut random = SmallRng::seed_from_u64(!seed);
    for machine in &cluster.machines {
        machine.disk.slow_down(Duration::from_millis(random.random_range(0..=LAG_MS)));
    }
    for master in &cluster.masters {
        master.storage.set_sync_time(Duration::from_millis(random.random_range(0..=LAG_MS)));
    }
    let (mut damage, mut cuts) = (Damage::default(), 0);
    let (mut next_cut, mut up_again): (Option<Duration>, Option<Duration>) = (None, None);
    let hosts: Vec<&str> = cluster.clients.iter().map(|(host, _)| host.as_str()).collect();
    loop {
        let now = sim.elapsed();
        if up_again.take_if(|up| now >= *up).is_some() {
            strikes::restore_power(sim, cluster);
            hosts.iter().for_each(|host| sim.bounce(*host));
        }
        let verified = state.lock().expect("one thread").dirs.iter().all(|dir| dir.verified);
        if verified && next_cut.is_none() {
            if cuts == CUTS {
                state.lock().expect("one thread").over = true;
            }
            next_cut =
                Some(now + Duration::from_micros(random.random_range(UP_MS.start * 1000..UP_MS.end * 1000)));
        }
        // Half of the time it waits for the moment when there is something to lose.
        let ready = |cut: Duration| {
            let waits = cut.subsec_micros().is_multiple_of(2) && now < cut + AMBUSH;
            now >= cut && (!waits || cluster.machines.iter().any(|machine| machine.disk.is_dirty()))
        };
        if cuts < CUTS && next_cut.take_if(|cut| ready(*cut)).is_some() {
            hosts.iter().for_each(|host| sim.crash(*host));
            strikes::cut_power(sim, cluster, &mut random, &mut damage)?;
            watch.observe()?;
            cuts += 1;
            state.lock().expect("one thread").dirs.iter_mut().for_each(|dir| dir.verified = false);
            up_again = Some(now + Duration::from_millis(random.random_range(DARK_MS)));
        }
        if sim.step().map_err(|error| format!("after {now:?}, {cuts} power cuts: {error}"))? {
            return Ok((damage, cuts));
        }
    }
}

fn config(name: &str) -> ClientConfig {
    ClientConfig {
        name: name.to_owned(),
        connect_timeout: Duration::from_secs(60),
        ..ClientConfig::new(world::addresses())
    }
}

fn start_client(sim: &mut turmoil::Sim<'_>, id: u64, seed: u64, state: State) -> Arc<Clocks> {
    let (env, clocks) = world::client_env(id, seed);
    sim.host(world::client_name(id), move || {
        let (env, state) = (env.clone(), Arc::clone(&state));
        async move {
            let name = world::client_name(id);
            let client = Client::connect(env.clone(), config(&name)).await?;
            let mut worker = Worker::new(client, &name, id, env.random(), state).await?;
            worker.verify().await.map_err(|what| format!("{name}: {what}"))?;
            while !worker.state.lock().expect("one thread").over {
                worker.step().await.map_err(|what| format!("{name}: {what}"))?;
                tokio::time::sleep(THINK).await;
            }
            worker.client.shutdown().await?;
            worker.with(|dir| {
                dir.files.values_mut().for_each(File::synced);
                dir.left = true;
            });
            Ok(())
        }
    });
    clocks
}

/// Waits for the last power cut to be over, looks at everything, and then waits until all is whole.
fn start_auditor(sim: &mut turmoil::Sim<'_>, seed: u64, state: State, cluster: &Cluster) {
    let (env, _) = world::client_env(CLIENTS + 1, seed);
    let (masters, disks) = (cluster.storages(), cluster.disks().collect::<Vec<_>>());
    sim.client("auditor", async move {
        while !state.lock().expect("one thread").dirs.iter().all(|dir| dir.left) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let client = Client::connect(env, config("auditor")).await?;
        for id in 1..=CLIENTS {
            let name = world::client_name(id);
            let mut worker = Worker::new(client.clone(), &name, id, seed, Arc::clone(&state)).await?;
            worker.verify().await.map_err(|what| format!("the auditor in {name}: {what}"))?;
        }
        client.shutdown().await?;
        world::healed(&masters, &disks).await?;
        world::rest(&masters).await?;
        Ok(())
    });
}

struct Worker {
    client: Client,
    cred: Cred,
    dir: InodeNo,
    index: usize,
    random: SmallRng,
    state: State,
}

fn during<T>(what: &str, result: FsResult<T>) -> Result<T, Violation> {
    result.map_err(|error| format!("{what} failed: {error}"))
}

impl Worker {
    async fn new(client: Client, name: &str, id: u64, seed: u64, state: State) -> Result<Self, Violation> {
        let cred = Cred::default();
        let create = Create {
            parent: InodeNo::ROOT.get(),
            name: name.as_bytes().to_vec().into(),
            kind: Kind::Dir.into(),
            mode: 0o755,
            exclusive: true,
            ..Create::default()
        };
        let dir = match client.create(&cred, create).await {
            Err(error) if error.code == ErrorCode::ErrorExists => {
                during("lookup", client.lookup(&cred, InodeNo::ROOT, name.as_bytes()).await)?.ino
            }
            made => during("mkdir", made)?.attr.ino,
        };
        let index = usize::try_from(id - 1).expect("few");
        let random = SmallRng::seed_from_u64(seed ^ id);
        Ok(Self { client, cred, dir: InodeNo(dir), index, random, state })
    }

    fn with<T>(&self, what: impl FnOnce(&mut Dir) -> T) -> T {
        what(&mut self.state.lock().expect("one thread").dirs[self.index])
    }

    /// Compares everything with what must be there, and goes on from what is.
    async fn verify(&mut self) -> Result<(), Violation> {
        let names = list(&self.client, self.dir).await?;
        self.with(|dir| {
            let there = |name: &String| names.contains(name);
            match dir.doubt.take() {
                Some(Doubt::Create(name)) if there(&name) => drop(dir.files.insert(name, File::default())),
                Some(Doubt::Unlink(name)) if !there(&name) => drop(dir.files.remove(&name)),
                Some(Doubt::Rename(from, to)) if there(&to) => {
                    let file = dir.files.remove(&from).unwrap_or_default();
                    dir.files.insert(to, file);
                }
                _ => {}
            }
            if names.iter().eq(dir.files.keys()) {
                Ok(())
            } else {
                Err(format!("lists {names:?}, expected {:?}", dir.files.keys().collect::<Vec<_>>()))
            }
        })?;
        for name in names {
            let seen = read_whole(&self.client, &self.cred, self.dir, &name).await?;
            self.with(|dir| {
                let file = dir.files.entry(name.clone()).or_default();
                file.check(&seen).map_err(|what| format!("{name}: {what}"))?;
                *file = File { base: seen, later: Vec::new() };
                Ok::<_, Violation>(())
            })?;
        }
        self.with(|dir| dir.verified = true);
        Ok(())
    }

    async fn step(&mut self) -> Result<(), Violation> {
        let names: Vec<String> = self.with(|dir| dir.files.keys().cloned().collect());
        let known = (!names.is_empty()).then(|| names[self.random.random_range(0..names.len())].clone());
        match (self.random.random_range(0..10), known) {
            (0, Some(name)) => self.unlink(name).await?,
            (1, Some(name)) => self.rename(name).await?,
            (2..=5, Some(name)) => self.write(&name).await?,
            (_, Some(name)) if names.len() >= FILES_MAX => self.write(&name).await?,
            _ => self.create().await?,
        }
        self.with(|dir| dir.operations += 1);
        Ok(())
    }

    fn fresh(&self) -> String {
        self.with(|dir| {
            dir.names += 1;
            format!("f{:04}", dir.names)
        })
    }

    async fn create(&mut self) -> Result<(), Violation> {
        let name = self.fresh();
        let create = Create {
            parent: self.dir.get(),
            name: name.as_bytes().to_vec().into(),
            kind: Kind::File.into(),
            mode: 0o644,
            exclusive: true,
            ..Create::default()
        };
        self.with(|dir| dir.doubt = Some(Doubt::Create(name.clone())));
        during("create", self.client.create(&self.cred, create).await)?;
        self.with(|dir| {
            dir.doubt = None;
            dir.files.insert(name.clone(), File::default());
        });
        self.write(&name).await
    }

    async fn write(&mut self, name: &str) -> Result<(), Violation> {
        let end = self.with(|dir| dir.files[name].end());
        let offset =
            if self.random.next_u32().is_multiple_of(2) { end } else { self.random.random_range(0..=end) };
        let length = match self.random.random_range(0..20) {
            0 => 3 << 18,
            1..5 => self.random.random_range(1..40 << 10),
            _ => self.random.random_range(1..600),
        };
        let mut bytes = vec![0; length];
        self.random.fill_bytes(&mut bytes);
        let attr = during("lookup", self.client.lookup(&self.cred, self.dir, name.as_bytes()).await)?;
        let flags = OpenFlags { read: true, write: true, ..OpenFlags::default() };
        let file = during("open", self.client.open(&self.cred, InodeNo(attr.ino), flags).await)?;
        self.with(|dir| {
            let file = dir.files.get_mut(name).expect("it is this client's alone");
            file.later.push((offset, bytes.clone()));
        });
        during("write", self.client.write(&file, offset as u64, &bytes, &Privileges::Keep).await)?;
        if self.random.random_range(0..3) > 0 {
            during("fsync", self.client.fsync(file.ino).await)?;
            self.with(|dir| {
                dir.files.get_mut(name).expect("it is this client's alone").synced();
                dir.syncs += 1;
            });
        }
        during("release", self.client.release(file).await)
    }

    async fn unlink(&mut self, name: String) -> Result<(), Violation> {
        self.with(|dir| dir.doubt = Some(Doubt::Unlink(name.clone())));
        during("unlink", self.client.unlink(&self.cred, self.dir, name.as_bytes()).await)?;
        self.with(|dir| {
            dir.doubt = None;
            dir.files.remove(&name);
        });
        Ok(())
    }

    async fn rename(&mut self, from: String) -> Result<(), Violation> {
        let to = self.fresh();
        self.with(|dir| dir.doubt = Some(Doubt::Rename(from.clone(), to.clone())));
        let (dir, old, new) = (self.dir, from.as_bytes(), to.as_bytes());
        during("rename", self.client.rename(&self.cred, dir, old, dir, new, false, false).await)?;
        self.with(|dir| {
            dir.doubt = None;
            if let Some(file) = dir.files.remove(&from) {
                dir.files.insert(to, file);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_what_was_synced_or_what_was_written_since() {
        let mut file = File { base: b"abc".to_vec(), later: vec![(1, b"X".to_vec()), (4, b"Z".to_vec())] };
        for good in [b"abc".as_slice(), b"aXc", b"abc\0Z", b"aXc\0"] {
            assert_eq!(file.check(good), Ok(()), "{good:?}");
        }
        for bad in [b"ab".as_slice(), b"abX", b"abc\0Zz", b"abcdZ", b"\0\0\0"] {
            assert!(file.check(bad).is_err(), "{bad:?}");
        }
        file.synced();
        assert_eq!(file.base, b"aXc\0Z");
        assert!(file.check(b"abc\0Z").is_err(), "what was synced over is gone");
    }
}
