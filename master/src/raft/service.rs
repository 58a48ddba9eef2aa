//! What other masters ask of this one: the server side of `raft.proto`.

use super::auth::Auth;
use super::codec::{self, Body, InstalledRow, SnapshotRow};
use super::network::dispatch;
use super::room::Level;
use super::store::Shared;
use super::types::Raft;
use dfs_env::Seldom;
use dfs_proto::v1;
use futures::Stream;
use openraft::Snapshot;
use prost::Message;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Replies of one stream that may wait to be sent.
const REPLIES_MAX: usize = 256;
/// How long the next part of a snapshot may take to come.
const PART_TIME: Duration = Duration::from_secs(30);

/// The service; serve it beside the master's others.
pub struct RaftService {
    pub(super) raft: Raft,
    pub(super) auth: Auth,
    pub(super) shared: Arc<Shared>,
}

fn note_refusal(status: &Status) {
    static REFUSED: Seldom = Seldom::new();
    if let Some(unsaid) = REFUSED.now() {
        tracing::warn!(error = status.message(), unsaid, "a message to this master was refused");
    }
}

async fn answer(
    raft: &Raft,
    shared: &Arc<Shared>,
    auth: &Auth,
    message: v1::RaftMessage,
) -> Result<v1::RaftMessage, Status> {
    let envelope = auth.open(message).inspect_err(note_refusal)?;
    let body = match dispatch(raft, shared, auth, envelope.from, envelope.body).await {
        Ok(body) => body,
        // Ends the stream: the master may be back behind a new one.
        Err(error) if error.kind() == std::io::ErrorKind::NotConnected => {
            return Err(Status::unavailable(error.to_string()));
        }
        Err(error) => Body::Failed(error.to_string()),
    };
    Ok(auth.seal(envelope.from, envelope.call, body))
}

#[tonic::async_trait]
impl v1::raft_server::Raft for RaftService {
    type AppendStream = Pin<Box<dyn Stream<Item = Result<v1::RaftMessage, Status>> + Send>>;

    async fn append(
        &self,
        request: Request<Streaming<v1::RaftMessage>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let (raft, shared, auth) = (self.raft.clone(), Arc::clone(&self.shared), self.auth.clone());
        let mut messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(REPLIES_MAX);
        tokio::spawn(async move {
            // In order: each append follows on the one before it.
            while let Ok(Some(message)) = messages.message().await {
                let reply = answer(&raft, &shared, &auth, message).await;
                let refused = reply.is_err();
                if sender.send(reply).await.is_err() || refused {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn vote(&self, request: Request<v1::RaftMessage>) -> Result<Response<v1::RaftMessage>, Status> {
        answer(&self.raft, &self.shared, &self.auth, request.into_inner()).await.map(Response::new)
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<v1::SnapshotPart>>,
    ) -> Result<Response<v1::RaftMessage>, Status> {
        let mut parts = request.into_inner();
        let first = next_part(&mut parts).await?;
        let head = v1::RaftMessage::decode(first.meta.clone())
            .map_err(|error| Status::invalid_argument(format!("a snapshot without its head: {error}")))?;
        let head = self.auth.open(head).inspect_err(note_refusal)?;
        let Some(Body::Snapshot(SnapshotRow { vote, meta: Some(_) })) = head.body else {
            return Err(Status::invalid_argument("a snapshot without its head"));
        };
        let vote = codec::vote(vote.as_ref()).map_err(refuse)?;
        let (meta, data) = self.receive(head.call, first, parts).await?;
        let installed =
            self.raft.install_full_snapshot(vote, Snapshot { meta, snapshot: Box::new(data) }).await;
        let body = match installed {
            Ok(response) => Body::Installed(InstalledRow { vote: Some((&response.vote).into()) }),
            Err(error) => Body::Failed(error.to_string()),
        };
        Ok(Response::new(self.auth.seal(head.from, head.call, body)))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function for map_err")]
fn refuse(error: std::io::Error) -> Status {
    Status::internal(error.to_string())
}

async fn next_part(parts: &mut Streaming<v1::SnapshotPart>) -> Result<v1::SnapshotPart, Status> {
    match tokio::time::timeout(PART_TIME, parts.message()).await {
        Ok(Ok(Some(part))) => Ok(part),
        Ok(Ok(None)) => Err(Status::aborted("the snapshot ended before its last part")),
        Ok(Err(status)) => Err(status),
        Err(_) => Err(Status::deadline_exceeded("no further part of the snapshot came")),
    }
}

impl RaftService {
    /// Writes the parts to a snapshot of this master's own. It is in place, durably, before Raft hears of it: Raft
    /// purges the log up to it at once, and a crash must find it.
    async fn receive(
        &self,
        call: u64,
        first: v1::SnapshotPart,
        mut parts: Streaming<v1::SnapshotPart>,
    ) -> Result<super::snapshot::Kept, Status> {
        let env = &self.shared.env;
        let short = || Status::resource_exhausted("there is no room for a snapshot on this master's disk");
        if self.shared.room.look() != Level::Plenty {
            return Err(short());
        }
        let shared = Arc::clone(&self.shared);
        let name = format!("receive-{call:016x}");
        let mut draft = env.blocking(move || shared.snapshots.draft(&name)).await.map_err(refuse)?;
        let (mut part, mut at) = (first, 0);
        loop {
            self.auth.open_part(call, at, &part)?;
            if part.last {
                break;
            }
            at += part.data.len() as u64;
            let data = part.data;
            draft = env
                .blocking(move || std::io::Write::write_all(&mut draft, &data).map(|()| draft))
                .await
                .map_err(refuse)?;
            part = next_part(&mut parts).await?;
        }
        // The state is built anew from it before the old one goes.
        if !self.shared.room.has(2 * at) {
            return Err(short());
        }
        let shared = Arc::clone(&self.shared);
        let (kept, _) =
            env.blocking(move || shared.snapshots.keep(draft, &shared.cluster)).await.map_err(refuse)?;
        Ok(kept)
    }
}
