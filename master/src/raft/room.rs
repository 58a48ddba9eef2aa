//! Room on the disk of the data directory, so that a full one stops changes and nothing else.
//!
//! A write to the Raft log that fails for want of space is as bad as one that fails otherwise: the master has to stop. So it
//! never comes to that. A part of the reserve is held by a file (`BALLAST`), so that it is there even if somebody else
//! fills the disk in one go; the rest is looked at before each entry.
//!
//! ```text
//!            free ≥ reserve/2, ballast held        less                      little, ballast given up
//!   PLENTY ────────────────────────────────► SHORT ───────────────────► NONE
//!     changes are taken                        changes of clients get       nothing is appended, voted, led
//!                                              ENOSPC; the cluster's own,
//!                                              elections and such go on
//! ```
//!
//! It is PLENTY again once the ballast is back and what was free before is free besides.

use dfs_env::{Disk, Env};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

const FILE: &str = "BALLAST";
/// How often it is looked at while nothing is proposed.
pub const LOOK: Duration = Duration::from_millis(200);

/// How much room there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    None,
    Short,
    Plenty,
}

/// What is to be done about the ballast, and what there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Stay(Level),
    /// Give the ballast up, then look again.
    Release,
    /// Take the ballast again: then there is plenty.
    Take,
}

/// Decides by the bytes that are free and whether the ballast is held.
fn judge(reserve: u64, free: u64, held: bool) -> Verdict {
    let half = reserve / 2;
    match held {
        true if free >= half => Verdict::Stay(Level::Plenty),
        true if free >= half / 2 => Verdict::Stay(Level::Short),
        true => Verdict::Release,
        // A little more than is needed: not to and fro for a few bytes.
        false if free >= half * 2 + half / 4 => Verdict::Take,
        false if free >= half / 8 => Verdict::Stay(Level::Short),
        false => Verdict::Stay(Level::None),
    }
}

/// The room of one data directory.
pub struct Room {
    place: Option<Place>,
    level: AtomicU8,
    /// Told of every change.
    changes: watch::Sender<Level>,
}

struct Place {
    dir: PathBuf,
    reserve: u64,
    disk: Arc<dyn Disk>,
    /// Whether the ballast is held. Locked while it is looked at and acted.
    held: Mutex<bool>,
}

impl Room {
    /// Room without an end: simulated storage, or no reserve.
    pub fn unlimited() -> Self {
        Self {
            place: None,
            level: AtomicU8::new(Level::Plenty as u8),
            changes: watch::Sender::new(Level::Plenty),
        }
    }

    /// Of a data directory that is this process's. Blocks.
    pub fn open(env: &Env, dir: &Path, reserve: u64) -> Self {
        if reserve == 0 {
            return Self::unlimited();
        }
        let held = fs::metadata(dir.join(FILE)).is_ok_and(|file| file.len() == reserve / 2);
        let place =
            Place { dir: dir.to_owned(), reserve, disk: Arc::clone(&env.disk), held: Mutex::new(held) };
        if !held {
            // One of another size, or a part of one.
            drop(fs::remove_file(dir.join(FILE)));
        }
        let room = Self { place: Some(place), ..Self::unlimited() };
        room.look();
        room
    }

    /// Waits until there is room to start at all. Blocks; whoever wants to end the process does so.
    pub fn wait(&self) {
        let mut told = false;
        while self.look() == Level::None {
            if !told {
                tracing::error!("the disk of the data directory is full: waiting for room");
                told = true;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// How much room there was at the last look.
    pub fn level(&self) -> Level {
        match self.level.load(Ordering::Acquire) {
            0 => Level::None,
            1 => Level::Short,
            _ => Level::Plenty,
        }
    }

    /// Told of every change.
    pub fn changes(&self) -> watch::Receiver<Level> {
        self.changes.subscribe()
    }

    /// Looks how much room there is now. Takes a few microseconds, more when the ballast comes or goes.
    pub fn look(&self) -> Level {
        let Some(place) = &self.place else { return Level::Plenty };
        let level = match place.look() {
            Ok(level) => level,
            Err(error) => {
                tracing::warn!(%error, "cannot tell how much room there is on the disk");
                return self.level();
            }
        };
        let before = self.level.swap(level as u8, Ordering::AcqRel);
        if before != level as u8 {
            match level {
                Level::Plenty => tracing::info!("there is room on the disk again: changes are taken"),
                Level::Short => tracing::error!("the disk of the data directory is full: changes get ENOSPC"),
                Level::None => {
                    tracing::error!("there is no room at all on the disk: nothing is appended or voted");
                }
            }
            self.changes.send_replace(level);
        }
        level
    }

    /// Whether so many bytes may be written besides what is kept back.
    pub fn has(&self, bytes: u64) -> bool {
        let Some(place) = &self.place else { return true };
        self.look() == Level::Plenty
            && place.disk.space(&place.dir).is_ok_and(|space| space.free_bytes >= bytes + place.reserve / 2)
    }
}

impl Place {
    fn look(&self) -> io::Result<Level> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match judge(self.reserve, self.disk.space(&self.dir)?.free_bytes, *held) {
                Verdict::Stay(level) => return Ok(level),
                Verdict::Release => {
                    *held = false;
                    match fs::remove_file(self.dir.join(FILE)) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                Verdict::Take => match self.take() {
                    Ok(()) => *held = true,
                    Err(error) => {
                        tracing::debug!(%error, "the ballast does not come into place");
                        drop(fs::remove_file(self.dir.join(FILE)));
                        return Ok(Level::Short);
                    }
                },
            }
        }
    }

    fn take(&self) -> io::Result<()> {
        let file =
            fs::OpenOptions::new().create(true).truncate(true).write(true).open(self.dir.join(FILE))?;
        let length = libc::off_t::try_from(self.reserve / 2).map_err(io::Error::other)?;
        // SAFETY: the descriptor is open and the call takes no memory of ours.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, length) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_stop_before_raft_does_and_come_back_only_with_the_ballast() {
        use Verdict::{Release, Stay, Take};
        for (free, held, verdict) in [
            (32, true, Stay(Level::Plenty)),
            (31, true, Stay(Level::Short)),
            (16, true, Stay(Level::Short)),
            (15, true, Release),
            (47, false, Stay(Level::Short)),
            (4, false, Stay(Level::Short)),
            (3, false, Stay(Level::None)),
            (71, false, Stay(Level::Short)),
            (72, false, Take),
        ] {
            assert_eq!(judge(64, free, held), verdict, "{free} {held}");
        }
    }
}
