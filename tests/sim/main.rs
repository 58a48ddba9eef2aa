//! The whole cluster in one process from one seed: three masters, four chunk daemons and two clients on a simulated
//! network, disk and clock, with message loss, partitions and crashes that lose what was not synced.
//!
//! `DFS_SIM_SEED=N` repeats one seed; `DFS_SIM_SEEDS=N` runs that many, from
//! `DFS_SIM_FIRST_SEED=N` (1) on.

mod checkers;
mod chunks;
mod disk;
mod env;
mod faults;
mod linear;
mod shared;
mod workload;
mod world;

use dfs_env::defect::{self, Defect};
use disk::Losses;
use std::collections::BTreeMap;

/// How many seeds run when nothing is said.
const SEEDS: u64 = 10;
/// How many seeds a deliberate defect may take to be noticed.
const DEFECT_SEEDS: u64 = 40;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

#[test]
fn no_seed_breaks_an_invariant() {
    let log = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("off"));
    let _ = tracing_subscriber::fmt().with_env_filter(log).with_test_writer().try_init();
    let seeds = match number("DFS_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("DFS_SIM_FIRST_SEED").unwrap_or(1);
            first..first + number("DFS_SIM_SEEDS").unwrap_or(SEEDS)
        }
    };
    let mut fired: BTreeMap<&str, u64> = BTreeMap::new();
    let mut losses = Losses::default();
    for seed in seeds.clone() {
        let report = world::run(seed).unwrap_or_else(|violation| {
            panic!("{violation}\nrepeat: DFS_SIM_SEED={seed} cargo test -p dfs-tests --test sim")
        });
        assert_eq!(report.missing, Vec::<&str>::new(), "seed {seed}: faults that never fired");
        assert!(report.operations > 50, "seed {seed}: only {} operations were done", report.operations);
        for (kind, count) in report.faults {
            *fired.entry(kind).or_default() += count;
        }
        losses.writes_lost += report.losses.writes_lost;
        losses.writes_torn += report.losses.writes_torn;
        losses.names_lost += report.losses.names_lost;
        println!("seed {seed}: {} operations", report.operations);
    }
    println!("faults: {fired:?}; crashes: {losses:?}");
    let few = seeds.end - seeds.start < SEEDS;
    assert!(few || losses.writes_lost > 0, "no crash ever lost a write: {losses:?}");
    assert!(few || losses.writes_torn > 0, "no crash ever tore a write: {losses:?}");
    assert!(few || losses.names_lost > 0, "no crash ever lost a name: {losses:?}");
}

#[test]
fn histories_of_shared_names_and_files_are_linearizable() {
    let first = number("DFS_SIM_FIRST_SEED").unwrap_or(1);
    let seeds = match number("DFS_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => first..first + number("DFS_SIM_SEEDS").unwrap_or(SEEDS),
    };
    for seed in seeds {
        let report = shared::run(seed).unwrap_or_else(|violation| {
            panic!("{violation}\nrepeat: DFS_SIM_SEED={seed} cargo test -p dfs-tests --test sim shared")
        });
        assert!(report.operations > 100, "seed {seed}: only {} operations ended", report.operations);
        println!("seed {seed}: {} operations, {:?}", report.operations, report.faults);
    }
}

/// The checker is worth something: with each of these defects some seed's history is none that could have happened.
#[test]
fn defects_of_leases_are_noticed() {
    for defect in [Defect::LateInvalidation, Defect::NoGrace, Defect::GrantedTwice] {
        defect::set(Some(defect));
        let run = |seed| match defect {
            Defect::NoGrace => shared::run_under(seed, faults::Plan::failovers),
            Defect::LateInvalidation | Defect::GrantedTwice => shared::run(seed),
        };
        let noticed = (1..=DEFECT_SEEDS).find_map(|seed| run(seed).err().map(|why| (seed, why)));
        defect::set(None);
        let (seed, why) =
            noticed.unwrap_or_else(|| panic!("{defect:?} was not noticed by {DEFECT_SEEDS} seeds"));
        assert!(why.contains("no order"), "{defect:?}, seed {seed}: {why}");
        println!("{defect:?} was noticed by seed {seed}");
    }
}
