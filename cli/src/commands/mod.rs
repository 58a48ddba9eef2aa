//! The commands, one a file.

mod append;
mod cat;
mod client;
mod df;
mod fsck;
mod gc;
mod get;
mod leader;
mod ls;
mod master;
mod mkdir;
mod mv;
mod node;
mod put;
mod rm;
mod set;
mod stat;
mod status;
mod sync;
mod tree;

use crate::Result;
use crate::error::CliError;
use crate::output::Output;
use crate::remote::Remote;
use crate::settings;
use clap::{Parser, Subcommand};
use dfs_client::ClientConfig;
use dfs_env::Env;

/// Works with the files of a dfs cluster without mounting it, and shows the cluster's state.
#[derive(Parser, Debug)]
#[command(name = "dfs", version, max_term_width = 100)]
pub struct Cli {
    /// Addresses of the masters, separated by commas
    #[arg(long, global = true, env = "DFS_MASTERS", value_name = "HOST:PORT,…")]
    masters: Option<String>,
    /// Answer in JSON
    #[arg(long, global = true)]
    json: bool,
    /// No progress bars and no summaries
    #[arg(short, long, global = true)]
    quiet: bool,
    /// How long to wait for the cluster (default: 10 to connect, 60 for an operation)
    #[arg(long, global = true, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,
    /// Tell on standard error what is being done
    #[arg(long, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Copy local files, trees (-r) or standard input (-) into the cluster
    Put(put::Args),
    /// Copy files or trees (-r) out of the cluster, or a file to standard output (-)
    Get(get::Args),
    /// Write files to standard output
    Cat(cat::Args),
    /// Add a local file or standard input (-) to the end of a file
    Append(append::Args),
    /// List directories
    Ls(ls::Args),
    /// Show a directory and everything below it
    Tree(tree::Args),
    /// Remove files, and directories with what is in them (-r)
    Rm(rm::Args),
    /// Make directories
    Mkdir(mkdir::Args),
    /// Rename files and directories, or move them into a directory
    Mv(mv::Args),
    /// Show everything about files
    Stat(stat::Args),
    /// Set how files and directories are kept: replicas, chunk size
    Set(set::Args),
    /// Show how much space there is
    Df(df::Args),
    /// Show the state of the cluster
    Status(status::Args),
    /// Show and manage the chunk daemons
    #[command(subcommand)]
    Node(node::Command),
    /// Show, add and remove masters
    #[command(subcommand)]
    Master(master::Command),
    /// Check the whole cluster while it works: metadata, and that every replica is there
    Fsck(fsck::Args),
    /// Give space back at once that files need no more, or say how much that is
    Gc(gc::Args),
    /// Manage the clients
    #[command(subcommand)]
    Client(client::Command),
    /// Make everything durable that was written through a mount
    Sync(sync::Args),
}

/// What every command is given.
pub struct Context {
    pub env: Env,
    pub output: Output,
    masters: Option<String>,
    timeout_s: Option<u64>,
}

impl Context {
    /// The settings: where the masters are, memory, time-outs.
    pub fn config(&self) -> Result<ClientConfig> {
        settings::load(&self.env, self.masters.as_deref(), self.timeout_s)
    }

    /// Connects, lets `work` work, and ends the session, which flushes.
    async fn with_remote<T>(&self, work: impl AsyncFnOnce(&Remote) -> Result<T>) -> Result<T> {
        let remote = Remote::connect(self.env.clone(), self.config()?).await?;
        let result = work(&remote).await;
        let closed = remote.close().await;
        let value = result?;
        closed?;
        Ok(value)
    }
}

/// Runs the command that the command line names.
pub async fn run(cli: Cli) -> Result {
    let output = Output { json: cli.json, quiet: cli.quiet };
    let context = Context { env: Env::real(), output, masters: cli.masters, timeout_s: cli.timeout };
    match cli.command {
        Command::Put(args) => put::run(&context, args).await,
        Command::Get(args) => get::run(&context, args).await,
        Command::Cat(args) => cat::run(&context, args).await,
        Command::Append(args) => append::run(&context, args).await,
        Command::Ls(args) => ls::run(&context, args).await,
        Command::Tree(args) => tree::run(&context, args).await,
        Command::Rm(args) => rm::run(&context, args).await,
        Command::Mkdir(args) => mkdir::run(&context, args).await,
        Command::Mv(args) => mv::run(&context, args).await,
        Command::Stat(args) => stat::run(&context, args).await,
        Command::Set(args) => set::run(&context, args).await,
        Command::Df(args) => df::run(&context, args).await,
        Command::Status(args) => status::run(&context, args).await,
        Command::Node(command) => node::run(&context, command).await,
        Command::Master(command) => master::run(&context, command).await,
        Command::Fsck(args) => fsck::run(&context, args).await,
        Command::Gc(args) => gc::run(&context, args).await,
        Command::Client(command) => client::run(&context, command).await,
        Command::Sync(args) => sync::run(&context, args).await,
    }
}

/// Goes through several arguments: each error is reported at once and the others go on.
struct Each {
    failed: bool,
}

impl Each {
    fn new() -> Self {
        Self { failed: false }
    }

    /// Takes note of one result. What ends the whole command is handed on.
    fn note<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(CliError::Failed(line)) => {
                eprintln!("dfs: {line}");
                self.failed = true;
                Ok(None)
            }
            Err(CliError::Reported) => {
                self.failed = true;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn end(self) -> Result {
        if self.failed { Err(CliError::Reported) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn one_error_of_several_is_remembered_and_interrupts_end_everything() {
        let mut each = Each::new();
        assert_eq!(each.note(Ok(1)).expect("noted"), Some(1));
        assert_eq!(each.note::<()>(Err(CliError::Reported)).expect("noted"), None);
        assert!(matches!(each.note::<()>(Err(CliError::Interrupted)), Err(CliError::Interrupted)));
        assert_eq!(each.end().expect_err("failed").status(), 1);
    }
}
