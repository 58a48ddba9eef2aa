//! Long-lived streams to chunk daemons: one for appends and a few for reads an address.

use dfs_env::{Env, rpc};
use dfs_proto::checksum::unit_checksums;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{CONNECT_MS, MESSAGE_MAX};
use dfs_proto::v1::chunk_client::ChunkClient;
use dfs_proto::v1::{AppendReply, AppendRequest, ReadReply, ReadRequest};
use dfs_proto::{FsError, FsResult};
use futures::StreamExt;
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// Appends that may wait for the stream. The write side keeps fewer in flight, so this is never full.
const APPENDS_QUEUED: usize = 16_384;
/// Reads that may wait for the stream; further ones wait with their callers.
const READS_QUEUED: usize = 256;

/// Runs a task that ends with its owner.
pub(crate) struct Task(tokio::task::JoinHandle<()>);

impl Task {
    pub(crate) fn spawn(handle: &Handle, work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(handle.spawn(work))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn unavailable(address: &str, cause: impl std::fmt::Display) -> FsError {
    FsError::new(ErrorCode::ErrorUnavailable, format!("{address}: {cause}"))
}

fn status_error(address: &str, status: &tonic::Status) -> FsError {
    let message = status.message();
    unavailable(address, if message.is_empty() { status.code().description() } else { message })
}

async fn client(env: &Env, address: &str) -> FsResult<ChunkClient<Channel>> {
    let channel = rpc::connect(env, address, rpc::Tuning::default())
        .await
        .map_err(|error| FsError::new(ErrorCode::ErrorUnavailable, error.to_string()))?;
    Ok(ChunkClient::new(channel)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX))
}

/// Opening a stream on a connected channel is one round trip; a daemon that does not answer it hangs.
async fn in_time<T>(address: &str, opening: impl Future<Output = Result<T, tonic::Status>>) -> FsResult<T> {
    match tokio::time::timeout(Duration::from_millis(CONNECT_MS), opening).await {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(status)) => Err(status_error(address, &status)),
        Err(_) => Err(unavailable(address, "the stream was not opened in time")),
    }
}

/// The stream that appends go to one daemon on. Requests keep their order.
pub(crate) struct AppendLink {
    requests: mpsc::Sender<AppendRequest>,
    _task: Task,
}

/// What becomes of an append stream.
pub(crate) enum AppendEvent {
    Reply(AppendReply),
    /// The last event: nothing that was sent is answered any more.
    Down(FsError),
}

impl AppendLink {
    /// Connects in the background. `each` is called for every reply, and once when the stream has ended.
    pub(crate) fn open(
        env: &Env,
        handle: &Handle,
        address: &str,
        each: impl Fn(AppendEvent) + Send + Sync + 'static,
    ) -> Self {
        let (requests, receiver) = mpsc::channel(APPENDS_QUEUED);
        let (env, address) = (env.clone(), address.to_owned());
        let task = Task::spawn(handle, async move {
            let error = match run_appends(&env, &address, receiver, &each).await {
                Err(error) => error,
                Ok(()) => unavailable(&address, "the daemon closed the stream"),
            };
            each(AppendEvent::Down(error));
        });
        Self { requests, _task: task }
    }

    /// Queues a request. False: the stream has ended.
    pub(crate) fn send(&self, request: AppendRequest) -> bool {
        self.requests.try_send(request).is_ok()
    }
}

async fn run_appends(
    env: &Env,
    address: &str,
    requests: mpsc::Receiver<AppendRequest>,
    each: &(impl Fn(AppendEvent) + Send + Sync),
) -> FsResult<()> {
    let mut client = client(env, address).await?;
    // Checksums are computed here, away from the write side's lock, once a record.
    let requests = ReceiverStream::new(requests).map(|mut request: AppendRequest| {
        request.checksums = unit_checksums(&request.payload);
        request
    });
    let mut replies = in_time(address, client.append(requests)).await?.into_inner();
    while let Some(reply) = replies.message().await.map_err(|status| status_error(address, &status))? {
        each(AppendEvent::Reply(reply));
    }
    Ok(())
}

type Pending = Mutex<Option<HashMap<u64, oneshot::Sender<ReadReply>>>>;

/// A stream that reads go to one daemon on. Replies may overtake each other.
pub(crate) struct ReadLink {
    requests: mpsc::Sender<ReadRequest>,
    /// Who waits for which answer. None: the stream has ended.
    pending: Arc<Pending>,
    _task: Task,
}

/// Forgets the question when its asker has gone.
struct Asked<'a> {
    pending: &'a Pending,
    id: u64,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pending) = &mut *pending {
            pending.remove(&self.id);
        }
    }
}

impl ReadLink {
    /// Connects in the background.
    pub(crate) fn open(env: &Env, handle: &Handle, address: &str) -> Self {
        let (requests, receiver) = mpsc::channel(READS_QUEUED);
        let pending: Arc<Pending> = Arc::new(Mutex::new(Some(HashMap::new())));
        let task = {
            let (env, address, pending) = (env.clone(), address.to_owned(), Arc::clone(&pending));
            Task::spawn(handle, async move {
                if let Err(error) = run_reads(&env, &address, receiver, &pending).await {
                    tracing::debug!(%error, "read stream ended");
                }
                pending.lock().unwrap_or_else(PoisonError::into_inner).take();
            })
        };
        Self { requests, pending, _task: task }
    }

    /// Whether the stream has ended: a new one is needed.
    pub(crate) fn is_down(&self) -> bool {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Asks, and waits for the answer. The caller bounds the wait.
    pub(crate) async fn ask(&self, request: ReadRequest) -> FsResult<ReadReply> {
        let gone = || FsError::new(ErrorCode::ErrorUnavailable, "the stream to the chunk daemon broke");
        let (sender, answer) = oneshot::channel();
        let id = request.id;
        {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            pending.as_mut().ok_or_else(gone)?.insert(id, sender);
        }
        let _asked = Asked { pending: &self.pending, id };
        self.requests.send(request).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

async fn run_reads(
    env: &Env,
    address: &str,
    requests: mpsc::Receiver<ReadRequest>,
    pending: &Pending,
) -> FsResult<()> {
    let mut client = client(env, address).await?;
    let mut replies = in_time(address, client.read(ReceiverStream::new(requests))).await?.into_inner();
    while let Some(reply) = replies.message().await.map_err(|status| status_error(address, &status))? {
        let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = pending.as_mut().and_then(|pending| pending.remove(&reply.id));
        if let Some(waiting) = waiting {
            // Whoever asked may have got the bytes elsewhere by now.
            drop(waiting.send(reply));
        }
    }
    Ok(())
}
