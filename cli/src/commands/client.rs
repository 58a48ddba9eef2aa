//! `dfs client …`

use super::Context;
use super::status::ask;
use crate::Result;
use crate::error::CliError;
use dfs_client::v1::EvictRequest;
use dfs_client::v1::admin_client::AdminClient;
use dfs_env::rpc::{Tuning, connect};
use dfs_proto::SessionId;
use dfs_proto::token::ClusterKey;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How long the master may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How often it is looked whether the session has ended.
const LOOK: Duration = Duration::from_millis(500);

#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Cut a client off: its opens, locks and leases are free when it cannot believe any longer that it holds them
    Evict {
        /// As `dfs status --clients` lists it
        #[arg(value_name = "SESSION")]
        session: u64,
        /// The cluster key
        #[arg(long, value_name = "FILE", default_value = "/etc/dfs/cluster.key")]
        cluster_key_file: PathBuf,
        /// How long to wait for the session's end, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        wait: u64,
    },
}

pub async fn run(context: &Context, command: Command) -> Result {
    let Command::Evict { session, cluster_key_file, wait } = command;
    let shown = cluster_key_file.display();
    let key = context.env.disk.read(&cluster_key_file);
    let key = key.map_err(|error| CliError::Failed(format!("{shown}: {error}")))?;
    let key = ClusterKey::new(&key).map_err(|error| CliError::Failed(format!("{shown}: {error}")))?;
    let status = ask(context, true).await?;
    let leader = status.masters.iter().find(|master| master.leader).map(|master| master.address.clone());
    let leader = leader.ok_or_else(|| CliError::Failed("no master leads".to_owned()))?;
    let evicting = async {
        let channel =
            connect(&context.env, &leader, Tuning::default()).await.map_err(|error| error.to_string())?;
        let now_ms = context.env.clock.system_ms();
        let proof = key.eviction(SessionId(session), now_ms).to_vec().into();
        let answer = AdminClient::new(channel).evict(EvictRequest { session, now_ms, proof }).await;
        answer.map(drop).map_err(|status| status.message().to_owned())
    };
    match timeout(ANSWER, evicting).await {
        Ok(Ok(())) => {}
        Ok(Err(cause)) => return Err(CliError::Failed(format!("{leader}: {cause}"))),
        Err(_) => return Err(CliError::Failed(format!("{leader}: no answer within {ANSWER:?}"))),
    }
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
