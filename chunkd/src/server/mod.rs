//! What clients and other daemons ask: thin, decode, check, act, reply.

mod append;
mod fetch;
mod read;

use crate::lock;
use crate::replica::Replicas;
use crate::store::Store;
use bytes::Bytes;
use dfs_env::Env;
use dfs_env::Seldom;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{APPEND_MEMORY, READ_MEMORY};
use dfs_proto::token::{ClusterKey, Rights};
use dfs_proto::{ChunkId, FsError, FsResult, PROTOCOL_VERSION, v1};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// How many chunks' tokens a stream remembers, and for how long it believes one without looking again.
const TOKENS: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");
const TOKEN_CHECK_MS: u64 = 5_000;

/// What all streams of a daemon share.
pub(crate) struct Context {
    pub env: Env,
    pub store: Store,
    pub key: ClusterKey,
    pub node: u64,
    pub address: String,
    pub replicas: Replicas,
    /// Payload bytes of clients' appends, of forwarded appends, and of reads' answers. Separate, because an append of a
    /// client waits for another daemon and must never keep that daemon's own appends out here.
    pub append_memory: Arc<Semaphore>,
    pub forwarded_memory: Arc<Semaphore>,
    pub read_memory: Arc<Semaphore>,
    /// Turns true when the daemon stops: streams end.
    pub stopping: watch::Receiver<bool>,
}

impl Context {
    pub(crate) fn new(
        env: Env,
        store: Store,
        key: ClusterKey,
        node: u64,
        address: String,
        stopping: watch::Receiver<bool>,
    ) -> Self {
        let replicas = Replicas::new(env.clone());
        Self {
            env,
            store,
            key,
            node,
            address,
            replicas,
            append_memory: Arc::new(Semaphore::new(APPEND_MEMORY)),
            forwarded_memory: Arc::new(Semaphore::new(APPEND_MEMORY)),
            read_memory: Arc::new(Semaphore::new(READ_MEMORY)),
            stopping,
        }
    }
}

/// The chunk service.
#[derive(Clone)]
pub(crate) struct ChunkService(pub Arc<Context>);

#[tonic::async_trait]
impl v1::chunk_server::Chunk for ChunkService {
    type AppendStream = ReceiverStream<Result<v1::AppendReply, Status>>;
    type ReadStream = ReceiverStream<Result<v1::ReadReply, Status>>;
    type FetchStream = ReceiverStream<Result<v1::FetchReply, Status>>;

    async fn append(
        &self,
        request: Request<Streaming<v1::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let (replies, outgoing) = mpsc::channel(dfs_proto::limits::APPEND_STREAM_REQUESTS);
        tokio::spawn(append::serve(Arc::clone(&self.0), request.into_inner(), replies));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn read(
        &self,
        request: Request<Streaming<v1::ReadRequest>>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let (replies, outgoing) = mpsc::channel(dfs_proto::limits::READ_STREAM_REQUESTS);
        tokio::spawn(read::serve(Arc::clone(&self.0), request.into_inner(), replies));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn fetch(&self, request: Request<v1::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        // One message is on its way while the next one is read from the disk.
        let (replies, outgoing) = mpsc::channel(1);
        tokio::spawn(fetch::serve(Arc::clone(&self.0), request.into_inner(), replies));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

/// Checks what every request carries; remembers the tokens that were good.
struct Gate {
    context: Arc<Context>,
    right: Rights,
    good: Mutex<LruCache<ChunkId, (Bytes, u64)>>,
}

impl Gate {
    fn new(context: Arc<Context>, right: Rights) -> Self {
        Self { context, right, good: Mutex::new(LruCache::new(TOKENS)) }
    }

    /// # Errors
    /// ERROR_VERSION, ERROR_BAD_TOKEN.
    fn check(&self, version: u32, chunk: ChunkId, token: &Bytes) -> FsResult<()> {
        self.judge(version, chunk, token).inspect_err(|error| {
            static REFUSED: Seldom = Seldom::new();
            if let Some(unsaid) = REFUSED.now() {
                tracing::info!(%error, unsaid, "a request was refused");
            }
        })
    }

    fn judge(&self, version: u32, chunk: ChunkId, token: &Bytes) -> FsResult<()> {
        if version != PROTOCOL_VERSION {
            let text =
                format!("this daemon speaks protocol version {PROTOCOL_VERSION}, the peer version {version}");
            return Err(FsError::new(ErrorCode::ErrorVersion, text));
        }
        let now_ms = self.context.env.clock.system_ms();
        if let Some((good, checked_ms)) = lock(&self.good).get(&chunk)
            && good == token
            && (*checked_ms..checked_ms.saturating_add(TOKEN_CHECK_MS)).contains(&now_ms)
        {
            return Ok(());
        }
        self.context
            .key
            .check(token, chunk, self.right, now_ms)
            .map_err(|error| FsError::new(ErrorCode::ErrorBadToken, format!("chunk {chunk}: {error}")))?;
        lock(&self.good).put(chunk, (token.clone(), now_ms));
        Ok(())
    }
}
