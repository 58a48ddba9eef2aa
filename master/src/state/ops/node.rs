//! Chunk daemons: registered, drained, removed.

use super::State;
use crate::state::keys;
use crate::state::rows::{OpResult, number, refused};
use dfs_proto::NodeId;
use dfs_proto::v1::system_answer::Body;
use dfs_proto::v1::{self, ErrorCode, NodeRow};

/// A daemon is new, or has another address or label than before.
pub fn register(s: &mut State<'_>, op: &v1::RegisterNode) -> OpResult<Body> {
    if op.node == 0 || op.address.is_empty() {
        return refused(ErrorCode::ErrorInvalid, "a chunk daemon without number or address");
    }
    let draining = s.tx.find_node(NodeId(op.node))?.is_some_and(|row| row.draining);
    let row = NodeRow {
        node: op.node,
        address: op.address.clone(),
        host: op.host.clone(),
        rack: op.rack.clone(),
        draining,
    };
    s.tx.put_row(keys::node(NodeId(op.node)), &row);
    Ok(Body::Empty(v1::Empty {}))
}

fn existing(s: &State<'_>, node: NodeId) -> OpResult<NodeRow> {
    match s.tx.find_node(node)? {
        Some(row) => Ok(row),
        None => refused(ErrorCode::ErrorNotFound, format!("there is no chunk daemon {:016x}", node.get())),
    }
}

/// A daemon gets no new replicas from here on, or gets some again.
pub fn drain(s: &mut State<'_>, op: &v1::DrainNode) -> OpResult<Body> {
    let mut row = existing(s, NodeId(op.node))?;
    row.draining = op.drain;
    s.tx.put_row(keys::node(NodeId(op.node)), &row);
    Ok(Body::Empty(v1::Empty {}))
}

/// Forgets a daemon that no chunk lists.
pub fn remove(s: &mut State<'_>, op: &v1::RemoveNode) -> OpResult<Body> {
    let node = NodeId(op.node);
    existing(s, node)?;
    let first = s.tx.collect(&keys::replicas_of(node), 1, |key, _| number(key, 1))?;
    if let Some(chunk) = first.first() {
        let text = format!(
            "chunk daemon {:016x} still has replicas that count, the first of chunk {chunk}",
            node.get()
        );
        return refused(ErrorCode::ErrorBusy, text);
    }
    s.tx.delete(keys::node(node));
    Ok(Body::Empty(v1::Empty {}))
}
