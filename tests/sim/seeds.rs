//! Runs seeds, each in a process of its own: what a library counts for a whole process depends on nothing but the seed
//! then, a seed that hangs is named, and one command repeats it.

use crate::{Scenario, number, random};
use dfs_env::defect::{self, Defect};
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What one seed did: what, and how often. `trace` is a digest of all that happened.
pub type Report = BTreeMap<String, u64>;

/// How long one seed may take, in wall time. It takes seconds.
const PATIENCE: Duration = Duration::from_secs(180);
const TICK: Duration = Duration::from_millis(5);
/// In front of a line of the report in what a child says.
const MARK: &str = "did\t";
/// Where the child finds what to run.
const WHAT: &str = "DFS_SIM_RUN";

/// The seeds to run: those that the environment names, or the first so many.
pub fn chosen(usual: u64) -> Range<u64> {
    match number("DFS_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = number("DFS_SIM_FIRST_SEED").unwrap_or(1);
            first..first + number("DFS_SIM_SEEDS").unwrap_or(usual)
        }
    }
}

/// Runs seeds side by side, and adds up what they did.
///
/// # Panics
/// One fails: with what it said and how to repeat it.
pub fn all(scenario: Scenario, seeds: Range<u64>) -> Report {
    let next = AtomicU64::new(seeds.start);
    let (sum, failed) = (Mutex::new(Report::new()), Mutex::new(None));
    let lane = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end || failed.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                return;
            }
            match one(scenario, None, seed) {
                Ok(report) => {
                    println!("seed {seed}: {} operations", report["operations"]);
                    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                    for (what, count) in report {
                        let all = sum.entry(what).or_default();
                        *all = all.saturating_add(count);
                    }
                }
                Err(why) => {
                    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((seed, why));
                }
            }
        }
    };
    // Tests of this binary run side by side as well.
    let lanes = std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
    std::thread::scope(|scope| (0..lanes).for_each(|_| drop(scope.spawn(lane))));
    if let Some((seed, why)) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        panic!("{why}\nrepeat: DFS_SIM_SEED={seed} cargo test -p dfs-tests --test sim {}", scenario.test());
    }
    sum.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one seed in a process of its own, with a defect or none.
///
/// # Errors
/// What did not hold, or that it did not end.
pub fn one(scenario: Scenario, defect: Option<Defect>, seed: u64) -> Result<Report, String> {
    let program =
        std::env::current_exe().map_err(|error| format!("this program is not to be found: {error}"))?;
    let mut child = Command::new(program)
        .args(["--exact", "one_seed", "--ignored", "--nocapture"])
        .env(WHAT, format!("{scenario:?} {defect:?} {seed}"))
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| format!("a process for seed {seed} was not to be had: {error}"))?;
    let said = wait(&mut child, seed)?;
    if let Some((_, why)) = said.split_once("violated: ") {
        return Err(why.to_owned());
    }
    let report: Report = said
        .lines()
        .filter_map(|line| line.split_once(MARK)?.1.rsplit_once('\t'))
        .filter_map(|(what, count)| Some((what.to_owned(), count.parse().ok()?)))
        .collect();
    if report.contains_key("operations") {
        Ok(report)
    } else {
        Err(format!("seed {seed} ended early: {said}"))
    }
}

/// Waits for a child to end and answers what it said.
fn wait(child: &mut Child, seed: u64) -> Result<String, String> {
    let mut pipe = child.stdout.take().expect("it is piped");
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        // What was read before an error is all there is to tell.
        let _ended = pipe.read_to_end(&mut said);
        String::from_utf8_lossy(&said).into_owned()
    });
    let began = Instant::now();
    let ended = loop {
        match child.try_wait() {
            Ok(Some(_)) => break Ok(()),
            Ok(None) if began.elapsed() > PATIENCE => {
                break Err(format!("seed {seed} did not end in {PATIENCE:?}"));
            }
            Ok(None) => std::thread::sleep(TICK),
            Err(error) => break Err(format!("seed {seed} cannot be waited for: {error}")),
        }
    };
    if ended.is_err() {
        // It may have ended this very moment.
        let _gone = child.kill();
        let _reaped = child.wait();
    }
    let said = reader.join().unwrap_or_default();
    ended.map(|()| said)
}

/// The child's side: runs what the environment names and says what it did.
pub fn run_here() {
    let what = std::env::var(WHAT).unwrap_or_else(|_| panic!("{WHAT} names what to run"));
    let mut words = what.split(' ');
    let (scenario, defect, seed) = (words.next(), words.next(), words.next());
    let known = Scenario::ALL.into_iter().find(|known| scenario == Some(format!("{known:?}").as_str()));
    let scenario = known.unwrap_or_else(|| panic!("{WHAT} names no scenario: {what}"));
    let defect = Defect::ALL.into_iter().find(|known| defect == Some(format!("{:?}", Some(known)).as_str()));
    let seed =
        seed.and_then(|seed| seed.parse().ok()).unwrap_or_else(|| panic!("{WHAT} names no seed: {what}"));
    random::alone(seed, |seed| {
        defect::set(defect);
        match scenario.run(seed) {
            Ok(report) => report.iter().for_each(|(what, count)| println!("\n{MARK}{what}\t{count}")),
            Err(why) => println!("\nviolated: seed {seed}: {why}"),
        }
    });
}
