//! The FUSE adapter: decodes a request, calls the client, replies. It decides nothing about files; what belongs to FUSE
//! alone (the kernel's pages, its numbers, its patience) is decided in the modules around.

mod answer;
mod convert;
mod dirs;
mod files;
mod forget;
mod handles;
mod ioctl;
mod locks;
mod state;

pub use ioctl::SERVER_PID;
pub use state::Dfs;

use crate::killable::Patience;
use crate::listings::Mode;
use answer::Caller;
use convert::{kind_of_mode, time_change};
use dfs_proto::limits;
use dfs_proto::v1::{self, ErrorCode, Kind};
use dirs::Dir;
use files::WriteTo;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use state::ask_kernel;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Where SELinux keeps a file's label.
const LABEL: &[u8] = b"security.selinux";
/// The block of statfs(2), in bytes.
const STATFS_BLOCK: u32 = 4096;

fn name(name: &OsStr) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(name.as_bytes())
}

impl Filesystem for Dfs {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        ask_kernel(config);
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: fuser::INodeNo, child: &OsStr, reply: ReplyEntry) {
        let (parent, child, caller) = (self.inode(parent), name(child), Caller::of(request));
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            let client = &fs.client;
            // With file handles (NFS, open_by_handle_at) the kernel asks for these two as well.
            if &child[..] == b"." || (&child[..] == b".." && parent == fs.inodes.root()) {
                return answer.entry(&fs, client.getattr(parent).await, Duration::ZERO);
            }
            let cached = client.cached_lookup(parent, &child);
            let fresh = cached.is_none();
            let known = match cached {
                Some(known) => known,
                None => {
                    // The kernel asks for attributes if it wants them, but it decides who may remove and change a file by what it
                    // has: that has to be true for all but root.
                    if caller.uid == 0
                        && let Some(attr) = client.known_name(parent, &child)
                    {
                        return answer.stranger(&fs, &attr);
                    }
                    let found = client.lookup(&caller.cred(), parent, &child).await;
                    match client.cached_lookup(parent, &child) {
                        Some(known) => known,
                        // Overtaken by a change of our own: right now, but not to be believed any longer.
                        None => return answer.entry(&fs, found, Duration::ZERO),
                    }
                }
            };
            match known {
                Ok((attr, ttl)) => answer.entry(&fs, Ok(attr), ttl),
                Err(error) if error.code == ErrorCode::ErrorNotFound && fresh => {
                    match client.cached_absence(parent, &child) {
                        Some(ttl) => answer.absent(&fs.as_kernel_can(ttl)),
                        None => answer.fail(&error),
                    }
                }
                Err(error) => answer.fail(&error),
            }
        });
    }

    fn forget(&self, _request: &Request, node: fuser::INodeNo, lookups: u64) {
        self.0.inodes.forget(self.inode(node), lookups);
    }

    fn getattr(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        _handle: Option<FileHandle>,
        reply: ReplyAttr,
    ) {
        let ino = self.inode(node);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            match fs.client.getattr(ino).await {
                Ok(attr) => answer.attr(&fs, &attr),
                Err(error) => answer.fail(&error),
            }
        });
    }

    fn setattr(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let (atime, atime_now) = time_change(atime);
        let (mtime, mtime_now) = time_change(mtime);
        let by_handle = size.is_some()
            && handle.and_then(|handle| self.0.files.get(handle)).is_some_and(|file| file.open.flags.write);
        let times = atime.is_some() || atime_now || mtime.is_some() || mtime_now;
        let change = v1::SetAttr {
            ino: self.inode(node).get(),
            // chown(2) with -1 for both; nothing else changes nothing.
            kill_priv: mode.is_none() && uid.is_none() && gid.is_none() && size.is_none() && !times,
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime,
            atime_now,
            mtime,
            mtime_now,
            by_handle,
            ..v1::SetAttr::default()
        };
        let caller = Caller::of(request);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            match fs.setattr(caller, change).await {
                Ok(attr) => answer.attr(&fs, &attr),
                Err(error) => answer.fail(&error),
            }
        });
    }

    fn readlink(&self, request: &Request, node: fuser::INodeNo, reply: ReplyData) {
        let ino = self.inode(node);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            answer.give(fs.client.readlink(ino).await, |reply, target| reply.data(&target));
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: fuser::INodeNo,
        child: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let what = kind_of_mode(mode).map(|kind| v1::Create {
            parent: self.inode(parent).get(),
            name: name(child),
            kind: kind.into(),
            mode: mode & 0o7777,
            umask,
            rdev,
            exclusive: true,
            ..v1::Create::default()
        });
        self.make(request, what, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: fuser::INodeNo,
        child: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let what = v1::Create {
            parent: self.inode(parent).get(),
            name: name(child),
            kind: Kind::Dir.into(),
            mode: mode & 0o7777,
            umask,
            exclusive: true,
            ..v1::Create::default()
        };
        self.make(request, Ok(what), reply);
    }

    fn unlink(&self, request: &Request, parent: fuser::INodeNo, child: &OsStr, reply: ReplyEmpty) {
        let (parent, child) = (self.inode(parent), name(child));
        self.change(request, reply, move |fs, caller| async move {
            fs.client.unlink(&caller.cred(), parent, &child).await
        });
    }

    fn rmdir(&self, request: &Request, parent: fuser::INodeNo, child: &OsStr, reply: ReplyEmpty) {
        let (parent, child) = (self.inode(parent), name(child));
        self.change(request, reply, move |fs, caller| async move {
            fs.client.rmdir(&caller.cred(), parent, &child).await
        });
    }

    fn symlink(
        &self,
        request: &Request,
        parent: fuser::INodeNo,
        child: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let what = v1::Create {
            parent: self.inode(parent).get(),
            name: name(child),
            kind: Kind::Symlink.into(),
            mode: 0o777,
            target: name(target.as_os_str()),
            exclusive: true,
            ..v1::Create::default()
        };
        self.make(request, Ok(what), reply);
    }

    fn rename(
        &self,
        request: &Request,
        parent: fuser::INodeNo,
        child: &OsStr,
        new_parent: fuser::INodeNo,
        new_child: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (parent, new_parent) = (self.inode(parent), self.inode(new_parent));
        let (child, new_child) = (name(child), name(new_child));
        let no_replace = flags.contains(RenameFlags::RENAME_NOREPLACE);
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        let understood = RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE;
        if !understood.contains(flags) || (no_replace && exchange) {
            return reply.error(Errno::EINVAL);
        }
        self.change(request, reply, move |fs, caller| async move {
            let cred = caller.cred();
            fs.client.rename(&cred, parent, &child, new_parent, &new_child, no_replace, exchange).await
        });
    }

    fn link(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        new_parent: fuser::INodeNo,
        new_child: &OsStr,
        reply: ReplyEntry,
    ) {
        let (ino, parent, child) = (self.inode(node), self.inode(new_parent), name(new_child));
        let caller = Caller::of(request);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            let linked = fs.client.link(&caller.cred(), ino, parent, &child).await;
            answer.linked(&fs, linked);
        });
    }

    fn open(&self, request: &Request, node: fuser::INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (ino, caller) = (self.inode(node), Caller::of(request));
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.open(caller, ino, flags.0, answer).await;
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: fuser::INodeNo,
        child: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let what = v1::Create {
            parent: self.inode(parent).get(),
            name: name(child),
            kind: Kind::File.into(),
            mode: mode & 0o7777,
            umask,
            exclusive: flags & libc::O_EXCL != 0,
            open: true,
            ..v1::Create::default()
        };
        let caller = Caller::of(request);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.create(caller, what, flags, answer).await;
        });
    }

    fn read(
        &self,
        request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(file) = self.0.files.get(handle) else {
            return reply.error(Errno::EBADF);
        };
        let direct = file.is_direct() || flags.0 & libc::O_DIRECT != 0;
        let id = request.unique().0;
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            if direct {
                fs.read_directly(&file, offset, size, answer).await;
            } else {
                fs.read(id, &file, offset, size, answer).await;
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let to = WriteTo { handle, offset, write_flags, open_flags: flags.0 };
        self.0.write(request, to, data, reply);
    }

    fn flush(
        &self,
        request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.0.serve(request, reply, Patience::KilledOrDying, move |fs, answer| async move {
            fs.flush(handle, owner.0, answer).await;
        });
    }

    fn release(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Before the next request is read, which may be for the same lock.
        let locks = owner.map(|owner| self.0.client.closing(self.inode(node), owner.0));
        // Nobody waits for this answer.
        self.0.serve(request, reply, Patience::Endless, move |fs, answer| async move {
            fs.release(handle, locks, answer).await;
        });
    }

    fn fsync(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let ino = self.inode(node);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.fsync(ino, answer).await;
        });
    }

    fn opendir(&self, request: &Request, node: fuser::INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // The kernel has checked the right to read it, and the master will with every page.
        let (ino, fs) = (self.inode(node), &self.0);
        let (reader, mode) = fs.listings.open(ino, fs.client.edition(ino), fs.inodes.now());
        let handle = fs.dirs.insert(Dir::new(ino, Caller::of(request).cred(), reader));
        reply.opened(
            handle,
            match mode {
                Mode::Off => FopenFlags::empty(),
                Mode::Fill => FopenFlags::FOPEN_CACHE_DIR,
                Mode::Keep => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
            },
        );
    }

    fn readdir(
        &self,
        request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let Some(dir) = self.0.dirs.get(handle) else {
            return reply.error(Errno::EBADF);
        };
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.list(&dir, offset, &answer).await;
        });
    }

    fn readdirplus(
        &self,
        request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let Some(dir) = self.0.dirs.get(handle) else {
            return reply.error(Errno::EBADF);
        };
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.list(&dir, offset, &answer).await;
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        if let Some(dir) = self.0.dirs.remove(handle) {
            dir.closes(&self.0.listings);
        }
        reply.ok();
    }

    fn fsyncdir(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // Changes of names are durable before they are answered. The kernel does not tell a FUSE file system of sync(2)
        // and syncfs(2), so fsync of the root stands for them (`dfs sync`, umount.fuse.dfs).
        let root = self.inode(node) == self.0.inodes.root();
        self.change(request, reply, move |fs, _| async move {
            if root { fs.client.sync().await } else { Ok(()) }
        });
    }

    fn statfs(&self, request: &Request, _node: fuser::INodeNo, reply: ReplyStatfs) {
        self.0.serve(request, reply, Patience::Killed, |fs, answer| async move {
            answer.give(fs.client.statfs().await, |reply, stats| {
                let blocks = |bytes: u64| bytes / u64::from(STATFS_BLOCK);
                let free = blocks(stats.free_bytes);
                let total = blocks(stats.total_bytes).max(1);
                // Inodes are not preallocated: as many are free as there is space for.
                let files = stats.files.saturating_add(free);
                let name_max = u32::try_from(limits::NAME_MAX).expect("255");
                reply.statfs(total, free, free, files, free, STATFS_BLOCK, name_max, STATFS_BLOCK);
            });
        });
    }

    fn setxattr(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        key: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let (ino, key, value) = (self.inode(node), name(key), bytes::Bytes::copy_from_slice(value));
        let (create, replace) = (flags & libc::XATTR_CREATE != 0, flags & libc::XATTR_REPLACE != 0);
        self.change(request, reply, move |fs, caller| async move {
            fs.client.setxattr(&caller.cred(), ino, &key, &value, create, replace).await
        });
    }

    fn getxattr(&self, request: &Request, node: fuser::INodeNo, key: &OsStr, room: u32, reply: ReplyXattr) {
        let (ino, key, caller) = (self.inode(node), name(key), Caller::of(request));
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            match fs.client.getxattr(&caller.cred(), ino, &key).await {
                Ok(value) => answer.value(&value, room),
                // As file systems without labels say it: ls(1) asks for the label of every file that it lists, until it hears this.
                Err(error) if error.code == ErrorCode::ErrorNoData && !fs.labels && &key[..] == LABEL => {
                    answer.refuse(Errno::EOPNOTSUPP);
                }
                Err(error) => answer.fail(&error),
            }
        });
    }

    fn listxattr(&self, request: &Request, node: fuser::INodeNo, room: u32, reply: ReplyXattr) {
        let (ino, caller) = (self.inode(node), Caller::of(request));
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            match fs.client.listxattr(&caller.cred(), ino).await {
                Ok(names) => {
                    let list: Vec<u8> =
                        names.iter().flat_map(|name| [name, &b"\0"[..]]).flatten().copied().collect();
                    answer.value(&list, room);
                }
                Err(error) => answer.fail(&error),
            }
        });
    }

    fn removexattr(&self, request: &Request, node: fuser::INodeNo, key: &OsStr, reply: ReplyEmpty) {
        let (ino, key) = (self.inode(node), name(key));
        self.change(request, reply, move |fs, caller| async move { fs.removexattr(caller, ino, &key).await });
    }

    fn access(&self, request: &Request, node: fuser::INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        let (ino, mask) = (self.inode(node), mask.bits().unsigned_abs());
        self.change(request, reply, move |fs, caller| async move {
            fs.client.access(&caller.cred(), ino, mask).await
        });
    }

    fn getlk(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        _handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let ino = self.inode(node);
        let Some(lock) = self.lock(owner, (start, end), typ, pid) else {
            return reply.error(Errno::EINVAL);
        };
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.getlk(ino, lock, answer).await;
        });
    }

    fn setlk(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        _handle: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let ino = self.inode(node);
        let Some(lock) = self.lock(owner, (start, end), typ, pid) else {
            return reply.error(Errno::EINVAL);
        };
        let lock = v1::Lock { wait: sleep && typ != libc::F_UNLCK, ..lock };
        let patience = if lock.wait { Patience::AnySignal } else { Patience::Killed };
        self.0.serve(request, reply, patience, move |fs, answer| async move {
            fs.setlk(ino, lock, answer).await;
        });
    }

    fn ioctl(
        &self,
        request: &Request,
        node: fuser::INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        command: u32,
        input: &[u8],
        room: u32,
        reply: ReplyIoctl,
    ) {
        let (ino, caller, input) = (self.inode(node), Caller::of(request), input.to_vec());
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.ioctl(caller, ino, command, input, room, answer).await;
        });
    }

    fn fallocate(
        &self,
        request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.change(request, reply, move |fs, caller| async move {
            fs.fallocate(caller, handle, offset, length, mode).await
        });
    }

    fn lseek(
        &self,
        request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.lseek(handle, offset, whence, answer).await;
        });
    }

    fn copy_file_range(
        &self,
        request: &Request,
        _node: fuser::INodeNo,
        handle: FileHandle,
        offset: u64,
        _to_node: fuser::INodeNo,
        to_handle: FileHandle,
        to_offset: u64,
        length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let caller = Caller::of(request);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            fs.copy_file_range(caller, (handle, offset), (to_handle, to_offset), length, answer).await;
        });
    }
}
