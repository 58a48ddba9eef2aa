//! The whole cluster in one process from one seed: three masters, four chunk daemons and two clients on a simulated
//! network, disk and clock, with every fault of `faults.rs`: crashes and power cuts that lose what was not synced, torn writes,
//! flipped bits, full, slow and failing disks, clocks that differ and jump, partitions, message loss, frozen machines.
//!
//! `DFS_SIM_SEED=N` repeats one seed (with `RUST_LOG=debug` it says what happened); `DFS_SIM_SEEDS=N` runs that many, from
//! `DFS_SIM_FIRST_SEED=N` (1) on.

mod checkers;
mod chunks;
mod disk;
mod env;
mod faults;
mod ghost;
mod linear;
mod pages;
mod power;
mod random;
mod seeds;
mod shared;
mod strikes;
mod workload;
mod world;

use dfs_env::defect::Defect;
use seeds::Report;
use tracing_subscriber::fmt::{format::Writer, time::FormatTime};
use workload::Violation;

/// How many seeds run when nothing is said.
const SEEDS: u64 = 200;
/// In so many every fault happens.
const MANY: u64 = 50;
const HISTORIES: u64 = 100;
/// Each is eight power cuts.
const POWER_SEEDS: u64 = 25;
/// How many seeds a deliberate defect may take to be noticed.
const DEFECT_SEEDS: u64 = 200;

/// What a seed is run through.
#[derive(Clone, Copy, Debug)]
enum Scenario {
    /// Two clients with a directory each, and every fault there is.
    World,
    /// The same, under appends that come late alone.
    Late,
    /// Several clients at work on the same few names and files.
    Shared,
    /// The same, under failovers behind a client's back alone.
    Failovers,
    /// Power cuts of everything, one after the other.
    Power,
}

impl Scenario {
    const ALL: [Self; 5] = [Self::World, Self::Late, Self::Shared, Self::Failovers, Self::Power];

    fn run(self, seed: u64) -> Result<Report, Violation> {
        match self {
            Self::World => world::run(seed, faults::Plan::new),
            Self::Late => world::run(seed, faults::Plan::late),
            Self::Shared => shared::run(seed, faults::Plan::among),
            Self::Failovers => shared::run(seed, faults::Plan::failovers),
            Self::Power => power::run(seed),
        }
    }

    /// The test that runs it.
    fn test(self) -> &'static str {
        match self {
            Self::World => "no_seed_breaks_an_invariant",
            Self::Shared => "histories_of_shared_names_and_files_are_linearizable",
            Self::Failovers | Self::Late => "defects_are_noticed",
            Self::Power => "what_was_synced_survives_power_cuts",
        }
    }
}

/// Writes the world's time in front of what it says.
struct SimTime;

impl FormatTime for SimTime {
    fn format_time(&self, to: &mut Writer<'_>) -> std::fmt::Result {
        write!(to, "{:.3}", turmoil::sim_elapsed().unwrap_or_default().as_secs_f64())
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

#[test]
fn no_seed_breaks_an_invariant() {
    let seeds = seeds::chosen(SEEDS);
    let few = seeds.end - seeds.start < MANY;
    let report = seeds::all(Scenario::World, seeds);
    println!("{report:?}");
    // What never happened was not tested.
    let must = faults::everything().chain(strikes::MUST).chain([
        world::OLD_LEADER,
        world::COMPARED,
        world::COMPACTED,
    ]);
    for what in must {
        assert!(few || report.get(what).is_some_and(|count| *count > 0), "never: {what}: {report:?}");
    }
}

#[test]
fn what_was_synced_survives_power_cuts() {
    let report = seeds::all(Scenario::Power, seeds::chosen(POWER_SEEDS));
    println!("{report:?}");
    println!("{} power cuts were survived", report["power cuts survived"]);
    let few = report["power cuts survived"] < 50;
    for what in ["crash lost a log entry", "crash lost a state", "crash lost a write", "crash tore a write"] {
        assert!(few || report[what] > 0, "never: {what}: {report:?}");
    }
}

#[test]
fn histories_of_shared_names_and_files_are_linearizable() {
    let report = seeds::all(Scenario::Shared, seeds::chosen(HISTORIES));
    println!("{report:?}");
}

/// The scenario in which a defect shows, and a part of what is said then.
fn shows(defect: Defect) -> (Scenario, &'static str) {
    match defect {
        Defect::NoGrace => (Scenario::Failovers, "no order"),
        Defect::LateInvalidation | Defect::GrantedTwice => (Scenario::Shared, "no order"),
        Defect::AckBeforeSync | Defect::CommittedUnsynced | Defect::CutEarly | Defect::TermUnchecked => {
            (Scenario::World, "I1")
        }
        Defect::EpochUnchecked => (Scenario::Late, "I4"),
        Defect::AnswersLost => (Scenario::World, "I7"),
        Defect::PurgedEarly => (Scenario::World, "no readable snapshot"),
    }
}

/// The checkers are worth something: with each of these defects some seed breaks what it should.
#[test]
fn defects_are_noticed() {
    for defect in Defect::ALL {
        let (scenario, words) = shows(defect);
        let run = |seed| seeds::one(scenario, Some(defect), seed);
        let first = number("DFS_SIM_FIRST_SEED").unwrap_or(1);
        let noticed = (first..first + DEFECT_SEEDS).find_map(|seed| run(seed).err().map(|why| (seed, why)));
        let (seed, why) =
            noticed.unwrap_or_else(|| panic!("{defect:?} was not noticed by {DEFECT_SEEDS} seeds"));
        assert!(why.contains(words), "{defect:?}, seed {seed}: {why}");
        println!("{defect:?} was noticed by seed {seed}: {}", why.lines().next().unwrap_or_default());
    }
}

/// A seed that failed fails again: everything that happens comes from it.
#[test]
fn a_seed_run_twice_does_the_same_twice() {
    for scenario in [Scenario::World, Scenario::Shared, Scenario::Power] {
        let run = || seeds::one(scenario, None, 2).unwrap_or_else(|why| panic!("{why}"));
        assert_eq!(run(), run(), "{scenario:?}");
    }
}

#[test]
#[ignore = "run by the others, a process for every seed"]
fn one_seed() {
    let log = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("off"));
    let said = tracing_subscriber::fmt().with_env_filter(log).with_timer(SimTime);
    said.with_ansi(false).with_writer(std::io::stderr).init();
    seeds::run_here();
}
