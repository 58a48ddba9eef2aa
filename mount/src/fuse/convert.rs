//! Between the kernel's words and ours.

use dfs_client::OpenFlags;
use dfs_proto::v1::{Attr, Kind, Timestamp, lock};
use dfs_proto::{FsError, FsResult, v1::ErrorCode};
use fuser::{FileAttr, FileType, TimeOrNow};
use std::time::SystemTime;

/// What stat(2) calls the preferred size of I/O, in bytes. Programs take it as the size of their buffers.
const BLOCK_SIZE: u32 = 4096;
/// `__FMODE_EXEC` of linux/fs.h: the open is for execve(2).
const FMODE_EXEC: i32 = 0x20;
/// The last byte of a lock to the end of the file, as the kernel says it (OFFSET_MAX) and as the master does.
const LOCK_TO_END: u64 = i64::MAX.unsigned_abs();

/// The kernel's word for a kind of inode.
pub fn file_type(kind: i32) -> FsResult<FileType> {
    match Kind::try_from(kind) {
        Ok(Kind::File) => Ok(FileType::RegularFile),
        Ok(Kind::Dir) => Ok(FileType::Directory),
        Ok(Kind::Symlink) => Ok(FileType::Symlink),
        Ok(Kind::Char) => Ok(FileType::CharDevice),
        Ok(Kind::Block) => Ok(FileType::BlockDevice),
        Ok(Kind::Fifo) => Ok(FileType::NamedPipe),
        Ok(Kind::Socket) => Ok(FileType::Socket),
        Ok(Kind::Unspecified) | Err(_) => {
            Err(FsError::new(ErrorCode::ErrorIo, format!("an inode of an unknown kind ({kind})")))
        }
    }
}

/// The kind of inode that mknod(2) asks for.
pub fn kind_of_mode(mode: u32) -> FsResult<Kind> {
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG => Ok(Kind::File),
        libc::S_IFCHR => Ok(Kind::Char),
        libc::S_IFBLK => Ok(Kind::Block),
        libc::S_IFIFO => Ok(Kind::Fifo),
        libc::S_IFSOCK => Ok(Kind::Socket),
        _ => Err(ErrorCode::ErrorInvalid.into()),
    }
}

/// The attributes of an inode that the kernel calls `node`.
pub fn file_attr(attr: &Attr, node: fuser::INodeNo) -> FsResult<FileAttr> {
    let time = |time: Option<Timestamp>| time.unwrap_or_default().to_system();
    Ok(FileAttr {
        ino: node,
        size: attr.size,
        blocks: attr.blocks,
        atime: time(attr.atime),
        mtime: time(attr.mtime),
        ctime: time(attr.ctime),
        crtime: time(attr.btime),
        kind: file_type(attr.kind)?,
        perm: u16::try_from(attr.mode & 0o7777).expect("12 bits"),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_SIZE,
        flags: 0,
    })
}

/// A time that utimensat(2) sets: which one, or that it is the time of the change.
pub fn time_change(time: Option<TimeOrNow>) -> (Option<Timestamp>, bool) {
    match time {
        None => (None, false),
        Some(TimeOrNow::Now) => (None, true),
        Some(TimeOrNow::SpecificTime(time)) => (Some(stamp(time)), false),
    }
}

/// The FUSE library reads a time before 1970 as if its nanoseconds counted backwards, as its seconds do
/// (fuser 0.18, `system_time_from_time`): that is undone here.
fn stamp(time: SystemTime) -> Timestamp {
    let stamp = Timestamp::from_system(time);
    if stamp.seconds < 0 && stamp.nanos > 0 {
        return Timestamp { seconds: stamp.seconds + 1, nanos: 1_000_000_000 - stamp.nanos };
    }
    stamp
}

/// How a file is opened. Appending is not the client's business here: the kernel writes back shared pages through the
/// same handles, at places of its own.
pub fn open_flags(flags: i32) -> OpenFlags {
    let access = flags & libc::O_ACCMODE;
    OpenFlags {
        read: access == libc::O_RDONLY || access == libc::O_RDWR,
        write: access == libc::O_WRONLY || access == libc::O_RDWR,
        append: false,
        truncate: flags & libc::O_TRUNC != 0,
        exec: flags & FMODE_EXEC != 0,
        sync: flags & (libc::O_SYNC | libc::O_DSYNC) != 0,
    }
}

/// The type of a lock; `None` when it is none.
pub fn lock_type(typ: i32) -> Option<lock::Type> {
    match typ {
        libc::F_RDLCK => Some(lock::Type::Read),
        libc::F_WRLCK => Some(lock::Type::Write),
        libc::F_UNLCK => Some(lock::Type::Unlock),
        _ => None,
    }
}

/// The kernel's number for a type of lock.
pub const fn lock_number(typ: lock::Type) -> i32 {
    match typ {
        lock::Type::Read => libc::F_RDLCK,
        lock::Type::Write => libc::F_WRLCK,
        lock::Type::Unlock => libc::F_UNLCK,
    }
}

/// The end of a lock, the kernel's as ours.
pub const fn lock_end(end: u64) -> u64 {
    if end >= LOCK_TO_END { u64::MAX } else { end }
}

/// The end of a lock, ours as the kernel's.
pub const fn kernel_lock_end(end: u64) -> u64 {
    if end > LOCK_TO_END { LOCK_TO_END } else { end }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_type_and_mknod_takes_those_it_may() {
        for kind in 1..=7 {
            assert!(file_type(kind).is_ok());
        }
        assert!(file_type(0).is_err() && file_type(99).is_err());
        assert_eq!(kind_of_mode(libc::S_IFIFO | 0o644), Ok(Kind::Fifo));
        assert_eq!(kind_of_mode(0o644), Ok(Kind::File));
        assert!(kind_of_mode(libc::S_IFDIR).is_err() && kind_of_mode(libc::S_IFLNK).is_err());
    }

    #[test]
    fn flags_of_open_are_understood() {
        let flags = open_flags(libc::O_RDWR | libc::O_APPEND | libc::O_TRUNC | libc::O_DSYNC);
        assert!(flags.read && flags.write && flags.truncate && flags.sync && !flags.append && !flags.exec);
        let flags = open_flags(libc::O_WRONLY);
        assert!(!flags.read && flags.write && !flags.sync && !flags.truncate);
        assert!(open_flags(FMODE_EXEC).exec && open_flags(libc::O_RDONLY).read);
    }

    #[test]
    fn times_before_1970_arrive_as_they_were_sent() {
        let as_fuser_reads =
            |seconds: u64, nanos| SystemTime::UNIX_EPOCH - std::time::Duration::new(seconds, nanos);
        assert_eq!(stamp(as_fuser_reads(10, 500)), Timestamp { seconds: -10, nanos: 500 });
        assert_eq!(stamp(as_fuser_reads(1, 999_999_999)), Timestamp { seconds: -1, nanos: 999_999_999 });
        assert_eq!(stamp(as_fuser_reads(10, 0)), Timestamp { seconds: -10, nanos: 0 });
        let later = SystemTime::UNIX_EPOCH + std::time::Duration::new(5_000_000_000, 7);
        assert_eq!(stamp(later), Timestamp { seconds: 5_000_000_000, nanos: 7 });
    }

    #[test]
    fn locks_to_the_end_survive_the_way_to_the_master_and_back() {
        assert_eq!(lock_end(LOCK_TO_END), u64::MAX);
        assert_eq!(kernel_lock_end(u64::MAX), LOCK_TO_END);
        assert_eq!((lock_end(5), kernel_lock_end(5)), (5, 5));
        for typ in [libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK] {
            assert_eq!(lock_type(typ).map(lock_number), Some(typ));
        }
        assert_eq!(lock_type(77), None);
    }
}
