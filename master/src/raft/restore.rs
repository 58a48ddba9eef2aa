//! Makes a data directory from a backup: that of a master that is a group of one.
//!
//! ```text
//!   empty directory ──> RESTORING ──> snapshots/, log/, all synced ──rename──> IDENTITY
//! ```
//!
//! A stop anywhere before the last step leaves a directory that no master uses, and that a repeated restore begins anew.
//!
//! The group's term, and the entry that the state is as of, are counted in milliseconds of the clock: chunk daemons remember
//! the highest term that they have seen, and a group never gets through a term in a millisecond. `state::restored` says what
//! becomes of the state itself.

use super::codec::{AppliedRow, applied_row};
use super::disk_log::DiskLog;
use super::identity::{self, RESTORING};
use super::sled_kv::{replace_file, sync_dir};
use super::snapshot::{RowIter, SnapshotData, SnapshotWriter, Snapshots, snapshot_id};
use super::types::{LogId, Membership, StoredMembership, Vote};
use super::{StartError, backup};
use crate::state::keys;
use crate::state::restored::{Base, Restoring};
use dfs_env::Env;
use dfs_proto::v1::ClusterRow;
use openraft::{BasicNode, CommittedLeaderId};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Rows written at once.
const ROWS: usize = 1000;

/// A restore.
#[derive(Clone)]
pub struct Restore {
    /// The data directory: missing, or empty.
    pub dir: PathBuf,
    pub id: u64,
    /// Where the master will be reached.
    pub address: String,
    /// The cluster that the key is of.
    pub cluster: String,
    pub file: PathBuf,
    /// Replicas of chunks that were made after the backup are deleted as soon as their daemons come.
    pub discard_newer: bool,
    /// Milliseconds since 1970.
    pub now_ms: u64,
}

/// What was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// The log entry that the backup was as of, in the group of then.
    pub index: u64,
    pub files: u64,
    pub chunks: u64,
}

impl Restore {
    /// Does it.
    ///
    /// # Errors
    /// `Usage` when the file is no whole backup of this cluster or the directory is not empty, `Failed` when the directory
    /// cannot be written. Then there is nothing in it that was not there before.
    pub async fn run(self, env: &Env) -> Result<Restored, StartError> {
        let this = self.clone();
        let begun = env.blocking(move || Ok(this.begin())).await;
        let (lock, index) = begun.unwrap_or_else(|error| Err(StartError::Failed(error.to_string())))?;
        let made = self.make(env).await;
        let result = match made {
            Ok(cluster) => Ok(Restored { index, files: cluster.files, chunks: cluster.chunks }),
            Err(error) => {
                let cleaned = clear(&self.dir);
                let dir = self.dir.display();
                let text = format!("cannot restore into {dir}: {error}").replace('\n', " ");
                Err(match (error.kind(), cleaned) {
                    (_, Err(also)) => StartError::Failed(format!("{text}; cannot clean up: {also}")),
                    (io::ErrorKind::InvalidData, Ok(())) => StartError::Usage(text),
                    (_, Ok(())) => StartError::Failed(text),
                })
            }
        };
        drop(lock);
        result
    }

    /// Checks everything before anything is touched, and takes the directory.
    fn begin(&self) -> Result<(fs::File, u64), StartError> {
        let shown = self.file.display();
        let (cluster, index) = backup::check(&self.file)
            .map_err(|error| StartError::Usage(format!("backup {shown}: {error}")))?;
        if cluster != self.cluster {
            let text = format!(
                "backup {shown}: it is of cluster {cluster}, the cluster key is that of {}",
                self.cluster
            );
            return Err(StartError::Usage(text));
        }
        let lock = identity::lock(&self.dir)?;
        let failed =
            |error: io::Error| StartError::Failed(format!("data directory {}: {error}", self.dir.display()));
        let unfinished = self.dir.join(RESTORING).exists() && !self.dir.join("IDENTITY").exists();
        if unfinished {
            clear(&self.dir).map_err(failed)?;
        }
        if let Some(name) = identity::foreign(&self.dir).map_err(failed)? {
            let dir = self.dir.display();
            let text =
                format!("data directory {dir}: it is not empty (it holds {name}): restore into an empty one");
            return Err(StartError::Usage(text));
        }
        Ok((lock, index))
    }

    async fn make(&self, env: &Env) -> io::Result<ClusterRow> {
        let this = self.clone();
        let cluster = env.blocking(move || this.make_snapshot()).await?;
        let dir = self.dir.join("log");
        let log = env.blocking(move || DiskLog::open(&dir)).await?;
        let saved = log.save_vote(Vote::new(self.now_ms, self.id)).await;
        let this = self.clone();
        env.blocking(move || {
            log.close();
            saved?;
            sync_dir(&this.dir)?;
            fs::rename(this.dir.join(RESTORING), this.dir.join("IDENTITY"))?;
            sync_dir(&this.dir)
        })
        .await?;
        Ok(cluster)
    }

    fn make_snapshot(&self) -> io::Result<ClusterRow> {
        let identity = identity::text(&self.cluster, self.id, self.now_ms).map_err(io::Error::other)?;
        replace_file(&self.dir.join(RESTORING), identity.as_bytes())?;
        let snapshots = Snapshots::open(self.dir.join("snapshots"))?;
        let reader = SnapshotData::file(&self.file)?.open()?;
        let header = self.header(&reader.header);
        let reader_term = reader.header.last().map_or(0, |last| last.leader_id.term);
        let mut writer = SnapshotWriter::new(snapshots.draft("restore")?, &header)?;
        let restoring = Restoring::new(Base::of_second(self.now_ms / 1000), self.discard_newer);
        let (mut rows, mut cluster) = (Vec::with_capacity(ROWS), None);
        for row in RowIter::from(reader) {
            let (key, value) = row?;
            if let Some(value) = restoring.row(&key, value)? {
                if key == keys::cluster() {
                    let row = ClusterRow::decode(value.as_slice()).map_err(super::codec::invalid)?;
                    let since_1970 = row.now.as_ref().map_or(0, |now| now.seconds);
                    self.check_clock(since_1970, reader_term)?;
                    cluster = Some(row);
                }
                rows.push((key, value));
            }
            if rows.len() == ROWS {
                writer.block(&rows)?;
                rows.clear();
            }
        }
        writer.block(&rows)?;
        snapshots.keep(writer.finish()?, &self.cluster)?;
        cluster.ok_or_else(|| super::codec::invalid("the backup is of a cluster that had not begun"))
    }

    /// Terms and numbers are counted by the clock: one that is behind would begin a history that daemons and masters take for
    /// an old one.
    fn check_clock(&self, backup_seconds: i64, backup_term: u64) -> io::Result<()> {
        let now_seconds = i64::try_from(self.now_ms / 1000).unwrap_or(i64::MAX);
        if now_seconds < backup_seconds || self.now_ms <= backup_term {
            let behind = "the clock of this machine is behind the time of the backup: set it right first";
            return Err(super::codec::invalid(behind));
        }
        Ok(())
    }

    /// As of the first entry of a group whose only member this master is.
    fn header(&self, of: &AppliedRow) -> AppliedRow {
        let index = of.last().map_or(0, |last| last.index);
        let last = LogId::new(CommittedLeaderId::new(self.now_ms, self.id), index + 1);
        let nodes = BTreeMap::from([(self.id, BasicNode::new(&self.address))]);
        let alone = Membership::new(vec![BTreeSet::from([self.id])], nodes);
        let row = applied_row(Some(&last), &StoredMembership::new(Some(last), alone));
        AppliedRow { snapshot: snapshot_id(Some(&last)), cluster: self.cluster.clone(), ..row }
    }
}

/// Takes away what a restore that did not come to its end has left.
fn clear(dir: &Path) -> io::Result<()> {
    if dir.join("IDENTITY").exists() {
        return Err(io::Error::other("it has become a master's"));
    }
    for name in ["snapshots", "log"] {
        match fs::remove_dir_all(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    for name in [RESTORING, "RESTORING.tmp"] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    sync_dir(dir)
}
