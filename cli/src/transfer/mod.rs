//! Moving bytes between local files or pipes and the cluster, several pieces at a time.

pub mod download;
pub mod ranges;
pub mod upload;

use crate::Result;
use crate::error::CliError;
use crate::output::Output;
use futures::StreamExt;
use indicatif::ProgressBar;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, watch};

/// How much is read or written in one step, in bytes.
pub const STEP: usize = 1 << 20;
/// How long a piece is that one worker moves from its beginning to its end, in bytes: what a chunk holds by default.
pub const PIECE: u64 = 64 << 20;
/// How many pieces of one file are moved at a time.
pub const PIECES_AT_ONCE: usize = 4;
/// How many files are moved at a time.
const FILES_AT_ONCE: usize = 16;
/// How many files may wait for their turn.
const FILES_WAITING: usize = 256;

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

/// What is going on: a bar for the user, counts for the summary, and whether to go on.
pub struct Progress {
    pub bar: ProgressBar,
    pub stop: Stop,
    files: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl Progress {
    /// Nothing moved yet of `total` bytes (`None`: unknown).
    pub fn new(output: Output, total: Option<u64>) -> std::io::Result<Self> {
        Ok(Self {
            bar: output.progress(total),
            stop: Stop::catch()?,
            files: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        })
    }

    /// Bytes have been moved.
    pub fn moved(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.bar.inc(bytes);
    }

    /// A file is complete.
    pub fn file_done(&self) {
        self.files.fetch_add(1, Ordering::Relaxed);
    }

    /// Reports an error of one file of many; the others go on.
    pub fn note(&self, result: Result) {
        if let Err(error) = result {
            self.errors.fetch_add(1, Ordering::Relaxed);
            if let Some(line) = error.line() {
                self.bar.suspend(|| eprintln!("dfs: {line}"));
            }
        }
    }

    /// Files and bytes moved, and files that failed.
    pub fn counts(&self) -> (u64, u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(&self.files), count(&self.bytes), count(&self.errors))
    }

    /// Moves a tree: `walk` finds what is in it and sends it; several at a time are moved by `work`.
    pub async fn tree<J, W: Future<Output = Result>, M: Future<Output = Result>>(
        &self,
        walk: impl FnOnce(mpsc::Sender<J>) -> W,
        work: impl Fn(J) -> M,
    ) -> Result {
        let (sender, receiver) = mpsc::channel(FILES_WAITING);
        let jobs = futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|job| (job, receiver))
        });
        let work = &work;
        let moving = jobs.for_each_concurrent(FILES_AT_ONCE, |job| async move {
            if !self.stop.is_stopped() {
                self.note(work(job).await);
            }
        });
        let (walked, ()) = tokio::join!(walk(sender), moving);
        walked?;
        if self.stop.is_stopped() { Err(CliError::Interrupted) } else { Ok(()) }
    }
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
    pub async fn or<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
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
