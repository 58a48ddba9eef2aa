//! `dfs node …`

use super::Context;
use super::leader::KeyFile;
use super::status::{ask, node_json, node_table};
use crate::Result;
use crate::error::CliError;
use dfs_client::v1::change_node_request::Change;
use dfs_client::v1::{ChangeNodeRequest, NodeStatus};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often it is looked whether a daemon is empty.
const LOOK: Duration = Duration::from_millis(500);

#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// List the chunk daemons
    Ls,
    /// Give a chunk daemon nothing new, and copy what it has to others
    Drain {
        #[command(flatten)]
        node: Node,
        /// Wait until it is empty, at most so many seconds
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u64>,
    },
    /// Use a drained chunk daemon again
    Undrain {
        #[command(flatten)]
        node: Node,
    },
    /// Forget a dead chunk daemon whose replicas have been made up for
    Remove {
        #[command(flatten)]
        node: Node,
    },
}

#[derive(clap::Args, Debug)]
pub struct Node {
    /// Its number or its address, as `dfs node ls` lists them
    #[arg(value_name = "NODE")]
    name: String,
    #[command(flatten)]
    key: KeyFile,
}

pub async fn run(context: &Context, command: Command) -> Result {
    match command {
        Command::Ls => {
            let status = ask(context, false).await?;
            if context.output.json {
                context.output.value(&node_json(&status.nodes))
            } else {
                context.output.text(&node_table(&status.nodes))
            }
        }
        Command::Drain { node, wait } => {
            let number = change(context, &node, Change::Drain).await?;
            match wait {
                Some(seconds) => emptied(context, number, Duration::from_secs(seconds)).await,
                None => Ok(()),
            }
        }
        Command::Undrain { node } => change(context, &node, Change::Undrain).await.map(drop),
        Command::Remove { node } => change(context, &node, Change::Remove).await.map(drop),
    }
}

/// Has the master change a daemon; its number.
async fn change(context: &Context, node: &Node, change: Change) -> Result<u64> {
    let what = match change {
        Change::Drain => "drain node",
        Change::Undrain => "undrain node",
        Change::Remove | Change::None => "remove node",
    };
    let number = find(&ask(context, false).await?.nodes, &node.name)?;
    let order = async |mut master: dfs_client::v1::admin_client::AdminClient<_>,
                       by: super::leader::Authority| {
        let (now_ms, proof) = (by.now_ms(), by.proof(what, number));
        master.change_node(ChangeNodeRequest { node: number, change: change.into(), now_ms, proof }).await
    };
    node.key.order(context, order).await?;
    Ok(number)
}

/// The number of the daemon that is meant.
fn find(nodes: &[NodeStatus], name: &str) -> Result<u64> {
    let by_number = u64::from_str_radix(name, 16).ok();
    let found: Vec<u64> = nodes
        .iter()
        .filter(|node| Some(node.node) == by_number || node.address == name)
        .map(|node| node.node)
        .collect();
    match found[..] {
        [number] => Ok(number),
        [] => Err(CliError::Failed(format!("there is no chunk daemon {name}"))),
        _ => Err(CliError::Failed(format!(
            "{name} has been the address of several chunk daemons: give a number"
        ))),
    }
}

/// Waits until a daemon has no chunk left.
async fn emptied(context: &Context, number: u64, wait: Duration) -> Result {
    let end = Instant::now() + wait;
    loop {
        let status = ask(context, false).await?;
        let Some(node) = status.nodes.iter().find(|node| node.node == number) else { return Ok(()) };
        if node.chunks == 0 {
            return Ok(());
        }
        if Instant::now() >= end {
            let text = format!("chunk daemon {number:016x} still has {} chunks after {wait:?}", node.chunks);
            return Err(CliError::Failed(text));
        }
        sleep(LOOK).await;
    }
}
