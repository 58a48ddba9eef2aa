//! `dfs-chunkd`: starts the daemon, tells systemd, stops cleanly on SIGTERM.

use clap::Parser;
use dfs_chunkd::{Config, Daemon, StartError};
use dfs_env::Env;
use sd_notify::NotifyState;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};

/// The chunk daemon of dfs: keeps the bytes of files in replicated, checksummed chunk files.
#[derive(Parser)]
#[command(
    name = "dfs-chunkd",
    version,
    about,
    after_help = "Every setting is described in deploy/chunkd.toml. \
    RUST_LOG sets what is logged (default: info)."
)]
struct Options {
    /// The settings file
    #[arg(long, value_name = "FILE", default_value = "/etc/dfs/chunkd.toml")]
    config: PathBuf,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    match run(&options.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dfs-chunkd: {error}");
            ExitCode::from(match error {
                StartError::Usage(_) => 2,
                StartError::Failed(_) => 1,
            })
        }
    }
}

fn run(path: &Path) -> Result<(), StartError> {
    let env = Env::real();
    let usage = |cause: String| StartError::Usage(format!("{}: {cause}", path.display()));
    let text = env.disk.read(path).map_err(|error| usage(error.to_string()))?;
    let text = String::from_utf8(text).map_err(|_| usage("this is not text".to_owned()))?;
    let config = Config::parse(&text).map_err(usage)?;
    raise_open_files();
    dfs_env::runtime::build("dfs-chunkd")
        .map_err(|error| StartError::Failed(format!("no runtime: {error}")))?
        .block_on(serve(env, config))
}

async fn serve(env: Env, config: Config) -> Result<(), StartError> {
    let failed = |error: std::io::Error| StartError::Failed(format!("signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let daemon = Daemon::start(env, config).await?;
    tell_systemd(&[NotifyState::Ready]);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tell_systemd(&[NotifyState::Stopping]);
    tracing::info!("stopping");
    daemon.shutdown().await;
    Ok(())
}

/// Without systemd this does nothing.
fn tell_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd was not told");
    }
}

/// As many open files as the machine allows: chunk files are kept open. The default of 1024 is for programs that use
/// select(2).
fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit that outlives both calls.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if !raised {
        tracing::warn!(error = %std::io::Error::last_os_error(), "the limit of open files stays as it is");
    }
}
