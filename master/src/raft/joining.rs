//! A master with an empty disk does not vote until it has caught up.
//!
//! It may be one that lost its disk: it may have voted in this term, and it may have acknowledged entries that it no longer
//! has. If it voted, it could help a master to the lead that lacks committed entries. So it is *joining*, noted durably
//! before its directory is used, until it has applied everything up to a commit that the leader made in its own term:
//! that is everything that was ever committed with this master's help.
//!
//! ```text
//! empty directory ──> joining ──(applied what a leader committed in its own term)──> member
//!                        └──(all masters are empty: this one forms the cluster)───────^
//! ```
//!
//! While a cluster is formed all its masters are joining; a candidate that has no entry but the cluster's first may be
//! voted for, as nothing was committed yet by anybody whom it could deceive.

use super::sim::SimStorage;
use super::sled_kv::sync_dir;
use super::types::{LogId, Vote};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

const FILE: &str = "JOINING";

/// Whether this master is joining.
pub struct Joining {
    place: Place,
    active: AtomicBool,
    /// What must be applied before this master may vote.
    goal: Mutex<Option<LogId>>,
}

enum Place {
    Disk(PathBuf),
    Sim(Arc<SimStorage>),
}

impl Joining {
    /// Notes durably that the directory is a joining master's. Before anything else is written there.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn begin(dir: &Path) -> io::Result<()> {
        fs::File::create(dir.join(FILE))?.sync_all()?;
        sync_dir(dir)
    }

    /// Whether the name in a data directory is this note.
    pub fn is_note(name: &std::ffi::OsStr) -> bool {
        name == FILE
    }

    /// What a data directory says.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of_dir(dir: &Path) -> io::Result<Self> {
        let path = dir.join(FILE);
        let active = AtomicBool::new(path.try_exists()?);
        Ok(Self { place: Place::Disk(path), active, goal: Mutex::default() })
    }

    /// What simulated storage says.
    pub fn of_sim(storage: &Arc<SimStorage>) -> Self {
        let active = AtomicBool::new(storage.joining.load(Ordering::SeqCst));
        Self { place: Place::Sim(Arc::clone(storage)), active, goal: Mutex::default() }
    }

    pub fn active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// Whether a candidate whose log ends with `last` may be voted for.
    pub fn may_vote(&self, last: Option<&LogId>) -> bool {
        !self.active() || last.is_none_or(|last| last.index == 0)
    }

    /// Hears what a leader has committed; answers whether this master, having applied so much, has caught up.
    pub fn caught_up(&self, leader: &Vote, commit: Option<&LogId>, applied: Option<&LogId>) -> bool {
        let mut goal = self.goal.lock().unwrap_or_else(PoisonError::into_inner);
        if goal.is_none() {
            *goal = commit.filter(|commit| commit.leader_id.term == leader.leader_id().term).copied();
        }
        goal.is_some_and(|goal| applied.is_some_and(|applied| *applied >= goal))
    }

    /// Ends joining, durably. Blocks.
    ///
    /// # Errors
    /// When the note cannot be removed; then this master goes on joining.
    pub fn end(&self) -> io::Result<()> {
        match &self.place {
            Place::Disk(path) => {
                match fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
                sync_dir(path.parent().unwrap_or(path))?;
            }
            Place::Sim(storage) => storage.joining.store(false, Ordering::SeqCst),
        }
        self.active.store(false, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::CommittedLeaderId;

    fn id(term: u64, index: u64) -> LogId {
        LogId::new(CommittedLeaderId::new(term, 1), index)
    }

    #[test]
    fn a_joining_master_votes_once_it_has_what_a_leader_committed_in_its_own_term() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!Joining::of_dir(dir.path()).unwrap().active());
        Joining::begin(dir.path()).unwrap();
        let joining = Joining::of_dir(dir.path()).unwrap();
        assert!(joining.active() && joining.may_vote(Some(&id(0, 0))) && !joining.may_vote(Some(&id(1, 4))));
        let leader = Vote::new_committed(3, 1);
        // A new leader does not know yet what was committed before it.
        assert!(!joining.caught_up(&leader, Some(&id(2, 7)), Some(&id(2, 7))));
        assert!(!joining.caught_up(&leader, Some(&id(3, 9)), Some(&id(2, 8))));
        // The goal does not move away while commits go on.
        assert!(joining.caught_up(&leader, Some(&id(3, 20)), Some(&id(3, 9))));
        joining.end().unwrap();
        assert!(joining.may_vote(Some(&id(1, 4))));
        assert!(!Joining::of_dir(dir.path()).unwrap().active());
    }
}
