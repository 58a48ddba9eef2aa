//! `dfs client …`

use super::Context;
use super::leader::KeyFile;
use super::status::ask;
use crate::Result;
use crate::error::CliError;
use dfs_client::v1::EvictRequest;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often it is looked whether the session has ended.
const LOOK: Duration = Duration::from_millis(500);

#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Cut a client off: its opens, locks and leases are free when it cannot believe any longer that it holds them
    Evict {
        /// As `dfs status --clients` lists it
        #[arg(value_name = "SESSION")]
        session: u64,
        #[command(flatten)]
        key: KeyFile,
        /// How long to wait for the session's end, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        wait: u64,
    },
}

pub async fn run(context: &Context, command: Command) -> Result {
    let Command::Evict { session, key, wait } = command;
    key.order(context, async |mut master, by| {
        let (now_ms, proof) = (by.now_ms(), by.proof("evict", session));
        master.evict(EvictRequest { session, now_ms, proof }).await
    })
    .await?;
    let end = Instant::now() + Duration::from_secs(wait);
    loop {
        let status = ask(context, true).await?;
        if status.sessions.iter().all(|other| other.session != session) {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(CliError::Failed(format!(
                "session {session} is cut off, but did not end within {wait} s"
            )));
        }
        sleep(LOOK).await;
    }
}
