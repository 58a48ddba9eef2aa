//! A chunk daemon that keeps numbers instead of bytes.

use crate::harness::{key, soon};
use dfs_env::{Env, rpc};
use dfs_proto::v1::{
    ChunkFound, ChunkReport, ErrorCode, Failure, Heartbeat, NodeFrame, NodeHello, Order, OrderDone,
    OrderFrame, control_client::ControlClient, order,
};
use dfs_proto::{FsError, PROTOCOL_VERSION};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// What the daemon has and was told.
#[derive(Default)]
pub struct Memory {
    /// Lengths of its replicas, by chunk.
    pub lengths: BTreeMap<u64, u64>,
    pub sealed: BTreeMap<u64, u64>,
    pub orders: Vec<Order>,
}

/// A running daemon; dropping it ends its stream.
pub struct Daemon {
    pub memory: Arc<Mutex<Memory>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn hello(node: u64, instance: u64) -> NodeHello {
    let mut message = node.to_le_bytes().to_vec();
    message.extend(instance.to_le_bytes());
    NodeHello {
        version: PROTOCOL_VERSION,
        cluster_id: key().cluster_id(),
        node,
        address: format!("127.0.0.1:{}", 9000 + node),
        host: format!("host{node}"),
        rack: String::new(),
        proof: bytes::Bytes::copy_from_slice(&key().mac("node hello", &message)),
        instance,
    }
}

type Inbound = tonic::Streaming<OrderFrame>;

/// Attaches once.
pub async fn attach(
    address: &str,
    hello: NodeHello,
) -> Result<(mpsc::Sender<NodeFrame>, Inbound), (Failure, String)> {
    let channel = rpc::connect(&Env::real(), address, rpc::Tuning::default()).await.expect("connects");
    let (out, frames) = mpsc::channel(64);
    out.send(NodeFrame { hello: Some(hello), ..NodeFrame::default() }).await.expect("open");
    let mut client = ControlClient::new(channel);
    let mut inbound = client.attach(ReceiverStream::new(frames)).await.expect("attaches").into_inner();
    let first = soon(inbound.message()).await.expect("a frame").expect("not the end");
    match first.refusal {
        Some(refusal) => Err((refusal, first.leader)),
        None => {
            assert!(first.welcome.is_some());
            Ok((out, inbound))
        }
    }
}

/// Starts a daemon with what it has on disk.
pub async fn start(address: &str, node: u64, memory: Memory) -> Daemon {
    let memory = Arc::new(Mutex::new(memory));
    let (out, inbound) = loop {
        match attach(address, hello(node, 1)).await {
            Ok(streams) => break streams,
            Err((failure, _)) if failure.code() == ErrorCode::ErrorNotLeader => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err((failure, _)) => panic!("refused: {failure:?}"),
        }
    };
    let chunks = report(&memory.lock().unwrap());
    let report = ChunkReport { chunks, last: true };
    out.send(NodeFrame { report: Some(report), ..NodeFrame::default() }).await.expect("open");
    beat(&out, 1).await;
    let task = tokio::spawn(run(Arc::clone(&memory), out, inbound));
    Daemon { memory, task }
}

fn report(memory: &Memory) -> Vec<ChunkFound> {
    memory
        .lengths
        .iter()
        .map(|(chunk, length)| ChunkFound {
            chunk: *chunk,
            epoch: 1,
            length: *length,
            sealed: memory.sealed.contains_key(chunk),
            damaged: false,
        })
        .collect()
}

async fn beat(out: &mpsc::Sender<NodeFrame>, seq: u64) {
    let heartbeat = Heartbeat {
        seq,
        total_bytes: 100 << 30,
        used_bytes: 40 << 30,
        free_bytes: 60 << 30,
        ..Heartbeat::default()
    };
    // The test may be over.
    drop(out.send(NodeFrame { heartbeat: Some(heartbeat), ..NodeFrame::default() }).await);
}

async fn run(memory: Arc<Mutex<Memory>>, out: mpsc::Sender<NodeFrame>, mut inbound: Inbound) {
    let mut ticks = tokio::time::interval(Duration::from_millis(500));
    let mut seq = 1;
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                seq += 1;
                beat(&out, seq).await;
            }
            frame = inbound.message() => match frame {
                Ok(Some(OrderFrame { order: Some(order), .. })) => {
                    let done = carry_out(&mut memory.lock().unwrap(), order);
                    drop(out.send(NodeFrame { done: Some(done), ..NodeFrame::default() }).await);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

fn carry_out(memory: &mut Memory, order: Order) -> OrderDone {
    memory.orders.push(order.clone());
    let mut done = OrderDone { id: order.id, ..OrderDone::default() };
    match order.op.expect("an order has a kind") {
        order::Op::Fence(fence) => {
            done.epoch = fence.epoch;
            done.length = memory.lengths.get(&fence.chunk).copied().unwrap_or(0);
        }
        order::Op::Seal(seal) => {
            let has = memory.lengths.get(&seal.chunk).copied().unwrap_or(0);
            if has < seal.length {
                done.failure = Some(FsError::new(ErrorCode::ErrorConflict, "too short").into());
            } else {
                memory.lengths.insert(seal.chunk, seal.length);
                memory.sealed.insert(seal.chunk, seal.length);
                done.length = seal.length;
            }
        }
        order::Op::Delete(delete) => {
            memory.lengths.remove(&delete.chunk);
            memory.sealed.remove(&delete.chunk);
        }
        order::Op::Verify(verify) => {
            done.length = memory.sealed.get(&verify.chunk).copied().unwrap_or(0);
        }
        order::Op::Copy(copy) => {
            memory.lengths.insert(copy.chunk, copy.length);
            memory.sealed.insert(copy.chunk, copy.length);
            done.length = copy.length;
        }
        order::Op::Gather(gather) => {
            memory.lengths.insert(gather.chunk, gather.length);
            memory.sealed.insert(gather.chunk, gather.length);
            done.length = gather.length;
        }
    }
    done
}

impl Daemon {
    pub fn hold(&self, chunk: u64, length: u64) {
        self.memory.lock().unwrap().lengths.insert(chunk, length);
    }

    pub fn sealed(&self, chunk: u64) -> Option<u64> {
        self.memory.lock().unwrap().sealed.get(&chunk).copied()
    }

    pub fn has(&self, chunk: u64) -> bool {
        self.memory.lock().unwrap().lengths.contains_key(&chunk)
    }
}
