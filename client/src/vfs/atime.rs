//! Access times: relatime (mount(8)), sent lazily and many at a time. They recall nobody and advance no version.

use super::{Inner, own_cred};
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, Attr, Timestamp, mutation};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A read moves the access time at least this often, in seconds.
const DAY: i64 = 86_400;
/// The most inodes whose access time waits; beyond, reads leave it alone until the next batch has gone.
const WAITING_MAX: usize = 16_384;
/// The most in one message.
const BATCH_MAX: usize = 1024;

/// Access times that the master does not know of yet.
#[derive(Default)]
pub(super) struct Atimes {
    waiting: Mutex<BTreeMap<InodeNo, Timestamp>>,
}

impl Atimes {
    pub fn pending(&self, ino: InodeNo) -> Option<Timestamp> {
        self.lock().get(&ino).copied()
    }

    /// Somebody sets the access time himself.
    pub fn forget(&self, ino: InodeNo) {
        self.lock().remove(&ino);
    }

    fn add(&self, ino: InodeNo, now: Timestamp) {
        let mut waiting = self.lock();
        if waiting.len() < WAITING_MAX || waiting.contains_key(&ino) {
            waiting.insert(ino, now);
        }
    }

    fn all(&self) -> Vec<(InodeNo, Timestamp)> {
        self.lock().iter().map(|(ino, atime)| (*ino, *atime)).collect()
    }

    /// It was sent; a later one stays.
    fn sent(&self, ino: InodeNo, atime: Timestamp) {
        let mut waiting = self.lock();
        if waiting.get(&ino) == Some(&atime) {
            waiting.remove(&ino);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<InodeNo, Timestamp>> {
        // Every change is a single step: a poisoned map is whole.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a read at `now` moves the access time: it is not later than the last change, or a day old.
fn moves(attr: &Attr, now: Timestamp) -> bool {
    let Some(atime) = attr.atime else { return true };
    let before = |time: Option<Timestamp>| time.is_some_and(|time| atime.key() <= time.key());
    before(attr.mtime) || before(attr.ctime) || now.seconds.saturating_sub(atime.seconds) >= DAY
}

impl Inner {
    /// Notes that an inode was read; `attr` with what is pending in it.
    pub fn accessed(&self, attr: &Attr) {
        if self.config.noatime {
            return;
        }
        let now = self.master.now();
        if moves(attr, now) {
            self.atimes.add(InodeNo(attr.ino), now);
        }
    }

    /// Sends what waits. Access times are a courtesy: those of a message that fails are lost, and that is logged.
    pub async fn send_touches(&self) {
        for batch in self.atimes.all().chunks(BATCH_MAX) {
            let item =
                |(ino, atime): &(InodeNo, Timestamp)| v1::TouchItem { ino: ino.get(), atime: Some(*atime) };
            let touch = mutation::Op::Touch(v1::Touch { items: batch.iter().map(item).collect() });
            let answer = self.master.mutate(&own_cred(), touch).await;
            if let Err(error) = &answer {
                tracing::debug!(%error, "access times were not kept");
            }
            for (ino, atime) in batch {
                // In this order: a reader in between must not see the old time and note a new one.
                if answer.is_ok() && self.atimes.pending(*ino) == Some(*atime) {
                    self.cache.accessed(*ino, *atime);
                }
                self.atimes.sent(*ino, *atime);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Option<Timestamp> {
        Some(Timestamp { seconds, nanos: 0 })
    }

    #[test]
    fn relatime_moves_after_a_change_or_a_day() {
        let attr = |atime, mtime, ctime| Attr { atime, mtime, ctime, ..Attr::default() };
        let now = Timestamp { seconds: 1000, nanos: 0 };
        assert!(moves(&attr(at(5), at(5), at(1)), now));
        assert!(moves(&attr(at(5), at(1), at(6)), now));
        assert!(!moves(&attr(at(5), at(1), at(4)), now));
        assert!(moves(&attr(at(5), at(1), at(4)), Timestamp { seconds: 5 + DAY, nanos: 0 }));
        assert!(moves(&attr(None, at(1), at(4)), now));
    }
}
