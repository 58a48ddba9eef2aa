//! The state store on disk: sled, as a copy of the state that can always be made again from snapshot and log.
//!
//! sled's own flush is no fdatasync, so nothing is asked of it that a power loss must not take. A store is believed only
//! if the machine has not been restarted since it was opened, or if it was closed cleanly (flushed, then every file
//! fsynced); the file `STATE` beside it says so, and which of the directories `state-N` is the current one. After a mere
//! kill, sled has all or nothing of each batch, some of the last batches missing: the log has them.

use crate::state::kv::Each;
use crate::state::{Kv, WriteSet};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

/// Rows written at once while a store is loaded.
const LOAD_ROWS: usize = 1000;

/// The contents of `STATE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    format: u32,
    /// Which `state-N` holds the state; 0: none.
    generation: u64,
    /// The boot of the machine during which it was opened last.
    boot: String,
    clean: bool,
}

const FORMAT: u32 = 1;

struct Opened {
    db: sled::Db,
    generation: u64,
}

/// A [`Kv`] in a directory.
pub struct SledKv {
    dir: PathBuf,
    cache_bytes: u64,
    /// None once closed.
    opened: RwLock<Option<Opened>>,
}

fn boot_id() -> String {
    // Without one no store is believed after an unclean stop, which is slow but right.
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| String::new(), |id| id.trim().to_owned())
}

/// Puts a small file in place durably and atomically.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = fs::File::create(&temporary)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_dir(path.parent().unwrap_or(path))
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

fn sled_error(error: sled::Error) -> io::Error {
    match error {
        sled::Error::Io(error) => error,
        damaged @ (sled::Error::Corruption { .. } | sled::Error::ReportableBug(_)) => {
            let text = damaged.to_string().replace('\n', " ");
            io::Error::new(io::ErrorKind::InvalidData, format!("state store: its files are damaged: {text}"))
        }
        other => io::Error::other(format!("state store: {other}")),
    }
}

/// sled asserts what it expects of its files; a damaged one must cost a rebuild, not the process.
fn guarded<T>(act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    std::panic::catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::InvalidData, "state store: its files are damaged"))
    })
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the state store is closed")
}

impl SledKv {
    /// Opens the store; `Err(reason)` inside when it is missing or not to be believed, and then it is empty and must be
    /// filled with [`SledKv::replace`].
    ///
    /// # Errors
    /// When the directory cannot be worked with at all.
    pub fn open(dir: &Path, cache_bytes: u64) -> io::Result<(Self, Result<(), String>)> {
        let note = match fs::read(dir.join("STATE")) {
            Ok(bytes) => String::from_utf8(bytes)
                .map_err(|_| "STATE is damaged: it is not text".to_owned())
                .and_then(|text| {
                    toml::from_str::<Note>(&text)
                        .map_err(|error| format!("STATE is damaged: {}", error.message().replace('\n', " ")))
                }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err("there is none yet".to_owned()),
            Err(error) => return Err(error),
        };
        let usable = note.and_then(|note| {
            if note.format != FORMAT {
                Err(format!("it has format {}, this program knows {FORMAT}", note.format))
            } else if note.generation == 0 {
                Err("it failed in use".to_owned())
            } else if !note.clean && (note.boot != boot_id() || note.boot.is_empty()) {
                Err("the machine was restarted without a clean stop".to_owned())
            } else {
                Ok(note.generation)
            }
        });
        let store = Self { dir: dir.to_owned(), cache_bytes, opened: RwLock::new(None) };
        let opened = usable.and_then(|generation| {
            if !store.path(generation).is_dir() {
                return Err("its directory is missing".to_owned());
            }
            store.open_generation(generation).map_err(|error| error.to_string())
        });
        let (opened, usable) = match opened {
            Ok(opened) => (opened, Ok(())),
            Err(reason) => {
                store.remove_all_but(0)?;
                (store.open_generation(1)?, Err(reason))
            }
        };
        store.remove_all_but(opened.generation)?;
        // An unusable store is named only once it was filled: a stop before that must not leave an empty one believed.
        store.note(if usable.is_ok() { opened.generation } else { 0 }, false)?;
        *store.opened.write().unwrap_or_else(PoisonError::into_inner) = Some(opened);
        Ok((store, usable))
    }

    fn path(&self, generation: u64) -> PathBuf {
        self.dir.join(format!("state-{generation}"))
    }

    fn open_generation(&self, generation: u64) -> io::Result<Opened> {
        let config = sled::Config::new()
            .path(self.path(generation))
            .cache_capacity(self.cache_bytes)
            .flush_every_ms(Some(1000));
        guarded(|| config.open().map_err(sled_error)).map(|db| Opened { db, generation })
    }

    fn remove_all_but(&self, generation: u64) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let is_state = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("state-"));
            if is_state && path != self.path(generation) {
                fs::remove_dir_all(&path)?;
            }
        }
        Ok(())
    }

    fn note(&self, generation: u64, clean: bool) -> io::Result<()> {
        let note = Note { format: FORMAT, generation, boot: boot_id(), clean };
        let text = toml::to_string(&note).map_err(io::Error::other)?;
        replace_file(&self.dir.join("STATE"), text.as_bytes())
    }

    fn with<T>(&self, act: impl FnOnce(&sled::Db) -> io::Result<T>) -> io::Result<T> {
        let result = {
            let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
            let db = &opened.as_ref().ok_or_else(closed)?.db;
            guarded(|| act(db))
        };
        if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::InvalidData) {
            // The next start builds it again.
            self.distrust();
        }
        result
    }

    /// Takes other rows in place of all there are. Until it returns, the old ones are what a restart would find.
    ///
    /// # Errors
    /// When a row cannot be read or written; then the old rows remain.
    pub fn replace(&self, rows: &mut dyn Iterator<Item = io::Result<(Vec<u8>, Vec<u8>)>>) -> io::Result<()> {
        let next = {
            let opened = self.opened.read().unwrap_or_else(PoisonError::into_inner);
            opened.as_ref().ok_or_else(closed)?.generation + 1
        };
        if self.path(next).exists() {
            fs::remove_dir_all(self.path(next))?;
        }
        let fresh = self.open_generation(next)?;
        let (mut batch, mut count) = (sled::Batch::default(), 0);
        for row in rows {
            let (key, value) = row?;
            batch.insert(key, value);
            count += 1;
            if count == LOAD_ROWS {
                fresh.db.apply_batch(std::mem::take(&mut batch)).map_err(sled_error)?;
                count = 0;
            }
        }
        fresh.db.apply_batch(batch).map_err(sled_error)?;
        // To the page cache: a kill must not take a part of what the note calls complete.
        fresh.db.flush().map_err(sled_error)?;
        self.note(next, false)?;
        let old = self.opened.write().unwrap_or_else(PoisonError::into_inner).replace(fresh);
        drop(old);
        self.remove_all_but(next)
    }

    /// Makes the next start build the store again: it has failed.
    pub fn distrust(&self) {
        if self.opened.read().unwrap_or_else(PoisonError::into_inner).is_none() {
            // Closed, and what came too late was refused: nothing has failed.
            return;
        }
        self.note_failure();
    }

    fn note_failure(&self) {
        if let Err(error) = self.note(0, false) {
            tracing::error!(%error, "cannot note that the state store has failed");
        }
    }

    /// Flushes, fsyncs and closes the store, so that even a power loss leaves it usable.
    ///
    /// # Errors
    /// When that fails; the store is closed all the same, and built again at the next start if the machine restarts.
    pub fn close(&self) -> io::Result<()> {
        let Some(opened) = self.opened.write().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        let Opened { db, generation } = opened;
        guarded(move || {
            db.flush().map_err(sled_error)?;
            drop(db);
            Ok(())
        })
        .inspect_err(|_| self.note_failure())?;
        sync_tree(&self.path(generation))?;
        self.note(generation, true)
    }
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            fs::File::open(&path)?.sync_all()?;
        }
    }
    sync_dir(dir)
}

impl Kv for SledKv {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.with(|db| Ok(db.get(key).map_err(sled_error)?.map(|value| value.to_vec())))
    }

    fn scan(&self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        if from >= to {
            return Ok(());
        }
        self.with(|db| {
            for row in db.range(from..to) {
                let (key, value) = row.map_err(sled_error)?;
                if each(&key, &value).is_break() {
                    break;
                }
            }
            Ok(())
        })
    }

    fn last(&self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        if from >= to {
            return Ok(None);
        }
        self.with(|db| {
            let last = db.range(from..to).next_back().transpose().map_err(sled_error)?;
            Ok(last.map(|(key, value)| (key.to_vec(), value.to_vec())))
        })
    }

    fn apply(&self, writes: &WriteSet) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for (key, value) in writes {
            match value {
                Some(value) => batch.insert(key.as_slice(), value.as_slice()),
                None => batch.remove(key.as_slice()),
            }
        }
        self.with(|db| db.apply_batch(batch).map_err(sled_error))
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|db| db.flush().map(drop).map_err(sled_error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::MemKv;
    use proptest::prelude::*;
    use std::ops::ControlFlow;

    const CACHE: u64 = 8 << 20;

    fn put(key: u8, value: u8) -> WriteSet {
        WriteSet::from([(vec![key], Some(vec![value]))])
    }

    fn set_boot(dir: &Path, boot: &str) {
        let mut note: Note = toml::from_str(&fs::read_to_string(dir.join("STATE")).unwrap()).unwrap();
        note.boot = boot.to_owned();
        fs::write(dir.join("STATE"), toml::to_string(&note).unwrap()).unwrap();
    }

    #[test]
    fn a_store_is_believed_after_a_kill_or_a_clean_stop_but_not_after_a_power_loss() {
        let dir = tempfile::tempdir().unwrap();
        let (store, usable) = SledKv::open(dir.path(), CACHE).unwrap();
        assert_eq!(usable, Err("there is none yet".to_owned()));
        store.replace(&mut std::iter::once(Ok((vec![1], vec![2])))).unwrap();
        store.apply(&put(3, 4)).unwrap();
        store.flush().unwrap();
        drop(store); // as a kill after a flush
        let (store, usable) = SledKv::open(dir.path(), CACHE).unwrap();
        assert_eq!(usable, Ok(()));
        assert_eq!((store.get(&[1]).unwrap(), store.get(&[3]).unwrap()), (Some(vec![2]), Some(vec![4])));
        store.close().unwrap();
        assert!(store.get(&[1]).is_err());
        set_boot(dir.path(), "another boot");
        let (store, usable) = SledKv::open(dir.path(), CACHE).unwrap();
        assert_eq!(usable, Ok(()), "it was closed cleanly");
        drop(store);
        set_boot(dir.path(), "another boot");
        let (store, usable) = SledKv::open(dir.path(), CACHE).unwrap();
        assert!(usable.unwrap_err().contains("restarted"));
        assert_eq!(store.get(&[1]).unwrap(), None, "and it is empty");
    }

    #[test]
    fn a_failed_or_damaged_or_never_filled_store_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        drop(SledKv::open(dir.path(), CACHE).unwrap());
        let (store, usable) = SledKv::open(dir.path(), CACHE).unwrap();
        assert!(usable.is_err(), "it was never filled");
        store.replace(&mut (0..=255_u8).map(|key| Ok((vec![key], vec![key; 1000])))).unwrap();
        store.distrust();
        drop(store);
        let (store, usable) = SledKv::open(dir.path(), CACHE).unwrap();
        assert!(usable.is_err());
        store.replace(&mut (0..=255_u8).map(|key| Ok((vec![key], vec![key; 1000])))).unwrap();
        store.close().unwrap();
        for entry in fs::read_dir(dir.path().join("state-2")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::write(path, b"not a database").unwrap();
            }
        }
        let (_, usable) = SledKv::open(dir.path(), CACHE).unwrap();
        assert!(usable.is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn it_behaves_as_its_twin_in_memory(
            batches in prop::collection::vec(prop::collection::btree_map(prop::collection::vec(0_u8..4, 1..3), prop::option::of(any::<u8>()), 0..6), 1..12),
            from in prop::collection::vec(0_u8..5, 0..3), to in prop::collection::vec(0_u8..5, 0..3),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (store, _) = SledKv::open(dir.path(), CACHE).unwrap();
            let twin = MemKv::new();
            for batch in batches {
                let writes: WriteSet = batch.into_iter().map(|(key, value)| (key, value.map(|value| vec![value]))).collect();
                store.apply(&writes).unwrap();
                twin.apply(&writes).unwrap();
            }
            let rows = |kv: &dyn Kv| {
                let mut rows = Vec::new();
                kv.scan(&from, &to, &mut |key, value| {
                    rows.push((key.to_vec(), value.to_vec()));
                    ControlFlow::Continue(())
                }).unwrap();
                rows
            };
            prop_assert_eq!(rows(&store), rows(&twin));
            prop_assert_eq!(store.last(&from, &to).unwrap(), twin.last(&from, &to).unwrap());
        }
    }
}
