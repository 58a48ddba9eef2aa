//! The session with the cluster: one long-lived stream to the leading master, for all calls of this client.
//!
//! A call puts its request where the stream picks it up ([`requests::State`]), wakes the stream and waits for its answer.
//! [`link`] keeps the stream alive, [`route`] knows which master to try next. A lost stream, a lost leader, a restarted
//! cluster are pauses: requests are kept and sent again until the operation time-out.
//!
//! When the master has closed the session because it was silent for too long, a new one is opened and
//! [`Master::session_changed`] tells. Then locks are lost (a warning is logged), files stay open, and a change that was sent
//! and not answered is sent again under the old session's name: it gets the answer of then, or is made now (commits are fenced
//! and repeated by the data plane).

mod held;
mod link;
mod requests;
mod route;

use crate::leases::{Kind, Leases, Unclean};
use crate::{ClientConfig, Defaults, Master, settings};
use async_trait::async_trait;
use dfs_env::Env;
use dfs_proto::v1::{self, Cred, ErrorCode, Hello, MasterFrame, Timestamp, Welcome, answer, hold, request};
use dfs_proto::{FsError, FsResult, InodeNo, SessionId, limits};
use requests::{Answered, Outcome, State};
pub use requests::{Heard, Leaving, Wanted};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

/// How often requests whose time is up are looked for.
const SWEEP: Duration = Duration::from_millis(200);
/// How long a request waits once the masters have been silent for as long as a request may take. Programs that wait for each
/// other in the kernel, in one directory, would else add up their time-outs.
const HOPELESS: Duration = Duration::from_millis(200);

/// A session. Dropping it ends the connection; the master expires the session later. See [`Session::goodbye`].
pub struct Session {
    shared: Arc<Shared>,
}

struct Shared {
    env: Env,
    masters: Vec<String>,
    name: String,
    host: String,
    operation_timeout: Option<Duration>,
    state: Mutex<State>,
    /// One place for each request that is not answered; closed when the session is broken.
    window: Semaphore,
    /// For what is urgent; a place is given back by whoever took it.
    reserve: Semaphore,
    /// The master's time and this machine's boot clock at one moment.
    time: Mutex<(Timestamp, Duration)>,
    session: watch::Sender<SessionId>,
    closed: watch::Sender<bool>,
    /// The run task has ended.
    finished: watch::Sender<bool>,
    /// The master takes root for nobody.
    root_squash: AtomicBool,
    /// The greatest Raft term whose leader welcomed this client.
    newest_term: AtomicU64,
    leases: Arc<Leases>,
    /// For whoever knows what is cached and kept under leases.
    wanted: mpsc::UnboundedSender<Wanted>,
}

impl Session {
    /// Connects to the leader among the masters.
    ///
    /// # Errors
    /// After `connect_timeout`, with the addresses tried and the causes; sooner when every master that answers refuses
    /// for good, and at once when no master is configured.
    ///
    /// The second of the pair tells what the master wants; [`Session::give_back`] and [`Session::tell`] answer.
    pub async fn connect(
        env: Env,
        config: &ClientConfig,
    ) -> FsResult<(Arc<Self>, mpsc::UnboundedReceiver<Wanted>)> {
        if config.masters.is_empty() {
            return Err(FsError::new(ErrorCode::ErrorInvalid, "no masters are configured"));
        }
        let host = if config.host.is_empty() { settings::host_name() } else { config.host.clone() };
        let leases = Arc::new(Leases::new(Arc::clone(&env.clock), limits::LEASES_PER_CLIENT));
        let (wanted, wants) = mpsc::unbounded_channel();
        let mut state = State::new(env.random(), config.cluster_id.clone(), Arc::clone(&leases));
        state.cause = format!("no answer from {}", config.masters.join(", "));
        let shared = Arc::new(Shared {
            masters: config.masters.clone(),
            name: config.name.clone(),
            host,
            operation_timeout: config.operation_timeout,
            state: Mutex::new(state),
            window: Semaphore::new(limits::SESSION_WINDOW),
            reserve: Semaphore::new(limits::SESSION_RESERVE),
            time: Mutex::new((Timestamp::from_system(env.clock.system()), env.clock.boot())),
            session: watch::Sender::new(SessionId(0)),
            closed: watch::Sender::new(false),
            finished: watch::Sender::new(false),
            root_squash: AtomicBool::new(false),
            newest_term: AtomicU64::new(0),
            leases,
            wanted,
            env,
        });
        tokio::spawn(link::run(Arc::clone(&shared)));
        tokio::spawn(sweep(Arc::downgrade(&shared)));
        // From here dropping the session stops both tasks.
        let session = Arc::new(Self { shared: Arc::clone(&shared) });
        let mut connected = shared.session.subscribe();
        let mut finished = shared.finished.subscribe();
        let waiting = async {
            tokio::select! {
                _ = connected.wait_for(|session| session.get() != 0) => Ok(()),
                _ = finished.wait_for(|finished| *finished) => Err(()),
            }
        };
        match timeout(config.connect_timeout, waiting).await {
            Ok(Ok(())) => Ok((session, wants)),
            Ok(Err(())) => Err(shared.broken().unwrap_or_else(|| ErrorCode::ErrorUnavailable.into())),
            Err(_) => Err(FsError::new(
                ErrorCode::ErrorTimedOut,
                format!(
                    "no master took the session within {:?}: {}",
                    config.connect_timeout,
                    shared.state().cause
                ),
            )),
        }
    }

    /// Ends the session cleanly: its locks and opens are given up at once. Later calls fail.
    pub async fn goodbye(&self, bound: Duration) {
        let mut finished = self.shared.finished.subscribe();
        let connected = {
            let mut state = self.shared.state();
            state.say_goodbye();
            state.welcomed
        };
        self.shared.wake();
        if connected && timeout(bound, finished.wait_for(|finished| *finished)).await.is_err() {
            tracing::debug!("the master did not end the session in time; it will expire");
        }
        self.shared.break_down(&FsError::new(ErrorCode::ErrorIo, "the client was shut down"));
    }

    /// The cluster's name.
    #[must_use]
    pub fn cluster_id(&self) -> String {
        self.shared.state().cluster_id.clone()
    }

    /// Whether the master takes what root does here for nobody's.
    #[must_use]
    pub fn squashes_root(&self) -> bool {
        self.shared.root_squash.load(Ordering::Relaxed)
    }

    /// The master that the session was last connected to.
    #[must_use]
    pub fn leader(&self) -> String {
        self.shared.state().leader.clone()
    }

    /// Whether an owner has locks on an inode, or an answer that is on its way may give him some.
    #[must_use]
    pub fn has_locks(&self, ino: InodeNo, owner: u64) -> bool {
        self.shared.state().may_have_locks(ino.get(), owner)
    }

    /// Whether anybody here has locks on an inode.
    #[must_use]
    pub fn has_locks_on(&self, ino: InodeNo) -> bool {
        self.shared.state().has_locks_on(ino.get())
    }

    /// The leases that this client holds.
    #[must_use]
    pub fn leases(&self) -> &Arc<Leases> {
        &self.shared.leases
    }

    /// Nothing is believed under a read lease any more, which comes back after a commit of what the kernel wrote back under it.
    pub fn flush_first(&self, ino: InodeNo) {
        self.shared.state().flush_first(ino);
        self.shared.wake();
    }

    /// A lease was given up, down to `keep`: what was kept under the rest is committed, which `clean` tells (and looks at no
    /// leases), what was cached is dropped.
    ///
    /// # Errors
    /// It is not clean: bytes have come.
    pub fn give_back(
        &self,
        ino: InodeNo,
        keep: Option<Kind>,
        clean: impl FnOnce() -> bool,
    ) -> Result<(), Unclean> {
        self.shared.state().give_back(ino, keep, clean)?;
        self.shared.wake();
        Ok(())
    }

    /// Nobody here has a file open: its write lease becomes a read lease if it is `clean`, and the master hears of it with
    /// the next frame.
    pub fn write_no_more(&self, ino: InodeNo, clean: impl FnOnce() -> bool) {
        self.shared.state().write_no_more(ino, clean);
    }

    /// Answers a question of the master about a file.
    pub fn tell(&self, ask: u64, attr: Option<v1::Attr>) {
        self.shared.state().tell(ask, attr);
        self.shared.wake();
    }

    /// Sends an ephemeral operation without waiting for its answer.
    ///
    /// # Errors
    /// When the session is broken, or no place in its window became free within the operation time-out.
    pub async fn hold_later(&self, cred: &Cred, hold: hold::Op) -> FsResult<()> {
        let op = request::Op::Hold(v1::Hold { op: Some(hold) });
        self.shared.place(&self.shared.window, None).await?.forget();
        // It stays until it is answered: a close that is given up would keep the file for ever.
        self.shared.submit(cred, op, None, None, true).map(drop)
    }

    /// As [`Master::mutate`], and what may be cached of the answer.
    pub async fn change(&self, cred: &Cred, change: v1::mutation::Op) -> Heard {
        self.call(cred, request::Op::Mutation(v1::Mutation { op: Some(change) })).await
    }

    /// As [`Master::query`], and what may be cached of the answer.
    pub async fn ask(&self, cred: &Cred, question: v1::query::Op) -> Heard {
        self.call(cred, request::Op::Query(v1::Query { op: Some(question) })).await
    }

    /// As [`Master::hold`], and what may be cached of the answer.
    pub async fn get(&self, cred: &Cred, hold: hold::Op) -> Heard {
        self.call(cred, request::Op::Hold(v1::Hold { op: Some(hold) })).await
    }

    async fn call(&self, cred: &Cred, op: request::Op) -> Heard {
        self.try_call(cred, op).await.unwrap_or_else(Heard::nothing)
    }

    async fn try_call(&self, cred: &Cred, op: request::Op) -> FsResult<Heard> {
        let shared = &self.shared;
        let waits =
            matches!(&op, request::Op::Hold(v1::Hold { op: Some(hold::Op::Lock(lock)) }) if lock.wait);
        let deadline = shared.deadline();
        // What is urgent has places of its own, whatever programs wait for.
        let reserved = if requests::is_urgent(&op) {
            Some(shared.place(&shared.reserve, deadline).await?)
        } else {
            shared.place(&shared.window, deadline).await?.forget();
            None
        };
        let (reply, answer) = oneshot::channel();
        let seq = shared.submit(cred, op, Some(reply), deadline.filter(|_| !waits), reserved.is_none())?;
        // A waiting lock is not bounded in time; who drops the future takes it back.
        let mut cancel = waits.then(|| Cancel { shared, seq: Some(seq) });
        let answer = answer.await;
        if let Some(cancel) = &mut cancel {
            cancel.seq = None;
        }
        answer.map_err(|_| shared.broken().unwrap_or_else(|| ErrorCode::ErrorUnavailable.into()))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.break_down(&FsError::new(ErrorCode::ErrorIo, "the client was shut down"));
    }
}

#[async_trait]
impl Master for Session {
    async fn mutate(&self, cred: &Cred, change: v1::mutation::Op) -> FsResult<answer::Body> {
        Self::change(self, cred, change).await.result
    }

    async fn query(&self, cred: &Cred, question: v1::query::Op) -> FsResult<answer::Body> {
        self.ask(cred, question).await.result
    }

    async fn hold(&self, cred: &Cred, hold: hold::Op) -> FsResult<answer::Body> {
        self.get(cred, hold).await.result
    }

    fn now(&self) -> Timestamp {
        // The boot clock: somebody setting this machine's clock must not move the times of files.
        passed(*lock(&self.shared.time), self.shared.env.clock.boot())
    }

    fn session(&self) -> SessionId {
        *self.shared.session.borrow()
    }

    fn defaults(&self) -> Defaults {
        let state = self.shared.state();
        Defaults { replicas: state.replicas, chunk_size: state.chunk_size }
    }

    fn session_changed(&self) -> watch::Receiver<SessionId> {
        self.shared.session.subscribe()
    }
}

/// Takes a waiting lock back when its future is dropped.
struct Cancel<'a> {
    shared: &'a Shared,
    seq: Option<u64>,
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        if let Some(seq) = self.seq {
            let mut freed = 0;
            self.shared.state().cancel(seq, &mut freed);
            self.shared.window.add_permits(freed);
            self.shared.wake();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn broken(&self) -> Option<FsError> {
        self.state().broken.clone()
    }

    /// Waits for a place.
    async fn place<'s>(&self, of: &'s Semaphore, deadline: Option<Instant>) -> FsResult<SemaphorePermit<'s>> {
        if let Ok(permit) = of.try_acquire() {
            return Ok(permit);
        }
        let deadline = deadline.or_else(|| self.deadline());
        let acquired = match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, of.acquire()).await,
            None => Ok(of.acquire().await),
        };
        match acquired {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(self.broken().unwrap_or_else(|| ErrorCode::ErrorUnavailable.into())),
            Err(_) => Err(FsError::new(
                ErrorCode::ErrorTimedOut,
                format!("{}: {}", self.bound(), self.state().cause),
            )),
        }
    }

    /// Until when a request that begins now may wait.
    fn deadline(&self) -> Option<Instant> {
        let (bound, now) = (self.operation_timeout?, Instant::now());
        let silent_since = self.state().silent_since();
        Some(silent_since.map_or(now + bound, |since| (since + bound).max(now + HOPELESS)))
    }

    /// Hands a request that has its place in the window to the stream.
    fn submit(
        &self,
        cred: &Cred,
        op: request::Op,
        reply: Option<Answered>,
        deadline: Option<Instant>,
        counted: bool,
    ) -> FsResult<u64> {
        let (seq, waker) = {
            let mut state = self.state();
            if let Some(error) = &state.broken {
                return Err(error.clone());
            }
            (state.submit(cred, op, reply, deadline, counted), state.waker.take())
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(seq)
    }

    fn wake(&self) {
        let waker = {
            let mut state = self.state();
            if state.has_work() { state.waker.take() } else { None }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn bound(&self) -> String {
        match self.operation_timeout {
            Some(bound) => format!("the cluster did not answer within {bound:?}"),
            None => "the cluster did not answer".to_owned(),
        }
    }

    fn hello(&self) -> (u64, Hello) {
        let mut state = self.state();
        let hello = state.hello(&self.name, &self.host, self.env.clock.boot());
        (state.stream, hello)
    }

    /// Refuses what a leader of a lower term says than one that welcomed this client: its cluster has been restored since, or has
    /// another leader. Terms rise, over restores, too (`docs/OPERATIONS.md`), so nobody who is rightly there is refused.
    fn of_this_history(&self, first: &MasterFrame) -> Result<(), String> {
        let term = first.welcome.as_ref().map_or(first.term, |welcome| welcome.term);
        let newest = self.newest_term.load(Ordering::Relaxed);
        // Who does not lead has no term to tell.
        if term != 0 && term < newest {
            return Err(format!(
                "it leads in term {term}, but this client has seen term {newest}: its data is of before"
            ));
        }
        Ok(())
    }

    /// The session is connected.
    fn take_welcome(&self, address: &str, welcome: &Welcome) -> FsResult<()> {
        let mut freed = 0;
        {
            let mut state = self.state();
            if !state.cluster_id.is_empty() && state.cluster_id != welcome.cluster_id {
                let text = format!("it belongs to cluster {}, not {}", welcome.cluster_id, state.cluster_id);
                return Err(FsError::new(ErrorCode::ErrorWrongCluster, text));
            }
            if welcome.session == 0 {
                return Err(FsError::new(ErrorCode::ErrorIo, "its welcome names no session"));
            }
            if state.session != 0 && state.session != welcome.session {
                // Another session than the one that was asked for: that one is gone.
                return Err(ErrorCode::ErrorSessionExpired.into());
            }
            address.clone_into(&mut state.leader);
            state.welcome(welcome, &mut freed);
        }
        self.root_squash.store(welcome.root_squash, Ordering::Relaxed);
        self.newest_term.fetch_max(welcome.term, Ordering::Relaxed);
        if let Some(now) = welcome.now {
            self.set_time(now);
        }
        self.window.add_permits(freed);
        self.session.send_if_modified(|session| {
            let changed = session.get() != welcome.session;
            *session = SessionId(welcome.session);
            changed
        });
        self.wake();
        Ok(())
    }

    /// The master's time; never back before what was handed out already.
    fn set_time(&self, now: Timestamp) {
        let connected = self.session.borrow().get() != 0;
        let boot = self.env.clock.boot();
        let mut time = lock(&self.time);
        let ours = passed(*time, boot);
        let ahead = connected && ours.key() > now.key();
        *time = (if ahead { ours } else { now }, boot);
    }

    /// Takes a frame in. True: the master no longer leads.
    fn received(&self, frame: MasterFrame) -> bool {
        let outcome = self.state().received(frame);
        let not_leader = outcome.not_leader;
        self.settle(outcome);
        not_leader
    }

    fn expired(&self) {
        let outcome = self.state().expired(self.env.random());
        self.settle(outcome);
    }

    fn disconnected(&self, cause: String) {
        let mut state = self.state();
        state.disconnected(cause);
        // The old stream ends itself as soon as it is looked at.
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn keep_alive(&self) {
        self.state().want_keep_alive();
        self.wake();
    }

    /// How often to say that this client lives: several times in a session's life.
    fn keep_alive_interval(&self) -> Duration {
        Duration::from_millis(limits::KEEP_ALIVE_MS).min(self.state().ttl() / 5)
    }

    fn goodbye_sent(&self) -> bool {
        self.state().goodbye_sent()
    }

    /// Nothing works any more, for good.
    fn break_down(&self, error: &FsError) {
        let outcome = self.state().fail_all(error);
        self.settle(outcome);
        self.window.close();
        self.reserve.close();
        self.closed.send_replace(true);
        self.finish();
    }

    fn finish(&self) {
        self.finished.send_replace(true);
    }

    fn settle(&self, outcome: Outcome) {
        self.window.add_permits(outcome.freed);
        let asks = outcome.asks.into_iter().map(Wanted::Tell);
        for wanted in outcome.leaving.into_iter().map(Wanted::Leave).chain(asks) {
            // Nobody listens any more: the client is being shut down.
            let _gone = self.wanted.send(wanted);
        }
        for completion in outcome.completions {
            // Nobody there any more: what matters of that was seen to under the lock.
            drop(completion.reply.send(completion.heard));
        }
        // The answers may have led to requests of the session's own.
        self.wake();
    }
}

/// The time now, from a time known at an earlier moment of the boot clock.
fn passed((then, at): (Timestamp, Duration), boot: Duration) -> Timestamp {
    let passed = boot.saturating_sub(at);
    let nanos = then.nanos + passed.subsec_nanos();
    Timestamp {
        seconds: then.seconds + passed.as_secs().cast_signed() + i64::from(nanos / 1_000_000_000),
        nanos: nanos % 1_000_000_000,
    }
}

/// Fails requests whose time is up and sends again those that were answered "not now".
async fn sweep(shared: std::sync::Weak<Shared>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let Some(shared) = shared.upgrade() else { return };
        if *shared.closed.borrow() {
            return;
        }
        let outcome = {
            let mut state = shared.state();
            state.retry_deferred();
            state.overdue(Instant::now(), shared.operation_timeout, || shared.bound())
        };
        shared.settle(outcome);
        shared.wake();
    }
}

/// Every change under these locks is made whole before anything that could panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
