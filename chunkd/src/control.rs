//! The daemon's side of the master's control stream: hello, report, heartbeats, and the orders that come back.
//!
//! ```text
//!   Searching ── hello, welcome ──► Attached ── stream ends, silence, refusal ──► Searching
//!      │  ▲                           report, then heartbeats; orders are carried out side by side
//!      └──┘ the next master, or the leader that one names; 50 ms to 1 s between attempts
//! ```

use crate::copy::Copier;
use crate::store::Store;
use crate::store::orders::Settled;
use crate::store::queue::ChunkOrder;
use crate::terms::Terms;
use dfs_env::Env;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{
    CONNECT_MS, HEARTBEAT_MS, MASTER_ADDRESSES_MAX, MESSAGE_MAX, NODE_DEAD_MS, ORDERS_AT_ONCE, REPORT_CHUNKS,
};
use dfs_proto::token::ClusterKey;
use dfs_proto::{ChunkId, Epoch, FsError, FsResult, PROTOCOL_VERSION, v1};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// The bounds of the pause between two attempts.
const PAUSE_MS: (u64, u64) = (50, 1_000);
/// How many masters in a row may name another one before a pause.
const REDIRECTS: u32 = 4;
/// What is not sealed is reported again so often. A replica of a chunk that was given to another daemon at this address, which lost its
/// disk, comes to be after the first report, and is needed by nobody once the chunk is sealed without it.
const UNSEALED_AGAIN: Duration = Duration::from_secs(30);

/// Who this daemon is.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    pub node: u64,
    pub instance: u64,
    pub address: String,
    pub host: String,
    pub rack: String,
}

/// The control client.
#[derive(Clone)]
pub struct Control {
    pub env: Env,
    pub store: Store,
    pub copier: Arc<Copier>,
    pub key: ClusterKey,
    pub masters: Vec<String>,
    /// What masters said of who they are; tried besides `masters`, which are those of the settings.
    pub told: Arc<Mutex<Vec<String>>>,
    pub info: NodeInfo,
    pub terms: Arc<Terms>,
}

/// How an attempt ended.
enum End {
    /// Another master leads.
    Redirect(String),
    /// It was the leader, and the stream ended.
    Detached(FsError),
    Failed(FsError),
}

type Frames = mpsc::Sender<v1::NodeFrame>;

impl Control {
    /// Stays attached to the leader until the daemon stops.
    pub async fn run(self, mut stopping: watch::Receiver<bool>) {
        tokio::select! {
            () = self.attach_for_ever() => {}
            _ = stopping.wait_for(|stopping| *stopping) => {}
        }
    }

    async fn attach_for_ever(&self) {
        let (mut next, mut redirects, mut hint) = (0, 0, None);
        let mut pause_ms = PAUSE_MS.0;
        let mut told = String::new();
        loop {
            let address = hint.take().unwrap_or_else(|| {
                let known = self.known();
                next += 1;
                known[(next - 1) % known.len()].clone()
            });
            match self.attach(&address).await {
                End::Redirect(leader) if !leader.is_empty() && redirects < REDIRECTS => {
                    redirects += 1;
                    hint = Some(leader);
                    continue;
                }
                End::Redirect(_) => {}
                End::Detached(error) => {
                    tracing::warn!(master = address, %error, "detached from the master");
                    pause_ms = PAUSE_MS.0;
                    told.clear();
                }
                End::Failed(error) => {
                    // The same cause is told once, not each second.
                    let text = error.during(&address).to_string();
                    if text != told {
                        tracing::warn!("no master yet: {text}");
                        told = text;
                    }
                }
            }
            redirects = 0;
            // Daemons that lost the same master do not come back all at once.
            let pause = pause_ms / 2 + self.env.random() % (pause_ms / 2 + 1);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            pause_ms = (pause_ms * 2).min(PAUSE_MS.1);
        }
    }

    /// The masters there may be: what they said last, then those of the settings.
    fn known(&self) -> Vec<String> {
        let mut known = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for address in &self.masters {
            if !known.contains(address) {
                known.push(address.clone());
            }
        }
        known
    }

    /// Takes down who the masters are. Only the leader's word makes any of them forgotten: another master may have been
    /// removed itself.
    fn learn(&self, masters: Vec<String>, leader: bool) {
        if masters.is_empty() {
            return;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if leader {
            *told = masters;
        } else {
            let new: Vec<String> = masters.into_iter().filter(|address| !told.contains(address)).collect();
            told.extend(new);
        }
        told.truncate(MASTER_ADDRESSES_MAX);
    }

    async fn attach(&self, address: &str) -> End {
        let bound = Duration::from_millis(CONNECT_MS);
        let (frames, outgoing) = mpsc::channel(ORDERS_AT_ONCE);
        let opened = tokio::time::timeout(2 * bound, self.open(address, &frames, outgoing)).await;
        let (mut orders, first) = match opened {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => return End::Failed(error),
            Err(_) => return End::Failed(FsError::new(ErrorCode::ErrorTimedOut, "no answer")),
        };
        self.learn(first.masters, first.welcome.is_some());
        if let Some(refusal) = first.refusal {
            let error = FsError::from(refusal);
            return match error.code {
                ErrorCode::ErrorNotLeader => End::Redirect(first.leader),
                _ => End::Failed(error),
            };
        }
        let Some(welcome) = first.welcome else {
            return End::Failed(FsError::new(ErrorCode::ErrorIo, "the master's first frame is no welcome"));
        };
        // A leader that has been replaced and does not know it yet is left alone.
        if let Err(error) = self.terms.observe(welcome.term).await {
            return End::Failed(error);
        }
        tracing::info!(master = address, term = welcome.term, "attached to the master");
        let every_ms = if welcome.heartbeat_ms == 0 { HEARTBEAT_MS } else { welcome.heartbeat_ms };
        tokio::select! {
            error = self.speak(&frames, Duration::from_millis(every_ms)) => End::Detached(error),
            error = self.listen(&mut orders, &frames) => End::Detached(error),
        }
    }

    async fn open(
        &self,
        address: &str,
        frames: &Frames,
        outgoing: mpsc::Receiver<v1::NodeFrame>,
    ) -> FsResult<(Streaming<v1::OrderFrame>, v1::OrderFrame)> {
        // The caller names the address, so it is taken off the error here.
        let cause = |error: std::io::Error| error.to_string().replacen(&format!("{address}: "), "", 1);
        let channel = rpc::connect(&self.env, address, Tuning::default())
            .await
            .map_err(|error| FsError::new(ErrorCode::ErrorUnavailable, cause(error)))?;
        let refused =
            |status: tonic::Status| FsError::new(ErrorCode::ErrorUnavailable, status.message().to_owned());
        send(frames, v1::NodeFrame { hello: Some(self.hello()), ..Default::default() }).await?;
        let mut client =
            v1::control_client::ControlClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
        let mut orders = client.attach(ReceiverStream::new(outgoing)).await.map_err(refused)?.into_inner();
        let first = orders.message().await.map_err(refused)?;
        let ended = || FsError::new(ErrorCode::ErrorUnavailable, "the master ended the stream");
        Ok((orders, first.ok_or_else(ended)?))
    }

    fn hello(&self) -> v1::NodeHello {
        let info = &self.info;
        let message = [info.node.to_le_bytes(), info.instance.to_le_bytes()].concat();
        v1::NodeHello {
            version: PROTOCOL_VERSION,
            cluster_id: self.key.cluster_id(),
            node: info.node,
            address: info.address.clone(),
            host: info.host.clone(),
            rack: info.rack.clone(),
            proof: self.key.mac("node hello", &message).to_vec().into(),
            instance: info.instance,
        }
    }

    /// Reports everything once, then beats until the stream is gone, and says from time to time what is not sealed.
    async fn speak(&self, frames: &Frames, every: Duration) -> FsError {
        match self.speak_until_gone(frames, every).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn speak_until_gone(&self, frames: &Frames, every: Duration) -> FsResult<std::convert::Infallible> {
        // The first beat goes first: the master knows the space before it hears of many chunks.
        send(frames, self.heartbeat(0).await).await?;
        let found = self.store.report();
        let mut parts = found.chunks(REPORT_CHUNKS).peekable();
        if parts.peek().is_none() {
            send(frames, report(&[], true)).await?;
        }
        while let Some(part) = parts.next() {
            send(frames, report(part, parts.peek().is_none())).await?;
        }
        let mut failed = self.store.0.dirs.failed();
        let mut unsealed = tokio::time::interval_at(Instant::now() + UNSEALED_AGAIN, UNSEALED_AGAIN);
        unsealed.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut beats = tokio::time::interval(every);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for seq in 1_u64.. {
            loop {
                tokio::select! {
                    _ = beats.tick() => break,
                    noted = self.store.noted() => send(frames, report(&noted, false)).await?,
                    _ = unsealed.tick() => self.report_those(frames, |found| !found.sealed).await?,
                }
            }
            send(frames, self.heartbeat(seq).await).await?;
            // What stands in a directory that has failed cannot be relied on any more.
            let now_failed = self.store.0.dirs.failed();
            if now_failed != failed {
                failed = now_failed;
                self.report_those(frames, |found| found.damaged).await?;
            }
        }
        Err(FsError::new(ErrorCode::ErrorIo, "no more heartbeat numbers"))
    }

    async fn report_those(&self, frames: &Frames, which: impl Fn(&v1::ChunkFound) -> bool) -> FsResult<()> {
        let those: Vec<_> = self.store.report().into_iter().filter(which).collect();
        for part in those.chunks(REPORT_CHUNKS) {
            send(frames, report(part, false)).await?;
        }
        Ok(())
    }

    async fn heartbeat(&self, seq: u64) -> v1::NodeFrame {
        let shared = Arc::clone(&self.store.0);
        let refreshed = self
            .env
            .blocking(move || {
                shared.dirs.refresh();
                Ok(())
            })
            .await;
        if let Err(error) = refreshed {
            tracing::error!(%error, "the space of the data directories is not known anew");
        }
        let totals = self.store.0.dirs.totals();
        let heartbeat = v1::Heartbeat {
            seq,
            total_bytes: totals.total_bytes,
            used_bytes: totals.used_bytes,
            free_bytes: totals.free_bytes,
            chunks: self.store.count(),
            dirs: self.store.0.dirs.report(),
        };
        v1::NodeFrame { heartbeat: Some(heartbeat), ..Default::default() }
    }

    /// Carries out orders until the stream ends.
    async fn listen(&self, orders: &mut Streaming<v1::OrderFrame>, frames: &Frames) -> FsError {
        let slots = Arc::new(Semaphore::new(ORDERS_AT_ONCE));
        // A master that answers heartbeats must go on doing so; on others the connection's own pings are relied on.
        let mut answers_beats = false;
        let bound = Duration::from_millis(NODE_DEAD_MS);
        loop {
            let frame = match tokio::time::timeout(bound, orders.message()).await {
                Ok(Ok(Some(frame))) => frame,
                Ok(Ok(None)) => {
                    return FsError::new(ErrorCode::ErrorUnavailable, "the master ended the stream");
                }
                Ok(Err(status)) => return FsError::new(ErrorCode::ErrorUnavailable, status.message()),
                Err(_) if answers_beats => {
                    return FsError::new(ErrorCode::ErrorTimedOut, format!("no sign of life for {bound:?}"));
                }
                Err(_) => continue,
            };
            answers_beats |= frame.heartbeat > 0;
            self.learn(frame.masters, frame.refusal.is_none());
            if let Some(refusal) = frame.refusal {
                return refusal.into();
            }
            let Some(order) = frame.order else { continue };
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { continue };
            let (control, frames) = (self.clone(), frames.clone());
            tokio::spawn(async move {
                let (chunk, done) = control.carry_out(order).await;
                // A master that is gone orders again when it is back; it should know what was done meanwhile.
                if frames.send(v1::NodeFrame { done: Some(done), ..Default::default() }).await.is_err() {
                    control.store.note(chunk);
                }
                drop(slot);
            });
        }
    }

    async fn carry_out(&self, order: v1::Order) -> (ChunkId, v1::OrderDone) {
        let id = order.id;
        let chunk = match &order.op {
            Some(v1::order::Op::Fence(fence)) => fence.chunk,
            Some(v1::order::Op::Seal(seal)) => seal.chunk,
            Some(v1::order::Op::Delete(delete)) => delete.chunk,
            Some(v1::order::Op::Copy(copy)) => copy.chunk,
            Some(v1::order::Op::Verify(verify)) => verify.chunk,
            Some(v1::order::Op::Gather(gather)) => gather.chunk,
            None => 0,
        };
        let done = match self.obey(order).await {
            Ok(settled) => v1::OrderDone {
                id,
                failure: None,
                epoch: settled.epoch.get(),
                length: settled.length,
                checksum: settled.digest,
                sealed: settled.sealed,
            },
            Err(error) => {
                tracing::warn!(chunk, %error, "an order was not carried out");
                let length = self.store.held(ChunkId(chunk)).map_or(0, |held| held.length);
                v1::OrderDone { id, failure: Some(error.into()), length, ..Default::default() }
            }
        };
        (ChunkId(chunk), done)
    }

    async fn obey(&self, order: v1::Order) -> FsResult<Settled> {
        use v1::order::Op;
        self.terms.observe(order.term).await?;
        let (chunk, order) = match order.op {
            Some(Op::Fence(fence)) => (fence.chunk, ChunkOrder::Fence(Epoch(fence.epoch))),
            Some(Op::Seal(seal)) => {
                (seal.chunk, ChunkOrder::Seal { epoch: Epoch(seal.epoch), length: seal.length })
            }
            Some(Op::Delete(delete)) => (delete.chunk, ChunkOrder::Delete),
            Some(Op::Copy(copy)) => return self.copier.copy(copy).await,
            Some(Op::Gather(gather)) => return self.copier.gather_pieces(gather).await,
            Some(Op::Verify(verify)) => return self.store.verify(ChunkId(verify.chunk)).await,
            None => {
                return Err(FsError::new(
                    ErrorCode::ErrorNotSupported,
                    "this daemon does not know the order",
                ));
            }
        };
        self.store.order(ChunkId(chunk), order).await
    }
}

async fn send(frames: &Frames, frame: v1::NodeFrame) -> FsResult<()> {
    frames
        .send(frame)
        .await
        .map_err(|_| FsError::new(ErrorCode::ErrorUnavailable, "the stream to the master is gone"))
}

fn report(chunks: &[v1::ChunkFound], last: bool) -> v1::NodeFrame {
    let report = v1::ChunkReport { chunks: chunks.to_vec(), last };
    v1::NodeFrame { report: Some(report), ..Default::default() }
}
