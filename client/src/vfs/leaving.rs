//! Giving leases up: what was kept under them is committed, what was cached is dropped, here and in the kernel; then the
//! master is told. And taking write leases.

use super::{Client, Inner, own_cred, unexpected};
use crate::leases::{Kind, Term};
use crate::session::{Leaving, Wanted};
use dfs_env::defect::{self, Defect};
use dfs_proto::v1::{self, ErrorCode, LeaseKind, answer, hold};
use dfs_proto::{FsError, FsResult, InodeNo};
use futures::StreamExt;
use futures::future::BoxFuture;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::mpsc;

/// How often it is looked whether the master has been silent for so long that leases do not count any more.
const TICK: Duration = Duration::from_millis(500);

/// How long a lease that does not count yet is waited for at a time.
const UNCONFIRMED: Duration = Duration::from_millis(20);

/// How often it is tried to commit what is kept of a file that somebody else wants.
const FLUSHES: usize = 3;

/// How long what the kernel wrote back under a read lease holds others up. It takes a few milliseconds, unless the one that
/// waits for it truncates the file: then his kernel writes nothing back of it, and he cannot make way either.
const WRITE_BACK: Duration = Duration::from_millis(200);

/// How long the answer to a commit may be on its way when the master asks about the file. It is sent before the question.
const HEAR_OF: Duration = Duration::from_millis(500);

/// Inodes whose pages are dropped side by side when the master is silent.
const SIDE_BY_SIDE: usize = 64;

/// Whoever keeps caches of its own behind this client: the kernel.
pub trait Kernel: Send + Sync + 'static {
    /// Drops what is cached of an inode: its attributes, a file's bytes, a directory's names. Returns when nothing of it is
    /// believed any more.
    fn forget(&self, ino: InodeNo) -> BoxFuture<'static, ()>;
}

impl Client {
    /// From now on the kernel's caches live and die with this client's leases.
    pub fn serve_kernel(&self, kernel: Arc<dyn Kernel>) {
        // A second time cannot be: one mount a client.
        let _ = self.inner.kernel.set(kernel);
    }
}

/// Gives up leases and answers questions as long as the client lives.
pub(super) async fn run(inner: Weak<Inner>, mut wanted: mpsc::UnboundedReceiver<Wanted>) {
    let mut believed = true;
    loop {
        let next = tokio::select! {
            next = wanted.recv() => next,
            () = tokio::time::sleep(TICK) => {
                let Some(inner) = inner.upgrade() else { return };
                let believes = !inner.session.leases().left().is_zero();
                if believed && !believes {
                    inner.drop_pages_of_all();
                }
                believed = believes;
                continue;
            }
        };
        let (Some(next), Some(inner)) = (next, inner.upgrade()) else { return };
        tokio::spawn(async move {
            match next {
                Wanted::Leave(leaving) => inner.leave(leaving).await,
                Wanted::Tell(ask) => {
                    let ino = InodeNo(ask.ino);
                    // If it is not told in time, he who asked sees by the version that this is from before.
                    let heard = inner.cache.knows(ino, ask.version);
                    let _in_time = tokio::time::timeout(HEAR_OF, heard).await;
                    let attr = inner.attr_as_kept(ino).await;
                    inner.session.tell(ask.ask, attr);
                }
            }
        });
    }
}

impl Inner {
    async fn leave(&self, leaving: Leaving) {
        let (Leaving { ino, held, keep }, leases) = (leaving, self.session.leases());
        let held = leases.depart(ino).await.unwrap_or(held);
        if defect::has(Defect::LateInvalidation) {
            tokio::time::sleep(TICK / 10).await;
            return self.session.leases().forget(ino);
        }
        // Pages first: what programs changed in shared mappings comes back, and is kept, and committed before others go on. No
        // other bytes are kept from the moment of the recall on.
        if keep.is_none()
            && let Some(kernel) = self.kernel.get()
        {
            let forgotten = kernel.forget(ino);
            if self.cache.is_changing(ino) {
                // A truncate of our own: until its answer the kernel writes nothing back of the file, and the answer may wait for
                // this lease.
                let _late = tokio::time::timeout(WRITE_BACK, tokio::spawn(forgotten)).await;
            } else {
                forgotten.await;
            }
        }
        let flushes = if held == Kind::Write { FLUSHES } else { 1 };
        for _ in 0..flushes {
            match held {
                Kind::Write => self.flush_for_good(ino).await,
                Kind::Read => self.flush_for_a_while(ino).await,
            }
            if keep.is_none() {
                self.data.forget_layout(ino);
            }
            if let Some(version) = leases.lost_at(ino).filter(|_| self.data.dirty(ino).is_none()) {
                leases.settle_lost(ino, version);
            }
            if self.session.give_back(ino, keep, || self.data.dirty(ino).is_none()).is_ok() {
                return;
            }
        }
        // What is left of shared mappings is committed later, as if it had been written then.
        let _clean_enough = self.session.give_back(ino, keep, || true);
    }

    /// Commits what the kernel wrote back under a read lease, but holds others up for a while at most.
    async fn flush_for_a_while(&self, ino: InodeNo) {
        if self.data.dirty(ino).is_none() {
            return;
        }
        self.session.flush_first(ino);
        match tokio::time::timeout(WRITE_BACK, self.data.flush(ino)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => self.data.keep_error(ino, error),
            Err(_) => tracing::debug!(%ino, "bytes of a shared mapping are committed after others went on"),
        }
    }

    /// Commits what is kept of an inode. What cannot be committed is dropped, and told to whoever wrote it: from here on it
    /// would come over what somebody else writes.
    async fn flush_for_good(&self, ino: InodeNo) {
        let mut told = Ok(());
        let mut flushed = false;
        for _ in 0..FLUSHES {
            if flushed || self.data.dirty(ino).is_none() {
                break;
            }
            // An error of an earlier flush comes first; the bytes may still be there.
            let result = self.data.flush(ino).await;
            flushed = result.is_ok();
            told = told.and(result.map(drop));
        }
        // What has come since a flush that went well is not what this was about.
        if !flushed && self.data.dirty(ino).is_some() {
            tracing::error!(%ino, ?told, "bytes could not be written when somebody else wanted the file: they are lost");
            self.data.discard(ino);
            let text = "written bytes were lost: somebody else wanted the file";
            told = told.and(Err(FsError::new(ErrorCode::ErrorIo, text)));
        }
        if let Err(error) = told {
            self.data.keep_error(ino, error);
        }
    }

    /// The attributes of a file as this client's programs see them, if changes of it are kept here.
    async fn attr_as_kept(&self, ino: InodeNo) -> Option<v1::Attr> {
        let leases = self.session.leases();
        let term = leases.term(ino)?;
        let attr = self.attr_now(ino).await.ok()?;
        // Not if it ended meanwhile: somebody else may have changed it since.
        leases.is_current(ino, term).then_some(attr)
    }

    /// An inode is gone, or will be when others close it: what is known of it is of no use any more.
    pub(super) fn surrender(&self, ino: InodeNo) {
        if self.session.leases().surrender(ino) {
            self.data.forget_layout(ino);
            let _always_clean = self.session.give_back(ino, None, || true);
        }
    }

    /// Bytes that were kept under a lease which was lost with its session are committed, or dropped, before anybody sees them
    /// or adds to them.
    pub(super) async fn settle_lost(&self, ino: InodeNo) {
        let leases = self.session.leases();
        let Some(version) = leases.lost_at(ino) else { return };
        self.flush_for_good(ino).await;
        leases.settle_lost(ino, version);
    }

    /// Nothing was heard of the master for so long that it may have given the session up: pages in the kernel, which live
    /// without a time-out, are not to be read any more.
    fn drop_pages_of_all(&self) {
        let Some(kernel) = self.kernel.get().map(Arc::clone) else { return };
        tracing::warn!("no word of the master for too long: nothing cached is believed until there is");
        let all = futures::stream::iter(self.session.leases().all());
        tokio::spawn(async move {
            all.for_each_concurrent(SIDE_BY_SIDE, |ino| kernel.forget(ino)).await;
        });
    }

    /// Gets a read lease, if the inode is not leased yet: first with its attributes, then in its turn. None: there was an error,
    /// or somebody else wanted it at once.
    pub(super) async fn take_read_lease(&self, ino: InodeNo) -> Option<Term> {
        let leases = self.session.leases();
        if let Some(term) = leases.term(ino) {
            return Some(term);
        }
        self.attr_now(ino).await.ok()?;
        if let Some(term) = leases.term(ino) {
            return Some(term);
        }
        self.take_lease(ino, LeaseKind::LeaseRead).await.ok()?;
        leases.term(ino)
    }

    async fn take_lease(&self, ino: InodeNo, kind: LeaseKind) -> FsResult<()> {
        let ticket = self.cache.ticket();
        let take = v1::TakeLease { ino: ino.get(), kind: kind.into() };
        let heard = self.session.get(&own_cred(), hold::Op::TakeLease(take)).await;
        match heard.result? {
            answer::Body::Leased(leased) => {
                if let Some(attr) = &leased.attr {
                    self.cache.put_attr(&ticket.at(heard.seen), attr);
                }
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Gets a write lease. It may be wanted elsewhere again before it is of use: whoever needs it looks, and comes again.
    pub(super) async fn take_write_lease(&self, ino: InodeNo) -> FsResult<()> {
        let leases = self.session.leases();
        if leases.writing(ino, None, || ()).is_some() {
            return Ok(());
        }
        self.take_lease(ino, LeaseKind::LeaseWrite).await?;
        if leases.left().is_zero() {
            // Nothing counts before the next keep-alive is answered.
            tokio::time::sleep(UNCONFIRMED).await;
        }
        Ok(())
    }
}
