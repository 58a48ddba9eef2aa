//! The way back when of all masters only one is left: its own log and state become those of a group of one.
//!
//! ```text
//!   IDENTITY, log/, snapshots/, state-N/ ──> RECOVERY: all of it as a backup file, synced and checked
//!        ──> IDENTITY first, then the rest, moved into before-recovery/ ──> RECOVERY restored (`restore`) ──> served
//! ```
//!
//! Every entry of the log counts, also those that may never have been committed: whoever proposed them was not told that they
//! were not. Entries that only the lost masters had are lost; so the same holds as after a restore, and it is made the same way:
//! no number that may have been given in them is given again, sessions end, chunk daemons and other masters see a later group.
//! A stop anywhere leaves a directory that no master uses and that a repeated recovery goes on with.

use super::backup::{self, Backup};
use super::identity::{self, RESTORING};
use super::log::LogStore;
use super::restore::{Restore, Restored};
use super::sled_kv::sync_dir;
use super::store::{Shared, StateMachine};
use super::{StartError, recover};
use dfs_env::Env;
use openraft::RaftLogReader;
use openraft::storage::RaftStateMachine;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

/// What is to be restored, and where what was there before is kept.
pub const RECOVERY: &str = "RECOVERY";
pub const BEFORE: &str = "before-recovery";

/// Entries applied at once.
const ENTRIES: u64 = 256;

/// Makes a stopped master's data directory that of a group of one; `restore` says whose, its file is not used.
///
/// # Errors
/// `Usage` when the directory is no master's of this cluster, or its master had not caught up with the others; `Failed` when
/// another process uses it, or it cannot be read or written.
pub async fn recover(env: &Env, restore: Restore, cache_bytes: u64) -> Result<Restored, StartError> {
    let dir = restore.dir.clone();
    let failed = |error: io::Error| {
        StartError::Failed(format!("data directory {}: {error}", dir.display()).replace('\n', " "))
    };
    let before = dir.join(BEFORE);
    // Once it is not there any more everything needed is in RECOVERY.
    if dir.join("IDENTITY").exists() {
        if before.exists() && !dir.join(RECOVERY).exists() {
            let text = format!(
                "data directory {}: {BEFORE} is there from an earlier recovery: move it away",
                dir.display()
            );
            return Err(StartError::Usage(text));
        }
        write_recovery(env, &restore, cache_bytes).await?;
        let lock = identity::lock(&dir)?;
        let (from, to) = (dir.clone(), before.clone());
        env.blocking(move || {
            fs::create_dir_all(&to)?;
            fs::rename(from.join("IDENTITY"), to.join("IDENTITY"))?;
            sync_dir(&to)?;
            sync_dir(&from)
        })
        .await
        .map_err(failed)?;
        drop(lock);
    } else if !dir.join(RECOVERY).exists() {
        return Err(StartError::Usage(format!(
            "data directory {}: there is no master's data in it",
            dir.display()
        )));
    }
    if !dir.join(RESTORING).exists() {
        move_away(&dir, &before).map_err(failed)?;
    }
    let file = dir.join(RECOVERY);
    let restored = Restore { file: file.clone(), ..restore }.run(env).await?;
    fs::remove_file(&file).and_then(|()| sync_dir(&dir)).map_err(failed)?;
    Ok(restored)
}

/// Applies what the log has, and writes the state to RECOVERY.
async fn write_recovery(env: &Env, restore: &Restore, cache_bytes: u64) -> Result<(), StartError> {
    let (dir, cluster, id) = (restore.dir.clone(), restore.cluster.clone(), restore.id);
    let failed = |error: &dyn std::fmt::Display| {
        StartError::Failed(format!("data directory {}: {error}", restore.dir.display()).replace('\n', " "))
    };
    let disk = env.clone();
    let opened =
        env.blocking(move || Ok(recover::open_disk(&disk, &dir, &cluster, id, false, cache_bytes, 0))).await;
    let opened = opened.unwrap_or_else(|error| Err(StartError::Failed(error.to_string())))?;
    if opened.joining.active() {
        return Err(StartError::Usage(format!(
            "data directory {}: its master had not caught up with the others: it has not what they had",
            restore.dir.display()
        )));
    }
    let (store, log, lock) = (Arc::clone(&opened.store), opened.log.clone(), opened.lock);
    let shared = Shared::new(
        env.clone(),
        restore.cluster.clone(),
        opened.store,
        opened.snapshots,
        opened.joining,
        opened.room,
        u64::MAX,
    );
    let shared = Arc::new(shared.map_err(|error| failed(&error))?);
    apply_all(log.clone(), &shared).await.map_err(|error| failed(&error))?;
    let path = restore.dir.join(RECOVERY);
    let written = env
        .blocking(move || {
            write(&shared, &path)?;
            drop(shared);
            log.close();
            store.close()
        })
        .await;
    drop(lock);
    written.map_err(|error| failed(&error))
}

async fn apply_all(mut log: LogStore, shared: &Arc<Shared>) -> io::Result<()> {
    let (_, last) = log.ends()?;
    let mut machine = StateMachine(Arc::clone(shared));
    loop {
        let next = shared.applied().0.map_or(0, |applied| applied.index + 1);
        if last.is_none_or(|last| last.index < next) {
            return Ok(());
        }
        let entries = log.try_get_log_entries(next..next + ENTRIES).await.map_err(io::Error::other)?;
        if entries.is_empty() {
            return Err(io::Error::other(format!("the log has no entry {next}")));
        }
        machine.apply(entries).await.map_err(io::Error::other)?;
    }
}

fn write(shared: &Arc<Shared>, path: &Path) -> io::Result<()> {
    let draft = path.with_extension("tmp");
    let mut file = fs::File::create(&draft)?;
    let mut backup = Backup::begin(shared)?;
    while let Some(bytes) = backup.piece()? {
        file.write_all(&bytes)?;
    }
    file.sync_all()?;
    backup::check(&draft)?;
    fs::rename(&draft, path)?;
    sync_dir(path.parent().unwrap_or(path))
}

/// Moves what the lost group had out of the way. It is kept: nobody else has it.
fn move_away(dir: &Path, before: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let stays = name == "LOCK" || name == "lost+found" || name == RECOVERY || name == BEFORE;
        if !stays {
            fs::rename(dir.join(&name), before.join(&name))?;
        }
    }
    sync_dir(before)?;
    sync_dir(dir)
}
