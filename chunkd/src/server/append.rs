//! Appends: each record is written here and forwarded to the other replicas at the same time; the answer goes out when
//! all have it.
//!
//! One task takes a stream's requests in order and hands each to the chunk's queue and to the other replicas' streams;
//! it waits for neither. A task for each request gathers the answers. So many records are on their way at once, and
//! the answer to record n does not hold up record n + 1.

use super::{Context, Gate};
use crate::store::append::NewRecord;
use crate::store::durable::Held;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{APPEND_PROGRESS_MS, APPEND_STREAM_REQUESTS, RECORD_MAX, REPLICAS_MAX};
use dfs_proto::token::Rights;
use dfs_proto::{ByteLen, ByteOffset, ChunkId, Epoch, FsError, FsResult, InodeNo, v1};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::{Status, Streaming};

type Replies = mpsc::Sender<Result<v1::AppendReply, Status>>;

/// What a replica holds, or who failed and how.
type ReplicaResult = Result<Reached, Failed>;

/// What all replicas that have answered hold, and what the fullest of their daemons takes besides.
#[derive(Clone, Copy)]
struct Reached {
    held: Held,
    free_bytes: u64,
}

struct Failed {
    error: FsError,
    node: u64,
    address: String,
}

/// Serves one stream until it ends or the daemon stops.
pub(super) async fn serve(
    context: Arc<Context>,
    mut requests: Streaming<v1::AppendRequest>,
    replies: Replies,
) {
    let gate = Gate::new(Arc::clone(&context), Rights::APPEND);
    let slots = Arc::new(Semaphore::new(APPEND_STREAM_REQUESTS));
    let mut stopping = context.stopping.clone();
    loop {
        let request = tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => request,
                Ok(None) => return,
                Err(status) => {
                    tracing::debug!(%status, "an append stream broke");
                    return;
                }
            },
            _ = stopping.wait_for(|stopping| *stopping) => return,
        };
        let (id, chunk) = (request.id, request.chunk);
        if let Err(error) = take(&context, &gate, &slots, request, &replies).await
            && replies.send(Ok(context.refusal(id, chunk, error))).await.is_err()
        {
            return;
        }
    }
}

/// Checks a request, hands it to all replicas, and leaves a task that answers it.
async fn take(
    context: &Arc<Context>,
    gate: &Gate,
    slots: &Arc<Semaphore>,
    mut request: v1::AppendRequest,
    replies: &Replies,
) -> FsResult<()> {
    let chunk = ChunkId(request.chunk);
    gate.check(request.version, chunk, &request.token)?;
    let forward = std::mem::take(&mut request.forward);
    if request.payload.len() > RECORD_MAX
        || forward.len() >= REPLICAS_MAX as usize
        || forward.contains(&context.address)
    {
        let text = format!("chunk {chunk}: {} bytes, {} replicas", request.payload.len(), forward.len());
        return Err(FsError::new(ErrorCode::ErrorInvalid, text));
    }
    let memory = if forward.is_empty() { &context.forwarded_memory } else { &context.append_memory };
    let permits = (
        permit(slots, 1).await?,
        permit(memory, u32::try_from(request.payload.len()).expect("at most RECORD_MAX")).await?,
    );
    let mut answers = Vec::with_capacity(forward.len());
    for address in forward {
        let answer = context.replicas.forward(&address, request.clone()).await;
        answers.push((address, answer));
    }
    let (id, sync) = (request.id, request.sync);
    let here = context.store.append(chunk, new_record(request), sync);
    let (context, replies) = (Arc::clone(context), replies.clone());
    tokio::spawn(async move {
        let mut all = FuturesUnordered::new();
        let local = context.append_here(chunk, here);
        let remote = answers.into_iter().map(async |(address, answer)| {
            let given_up = |_| Err(FsError::new(ErrorCode::ErrorUnavailable, format!("{address}: given up")));
            match answer.await.unwrap_or_else(given_up) {
                Ok(v1::AppendReply { failure: Some(failure), failed_node: node, .. }) => {
                    Err(Failed { error: failure.into(), node, address })
                }
                Ok(reply) => Ok(Reached {
                    held: Held { length: reply.length, synced: reply.synced },
                    free_bytes: reply.free_bytes,
                }),
                // A daemon that does not answer does not tell its number.
                Err(error) => Err(Failed { error, node: 0, address }),
            }
        });
        all.push(futures::future::Either::Left(local));
        for answer in remote {
            all.push(futures::future::Either::Right(answer));
        }
        let reply = match gather(&mut all).await {
            Ok(Reached { held, free_bytes }) => v1::AppendReply {
                id,
                chunk: chunk.get(),
                length: held.length,
                synced: held.synced,
                free_bytes,
                ..Default::default()
            },
            Err(Failed { error, node, address }) => v1::AppendReply {
                id,
                chunk: chunk.get(),
                failure: Some(error.into()),
                failed_node: node,
                failed_address: address,
                ..Default::default()
            },
        };
        // The client may be gone; nobody else wants the answer.
        drop(replies.send(Ok(reply)).await);
        // After a failure others may still work on the bytes: these are counted until they are done, which is bounded.
        while all.next().await.is_some() {}
        drop(permits);
    });
    Ok(())
}

async fn permit(semaphore: &Arc<Semaphore>, count: u32) -> FsResult<OwnedSemaphorePermit> {
    Arc::clone(semaphore)
        .acquire_many_owned(count)
        .await
        .map_err(|closed| FsError::new(ErrorCode::ErrorUnavailable, closed.to_string()))
}

fn new_record(request: v1::AppendRequest) -> NewRecord {
    NewRecord {
        epoch: Epoch(request.epoch),
        offset: ByteOffset(request.offset),
        ino: InodeNo(request.ino),
        file_offset: ByteOffset(request.file_offset),
        checksums: request.checksums,
        payload: request.payload,
        capacity: ByteLen(request.capacity),
    }
}

/// What all replicas hold; the first failure ends the wait.
async fn gather(all: &mut FuturesUnordered<impl Future<Output = ReplicaResult>>) -> ReplicaResult {
    let mut least = Reached { held: Held { length: u64::MAX, synced: u64::MAX }, free_bytes: u64::MAX };
    while let Some(one) = all.next().await {
        let Reached { held, free_bytes } = one?;
        least.held.length = least.held.length.min(held.length);
        least.held.synced = least.held.synced.min(held.synced);
        least.free_bytes = least.free_bytes.min(free_bytes);
    }
    Ok(least)
}

impl Context {
    fn refusal(&self, id: u64, chunk: u64, error: FsError) -> v1::AppendReply {
        let (failed_node, failed_address) = (self.node, self.address.clone());
        v1::AppendReply {
            id,
            chunk,
            failure: Some(error.into()),
            failed_node,
            failed_address,
            ..Default::default()
        }
    }

    /// The answer of this daemon's own disk: given up when the chunk made no progress for APPEND_PROGRESS_MS.
    async fn append_here(
        &self,
        chunk: ChunkId,
        append: impl Future<Output = FsResult<Held>>,
    ) -> ReplicaResult {
        let mut append = pin!(append);
        let bound = Duration::from_millis(APPEND_PROGRESS_MS);
        let mut seen = self.store.progress(chunk);
        let error = loop {
            match tokio::time::timeout(bound, append.as_mut()).await {
                Ok(Ok(held)) => {
                    return Ok(Reached { held, free_bytes: self.store.free_bytes() });
                }
                Ok(Err(error)) => break error,
                Err(_) => {}
            }
            let now = self.store.progress(chunk);
            if now == seen {
                let text = format!("chunk {chunk}: the disk made no progress within {bound:?}");
                break FsError::new(ErrorCode::ErrorTimedOut, text);
            }
            seen = now;
        };
        Err(Failed { error, node: self.node, address: self.address.clone() })
    }
}
