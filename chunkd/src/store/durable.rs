//! Everything that makes bytes and names survive a crash: the only place with fdatasync, directory syncs, renames and
//! removals.
//!
//! * Bytes: [`Syncs`] lets all who wait for one chunk file share one fdatasync; those who come while it runs share the
//!   next one. The file's name is synced once, after the first fdatasync.
//! * Names: `chunks/00` to `chunks/ff` are made and synced before a data directory gets its IDENTITY, so that later only
//!   the directory that holds a new file needs a sync.
//! * An fdatasync that failed is never repeated: the kernel may have dropped the bytes and called them clean. The chunk
//!   takes no appends and reports no sync from then on, until a restart reads what is really there.

use dfs_env::disk::{Disk, DiskFile, OpenMode};
use dfs_proto::error::ErrorCode;
use dfs_proto::{FsError, FsResult};
use std::io;
use std::ops::Range;
use std::path::Path;
use tokio::sync::oneshot;

/// What the system keeps files in memory by, at least.
const PAGE: u64 = 4096;

/// How far a chunk's bytes have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// Payload bytes written.
    pub length: u64,
    /// Payload bytes known to be on disk.
    pub synced: u64,
}

/// Who waits for an fdatasync of one chunk file.
///
/// ```text
///   idle ── ask ──► running ── done, nobody waits ──► idle
///                     │  ▲
///                     └──┘ done, somebody came meanwhile: once more
/// ```
#[derive(Default)]
pub struct Syncs {
    running: bool,
    waiting: Vec<(u64, oneshot::Sender<FsResult<Held>>)>,
}

impl Syncs {
    /// Somebody wants everything below `upto` on disk. True: the caller must start running.
    pub fn ask(&mut self, upto: u64, done: oneshot::Sender<FsResult<Held>>) -> bool {
        self.waiting.push((upto, done));
        !std::mem::replace(&mut self.running, true)
    }

    /// An fdatasync that nobody waits for. True: the caller must start running.
    pub fn start(&mut self) -> bool {
        !std::mem::replace(&mut self.running, true)
    }

    /// One fdatasync ended. `length`: what the chunk holds now, read while this is locked; `result` is older, and who asked
    /// since then may have written more. False: nobody waits, the runner stops.
    pub fn ended(&mut self, result: &FsResult<Held>, length: u64) -> bool {
        match result {
            Ok(held) => {
                for (upto, done) in std::mem::take(&mut self.waiting) {
                    if upto <= held.synced {
                        // Whoever asked may be gone; nothing is owed to him then.
                        let _ = done.send(Ok(*held));
                    } else if upto > length {
                        let text = "a seal cut these bytes while their sync was awaited";
                        let _ = done.send(Err(FsError::new(ErrorCode::ErrorConflict, text)));
                    } else {
                        self.waiting.push((upto, done));
                    }
                }
            }
            Err(error) => {
                for (_, done) in self.waiting.drain(..) {
                    let _ = done.send(Err(error.clone()));
                }
            }
        }
        self.running = !self.waiting.is_empty();
        self.running
    }
}

/// Makes a file's bytes durable, and its name unless that is known to be.
///
/// # Errors
/// What the disk says.
pub fn sync_file(disk: &dyn Disk, file: &dyn DiskFile, path: &Path, name_is_synced: bool) -> io::Result<()> {
    file.sync_data()?;
    if !name_is_synced {
        disk.sync_dir(parent(path)?)?;
    }
    Ok(())
}

/// Lets a stream of long appends pass through the system's memory: what is not on the disk is written from now on, so that
/// the fdatasync that comes waits for less; what is makes room for what comes next. Else each append takes new memory.
pub fn pass_by(file: &dyn DiskFile, path: &Path, written: &Range<u64>) {
    if written.is_empty() {
        return;
    }
    // Where one range ends inside a page, that page goes with the next one.
    let from_page = written.start / PAGE * PAGE;
    // Advice only: an error of the disk is told by the fdatasync.
    if let Err(error) = file.forget_cached(from_page..written.end) {
        tracing::debug!(path = %path.display(), %error, "the system keeps what was written");
    }
}

/// Cuts a file and makes the cut durable. Without the sync a crash could keep the old length, and bytes written later
/// over the first part of a cut record would stand before the rest of it.
///
/// # Errors
/// What the disk says.
pub fn cut(file: &dyn DiskFile, length: u64) -> io::Result<()> {
    file.set_len(length)?;
    file.sync_data()
}

/// Removes a file for good. One that is not there is removed.
///
/// # Errors
/// What the disk says.
pub fn remove(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    forget(disk, path)?;
    sync_name(disk, path)
}

/// Removes a file that means nothing. A crash may bring it back.
///
/// # Errors
/// What the disk says.
pub fn forget(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    match disk.remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes a file's name durable.
///
/// # Errors
/// What the disk says.
pub fn sync_name(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    disk.sync_dir(parent(path)?)
}

/// Makes the 256 directories for chunk files in a data directory, durably.
///
/// # Errors
/// What the disk says.
pub fn make_chunk_dirs(disk: &dyn Disk, data: &Path) -> io::Result<()> {
    let chunks = data.join("chunks");
    for byte in 0..=255_u8 {
        disk.create_dir_all(&chunks.join(format!("{byte:02x}")))?;
    }
    disk.sync_dir(&chunks)?;
    disk.sync_dir(data)?;
    // The data directory's own name, when this start made it. A relative path of one component stands in ".".
    match data.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => disk.sync_dir(parent),
        Some(_) => disk.sync_dir(Path::new(".")),
        None => Ok(()),
    }
}

/// Puts a small file in place, whole and durable.
///
/// # Errors
/// What the disk says.
pub fn replace(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    disk.replace(path, bytes)
}

/// Opens a file for appends.
///
/// # Errors
/// What the disk says.
pub fn open_for_appends(
    disk: &dyn Disk,
    path: &Path,
    create: bool,
) -> io::Result<std::sync::Arc<dyn DiskFile>> {
    disk.open(path, if create { OpenMode::CreateNew } else { OpenMode::Write })
}

fn parent(path: &Path) -> io::Result<&Path> {
    path.parent().ok_or_else(|| io::Error::other(format!("{} has no directory", path.display())))
}

/// An I/O error with what was being done, as an answer.
#[must_use]
pub fn failed(what: &str, path: &Path, error: io::Error) -> FsError {
    FsError::from(error).during(format_args!("{what} {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sync_serves_all_who_asked_before_it_began() {
        let mut syncs = Syncs::default();
        let (first, mut first_done) = oneshot::channel();
        let (second, mut second_done) = oneshot::channel();
        assert!(syncs.ask(10, first));
        assert!(!syncs.ask(30, second));
        assert!(syncs.ended(&Ok(Held { length: 40, synced: 20 }), 40));
        assert_eq!(first_done.try_recv().expect("answered").expect("synced").synced, 20);
        assert!(second_done.try_recv().is_err());
        assert!(!syncs.ended(&Ok(Held { length: 40, synced: 40 }), 40));
        assert_eq!(second_done.try_recv().expect("answered").expect("synced").synced, 40);
        assert!(syncs.start());
        let (cut, mut cut_done) = oneshot::channel();
        assert!(!syncs.ask(50, cut));
        assert!(!syncs.ended(&Ok(Held { length: 40, synced: 40 }), 40));
        assert!(cut_done.try_recv().expect("answered").is_err());
    }

    #[test]
    fn bytes_written_after_a_sync_ended_wait_for_the_next_one() {
        let mut syncs = Syncs::default();
        let (first, mut first_done) = oneshot::channel();
        let (late, mut late_done) = oneshot::channel();
        assert!(syncs.ask(40, first));
        // Written and asked for between the end of the fdatasync and its being told.
        assert!(!syncs.ask(50, late));
        assert!(syncs.ended(&Ok(Held { length: 40, synced: 40 }), 50));
        assert!(first_done.try_recv().expect("answered").is_ok());
        assert!(late_done.try_recv().is_err(), "nothing was cut");
        assert!(!syncs.ended(&Ok(Held { length: 50, synced: 50 }), 50));
        assert!(late_done.try_recv().expect("answered").is_ok());
    }

    #[test]
    fn a_failed_sync_fails_all_who_wait() {
        let mut syncs = Syncs::default();
        let (done, mut answer) = oneshot::channel();
        assert!(syncs.ask(10, done));
        assert!(!syncs.ended(&Err(FsError::new(ErrorCode::ErrorIo, "gone")), 10));
        assert!(answer.try_recv().expect("answered").is_err());
    }
}
