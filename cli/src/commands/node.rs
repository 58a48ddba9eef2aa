//! `dfs node …`

use super::Context;
use super::status::{ask, node_json, node_table};
use crate::Result;

#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// List the chunk daemons
    Ls,
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
    }
}
