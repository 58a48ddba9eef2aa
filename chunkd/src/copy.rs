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
use dfs_proto::v1::chunk_client::ChunkClient;
use dfs_proto::{ByteLen, ChunkId, Epoch, FsError, FsResult, PROTOCOL_VERSION, SessionId, v1};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Channel;

/// How often it is looked whether a copy that is being made already is done.
const JOIN: Duration = Duration::from_millis(200);

/// Makes copies for a daemon.
pub struct Copier {
    pub(crate) env: Env,
    pub(crate) store: Store,
    pub(crate) key: ClusterKey,
    throttle: Throttle,
    /// Of what is gathered: it must not take from what repair may.
    pub(crate) gathering: Throttle,
}

/// Whose fault it is that no more records come.
pub(crate) enum Failed {
    /// The source's: another one is asked.
    There(FsError),
    /// This daemon's disk has failed or is full: the copy is given up.
    Here(FsError),
}

/// A replica as it will be.
pub(crate) struct Whole {
    pub chunk: ChunkId,
    pub epoch: Epoch,
    pub capacity: ByteLen,
    pub length: u64,
}

/// How a replica's making begins.
pub(crate) enum Begun {
    /// It is here already.
    Here(Settled),
    Making(Making),
}

/// A replica that is being made: by one task, on the disk's threads.
#[derive(Clone)]
pub(crate) struct Making(Arc<Mutex<Draft>>);

impl Making {
    pub(crate) fn length(&self) -> u64 {
        lock(&self.0).length()
    }
}

/// Lets so many bytes pass in a second, for all copies together.
#[derive(Default)]
pub(crate) struct Throttle(Mutex<Option<Instant>>);

impl Throttle {
    /// Waits until `bytes` more may pass; a rate of 0 lets everything pass.
    pub(crate) async fn pass(&self, bytes: u64, bytes_per_second: u64) {
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
        Self { env, store, key, throttle: Throttle::default(), gathering: Throttle::default() }
    }

    /// Carries out a copy order: answers when the replica is whole, in its place and durable.
    ///
    /// # Errors
    /// ERROR_BUSY while the chunk is being copied here already; ERROR_NO_SPACE; ERROR_UNAVAILABLE or ERROR_CORRUPT when
    /// the sources together do not have every record; what the disk says.
    pub async fn copy(&self, order: v1::CopyOrder) -> FsResult<Settled> {
        let what = Whole {
            chunk: ChunkId(order.chunk),
            epoch: Epoch(order.epoch),
            capacity: ByteLen(order.capacity),
            length: order.length,
        };
        let draft = match self.begin(&what, order.anew).await? {
            Begun::Here(settled) => return Ok(settled),
            Begun::Making(draft) => draft,
        };
        self.gather(&draft, &order).await?;
        self.install(what.chunk, draft).await
    }

    /// Begins to make a replica, unless a good one is here; `anew`: the one that is here is not good.
    pub(crate) async fn begin(&self, what: &Whole, mut anew: bool) -> FsResult<Begun> {
        loop {
            if !anew && let Some(settled) = self.is_here(what).await {
                return Ok(Begun::Here(settled));
            }
            match self.store.draft(what.chunk, what.epoch, what.capacity, what.length).await {
                // The order was repeated: the copy that is being made is the one that is wanted.
                Err(error) if error.code == ErrorCode::ErrorBusy => {
                    anew = false;
                    tokio::time::sleep(JOIN).await;
                }
                draft => return Ok(Begun::Making(Making(Arc::new(Mutex::new(draft?))))),
            }
        }
    }

    /// Closes a replica that has every record, makes it durable and puts it in its place.
    pub(crate) async fn install(&self, chunk: ChunkId, draft: Making) -> FsResult<Settled> {
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
                    Err(Failed::Here(error)) => return Err(error),
                    Err(Failed::There(error)) => {
                        tracing::info!(%chunk, source, %error, at = draft.length(), "a source of a copy failed");
                        // It says nothing about the disk here, whatever it says about the one there.
                        let code = match error.code {
                            code @ (ErrorCode::ErrorCorrupt | ErrorCode::ErrorNoChunk) => code,
                            _ => ErrorCode::ErrorUnavailable,
                        };
                        cause = Some(FsError { code, ..error }.during(source));
                    }
                }
            }
            match self.take_own(draft, order).await {
                Ok(()) => return Ok(()),
                Err(Failed::Here(error)) => return Err(error),
                Err(Failed::There(error)) if cause.is_none() => cause = Some(error),
                Err(Failed::There(error)) => {
                    tracing::debug!(%chunk, %error, "nothing more for the copy is here");
                }
            }
            if let Some(cause) = cause.filter(|_| draft.length() == before) {
                let text = format!("chunk {chunk}: no source has the record at offset {before}");
                return Err(cause.during(text));
            }
        }
    }

    /// A good replica that is here already.
    async fn is_here(&self, what: &Whole) -> Option<Settled> {
        let good = |found: &v1::ChunkFound| found.sealed && !found.damaged && found.length == what.length;
        self.store.found(what.chunk).filter(good)?;
        // After everything that was ordered before, a deletion perhaps; and what a start found may not be on the disk yet.
        let seal = ChunkOrder::Seal { epoch: what.epoch, length: what.length };
        self.store.order(what.chunk, seal).await.ok()
    }

    /// Records of the replica that is here and was found damaged.
    async fn take_own(&self, draft: &Making, order: &v1::CopyOrder) -> Result<(), Failed> {
        let chunk = ChunkId(order.chunk);
        while draft.length() < order.length {
            let records =
                self.store.records(chunk, draft.length(), order.length).await.map_err(Failed::There)?;
            self.add(draft, records).await?;
        }
        Ok(())
    }

    /// Takes records from one source until the copy is whole or the source fails.
    async fn fetch(&self, draft: &Making, order: &v1::CopyOrder, source: &str) -> Result<(), Failed> {
        let bound = Duration::from_millis(FETCH_PROGRESS_MS);
        let late = |_| {
            Failed::There(FsError::new(ErrorCode::ErrorTimedOut, format!("nothing came within {bound:?}")))
        };
        let opening = self.open(draft.length(), order, source);
        let mut replies = tokio::time::timeout(bound, opening).await.map_err(late)?.map_err(Failed::There)?;
        while draft.length() < order.length {
            let reply = tokio::time::timeout(bound, replies.message()).await.map_err(late)?;
            let reply = reply.map_err(|status| Failed::There(unavailable(&status)))?;
            let Some(reply) = reply else {
                let ended = FsError::new(ErrorCode::ErrorUnavailable, "it ended the stream");
                return Err(Failed::There(ended));
            };
            if let Some(failure) = reply.failure {
                return Err(Failed::There(failure.into()));
            }
            let bytes = reply.records.iter().map(|record| record.payload.len() as u64).sum();
            self.add(draft, reply.records).await?;
            self.throttle.pass(bytes, order.bytes_per_second).await;
        }
        Ok(())
    }

    /// A client of another daemon, and a token to read a chunk there.
    pub(crate) async fn reach(
        &self,
        source: &str,
        chunk: ChunkId,
    ) -> FsResult<(ChunkClient<Channel>, bytes::Bytes)> {
        let connecting = rpc::connect(&self.env, source, Tuning::default());
        let bound = Duration::from_millis(CONNECT_MS);
        let channel = tokio::time::timeout(bound, connecting)
            .await
            .map_err(|_| FsError::new(ErrorCode::ErrorTimedOut, format!("not connected within {bound:?}")))?
            .map_err(|error| FsError::new(ErrorCode::ErrorUnavailable, error.to_string()))?;
        let expiry = self.env.clock.system_ms().saturating_add(FETCH_TOKEN_MS);
        let token = self.key.issue(SessionId(0), chunk, Rights::READ, expiry);
        Ok((ChunkClient::new(channel).max_decoding_message_size(MESSAGE_MAX), token.into()))
    }

    async fn open(
        &self,
        offset: u64,
        order: &v1::CopyOrder,
        source: &str,
    ) -> FsResult<Streaming<v1::FetchReply>> {
        let (mut client, token) = self.reach(source, ChunkId(order.chunk)).await?;
        let request = v1::FetchRequest {
            version: PROTOCOL_VERSION,
            chunk: order.chunk,
            offset,
            length: order.length,
            token,
        };
        Ok(client.fetch(request).await.map_err(|status| unavailable(&status))?.into_inner())
    }

    pub(crate) async fn add(&self, draft: &Making, records: Vec<v1::FetchedRecord>) -> Result<(), Failed> {
        let draft = draft.clone();
        let added = self.env.blocking(move || Ok(lock(&draft.0).add(&records))).await;
        match added.map_err(FsError::from).and_then(std::convert::identity) {
            Ok(()) => Ok(()),
            Err(error) if error.code == ErrorCode::ErrorCorrupt => Err(Failed::There(error)),
            Err(error) => Err(Failed::Here(error)),
        }
    }
}

pub(crate) fn unavailable(status: &tonic::Status) -> FsError {
    FsError::new(ErrorCode::ErrorUnavailable, status.message())
}
