//! Sends a backup of the state to whoever shows that he has the cluster key.

use super::term::Term;
use crate::raft::Backup;
use dfs_proto::limits::BACKUP_PROGRESS_MS;
use dfs_proto::token::ClusterKey;
use dfs_proto::v1::BackupPart;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tonic::Status;

/// What the proof of a part is made of.
pub const PART: &str = "backup part";

/// The bytes whose MAC proves that a part is of this backup, in its place.
#[must_use]
pub fn part_bytes(call_ms: u64, offset: u64, last: bool, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(17 + data.len());
    bytes.extend(call_ms.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes.push(u8::from(last));
    bytes.extend(data);
    bytes
}

/// Sends a backup, until it is complete, nobody listens or takes anything, or this master leads no more. `_alone`: what
/// changes meanwhile is kept in memory, so there is one at a time.
pub async fn run(
    term: Arc<Term>,
    call_ms: u64,
    parts: mpsc::Sender<Result<BackupPart, Status>>,
    _alone: OwnedSemaphorePermit,
) {
    let mut ended = term.ended();
    let result = tokio::select! {
        result = send(&term, call_ms, &parts) => result,
        _ = ended.wait_for(|ended| *ended) => Err(Status::unavailable("this master does not lead any more")),
    };
    match result {
        Ok(bytes) => tracing::info!(bytes, "a backup was taken"),
        Err(status) => {
            tracing::warn!(error = status.message(), "a backup was not completed");
            // Whoever asked may have gone, and takes nothing more if he stands still.
            drop(parts.try_send(Err(status)));
        }
    }
}

async fn send(
    term: &Arc<Term>,
    call_ms: u64,
    parts: &mpsc::Sender<Result<BackupPart, Status>>,
) -> Result<u64, Status> {
    term.shared.confirm().await.map_err(|_| Status::unavailable("this master does not lead any more"))?;
    let env = &term.shared.env;
    let failed = |error: std::io::Error| Status::internal(format!("reading the state: {error}"));
    let node = Arc::clone(&term.shared.node);
    let mut backup = env.blocking(move || node.backup()).await.map_err(failed)?;
    let mut offset = 0;
    loop {
        let step = env.blocking(move || next(backup)).await.map_err(failed)?;
        let (back, bytes) = step;
        backup = back;
        let last = bytes.is_none();
        let data = bytes.unwrap_or_default();
        if data.is_empty() && !last {
            continue;
        }
        let length = data.len() as u64;
        let proof = prove(&term.shared.key, call_ms, offset, last, &data);
        let part = BackupPart { data, last, proof };
        let bound = Duration::from_millis(BACKUP_PROGRESS_MS);
        match tokio::time::timeout(bound, parts.send(Ok(part))).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(Status::cancelled("nobody listens any more")),
            Err(_) => return Err(Status::deadline_exceeded(format!("nothing was taken for {bound:?}"))),
        }
        if last {
            return Ok(offset);
        }
        offset += length;
    }
}

fn next(mut backup: Backup) -> std::io::Result<(Backup, Option<bytes::Bytes>)> {
    let bytes = backup.piece()?;
    Ok((backup, bytes))
}

fn prove(key: &ClusterKey, call_ms: u64, offset: u64, last: bool, data: &[u8]) -> bytes::Bytes {
    key.mac(PART, &part_bytes(call_ms, offset, last, data)).to_vec().into()
}
