//! One process of the test: carries out steps, each in both trees, and says what came of them.

use super::op::{Op, SLOTS, Time};
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::io::{self, BufRead, Write as _};
use std::os::fd::RawFd;

/// What a system call gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// 0: none.
    pub errno: i32,
    pub value: i64,
    /// Bytes, names and the like that it gave.
    pub data: Vec<String>,
    /// The open files that it used, afterwards.
    pub files: Vec<Option<Seen>>,
}

/// The fields of a stat that POSIX defines and both systems must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    pub mode: u32,
    /// Not of directories: what counts as a link to one is the file system's business.
    pub nlink: u64,
    pub uid: u32,
    pub gid: u32,
    /// Not of directories.
    pub size: i64,
    pub mtime_changed: bool,
    pub ctime_changed: bool,
}

/// What two stats of one object, before and after a step, tell.
pub fn seen(before: Option<&libc::stat>, after: &libc::stat) -> Seen {
    let dir = after.st_mode & libc::S_IFMT == libc::S_IFDIR;
    let same = before.filter(|before| before.st_ino == after.st_ino);
    Seen {
        mode: after.st_mode,
        nlink: if dir { 0 } else { after.st_nlink },
        uid: after.st_uid,
        gid: after.st_gid,
        size: if dir { 0 } else { after.st_size },
        mtime_changed: same
            .is_some_and(|b| (b.st_mtime, b.st_mtime_nsec) != (after.st_mtime, after.st_mtime_nsec)),
        ctime_changed: same
            .is_some_and(|b| (b.st_ctime, b.st_ctime_nsec) != (after.st_ctime, after.st_ctime_nsec)),
    }
}

/// A path as the kernel takes it.
pub fn bytes(path: &str) -> CString {
    CString::new(path.chars().map(|c| u8::try_from(u32::from(c)).expect("a byte")).collect::<Vec<_>>())
        .expect("no zero")
}

/// Bytes as text that can be compared and shown: their checksum, and the first of them.
pub fn digest(bytes: &[u8]) -> String {
    let first: String = bytes.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("{} bytes, crc {:08x}, {first}", bytes.len(), dfs_proto::checksum::crc32c(bytes))
}

pub fn fstat(fd: RawFd) -> Option<libc::stat> {
    let mut stat = std::mem::MaybeUninit::uninit();
    // SAFETY: `stat` has room for the answer, and is used only when the call has filled it.
    (unsafe { libc::fstat(fd, stat.as_mut_ptr()) } == 0).then(|| unsafe { stat.assume_init() })
}

pub fn lstat_at(dir: RawFd, path: &str) -> Result<libc::stat, i32> {
    let path = bytes(path);
    let mut stat = std::mem::MaybeUninit::uninit();
    // SAFETY: the path ends with a zero; `stat` has room for the answer.
    if unsafe { libc::fstatat(dir, path.as_ptr(), stat.as_mut_ptr(), libc::AT_SYMLINK_NOFOLLOW) } == 0 {
        // SAFETY: fstatat has filled it.
        Ok(unsafe { stat.assume_init() })
    } else {
        Err(errno())
    }
}

pub fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| seed.wrapping_add(u8::try_from(at % 251).expect("a byte"))).collect()
}

fn timespec(time: Time) -> libc::timespec {
    match time {
        Time::Now => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW },
        Time::Omit => libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT },
        Time::At(tv_sec, tv_nsec) => libc::timespec { tv_sec, tv_nsec },
    }
}

/// The wire form of a POSIX ACL xattr.
fn acl_bytes(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(perm.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn acl_name(default: bool) -> CString {
    bytes(if default { "system.posix_acl_default" } else { "system.posix_acl_access" })
}

/// One tree as this process has it open.
struct Side {
    root: RawFd,
    slots: [Option<RawFd>; SLOTS],
}

/// Reads steps from standard input until it ends; answers each with its outcomes in the trees open as `roots`.
pub fn run(roots: [RawFd; 2]) {
    let mut sides = roots.map(|root| Side { root, slots: [None; SLOTS] });
    let mut answers = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let op: Op = serde_json::from_str(&line.expect("a line")).expect("a step");
        let outcomes: Vec<Outcome> = sides.iter_mut().map(|side| side.step(&op)).collect();
        serde_json::to_writer(&mut answers, &outcomes).expect("the driver listens");
        answers.write_all(b"\n").expect("the driver listens");
        answers.flush().expect("the driver listens");
    }
}

impl Side {
    fn fd(&self, slot: usize) -> RawFd {
        self.slots[slot].unwrap_or(-1)
    }

    fn step(&mut self, op: &Op) -> Outcome {
        // SAFETY: only a number is passed.
        if unsafe { libc::fchdir(self.root) } != 0 {
            return Outcome { errno: errno(), value: -2, data: Vec::new(), files: Vec::new() };
        }
        let before: Vec<_> = op.slots().into_iter().map(|slot| fstat(self.fd(slot))).collect();
        let mut data = Vec::new();
        // What goes through a FIFO is the kernel's business, times included.
        let fifo =
            |stat: &Option<libc::stat>| stat.is_some_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO);
        let value = if op.moves_bytes() && before.iter().any(fifo) { 0 } else { self.call(op, &mut data) };
        let errno = if value < 0 { errno() } else { 0 };
        let files = op.slots().into_iter().zip(before);
        let files = files.map(|(slot, before)| Some(seen(before.as_ref(), &fstat(self.fd(slot))?))).collect();
        Outcome { errno, value, data, files }
    }

    fn put(&mut self, slot: usize, fd: RawFd) -> i64 {
        if fd >= 0 {
            self.close(slot);
            self.slots[slot] = Some(fd);
            return 0;
        }
        -1
    }

    fn close(&mut self, slot: usize) -> i64 {
        // SAFETY: a number that is ours to close, or -1.
        i64::from(unsafe { libc::close(self.slots[slot].take().unwrap_or(-1)) })
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each system call")]
    fn call(&mut self, op: &Op, data: &mut Vec<String>) -> i64 {
        // SAFETY: every path ends with a zero, every buffer is as long as the call is told, and all outlive the call.
        unsafe {
            match op {
                Op::Mkdir { path, mode } => i64::from(libc::mkdir(bytes(path).as_ptr(), *mode)),
                Op::Rmdir { path } => i64::from(libc::rmdir(bytes(path).as_ptr())),
                Op::Mknod { path, mode } => i64::from(libc::mknod(bytes(path).as_ptr(), *mode, 0)),
                Op::Symlink { target, path } => {
                    i64::from(libc::symlink(bytes(target).as_ptr(), bytes(path).as_ptr()))
                }
                Op::Readlink { path } => {
                    let mut buffer = vec![0_u8; 4096];
                    let n = libc::readlink(bytes(path).as_ptr(), buffer.as_mut_ptr().cast(), buffer.len());
                    give(n, &buffer, data)
                }
                Op::Link { from, to, follow } => {
                    let flags = if *follow { libc::AT_SYMLINK_FOLLOW } else { 0 };
                    let (from, to) = (bytes(from), bytes(to));
                    i64::from(libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags))
                }
                Op::Unlink { path } => i64::from(libc::unlink(bytes(path).as_ptr())),
                Op::Rename { from, to, flags } => {
                    let (from, to) = (bytes(from), bytes(to));
                    i64::from(libc::renameat2(
                        libc::AT_FDCWD,
                        from.as_ptr(),
                        libc::AT_FDCWD,
                        to.as_ptr(),
                        *flags,
                    ))
                }
                Op::Readdir { path } => self.readdir(path, data),
                Op::Open { slot, path, flags, mode } => {
                    let fd = libc::open(bytes(path).as_ptr(), *flags, *mode);
                    self.put(*slot, fd)
                }
                Op::Close { slot } => self.close(*slot),
                Op::Dup { slot, to } => {
                    let fd = libc::dup(self.fd(*slot));
                    self.put(*to, fd)
                }
                Op::Access { path, mode } => {
                    i64::from(libc::faccessat(libc::AT_FDCWD, bytes(path).as_ptr(), *mode, libc::AT_EACCESS))
                }
                Op::Chmod { path, mode } => i64::from(libc::chmod(bytes(path).as_ptr(), *mode)),
                Op::Fchmod { slot, mode } => i64::from(libc::fchmod(self.fd(*slot), *mode)),
                Op::Chown { path, uid, gid, follow } => {
                    let flags = if *follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW };
                    let path = bytes(path);
                    let mut stat: libc::stat = std::mem::zeroed();
                    let there = libc::fstatat(libc::AT_FDCWD, path.as_ptr(), &raw mut stat, flags) == 0;
                    if there && takes_privileges_of_others(&stat, *uid, *gid) {
                        return 0;
                    }
                    i64::from(libc::fchownat(libc::AT_FDCWD, path.as_ptr(), *uid, *gid, flags))
                }
                Op::Fchown { slot, uid, gid } => {
                    if fstat(self.fd(*slot)).is_some_and(|stat| takes_privileges_of_others(&stat, *uid, *gid))
                    {
                        return 0;
                    }
                    i64::from(libc::fchown(self.fd(*slot), *uid, *gid))
                }
                Op::Utimens { path, atime, mtime, follow } => {
                    let flags = if *follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW };
                    let (path, times) = (bytes(path), [timespec(*atime), timespec(*mtime)]);
                    let done = libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), flags);
                    let mut stat: libc::stat = std::mem::zeroed();
                    if done == 0 && libc::fstatat(libc::AT_FDCWD, path.as_ptr(), &raw mut stat, flags) == 0 {
                        show_times([*atime, *mtime], &stat, data);
                    }
                    i64::from(done)
                }
                Op::Futimens { slot, atime, mtime } => {
                    let times = [timespec(*atime), timespec(*mtime)];
                    let done = libc::futimens(self.fd(*slot), times.as_ptr());
                    if done == 0
                        && let Some(stat) = fstat(self.fd(*slot))
                    {
                        show_times([*atime, *mtime], &stat, data);
                    }
                    i64::from(done)
                }
                Op::Truncate { path, size } => {
                    i64::from(libc::truncate(bytes(path).as_ptr(), size.cast_signed()))
                }
                Op::Ftruncate { slot, size } => {
                    i64::from(libc::ftruncate(self.fd(*slot), size.cast_signed()))
                }
                Op::Write { slot, length, seed } => {
                    // What an O_APPEND file or a far position would make of it must stay in bounds.
                    if fstat(self.fd(*slot)).is_some_and(|stat| stat.st_size > 256 << 10) {
                        return 0;
                    }
                    let from = pattern(*seed, *length);
                    libc::write(self.fd(*slot), from.as_ptr().cast(), from.len()) as i64
                }
                Op::Pwrite { slot, offset, length, seed } => {
                    if fstat(self.fd(*slot)).is_some_and(|stat| stat.st_size > 256 << 10) {
                        return 0;
                    }
                    let from = pattern(*seed, *length);
                    libc::pwrite(self.fd(*slot), from.as_ptr().cast(), from.len(), offset.cast_signed())
                        as i64
                }
                Op::Read { slot, length } => {
                    let mut buffer = vec![0_u8; *length];
                    let n = libc::read(self.fd(*slot), buffer.as_mut_ptr().cast(), buffer.len());
                    give(n, &buffer, data)
                }
                Op::Pread { slot, offset, length } => {
                    let mut buffer = vec![0_u8; *length];
                    let at = offset.cast_signed();
                    let n = libc::pread(self.fd(*slot), buffer.as_mut_ptr().cast(), buffer.len(), at);
                    give(n, &buffer, data)
                }
                Op::Seek { slot, offset, whence } => {
                    let dir = fstat(self.fd(*slot))
                        .is_some_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFDIR);
                    // A position in a directory is what telldir gave, and 0.
                    let (offset, whence) = if dir { (0, libc::SEEK_SET) } else { (*offset, *whence) };
                    libc::lseek(self.fd(*slot), offset, whence)
                }
                Op::MapWrite { slot, offset, length, seed } => {
                    self.map(*slot, *offset, *length, Some(*seed), data)
                }
                Op::MapRead { slot, offset, length } => self.map(*slot, *offset, *length, None, data),
                Op::Fallocate { slot, mode, offset, length } => i64::from(libc::fallocate(
                    self.fd(*slot),
                    *mode,
                    offset.cast_signed(),
                    length.cast_signed(),
                )),
                Op::CopyRange { from, from_offset, to, to_offset, length } => {
                    let (mut at, mut into) = (from_offset.cast_signed(), to_offset.cast_signed());
                    libc::copy_file_range(
                        self.fd(*from),
                        &raw mut at,
                        self.fd(*to),
                        &raw mut into,
                        *length,
                        0,
                    ) as i64
                }
                Op::Fsync { slot, data: true } => i64::from(libc::fdatasync(self.fd(*slot))),
                Op::Fsync { slot, data: false } => i64::from(libc::fsync(self.fd(*slot))),
                Op::SetXattr { path, name, length, seed, flags, follow } => {
                    let (path, name, value) = (bytes(path), bytes(name), pattern(*seed, *length));
                    let call = if *follow { libc::setxattr } else { libc::lsetxattr };
                    i64::from(call(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), *flags))
                }
                Op::GetXattr { path, name, room } => {
                    let mut buffer = vec![0_u8; *room];
                    let (path, name) = (bytes(path), bytes(name));
                    let n = libc::lgetxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), *room);
                    give(n, &buffer, data)
                }
                Op::ListXattr { path } => {
                    let mut buffer = vec![0_u8; 65_536];
                    let n = libc::llistxattr(bytes(path).as_ptr(), buffer.as_mut_ptr().cast(), buffer.len());
                    let mut names: Vec<String> = buffer[..usize::try_from(n).unwrap_or(0)]
                        .split(|byte| *byte == 0)
                        .map(|name| String::from_utf8_lossy(name).into_owned())
                        .collect();
                    names.sort();
                    data.extend(names);
                    n as i64
                }
                Op::RemoveXattr { path, name } => {
                    i64::from(libc::lremovexattr(bytes(path).as_ptr(), bytes(name).as_ptr()))
                }
                Op::SetAcl { path, default, entries } => {
                    let (path, value, name) = (bytes(path), acl_bytes(entries), acl_name(*default));
                    i64::from(libc::setxattr(
                        path.as_ptr(),
                        name.as_ptr(),
                        value.as_ptr().cast(),
                        value.len(),
                        0,
                    ))
                }
                Op::RemoveAcl { path, default } => {
                    i64::from(libc::removexattr(bytes(path).as_ptr(), acl_name(*default).as_ptr()))
                }
                Op::Lock { slot, kind, start, length } => {
                    self.lock(libc::F_SETLK, *slot, *kind, *start, *length, data)
                }
                Op::GetLock { slot, kind, start, length } => {
                    self.lock(libc::F_GETLK, *slot, *kind, *start, *length, data)
                }
                Op::Flock { slot, how } => {
                    let done = libc::flock(self.fd(*slot), *how);
                    if done < 0 && errno() == libc::EAGAIN {
                        // A local file system has given up the lock that was to become another one, dfs has kept it.
                        libc::flock(self.fd(*slot), libc::LOCK_UN);
                        *libc::__errno_location() = libc::EAGAIN;
                    }
                    i64::from(done)
                }
                Op::Umask { mask } => {
                    // The process has one for both trees.
                    libc::umask(*mask);
                    0
                }
            }
        }
    }

    fn readdir(&self, path: &str, data: &mut Vec<String>) -> i64 {
        // SAFETY: the path ends with a zero; an entry is used before the next call; the directory is closed once.
        unsafe {
            let dir = libc::opendir(bytes(path).as_ptr());
            if dir.is_null() {
                return -1;
            }
            loop {
                let entry = libc::readdir(dir);
                if entry.is_null() {
                    break;
                }
                let name = std::ffi::CStr::from_ptr((*entry).d_name.as_ptr());
                data.push(format!("{} {:?}", (*entry).d_type, name));
            }
            data.sort();
            i64::from(libc::closedir(dir))
        }
    }

    /// Maps a range shared, writes or reads the part that the file has, syncs and unmaps.
    fn map(&self, slot: usize, offset: u64, length: usize, seed: Option<u8>, data: &mut Vec<String>) -> i64 {
        let fd = self.fd(slot);
        let Some(stat) = fstat(fd) else { return -1 };
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let start = offset / 4096 * 4096;
        // Beyond the last page of the file is a SIGBUS.
        let end = (offset + length as u64).min(size.next_multiple_of(4096));
        let protection = if seed.is_some() { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let length = usize::try_from(end.saturating_sub(start).max(1)).expect("small");
        // SAFETY: a new mapping, of which only pages that the file has are touched, unmapped before the return.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                fd,
                start.cast_signed(),
            );
            if at == libc::MAP_FAILED {
                return -1;
            }
            let from = usize::try_from(offset - start).expect("in a page");
            // What is beyond the end of the file within its last page is nobody's.
            let to = usize::try_from(end.min(size).saturating_sub(start)).expect("small");
            if from < to {
                let bytes = std::slice::from_raw_parts_mut(at.cast::<u8>().add(from), to - from);
                match seed {
                    Some(seed) => bytes.copy_from_slice(&pattern(seed, to - from)),
                    None => data.push(digest(bytes)),
                }
            }
            let synced = libc::msync(at, length, libc::MS_SYNC);
            libc::munmap(at, length);
            i64::from(synced)
        }
    }

    fn lock(
        &self,
        command: i32,
        slot: usize,
        kind: i16,
        start: i64,
        length: i64,
        data: &mut Vec<String>,
    ) -> i64 {
        let mut lock = libc::flock {
            l_type: kind,
            l_whence: i16::try_from(libc::SEEK_SET).expect("small"),
            l_start: start,
            l_len: length,
            l_pid: 0,
        };
        // SAFETY: `lock` is what both commands take, and outlives the call.
        let done = unsafe { libc::fcntl(self.fd(slot), command, &raw mut lock) };
        if done == 0 && command == libc::F_GETLK {
            data.push(format!("{} {} {}", lock.l_type, lock.l_start, lock.l_len));
        }
        i64::from(done)
    }
}

/// Whether a chown is one that FUSE does not tell from a write by somebody who may write but is not the owner: of -1 and
/// -1, on a file that is set-user-id or set-group-id. A local file system refuses it, dfs does nothing.
fn takes_privileges_of_others(stat: &libc::stat, uid: u32, gid: u32) -> bool {
    // SAFETY: geteuid has no preconditions.
    let caller = unsafe { libc::geteuid() };
    caller != 0 && caller != stat.st_uid && (uid, gid) == (u32::MAX, u32::MAX) && stat.st_mode & 0o6000 != 0
}

/// What a call that fills a buffer gave.
fn give(n: isize, buffer: &[u8], data: &mut Vec<String>) -> i64 {
    if let Some(bytes) = usize::try_from(n).ok().and_then(|n| buffer.get(..n)) {
        data.push(digest(bytes));
    }
    n as i64
}

/// Times that were set to a value must be that value.
fn show_times(set: [Time; 2], stat: &libc::stat, data: &mut Vec<String>) {
    for (set, now) in
        set.into_iter().zip([(stat.st_atime, stat.st_atime_nsec), (stat.st_mtime, stat.st_mtime_nsec)])
    {
        if matches!(set, Time::At(..)) {
            data.push(format!("{now:?}"));
        }
    }
}
