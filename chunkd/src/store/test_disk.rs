//! A disk in memory for tests: it counts syncs, fails on demand, and loses on a power cut what was not synced, each
//! sector of each write by itself, so also in another order than written. After a sync that failed it does as Linux does: what was to
//! be written counts as written, and is read until it is forgotten.

use crate::lock;
use dfs_env::disk::{Disk, DiskFile, OpenMode, Space};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

const SECTOR: usize = 512;

#[derive(Default)]
struct Content {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// What was read when a sync failed: sectors that are still the same are not written by the next one.
    given_up: Option<Vec<u8>>,
}

impl Content {
    fn sectors(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let length = self.live.len();
        (0..length).step_by(SECTOR).map(move |from| from..(from + SECTOR).min(length))
    }

    fn is_given_up(&self, sector: &Range<usize>) -> bool {
        self.given_up.as_ref().is_some_and(|then| then.get(sector.clone()) == self.live.get(sector.clone()))
    }

    fn sync(&mut self) {
        self.durable.resize(self.live.len(), 0);
        for sector in self.sectors().filter(|sector| !self.is_given_up(sector)).collect::<Vec<_>>() {
            self.durable[sector.clone()].copy_from_slice(&self.live[sector]);
        }
    }

    fn forget(&mut self, range: &Range<u64>) {
        let inside = |at: usize| range.contains(&(at as u64));
        for sector in self.sectors().filter(|sector| self.is_given_up(sector)).collect::<Vec<_>>() {
            if inside(sector.start) && inside(sector.end - 1) {
                let (there, zeroes) = (self.durable.get(sector.clone()), vec![0; sector.len()]);
                let there = there.unwrap_or(&zeroes).to_vec();
                self.live[sector].copy_from_slice(&there);
            }
        }
    }
}

type File = Arc<Mutex<Content>>;

#[derive(Default)]
struct Names {
    live: BTreeMap<PathBuf, File>,
    durable: BTreeMap<PathBuf, File>,
}

#[derive(Default)]
pub struct Faults {
    /// Writes to paths below this one fail.
    pub write_below: Mutex<Option<(PathBuf, io::ErrorKind)>>,
    pub sync: AtomicBool,
    pub syncs: AtomicU64,
    /// Which ranges the system was told not to keep in memory, and whether they were on the disk then.
    pub forgotten: Mutex<Vec<(Range<u64>, bool)>>,
    /// How many more changes the machine lives to make.
    pub changes_left: Mutex<Option<u64>>,
}

impl Faults {
    fn change(&self) -> io::Result<()> {
        match &mut *lock(&self.changes_left) {
            None => Ok(()),
            Some(0) => Err(io::Error::other("the machine is off")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

#[derive(Clone, Default)]
pub struct TestDisk {
    names: Arc<Mutex<Names>>,
    pub faults: Arc<Faults>,
}

impl TestDisk {
    /// The power goes. `keep` decides of each unsynced sector, and of each unsynced file length, whether it stays.
    pub fn cut_power(&self, mut keep: impl FnMut() -> bool) {
        *lock(&self.faults.changes_left) = None;
        let mut names = lock(&self.names);
        names.live = names.durable.clone();
        for file in names.live.values() {
            let mut file = lock(file);
            file.given_up = None;
            let Content { live, durable, .. } = &mut *file;
            if live.len() != durable.len() && keep() {
                durable.resize(live.len(), 0);
            }
            for (live, durable) in live.chunks(SECTOR).zip(durable.chunks_mut(SECTOR)) {
                if keep() {
                    let length = live.len().min(durable.len());
                    durable[..length].copy_from_slice(&live[..length]);
                }
            }
            live.clone_from(durable);
        }
    }

    /// Changes a file behind everybody's back.
    pub fn tamper(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let file = Arc::clone(lock(&self.names).live.get(path).expect("the file is there"));
        let mut file = lock(&file);
        change(&mut file.live);
        file.durable = file.live.clone();
    }

    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        lock(&self.names).live.get(path).map(|file| lock(file).live.clone())
    }

    pub fn files(&self) -> Vec<PathBuf> {
        lock(&self.names).live.keys().cloned().collect()
    }
}

impl Disk for TestDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut names = lock(&self.names);
        let content = match (names.live.get(path), mode) {
            (Some(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Some(content), _) => Arc::clone(content),
            (None, OpenMode::CreateNew) => Arc::clone(names.live.entry(path.to_owned()).or_default()),
            (None, _) => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Arc::new(TestFile { content, path: path.to_owned(), faults: Arc::clone(&self.faults) }))
    }
    fn create_dir_all(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(lock(&self.names).live.keys().filter(|name| name.parent() == Some(path)).cloned().collect())
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut names = lock(&self.names);
        let content = names.live.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.live.insert(to.to_owned(), content);
        Ok(())
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.faults.change()?;
        lock(&self.names).live.remove(path).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.faults.change()?;
        let mut names = lock(&self.names);
        let Names { live, durable } = &mut *names;
        durable.retain(|name, _| name.parent() != Some(path));
        let here = live.iter().filter(|(name, _)| name.parent() == Some(path));
        durable.extend(here.map(|(name, content)| (name.clone(), Arc::clone(content))));
        Ok(())
    }
    fn space(&self, _path: &Path) -> io::Result<Space> {
        Ok(Space { total_bytes: 1 << 40, free_bytes: 1 << 40 })
    }
}

struct TestFile {
    content: File,
    path: PathBuf,
    faults: Arc<Faults>,
}

impl DiskFile for TestFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = lock(&self.content);
        let start = usize::try_from(offset).map_err(io::Error::other)?.min(content.live.len());
        let length = buffer.len().min(content.live.len() - start);
        buffer[..length].copy_from_slice(&content.live[start..start + length]);
        Ok(length)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.faults.change()?;
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let mut content = lock(&self.content);
        let fault = lock(&self.faults.write_below).clone().filter(|(below, _)| self.path.starts_with(below));
        // A write that fails may have written a part.
        let bytes = if fault.is_some() { &bytes[..bytes.len() / 2] } else { bytes };
        let end = start + bytes.len();
        if content.live.len() < end {
            content.live.resize(end, 0);
        }
        content.live[start..end].copy_from_slice(bytes);
        fault.map_or(Ok(()), |(_, kind)| Err(kind.into()))
    }
    fn write_vectored_at(&self, parts: &[io::IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.write_all_at(&parts.iter().flat_map(|part| part.to_vec()).collect::<Vec<u8>>(), offset)
    }
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.content).live.len() as u64)
    }
    fn set_len(&self, length: u64) -> io::Result<()> {
        self.faults.change()?;
        lock(&self.content).live.resize(usize::try_from(length).map_err(io::Error::other)?, 0);
        Ok(())
    }
    fn forget_cached(&self, range: Range<u64>) -> io::Result<()> {
        let mut content = lock(&self.content);
        let part = |bytes: &[u8]| {
            let at = |end: u64| usize::try_from(end).map_or(bytes.len(), |end| end.min(bytes.len()));
            bytes[at(range.start)..at(range.end)].to_vec()
        };
        let durable = part(&content.live) == part(&content.durable);
        content.forget(&range);
        lock(&self.faults.forgotten).push((range, durable));
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        self.faults.change()?;
        self.faults.syncs.fetch_add(1, Ordering::Relaxed);
        let mut content = lock(&self.content);
        if self.faults.sync.load(Ordering::Relaxed) {
            content.given_up = Some(content.live.clone());
            return Err(io::Error::other("the medium is worn out"));
        }
        content.sync();
        Ok(())
    }
}
