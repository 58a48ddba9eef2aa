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
    let cli = match commands::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            // A reader that has gone needs no help.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("dfs: {}", one_line(&error.to_string()));
            return ExitCode::from(2);
        }
    };
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

/// What is wrong with the command line, without the usage and the hints that clap adds in paragraphs of their own.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    let line = lines.collect::<Vec<_>>().join(" ");
    format!("{} (see --help)", line.trim_start_matches("error: "))
}

/// What every command returns.
type Result<T = ()> = std::result::Result<T, CliError>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_command_line_is_one_line() {
        for arguments in [&["dfs", "bogus"][..], &["dfs", "stat"], &["dfs"], &["dfs", "ls", "--colour"]] {
            let error = commands::Cli::try_parse_from(arguments).expect_err("refused");
            let line = one_line(&error.to_string());
            assert!(!line.contains('\n') && line.ends_with("(see --help)") && line.len() > 20, "{line}");
        }
    }
}
