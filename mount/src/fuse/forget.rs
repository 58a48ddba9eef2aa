//! The kernel's caches live and die with the client's leases: what happens here before a lease is given back.
//!
//! * names: one epoch for all of them, which takes no lock. (Dropping single names takes the lock of their directory, which
//!   the kernel holds during our own creates: two clients would wait for each other.)
//! * attributes: at once. An inode that is on its way to the kernel for the first time is not known there yet; it is told
//!   again until it is, or is forgotten.
//!   A file's names are forgotten with its attributes: looking them up brings the owner, by whom the kernel decides who may
//!   change or remove it.
//! * pages: the kernel waits for reads of them under way, and for writes of a part of a page. Both may wait for the very
//!   client that waits for us: such pages, which nobody can read until the answer, are left out. A write drops its page
//!   after its answer; a read that was left out begins again, under a lease of its own, and so brings nothing old.

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
pub const LISTING: Duration = Duration::from_millis(20);
/// How long dropping pages may take before it is looked which requests hold it up.
const HELD_UP: Duration = Duration::from_millis(50);
/// How long a kernel without epochs believes a name.
pub const NAME_TTL: Duration = Duration::from_secs(1);

/// A request that is not answered yet.
struct Waiting {
    id: u64,
    range: Range<u64>,
    /// Of a read: it was left out when pages were dropped. None: it is a write.
    left_out: Option<bool>,
}

impl Waiting {
    /// The pages that the kernel holds locked for it: of a read all, of a write the last one if it writes a part of it.
    fn pages(&self) -> Range<u64> {
        let (first, end) = (self.range.start / PAGE, self.range.end.div_ceil(PAGE));
        match self.left_out {
            Some(_) => first..end,
            None if self.range.end.is_multiple_of(PAGE) => end..end,
            None => end - 1..end,
        }
    }
}

/// Reads and writes that wait for something, by inode.
#[derive(Default)]
pub struct Requests(Mutex<HashMap<InodeNo, Vec<Waiting>>>);

impl Requests {
    fn lock(&self) -> MutexGuard<'_, HashMap<InodeNo, Vec<Waiting>>> {
        // Every change is a single step: a poisoned map is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write begins to wait; `id` is its request's number.
    pub fn begin_write(&self, ino: InodeNo, id: u64, range: Range<u64>) {
        self.lock().entry(ino).or_default().push(Waiting { id, range, left_out: None });
    }

    /// A read begins.
    pub fn begin_read(&self, ino: InodeNo, id: u64, range: Range<u64>) {
        self.lock().entry(ino).or_default().push(Waiting { id, range, left_out: Some(false) });
    }

    /// A request is about to be answered, or will never be.
    pub fn end(&self, ino: InodeNo, id: u64) {
        Self::remove(&mut self.lock(), ino, id);
    }

    /// A read has its bytes. True: they are `good`, and it is about to be answered; from here on whoever drops pages waits for
    /// the answer. False: it is to begin again.
    pub fn end_read_if(&self, ino: InodeNo, id: u64, good: impl FnOnce() -> bool) -> bool {
        let mut requests = self.lock();
        let mut all = requests.get_mut(&ino).into_iter().flatten();
        let left_out = all.find(|other| other.id == id).and_then(|read| read.left_out.as_mut());
        if left_out.is_some_and(std::mem::take) || !good() {
            return false;
        }
        Self::remove(&mut requests, ino, id);
        true
    }

    fn remove(requests: &mut HashMap<InodeNo, Vec<Waiting>>, ino: InodeNo, id: u64) {
        if let Some(waiting) = requests.get_mut(&ino) {
            waiting.retain(|other| other.id != id);
            if waiting.is_empty() {
                requests.remove(&ino);
            }
        }
    }

    /// The pages that the kernel may hold locked for requests of an inode, to be left out; in order, apart from each other.
    fn leave_out(&self, ino: InodeNo) -> Vec<Range<u64>> {
        let mut requests = self.lock();
        let all = requests.get_mut(&ino).into_iter().flatten();
        let mut pages: Vec<Range<u64>> = all
            .map(|request| {
                request.left_out = request.left_out.map(|_| true);
                request.pages()
            })
            .filter(|pages| !pages.is_empty())
            .collect();
        pages.sort_unstable_by_key(|pages| (pages.start, pages.end));
        let mut apart: Vec<Range<u64>> = Vec::with_capacity(pages.len());
        for next in pages {
            match apart.last_mut() {
                Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
                _ => apart.push(next),
            }
        }
        apart
    }
}

/// The ranges of a file without these pages, each as offset and length; length 0: to the end.
fn without(pages: &[Range<u64>]) -> Vec<(u64, u64)> {
    let (mut ranges, mut at) = (Vec::new(), 0);
    for pages in pages {
        if pages.start > at {
            ranges.push((at * PAGE, (pages.start - at) * PAGE));
        }
        at = pages.end;
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
        self.inodes.attr_dropped(ino);
        while self.told(kernel.forget_attr(node)) == Some(Told::Unknown) {
            if self.inodes.known(ino).is_none() || began.elapsed() > ON_ITS_WAY {
                break;
            }
            tokio::time::sleep(PAUSE).await;
        }
        if known.is_dir {
            self.forget_names(kernel, ino).await;
        } else if kernel.epochs && self.inodes.is_named(ino) {
            // Who may change or remove a file the kernel decides by the owner that it has, without asking again as long as it
            // believes the name.
            self.inodes.names_dropped();
            self.told(kernel.forget_names().map(|()| Told::Done));
        }
        let listed = known.is_dir && self.listings.dropped(ino);
        if known.has_pages || listed {
            self.inodes.pages_dropped(ino);
            self.forget_pages(ino, node).await;
        }
    }

    async fn forget_names(&self, kernel: &Kernel, dir: InodeNo) {
        let listed = self.dirs.latest(|handle| handle.listed(dir));
        if let Some(left) = listed.and_then(|at| LISTING.checked_sub(at.elapsed())) {
            tokio::time::sleep(left).await;
        }
        self.inodes.names_dropped();
        if kernel.epochs {
            self.told(kernel.forget_names().map(|()| Told::Done));
        } else {
            tokio::time::sleep(NAME_TTL + NAME_TTL / 10).await;
        }
    }

    async fn forget_pages(self: &Arc<Self>, ino: InodeNo, node: fuser::INodeNo) {
        loop {
            let left_out = self.requests.leave_out(ino);
            let (fs, ranges) = (Arc::clone(self), without(&left_out));
            let mut pass = tokio::task::spawn_blocking(move || {
                let Some(kernel) = fs.kernel.get() else { return };
                for (offset, length) in ranges {
                    fs.told(kernel.forget_pages(node, offset, length));
                }
            });
            loop {
                match tokio::time::timeout(HELD_UP, &mut pass).await {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => return tracing::warn!(%ino, %error, "dropping pages did not end"),
                    // A request that began since may hold it up. The thread ends with that, and has done no harm.
                    Err(_) if self.requests.leave_out(ino) != left_out => break,
                    Err(_) => {}
                }
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
    fn pages_of_requests_that_wait_are_left_out() {
        let (requests, ino) = (Requests::default(), InodeNo(3));
        assert_eq!(without(&requests.leave_out(ino)), [(0, 0)]);
        requests.begin_write(ino, 1, 100..200);
        requests.begin_write(ino, 2, 0..2 * PAGE);
        requests.begin_write(ino, 3, PAGE..3 * PAGE + 1);
        assert_eq!(requests.leave_out(ino), [0..1, 3..4]);
        assert_eq!(without(&[0..1, 3..4]), [(PAGE, 2 * PAGE), (4 * PAGE, 0)]);
        requests.begin_read(ino, 4, 3 * PAGE..10 * PAGE);
        assert_eq!(requests.leave_out(ino), [0..1, 3..10]);
        for id in 1..=4 {
            requests.end(ino, id);
        }
        assert!(requests.lock().is_empty());
    }

    #[test]
    fn a_read_that_was_left_out_begins_again() {
        let (requests, ino) = (Requests::default(), InodeNo(3));
        requests.begin_read(ino, 1, 0..PAGE);
        assert!(!requests.end_read_if(ino, 1, || false), "its lease has ended");
        requests.leave_out(ino);
        assert!(!requests.end_read_if(ino, 1, || true), "what it has may be old");
        assert!(requests.end_read_if(ino, 1, || true));
        assert!(requests.leave_out(ino).is_empty(), "whoever drops pages now waits for its answer");
    }
}
