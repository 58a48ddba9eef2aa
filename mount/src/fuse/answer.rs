//! Carries a request through: at once on the thread that read it when the caches can answer, else on the runtime; and
//! the answer exactly once, whoever gives it.

use super::convert::file_attr;
use super::state::Shared;
use crate::errno::{errno, is_fault};
use crate::killable::{Interrupt, Patience, Refuse, Slot};
use crate::procfs;
use dfs_client::FsError;
use dfs_proto::v1::{Attr, Cred, ErrorCode, Kind};
use dfs_proto::{FsResult, InodeNo};
use fuser::{Errno, FileAttr, Generation, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyXattr, Request};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, UNIX_EPOCH};

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    pub uid: u32,
    gid: u32,
    thread: u32,
}

impl Caller {
    pub fn of(request: &Request) -> Self {
        Self { uid: request.uid(), gid: request.gid(), thread: request.pid() }
    }

    /// Where groups do not count.
    pub fn without_groups(self) -> Cred {
        Cred { uid: self.uid, gid: self.gid, groups: Vec::new() }
    }

    /// With the supplementary groups as they are at this moment. Root's change nothing.
    pub fn cred(self) -> Cred {
        let groups = if self.uid == 0 { Vec::new() } else { procfs::groups(self.thread) };
        Cred { uid: self.uid, gid: self.gid, groups }
    }
}

/// The right to answer a request, shared with whoever may interrupt it.
pub struct Answer<R: Refuse>(Arc<Slot<R>>);

impl<R: Refuse> Answer<R> {
    /// Answers. False: the request was interrupted, what was done for it must be undone.
    pub fn send(&self, with: impl FnOnce(R)) -> bool {
        self.0.take().map(with).is_some()
    }

    /// Answers with a result, `with` says how when it is a good one.
    pub fn give<T>(&self, result: FsResult<T>, with: impl FnOnce(R, T)) {
        match result {
            Ok(value) => {
                self.send(|reply| with(reply, value));
            }
            Err(error) => self.fail(&error),
        }
    }

    pub fn fail(&self, error: &FsError) {
        if is_fault(error.code) {
            tracing::warn!(%error, "a request failed");
        }
        self.refuse(errno(error.code));
    }

    pub fn refuse(&self, errno: Errno) {
        self.send(|reply| reply.refuse(errno));
    }

    /// Returns when the request was interrupted.
    pub async fn interrupted(&self) {
        self.0.interrupted().await;
    }
}

impl Answer<ReplyEmpty> {
    pub fn empty(&self, result: FsResult<()>) {
        self.give(result, |reply, ()| reply.ok());
    }
}

impl Answer<ReplyXattr> {
    /// As getxattr(2) and listxattr(2): with room 0 how long it is, ERANGE when it does not fit.
    pub fn value(&self, value: &[u8], room: u32) {
        let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
        if room == 0 {
            self.send(|reply| reply.size(length));
        } else if length > room {
            self.refuse(Errno::ERANGE);
        } else {
            self.send(|reply| reply.data(value));
        }
    }
}

impl Answer<ReplyEntry> {
    /// Tells of an inode that was linked: the kernel takes the answer in without a look at what it was told since, so it must
    /// believe nothing of it.
    pub fn linked(&self, fs: &Shared, found: FsResult<Attr>) {
        self.told(fs, found, Duration::ZERO, |_| Duration::ZERO);
    }

    /// Tells of an inode that was looked up or made; `ttl`: how long its name may be believed.
    pub fn entry(&self, fs: &Shared, found: FsResult<Attr>, ttl: Duration) {
        self.told(fs, found, ttl, |attr| fs.ttl(attr));
    }

    /// An inode with attributes that are not to be believed.
    pub fn stranger(&self, fs: &Shared, attr: &Attr) {
        self.told(fs, Ok(*attr), Duration::ZERO, |_| Duration::ZERO);
    }

    fn told(&self, fs: &Shared, found: FsResult<Attr>, ttl: Duration, attr_ttl: impl Fn(&Attr) -> Duration) {
        let attr = match found {
            Ok(attr) => attr,
            Err(error) => return self.fail(&error),
        };
        match fs.shown(&attr) {
            Ok(shown) => {
                let ino = InodeNo(attr.ino);
                fs.inodes.looked_up(ino, attr.kind() == Kind::Dir);
                let (ttl, attr_ttl) = (fs.as_kernel_can(ttl), attr_ttl(&attr));
                fs.inodes.told(ino, ttl, attr_ttl);
                let generation = Generation(attr.generation);
                if !self.send(|reply| reply.entry_with_ttls(&attr_ttl, &ttl, &shown, generation)) {
                    fs.inodes.forget(ino, 1);
                }
            }
            Err(error) => self.fail(&error),
        }
    }

    /// Tells that there is nothing of that name, and how long that may be believed.
    pub fn absent(&self, ttl: &Duration) {
        let nothing = FileAttr {
            ino: fuser::INodeNo(0),
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: fuser::FileType::RegularFile,
            perm: 0,
            nlink: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 0,
            flags: 0,
        };
        self.send(|reply| reply.entry(ttl, &nothing, Generation(0)));
    }
}

impl Answer<ReplyAttr> {
    pub fn attr(&self, fs: &Shared, attr: &Attr) {
        match fs.shown(attr) {
            Ok(shown) => {
                let ttl = fs.ttl(attr);
                self.send(|reply| reply.attr(&ttl, &shown));
            }
            Err(error) => self.fail(&error),
        }
    }
}

impl Shared {
    /// Carries out a request. What needs no waiting is done before this returns; the rest goes on by itself.
    pub fn serve<R: Refuse, W: Future<Output = ()> + Send + 'static>(
        self: &Arc<Self>,
        request: &Request,
        reply: R,
        patience: Patience,
        work: impl FnOnce(Arc<Self>, Answer<R>) -> W,
    ) {
        let slot = Slot::new(reply);
        let interrupt = Arc::clone(&slot) as Arc<dyn Interrupt>;
        let _runtime = self.runtime.enter();
        let mut work = Box::pin(work(Arc::clone(self), Answer(slot)));
        // The waker may do nothing: whatever would wake is asked again as soon as the runtime polls it.
        let mut nobody = Context::from_waker(Waker::noop());
        let first = std::panic::catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(&mut nobody)));
        match first {
            Ok(Poll::Ready(())) => {}
            Ok(Poll::Pending) => {
                let guard = self.registry.add(request.unique().0, request.pid(), patience, interrupt);
                self.runtime.spawn(async move {
                    let _guard = guard;
                    work.await;
                });
            }
            // The panic hook has logged it. The thread must live: it is half of the mount. The reply, dropped, is EIO.
            Err(_) => drop(work),
        }
    }

    /// How long the kernel may believe attributes that the client gave: as long as it does itself, if it still does.
    pub fn ttl(&self, attr: &Attr) -> Duration {
        let known = self.client.cached_attr(InodeNo(attr.ino));
        known.filter(|(now, _)| now.version == attr.version).map_or(Duration::ZERO, |(_, left)| left)
    }

    /// Attributes for the kernel.
    pub fn shown(&self, attr: &Attr) -> FsResult<FileAttr> {
        file_attr(attr, self.inodes.node(InodeNo(attr.ino))?)
    }
}

/// A number of the kernel's that names no open file.
pub fn bad_handle() -> FsError {
    FsError::new(ErrorCode::ErrorStale, "no such open file")
}
