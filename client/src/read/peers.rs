//! Chunk daemons as this client knows them: streams, how quickly they answer, and which ones to ask first.

use crate::data::links::ReadLink;
use dfs_env::Env;
use dfs_proto::v1::{ReadReply, ReadRequest, Replica};
use dfs_proto::{ChunkId, FsResult};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;

/// Streams to one daemon, each on a connection of its own: one connection is decoded by one core.
const LINKS: usize = 2;
/// Latencies remembered of one daemon.
const LATENCIES: usize = 64;
/// A daemon that failed is asked last for this long.
const PENALTY: Duration = Duration::from_secs(5);
/// A replica that was found damaged is asked last for this long: until then it is repaired.
const DAMAGE: Duration = Duration::from_secs(600);
/// A read is sent to a second replica no sooner than this.
const HEDGE_MIN: Duration = Duration::from_millis(50);
/// Damaged replicas remembered.
const DAMAGED_MAX: usize = 4096;

struct Latencies {
    recent: [Duration; LATENCIES],
    count: usize,
    p50: Duration,
    p95: Duration,
}

/// One chunk daemon.
pub(crate) struct Peer {
    address: String,
    links: [Mutex<Option<Arc<ReadLink>>>; LINKS],
    next_link: AtomicUsize,
    /// Requests not answered.
    outstanding: AtomicUsize,
    latencies: Mutex<Latencies>,
    /// Asked last until then, in milliseconds of the boot clock.
    penalty_ms: AtomicU64,
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Counts a request as outstanding while it lives.
struct Outstanding<'a>(&'a AtomicUsize);

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Peer {
    fn new(address: &str) -> Self {
        let nothing = Latencies {
            recent: [Duration::ZERO; LATENCIES],
            count: 0,
            p50: Duration::from_millis(1),
            p95: Duration::from_millis(10),
        };
        Self {
            address: address.to_owned(),
            links: std::array::from_fn(|_| Mutex::new(None)),
            next_link: AtomicUsize::new(0),
            outstanding: AtomicUsize::new(0),
            latencies: Mutex::new(nothing),
            penalty_ms: AtomicU64::new(0),
        }
    }

    fn link(&self, env: &Env, handle: &Handle) -> Arc<ReadLink> {
        let at = self.next_link.fetch_add(1, Ordering::Relaxed) % LINKS;
        let mut link = self.links[at].lock().unwrap_or_else(PoisonError::into_inner);
        match &*link {
            Some(link) if !link.is_down() => Arc::clone(link),
            _ => Arc::clone(link.insert(Arc::new(ReadLink::open(env, handle, &self.address)))),
        }
    }

    fn note(&self, latency: Duration) {
        let mut latencies = self.latencies.lock().unwrap_or_else(PoisonError::into_inner);
        let at = latencies.count % LATENCIES;
        latencies.recent[at] = latency;
        latencies.count += 1;
        if latencies.count.is_multiple_of(8) {
            let mut sorted = latencies.recent;
            let known = &mut sorted[..latencies.count.min(LATENCIES)];
            known.sort_unstable();
            (latencies.p50, latencies.p95) = (known[known.len() / 2], known[known.len() * 95 / 100]);
        }
    }

    /// How long to wait for an answer before another replica is asked too.
    pub(crate) fn hedge_after(&self) -> Duration {
        let p95 = self.latencies.lock().unwrap_or_else(PoisonError::into_inner).p95;
        HEDGE_MIN.max(p95 * 4)
    }

    /// What asking it now will cost, roughly: requests before ours times what one takes.
    fn cost(&self) -> u128 {
        let p50 = self.latencies.lock().unwrap_or_else(PoisonError::into_inner).p50;
        (self.outstanding.load(Ordering::Relaxed) as u128 + 1) * p50.as_micros().max(1)
    }
}

/// All chunk daemons that were asked so far; as many as the cluster has.
pub(crate) struct Peers {
    env: Env,
    handle: Handle,
    peers: Mutex<HashMap<String, Arc<Peer>>>,
    /// Replicas that sent damaged bytes or none, and until when they are avoided.
    damaged: Mutex<lru::LruCache<(ChunkId, String), Duration>>,
    /// The host that this client runs on; empty: unknown.
    host: Mutex<String>,
}

impl Peers {
    pub(crate) fn new(env: Env, handle: Handle) -> Self {
        let damaged = lru::LruCache::new(std::num::NonZeroUsize::MIN.saturating_add(DAMAGED_MAX - 1));
        Self {
            env,
            handle,
            peers: Mutex::new(HashMap::new()),
            damaged: Mutex::new(damaged),
            host: Mutex::new(String::new()),
        }
    }

    pub(crate) fn set_host(&self, host: &str) {
        host.clone_into(&mut self.host.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn peer(&self, address: &str) -> Arc<Peer> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get(address) {
            return Arc::clone(peer);
        }
        let peer = Arc::new(Peer::new(address));
        peers.insert(address.to_owned(), Arc::clone(&peer));
        peer
    }

    /// The replicas in the order in which to ask them: sound before damaged, local before remote, idle before busy.
    pub(crate) fn order(&self, chunk: ChunkId, replicas: &[Replica]) -> Vec<Arc<Peer>> {
        let now = self.env.clock.boot();
        let host = self.host.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rated: Vec<_> = replicas
            .iter()
            .map(|replica| {
                let peer = self.peer(&replica.address);
                let bad = damaged.get(&(chunk, replica.address.clone())).is_some_and(|until| now < *until);
                let late = millis(now) < peer.penalty_ms.load(Ordering::Relaxed);
                let remote = host.is_empty() || replica.host != host;
                ((bad, late, remote, peer.cost()), peer)
            })
            .collect();
        drop(damaged);
        rated.sort_by_key(|(rating, _)| *rating);
        rated.into_iter().map(|(_, peer)| peer).collect()
    }

    /// Asks one daemon.
    pub(crate) async fn ask(&self, peer: &Peer, request: ReadRequest) -> FsResult<ReadReply> {
        let began = self.env.clock.boot();
        peer.outstanding.fetch_add(1, Ordering::Relaxed);
        let _counted = Outstanding(&peer.outstanding);
        let reply = peer.link(&self.env, &self.handle).ask(request).await?;
        peer.note(self.env.clock.boot().saturating_sub(began));
        Ok(reply)
    }

    /// The daemon did not answer, or not in time.
    pub(crate) fn blame(&self, peer: &Peer) {
        let until = self.env.clock.boot() + PENALTY;
        peer.penalty_ms.store(millis(until), Ordering::Relaxed);
    }

    /// The daemon's replica of a chunk is missing, short or damaged.
    pub(crate) fn note_damage(&self, peer: &Peer, chunk: ChunkId) {
        let until = self.env.clock.boot() + DAMAGE;
        let mut damaged = self.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        damaged.put((chunk, peer.address.clone()), until);
    }

    pub(crate) fn env(&self) -> &Env {
        &self.env
    }
}

impl Peer {
    pub(crate) fn address(&self) -> &str {
        &self.address
    }
}
