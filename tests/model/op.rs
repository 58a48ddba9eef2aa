//! One step of a program: what is called, with which arguments, and how steps are drawn.

use rand::RngExt;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

/// Open files that a process may have at once.
pub const SLOTS: usize = 6;
/// No file grows beyond this, so that all of it can be compared after each step.
const SIZE_MAX: u64 = 192 << 10;

/// A path below the root, each byte as the character of that number: names need not be UTF-8.
pub type Path = String;

/// A time for utimensat.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Time {
    Now,
    Omit,
    At(i64, i64),
}

/// A system call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Op {
    Mkdir { path: Path, mode: u32 },
    Rmdir { path: Path },
    Mknod { path: Path, mode: u32 },
    Symlink { target: Path, path: Path },
    Readlink { path: Path },
    Link { from: Path, to: Path, follow: bool },
    Unlink { path: Path },
    Rename { from: Path, to: Path, flags: u32 },
    Readdir { path: Path },
    Open { slot: usize, path: Path, flags: i32, mode: u32 },
    Close { slot: usize },
    Dup { slot: usize, to: usize },
    Access { path: Path, mode: i32 },
    Chmod { path: Path, mode: u32 },
    Fchmod { slot: usize, mode: u32 },
    Chown { path: Path, uid: u32, gid: u32, follow: bool },
    Fchown { slot: usize, uid: u32, gid: u32 },
    Utimens { path: Path, atime: Time, mtime: Time, follow: bool },
    Futimens { slot: usize, atime: Time, mtime: Time },
    Truncate { path: Path, size: u64 },
    Ftruncate { slot: usize, size: u64 },
    Write { slot: usize, length: usize, seed: u8 },
    Pwrite { slot: usize, offset: u64, length: usize, seed: u8 },
    Read { slot: usize, length: usize },
    Pread { slot: usize, offset: u64, length: usize },
    Seek { slot: usize, offset: i64, whence: i32 },
    MapWrite { slot: usize, offset: u64, length: usize, seed: u8 },
    MapRead { slot: usize, offset: u64, length: usize },
    Fallocate { slot: usize, mode: i32, offset: u64, length: u64 },
    CopyRange { from: usize, from_offset: u64, to: usize, to_offset: u64, length: usize },
    Fsync { slot: usize, data: bool },
    SetXattr { path: Path, name: Path, length: usize, seed: u8, flags: i32, follow: bool },
    GetXattr { path: Path, name: Path, room: usize },
    ListXattr { path: Path },
    RemoveXattr { path: Path, name: Path },
    SetAcl { path: Path, default: bool, entries: Vec<(u16, u16, u32)> },
    RemoveAcl { path: Path, default: bool },
    Lock { slot: usize, kind: i16, start: i64, length: i64 },
    GetLock { slot: usize, kind: i16, start: i64, length: i64 },
    Flock { slot: usize, how: i32 },
    Umask { mask: u32 },
}

impl Op {
    /// The paths that it names.
    pub fn paths(&self) -> Vec<&Path> {
        match self {
            Self::Link { from, to, .. } | Self::Rename { from, to, .. } => vec![from, to],
            Self::Mkdir { path, .. }
            | Self::Rmdir { path }
            | Self::Mknod { path, .. }
            | Self::Symlink { path, .. }
            | Self::Readlink { path }
            | Self::Unlink { path }
            | Self::Readdir { path }
            | Self::Open { path, .. }
            | Self::Access { path, .. }
            | Self::Chmod { path, .. }
            | Self::Chown { path, .. }
            | Self::Utimens { path, .. }
            | Self::Truncate { path, .. }
            | Self::SetXattr { path, .. }
            | Self::GetXattr { path, .. }
            | Self::ListXattr { path }
            | Self::RemoveXattr { path, .. }
            | Self::SetAcl { path, .. }
            | Self::RemoveAcl { path, .. } => vec![path],
            _ => Vec::new(),
        }
    }

    /// The open files that it uses.
    pub fn slots(&self) -> Vec<usize> {
        match *self {
            Self::CopyRange { from, to, .. } => vec![from, to],
            Self::Dup { slot, to } => vec![slot, to],
            Self::Open { slot, .. }
            | Self::Fchmod { slot, .. }
            | Self::Fchown { slot, .. }
            | Self::Futimens { slot, .. }
            | Self::Ftruncate { slot, .. }
            | Self::Write { slot, .. }
            | Self::Pwrite { slot, .. }
            | Self::Read { slot, .. }
            | Self::Pread { slot, .. }
            | Self::Seek { slot, .. }
            | Self::MapWrite { slot, .. }
            | Self::MapRead { slot, .. }
            | Self::Fallocate { slot, .. }
            | Self::Fsync { slot, .. }
            | Self::Lock { slot, .. }
            | Self::GetLock { slot, .. }
            | Self::Flock { slot, .. } => vec![slot],
            _ => Vec::new(),
        }
    }

    /// Whether it reads or writes an open file.
    pub fn moves_bytes(&self) -> bool {
        matches!(
            self,
            Self::Write { .. }
                | Self::Pwrite { .. }
                | Self::Read { .. }
                | Self::Pread { .. }
                | Self::CopyRange { .. }
        )
    }

    /// Whether times after it are the kernel's business: pages written through a mapping are stamped when they are
    /// written back, which each file system does in its own time.
    pub fn leaves_times_open(&self) -> bool {
        matches!(self, Self::MapWrite { .. })
    }
}

fn name(rng: &mut StdRng) -> Path {
    match rng.random_range(0..200) {
        0 => "n".repeat(255),
        1 => "n".repeat(256),
        2 => "\u{ff}\u{fe}f".to_owned(),
        3 => ".".to_owned(),
        4 => "..".to_owned(),
        _ => ["a", "b", "c", "d", "e", "f"][rng.random_range(0..6)].to_owned(),
    }
}

pub fn path(rng: &mut StdRng) -> Path {
    let depth = [1, 1, 2, 2, 2, 3][rng.random_range(0..6)];
    let mut path = (0..depth).map(|_| name(rng)).collect::<Vec<_>>().join("/");
    // Never out of the tree.
    while path.starts_with("..") || path.contains("/..") {
        path = path.replace("..", "a");
    }
    if rng.random_range(0..60) == 0 {
        path.push('/');
    }
    path
}

fn mode(rng: &mut StdRng) -> u32 {
    let modes =
        [0o755, 0o777, 0o770, 0o700, 0o644, 0o600, 0o1777, 0o2775, 0o4755, 0o2755, 0o500, 0, 0o060, 0o6777];
    modes[rng.random_range(0..modes.len())]
}

fn id(rng: &mut StdRng) -> u32 {
    [u32::MAX, 0, 1001, 1002, 1003, 2001, 2002][rng.random_range(0..7)]
}

fn time(rng: &mut StdRng) -> Time {
    match rng.random_range(0..6) {
        0 | 1 => Time::Now,
        2 => Time::Omit,
        3 => Time::At(-86_400, 1),
        4 => Time::At(4_102_444_800, 999_999_999),
        _ => Time::At(rng.random_range(0..2_000_000_000), rng.random_range(0..1_000_000_000)),
    }
}

fn offset(rng: &mut StdRng) -> u64 {
    match rng.random_range(0..4) {
        0 => 0,
        1 => rng.random_range(0..40) * 4096,
        _ => rng.random_range(0..SIZE_MAX * 3 / 4),
    }
}

fn length(rng: &mut StdRng) -> usize {
    match rng.random_range(0..10) {
        0 => 0,
        1..=4 => rng.random_range(1..600),
        5..=7 => 4096 * rng.random_range(1..4),
        _ => rng.random_range(1..40_000),
    }
}

fn open_flags(rng: &mut StdRng) -> i32 {
    let mut flags = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR][rng.random_range(0..4)];
    for (flag, of) in [
        (libc::O_CREAT, 2),
        (libc::O_EXCL, 8),
        (libc::O_TRUNC, 6),
        (libc::O_APPEND, 5),
        (libc::O_NOFOLLOW, 10),
        (libc::O_DIRECTORY, 15),
        (libc::O_SYNC, 30),
        (libc::O_DSYNC, 30),
        (libc::O_NOATIME, 30),
    ] {
        if rng.random_range(0..of) == 0 {
            flags |= flag;
        }
    }
    // Undefined without O_CREAT, and together with O_DIRECTORY.
    if flags & libc::O_CREAT == 0 {
        flags &= !libc::O_EXCL;
    } else {
        flags &= !libc::O_DIRECTORY;
    }
    // A FIFO without a reader must not stop the test.
    flags | libc::O_NONBLOCK | libc::O_CLOEXEC
}

fn xattr_name(rng: &mut StdRng) -> Path {
    let names = ["user.a", "user.b", "user.b", "trusted.t", "user.", "other.x"];
    if rng.random_range(0..60) == 0 {
        return format!("user.{}", "x".repeat(255 - 5 + rng.random_range(0..2)));
    }
    names[rng.random_range(0..names.len())].to_owned()
}

/// A valid ACL most of the time: owner, named users and groups, mask, other.
fn acl(rng: &mut StdRng) -> Vec<(u16, u16, u32)> {
    let perm = |rng: &mut StdRng| rng.random_range(0_u16..8);
    let mut entries = vec![(0x01, perm(rng), u32::MAX)];
    let (users, groups) = (rng.random_range(0..3_u32), rng.random_range(0..2_u32));
    entries.extend((0..users).map(|n| (0x02, perm(rng), 1001 + n)));
    entries.push((0x04, perm(rng), u32::MAX));
    entries.extend((0..groups).map(|n| (0x08, perm(rng), 2001 + n)));
    if users + groups > 0 && rng.random_range(0..20) != 0 {
        entries.push((0x10, perm(rng), u32::MAX));
    }
    entries.push((0x20, perm(rng), u32::MAX));
    entries
}

/// Draws the next step of a process. Locks are all of flock's kind or all of fcntl's: a dfs mount keeps both in one space
/// (as NFS does), ext4 in two.
pub fn draw(rng: &mut StdRng, flocks: bool) -> Op {
    let slot = rng.random_range(0..SLOTS);
    let seed = rng.random_range(1..255);
    match rng.random_range(0..118) {
        0..=5 => Op::Mkdir { path: path(rng), mode: mode(rng) },
        6..=8 => Op::Rmdir { path: path(rng) },
        9 => Op::Mknod {
            path: path(rng),
            mode: [libc::S_IFIFO, libc::S_IFREG, libc::S_IFSOCK][rng.random_range(0..3)] | 0o644,
        },
        10..=12 => {
            let target = match rng.random_range(0..12) {
                0 => "/nowhere/at/all".to_owned(),
                1 => "x".repeat(4095),
                _ => path(rng),
            };
            Op::Symlink { target, path: path(rng) }
        }
        13 => Op::Readlink { path: path(rng) },
        14..=17 => Op::Link { from: path(rng), to: path(rng), follow: rng.random_range(0..4) == 0 },
        18..=23 => Op::Unlink { path: path(rng) },
        24..=30 => {
            let flags = [0, 0, 0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE][rng.random_range(0..5)];
            Op::Rename { from: path(rng), to: path(rng), flags }
        }
        31..=33 => Op::Readdir { path: path(rng) },
        34..=46 => Op::Open { slot, path: path(rng), flags: open_flags(rng), mode: mode(rng) },
        47..=49 => Op::Close { slot },
        50 => Op::Dup { slot, to: rng.random_range(0..SLOTS) },
        51..=52 => Op::Access { path: path(rng), mode: rng.random_range(0..8) },
        53..=57 => Op::Chmod { path: path(rng), mode: mode(rng) },
        58 => Op::Fchmod { slot, mode: mode(rng) },
        59..=62 => Op::Chown { path: path(rng), uid: id(rng), gid: id(rng), follow: rng.random() },
        63 => Op::Fchown { slot, uid: id(rng), gid: id(rng) },
        64..=65 => Op::Utimens { path: path(rng), atime: time(rng), mtime: time(rng), follow: rng.random() },
        66 => Op::Futimens { slot, atime: time(rng), mtime: time(rng) },
        67..=69 => Op::Truncate { path: path(rng), size: rng.random_range(0..SIZE_MAX) },
        70..=71 => Op::Ftruncate { slot, size: rng.random_range(0..SIZE_MAX) },
        72..=75 => Op::Write { slot, length: length(rng), seed },
        76..=83 => Op::Pwrite { slot, offset: offset(rng), length: length(rng), seed },
        84..=85 => Op::Read { slot, length: length(rng) },
        86..=88 => Op::Pread { slot, offset: offset(rng), length: length(rng) },
        89..=90 => {
            let whence = [libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END][rng.random_range(0..3)];
            Op::Seek { slot, offset: rng.random_range(-20_000..20_000), whence }
        }
        91..=93 => Op::MapWrite { slot, offset: offset(rng), length: length(rng).max(1), seed },
        94 => Op::MapRead { slot, offset: offset(rng), length: length(rng).max(1) },
        95..=98 => {
            let keep = libc::FALLOC_FL_KEEP_SIZE;
            let modes = [
                0,
                keep,
                keep | libc::FALLOC_FL_PUNCH_HOLE,
                libc::FALLOC_FL_ZERO_RANGE,
                keep | libc::FALLOC_FL_ZERO_RANGE,
            ];
            Op::Fallocate {
                slot,
                mode: modes[rng.random_range(0..modes.len())],
                offset: offset(rng),
                length: length(rng) as u64,
            }
        }
        99..=101 => Op::CopyRange {
            from: slot,
            from_offset: offset(rng),
            to: rng.random_range(0..SLOTS),
            to_offset: offset(rng),
            length: length(rng),
        },
        102 => Op::Fsync { slot, data: rng.random() },
        103..=105 => {
            let flags = [0, 0, libc::XATTR_CREATE, libc::XATTR_REPLACE][rng.random_range(0..4)];
            let length = rng.random_range(0..300);
            Op::SetXattr { path: path(rng), name: xattr_name(rng), length, seed, flags, follow: rng.random() }
        }
        106 => Op::GetXattr { path: path(rng), name: xattr_name(rng), room: rng.random_range(0..400) },
        107 => Op::ListXattr { path: path(rng) },
        108 => Op::RemoveXattr { path: path(rng), name: xattr_name(rng) },
        109..=111 => Op::SetAcl { path: path(rng), default: rng.random(), entries: acl(rng) },
        112 => Op::RemoveAcl { path: path(rng), default: rng.random() },
        113..=116 if flocks => {
            let how = [libc::LOCK_SH, libc::LOCK_EX, libc::LOCK_UN][rng.random_range(0..3)];
            Op::Flock { slot, how: how | libc::LOCK_NB }
        }
        range @ 113..=116 => {
            let (kind, start, length) = (lock_kind(rng), rng.random_range(0..100), rng.random_range(0..100));
            if range == 116 {
                Op::GetLock { slot, kind, start, length }
            } else {
                Op::Lock { slot, kind, start, length }
            }
        }
        _ => Op::Umask { mask: [0, 0o022, 0o002, 0o077, 0o027][rng.random_range(0..5)] },
    }
}

fn lock_kind(rng: &mut StdRng) -> i16 {
    let kind = [libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK][rng.random_range(0..3)];
    i16::try_from(kind).expect("small")
}
