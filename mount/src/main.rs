//! dfs-mount: a dfs cluster as a file system of this machine, through FUSE.
//!
//! ```text
//! kernel ── /dev/fuse ── fuse/ (decode, reply) ── dfs_client (everything about files)
//!                          ├── inodes      what the kernel knows, whether its pages are still good
//!                          ├── kernel      tells it what to drop
//!                          ├── killable    sends killed processes home
//!                          └── errno       the one table
//! cli, options ── run (connect, mount, serve, flush, unmount) ── mountpoint, daemon, assist      unmount
//! ```

mod assist;
mod cli;
mod daemon;
mod errno;
mod fail;
mod fuse;
mod inodes;
mod kernel;
mod killable;
mod listings;
mod mountpoint;
mod options;
mod procfs;
mod run;
mod unmount;

use cli::{MountWish, Wish};
use daemon::{Role, Starter};
use dfs_env::Env;
use fail::Failure;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Mutex;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let result = daemon::open_standard_streams()
        .map_err(Failure::operation)
        .and_then(|()| cli::parse(std::env::args_os()))
        .and_then(|wish| match wish {
            Wish::Show(text) => {
                print!("{text}");
                Ok(0)
            }
            Wish::Unmount { place, how } => unmount::run(&place, how).map(|()| 0),
            Wish::Assist { task, place } => Ok(assist::run(task, &place)),
            Wish::Mount(wish) => mount(&wish),
        });
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("dfs-mount: {failure}");
            ExitCode::from(failure.status)
        }
    }
}

/// Everything that can be checked without a thread is checked before the process goes to the background.
fn mount(wish: &MountWish) -> Result<u8, Failure> {
    let filter = log_filter(wish)?;
    let place = mountpoint::check(&wish.place)?;
    let config = run::settings(&Env::real(), &wish.options, &place)?;
    if wish.fake {
        return Ok(0);
    }
    let starter = if wish.foreground {
        Starter::Foreground
    } else {
        let role = daemon::detach().map_err(|error| Failure::operation(format!("fork: {error}")))?;
        match role {
            Role::Parent(status) => return Ok(status),
            Role::Child(starter) => starter,
        }
    };
    if let Err(failure) = start_logging(wish, filter) {
        starter.failed(&failure);
        return Ok(failure.status);
    }
    Ok(run::serve(wish, place, config, starter))
}

fn log_filter(wish: &MountWish) -> Result<EnvFilter, Failure> {
    let text = match &wish.log {
        Some(text) => text.clone(),
        None => std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()),
    };
    // The FUSE library complains about what is in order: that it cannot unmount what umount(8) has unmounted, and that
    // the kernel does not find the request whose interruption it declines (it asks on another descriptor).
    let text =
        if matches!(text.as_str(), "error" | "warn" | "info") { format!("{text},fuser=off") } else { text };
    EnvFilter::try_new(&text).map_err(|error| Failure::usage(format!("--log '{text}': {error}")))
}

/// To the log file; else, in the foreground, to standard error; else nowhere: what goes wrong reaches the programs.
fn start_logging(wish: &MountWish, filter: EnvFilter) -> Result<(), Failure> {
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match &wish.log_file {
        Some(path) => {
            let file = std::fs::File::options()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|error| Failure::operation(format!("log file {}: {error}", path.display())))?;
            log.with_ansi(false).with_writer(Mutex::new(file)).init();
        }
        None if wish.foreground => {
            log.with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).init();
        }
        None => log.with_writer(std::io::sink).init(),
    }
    // A panic ends one request, not the mount; it must be seen.
    std::panic::set_hook(Box::new(|panic| tracing::error!("a fault in dfs-mount: {panic}")));
    Ok(())
}
