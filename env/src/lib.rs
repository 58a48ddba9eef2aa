//! The world outside a dfs process behind traits: clock, randomness, disk and network.
//!
//! Every daemon and the client library reach the world through one [`Env`]. The real one is [`Env::real`]; the
//! simulator in `tests/sim/` brings its own, and so a whole cluster runs in one process from one seed. Sleeping and
//! time-outs go through `tokio::time`, which the simulator drives.

pub mod clock;
pub mod defect;
pub mod disk;
pub mod memory;
pub mod net;
pub mod rpc;
pub mod runtime;
pub mod seldom;

pub use clock::Clock;
pub use disk::{Disk, DiskFile};
pub use net::{Listener, Net, Stream};
pub use seldom::Seldom;

use std::sync::Arc;

/// Everything outside the process. Cheap to clone.
#[derive(Clone)]
pub struct Env {
    pub clock: Arc<dyn Clock>,
    pub disk: Arc<dyn Disk>,
    pub net: Arc<dyn Net>,
    /// Where randomness comes from.
    pub random: Arc<dyn Fn() -> u64 + Send + Sync>,
    /// Whether blocking calls may leave the thread; the simulator runs them where they are.
    pub threads: bool,
}

impl Env {
    /// The machine that this process runs on.
    #[must_use]
    pub fn real() -> Self {
        Self {
            clock: Arc::new(clock::SystemClock),
            disk: Arc::new(disk::RealDisk),
            net: Arc::new(net::Tcp),
            random: Arc::new(rand::random::<u64>),
            threads: true,
        }
    }

    /// A random number.
    #[must_use]
    pub fn random(&self) -> u64 {
        (self.random)()
    }

    /// Runs a call that may block (an fdatasync, say) without holding up the runtime.
    ///
    /// # Errors
    /// What `call` returns; and when it panicked, an error that says so.
    pub async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> std::io::Result<T> {
        if !self.threads {
            let lag = self.disk.lag();
            if !lag.is_zero() {
                tokio::time::sleep(lag).await;
            }
            return call();
        }
        match tokio::task::spawn_blocking(call).await {
            Ok(result) => result,
            Err(error) => Err(std::io::Error::other(format!("a blocking call did not end: {error}"))),
        }
    }
}
