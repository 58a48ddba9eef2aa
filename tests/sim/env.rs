//! The simulated world's side of [`dfs_env::Env`]: turmoil's network and clock, a forgetful disk, seeded randomness.

use crate::disk::SimDisk;
use async_trait::async_trait;
use dfs_env::{Clock, Env, Listener, Net, Stream};
use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use turmoil::net::{TcpListener, TcpStream};

/// How far the clocks of one machine are from those of the others.
#[derive(Default)]
pub struct Clocks {
    /// Milliseconds that the wall clock is ahead of the world's, or behind.
    wall_ms: AtomicI64,
    /// How long the machine had been up when the world began.
    up: Duration,
}

impl Clocks {
    /// Clocks that are off by what the seed says: up to ten seconds, and up to ten days of uptime.
    pub fn new(seed: u64) -> Arc<Self> {
        let mut random = SmallRng::seed_from_u64(seed ^ CLOCKS);
        let wall_ms = AtomicI64::new(random.random_range(-10_000..10_000));
        Arc::new(Self { wall_ms, up: Duration::from_secs(random.random_range(0..864_000)) })
    }

    /// Somebody sets the wall clock: it jumps, back too.
    pub fn jump(&self, by_ms: i64) {
        self.wall_ms.fetch_add(by_ms, Ordering::Relaxed);
    }
}

/// What draws of clocks begin from, so that they are none that a machine makes itself.
const CLOCKS: u64 = 0xc10c;

/// The environment of one simulated machine.
pub fn env(disk: &SimDisk, clocks: &Arc<Clocks>, seed: u64) -> Env {
    let random = Mutex::new(SmallRng::seed_from_u64(seed));
    Env {
        clock: Arc::new(SimClock(Arc::clone(clocks))),
        disk: Arc::new(disk.clone()),
        net: Arc::new(SimNet),
        random: Arc::new(move || random.lock().expect("one thread").next_u64()),
        threads: false,
    }
}

struct SimClock(Arc<Clocks>);

// When a world has ended its machines are dropped, and what they drop may still ask for the time: then there is none.
impl Clock for SimClock {
    fn system(&self) -> SystemTime {
        let world = SystemTime::UNIX_EPOCH + turmoil::since_epoch().unwrap_or_default();
        let wall_ms = self.0.wall_ms.load(Ordering::Relaxed);
        let off = Duration::from_millis(wall_ms.unsigned_abs());
        // When the world has ended, the time is 1970: there is nothing before that.
        if wall_ms < 0 { world.checked_sub(off).unwrap_or(world) } else { world + off }
    }

    fn boot(&self) -> Duration {
        self.0.up + turmoil::sim_elapsed().unwrap_or_default()
    }
}

struct SimNet;

#[async_trait]
impl Net for SimNet {
    async fn dial(&self, address: &str) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(TcpStream::connect(address).await?))
    }

    async fn listen(&self, address: &str) -> io::Result<Box<dyn Listener>> {
        let port = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
        let port: u16 =
            port.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{address}: no port")))?;
        Ok(Box::new(SimListener(TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await?)))
    }
}

struct SimListener(TcpListener);

#[async_trait]
impl Listener for SimListener {
    async fn accept(&self) -> io::Result<(Box<dyn Stream>, String)> {
        let (stream, peer) = self.0.accept().await?;
        Ok((Box::new(stream), peer.to_string()))
    }

    fn address(&self) -> io::Result<String> {
        Ok(self.0.local_addr()?.to_string())
    }
}
