//! The kernel's caches live and die with the client's leases: what happens here before a lease is given back.
//!
//! * names: one epoch for all of them, which takes no lock. (Dropping single names takes the lock of their directory, which
//!   the kernel holds during our own creates: two clients would wait for each other.)
//! * attributes: at once. An inode that is on its way to the kernel for the first time is not known there yet; it is told
//!   again until it is, or is forgotten.
//! * pages: the kernel waits for reads of them under way, which end by themselves, and for writes of a part of a page. Such
//!   a write may wait for the very client that waits for us: its page, which nobody can read until then, is dropped after
//!   its answer, all others before.

use super::state::Shared;
use crate::kernel::{Kernel, Told};
use dfs_proto::InodeNo;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// How long an inode may be on its way to the kernel.
const ON_ITS_WAY: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_micros(200);
/// The kernel takes in a listing after it was answered, and gives its names the epoch of then.
const LISTING: Duration = Duration::from_millis(20);
/// How long dropping pages may take before it is looked which writes hold it up.
const HELD_UP: Duration = Duration::from_millis(50);
/// How long a kernel without epochs believes a name.
pub const NAME_TTL: Duration = Duration::from_secs(1);

/// By inode: the request's number and its range.
type Waiting = HashMap<InodeNo, Vec<(u64, Range<u64>)>>;

/// Writes that wait for something.
#[derive(Default)]
pub struct Writes(Mutex<Waiting>);

impl Writes {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Every change is a single step: a poisoned map is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write begins to wait; `id` is its request's number.
    pub fn begin(&self, ino: InodeNo, id: u64, range: Range<u64>) {
        self.lock().entry(ino).or_default().push((id, range));
    }

    pub fn end(&self, ino: InodeNo, id: u64) {
        let mut writes = self.lock();
        if let Some(waiting) = writes.get_mut(&ino) {
            waiting.retain(|(other, _)| *other != id);
            if waiting.is_empty() {
                writes.remove(&ino);
            }
        }
    }

    /// The pages that the kernel may hold locked for writes of an inode: the last one of each that it writes a part of.
    fn locked_pages(&self, ino: InodeNo) -> Vec<u64> {
        let writes = self.lock();
        let ends = writes.get(&ino).into_iter().flatten().map(|(_, range)| range.end);
        let mut pages: Vec<u64> = ends.filter(|end| end % PAGE != 0).map(|end| end / PAGE).collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }
}

/// The ranges of a file without these pages, each as offset and length; length 0: to the end.
fn without(pages: &[u64]) -> Vec<(u64, u64)> {
    let (mut ranges, mut at) = (Vec::new(), 0);
    for page in pages {
        if *page > at {
            ranges.push((at * PAGE, (page - at) * PAGE));
        }
        at = page + 1;
    }
    ranges.push((at * PAGE, 0));
    ranges
}

/// Drops what the kernel has cached, as the client asks for it.
pub struct Forgetter(pub Weak<Shared>);

impl dfs_client::Kernel for Forgetter {
    fn forget(&self, ino: InodeNo) -> BoxFuture<'static, ()> {
        let fs = self.0.upgrade();
        async move {
            if let Some(fs) = fs {
                fs.forget(ino).await;
            }
        }
        .boxed()
    }
}

impl Shared {
    async fn forget(self: &Arc<Self>, ino: InodeNo) {
        let (Some(kernel), Ok(node)) = (self.kernel.get(), self.inodes.node(ino)) else { return };
        let Some(known) = self.inodes.known(ino) else { return };
        let began = Instant::now();
        while self.told(kernel.forget_attr(node)) == Some(Told::Unknown) {
            if self.inodes.known(ino).is_none() || began.elapsed() > ON_ITS_WAY {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        if known.is_dir {
            self.forget_names(kernel, ino).await;
        } else if known.has_pages {
            self.inodes.pages_dropped(ino);
            self.forget_pages(ino, node).await;
        }
    }

    async fn forget_names(&self, kernel: &Kernel, dir: InodeNo) {
        let listed = self.dirs.latest(|handle| handle.listed(dir));
        if let Some(left) = listed.and_then(|at| LISTING.checked_sub(at.elapsed())) {
            tokio::time::sleep(left).await;
        }
        if kernel.epochs {
            self.told(kernel.forget_names().map(|()| Told::Done));
        } else {
            tokio::time::sleep(NAME_TTL + NAME_TTL / 10).await;
        }
    }

    async fn forget_pages(self: &Arc<Self>, ino: InodeNo, node: fuser::INodeNo) {
        loop {
            let skipped = self.writes.locked_pages(ino);
            let fs = Arc::clone(self);
            // A thread that is held up ends with what holds it up, and has done no harm.
            let pass = tokio::task::spawn_blocking(move || {
                let Some(kernel) = fs.kernel.get() else { return };
                for (offset, length) in without(&skipped) {
                    fs.told(kernel.forget_pages(node, offset, length));
                }
            });
            match tokio::time::timeout(HELD_UP, pass).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => return tracing::warn!(%ino, %error, "dropping pages did not end"),
                // A read that takes its time, or a write that began to wait since.
                Err(_) => {}
            }
        }
    }

    /// Drops the kernel's pages of a range (length 0: to the end), on a thread of its own.
    pub async fn drop_pages(self: &Arc<Self>, node: fuser::INodeNo, offset: u64, length: u64) {
        let fs = Arc::clone(self);
        let dropped = tokio::task::spawn_blocking(move || {
            if let Some(kernel) = fs.kernel.get() {
                fs.told(kernel.forget_pages(node, offset, length));
            }
        });
        if let Err(error) = dropped.await {
            tracing::warn!(%node, %error, "dropping pages did not end");
        }
    }

    fn told(&self, answer: std::io::Result<Told>) -> Option<Told> {
        match answer {
            Ok(told) => Some(told),
            // The mount is gone, and its caches with it.
            Err(error) => {
                tracing::debug!(%error, "the kernel was told in vain");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_writes_that_wait_are_left_out() {
        let (writes, ino) = (Writes::default(), InodeNo(3));
        assert_eq!(without(&writes.locked_pages(ino)), [(0, 0)]);
        writes.begin(ino, 1, 100..200);
        writes.begin(ino, 2, 0..2 * PAGE);
        writes.begin(ino, 3, PAGE..3 * PAGE + 1);
        assert_eq!(writes.locked_pages(ino), [0, 3]);
        assert_eq!(without(&[0, 3]), [(PAGE, 2 * PAGE), (4 * PAGE, 0)]);
        for id in 1..=3 {
            writes.end(ino, id);
        }
        assert!(writes.lock().is_empty());
    }
}
