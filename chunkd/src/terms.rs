//! The highest Raft term that an order or a welcome carried. Kept on disk: after a restart, too, a leader that was replaced gives no
//! destructive orders here.
//!
//! `TERM` of each data directory has two slots of a sector each. A new term is written over the older of them, so the file never grows:
//! a daemon whose disk is full follows a new leader too, and can carry out the deletes that make room.
//!
//! ```text
//!   0        8              16     20            512                    1024
//!   │ magic  │ term, u64 LE │ CRC  │ zeros       │ the other slot       │
//! ```

use crate::lock;
use crate::store::dirs::DataDir;
use crate::store::durable;
use dfs_env::Env;
use dfs_env::defect::{self, Defect};
use dfs_env::disk::{Disk, DiskFile, OpenMode};
use dfs_proto::checksum::crc32c;
use dfs_proto::error::ErrorCode;
use dfs_proto::{FsError, FsResult};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

const MAGIC: [u8; 8] = *b"dfs term";
/// What a disk writes whole or leaves alone, at most.
const SLOT: usize = 512;
/// What is written of a slot.
const RECORD: usize = 20;

/// The highest term seen.
pub struct Terms {
    env: Env,
    files: Vec<Arc<TermFile>>,
    highest: Mutex<u64>,
    /// Held while a term is written, so that a lower one is never written over a higher one.
    writing: tokio::sync::Mutex<()>,
}

/// `TERM` of one data directory.
struct TermFile {
    dir: Arc<DataDir>,
    path: PathBuf,
}

impl Terms {
    /// Reads what the data directories know; a new one gets its file now, while there may be room for it. Blocks.
    #[must_use]
    pub fn open(env: Env, dirs: &[Arc<DataDir>]) -> Self {
        let mut highest = 0;
        let mut files = Vec::with_capacity(dirs.len());
        for dir in dirs.iter().filter(|dir| dir.failure().is_none()) {
            let file = TermFile { dir: Arc::clone(dir), path: dir.path.join("TERM") };
            match file.open(&*env.disk) {
                Ok(term) => highest = highest.max(term),
                Err(error) => dir.fail(&durable::failed("opening", &file.path, error)),
            }
            files.push(Arc::new(file));
        }
        Self { env, files, highest: Mutex::new(highest), writing: tokio::sync::Mutex::new(()) }
    }

    /// Accepts a term that is not below the highest seen, durably.
    ///
    /// # Errors
    /// ERROR_NOT_LEADER for a lower term; ERROR_IO when no directory took it.
    pub async fn observe(&self, term: u64) -> FsResult<()> {
        let _writing = if term > *lock(&self.highest) { Some(self.writing.lock().await) } else { None };
        let highest = *lock(&self.highest);
        if term < highest {
            if defect::has(Defect::TermUnchecked) {
                return Ok(());
            }
            let text = format!("term {term} is over, term {highest} was seen");
            return Err(FsError::new(ErrorCode::ErrorNotLeader, text));
        }
        if term == highest {
            return Ok(());
        }
        let (env, files) = (self.env.clone(), self.files.clone());
        self.env.blocking(move || write_all(&*env.disk, &files, term)).await?;
        *lock(&self.highest) = term;
        Ok(())
    }
}

fn write_all(disk: &dyn Disk, files: &[Arc<TermFile>], term: u64) -> io::Result<()> {
    let mut written = 0;
    for file in files.iter().filter(|file| file.dir.failure().is_none()) {
        match file.write(disk, term) {
            Ok(()) => written += 1,
            Err(error) => file.dir.fail(&durable::failed("writing", &file.path, error)),
        }
    }
    if written == 0 { Err(io::Error::other("no data directory took the term")) } else { Ok(()) }
}

impl TermFile {
    /// The term that the file holds. One that is missing, or was written as a line of text by earlier versions, is made anew.
    fn open(&self, disk: &dyn Disk) -> io::Result<u64> {
        let bytes = match disk.read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let term = match slots(&bytes).into_iter().flatten().max() {
            Some(term) => return Ok(term),
            None if bytes.is_empty() => 0,
            None => line(&bytes).unwrap_or_else(|| {
                tracing::error!(path = %self.path.display(), "this file holds no term and is not believed");
                0
            }),
        };
        disk.replace(&self.path, &file_of(term))?;
        Ok(term)
    }

    /// Writes a term that is higher than any before, durably.
    fn write(&self, disk: &dyn Disk, term: u64) -> io::Result<()> {
        let file = match disk.open(&self.path, OpenMode::Write) {
            Ok(file) if file.len()? == 2 * SLOT as u64 => file,
            // It could not be made when the daemon started, or somebody removed it.
            Ok(_) => return disk.replace(&self.path, &file_of(term)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return disk.replace(&self.path, &file_of(term));
            }
            Err(error) => return Err(error),
        };
        let [first, second] = slots(&contents(&*file)?);
        let at = if first <= second { 0 } else { SLOT };
        file.write_all_at(&record(term), at as u64)?;
        file.sync_data()
    }
}

fn contents(file: &dyn DiskFile) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.append_exact_at(&mut bytes, 2 * SLOT, 0)?;
    Ok(bytes)
}

fn record(term: u64) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    record[..8].copy_from_slice(&MAGIC);
    record[8..16].copy_from_slice(&term.to_le_bytes());
    let sum = crc32c(&record[..16]);
    record[16..].copy_from_slice(&sum.to_le_bytes());
    record
}

/// A whole file with one term.
fn file_of(term: u64) -> Vec<u8> {
    let mut bytes = vec![0; 2 * SLOT];
    bytes[..RECORD].copy_from_slice(&record(term));
    bytes
}

/// The terms of both slots; None for one that was never written, or not whole.
fn slots(bytes: &[u8]) -> [Option<u64>; 2] {
    [0, SLOT].map(|at| {
        let found = bytes.get(at..at + RECORD)?;
        let term = u64::from_le_bytes(found[8..16].try_into().ok()?);
        (found == record(term)).then_some(term)
    })
}

/// `term = 7`, as the first version wrote it.
fn line(bytes: &[u8]) -> Option<u64> {
    std::str::from_utf8(bytes).ok()?.trim().strip_prefix("term = ")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    fn dir(path: &Path) -> Arc<DataDir> {
        DataDir::new(path.to_owned(), None)
    }

    fn open(root: &Path) -> Terms {
        Terms::open(Env::real(), &[dir(root)])
    }

    #[tokio::test]
    async fn a_lower_term_is_refused_after_a_restart_too() {
        let root = tempfile::tempdir().expect("temporary directory");
        let both = [dir(&root.path().join("a")), dir(&root.path().join("b"))];
        for dir in &both {
            std::fs::create_dir(&dir.path).expect("made");
        }
        {
            let terms = Terms::open(Env::real(), &both);
            terms.observe(7).await.expect("higher");
            terms.observe(7).await.expect("the same");
            assert_eq!(terms.observe(6).await.expect_err("lower").code, ErrorCode::ErrorNotLeader);
        }
        let terms = Terms::open(Env::real(), &both[1..]);
        assert_eq!(terms.observe(6).await.expect_err("lower").code, ErrorCode::ErrorNotLeader);
        terms.observe(8).await.expect("higher");
    }

    #[tokio::test]
    async fn the_file_never_grows_and_is_made_again_where_it_is_missing() {
        let root = tempfile::tempdir().expect("temporary directory");
        let (terms, path) = (open(root.path()), root.path().join("TERM"));
        for term in 1..=5 {
            assert_eq!(std::fs::metadata(&path).expect("there from the first moment").len(), 2 * SLOT as u64);
            terms.observe(term).await.expect("higher");
        }
        std::fs::remove_file(&path).expect("removed");
        terms.observe(6).await.expect("higher");
        assert_eq!(*lock(&open(root.path()).highest), 6);
    }

    #[test]
    fn what_the_first_version_wrote_is_known() {
        let root = tempfile::tempdir().expect("temporary directory");
        for (text, term) in [("term = 41\n", 41), ("term = \n", 0), ("\0\0\0", 0)] {
            std::fs::write(root.path().join("TERM"), text).expect("written");
            assert_eq!(*lock(&open(root.path()).highest), term);
            assert_eq!(*lock(&open(root.path()).highest), term, "made anew");
        }
    }

    proptest! {
        /// Whatever a crash leaves of the slot that is being written, the term before it is known.
        #[test]
        fn a_torn_write_loses_no_term_that_was_written(
            terms in prop::collection::btree_set(any::<u64>(), 1..6),
            torn in 0..RECORD,
            garbage in any::<u8>(),
        ) {
            let root = tempfile::tempdir().expect("temporary directory");
            let file = TermFile { dir: dir(root.path()), path: root.path().join("TERM") };
            let disk = Env::real().disk;
            file.open(&*disk).expect("new");
            let terms: Vec<u64> = terms.into_iter().collect();
            let (last, before) = terms.split_last().expect("one at least");
            for term in before {
                file.write(&*disk, *term).expect("written");
            }
            let old = disk.read(&file.path).expect("read");
            file.write(&*disk, *last).expect("written");
            let mut bytes = disk.read(&file.path).expect("read");
            prop_assert_eq!(file.open(&*disk).expect("read"), *last);
            let at = if old[..SLOT] == bytes[..SLOT] { SLOT } else { 0 };
            let known = before.last().copied().unwrap_or(0);
            bytes[at + torn] = garbage;
            std::fs::write(&file.path, &bytes).expect("written");
            let found = file.open(&*disk).expect("read");
            prop_assert!(found == *last || found == known, "{found}");
            bytes[at..at + torn].copy_from_slice(&old[at..at + torn]);
            std::fs::write(&file.path, &bytes).expect("written");
            let found = file.open(&*disk).expect("read");
            prop_assert!(found == *last || found == known, "{found}");
        }
    }
}
