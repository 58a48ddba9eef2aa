//! A bit that flips in a master's files is noticed: opening refuses with one line, or what is damaged is made again from what
//! is not. What is opened is what was written.

use super::codec;
use super::disk_log::{DiskLog, StoredPayload};
use super::recover::{Opened, open_disk};
use super::snapshot::SnapshotData;
use super::tests::{CACHE, alone, init, key, leads, register};
use super::types::{LogId, Vote};
use super::{Node, StartError};
use crate::state::{self, Kv, MemKv, WriteSet, keys};
use dfs_env::Env;
use openraft::EntryPayload;
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Files by their paths in a directory.
type Files = BTreeMap<PathBuf, Vec<u8>>;
type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

fn read_tree(top: &Path, dir: &Path, files: &mut Files) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_tree(top, &path, files);
        } else {
            files.insert(path.strip_prefix(top).unwrap().to_owned(), fs::read(&path).unwrap());
        }
    }
}

fn write_tree(files: &Files) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (path, bytes) in files {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    dir
}

/// A master's data directory with a purged log, two snapshots and a state store, closed cleanly.
async fn data() -> Files {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(Env::real(), alone(dir.path())).await.unwrap();
    leads(&node).await;
    init(&node).await;
    for part in 0..3 {
        for id in 1..=40 {
            node.propose(register(part * 1000 + id)).await.unwrap();
        }
        if part < 2 {
            let snapshot = node.status().applied;
            node.snapshot().await.unwrap();
            super::tests::until("the snapshot is made", || node.status().snapshot >= snapshot).await;
        }
    }
    super::tests::until("the log is purged", || node.status().purged > 0).await;
    node.shutdown().await;
    drop(node);
    let mut files = Files::new();
    read_tree(dir.path(), dir.path(), &mut files);
    files
}

fn rows(kv: &dyn Kv) -> io::Result<Rows> {
    let mut rows = Rows::new();
    kv.scan(&[], &keys::everything().1, &mut |key, value| {
        rows.insert(key.to_vec(), value.to_vec());
        ControlFlow::Continue(())
    })?;
    Ok(rows)
}

/// Everything that a data directory says.
#[derive(Clone, PartialEq, Debug)]
struct Told {
    vote: Option<Vote>,
    ends: (Option<LogId>, Option<LogId>),
    entries: Vec<(LogId, StoredPayload)>,
}

fn log_of(log: &DiskLog) -> io::Result<Told> {
    Ok(Told { vote: log.vote()?, ends: log.ends()?, entries: log.read(0, u64::MAX, usize::MAX)? })
}

/// The state after every entry of the log.
fn state_of(opened: &Opened, log: &Told) -> io::Result<Rows> {
    let (applied, _) = opened.store.applied()?;
    let kv = MemKv::new();
    kv.apply(&rows(&*opened.store)?.into_iter().map(|(key, value)| (key, Some(value))).collect())?;
    for (id, payload) in log.entries.iter().filter(|(id, _)| applied.is_none_or(|applied| *id > applied)) {
        let entry = codec::entry(*id, payload.kind, payload.data.clone())?;
        if let EntryPayload::Normal(batch) = entry.payload {
            let batch = prost::Message::decode(batch.0).map_err(codec::invalid)?;
            kv.apply(&state::apply(&kv, &batch)?.0)?;
        }
    }
    // The Raft layer's own row says only up to where it was applied before.
    kv.apply(&WriteSet::from([(vec![keys::tag::RAFT], None)]))?;
    rows(&kv)
}

/// Opens a directory, and what it says; or the line with which it is refused.
fn open(dir: &Path) -> Result<(Told, Rows), String> {
    let refused = |line: String| {
        assert!(!line.is_empty() && !line.contains('\n'), "{line:?}");
        line
    };
    let opened = match open_disk(&Env::real(), dir, &key().cluster_id(), 1, false, CACHE, 0) {
        Ok(opened) => opened,
        Err(StartError::Usage(line) | StartError::Failed(line)) => return Err(refused(line)),
    };
    let super::log::LogStore::Disk(log) = &opened.log else { panic!("on disk") };
    let told = log_of(log).and_then(|told| state_of(&opened, &told).map(|rows| (told, rows)));
    opened.log.close();
    // One that has failed may not even close.
    let _ = opened.store.close();
    told.map_err(|error| refused(error.to_string()))
}

fn flip(rng: &mut SmallRng, bytes: &mut [u8]) -> (usize, u8) {
    // Most of sled's files are zeroes that nobody reads.
    let mut at = rng.random_range(0..bytes.len());
    for _ in 0..rng.random_range(0..50) {
        if bytes[at] != 0 {
            break;
        }
        at = rng.random_range(0..bytes.len());
    }
    let bit = rng.random_range(0..8);
    bytes[at] ^= 1 << bit;
    (at, bit)
}

fn pick<'f>(
    rng: &mut SmallRng,
    files: &'f Files,
    wanted: impl Fn(&str) -> bool,
) -> (&'f PathBuf, &'f Vec<u8>) {
    let fit: Vec<_> =
        files.iter().filter(|(path, bytes)| !bytes.is_empty() && wanted(&path.to_string_lossy())).collect();
    fit[rng.random_range(0..fit.len())]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_flipped_bits_are_noticed_and_none_is_believed() {
    let files = data().await;
    let whole = write_tree(&files);
    let (told, state) = open(whole.path()).unwrap();
    assert!(told.entries.len() > 40 && state.len() > 120, "{} {}", told.entries.len(), state.len());
    let mut rng = SmallRng::seed_from_u64(0xF11F);
    let (mut refused, mut mended) = (BTreeMap::new(), BTreeMap::new());
    // The log alone.
    for case in 0..500 {
        let (path, bytes) = pick(&mut rng, &files, |path| path.starts_with("log/") && path.ends_with(".wal"));
        let mut bytes = bytes.clone();
        let place = flip(&mut rng, &mut bytes);
        let mut log: Files = files
            .iter()
            .filter(|(path, _)| path.starts_with("log"))
            .map(|(p, b)| (p.clone(), b.clone()))
            .collect();
        log.insert(path.clone(), bytes);
        let dir = write_tree(&log);
        let found = DiskLog::open(&dir.path().join("log")).and_then(|log| {
            let told = log_of(&log);
            log.close();
            told
        });
        match found {
            Err(error) => {
                assert!(!error.to_string().contains('\n'), "{error}");
                *refused.entry("log").or_insert(0) += 1;
            }
            Ok(found) => {
                assert_eq!(found, told, "case {case}: {} {place:?}", path.display());
                *mended.entry("log").or_insert(0) += 1;
            }
        }
    }
    // Snapshots: none that was changed is whole, and the other one takes its place.
    for case in 0..250 {
        let (path, bytes) = pick(&mut rng, &files, |path| path.ends_with(".snapshot"));
        let mut bytes = bytes.clone();
        let place = flip(&mut rng, &mut bytes);
        let mut changed = files.clone();
        // The state has to come from a snapshot.
        changed.retain(|path, _| !path.to_string_lossy().to_lowercase().starts_with("state"));
        changed.insert(path.clone(), bytes);
        let dir = write_tree(&changed);
        let verified = SnapshotData::file(&dir.path().join(path)).unwrap().verify();
        assert!(verified.is_err(), "case {case}: {} {place:?}", path.display());
        *refused.entry("snapshot").or_insert(0) += 1;
        if case % 5 == 0 {
            assert_eq!(open(dir.path()).unwrap(), (told.clone(), state.clone()), "case {case}: {place:?}");
            *mended.entry("snapshot").or_insert(0) += 1;
        }
    }
    // The state store and the small files beside it. What was refused in use is made again by the next start.
    for case in 0..250 {
        let (path, bytes) = pick(&mut rng, &files, |path| {
            path.starts_with("state-") || path == "STATE" || path == "IDENTITY"
        });
        let mut bytes = bytes.clone();
        let place = flip(&mut rng, &mut bytes);
        let mut changed = files.clone();
        changed.insert(path.clone(), bytes);
        let dir = write_tree(&changed);
        let name = path.to_string_lossy();
        let kind = if name.starts_with("state-") { "state" } else { "text" };
        let mut found = open(dir.path());
        if found.is_err() {
            *refused.entry(kind).or_insert(0) += 1;
            if kind == "state" || name == "STATE" {
                found = open(dir.path());
                assert!(found.is_ok(), "case {case}: {name} {place:?}: {found:?}");
            }
        }
        if let Ok(found) = found {
            assert_eq!(found.1, state, "case {case}: {name} {place:?}");
            *mended.entry(kind).or_insert(0) += 1;
        }
    }
    println!("refused {refused:?}, right all the same {mended:?}");
    assert_eq!(refused["snapshot"], 250);
    assert!(refused["log"] > 400, "{refused:?}");
}
