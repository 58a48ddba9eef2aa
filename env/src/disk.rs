//! Files, as far as dfs needs them. All calls block; see [`crate::Env::blocking`].

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How to open a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// Must exist; reads only.
    Read,
    /// Must exist; reads and writes.
    Write,
    /// Must not exist; reads and writes.
    CreateNew,
}

/// Space on the file system below a path, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    pub total_bytes: u64,
    /// What an unprivileged writer may still take.
    pub free_bytes: u64,
}

/// A file system. A name that was created, renamed or removed survives a crash only after [`Disk::sync_dir`].
pub trait Disk: Send + Sync + 'static {
    /// Opens a file.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>>;
    /// Makes a directory and what is missing above it.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// The paths in a directory, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
    /// Renames a file over whatever has the new name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Space around a path.
    fn space(&self, path: &Path) -> io::Result<Space>;

    /// How long the next blocking call takes. Only a simulated disk knows that; of a real one it shows when the call returns.
    fn lag(&self) -> Duration {
        Duration::ZERO
    }

    /// Keeps every other process from locking this path until the answer is dropped; `WouldBlock` when one has. A disk
    /// that only one process sees has nothing to do.
    fn lock(&self, _path: &Path) -> io::Result<Box<dyn std::any::Any + Send + Sync>> {
        Ok(Box::new(()))
    }

    /// A whole file. `NotFound` when it is not there.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let file = self.open(path, OpenMode::Read)?;
        let length = usize::try_from(file.len()?).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    /// Puts a whole file in place durably and atomically: temporary file, fsync, rename, fsync of the directory.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = path.with_extension("tmp");
        match self.remove(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = self.open(&temporary, OpenMode::CreateNew)?;
        file.write_all_at(bytes, 0)?;
        file.sync_data()?;
        self.rename(&temporary, path)?;
        self.sync_dir(path.parent().ok_or_else(|| io::Error::other("a file has a directory"))?)
    }
}

/// An open file. Written bytes survive a crash only after [`DiskFile::sync_data`].
pub trait DiskFile: Send + Sync + 'static {
    /// Reads up to `buffer.len()` bytes at `offset`; fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes` at `offset`.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Writes all of several buffers, one after the other, from `offset` on.
    fn write_vectored_at(&self, parts: &[io::IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or extends the file.
    fn set_len(&self, length: u64) -> io::Result<()>;
    /// Makes the bytes and the length durable (fdatasync).
    fn sync_data(&self) -> io::Result<()>;
    /// Lets the next reads of a range come from the medium, as far as the system does that: what is in its memory may be
    /// forgotten once it has been written, and what has not is written soon. Says nothing about durability.
    fn forget_cached(&self, _range: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    /// Adds exactly `length` bytes at `offset` to a buffer; `UnexpectedEof` when the file ends before, and then the buffer
    /// is as it was.
    fn append_exact_at(&self, buffer: &mut Vec<u8>, length: usize, offset: u64) -> io::Result<()> {
        let before = buffer.len();
        buffer.resize(before + length, 0);
        self.read_exact_at(&mut buffer[before..], offset).inspect_err(|_| buffer.truncate(before))
    }

    /// Fills the buffer; `UnexpectedEof` when the file ends before.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.read_at(&mut buffer[done..], offset + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }
}

/// The file systems of this machine.
pub struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = fs::OpenOptions::new();
        options.read(true);
        match mode {
            OpenMode::Read => &mut options,
            OpenMode::Write => options.write(true),
            OpenMode::CreateNew => options.write(true).create_new(true),
        };
        Ok(Arc::new(RealFile(options.open(path)?)))
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = fs::read_dir(path)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<Vec<_>, _>>()?;
        paths.sort();
        Ok(paths)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: `path` ends with a zero byte and `stat` has room for the answer; both outlive the call.
        if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: statvfs returned 0, so it filled the structure.
        let stat = unsafe { stat.assume_init() };
        Ok(Space { total_bytes: stat.f_blocks * stat.f_frsize, free_bytes: stat.f_bavail * stat.f_frsize })
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn std::any::Any + Send + Sync>> {
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Box::new(file)),
            Err(fs::TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

/// IOV_MAX: the most parts that the kernel takes in one call.
const PARTS_MAX: usize = 1024;

struct RealFile(fs::File);

impl RealFile {
    /// Writes at most PARTS_MAX parts.
    fn write_parts_at(&self, parts: &[io::IoSlice<'_>], offset: u64) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let count = libc::c_int::try_from(parts.len()).map_err(io::Error::other)?;
        let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: IoSlice has iovec's layout (its documentation says so), the slices live through the call.
        let written = unsafe { libc::pwritev(self.0.as_raw_fd(), parts.as_ptr().cast(), count, at) };
        let mut written = match usize::try_from(written) {
            Ok(written) if written == total => return Ok(()),
            Ok(written) => written,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => 0,
                error => return Err(error),
            },
        };
        // A short write: the rest goes part by part.
        let mut at = offset + written as u64;
        for part in parts {
            let skip = written.min(part.len());
            written -= skip;
            self.0.write_all_at(&part[skip..], at)?;
            at += (part.len() - skip) as u64;
        }
        Ok(())
    }
}

impl DiskFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            match self.0.read_at(buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Into memory that was not zeroed before: for a long buffer jemalloc would ask the kernel for zeroed pages, and the
    /// page faults cost more than the read.
    fn append_exact_at(&self, buffer: &mut Vec<u8>, length: usize, offset: u64) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let before = buffer.len();
        buffer.reserve(length);
        let mut done = 0;
        while done < length {
            let room = &mut buffer.spare_capacity_mut()[..length - done];
            let at = libc::off_t::try_from(offset + done as u64).map_err(io::Error::other)?;
            // SAFETY: the kernel writes at most `room.len()` bytes to memory that is the buffer's.
            let read = unsafe { libc::pread(self.0.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), at) };
            let error = match usize::try_from(read) {
                Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                Ok(read) => {
                    done += read;
                    // SAFETY: the kernel has written this many bytes right after those that were there.
                    unsafe { buffer.set_len(before + done) };
                    continue;
                }
                Err(_) => io::Error::last_os_error(),
            };
            if error.kind() != io::ErrorKind::Interrupted {
                buffer.truncate(before);
                return Err(error);
            }
        }
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn write_vectored_at(&self, parts: &[io::IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for parts in parts.chunks(PARTS_MAX) {
            self.write_parts_at(parts, at)?;
            at += parts.iter().map(|part| part.len() as u64).sum::<u64>();
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn forget_cached(&self, range: Range<u64>) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        let from = libc::off_t::try_from(range.start).map_err(io::Error::other)?;
        // A length of zero would be the rest of the file.
        let length = range.end.saturating_sub(range.start).max(1);
        let length = libc::off_t::try_from(length).unwrap_or(libc::off_t::MAX - from);
        // SAFETY: the call takes no memory of ours.
        match unsafe { libc::posix_fadvise(self.0.as_raw_fd(), from, length, libc::POSIX_FADV_DONTNEED) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_locked_once_and_free_again_when_the_lock_is_dropped() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("LOCK");
        let held = RealDisk.lock(&path).expect("free");
        let refused = RealDisk.lock(&path).map(|_| ()).expect_err("held");
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        drop(held);
        RealDisk.lock(&path).expect("free again");
    }

    #[test]
    fn bytes_are_added_to_a_buffer_whole_or_not_at_all() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = RealDisk.open(&dir.path().join("a"), OpenMode::CreateNew).expect("new");
        file.write_all_at(b"0123456789", 0).expect("written");
        let mut buffer = b"ab".to_vec();
        file.append_exact_at(&mut buffer, 3, 4).expect("there");
        file.append_exact_at(&mut buffer, 0, 400).expect("nothing");
        assert_eq!(buffer, b"ab456");
        let short = file.append_exact_at(&mut buffer, 3, 8).expect_err("two are there");
        assert_eq!((short.kind(), &buffer[..]), (io::ErrorKind::UnexpectedEof, &b"ab456"[..]));
    }

    #[test]
    fn vectored_writes_land_one_after_the_other_and_replace_is_whole() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("a");
        let file = RealDisk.open(&path, OpenMode::CreateNew).expect("new");
        file.write_vectored_at(
            &[io::IoSlice::new(b"ab"), io::IoSlice::new(b""), io::IoSlice::new(b"cde")],
            1,
        )
        .expect("written");
        assert_eq!(RealDisk.read(&path).expect("read"), b"\0abcde");
        RealDisk.replace(&path, b"new").expect("replaced");
        assert_eq!(RealDisk.read(&path).expect("read"), b"new");
        assert_eq!(RealDisk.list(dir.path()).expect("listed"), [path]);
    }
}
