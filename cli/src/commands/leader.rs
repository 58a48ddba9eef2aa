//! Orders to the leading master, which wants to see that whoever gives them has the cluster key.

use super::Context;
use super::status::ask;
use crate::Result;
use crate::error::CliError;
use dfs_client::v1::admin_client::AdminClient;
use dfs_env::rpc::{Tuning, connect};
use dfs_proto::token::ClusterKey;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use tonic::transport::Channel;

/// How long the master may take to answer: it may have others agree, or hand over.
const ANSWER: Duration = Duration::from_secs(20);
/// How long a leader is looked for, and how often.
const PATIENCE: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(250);

#[derive(clap::Args, Debug)]
pub struct KeyFile {
    /// The cluster key
    #[arg(long, value_name = "FILE", default_value = "/etc/dfs/cluster.key")]
    cluster_key_file: PathBuf,
}

/// Who gives orders.
pub struct Authority {
    key: ClusterKey,
    now_ms: u64,
    /// Of the leader.
    challenge: u64,
}

impl Authority {
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    pub fn proof(&self, what: &str, number: u64) -> bytes::Bytes {
        self.key.proof(what, number, self.now_ms, self.challenge).to_vec().into()
    }
}

impl KeyFile {
    /// Has the leader carry out an order. When the leader changes meanwhile the next one is asked: orders may be repeated, each
    /// time with a proof of its own.
    pub async fn order<T>(
        &self,
        context: &Context,
        order: impl AsyncFn(AdminClient<Channel>, Authority) -> std::result::Result<T, tonic::Status>,
    ) -> Result<T> {
        let shown = self.cluster_key_file.display();
        let key = context.env.disk.read(&self.cluster_key_file);
        let key = key.map_err(|error| CliError::Failed(format!("{shown}: {error}")))?;
        let key = ClusterKey::new(&key).map_err(|error| CliError::Failed(format!("{shown}: {error}")))?;
        let end = Instant::now() + PATIENCE;
        let mut doubted = None;
        loop {
            let status = ask(context, false).await;
            if status.is_err() && Instant::now() < end {
                sleep(AGAIN).await;
                continue;
            }
            let status = status?;
            let challenge = status.challenge;
            let leader =
                status.masters.iter().find(|master| master.leader).map(|master| master.address.clone());
            let leader = leader.ok_or_else(|| CliError::Failed("no master leads".to_owned()))?;
            let ordering = async {
                let channel = connect(&context.env, &leader, Tuning::default())
                    .await
                    .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
                let authority =
                    Authority { key: key.clone(), now_ms: context.env.clock.system_ms(), challenge };
                order(AdminClient::new(channel), authority).await
            };
            match timeout(ANSWER, ordering).await {
                Ok(Ok(answer)) => return Ok(answer),
                // Aborted: somebody else has given the same order in this very millisecond.
                Ok(Err(status))
                    if matches!(status.code(), Code::Unavailable | Code::Aborted) && Instant::now() < end =>
                {
                    sleep(AGAIN).await;
                }
                // The key is another one, or the leader that the proof was made for leads no more: which, the next answer shows.
                Ok(Err(status)) if status.code() == Code::Unauthenticated && doubted != Some(challenge) => {
                    doubted = Some(challenge);
                }
                Ok(Err(status)) if status.code() == Code::InvalidArgument => {
                    return Err(CliError::Usage(format!("{leader}: {}", status.message())));
                }
                Ok(Err(status)) => return Err(CliError::Failed(format!("{leader}: {}", status.message()))),
                Err(_) => return Err(CliError::Failed(format!("{leader}: no answer within {ANSWER:?}"))),
            }
        }
    }
}
