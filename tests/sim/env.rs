//! The simulated world's side of [`dfs_env::Env`]: turmoil's network and clock, a forgetful disk, seeded randomness.

use crate::disk::SimDisk;
use async_trait::async_trait;
use dfs_env::{Clock, Env, Listener, Net, Stream};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use turmoil::net::{TcpListener, TcpStream};

/// The environment of one simulated machine.
pub fn env(disk: &SimDisk, seed: u64) -> Env {
    let random = Mutex::new(SmallRng::seed_from_u64(seed));
    Env {
        clock: Arc::new(SimClock),
        disk: Arc::new(disk.clone()),
        net: Arc::new(SimNet),
        random: Arc::new(move || random.lock().expect("one thread").next_u64()),
        threads: false,
    }
}

struct SimClock;

// When a world has ended its machines are dropped, and what they drop may still ask for the time: then there is none.
impl Clock for SimClock {
    fn system(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + turmoil::since_epoch().unwrap_or_default()
    }

    fn boot(&self) -> Duration {
        turmoil::sim_elapsed().unwrap_or_default()
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
