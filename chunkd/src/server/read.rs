//! Reads: many at once, answered as they come.

use super::{Context, Gate};
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{CHECKSUM_UNIT, READ_MAX, READ_STREAM_REQUESTS};
use dfs_proto::token::Rights;
use dfs_proto::{ChunkId, FsError, FsResult, v1};
use std::sync::Arc;
use tokio::sync::{Semaphore, mpsc};
use tonic::{Status, Streaming};

type Replies = mpsc::Sender<Result<v1::ReadReply, Status>>;

/// Serves one stream until it ends or the daemon stops.
pub(super) async fn serve(context: Arc<Context>, mut requests: Streaming<v1::ReadRequest>, replies: Replies) {
    let gate = Arc::new(Gate::new(Arc::clone(&context), Rights::READ));
    let slots = Arc::new(Semaphore::new(READ_STREAM_REQUESTS));
    let mut stopping = context.stopping.clone();
    loop {
        let request = tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => request,
                Ok(None) => return,
                Err(status) => {
                    tracing::debug!(%status, "a read stream broke");
                    return;
                }
            },
            _ = stopping.wait_for(|stopping| *stopping) => return,
        };
        // The semaphore is never closed; a closed one would mean that nothing more is served.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (context, gate, replies) = (Arc::clone(&context), Arc::clone(&gate), replies.clone());
        tokio::spawn(async move {
            let id = request.id;
            let reply = context.read(&gate, request).await.unwrap_or_else(|error| {
                if error.code == ErrorCode::ErrorCorrupt {
                    tracing::error!(%error, "damaged bytes were found on a read");
                }
                v1::ReadReply { failure: Some(error.into()), ..Default::default() }
            });
            // The slot is held until the reply is taken, so a client that reads nothing gets nothing more.
            drop(replies.send(Ok(v1::ReadReply { id, ..reply })).await);
            drop(slot);
        });
    }
}

impl Context {
    async fn read(&self, gate: &Gate, request: v1::ReadRequest) -> FsResult<v1::ReadReply> {
        let chunk = ChunkId(request.chunk);
        gate.check(request.version, chunk, &request.token)?;
        let length = request.length as usize;
        // Whole units at both ends may add to what is asked for.
        let bytes = u32::try_from(length.min(READ_MAX) + 2 * CHECKSUM_UNIT).expect("about READ_MAX");
        let _memory = self
            .read_memory
            .acquire_many(bytes)
            .await
            .map_err(|closed| FsError::new(ErrorCode::ErrorUnavailable, closed.to_string()))?;
        let piece = self.store.read(chunk, request.offset, length).await?;
        Ok(v1::ReadReply { id: 0, failure: None, start: piece.start, units: piece.units, data: piece.data })
    }
}
