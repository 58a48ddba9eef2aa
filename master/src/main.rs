//! `dfs-master`: reads its configuration, serves until it is told to stop.

use clap::Parser;
use clap::error::ErrorKind;
use dfs_env::Env;
use dfs_master::{Config, Master, StartError, operate};
use sd_notify::NotifyState;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The dfs master: keeps names, permissions and the map of chunks, alone or in a group of three or five.
///
/// Exit status: 0 when it was told to stop, 1 when it could not go on, 2 for a wrong command line or configuration and
/// for a data directory that belongs to another cluster or node.
#[derive(Parser)]
#[command(name = "dfs-master", version)]
struct Arguments {
    /// The configuration file; every key is explained in deploy/master.toml
    #[arg(long, value_name = "FILE", default_value = "/etc/dfs/master.toml", global = true)]
    config: PathBuf,

    /// Check the configuration and the files it names, then exit
    #[arg(long)]
    check_config: bool,

    /// What to log to stderr: error, warn, info, debug or trace, also by module (info,dfs_master=debug)
    #[arg(long, value_name = "LEVEL", env = "RUST_LOG", default_value = "info", global = true)]
    log: String,

    #[command(subcommand)]
    command: Option<Command>,
}

/// What an operator does besides serving.
#[derive(clap::Subcommand)]
enum Command {
    /// Write a consistent copy of all metadata to a file, from the leader, while the cluster works
    Backup {
        /// Where to; there must be no such file yet
        #[arg(value_name = "FILE")]
        out: PathBuf,
    },
    /// Make this master's empty data directory from a backup, as a group of one
    Restore {
        /// Written by `dfs-master backup`, or a snapshot of a master that is lost
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Delete what was written after the backup as soon as its chunk daemons come; else it is kept until `forget-newer`
        #[arg(long)]
        discard_newer: bool,
    },
    /// Make this master, the only one left of several, a group of one with its own log and state
    Recover {
        /// Confirm that the other masters are lost, and will never run again with the data they had
        #[arg(long)]
        others_are_lost: bool,
    },
    /// Have the cluster delete the chunks that were made after the backup it was restored from
    ForgetNewer,
}

const FAILED: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            print!("{error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            return fail(USAGE, &format!("{line} (see --help)"));
        }
    };
    // Raft's own log is for those who ask for it.
    let log = match (arguments.log.as_str(), &arguments.command) {
        ("info", None) => "info,openraft=warn",
        // An order says one line itself.
        ("info", Some(_)) => "warn,openraft=error",
        (log, _) => log,
    };
    let filter = match EnvFilter::try_new(log) {
        Ok(filter) => filter,
        Err(error) => return fail(USAGE, &format!("--log {:?}: {error}", arguments.log)),
    };
    let terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(terminal).with_writer(std::io::stderr).init();

    let env = Env::real();
    let config = match Config::load(&env, &arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(USAGE, &error.to_string()),
    };
    if arguments.check_config {
        println!("{}: valid, cluster {}", arguments.config.display(), config.key.cluster_id());
        return ExitCode::SUCCESS;
    }
    let runtime = match dfs_env::runtime::build("dfs-master") {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &format!("cannot start the runtime: {error}")),
    };
    let code = match arguments.command {
        None => runtime.block_on(serve(env, config)),
        Some(command) => match runtime.block_on(carry_out(env, &config, command)) {
            Ok(line) => {
                println!("{line}");
                ExitCode::SUCCESS
            }
            Err(StartError::Usage(line)) => fail(USAGE, &line),
            Err(StartError::Failed(line)) => fail(FAILED, &line),
        },
    };
    // Blocking calls that hang on a dying disk must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    code
}

async fn carry_out(env: Env, config: &Config, command: Command) -> Result<String, StartError> {
    match command {
        Command::Backup { out } => operate::backup(&env, config, &out).await,
        Command::Restore { file, discard_newer } => {
            operate::restore(&env, config, &file, discard_newer).await
        }
        Command::Recover { others_are_lost } => operate::recover(&env, config, others_are_lost).await,
        Command::ForgetNewer => operate::forget_newer(&env, config).await,
    }
}

async fn serve(env: Env, config: Config) -> ExitCode {
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return fail(FAILED, &format!("cannot catch signals: {error}")),
    };
    let start = dfs_master::start(env, config);
    let master: Master = tokio::select! {
        started = start => match started {
            Ok(master) => master,
            Err(error @ StartError::Usage(_)) => return fail(USAGE, &error.to_string()),
            Err(error @ StartError::Failed(_)) => return fail(FAILED, &error.to_string()),
        },
        () = signals.any() => return ExitCode::SUCCESS,
    };
    tracing::info!(address = master.address(), "serving");
    tell(&[NotifyState::Ready]);
    let failure = tokio::select! {
        () = signals.any() => None,
        reason = master.failed() => Some(reason),
    };
    tell(&[NotifyState::Stopping]);
    tracing::info!("stopping");
    tokio::select! {
        () = master.shutdown() => {}
        () = signals.any() => return fail(FAILED, "stopped at once by a second signal"),
    }
    match failure {
        None => ExitCode::SUCCESS,
        Some(reason) => fail(FAILED, &reason),
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Tells systemd, if it listens, how we are.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot tell systemd");
    }
}

/// The one line that says why.
fn fail(code: u8, message: &str) -> ExitCode {
    eprintln!("dfs-master: {}", message.replace('\n', " "));
    ExitCode::from(code)
}
