//! `dfs master …`

use super::Context;
use super::leader::KeyFile;
use super::status::{ask, master_json, master_table};
use crate::Result;
use crate::error::CliError;
use dfs_client::v1::change_master_request::Change;
use dfs_client::v1::{ChangeMasterReply, ChangeMasterRequest};
use serde_json::json;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often it is looked whether a master votes.
const LOOK: Duration = Duration::from_millis(250);

#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// List the masters
    Ls,
    /// Take a master into the group that runs with an empty data directory and `join = true`; it votes when it has caught up
    Add {
        /// Where the others reach it
        #[arg(value_name = "HOST:PORT", value_parser = address)]
        address: String,
        #[command(flatten)]
        key: KeyFile,
        /// How long to wait until it votes, in seconds; 0: not at all
        #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(0..=604_800))]
        wait: u64,
    },
    /// Take a master out of the group; it may be dead
    Remove {
        /// Its number, as `dfs master ls` lists it
        #[arg(value_name = "MASTER", value_parser = clap::value_parser!(u64).range(1..))]
        id: u64,
        #[command(flatten)]
        key: KeyFile,
    },
}

fn address(text: &str) -> std::result::Result<String, String> {
    let valid = text.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains(['/', ' ', ',']) && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if valid { Ok(text.to_owned()) } else { Err("not host:port".to_owned()) }
}

pub async fn run(context: &Context, command: Command) -> Result {
    match command {
        Command::Ls => {
            let status = ask(context, false).await?;
            if context.output.json {
                context.output.value(&master_json(&status.masters))
            } else {
                context.output.text(&master_table(&status.masters))
            }
        }
        Command::Add { address, key, wait } => add(context, &address, &key, Duration::from_secs(wait)).await,
        Command::Remove { id, key } => {
            let reply = order(context, &key, Change::Remove, id, "").await?;
            let line = if reply.known { "was removed" } else { "is none of the masters" };
            context
                .output
                .summary(&json!({"master": id, "removed": reply.known}), &format!("master {id} {line}"))
        }
    }
}

async fn order(
    context: &Context,
    key: &KeyFile,
    change: Change,
    id: u64,
    address: &str,
) -> Result<ChangeMasterReply> {
    let what = match change {
        Change::Add => format!("add master {address}"),
        Change::Remove | Change::None => "remove master".to_owned(),
    };
    let reply = key.order(context, async |mut master, by| {
        let (now_ms, proof, address) = (by.now_ms(), by.proof(&what, id), address.to_owned());
        master.change_master(ChangeMasterRequest { change: change.into(), id, address, now_ms, proof }).await
    });
    Ok(reply.await?.into_inner())
}

/// Has a master added, and waits until it votes.
async fn add(context: &Context, address: &str, key: &KeyFile, wait: Duration) -> Result {
    let reply = order(context, key, Change::Add, 0, address).await?;
    let (id, mut votes) = (reply.id, reply.done);
    let end = Instant::now() + wait;
    while !votes && Instant::now() < end {
        sleep(LOOK).await;
        // Nobody may lead for a moment.
        if let Ok(status) = ask(context, false).await {
            let Some(master) = status.masters.iter().find(|master| master.id == id) else {
                return Err(CliError::Failed(format!("master {id} was removed meanwhile")));
            };
            votes = master.voter;
        }
    }
    if !votes && !wait.is_zero() {
        let text = format!("master {id} has not caught up within {wait:?}; it votes as soon as it has");
        return Err(CliError::Failed(text));
    }
    let line = if votes { "votes" } else { "is catching up" };
    context.output.summary(&json!({"master": id, "voter": votes}), &format!("master {id} {line}"))
}
