//! `dfs status`

use super::Context;
use crate::Result;
use crate::error::CliError;
use crate::format;
use crate::output::table;
use dfs_client::v1::admin_client::AdminClient;
use dfs_client::v1::{MasterStatus, NodeStatus, SessionStatus, StatusReply, StatusRequest};
use dfs_env::rpc::{Tuning, connect, root_cause};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::time::Duration;

/// How long one master may take to answer unless `--timeout` says otherwise.
const ANSWER: Duration = Duration::from_secs(10);

#[derive(clap::Args, Debug)]
pub struct Args {
    /// The clients, too: what they have open, their locks and leases
    #[arg(short, long, visible_alias = "sessions", short_alias = 's')]
    clients: bool,
    /// Say nothing but whether there is a leader and at least this many chunk daemons are up
    #[arg(long, value_name = "NODES")]
    ready: Option<usize>,
}

pub async fn run(context: &Context, args: Args) -> Result {
    let status = ask(context, args.clients).await?;
    if let Some(wanted) = args.ready {
        let up = status.nodes.iter().filter(|node| node.state == "up").count();
        return if up >= wanted {
            Ok(())
        } else {
            Err(CliError::Failed(format!("{up} of {wanted} chunk daemons are up")))
        };
    }
    if context.output.json {
        context.output.value(&to_json(&status))
    } else {
        context.output.text(&human(&status))
    }
}

/// Asks the leader, wherever the first master that answers says it is.
pub async fn ask(context: &Context, sessions: bool) -> Result<StatusReply> {
    let config = context.config()?;
    let bound = config.operation_timeout.unwrap_or(ANSWER).min(ANSWER);
    let mut todo: VecDeque<String> = config.masters.iter().cloned().collect();
    let mut asked: Vec<String> = Vec::new();
    let mut causes: Vec<String> = Vec::new();
    while let Some(address) = todo.pop_front() {
        if asked.contains(&address) {
            continue;
        }
        asked.push(address.clone());
        let answer = tokio::time::timeout(bound, one(context, &address, sessions));
        match answer.await {
            Ok(Ok(status)) if !status.cluster_id.is_empty() => return Ok(status),
            Ok(Ok(status)) if status.leader.is_empty() => {
                causes.push(format!("{address}: no leader is known"));
            }
            // The leader goes first; the others stay for the case that it has just died.
            Ok(Ok(status)) => todo.push_front(status.leader),
            Ok(Err(cause)) => causes.push(cause),
            Err(_) => causes.push(format!("{address}: no answer within {bound:?}")),
        }
    }
    if causes.is_empty() {
        causes.push("no master leads".to_owned());
    }
    Err(CliError::Failed(format!("cannot reach the cluster: {}", causes.join("; "))))
}

async fn one(context: &Context, address: &str, sessions: bool) -> std::result::Result<StatusReply, String> {
    let channel =
        connect(&context.env, address, Tuning::default()).await.map_err(|error| error.to_string())?;
    let mut client = AdminClient::new(channel).max_decoding_message_size(dfs_proto::limits::MESSAGE_MAX);
    let reply = client.status(StatusRequest { sessions }).await;
    reply.map(tonic::Response::into_inner).map_err(|status| {
        let cause =
            if status.message().is_empty() { root_cause(&status) } else { status.message().to_owned() };
        format!("{address}: {cause}")
    })
}

fn human(status: &StatusReply) -> String {
    let mut text = format!(
        "cluster   {}\nfiles     {}\nchunks    {} holding {} of files ({} copies, chunks of {})\nspace     {} of {} free\n",
        status.cluster_id,
        status.files,
        status.chunks,
        format::size(status.live_bytes),
        status.replicas,
        format::size(status.chunk_size),
        format::size(status.free_bytes),
        format::size(status.total_bytes),
    );
    for (count, what) in [
        (status.under_replicated, "chunks with too few copies"),
        (status.surplus, "chunks with more copies than they should have"),
        (status.reviews, "files whose number of copies was set and is being passed on to their chunks"),
        (status.waiting_seal, "chunks waiting to be sealed"),
        (status.orphans, "removed files still open"),
    ] {
        if count > 0 {
            text.push_str(&format!("          {count} {what}\n"));
        }
    }
    if let Some(repair) = status.repair.filter(|repair| repair.waiting + repair.copying > 0) {
        text.push_str(&format!(
            "repair    {} chunks wait, {} copies are being made, {}/s\n",
            repair.waiting,
            repair.copying,
            format::size(repair.bytes_per_second)
        ));
    }
    if let Some(compaction) =
        status.compaction.filter(|compaction| compaction.waiting + compaction.running > 0)
    {
        text.push_str(&format!(
            "compact   {} half-dead chunks wait or are copied, {} of each replica are dead\n",
            compaction.waiting,
            format::size(compaction.waiting_bytes)
        ));
    }
    text.push_str(&format!(
        "raft      term {}, applied {}, snapshot {}\n\n",
        status.term, status.applied, status.snapshot
    ));
    text.push_str(&master_table(&status.masters));
    text.push('\n');
    text.push_str(&node_table(&status.nodes));
    if !status.sessions.is_empty() {
        text.push('\n');
        text.push_str(&session_table(&status.sessions));
    }
    for warning in &status.warnings {
        text.push_str(&format!("\nwarning: {warning}\n"));
    }
    text
}

/// The masters, for people.
pub fn master_table(masters: &[MasterStatus]) -> String {
    let rows: Vec<Vec<String>> = masters
        .iter()
        .map(|master| {
            let role = match (master.leader, master.voter) {
                (true, _) => "leader",
                (false, true) => "follower",
                (false, false) => "learner",
            };
            vec![master.id.to_string(), master.address.clone(), role.to_owned(), master.matched.to_string()]
        })
        .collect();
    table(&[">MASTER", "ADDRESS", "ROLE", ">LOG"], &rows)
}

/// The masters, for programs.
pub fn master_json(masters: &[MasterStatus]) -> Value {
    masters
        .iter()
        .map(|master| {
            json!({"id": master.id, "address": master.address, "leader": master.leader, "voter": master.voter,
                   "matched": master.matched})
        })
        .collect()
}

/// The chunk daemons, for people.
pub fn node_table(nodes: &[NodeStatus]) -> String {
    let rows: Vec<Vec<String>> = nodes
        .iter()
        .map(|node| {
            vec![
                format!("{:016x}", node.node),
                node.address.clone(),
                node.host.clone(),
                node.rack.clone(),
                if node.draining { format!("{}, drained", node.state) } else { node.state.clone() },
                node.chunks.to_string(),
                format::size(node.used_bytes),
                format::size(node.free_bytes),
                format::ago(node.last_seen_ms),
            ]
        })
        .collect();
    table(&["NODE", "ADDRESS", "HOST", "RACK", "STATE", ">CHUNKS", ">USED", ">FREE", "SEEN"], &rows)
}

/// The chunk daemons, for programs.
pub fn node_json(nodes: &[NodeStatus]) -> Value {
    nodes
        .iter()
        .map(|node| {
            json!({
                // As text: JSON numbers lose digits beyond 2^53 in many programs.
                "node": format!("{:016x}", node.node), "address": node.address, "host": node.host,
                "rack": node.rack, "state": node.state, "chunks": node.chunks, "total_bytes": node.total_bytes,
                "used_bytes": node.used_bytes, "free_bytes": node.free_bytes, "last_seen_ms": node.last_seen_ms,
                "draining": node.draining, "flawed": node.flawed,
            })
        })
        .collect()
}

fn session_table(sessions: &[SessionStatus]) -> String {
    let rows: Vec<Vec<String>> = sessions
        .iter()
        .map(|session| {
            vec![
                session.session.to_string(),
                session.client.clone(),
                session.host.clone(),
                session.opens.to_string(),
                session.locks.to_string(),
                session.leases.to_string(),
                session.requests.to_string(),
                format::ago(session.last_seen_ms),
            ]
        })
        .collect();
    table(&[">SESSION", "CLIENT", "HOST", ">OPENS", ">LOCKS", ">LEASES", ">REQUESTS", "SEEN"], &rows)
}

fn to_json(status: &StatusReply) -> Value {
    let sessions: Vec<Value> = status
        .sessions
        .iter()
        .map(|session| {
            json!({"session": session.session, "client": session.client, "host": session.host,
                   "last_seen_ms": session.last_seen_ms, "opens": session.opens, "locks": session.locks,
                   "leases": session.leases, "requests": session.requests})
        })
        .collect();
    let repair = status.repair.unwrap_or_default();
    let repair = json!({"waiting": repair.waiting, "copying": repair.copying, "copied": repair.copied,
                        "copied_bytes": repair.copied_bytes, "failed": repair.failed,
                        "bytes_per_second": repair.bytes_per_second, "flawed": repair.flawed});
    let compaction = status.compaction.unwrap_or_default();
    let compaction = json!({"waiting": compaction.waiting, "waiting_bytes": compaction.waiting_bytes,
                            "running": compaction.running, "compacted": compaction.compacted,
                            "moved_bytes": compaction.moved_bytes, "failed": compaction.failed});
    json!({
        "compaction": compaction, "repair": repair, "cluster_id": status.cluster_id, "term": status.term, "applied": status.applied,
        "snapshot": status.snapshot, "masters": master_json(&status.masters), "nodes": node_json(&status.nodes), "sessions": sessions,
        "files": status.files, "chunks": status.chunks, "live_bytes": status.live_bytes,
        "total_bytes": status.total_bytes, "free_bytes": status.free_bytes, "replicas": status.replicas,
        "chunk_size": status.chunk_size, "under_replicated": status.under_replicated,
        "surplus": status.surplus, "reviews": status.reviews,
        "waiting_seal": status.waiting_seal, "orphans": status.orphans, "warnings": status.warnings,
    })
}
