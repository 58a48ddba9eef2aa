//! Has changes made at the master, and sees to it that nobody here believes meanwhile what was before them.

use super::Inner;
use crate::cache::{Cache, Ticket, Touched};
use dfs_proto::v1::{Cred, answer, mutation};
use dfs_proto::{FsResult, InodeNo};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

/// How long a change may take before the kernel is told not to believe what it has of what is changed.
const UNANSWERED: Duration = Duration::from_millis(20);

/// A change that was made, or that nobody knows of whether it was. What it touches is believed again when this is dropped:
/// after its answer was learned.
pub(super) struct Underway {
    cache: Arc<Cache>,
    doubt: u64,
    answered: bool,
    /// Under which its answer may be kept.
    pub ticket: Ticket,
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.cache.changed_or_not(self.doubt, self.answered);
    }
}

impl Inner {
    /// Has a change made.
    pub(super) async fn change(
        &self,
        cred: &Cred,
        change: mutation::Op,
        touched: Touched,
    ) -> (Underway, FsResult<answer::Body>) {
        let (cache, ticket) = (Arc::clone(&self.cache), self.cache.ticket());
        let inos = touched.inos.clone();
        let mut underway = Underway { doubt: cache.changing(touched), cache, answered: false, ticket };
        let mut heard = pin!(self.session.change(cred, change));
        let heard = match tokio::time::timeout(UNANSWERED, heard.as_mut()).await {
            Ok(heard) => heard,
            Err(_) => {
                self.doubt_in_kernel(inos);
                heard.await
            }
        };
        underway.answered = heard.answered;
        underway.ticket = ticket.at(heard.seen);
        (underway, heard.result)
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
