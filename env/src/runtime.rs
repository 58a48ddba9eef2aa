//! The tokio runtime of a daemon.

use std::io;
use tokio::runtime::{Builder, Runtime};

/// Builds a multi-threaded runtime whose threads are called `name`, with half as many workers as the machine has cores
/// (`TOKIO_WORKER_THREADS`: so many).
///
/// A request passes through several processes of this machine or others, one after the other, and what it costs is
/// mostly the waking of the next thread. A worker that finds a second one asleep wakes it for every task that it
/// makes, only to race with it: on two cores a change of attributes takes 0.50 ms with two workers and 0.34 ms with one.
///
/// # Errors
/// When the system gives no threads or no epoll.
pub fn build(name: &str) -> io::Result<Runtime> {
    let mut builder = Builder::new_multi_thread();
    builder.enable_all().thread_name(name);
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        builder.worker_threads(cores.div_ceil(2));
    }
    builder.build()
}
