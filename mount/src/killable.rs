//! Lets a killed process leave a request that is still waiting for the cluster, and everybody whose time is up.
//!
//! The FUSE library answers FUSE_INTERRUPT with ENOSYS, after which the kernel holds a thread in a sent request even
//! against SIGKILL. So whoever waits long is looked up in `/proc`: when SIGKILL is pending for the thread that asked (for
//! a blocking lock: any signal that would interrupt it), the request is answered EINTR. The operation itself goes on to
//! its own end; its result finds the reply already used.
//!
//! An operation asks several times for something, and each time may take as long as it is allowed to. So that the whole
//! stays within about one time-out, a request that is older than that is answered ETIMEDOUT in the same way; except a
//! wait for a lock, which the client ends by itself once no master has answered for so long.

use crate::procfs;
use fuser::Errno;
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How old a request is before anybody looks whether its asker was killed.
const AGE: Duration = Duration::from_millis(200);
/// How often that is looked at.
const INTERVAL: Duration = Duration::from_millis(100);

/// What ends the wait of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// SIGKILL.
    Killed,
    /// SIGKILL, also when the process is already closing its files because of it.
    KilledOrDying,
    /// Any signal that would interrupt a system call.
    AnySignal,
    /// Nothing but time: no process asks (closing), or an error would lose bytes of somebody else (write-back of shared pages).
    Endless,
}

/// A reply of the FUSE library that can say no.
pub trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ident),*) => {
        $(impl Refuse for fuser::$reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}
refuse!(
    ReplyEmpty,
    ReplyData,
    ReplyEntry,
    ReplyAttr,
    ReplyOpen,
    ReplyWrite,
    ReplyStatfs,
    ReplyCreate,
    ReplyLock,
    ReplyXattr,
    ReplyLseek,
    ReplyIoctl,
    ReplyDirectory,
    ReplyDirectoryPlus
);

/// A reply that is used once, by the operation or by an interruption, whichever comes first.
pub struct Slot<R> {
    reply: Mutex<Option<R>>,
    interrupted: Notify,
}

impl<R: Refuse> Slot<R> {
    #[must_use]
    pub fn new(reply: R) -> Arc<Self> {
        Arc::new(Self { reply: Mutex::new(Some(reply)), interrupted: Notify::new() })
    }

    /// The reply, for the first who asks.
    pub fn take(&self) -> Option<R> {
        self.reply.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Returns when the request was answered EINTR.
    pub async fn interrupted(&self) {
        self.interrupted.notified().await;
    }
}

/// A request whose asker may be sent home.
pub trait Interrupt: Send + Sync {
    /// Answers EINTR unless there was an answer before.
    fn interrupt(&self);
    /// Answers ETIMEDOUT unless there was an answer before; the operation goes on. False: there was one.
    fn time_out(&self) -> bool;
}

impl<R: Refuse> Interrupt for Slot<R> {
    fn interrupt(&self) {
        if let Some(reply) = self.take() {
            reply.refuse(Errno::EINTR);
            self.interrupted.notify_one();
        }
    }

    fn time_out(&self) -> bool {
        self.take().map(|reply| reply.refuse(Errno::ETIMEDOUT)).is_some()
    }
}

struct Waiting {
    thread: u32,
    since: Instant,
    patience: Patience,
    request: Arc<dyn Interrupt>,
}

#[derive(Default)]
struct Table {
    waiting: HashMap<u64, Waiting>,
    stopped: bool,
}

/// The requests that wait for the cluster. Bounded by the kernel, which has one request a thread and `max_background`.
#[derive(Default)]
pub struct Registry {
    /// How old a request may grow; `None`: as old as it does.
    limit: Option<Duration>,
    table: Mutex<Table>,
    changed: Condvar,
}

impl Registry {
    #[must_use]
    pub fn new(limit: Option<Duration>) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Notes that a request waits, until the guard is dropped.
    pub fn add(
        self: &Arc<Self>,
        unique: u64,
        thread: u32,
        patience: Patience,
        request: Arc<dyn Interrupt>,
    ) -> Option<Guard> {
        // Thread 0 is the kernel itself or another pid namespace: nobody to look up.
        let patience =
            if thread == 0 && patience != Patience::AnySignal { Patience::Endless } else { patience };
        if (patience == Patience::Endless && self.limit.is_none())
            || thread == 0 && patience == Patience::AnySignal
        {
            return None;
        }
        let mut table = self.lock();
        let first = table.waiting.is_empty();
        table.waiting.insert(unique, Waiting { thread, since: Instant::now(), patience, request });
        drop(table);
        if first {
            self.changed.notify_one();
        }
        Some(Guard { registry: Arc::clone(self), unique })
    }

    /// Starts the thread that looks after the requests.
    ///
    /// # Errors
    /// When the system has no thread left.
    pub fn watch(self: &Arc<Self>) -> std::io::Result<std::thread::JoinHandle<()>> {
        let registry = Arc::clone(self);
        std::thread::Builder::new().name("killable".to_owned()).spawn(move || {
            while registry.wait_for_some() {
                std::thread::sleep(INTERVAL);
                registry.sweep(Instant::now(), procfs::signals, procfs::dying);
            }
        })
    }

    /// Ends that thread.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// False: stopped.
    fn wait_for_some(&self) -> bool {
        let table = self.lock();
        let table = self
            .changed
            .wait_while(table, |table| table.waiting.is_empty() && !table.stopped)
            .unwrap_or_else(PoisonError::into_inner);
        !table.stopped
    }

    /// Interrupts what is old enough and whose asker was sent home, and what is too old.
    fn sweep(
        &self,
        now: Instant,
        signals: impl Fn(u32) -> Option<procfs::Signals>,
        dying: impl Fn(u32) -> bool,
    ) {
        let age = |waiting: &Waiting| now.saturating_duration_since(waiting.since);
        let old: Vec<(u32, Patience, Duration, Arc<dyn Interrupt>)> = self
            .lock()
            .waiting
            .values()
            .filter(|waiting| age(waiting) >= AGE)
            .map(|waiting| (waiting.thread, waiting.patience, age(waiting), Arc::clone(&waiting.request)))
            .collect();
        // One thread may have many requests under way (readahead): it is looked up once.
        let mut seen: HashMap<u32, Option<procfs::Signals>> = HashMap::new();
        for (thread, patience, age, request) in old {
            if patience != Patience::AnySignal && self.limit.is_some_and(|limit| age >= limit) {
                if request.time_out() {
                    tracing::warn!(seconds = age.as_secs(), "a request was given up");
                }
                continue;
            }
            if patience == Patience::Endless {
                continue;
            }
            let Some(state) = *seen.entry(thread).or_insert_with(|| signals(thread)) else { continue };
            let leaves = match patience {
                Patience::Killed => state.killed(),
                Patience::KilledOrDying => state.killed() || dying(thread),
                Patience::AnySignal => state.interrupted(),
                Patience::Endless => false,
            };
            if leaves {
                request.interrupt();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Every change is a single step: a poisoned table is whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that waits; dropped when it no longer does.
pub struct Guard {
    registry: Arc<Registry>,
    unique: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.registry.lock().waiting.remove(&self.unique);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    impl Refuse for mpsc::Sender<Option<i32>> {
        fn refuse(self, errno: Errno) {
            self.send(Some(errno.code())).expect("the test listens");
        }
    }

    fn pending(signal: i32) -> procfs::Signals {
        procfs::Signals { pending: 1 << (signal - 1), ..procfs::Signals::default() }
    }

    #[test]
    fn only_old_requests_of_killed_threads_are_answered_and_only_once() {
        let registry = Arc::new(Registry::default());
        let (sender, answers) = mpsc::channel();
        let slots: Vec<_> = (0..4).map(|_| Slot::new(sender.clone())).collect();
        let patience = [Patience::Killed, Patience::AnySignal, Patience::KilledOrDying, Patience::Endless];
        let guards: Vec<_> = slots
            .iter()
            .zip(patience)
            .zip(10..)
            .map(|((slot, patience), thread)| {
                registry.add(u64::from(thread), thread, patience, Arc::clone(slot) as Arc<dyn Interrupt>)
            })
            .collect();
        assert!(guards[..3].iter().all(Option::is_some) && guards[3].is_none());
        let killed = |_| Some(pending(libc::SIGKILL));
        registry.sweep(Instant::now(), killed, |_| false);
        assert!(answers.try_recv().is_err(), "too young");
        let later = Instant::now() + AGE;
        registry.sweep(later, |_| Some(pending(libc::SIGINT)), |_| false);
        assert_eq!(answers.try_recv(), Ok(Some(libc::EINTR)));
        assert!(slots[1].take().is_none() && answers.try_recv().is_err());
        registry.sweep(later, |_| Some(procfs::Signals::default()), |thread| thread == 12);
        assert!(slots[2].take().is_none());
        assert_eq!(answers.try_recv(), Ok(Some(libc::EINTR)));
        // The operation was quicker: the interruption finds nothing to answer.
        slots[0].take().expect("not answered yet").send(None).expect("the test listens");
        registry.sweep(later, killed, |_| false);
        assert_eq!(answers.try_iter().collect::<Vec<_>>(), [None]);
        drop(guards);
        assert!(registry.lock().waiting.is_empty());
    }

    #[test]
    fn what_is_too_old_is_answered_whoever_asks_except_waits_for_locks() {
        let limit = Duration::from_secs(9);
        let registry = Arc::new(Registry::new(Some(limit)));
        let (sender, answers) = mpsc::channel();
        let slots: Vec<_> = (0..4).map(|_| Slot::new(sender.clone())).collect();
        let asked =
            [(7, Patience::Killed), (0, Patience::Killed), (7, Patience::Endless), (7, Patience::AnySignal)];
        let guards: Vec<_> = (0..)
            .zip(&slots)
            .zip(asked)
            .filter_map(|((unique, slot), (thread, patience))| {
                registry.add(unique, thread, patience, Arc::clone(slot) as Arc<dyn Interrupt>)
            })
            .collect();
        let alive = |_| Some(procfs::Signals::default());
        registry.sweep(Instant::now() + limit - Duration::from_secs(1), alive, |_| false);
        assert!(answers.try_recv().is_err(), "in time");
        registry.sweep(Instant::now() + limit, alive, |_| false);
        assert_eq!(answers.try_iter().collect::<Vec<_>>(), [Some(libc::ETIMEDOUT); 3]);
        assert!(slots[3].take().is_some(), "somebody may hold the lock for days");
        drop(guards);
        assert!(registry.lock().waiting.is_empty());
    }

    #[test]
    fn the_watching_thread_sleeps_without_requests_and_ends_when_told() {
        let registry = Arc::new(Registry::default());
        let thread = registry.watch().expect("a thread");
        registry.stop();
        thread.join().expect("it ends");
    }
}
