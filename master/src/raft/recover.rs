//! Opens a master's storage at a start: log, snapshots and state store, brought in line with each other.
//!
//! The log and the snapshots are the truth. The state store is taken as it is only if it can be believed, reaches the
//! point where the log begins, and is not older than the newest snapshot; else it is built again.

use super::buffered::BufferedKv;
use super::disk_log::DiskLog;
use super::joining::Joining;
use super::log::LogStore;
use super::room::Room;
use super::sim::{SimLog, SimStorage};
use super::sled_kv::SledKv;
use super::snapshot::Snapshots;
use super::store::Store;
use super::{StartError, identity};
use dfs_env::Env;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A master's storage, open.
pub struct Opened {
    pub log: LogStore,
    pub store: Arc<Store>,
    pub snapshots: Snapshots,
    pub joining: Joining,
    /// Which restore or recovery began the group; 0: none.
    pub group: u64,
    pub room: Room,
    /// Keeps other processes out; None in the simulator.
    pub lock: Option<fs::File>,
}

fn failed(dir: &Path) -> impl Fn(io::Error) -> StartError {
    let dir = dir.display().to_string();
    move |error| {
        let text = error.to_string().replace('\n', " ");
        StartError::Failed(if text.contains(&dir) { text } else { format!("{dir}: {text}") })
    }
}

/// Opens a data directory; `others`: the cluster has more masters than this one. Blocks, also
/// until there is room on the disk.
///
/// # Errors
/// When it is somebody else's, in use, or damaged beyond what log and snapshots can repair.
pub fn open_disk(
    env: &Env,
    dir: &Path,
    cluster: &str,
    node: u64,
    others: bool,
    cache_bytes: u64,
    reserve_bytes: u64,
) -> Result<Opened, StartError> {
    let identity::Claimed { lock, group } = identity::claim(dir, cluster, node, others)?;
    let failed = failed(dir);
    // Opening writes, too.
    let room = Room::open(env, dir, reserve_bytes);
    room.wait();
    let joining = Joining::of_dir(dir).map_err(&failed)?;
    let log = LogStore::Disk(DiskLog::open(&dir.join("log")).map_err(&failed)?);
    let snapshots = Snapshots::open(dir.join("snapshots")).map_err(&failed)?;
    let (store, usable) = SledKv::open(dir, cache_bytes).map_err(&failed)?;
    let store = Arc::new(Store::Disk(BufferedKv::new(store).map_err(&failed)?));
    bring_in_line(&log, &snapshots, &store, usable).map_err(failed)?;
    Ok(Opened { log, store, snapshots, joining, group, room, lock: Some(lock) })
}

/// Opens simulated storage.
///
/// # Errors
/// When it is another master's.
pub fn open_sim(
    storage: &Arc<SimStorage>,
    cluster: &str,
    node: u64,
    others: bool,
) -> Result<Opened, StartError> {
    storage.claim(cluster, node, others).map_err(StartError::Usage)?;
    let log = LogStore::Sim(SimLog::open(Arc::clone(storage)));
    let snapshots = Snapshots::Sim(Arc::clone(storage));
    let store = Arc::new(Store::Sim(Arc::clone(storage)));
    bring_in_line(&log, &snapshots, &store, Ok(())).map_err(|error| StartError::Failed(error.to_string()))?;
    let joining = Joining::of_sim(storage);
    Ok(Opened { log, store, snapshots, joining, group: 0, room: Room::unlimited(), lock: None })
}

fn bring_in_line(
    log: &LogStore,
    snapshots: &Snapshots,
    store: &Store,
    usable: Result<(), String>,
) -> io::Result<()> {
    let (purged, last) = log.ends()?;
    let kept = snapshots.list()?;
    let newest = kept.first().and_then(|(meta, _)| meta.last_log_id);
    let reason = match usable.and_then(|()| store.applied().map_err(|error| error.to_string())) {
        Err(reason) => reason,
        Ok((applied, _)) if applied < purged => "it ends before the log begins".to_owned(),
        Ok((applied, _)) if applied < newest => "it is older than the newest snapshot".to_owned(),
        Ok(_) => return Ok(()),
    };
    for (meta, data) in kept.iter().filter(|(meta, _)| meta.last_log_id >= purged) {
        match data.verify() {
            Ok(_) => {
                tracing::info!(%reason, snapshot = %meta.snapshot_id, "building the state store again from snapshot and log");
                return store.replace(Some(data));
            }
            Err(error) => {
                tracing::warn!(snapshot = %meta.snapshot_id, %error, "cannot use a snapshot, putting it aside");
                snapshots.put_aside(data)?;
            }
        }
    }
    if let Some(purged) = purged {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "the state store cannot be used ({reason}) and no readable snapshot reaches the log, which begins at \
                 entry {}: restore the directory, or remove it and let this master rejoin the others",
                purged.index + 1
            ),
        ));
    }
    if last.is_some() {
        tracing::info!(%reason, "building the state store again from the log");
    }
    store.replace(None)
}
