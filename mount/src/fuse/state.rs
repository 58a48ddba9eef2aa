//! What every request may need, and what the requests have in common.

use super::answer::Caller;
use super::convert::{lock_end, lock_type};
use super::dirs::Dir;
use super::files::File;
use super::forget::{Forgetter, NAME_TTL, Requests};
use super::handles::Handles;
use crate::inodes::Inodes;
use crate::kernel::Kernel;
use crate::killable::{Patience, Registry};
use crate::listings::Listings;
use crate::procfs;
use dfs_client::Client;
use dfs_proto::{FsResult, InodeNo, v1};
use fuser::{InitFlags, KernelConfig, LockOwner, ReplyEmpty, ReplyEntry, Request};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::Handle;

/// The longest write and read of one request, in bytes.
const REQUEST_MAX: u32 = 1 << 20;
/// How many readahead and write-back requests may be under way; beyond three quarters the kernel holds back.
const BACKGROUND_MAX: u16 = 128;

/// What is asked of the kernel, each as far as it offers it. Never: WRITEBACK_CACHE (the kernel would trust its own
/// sizes), SETXATTR_EXT (the FUSE library panics), OVER_IO_URING.
const WANTED: [InitFlags; 15] = [
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_POSIX_LOCKS,
    InitFlags::FUSE_FLOCK_LOCKS,
    InitFlags::FUSE_ATOMIC_O_TRUNC,
    InitFlags::FUSE_EXPORT_SUPPORT,
    InitFlags::FUSE_BIG_WRITES,
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
];

/// What every request may need.
pub struct Shared {
    pub client: Client,
    pub inodes: Inodes,
    pub files: Handles<File>,
    pub dirs: Handles<Dir>,
    pub listings: Listings,
    pub registry: Arc<Registry>,
    pub runtime: Handle,
    /// Whether this kernel keeps SELinux labels.
    pub labels: bool,
    /// Writes that wait for something.
    pub requests: Requests,
    /// Set once the mount is there.
    pub kernel: OnceLock<Kernel>,
}

/// The file system as the FUSE library sees it.
pub struct Dfs(pub Arc<Shared>);

impl Dfs {
    /// Serves `client`'s files with `root` as the root.
    #[must_use]
    pub fn new(client: Client, root: InodeNo, registry: Arc<Registry>, runtime: Handle) -> Self {
        Self(Arc::new(Shared {
            client,
            inodes: Inodes::new(root),
            files: Handles::default(),
            dirs: Handles::default(),
            listings: Listings::default(),
            registry,
            runtime,
            labels: procfs::has_selinux(),
            requests: Requests::default(),
            kernel: OnceLock::new(),
        }))
    }

    /// What to tell of the kernel once it is there.
    #[must_use]
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.0)
    }

    pub fn inode(&self, node: fuser::INodeNo) -> InodeNo {
        self.0.inodes.inode(node)
    }

    /// An operation on behalf of somebody that answers with nothing.
    pub fn change<W: Future<Output = FsResult<()>> + Send>(
        &self,
        request: &Request,
        reply: ReplyEmpty,
        change: impl FnOnce(Arc<Shared>, Caller) -> W + Send + 'static,
    ) {
        let caller = Caller::of(request);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            answer.empty(change(fs, caller).await);
        });
    }

    /// Makes an inode that is not opened.
    pub fn make(&self, request: &Request, what: FsResult<v1::Create>, reply: ReplyEntry) {
        let caller = Caller::of(request);
        self.0.serve(request, reply, Patience::Killed, move |fs, answer| async move {
            let what = match what {
                Ok(what) => what,
                Err(error) => return answer.fail(&error),
            };
            let (parent, name) = (InodeNo(what.parent), what.name.clone());
            let made = fs.client.create(&caller.cred(), what).await.map(|made| made.attr);
            let ttl = fs.name_ttl(parent, &name);
            answer.entry(&fs, made, ttl);
        });
    }

    pub fn lock(&self, owner: LockOwner, range: (u64, u64), typ: i32, pid: u32) -> Option<v1::Lock> {
        Some(v1::Lock {
            owner: owner.0,
            start: range.0,
            end: lock_end(range.1),
            r#type: lock_type(typ)?.into(),
            pid,
            ..v1::Lock::default()
        })
    }
}

impl Shared {
    /// Takes the means to tell the kernel something.
    pub fn mounted(self: &Arc<Self>, kernel: Kernel) {
        // A second time cannot be: one mount a process.
        let _ = self.kernel.set(kernel);
        self.client.serve_kernel(Arc::new(Forgetter(Arc::downgrade(self))));
    }

    /// How long the kernel may believe what a name stands for.
    pub fn name_ttl(&self, parent: InodeNo, name: &[u8]) -> Duration {
        self.as_kernel_can(self.client.name_left(parent, name))
    }

    /// A kernel that cannot be told to forget names believes them for a moment only.
    pub fn as_kernel_can(&self, ttl: Duration) -> Duration {
        if self.kernel.get().is_some_and(|kernel| kernel.epochs) { ttl } else { ttl.min(NAME_TTL) }
    }
}

/// Tells the kernel how this file system works, as far as the kernel offers it.
pub fn ask_kernel(config: &mut KernelConfig) {
    for flag in WANTED {
        if config.add_capabilities(flag).is_err() {
            tracing::info!(?flag, "this kernel does not offer it");
        }
    }
    // Each answers an error with the nearest value that will do, and that is taken.
    if let Err(most) = config.set_max_write(REQUEST_MAX) {
        let _ = config.set_max_write(most);
    }
    if let Err(most) = config.set_max_readahead(REQUEST_MAX) {
        let _ = config.set_max_readahead(most);
    }
    let _ = config.set_max_background(BACKGROUND_MAX);
    let _ = config.set_congestion_threshold(BACKGROUND_MAX / 4 * 3);
}
