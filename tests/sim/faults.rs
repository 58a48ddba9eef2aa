//! What goes wrong, when, and proof that it did: a fault that never fired fails the run.

use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng, seq::SliceRandom};
use std::collections::BTreeMap;
use std::time::Duration;

/// A client stands still for longer than the short sessions live.
const STALL: Duration = Duration::from_secs(6);

/// A frozen server is at least so long frozen.
const FROZEN: Duration = Duration::from_millis(2_200);

/// So late come late appends at least: their client has given them up.
const LATE: Duration = Duration::from_millis(2_300);

/// Something bad that happens to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A machine stops, its disk forgets what was not synced, and it starts again after the pause.
    Crash { host: String, pause: Duration },
    /// A machine stops and comes back with an empty disk.
    Wipe { host: String, pause: Duration },
    /// A bit of a sealed chunk changes on a machine's disk.
    Rot { host: String },
    /// Two machines do not hear each other for a while.
    Partition { a: String, b: String, pause: Duration },
    /// Messages between two machines get lost at random for a while.
    Loss { a: String, b: String, pause: Duration },
    /// A master stops while one client hears none of the others: a new leader does not learn what that client holds.
    Failover { host: String, others: Vec<String>, client: String, pause: Duration },
    /// Whatever a client says or is told stands still for a while and comes then, however old: a frozen machine, as the others
    /// see it.
    Stall { client: String, others: Vec<String>, pause: Duration },
    /// The same of a server: everything that was sent to it arrives late, and all at once.
    Freeze { host: String, others: Vec<String>, pause: Duration },
    /// What clients and other daemons send to a chunk daemon arrives late, while another daemon does not hear the masters: chunks
    /// are fenced and cannot be sealed yet when appends of before come.
    LateAppends { host: String, peers: Vec<String>, deaf: String, masters: Vec<String>, pause: Duration },
    /// One machine does not hear another, which hears it.
    OneWay { from: String, to: String, pause: Duration },
    /// Every call of a machine's disk takes long.
    Slow { host: String, pause: Duration },
    /// A chunk daemon's disk is full.
    Full { host: String, pause: Duration },
    /// Every fsync of a master's log fails: it must stop by itself, and starts again after the pause.
    LogFails { host: String, pause: Duration },
    /// A master stops, and its newest snapshot and its state are gone when it starts again.
    RotSnapshot { host: String, pause: Duration },
    /// The power of all masters and chunk daemons goes at once; all forget what was not synced.
    PowerCut { pause: Duration },
    /// A machine's wall clock is set, forward or back.
    ClockJump { host: String, by_ms: i64 },
}

impl Fault {
    /// The kind's name, for the count of what fired.
    pub fn kind(&self) -> &'static str {
        let kind = match self {
            Self::Crash { host, .. } if host.starts_with("master") => Kind::CrashMaster,
            Self::Crash { .. } => Kind::CrashChunkd,
            Self::Wipe { .. } => Kind::Wipe,
            Self::Rot { .. } => Kind::Rot,
            Self::Partition { .. } => Kind::Partition,
            Self::Loss { .. } => Kind::Loss,
            Self::Failover { .. } => Kind::Failover,
            Self::Stall { .. } => Kind::Stall,
            Self::Freeze { host, .. } if host.starts_with("master") => Kind::FreezeMaster,
            Self::Freeze { .. } => Kind::FreezeChunkd,
            Self::LateAppends { .. } => Kind::LateAppends,
            Self::OneWay { .. } => Kind::OneWay,
            Self::Slow { host, .. } if host.starts_with("master") => Kind::SlowMaster,
            Self::Slow { .. } => Kind::SlowChunkd,
            Self::Full { .. } => Kind::Full,
            Self::LogFails { .. } => Kind::LogFails,
            Self::RotSnapshot { .. } => Kind::RotSnapshot,
            Self::PowerCut { .. } => Kind::PowerCut,
            Self::ClockJump { .. } => Kind::ClockJump,
        };
        kind.name()
    }

    /// How long it lasts.
    pub fn pause(&self) -> Duration {
        match self {
            Self::Rot { .. } | Self::ClockJump { .. } => Duration::ZERO,
            Self::Crash { pause, .. }
            | Self::Wipe { pause, .. }
            | Self::Partition { pause, .. }
            | Self::Loss { pause, .. }
            | Self::Failover { pause, .. }
            | Self::Stall { pause, .. }
            | Self::Freeze { pause, .. }
            | Self::LateAppends { pause, .. }
            | Self::OneWay { pause, .. }
            | Self::Slow { pause, .. }
            | Self::Full { pause, .. }
            | Self::LogFails { pause, .. }
            | Self::RotSnapshot { pause, .. }
            | Self::PowerCut { pause } => *pause,
        }
    }
}

/// Kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    CrashMaster,
    CrashChunkd,
    Wipe,
    Rot,
    Partition,
    Loss,
    Failover,
    Stall,
    FreezeMaster,
    FreezeChunkd,
    LateAppends,
    OneWay,
    SlowMaster,
    SlowChunkd,
    Full,
    LogFails,
    RotSnapshot,
    PowerCut,
    ClockJump,
}

/// What befalls two clients with a directory each.
const EVERYTHING: [Kind; 17] = [
    Kind::CrashMaster,
    Kind::CrashChunkd,
    Kind::Wipe,
    Kind::Rot,
    Kind::Partition,
    Kind::Loss,
    Kind::FreezeMaster,
    Kind::FreezeChunkd,
    Kind::LateAppends,
    Kind::OneWay,
    Kind::SlowMaster,
    Kind::SlowChunkd,
    Kind::Full,
    Kind::LogFails,
    Kind::RotSnapshot,
    Kind::PowerCut,
    Kind::ClockJump,
];

/// The names of all faults that must have fired when many seeds have run.
pub fn everything() -> impl Iterator<Item = &'static str> {
    EVERYTHING.into_iter().map(Kind::name)
}

impl Kind {
    /// As [`Fault::kind`] names it.
    fn name(self) -> &'static str {
        match self {
            Self::CrashMaster => "crash of a master",
            Self::CrashChunkd => "crash of a chunk daemon",
            Self::Wipe => "loss of a disk",
            Self::Rot => "bit rot",
            Self::Partition => "partition",
            Self::Loss => "message loss",
            Self::Failover => "failover behind a client's back",
            Self::Stall => "stall of a client",
            Self::FreezeMaster => "freeze of a master",
            Self::FreezeChunkd => "freeze of a chunk daemon",
            Self::LateAppends => "late appends",
            Self::OneWay => "one-way partition",
            Self::SlowMaster => "slow log of a master",
            Self::SlowChunkd => "slow disk",
            Self::Full => "full disk",
            Self::LogFails => "failing fsync of a log",
            Self::RotSnapshot => "loss of a snapshot",
            Self::PowerCut => "power cut",
            Self::ClockJump => "clock jump",
        }
    }
}

/// The faults of one seed: one at a time, with quiet in between, so that a majority of the masters and enough chunk
/// daemons always come back within what a client waits.
pub struct Plan {
    random: SmallRng,
    masters: Vec<String>,
    chunkds: Vec<String>,
    clients: Vec<String>,
    next: Duration,
    turn: usize,
    /// The longest pause, in milliseconds.
    longest: u64,
    /// The least and the longest time between two faults, in milliseconds.
    quiet: (u64, u64),
    clients_first: bool,
    kinds: Vec<Kind>,
    /// The one machine that may lose its disk, and the one whose disk rots: of three replicas one stays good.
    wiped: Option<String>,
    rotting: String,
    fired: BTreeMap<&'static str, u64>,
}

impl Plan {
    pub fn new(seed: u64, masters: &[String], chunkds: &[String], clients: &[String]) -> Self {
        let (masters, chunkds, clients) = (masters.to_vec(), chunkds.to_vec(), clients.to_vec());
        let next = Duration::from_secs(3);
        let mut random = SmallRng::seed_from_u64(seed);
        // Each kind takes its time: a seed has some of them.
        let mut kinds = EVERYTHING.to_vec();
        kinds.shuffle(&mut random);
        let first = random.random_range(0..chunkds.len());
        let wiped = Some(chunkds[first].clone());
        let rotting = chunkds[(first + 1) % chunkds.len()].clone();
        Self {
            random,
            masters,
            chunkds,
            clients,
            next,
            turn: 0,
            longest: 3_000,
            quiet: (300, 2_000),
            clients_first: false,
            kinds,
            wiped,
            rotting,
            fired: BTreeMap::new(),
        }
    }

    /// Faults of clients at work together: some last longer than a session lives, and clients are cut off more often.
    pub fn among(seed: u64, masters: &[String], chunkds: &[String], clients: &[String]) -> Self {
        let kinds = vec![
            Kind::CrashMaster,
            Kind::CrashChunkd,
            Kind::Partition,
            Kind::Loss,
            Kind::Failover,
            Kind::Stall,
        ];
        let quiet = (1_000, 5_000);
        Self {
            longest: 9_000,
            quiet,
            clients_first: true,
            kinds,
            ..Self::new(seed, masters, chunkds, clients)
        }
    }

    /// Nothing but failovers behind a client's back.
    pub fn failovers(seed: u64, masters: &[String], chunkds: &[String], clients: &[String]) -> Self {
        Self { kinds: vec![Kind::Failover], ..Self::among(seed, masters, chunkds, clients) }
    }

    /// Nothing but appends that come late.
    pub fn late(seed: u64, masters: &[String], chunkds: &[String], clients: &[String]) -> Self {
        Self { kinds: vec![Kind::LateAppends], ..Self::new(seed, masters, chunkds, clients) }
    }

    /// The fault that begins now, if one does.
    pub fn due(&mut self, now: Duration) -> Option<Fault> {
        if now < self.next {
            return None;
        }
        let pause = Duration::from_millis(self.random.random_range(200..self.longest));
        self.next = now + pause + Duration::from_millis(self.random.random_range(self.quiet.0..self.quiet.1));
        // Kinds take turns from a random start, so that a short run has them all.
        if self.turn == 0 {
            self.turn = self.random.random_range(0..self.kinds.len());
        }
        self.turn += 1;
        let fault = self.make(self.kinds[self.turn % self.kinds.len()], pause);
        *self.fired.entry(fault.kind()).or_default() += 1;
        Some(fault)
    }

    fn make(&mut self, kind: Kind, pause: Duration) -> Fault {
        match kind {
            Kind::CrashMaster => Fault::Crash { host: Self::one(&mut self.random, &self.masters), pause },
            Kind::CrashChunkd => Fault::Crash { host: Self::one(&mut self.random, &self.chunkds), pause },
            Kind::Wipe => match self.wiped.take() {
                Some(host) => Fault::Wipe { host, pause },
                None => Fault::Rot { host: self.rotting.clone() },
            },
            Kind::Rot => Fault::Rot { host: self.rotting.clone() },
            Kind::Failover => {
                let (host, client) =
                    (Self::one(&mut self.random, &self.masters), Self::one(&mut self.random, &self.clients));
                let others = self.masters.iter().filter(|other| **other != host).cloned().collect();
                Fault::Failover { host, others, client, pause }
            }
            Kind::Stall => {
                let client = Self::one(&mut self.random, &self.clients);
                let others = self.masters.iter().chain(&self.chunkds).cloned().collect();
                Fault::Stall { client, others, pause: pause.max(STALL) }
            }
            Kind::Partition => {
                let (a, b) = self.pair();
                Fault::Partition { a, b, pause }
            }
            Kind::Loss => {
                let (a, b) = self.pair();
                Fault::Loss { a, b, pause }
            }
            Kind::FreezeMaster => self.freeze(true, pause),
            Kind::FreezeChunkd => self.freeze(false, pause),
            Kind::LateAppends => {
                let host = Self::one(&mut self.random, &self.chunkds);
                let mut others: Vec<String> = self.chunkds.clone();
                others.retain(|other| *other != host);
                let deaf = Self::one(&mut self.random, &others);
                let peers = others.into_iter().chain(self.clients.iter().cloned()).collect();
                Fault::LateAppends {
                    host,
                    peers,
                    deaf,
                    masters: self.masters.clone(),
                    pause: LATE + pause / 2,
                }
            }
            Kind::OneWay => {
                let (from, to) = self.pair();
                Fault::OneWay { from, to, pause }
            }
            Kind::SlowMaster => Fault::Slow { host: Self::one(&mut self.random, &self.masters), pause },
            Kind::SlowChunkd => Fault::Slow { host: Self::one(&mut self.random, &self.chunkds), pause },
            Kind::Full => Fault::Full { host: Self::one(&mut self.random, &self.chunkds), pause },
            Kind::LogFails => Fault::LogFails { host: Self::one(&mut self.random, &self.masters), pause },
            Kind::RotSnapshot => {
                Fault::RotSnapshot { host: Self::one(&mut self.random, &self.masters), pause }
            }
            Kind::PowerCut => Fault::PowerCut { pause },
            Kind::ClockJump => {
                let everybody: Vec<String> =
                    [&self.masters, &self.chunkds, &self.clients].into_iter().flatten().cloned().collect();
                let by_ms = self.random.random_range(-120_000..120_000);
                Fault::ClockJump { host: Self::one(&mut self.random, &everybody), by_ms }
            }
        }
    }

    fn freeze(&mut self, master: bool, pause: Duration) -> Fault {
        let host = Self::one(&mut self.random, if master { &self.masters } else { &self.chunkds });
        let everybody = self.masters.iter().chain(&self.chunkds).chain(&self.clients);
        let others = everybody.filter(|other| **other != host).cloned().collect();
        // Longer than a client waits for an append.
        Fault::Freeze { host, others, pause: pause + FROZEN }
    }

    fn one(random: &mut SmallRng, hosts: &[String]) -> String {
        hosts[random.random_range(0..hosts.len())].clone()
    }

    fn pair(&mut self) -> (String, String) {
        if self.clients_first && self.random.random_range(0..3) < 2 {
            let one = Self::one(&mut self.random, &self.clients);
            return (Self::one(&mut self.random, &self.masters), one);
        }
        let servers = if self.random.next_u32().is_multiple_of(2) { &self.masters } else { &self.chunkds };
        let a = Self::one(&mut self.random, servers);
        let everybody: Vec<String> = self
            .masters
            .iter()
            .chain(&self.chunkds)
            .chain(&self.clients)
            .filter(|host| **host != a)
            .cloned()
            .collect();
        let b = Self::one(&mut self.random, &everybody);
        (a, b)
    }

    /// How often each kind of fault fired.
    pub fn fired(&self) -> &BTreeMap<&'static str, u64> {
        &self.fired
    }
}
