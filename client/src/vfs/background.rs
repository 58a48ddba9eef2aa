//! Work that goes on after the call that began it has returned: the flush of a file that was closed.

use std::future::Future;
use std::sync::Arc;
use tokio::sync::watch;

/// Counts what is under way, so that sync and shutdown can wait for it.
#[derive(Clone)]
pub(super) struct Background {
    running: Arc<watch::Sender<usize>>,
}

impl Default for Background {
    fn default() -> Self {
        Self { running: Arc::new(watch::Sender::new(0)) }
    }
}

impl Background {
    /// Starts something. It must bound itself.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let done = Done(Arc::clone(&self.running));
        self.running.send_modify(|count| *count += 1);
        tokio::spawn(async move {
            let _done = done;
            work.await;
        });
    }

    /// How much is under way.
    pub fn count(&self) -> usize {
        *self.running.borrow()
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        *self.running.borrow() == 0
    }

    /// Waits until nothing is under way.
    pub async fn idle(&self) {
        let mut running = self.running.subscribe();
        // An error would mean that the sender is gone; it is ours.
        let _ = running.wait_for(|count| *count == 0).await;
    }
}

/// Counts down when the work ends, by whatever way.
struct Done(Arc<watch::Sender<usize>>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn idle_waits_for_the_last_and_for_what_panicked() {
        let background = Background::default();
        background.idle().await;
        background.spawn(tokio::time::sleep(Duration::from_secs(1)));
        background.spawn(async { panic!("a fault in background work") });
        let before = tokio::time::Instant::now();
        background.idle().await;
        assert_eq!(before.elapsed().as_secs(), 1);
    }
}
