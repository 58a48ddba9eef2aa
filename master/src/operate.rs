//! What an operator has `dfs-master` do besides serving: backups, and making a data directory from one.
//!
//! A backup is asked of the leader over the network, with the cluster key: the data directory of a running master is locked,
//! only the leader surely has everything that was acknowledged, and so it is taken on any machine that has the key.

use crate::raft::{self, Restore};
use crate::server::backup::{PART, part_bytes};
use crate::{Config, StartError};
use dfs_env::Env;
use dfs_env::rpc::{Tuning, connect};
use dfs_proto::limits::{BACKUP_PROGRESS_MS, MESSAGE_MAX};
use dfs_proto::v1::admin_client::AdminClient;
use dfs_proto::v1::{BackupPart, BackupRequest, ForgetNewerRequest, StatusReply, StatusRequest};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// How long a master may take to say who leads, or to carry out an order.
const ANSWER: Duration = Duration::from_secs(10);
/// How often an order is proved anew, and how long after the one before.
const PROOFS: usize = 5;
const AGAIN: Duration = Duration::from_millis(100);

fn failed(text: impl std::fmt::Display) -> StartError {
    StartError::Failed(text.to_string().replace('\n', " "))
}

/// Writes a backup of the running cluster's state to a file that does not exist yet; answers a line for people. The file is
/// complete, checked and durable, or not there.
///
/// # Errors
/// `Usage` when the file exists; `Failed` when no leader gives a whole backup or the file cannot be written.
pub async fn backup(env: &Env, config: &Config, out: &Path) -> Result<String, StartError> {
    let shown = out.display();
    if out.try_exists().map_err(|error| failed(format!("{shown}: {error}")))? {
        return Err(StartError::Usage(format!("{shown} exists already: a backup overwrites nothing")));
    }
    let draft = Draft::new(env, out)?;
    let begin = async |mut master: AdminClient<Channel>, now_ms, proof| {
        let parts = master.backup(BackupRequest { now_ms, proof }).await?;
        Ok((now_ms, parts.into_inner()))
    };
    let (address, (now_ms, mut parts)) = order(env, config, "backup", begin).await?;
    let mut at = 0;
    while let Some(part) = next_part(&mut parts, &address).await? {
        if !config.key.verify(PART, &part_bytes(now_ms, at, part.last, &part.data), &part.proof) {
            return Err(failed(format!("{address}: a part of the backup has a wrong proof")));
        }
        draft.add(env, &part.data).await?;
        at += part.data.len() as u64;
        if part.last {
            let cluster = config.key.cluster_id();
            let index = draft.finish(env, out, cluster).await?;
            return Ok(format!("{shown}: {at} bytes, everything up to log entry {index}"));
        }
    }
    Err(failed(format!("{address}: the backup ended before its last part")))
}

async fn next_part(
    parts: &mut Streaming<BackupPart>,
    address: &str,
) -> Result<Option<BackupPart>, StartError> {
    let bound = Duration::from_millis(BACKUP_PROGRESS_MS);
    match timeout(bound, parts.message()).await {
        Ok(Ok(part)) => Ok(part),
        Ok(Err(status)) => Err(failed(format!("{address}: {}", status.message()))),
        Err(_) => Err(failed(format!("{address}: nothing came for {bound:?}"))),
    }
}

/// A backup that is being written: gone when it is dropped before it is finished.
struct Draft {
    file: fs::File,
    path: PathBuf,
}

impl Draft {
    /// A file of its own beside `out`: others may be writing a backup of that name, too.
    fn new(env: &Env, out: &Path) -> Result<Self, StartError> {
        let mut path = out.as_os_str().to_owned();
        path.push(format!(".{:016x}.part", env.random()));
        let path = PathBuf::from(path);
        // Whoever may read it reads every name in the file system.
        let mut options = fs::OpenOptions::new();
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|error| failed(format!("{}: {error}", path.display())))?;
        Ok(Self { file, path })
    }

    async fn add(&self, env: &Env, data: &bytes::Bytes) -> Result<(), StartError> {
        let wrong = |error: io::Error| failed(format!("{}: {error}", self.path.display()));
        let (mut file, data) = (self.file.try_clone().map_err(wrong)?, data.clone());
        env.blocking(move || file.write_all(&data)).await.map_err(wrong)
    }

    /// Checks what was written as it stands on the disk, and gives it its name. Answers the log entry that it is as of.
    async fn finish(self, env: &Env, out: &Path, cluster: String) -> Result<u64, StartError> {
        let wrong = |error: io::Error| failed(format!("{}: {error}", self.path.display()));
        let (file, path) = (self.file.try_clone().map_err(wrong)?, self.path.clone());
        let (out, dir) = (out.to_owned(), directory(out));
        let finish = move || {
            file.sync_all()?;
            let (found, index) = raft::check_backup(&path)?;
            if found != cluster {
                return Err(io::Error::other(format!("it is of cluster {found}, not of {cluster}")));
            }
            // Not over a file that somebody has made meanwhile.
            let named = fs::hard_link(&path, &out);
            named
                .map_err(|error| io::Error::other(format!("cannot be called {}: {error}", out.display())))?;
            fs::remove_file(&path)?;
            fs::File::open(dir)?.sync_all()?;
            Ok(index)
        };
        env.blocking(finish).await.map_err(wrong)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(file = %self.path.display(), %error, "cannot remove an unfinished backup");
            }
            _ => {}
        }
    }
}

fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Makes this master's empty data directory from a backup; answers a line for people.
///
/// # Errors
/// See [`Restore::run`].
pub async fn restore(
    env: &Env,
    config: &Config,
    file: &Path,
    discard_newer: bool,
) -> Result<String, StartError> {
    let done = restore_of(env, config, file, discard_newer).run(env).await?;
    Ok(format!(
        "{}: {} files and {} chunks as of log entry {}; this master is a group of one",
        config.data.display(),
        done.files,
        done.chunks,
        done.index
    ))
}

fn restore_of(env: &Env, config: &Config, file: &Path, discard_newer: bool) -> Restore {
    Restore {
        dir: config.data.clone(),
        id: config.id,
        address: config.advertised().to_owned(),
        cluster: config.key.cluster_id(),
        file: file.to_owned(),
        discard_newer,
        now_ms: env.clock.system_ms(),
    }
}

/// Makes this master, which is stopped, a group of one with what it has itself: the others are lost. Answers a line for people.
///
/// # Errors
/// `Usage` without the confirmation; see [`raft::recover_alone`].
pub async fn recover(env: &Env, config: &Config, confirmed: bool) -> Result<String, StartError> {
    if !confirmed {
        let text = "what only the other masters have is lost for good, and they must never run again with their data: say so \
                    with --others-are-lost";
        return Err(StartError::Usage(text.to_owned()));
    }
    let restore = restore_of(env, config, Path::new(""), false);
    let done = raft::recover_alone(env, restore, config.state_cache_bytes).await?;
    Ok(format!(
        "{}: {} files and {} chunks as of log entry {}; this master is a group of one; what was there before is in {}",
        config.data.display(),
        done.files,
        done.chunks,
        done.index,
        raft::BEFORE_RECOVERY
    ))
}

/// Has the cluster delete what was made after the backup that it was restored from; answers a line for people.
///
/// # Errors
/// `Failed` when no leader does it.
pub async fn forget_newer(env: &Env, config: &Config) -> Result<String, StartError> {
    let forget = async |mut master: AdminClient<Channel>, now_ms, proof| {
        master.forget_newer(ForgetNewerRequest { now_ms, proof }).await
    };
    order(env, config, "forget newer", forget).await?;
    Ok("chunks made after the backup are being deleted".to_owned())
}

/// Has the leader begin something, which `call` asks it for at a time and with a proof for that. Answers the leader, too.
async fn order<T>(
    env: &Env,
    config: &Config,
    what: &str,
    call: impl AsyncFn(AdminClient<Channel>, u64, bytes::Bytes) -> Result<T, Status>,
) -> Result<(String, T), StartError> {
    let mut tries = 0;
    loop {
        let Leader { address, challenge, client } = leader(env, config).await?;
        let now_ms = env.clock.system_ms();
        let proof = config.key.proof(what, 0, now_ms, challenge).to_vec().into();
        tries += 1;
        match timeout(ANSWER, call(client, now_ms, proof)).await {
            Ok(Ok(answer)) => return Ok((address, answer)),
            // Another leader, or somebody else with the same order in this very millisecond: another proof is needed.
            Ok(Err(status))
                if matches!(status.code(), Code::Unauthenticated | Code::Aborted) && tries < PROOFS =>
            {
                tokio::time::sleep(AGAIN).await;
            }
            Ok(Err(status)) => return Err(failed(format!("{address}: {}", status.message()))),
            Err(_) => return Err(failed(format!("{address}: no answer within {ANSWER:?}"))),
        }
    }
}

/// The master that leads, and what proofs are made for as long as it does.
struct Leader {
    address: String,
    challenge: u64,
    client: AdminClient<Channel>,
}

/// The leading master, as the masters that the settings name say.
async fn leader(env: &Env, config: &Config) -> Result<Leader, StartError> {
    let mut todo = vec![config.advertised().to_owned()];
    todo.extend(config.peers.values().filter(|peer| *peer != config.advertised()).cloned());
    // Each may name another one, which is asked next, once.
    todo.reverse();
    let (mut asked, mut causes) = (Vec::new(), Vec::new());
    while let Some(address) = todo.pop() {
        if asked.contains(&address) {
            continue;
        }
        asked.push(address.clone());
        match timeout(ANSWER, ask(env, &address)).await {
            Ok(Ok((status, client))) if !status.cluster_id.is_empty() => {
                return Ok(Leader { address, challenge: status.challenge, client });
            }
            Ok(Ok((status, _))) => todo.push(status.leader),
            Ok(Err(cause)) => causes.push(cause),
            Err(_) => causes.push(format!("{address}: no answer within {ANSWER:?}")),
        }
    }
    Err(failed(format!("no master leads ({})", causes.join("; "))))
}

/// What a master says of itself: only one that leads names its cluster.
async fn ask(env: &Env, address: &str) -> Result<(StatusReply, AdminClient<Channel>), String> {
    let channel = connect(env, address, Tuning::default()).await.map_err(|error| error.to_string())?;
    let mut client = AdminClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
    let status = client.status(StatusRequest { sessions: false }).await;
    let status = status.map_err(|status| format!("{address}: {}", status.message()))?.into_inner();
    Ok((status, client))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn backups_to_one_name_at_a_time_are_written_apart() {
        let (env, dir) = (Env::real(), tempfile::tempdir().unwrap());
        let out = dir.path().join("backup");
        let (Ok(first), Ok(second)) = (Draft::new(&env, &out), Draft::new(&env, &out)) else {
            panic!("no draft");
        };
        for (draft, data) in [(&first, "one"), (&second, "two"), (&first, "three"), (&second, "four")] {
            draft.add(&env, &bytes::Bytes::from_static(data.as_bytes())).await.map_err(drop).unwrap();
        }
        assert_eq!(fs::read(&first.path).unwrap(), b"onethree");
        assert_eq!(fs::read(&second.path).unwrap(), b"twofour");
        drop(first);
        assert_eq!(
            fs::read(&second.path).unwrap(),
            b"twofour",
            "of another one that was given up nothing is left"
        );
        drop(second);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
