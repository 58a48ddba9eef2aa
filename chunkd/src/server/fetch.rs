//! Records of a sealed chunk for another daemon that makes a replica of it.

use super::{Context, Gate};
use dfs_env::Seldom;
use dfs_proto::limits::RECORD_MAX;
use dfs_proto::token::Rights;
use dfs_proto::{ChunkId, FsError, FsResult, v1};
use std::sync::Arc;
use tokio::sync::mpsc;
use tonic::Status;

type Replies = mpsc::Sender<Result<v1::FetchReply, Status>>;

/// Sends records until the asker has all or goes away; a failure is the last message.
pub(super) async fn serve(context: Arc<Context>, request: v1::FetchRequest, replies: Replies) {
    let mut stopping = context.stopping.clone();
    let result = tokio::select! {
        result = send_all(&context, &request, &replies) => result,
        _ = stopping.wait_for(|stopping| *stopping) => return,
        () = replies.closed() => return,
    };
    if let Err(error) = result {
        static FAILED: Seldom = Seldom::new();
        if let Some(unsaid) = FAILED.now() {
            tracing::info!(chunk = request.chunk, %error, unsaid, "records for a copy were not to be had");
        }
        let reply = v1::FetchReply { failure: Some(error.into()), records: Vec::new() };
        // Nobody is left to be told.
        drop(replies.send(Ok(reply)).await);
    }
}

async fn send_all(context: &Arc<Context>, request: &v1::FetchRequest, replies: &Replies) -> FsResult<()> {
    let chunk = ChunkId(request.chunk);
    Gate::new(Arc::clone(context), Rights::READ).check(request.version, chunk, &request.token)?;
    let mut offset = request.offset;
    while offset < request.length {
        let bytes = u32::try_from(2 * RECORD_MAX).expect("a few MiB");
        let memory = context.read_memory.acquire_many(bytes).await;
        let _memory =
            memory.map_err(|closed| FsError::new(v1::ErrorCode::ErrorUnavailable, closed.to_string()))?;
        let records = context.store.records(chunk, offset, request.length).await?;
        let Some(last) = records.last() else {
            let text = format!("chunk {chunk}: no record ends before {}", request.length);
            return Err(FsError::new(v1::ErrorCode::ErrorRange, text));
        };
        offset = last.offset + last.payload.len() as u64;
        // The asker may have gone; the stream ends then.
        drop(replies.send(Ok(v1::FetchReply { failure: None, records })).await);
    }
    Ok(())
}
