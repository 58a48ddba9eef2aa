//! Forwarding of appends to the other replicas: long-lived streams, one for each address, shared by all chunks.
//!
//! ```text
//!            forward            connected
//!   (none) ───────────► Dialing ─────────► Streaming ── no answer for FORWARD_PROGRESS_MS, ──► all who wait fail,
//!      ▲                   │ refused           │        broken, refused                         back to Dialing
//!      └───────────────────┴───────────────────┴── nothing to do for FORWARD_IDLE_MS
//! ```
//!
//! Every forwarded request is answered within a bound: by the other daemon, or because its stream was given up.

use crate::lock;
use dfs_env::Env;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{
    APPEND_STREAM_REQUESTS, FORWARD_IDLE_MS, FORWARD_PROGRESS_MS, FORWARD_REQUESTS, MESSAGE_MAX,
};
use dfs_proto::{FsError, FsResult, v1};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

type Answer = FsResult<v1::AppendReply>;

/// A request on its way to another daemon.
struct Call {
    request: v1::AppendRequest,
    answer: oneshot::Sender<Answer>,
}

/// The streams to all other daemons. Cheap to clone.
#[derive(Clone)]
pub struct Replicas {
    env: Env,
    links: Arc<Mutex<HashMap<String, mpsc::Sender<Call>>>>,
}

impl Replicas {
    #[must_use]
    pub fn new(env: Env) -> Self {
        Self { env, links: Arc::default() }
    }

    /// Sends a request to another daemon, after all that were sent there before. Waits only while that daemon's stream
    /// is full, and no longer than it may go without an answer. What comes back is the answer to come.
    pub async fn forward(&self, address: &str, request: v1::AppendRequest) -> oneshot::Receiver<Answer> {
        let (answer, answered) = oneshot::channel();
        let mut call = Call { request, answer };
        loop {
            let link = {
                let mut links = lock(&self.links);
                links.retain(|_, link| !link.is_closed());
                links.entry(address.to_owned()).or_insert_with(|| self.start(address)).clone()
            };
            match link.send(call).await {
                Ok(()) => return answered,
                // It ended for lack of work in this very moment.
                Err(mpsc::error::SendError(back)) => call = back,
            }
        }
    }

    fn start(&self, address: &str) -> mpsc::Sender<Call> {
        let (calls, waiting) = mpsc::channel(APPEND_STREAM_REQUESTS);
        let link = Link { env: self.env.clone(), address: address.to_owned(), calls: waiting };
        tokio::spawn(link.run());
        calls
    }
}

struct Link {
    env: Env,
    address: String,
    calls: mpsc::Receiver<Call>,
}

/// A stream that works.
struct Streams {
    requests: mpsc::Sender<v1::AppendRequest>,
    answers: Streaming<v1::AppendReply>,
}

impl Link {
    fn error(&self, cause: impl std::fmt::Display) -> FsError {
        FsError::new(ErrorCode::ErrorUnavailable, format!("{}: {cause}", self.address))
    }

    async fn run(mut self) {
        let idle = Duration::from_millis(FORWARD_IDLE_MS);
        while let Ok(Some(call)) = tokio::time::timeout(idle, self.calls.recv()).await {
            let error = match self.connect().await {
                Ok(streams) => match self.stream(streams, call).await {
                    Some(error) => error,
                    None => break,
                },
                Err(error) => {
                    drop(call.answer.send(Err(error.clone())));
                    error
                }
            };
            tracing::warn!(%error, "forwarding to another replica failed");
            self.fail_waiting(&error);
        }
        // No new calls; those that slipped in are told.
        self.calls.close();
        let error = self.error("the stream ended");
        while let Some(call) = self.calls.recv().await {
            drop(call.answer.send(Err(error.clone())));
        }
    }

    /// Tells everybody who waits now; whoever comes later tries anew.
    fn fail_waiting(&mut self, error: &FsError) {
        while let Ok(call) = self.calls.try_recv() {
            drop(call.answer.send(Err(error.clone())));
        }
    }

    async fn connect(&self) -> FsResult<Streams> {
        let connecting = async {
            let channel = rpc::connect(&self.env, &self.address, Tuning::default())
                .await
                .map_err(|error| FsError::new(ErrorCode::ErrorUnavailable, error.to_string()))?;
            let mut client =
                v1::chunk_client::ChunkClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
            let (requests, outgoing) = mpsc::channel(32);
            let answers = client
                .append(ReceiverStream::new(outgoing))
                .await
                .map_err(|status| self.error(status.message()))?
                .into_inner();
            Ok(Streams { requests, answers })
        };
        let bound = Duration::from_millis(FORWARD_PROGRESS_MS);
        tokio::time::timeout(bound, connecting)
            .await
            .unwrap_or_else(|_| Err(self.error(format_args!("no answer within {bound:?}"))))
    }

    /// Works until the stream breaks (and says why) or there is nothing to do for long.
    async fn stream(&mut self, mut streams: Streams, first: Call) -> Option<FsError> {
        let mut waiting = Waiting::default();
        let mut next = Some(waiting.add(first));
        let bound = Duration::from_millis(FORWARD_PROGRESS_MS);
        let idle = Duration::from_millis(FORWARD_IDLE_MS);
        let mut progress = Instant::now();
        let error = loop {
            let deadline = progress + if waiting.is_empty() { idle } else { bound };
            tokio::select! {
                permit = streams.requests.reserve(), if next.is_some() => match (permit, next.take()) {
                    (Ok(permit), Some(request)) => permit.send(request),
                    _ => break self.error("the stream broke"),
                },
                call = self.calls.recv(), if next.is_none() && waiting.has_room() => match call {
                    Some(call) => {
                        if waiting.is_empty() {
                            progress = Instant::now();
                        }
                        next = Some(waiting.add(call));
                    }
                    None => return None,
                },
                answer = streams.answers.message() => match answer {
                    Ok(Some(answer)) => {
                        progress = Instant::now();
                        waiting.answered(answer);
                    }
                    Ok(None) => break self.error("it ended the stream"),
                    Err(status) => break self.error(status.message()),
                },
                () = tokio::time::sleep_until(deadline) => {
                    if waiting.is_empty() {
                        return None;
                    }
                    break self.error(format_args!("no progress within {bound:?}"));
                }
            }
        };
        waiting.fail(&error);
        Some(error)
    }
}

/// Requests without an answer, by the number that this stream gave them.
#[derive(Default)]
struct Waiting {
    last_id: u64,
    by_id: HashMap<u64, oneshot::Sender<Answer>>,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    fn has_room(&self) -> bool {
        self.by_id.len() < FORWARD_REQUESTS
    }

    fn add(&mut self, call: Call) -> v1::AppendRequest {
        self.last_id += 1;
        self.by_id.insert(self.last_id, call.answer);
        v1::AppendRequest { id: self.last_id, ..call.request }
    }

    fn answered(&mut self, answer: v1::AppendReply) {
        let Some(waiting) = self.by_id.remove(&answer.id) else {
            tracing::warn!(id = answer.id, "an answer to nothing that was asked");
            return;
        };
        // Nobody waits when the daemon stops.
        drop(waiting.send(Ok(answer)));
    }

    fn fail(&mut self, error: &FsError) {
        for (_, waiting) in self.by_id.drain() {
            drop(waiting.send(Err(error.clone())));
        }
    }
}
