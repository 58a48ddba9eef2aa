//! Rows on their way to the state store on disk.
//!
//! sled seals a buffer, writes it and waits for its own threads twice for each batch, which costs more than everything
//! else that an entry takes. So what is applied goes to a table in memory first, and from there, many entries at once, to
//! sled. That is as safe as sled itself: the log holds every entry, the row that tells the last one applied travels in the
//! same batch as what it changed, and a kill leaves sled at an earlier entry from which the log goes on.

use super::sled_kv::SledKv;
use crate::state::kv::{Each, Over};
use crate::state::{Kv, WriteSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Rows that make the writer begin at once. sled shuts readers out while it takes a batch, about 10 ms for so many.
const FULL_ROWS: usize = 2_000;

/// Rows at which whoever applies more writes them out himself: a bound on memory and on the length of a batch.
const MOST_ROWS: usize = 16_000;

/// The longest that a row stays in memory alone.
const LONGEST: Duration = Duration::from_secs(1);

/// A [`Kv`] over a store on disk that takes rows many at a time.
pub struct BufferedKv {
    inner: Arc<Inner>,
    writer: Option<JoinHandle<()>>,
}

struct Inner {
    store: SledKv,
    tables: RwLock<Tables>,
    /// Held while rows go from the tables to the store.
    writing: Mutex<()>,
    /// The store could not be written: nothing more is taken.
    failed: AtomicBool,
    stop: AtomicBool,
}

#[derive(Default)]
struct Tables {
    /// What was applied since `leaving` left.
    active: WriteSet,
    /// On its way to the store.
    leaving: Arc<WriteSet>,
}

impl BufferedKv {
    /// Puts a table before a store.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(store: SledKv) -> io::Result<Self> {
        let inner = Arc::new(Inner {
            store,
            tables: RwLock::default(),
            writing: Mutex::new(()),
            failed: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let writer = {
            let inner = Arc::clone(&inner);
            thread::Builder::new()
                .name("state-writer".to_owned())
                .spawn(move || inner.write_until_stopped())?
        };
        Ok(Self { inner, writer: Some(writer) })
    }

    /// Takes other rows in place of all there are; see [`SledKv::replace`].
    ///
    /// # Errors
    /// When a row cannot be read or written; then the old rows remain.
    pub fn replace(&self, rows: &mut dyn Iterator<Item = io::Result<(Vec<u8>, Vec<u8>)>>) -> io::Result<()> {
        // Readers go on seeing the old rows, all of them, until the new ones are there.
        self.inner.write_out()?;
        self.inner.store.replace(rows)
    }

    /// Makes the next start build the store again; see [`SledKv::distrust`].
    pub fn distrust(&self) {
        self.inner.store.distrust();
    }

    /// Writes what is left and closes the store; see [`SledKv::close`].
    ///
    /// # Errors
    /// When that fails; the store is closed all the same.
    pub fn close(&self) -> io::Result<()> {
        let written = self.inner.write_out();
        if let Err(error) = &written {
            tracing::error!(%error, "the last rows do not reach the state store");
            // Closing it would call it clean.
            self.distrust();
            return written;
        }
        self.inner.store.close()
    }
}

impl Drop for BufferedKv {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::Release);
        if let Some(writer) = self.writer.take() {
            writer.thread().unpark();
            if writer.join().is_err() {
                tracing::error!("the writer of the state store has panicked");
            }
        }
    }
}

impl Inner {
    fn write_until_stopped(&self) {
        while !self.stop.load(Ordering::Acquire) {
            thread::park_timeout(LONGEST);
            if let Err(error) = self.write_out() {
                tracing::error!(%error, "cannot write the state store");
                return;
            }
        }
    }

    /// Writes to the store what was applied before the call.
    fn write_out(&self) -> io::Result<()> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        let leaving = {
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            if tables.active.is_empty() {
                return Ok(());
            }
            tables.leaving = Arc::new(std::mem::take(&mut tables.active));
            Arc::clone(&tables.leaving)
        };
        // sled may panic. Whatever goes wrong, `leaving` stays where readers see it.
        let fails = FailsUnlessForgotten(&self.failed);
        self.store.apply(&leaving)?;
        std::mem::forget(fails);
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.leaving = Arc::default();
        Ok(())
    }

    fn check(&self) -> io::Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other("the state store could not be written"));
        }
        Ok(())
    }

    fn read<T>(&self, read: impl FnOnce(Over<'_>) -> io::Result<T>) -> io::Result<T> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let result = read(Over { layers: &[&tables.active, &tables.leaving], base: &self.store });
        if let Err(error) = &result
            && error.kind() == io::ErrorKind::InvalidData
            && !self.failed.swap(true, Ordering::AcqRel)
        {
            tracing::error!(%error, "this master stops at the next change; the next start builds the state store again");
        }
        result
    }
}

struct FailsUnlessForgotten<'f>(&'f AtomicBool);

impl Drop for FailsUnlessForgotten<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Kv for BufferedKv {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.inner.read(|rows| rows.get(key))
    }

    fn scan(&self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        self.inner.read(|rows| rows.scan(from, to, each))
    }

    fn last(&self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        self.inner.read(|rows| rows.last(from, to))
    }

    fn apply(&self, writes: &WriteSet) -> io::Result<()> {
        self.inner.check()?;
        let rows = {
            let mut tables = self.inner.tables.write().unwrap_or_else(PoisonError::into_inner);
            tables.active.extend(writes.iter().map(|(key, value)| (key.clone(), value.clone())));
            tables.active.len()
        };
        if rows >= MOST_ROWS {
            self.inner.write_out()?;
        } else if rows >= FULL_ROWS
            && let Some(writer) = &self.writer
        {
            writer.thread().unpark();
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.inner.write_out()?;
        self.inner.store.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::MemKv;
    use proptest::prelude::*;
    use std::ops::ControlFlow;

    const CACHE: u64 = 8 << 20;

    fn open(dir: &std::path::Path) -> BufferedKv {
        BufferedKv::new(SledKv::open(dir, CACHE).unwrap().0).unwrap()
    }

    /// sled's own threads may have the files open for a moment after it was dropped.
    fn wait_for_sled(dir: &std::path::Path) {
        let file = std::fs::File::open(dir.join("state-2/db")).unwrap();
        let begun = std::time::Instant::now();
        while file.try_lock().is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "sled does not let go of its files");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn rows(kv: &dyn Kv, from: u8, to: u8) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut rows = Vec::new();
        kv.scan(&[from], &[to], &mut |key, value| {
            rows.push((key.to_vec(), value.to_vec()));
            ControlFlow::Continue(())
        })
        .unwrap();
        rows
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whatever part of the rows is in which table, or in the store, all of them are seen; none older than another.
        #[test]
        fn readers_see_what_was_applied_wherever_it_is(
            batches in prop::collection::vec(
                (prop::collection::btree_map(0_u8..24, prop::option::of(any::<u8>()), 1..6), 0_u8..4), 1..40),
            from in 0_u8..25, to in 0_u8..25,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (kv, twin) = (open(dir.path()), MemKv::new());
            for (batch, event) in batches {
                let writes: WriteSet =
                    batch.into_iter().map(|(key, value)| (vec![key], value.map(|value| vec![value]))).collect();
                match event {
                    0 => kv.inner.write_out().unwrap(),
                    1 => {
                        // As while the writer is at work.
                        kv.inner.write_out().unwrap();
                        let mut tables = kv.inner.tables.write().unwrap();
                        tables.leaving = Arc::new(writes.clone());
                        twin.apply(&writes).unwrap();
                        drop(tables);
                        for key in 0..24 {
                            prop_assert_eq!(kv.get(&[key]).unwrap(), twin.get(&[key]).unwrap());
                        }
                        prop_assert_eq!(rows(&kv, from, to), rows(&twin, from, to));
                        let leaving = Arc::clone(&kv.inner.tables.read().unwrap().leaving);
                        kv.inner.store.apply(&leaving).unwrap();
                        kv.inner.tables.write().unwrap().leaving = Arc::default();
                    }
                    _ => {}
                }
                kv.apply(&writes).unwrap();
                twin.apply(&writes).unwrap();
                prop_assert_eq!(rows(&kv, from, to), rows(&twin, from, to));
                prop_assert_eq!(kv.last(&[from], &[to]).unwrap(), twin.last(&[from], &[to]).unwrap());
            }
        }
    }

    #[test]
    fn a_clean_stop_keeps_everything_and_a_kill_a_prefix_of_the_batches() {
        let dir = tempfile::tempdir().unwrap();
        let kv = open(dir.path());
        // As Store does with a store that is not usable yet.
        kv.replace(&mut std::iter::empty()).unwrap();
        for number in 0..3_000_u32 {
            let key = number.to_be_bytes().to_vec();
            let last = (vec![255], Some(key.clone()));
            kv.apply(&WriteSet::from([(key, Some(vec![1])), last])).unwrap();
        }
        kv.close().unwrap();
        assert_eq!(kv.get(&[255]).unwrap_err().kind(), io::ErrorKind::NotConnected);
        drop(kv);
        wait_for_sled(dir.path());
        let kv = open(dir.path());
        assert_eq!(kv.get(&[255]).unwrap(), Some(2_999_u32.to_be_bytes().to_vec()));
        for number in 3_000..6_000_u32 {
            let key = number.to_be_bytes().to_vec();
            let last = (vec![255], Some(key.clone()));
            kv.apply(&WriteSet::from([(key, Some(vec![1])), last])).unwrap();
        }
        // What is in memory alone is lost: the store goes away without close.
        drop(kv);
        wait_for_sled(dir.path());
        let (store, usable) = SledKv::open(dir.path(), CACHE).unwrap();
        assert_eq!(usable, Ok(()));
        let last = store.get(&[255]).unwrap().unwrap();
        let last = u32::from_be_bytes(last.try_into().unwrap());
        for number in 0..6_000_u32 {
            let there = store.get(&number.to_be_bytes()).unwrap().is_some();
            assert_eq!(there, number <= last, "{number} with {last} as the last");
        }
    }

    #[test]
    fn a_store_that_fails_takes_nothing_more_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let kv = open(dir.path());
        kv.apply(&WriteSet::from([(vec![1], Some(vec![1]))])).unwrap();
        kv.inner.store.close().unwrap();
        assert!(kv.flush().unwrap_err().to_string().contains("closed"));
        assert!(kv.apply(&WriteSet::new()).unwrap_err().to_string().contains("could not be written"));
        assert!(kv.close().is_err());
    }
}
