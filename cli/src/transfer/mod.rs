//! Moving bytes between local files or pipes and the cluster, several pieces at a time.

pub mod download;
pub mod ranges;
pub mod upload;

use crate::error::CliError;
use tokio::sync::watch;

/// How much is read or written in one step, in bytes.
pub const STEP: usize = 1 << 20;
/// How long a piece is that one worker moves from its beginning to its end, in bytes: what a chunk holds by default.
pub const PIECE: u64 = 64 << 20;
/// How many pieces of one file are moved at a time.
pub const PIECES_AT_ONCE: usize = 4;
/// How many files are moved at a time.
pub const FILES_AT_ONCE: usize = 16;
/// How many files may wait for their turn.
pub const FILES_WAITING: usize = 256;

/// How files are moved.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whole trees.
    pub recursive: bool,
    /// Modes and modification times stay what they are.
    pub preserve: bool,
    /// What is there stays.
    pub keep_existing: bool,
}

/// Tells when the user interrupts, so that nothing half done stays behind.
#[derive(Clone)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Catches SIGINT and SIGTERM from here on.
    pub fn catch() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let (sender, receiver) = watch::channel(false);
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        tokio::spawn(async move {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            // Without receivers nothing is being moved and nothing is left to stop.
            let _ = sender.send(true);
            std::future::pending::<()>().await;
        });
        Ok(Self(receiver))
    }

    /// Returns when the user interrupts.
    pub async fn stopped(&self) {
        if self.0.clone().wait_for(|stopped| *stopped).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the user has interrupted.
    pub fn is_stopped(&self) -> bool {
        *self.0.borrow()
    }

    /// Runs `work` unless the user interrupts.
    pub async fn or<T>(&self, work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
        tokio::select! {
            biased;
            () = self.stopped() => Err(CliError::Interrupted),
            result = work => result,
        }
    }
}

/// A name for what is not whole yet, next to where it will be.
pub fn temporary_name(name: &[u8], random: u64) -> Vec<u8> {
    let kept = &name[..name.len().min(200)];
    [b".", kept, format!(".{random:016x}.part").as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_are_hidden_and_never_too_long() {
        assert_eq!(temporary_name(b"a", 255), b".a.00000000000000ff.part");
        assert!(temporary_name(&[b'x'; 255], u64::MAX).len() <= dfs_proto::limits::NAME_MAX);
    }
}
