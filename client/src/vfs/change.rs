//! Has changes made at the master, and sees to it that nobody here believes meanwhile what was before them.

use super::Inner;
use crate::cache::{Ticket, Touched, Underway};
use dfs_proto::v1::{Cred, answer, mutation};
use dfs_proto::{FsResult, InodeNo};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

/// How long a change may take before the kernel is told not to believe what it has of what is changed: longer than one takes
/// on a disk that is slow to sync.
const UNANSWERED: Duration = Duration::from_millis(100);

/// A change that was made, or that nobody knows of whether it was.
pub(super) struct Made {
    _underway: Underway,
    /// Under which its answer may be kept.
    pub ticket: Ticket,
}

impl Inner {
    /// Has a change made. What it touches is believed again when the first of the pair is dropped: after the answer was
    /// learned.
    pub(super) async fn change(
        &self,
        cred: &Cred,
        change: mutation::Op,
        touched: Touched,
    ) -> (Made, FsResult<answer::Body>) {
        let (ticket, inos) = (self.cache.ticket(), touched.inos.clone());
        let mut underway = Underway::begin(&self.cache, touched);
        let mut heard = pin!(self.session.change(cred, change));
        let heard = match tokio::time::timeout(UNANSWERED, heard.as_mut()).await {
            Ok(heard) => heard,
            Err(_) => {
                self.doubt_in_kernel(inos);
                heard.await
            }
        };
        underway.answered = heard.answered;
        (Made { _underway: underway, ticket: ticket.at(heard.seen) }, heard.result)
    }

    fn doubt_in_kernel(&self, inos: Vec<InodeNo>) {
        let Some(kernel) = self.kernel.get().map(Arc::clone) else { return };
        // It may wait for the very request whose change this is.
        tokio::spawn(async move {
            for ino in inos {
                kernel.forget(ino).await;
            }
        });
    }
}
