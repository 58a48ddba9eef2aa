//! The Control service: chunk daemons introduce themselves, report what they have, and take orders.
//!
//! As with sessions, one future per stream reads, works and writes: it *is* the stream of answers, polled by the
//! connection. What arrives is bounded by the message size, what waits to be sent by the order queue.

use super::jobs::Job;
use super::nodes::Attached;
use super::repairing;
use super::sealing::{Report, judge};
use super::term::Term;
use super::{Gone, HELLO_WAIT, Shared, store_failed};
use crate::state;
use dfs_env::Seldom;
use dfs_proto::limits::HEARTBEAT_MS;
use dfs_proto::v1::{self, ErrorCode, NodeFrame, NodeHello, NodeRow, NodeWelcome, Order, OrderFrame, system};
use dfs_proto::{ChunkId, FsError, NodeId, PROTOCOL_VERSION};
use futures::Stream;
use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tonic::{Request, Response, Status, Streaming};

/// How many chunks that a daemon should have are read at once.
const MISSING_PAGE: usize = 4096;

/// Answers `Control`.
pub struct ControlService {
    shared: Arc<Shared>,
}

impl ControlService {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

type Frames = Pin<Box<dyn Stream<Item = Result<OrderFrame, Status>> + Send>>;

#[tonic::async_trait]
impl v1::control_server::Control for ControlService {
    type AttachStream = Frames;

    async fn attach(&self, request: Request<Streaming<NodeFrame>>) -> Result<Response<Frames>, Status> {
        let start = Stage::Hello(Arc::clone(&self.shared), Box::new(request.into_inner()));
        let frames = futures::stream::unfold(start, |stage| async move {
            match stage {
                Stage::Hello(shared, inbound) => hello(shared, *inbound).await,
                Stage::Attached(mut link) => {
                    let frame = link.next_frame().await?;
                    let over = frame.as_ref().map_or(true, |frame| frame.refusal.is_some());
                    Some((frame, if over { Stage::Over } else { Stage::Attached(link) }))
                }
                Stage::Over => None,
            }
        });
        Ok(Response::new(Box::pin(frames)))
    }
}

enum Stage {
    Hello(Arc<Shared>, Box<Streaming<NodeFrame>>),
    Attached(Box<NodeLink>),
    Over,
}

type Step = (Result<OrderFrame, Status>, Stage);

/// Why a daemon is not served.
enum Refusal {
    Gone(Gone),
    Failed(FsError),
}

impl From<Gone> for Refusal {
    fn from(gone: Gone) -> Self {
        Self::Gone(gone)
    }
}

impl From<FsError> for Refusal {
    fn from(error: FsError) -> Self {
        Self::Failed(error)
    }
}

fn refusal(shared: &Shared, refusal: Refusal) -> OrderFrame {
    let (failure, leader) = match refusal {
        Refusal::Gone(gone) => (gone.failure(), gone.leader),
        Refusal::Failed(error) => (error.into(), String::new()),
    };
    OrderFrame { refusal: Some(failure), leader, masters: shared.node.voters(), ..OrderFrame::default() }
}

async fn hello(shared: Arc<Shared>, mut inbound: Streaming<NodeFrame>) -> Option<Step> {
    let hello = match tokio::time::timeout(HELLO_WAIT, inbound.message()).await {
        Ok(Ok(Some(NodeFrame { hello: Some(hello), .. }))) => hello,
        Ok(Ok(Some(_))) => {
            return Some((Err(Status::invalid_argument("the first frame must be a hello")), Stage::Over));
        }
        Ok(Ok(None) | Err(_)) => return None,
        Err(_) => return Some((Err(Status::deadline_exceeded("no hello")), Stage::Over)),
    };
    let node = hello.node;
    match admit(&shared, hello, inbound).await {
        Ok(link) => {
            let welcome = NodeWelcome { term: link.term.number, heartbeat_ms: HEARTBEAT_MS };
            let masters = shared.node.voters();
            let frame = OrderFrame { welcome: Some(welcome), masters, ..OrderFrame::default() };
            Some((Ok(frame), Stage::Attached(Box::new(link))))
        }
        Err(why) => {
            if let Refusal::Failed(error) = &why {
                static REFUSED: Seldom = Seldom::new();
                if let Some(unsaid) = REFUSED.now() {
                    tracing::warn!(node = format_args!("{node:016x}"), %error, unsaid, "a chunk daemon was refused");
                }
            }
            Some((Ok(refusal(&shared, why)), Stage::Over))
        }
    }
}

/// Checks who a daemon is, and makes it known to the cluster if it is new or has moved.
async fn admit(
    shared: &Arc<Shared>,
    hello: NodeHello,
    inbound: Streaming<NodeFrame>,
) -> Result<NodeLink, Refusal> {
    check(shared, &hello)?;
    let term = shared.term().await?;
    let id = NodeId(hello.node);
    term.nodes.admit(id, hello.instance)?;
    let known =
        state::node(&*term.kv(), id).map_err(|error| store_failed("reading a chunk daemon's row", &error))?;
    let draining = known.as_ref().is_some_and(|known| known.draining);
    let row =
        NodeRow { node: hello.node, address: hello.address, host: hello.host, rack: hello.rack, draining };
    if known.as_ref() != Some(&row) {
        let register = v1::RegisterNode {
            node: row.node,
            address: row.address.clone(),
            host: row.host.clone(),
            rack: row.rack.clone(),
        };
        shared.system(system::Op::RegisterNode(register)).await??;
    }
    // Another process may have come in between.
    term.nodes.admit(id, hello.instance)?;
    tracing::info!(node = repairing::hex(id), address = row.address, "a chunk daemon attached");
    let Attached { generation, orders } = term.nodes.attach(row, hello.instance);
    let ended = term.ended();
    term.repairs.returned(id);
    Ok(NodeLink { term, node: id, generation, inbound, orders, ended, reported: Some(ChunkId(0)) })
}

fn check(shared: &Shared, hello: &NodeHello) -> Result<(), FsError> {
    if hello.version != PROTOCOL_VERSION {
        return Err(FsError::new(
            ErrorCode::ErrorVersion,
            format!(
                "the daemon speaks protocol version {}, this master version {PROTOCOL_VERSION}",
                hello.version
            ),
        ));
    }
    if hello.cluster_id != shared.cluster_id {
        return Err(FsError::new(
            ErrorCode::ErrorWrongCluster,
            format!("the daemon belongs to cluster {}, this is {}", hello.cluster_id, shared.cluster_id),
        ));
    }
    let mut message = hello.node.to_le_bytes().to_vec();
    message.extend(hello.instance.to_le_bytes());
    if !shared.key.verify("node hello", &message, &hello.proof) {
        return Err(FsError::new(ErrorCode::ErrorBadToken, "the daemon does not have this cluster's key"));
    }
    if hello.node == 0 || hello.address.is_empty() {
        return Err(FsError::new(ErrorCode::ErrorInvalid, "the daemon has no node id or no address"));
    }
    Ok(())
}

/// One daemon's stream.
struct NodeLink {
    term: Arc<Term>,
    node: NodeId,
    generation: u64,
    inbound: Streaming<NodeFrame>,
    orders: mpsc::Receiver<Order>,
    ended: watch::Receiver<bool>,
    /// Up to where the first report, which names everything, has come.
    reported: Option<ChunkId>,
}

impl Drop for NodeLink {
    fn drop(&mut self) {
        self.term.nodes.detach(self.node, self.generation);
    }
}

impl NodeLink {
    /// The next frame to send; None ends the stream.
    async fn next_frame(&mut self) -> Option<Result<OrderFrame, Status>> {
        loop {
            let frame = tokio::select! {
                biased;
                _ = self.ended.wait_for(|ended| *ended) => {
                    let shared = &self.term.shared;
                    return Some(Ok(refusal(shared, Refusal::Gone(shared.leader()))));
                }
                order = self.orders.recv() => {
                    // Without a sender left a newer stream of this daemon has taken over.
                    return order.map(|order| Ok(OrderFrame { order: Some(order), ..OrderFrame::default() }));
                }
                frame = self.inbound.message() => frame,
            };
            match frame {
                Ok(Some(frame)) => match self.accept(frame).await {
                    Ok(Some(heartbeat)) => {
                        let masters = self.term.shared.node.voters();
                        return Some(Ok(OrderFrame { heartbeat, masters, ..OrderFrame::default() }));
                    }
                    Ok(None) => {}
                    Err(Superseded) => return None,
                },
                Ok(None) => {
                    tracing::info!(node = repairing::hex(self.node), "a chunk daemon detached");
                    return None;
                }
                Err(status) => {
                    tracing::info!(
                        node = repairing::hex(self.node),
                        error = status.message(),
                        "a chunk daemon is gone"
                    );
                    return None;
                }
            }
        }
    }

    /// Takes in one frame; the number of the heartbeat to answer.
    async fn accept(&mut self, frame: NodeFrame) -> Result<Option<u64>, Superseded> {
        let seq = frame.heartbeat.as_ref().map(|heartbeat| heartbeat.seq);
        if !self.term.nodes.seen(self.node, self.generation, frame.heartbeat) {
            return Err(Superseded);
        }
        if let Some(done) = frame.done {
            self.term.nodes.done(self.node, self.generation, done);
        }
        if let Some(report) = frame.report {
            self.report(report).await;
        }
        Ok(seq)
    }

    /// Compares what the daemon has with what was applied.
    async fn report(&mut self, report: v1::ChunkReport) {
        // The state must not be older than the report: a chunk allocated by an earlier leader would look unknown.
        if self.term.shared.confirm().await.is_err() {
            return;
        }
        let kv = self.term.kv();
        let cluster = match state::cluster_row(&*kv) {
            Ok(row) => row.unwrap_or_default(),
            Err(error) => {
                store_failed("reading the cluster's counters", &error);
                return;
            }
        };
        let mut unknown = 0;
        for replica in &report.chunks {
            let id = ChunkId(replica.chunk);
            // What compaction is making is judged when that is over. Looked at first: it may become a chunk at any moment.
            let read = state::is_reserved(&*kv, id)
                .and_then(|reserved| Ok((reserved, state::chunk_state(&*kv, id)?)));
            let chunk = match read {
                Ok((true, _)) => continue,
                Ok((false, chunk)) => chunk,
                Err(error) => {
                    store_failed("reading a chunk", &error);
                    continue;
                }
            };
            match judge(self.node, replica, chunk.as_ref(), &cluster) {
                Report::Fine => self.term.repairs.is_there(id, self.node),
                Report::Job(job) => self.term.jobs.add(job, false),
                Report::Stray => {
                    self.term.strays.add(id, self.node);
                    self.term.jobs.seal(id, false);
                }
                Report::Unknown => unknown += 1,
                Report::Damaged => {
                    if self.term.repairs.flawed(id, self.node, false) {
                        tracing::error!(chunk = %id, node = repairing::hex(self.node), "a replica is damaged");
                    }
                    repairing::consider(&self.term, id);
                }
            }
        }
        self.term.nodes.unknown(self.node, unknown);
        self.find_missing(&report);
        if report.last {
            self.term.nodes.reported(self.node);
            self.term.jobs.unpark();
        }
    }

    /// Compares the first report, which is complete and in order, with what the daemon should have. What seems missing may
    /// only have come after the report: an order for it tells.
    fn find_missing(&mut self, report: &v1::ChunkReport) {
        let Some(mut after) = self.reported else { return };
        let upto = if report.last { u64::MAX } else { report.chunks.last().map_or(0, |last| last.chunk) };
        let there: BTreeSet<u64> = report.chunks.iter().map(|found| found.chunk).collect();
        let kv = self.term.kv();
        while after.get() < upto {
            let listed = match state::chunks_on(&*kv, self.node, after, MISSING_PAGE) {
                Ok(listed) => listed,
                Err(error) => {
                    store_failed("reading a daemon's chunks", &error);
                    return;
                }
            };
            for chunk in listed.iter().filter(|chunk| chunk.get() <= upto && !there.contains(&chunk.get())) {
                self.term.jobs.add(Job::Mend { node: self.node, chunk: *chunk }, false);
            }
            after = match listed.last() {
                Some(last) if listed.len() == MISSING_PAGE && last.get() < upto => *last,
                _ => ChunkId(upto),
            };
        }
        self.reported = (!report.last).then_some(after);
    }
}

/// A newer stream of the same daemon serves.
struct Superseded;
