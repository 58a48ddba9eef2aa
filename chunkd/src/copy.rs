//! Makes a replica of a sealed chunk from those of other daemons, on the master's order.
//!
//! Records come from one source until it fails or stands still, then from the next one, from where the copy is: two
//! replicas that are damaged in different places make a whole one together. What this daemon has itself comes last.

use crate::lock;
use crate::store::Store;
use crate::store::draft::Draft;
use crate::store::orders::Settled;
use crate::store::queue::ChunkOrder;
use dfs_env::Env;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{CONNECT_MS, FETCH_PROGRESS_MS, FETCH_TOKEN_MS, MESSAGE_MAX};
use dfs_proto::token::{ClusterKey, Rights};
use dfs_proto::{ByteLen, ChunkId, Epoch, FsError, FsResult, PROTOCOL_VERSION, SessionId, v1};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;
use tonic::Streaming;

/// Makes copies for a daemon.
pub struct Copier {
    env: Env,
    store: Store,
    key: ClusterKey,
    throttle: Throttle,
}

/// A replica that is being made: by one task, on the disk's threads.
#[derive(Clone)]
struct Making(Arc<Mutex<Draft>>);

impl Making {
    fn length(&self) -> u64 {
        lock(&self.0).length()
    }
}

/// Lets so many bytes pass in a second, for all copies together.
#[derive(Default)]
struct Throttle(Mutex<Option<Instant>>);

impl Throttle {
    /// Waits until `bytes` more may pass; a rate of 0 lets everything pass.
    async fn pass(&self, bytes: u64, bytes_per_second: u64) {
        if bytes_per_second == 0 {
            return;
        }
        let takes = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
        let begin = {
            let mut free = lock(&self.0);
            let begin = free.unwrap_or_else(Instant::now).max(Instant::now());
            *free = Some(begin + takes);
            begin
        };
        tokio::time::sleep_until(begin).await;
    }
}

impl Copier {
    #[must_use]
    pub fn new(env: Env, store: Store, key: ClusterKey) -> Self {
        Self { env, store, key, throttle: Throttle::default() }
    }

    /// Carries out a copy order: answers when the replica is whole, in its place and durable.
    ///
    /// # Errors
    /// ERROR_BUSY while the chunk is being copied here already; ERROR_NO_SPACE; ERROR_UNAVAILABLE or ERROR_CORRUPT when
    /// the sources together do not have every record; what the disk says.
    pub async fn copy(&self, order: v1::CopyOrder) -> FsResult<Settled> {
        let chunk = ChunkId(order.chunk);
        if let Some(settled) = self.is_here(&order) {
            return Ok(settled);
        }
        let (epoch, capacity) = (Epoch(order.epoch), ByteLen(order.capacity));
        let draft = self.store.draft(chunk, epoch, capacity, order.length).await?;
        let draft = Making(Arc::new(Mutex::new(draft)));
        self.gather(&draft, &order).await?;
        let finishing = draft.clone();
        self.env.blocking(move || Ok(lock(&finishing.0).finish())).await??;
        let Some(draft) = Arc::into_inner(draft.0).and_then(|draft| draft.into_inner().ok()) else {
            return Err(FsError::new(ErrorCode::ErrorIo, format!("chunk {chunk}: the copy is still in use")));
        };
        let settled = self.store.order(chunk, ChunkOrder::Install(Box::new(draft))).await?;
        tracing::debug!(%chunk, length = settled.length, "copied");
        Ok(settled)
    }

    /// Goes round the sources until every record is here, or a whole round brought nothing.
    async fn gather(&self, draft: &Making, order: &v1::CopyOrder) -> FsResult<()> {
        let chunk = ChunkId(order.chunk);
        loop {
            let (before, mut cause) = (draft.length(), None);
            for source in &order.sources {
                match self.fetch(draft, order, source).await {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        tracing::info!(%chunk, source, %error, at = draft.length(), "a source of a copy failed");
                        cause = Some(error.during(source));
                    }
                }
            }
            match self.take_own(draft, order).await {
                Ok(()) => return Ok(()),
                Err(error) if cause.is_none() => cause = Some(error),
                Err(error) => tracing::debug!(%chunk, %error, "nothing more for the copy is here"),
            }
            if let Some(cause) = cause.filter(|_| draft.length() == before) {
                let text = format!("chunk {chunk}: no source has the record at offset {before}");
                return Err(cause.during(text));
            }
        }
    }

    /// A good replica that is here already.
    fn is_here(&self, order: &v1::CopyOrder) -> Option<Settled> {
        let found = self.store.found(ChunkId(order.chunk))?;
        let good = found.sealed && !found.damaged && found.length == order.length && !order.anew;
        good.then_some(Settled { epoch: Epoch(found.epoch), length: found.length, digest: 0 })
    }

    /// Records of the replica that is here and was found damaged.
    async fn take_own(&self, draft: &Making, order: &v1::CopyOrder) -> FsResult<()> {
        let chunk = ChunkId(order.chunk);
        while draft.length() < order.length {
            let records = self.store.records(chunk, draft.length(), order.length).await?;
            self.add(draft, records).await?;
        }
        Ok(())
    }

    /// Takes records from one source until the copy is whole or the source fails.
    async fn fetch(&self, draft: &Making, order: &v1::CopyOrder, source: &str) -> FsResult<()> {
        let bound = Duration::from_millis(FETCH_PROGRESS_MS);
        let late = |_| FsError::new(ErrorCode::ErrorTimedOut, format!("nothing came within {bound:?}"));
        let opening = self.open(draft.length(), order, source);
        let mut replies = tokio::time::timeout(bound, opening).await.map_err(late)??;
        while draft.length() < order.length {
            let reply = tokio::time::timeout(bound, replies.message()).await.map_err(late)?;
            let reply = reply.map_err(|status| unavailable(&status))?;
            let Some(reply) = reply else {
                return Err(FsError::new(ErrorCode::ErrorUnavailable, "it ended the stream"));
            };
            if let Some(failure) = reply.failure {
                return Err(failure.into());
            }
            let bytes = reply.records.iter().map(|record| record.payload.len() as u64).sum();
            self.add(draft, reply.records).await?;
            self.throttle.pass(bytes, order.bytes_per_second).await;
        }
        Ok(())
    }

    async fn open(
        &self,
        offset: u64,
        order: &v1::CopyOrder,
        source: &str,
    ) -> FsResult<Streaming<v1::FetchReply>> {
        let connecting = rpc::connect(&self.env, source, Tuning::default());
        let bound = Duration::from_millis(CONNECT_MS);
        let channel = tokio::time::timeout(bound, connecting)
            .await
            .map_err(|_| FsError::new(ErrorCode::ErrorTimedOut, format!("not connected within {bound:?}")))?
            .map_err(|error| FsError::new(ErrorCode::ErrorUnavailable, error.to_string()))?;
        let expiry = self.env.clock.system_ms().saturating_add(FETCH_TOKEN_MS);
        let token = self.key.issue(SessionId(0), ChunkId(order.chunk), Rights::READ, expiry);
        let request = v1::FetchRequest {
            version: PROTOCOL_VERSION,
            chunk: order.chunk,
            offset,
            length: order.length,
            token: token.into(),
        };
        let mut client = v1::chunk_client::ChunkClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
        Ok(client.fetch(request).await.map_err(|status| unavailable(&status))?.into_inner())
    }

    async fn add(&self, draft: &Making, records: Vec<v1::FetchedRecord>) -> FsResult<()> {
        let draft = draft.clone();
        self.env.blocking(move || Ok(lock(&draft.0).add(&records))).await?
    }
}

fn unavailable(status: &tonic::Status) -> FsError {
    FsError::new(ErrorCode::ErrorUnavailable, status.message())
}
