//! Open files: open, create, read, write, flush, release, and what else takes a handle.

use super::answer::{Answer, Caller, bad_handle};
use super::convert::open_flags;
use super::state::Shared;
use crate::killable::{Patience, Refuse};
use bytes::Bytes;
use dfs_client::{Closing, OpenFile, Privileges, SeekKind};
use dfs_proto::cred::PRIVILEGED;
use dfs_proto::v1::{self, Attr, Cred, ErrorCode};
use dfs_proto::{FsError, FsResult, InodeNo};
use fuser::{
    Errno, FileHandle, FopenFlags, Generation, ReplyCreate, ReplyData, ReplyEmpty, ReplyLseek, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

/// The most one copy_file_range answers for; the kernel takes 32 bits and asks again for the rest.
const COPY_MAX: u64 = 1 << 31;

/// How often a read begins again because its lease was wanted elsewhere.
const READS: usize = 4;

/// The extended attribute that holds a program's capabilities.
const CAPABILITY: &[u8] = b"security.capability";

/// An open file.
pub struct File {
    pub open: Arc<OpenFile>,
    /// Opened with O_APPEND: what programs write goes to the end of the file as it is then.
    append: bool,
}

/// A request that is registered as not answered yet, until this is dropped, whatever ends it.
struct Waiting {
    fs: Arc<Shared>,
    ino: InodeNo,
    id: u64,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.fs.requests.end(self.ino, self.id);
    }
}

/// What a program wrote, and where the kernel thinks that it goes.
#[derive(Clone, Copy)]
pub struct WriteTo {
    pub handle: FileHandle,
    pub offset: u64,
    pub write_flags: WriteFlags,
    pub open_flags: i32,
}

impl File {
    /// Opened for direct I/O: nothing that is read or written stays in the kernel.
    pub fn is_direct(&self) -> bool {
        self.append
    }
}

impl Shared {
    /// The open file behind a handle.
    pub fn file(&self, handle: FileHandle) -> FsResult<Arc<File>> {
        self.files.get(handle).ok_or_else(bad_handle)
    }

    pub async fn open(&self, caller: Caller, ino: InodeNo, flags: i32, answer: Answer<ReplyOpen>) {
        match self.client.open(&caller.cred(), ino, open_flags(flags)).await {
            Ok(open) => {
                let (handle, how) = self.opened(open, flags);
                if !answer.send(|reply| reply.opened(handle, how)) {
                    self.give_back(handle).await;
                }
            }
            Err(error) => answer.fail(&error),
        }
    }

    pub async fn create(&self, caller: Caller, what: v1::Create, flags: i32, answer: Answer<ReplyCreate>) {
        let (parent, name) = (InodeNo(what.parent), what.name.clone());
        let (made, open) = match self.client.create_open(&caller.cred(), what, open_flags(flags)).await {
            Ok(made) => made,
            Err(error) => return answer.fail(&error),
        };
        let (handle, how) = self.opened(open, flags);
        match self.shown(&made.attr) {
            Ok(shown) => {
                let ino = InodeNo(made.attr.ino);
                self.inodes.looked_up(ino, false);
                // One time-out for both.
                let ttl = self.ttl(&made.attr).min(self.name_ttl(parent, &name));
                // As with a link: what was there before, the kernel may know better by now.
                let ttl = if made.created { ttl } else { Duration::ZERO };
                self.inodes.told(ino, ttl, ttl);
                let generation = Generation(made.attr.generation);
                if !answer.send(|reply| reply.created(&ttl, &shown, generation, handle, how)) {
                    self.inodes.forget(ino, 1);
                    self.give_back(handle).await;
                }
            }
            Err(error) => {
                answer.fail(&error);
                self.give_back(handle).await;
            }
        }
    }

    fn opened(&self, open: Arc<OpenFile>, flags: i32) -> (FileHandle, FopenFlags) {
        let append = flags & libc::O_APPEND != 0;
        let keep = self.inodes.opened(open.ino, self.client.lease_term(open.ino));
        let how = match (append, keep) {
            // The kernel's idea of the end is not asked for: every write comes here, and lands where the end is.
            (true, _) => FopenFlags::FOPEN_DIRECT_IO,
            (false, true) => FopenFlags::FOPEN_KEEP_CACHE,
            (false, false) => FopenFlags::empty(),
        };
        (self.files.insert(File { open, append }), how)
    }

    /// Closes a file that nobody will use: its open was answered EINTR.
    async fn give_back(&self, handle: FileHandle) {
        let Some(file) = self.files.remove(handle) else { return };
        if let Err(error) = self.client.release(Arc::clone(&file.open)).await {
            tracing::warn!(ino = %file.open.ino, %error, "a file could not be closed");
        }
    }

    /// Writes: into the buffer at once when there is room, else on the runtime.
    pub fn write(self: &Arc<Self>, request: &Request, to: WriteTo, data: &[u8], reply: ReplyWrite) {
        let Ok(file) = self.file(to.handle) else {
            return reply.refuse(Errno::EBADF);
        };
        // Shared pages are written back through any handle, at their own place.
        let write_back = to.write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let ends_privileges = to.write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let ended_by = |cred: fn(Caller) -> Cred| {
            if ends_privileges { Privileges::EndedBy(cred(Caller::of(request))) } else { Privileges::Keep }
        };
        let append = file.append && to.open_flags & libc::O_APPEND != 0 && !write_back;
        let written = u32::try_from(data.len()).expect("a write is below 16 MiB");
        if !append {
            let _runtime = self.runtime.enter();
            // Which groups the writer is in is asked for when it counts.
            let privileges = ended_by(Caller::without_groups);
            let now = AssertUnwindSafe(|| {
                if write_back {
                    self.client.try_write_back(file.open.ino, to.offset, data)
                } else {
                    self.client.try_write(&file.open, to.offset, data, &privileges)
                }
            });
            match std::panic::catch_unwind(now) {
                Ok(Some(Ok(()))) => return reply.written(written),
                Ok(Some(Err(error))) => {
                    return self.serve(request, reply, Patience::Endless, |_, answer| async move {
                        answer.fail(&error);
                    });
                }
                Ok(None) => {}
                // The panic hook has logged it; the reply, dropped, is EIO.
                Err(_) => return,
            }
        }
        let patience = if write_back { Patience::Endless } else { Patience::Killed };
        let data = Bytes::copy_from_slice(data);
        let privileges = ended_by(Caller::cred);
        let (ino, id) = (file.open.ino, request.unique().0);
        let range = to.offset..to.offset.saturating_add(data.len() as u64);
        // Before anybody can wait for the pages that it holds.
        self.requests.begin_write(ino, id, range.clone());
        let waiting = Waiting { fs: Arc::clone(self), ino, id };
        self.serve(request, reply, patience, move |fs, answer| async move {
            let before = fs.client.lease_term(ino);
            let done = if append {
                fs.append(&file, to.offset, &data, &privileges).await
            } else if write_back {
                fs.client.write_back(ino, to.offset, &data).await
            } else {
                fs.client.write(&file.open, to.offset, &data, &privileges).await
            };
            drop(waiting);
            answer.give(done, |reply, ()| reply.written(written));
            if !append && (before.is_none() || fs.client.lease_term(ino) != before) {
                // Its pages may hold, around what it wrote, what somebody else has changed while it waited.
                fs.drop_pages_of(ino, range).await;
            }
        });
    }

    /// Reads. What stays in the kernel was read under a lease that lasts.
    pub async fn read(
        self: &Arc<Self>,
        id: u64,
        file: &File,
        offset: u64,
        size: u32,
        answer: Answer<ReplyData>,
    ) {
        let (ino, range) = (file.open.ino, offset..offset.saturating_add(size.into()));
        self.requests.begin_read(ino, id, range.clone());
        // Whoever is killed is answered before it is read, and holds no pages any more.
        let waiting = Waiting { fs: Arc::clone(self), ino, id };
        tokio::select! {
            biased;
            () = self.read_under_lease(waiting, file, range, &answer) => {}
            () = answer.interrupted() => {}
        }
    }

    /// Reads what does not stay in the kernel, which holds no pages for it.
    pub async fn read_directly(&self, file: &File, offset: u64, size: u32, answer: Answer<ReplyData>) {
        let read = self.client.read(&file.open, offset, size as usize).await;
        answer.give(read, |reply, bytes| reply.data(&bytes));
    }

    async fn read_under_lease(
        self: &Arc<Self>,
        waiting: Waiting,
        file: &File,
        range: Range<u64>,
        answer: &Answer<ReplyData>,
    ) {
        let (ino, id, offset) = (waiting.ino, waiting.id, range.start);
        let length = usize::try_from(range.end - offset).unwrap_or(usize::MAX);
        for _ in 0..READS {
            let term = self.client.read_lease(ino).await;
            let read = self.client.read(&file.open, offset, length).await;
            let lasts = || term.is_some() && self.client.lease_term(ino) == term;
            let stays = self.requests.end_read_if(ino, id, lasts);
            self.client.has_read(ino);
            if stays || read.is_err() {
                drop(waiting);
                return answer.give(read, |reply, bytes| reply.data(&bytes));
            }
        }
        let read = self.client.read(&file.open, offset, length).await;
        drop(waiting);
        answer.give(read, |reply, bytes| reply.data(&bytes));
        self.inodes.pages_dropped(ino);
        self.drop_pages_of(ino, range).await;
    }

    async fn drop_pages_of(self: &Arc<Self>, ino: InodeNo, range: Range<u64>) {
        if let Ok(node) = self.inodes.node(ino) {
            self.drop_pages(node, range.start, range.end.saturating_sub(range.start).max(1)).await;
        }
    }

    /// Appends. The kernel has dropped its pages where it thought that the bytes go; when the file had grown elsewhere
    /// they went further on, and pages there would hide them.
    async fn append(
        self: &Arc<Self>,
        file: &File,
        expected: u64,
        data: &[u8],
        privileges: &Privileges,
    ) -> FsResult<()> {
        let offset = self.client.append(&file.open, data, privileges).await?;
        if offset != expected {
            let node = self.inodes.node(file.open.ino)?;
            let (fs, length) = (Arc::clone(self), data.len());
            tokio::spawn(async move {
                // The page in front, too: its rest beyond the old end of the file was zeroes.
                let from = offset.min(expected);
                let to = offset.max(expected).saturating_add(length as u64);
                fs.drop_pages(node, from, to - from).await;
            });
        }
        Ok(())
    }

    /// What close(2) waits for: locks of the closing process are given up, what it wrote is on its way, and durable unless it is
    /// little and all goes well.
    pub async fn flush(&self, handle: FileHandle, owner: u64, answer: Answer<ReplyEmpty>) {
        let Ok(file) = self.file(handle) else {
            return answer.refuse(Errno::EBADF);
        };
        let ino = file.open.ino;
        let unlocked = self.client.release_locks(ino, owner).await;
        let flushed = if file.open.flags.write { self.client.close(&file.open).await } else { Ok(()) };
        answer.empty(flushed.and(unlocked));
    }

    pub async fn fsync(&self, ino: InodeNo, answer: Answer<ReplyEmpty>) {
        answer.empty(self.client.fsync(ino).await);
    }

    /// The last close of an open file; `locks`: those to be given up with it.
    pub async fn release(&self, handle: FileHandle, locks: Option<Closing>, answer: Answer<ReplyEmpty>) {
        let Some(file) = self.files.remove(handle) else {
            return answer.refuse(Errno::EBADF);
        };
        let unlocked = match locks {
            Some(closing) => self.client.close_locks(closing).await,
            None => Ok(()),
        };
        let released = self.client.release(Arc::clone(&file.open)).await;
        answer.empty(released.and(unlocked));
    }

    pub async fn setattr(&self, caller: Caller, change: v1::SetAttr) -> FsResult<Attr> {
        if change.kill_priv && self.goes_before_a_write(caller, &change).await? {
            self.client.getattr(InodeNo(change.ino)).await
        } else {
            self.client.setattr(&caller.cred(), change).await
        }
    }

    /// Before a write that ends privileges the kernel says so in words that it also has for chown(2) with -1 twice, which
    /// on a file with such privileges is the owner's. The write does it by itself: nothing is to be done for it here.
    async fn goes_before_a_write(&self, caller: Caller, change: &v1::SetAttr) -> FsResult<bool> {
        if caller.uid == 0 {
            return Ok(false);
        }
        let ino = InodeNo(change.ino);
        let attr = self.client.getattr(ino).await?;
        let privileged = attr.mode & PRIVILEGED != 0 || attr.has_capability;
        Ok(attr.uid != caller.uid && privileged && self.is_open_for_writing(ino))
    }

    /// Removes an extended attribute.
    pub async fn removexattr(&self, caller: Caller, ino: InodeNo, name: &[u8]) -> FsResult<()> {
        let removed = self.client.removexattr(&caller.cred(), ino, name).await;
        // So the kernel begins a write of somebody who may write because he has opened the file. The write ends the
        // capability by itself.
        let refused = removed.as_ref().is_err_and(|error| error.code == ErrorCode::ErrorAccess);
        if refused && name == CAPABILITY && self.is_open_for_writing(ino) { Ok(()) } else { removed }
    }

    fn is_open_for_writing(&self, ino: InodeNo) -> bool {
        self.files.any(|file| file.open.ino == ino && file.open.flags.write)
    }

    pub async fn fallocate(
        &self,
        caller: Caller,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> FsResult<()> {
        let file = self.file(handle)?;
        let known = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        let has = |flag: i32| mode & flag != 0;
        let (punch, zero) = (has(libc::FALLOC_FL_PUNCH_HOLE), has(libc::FALLOC_FL_ZERO_RANGE));
        if mode & !known != 0 || (punch && (zero || !has(libc::FALLOC_FL_KEEP_SIZE))) {
            return Err(FsError::new(ErrorCode::ErrorNotSupported, format!("fallocate mode {mode:#x}")));
        }
        let keep = has(libc::FALLOC_FL_KEEP_SIZE);
        self.client.fallocate(&caller.cred(), &file.open, offset, length, keep, punch, zero).await
    }

    pub async fn lseek(&self, handle: FileHandle, offset: i64, whence: i32, answer: Answer<ReplyLseek>) {
        let found = async {
            let kind = match whence {
                libc::SEEK_DATA => SeekKind::Data,
                libc::SEEK_HOLE => SeekKind::Hole,
                _ => return Err(ErrorCode::ErrorInvalid.into()),
            };
            let from = u64::try_from(offset).map_err(|_| FsError::from(ErrorCode::ErrorNoDeviceAddress))?;
            let file = self.file(handle)?;
            let found = self.client.seek(&file.open, from, kind).await?;
            i64::try_from(found).map_err(|_| ErrorCode::ErrorOverflow.into())
        };
        answer.give(found.await, ReplyLseek::offset);
    }

    pub async fn copy_file_range(
        &self,
        caller: Caller,
        from: (FileHandle, u64),
        to: (FileHandle, u64),
        length: u64,
        answer: Answer<ReplyWrite>,
    ) {
        let copied = async {
            let (source, target) = (self.file(from.0)?, self.file(to.0)?);
            let length = length.min(COPY_MAX);
            let copied = self
                .client
                .copy_range(&caller.cred(), &source.open, from.1, &target.open, to.1, length)
                .await?;
            Ok(u32::try_from(copied).expect("not more than was asked for"))
        };
        answer.give(copied.await, ReplyWrite::written);
    }
}
