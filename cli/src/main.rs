//! `dfs`: the file system from the shell, without a mount, and the state of the cluster.

mod commands;
mod error;
mod format;
mod output;
mod remote;
mod settings;
mod transfer;

use clap::Parser;
use error::CliError;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = commands::Cli::parse();
    let level = if cli.verbose { "dfs=debug,dfs_client=debug" } else { "off" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("dfs: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(commands::run(cli));
    // A read of standard input may still block a thread of the runtime; nobody waits for it.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(line) = error.line() {
                eprintln!("dfs: {line}");
            }
            ExitCode::from(error.status())
        }
    }
}

/// What every command returns.
type Result<T = ()> = std::result::Result<T, CliError>;
