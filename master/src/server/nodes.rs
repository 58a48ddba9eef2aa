//! The chunk daemons as the leader sees them: who is up, how full they are, and the way to give them orders.

use crate::placement::{self, Candidate, Domain, Health};
use crate::repair::Holder;
use dfs_env::Clock;
use dfs_proto::limits::{HEARTBEAT_MS, NODE_DEAD_MS, NODE_SUSPECT_MS};
use dfs_proto::v1::{self, ErrorCode, Heartbeat, NodeRow, NodeStatus, Order, OrderDone, order};
use dfs_proto::{ByteLen, FsError, NodeId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

/// Orders that wait to be sent to one daemon.
const ORDER_QUEUE: usize = 256;

/// Reports of failed appends that come within this time speak of one incident.
const INCIDENT: Duration = Duration::from_secs(2);
/// For how long one incident makes a daemon doubted, and a second one makes it suspect.
const DOUBT: Duration = Duration::from_secs(5);
const DISTRUST: Duration = Duration::from_secs(10);
/// An incident is the second one when the first was not longer ago.
const MEMORY: Duration = Duration::from_secs(30);
/// A daemon that clients complain about and that missed its last heartbeat is not doubted but suspect.
const BEAT_MISSED: Duration = Duration::from_millis(HEARTBEAT_MS * 3 / 2);

/// Why an order was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    #[error("the daemon is away")]
    Away,
    #[error("the daemon did not answer in time")]
    TimedOut,
    #[error("the daemon refused: {0}")]
    Refused(FsError),
}

/// A daemon's stream, as long as it lasts.
struct Link {
    instance: u64,
    generation: u64,
    orders: mpsc::Sender<Order>,
    pending: BTreeMap<u64, oneshot::Sender<OrderDone>>,
}

struct Node {
    row: NodeRow,
    link: Option<Link>,
    /// Time since boot at its last frame, or at the election.
    seen: Duration,
    heartbeat: Option<Heartbeat>,
    /// The last time that clients could not append to it.
    complaint: Option<Complaint>,
    /// Its first report since it attached is complete.
    reported: bool,
    /// Chunks in its report that this cluster does not know. They are left alone.
    unknown: u64,
}

/// A daemon that beats may still be out of a client's reach, or too slow. Leaving it out at the first complaint would cost
/// new chunks a replica whenever a machine is busy; never leaving it out would make some clients fail for ever.
#[derive(Clone, Copy, Debug)]
struct Complaint {
    /// When the incident began.
    since: Duration,
    repeated: bool,
}

/// What a daemon's stream needs.
pub struct Attached {
    pub generation: u64,
    pub orders: mpsc::Receiver<Order>,
}

/// Space of all daemons that are not dead, in bytes.
#[derive(Clone, Copy, Default, Debug)]
pub struct Space {
    pub total: u64,
    pub free: u64,
}

/// All daemons.
pub struct Nodes {
    clock: Arc<dyn Clock>,
    map: Mutex<Table>,
    /// Counts attaches and detaches, so that orders can wait for a daemon to come back.
    links: watch::Sender<u64>,
}

struct Table {
    nodes: BTreeMap<NodeId, Node>,
    next_order: u64,
    next_generation: u64,
}

impl Nodes {
    /// At an election: the daemons that ever registered, none of them attached yet.
    pub fn new(clock: Arc<dyn Clock>, rows: Vec<NodeRow>, now: Duration) -> Self {
        let nodes = rows.into_iter().map(|row| (NodeId(row.node), Node::new(row, now))).collect();
        let table = Table { nodes, next_order: 1, next_generation: 1 };
        Self { clock, map: Mutex::new(table), links: watch::Sender::new(0) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a process may attach as this daemon: not while another process is doing so.
    pub fn admit(&self, node: NodeId, instance: u64) -> Result<(), FsError> {
        let now = self.clock.boot();
        let table = self.table();
        let Some(known) = table.nodes.get(&node) else { return Ok(()) };
        let alive = now.saturating_sub(known.seen) < Duration::from_millis(NODE_SUSPECT_MS);
        match &known.link {
            Some(link) if link.instance != instance && alive => Err(FsError::new(
                ErrorCode::ErrorConflict,
                format!("node {:016x} is in use by another daemon at {}", node.get(), known.row.address),
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// A daemon's stream begins; an older stream of it is over.
    pub fn attach(&self, row: NodeRow, instance: u64) -> Attached {
        let now = self.clock.boot();
        let (sender, orders) = mpsc::channel(ORDER_QUEUE);
        let mut table = self.table();
        let generation = table.next_generation;
        table.next_generation += 1;
        let id = NodeId(row.node);
        let node = table.nodes.entry(id).or_insert_with(|| Node::new(row.clone(), now));
        // What was read of it may be older than what was decided since.
        node.row = NodeRow { draining: node.row.draining, ..row };
        node.seen = now;
        (node.unknown, node.reported) = (0, false);
        node.link = Some(Link { instance, generation, orders: sender, pending: BTreeMap::new() });
        drop(table);
        self.links.send_modify(|links| *links += 1);
        Attached { generation, orders }
    }

    /// A daemon's stream ended: orders on their way are not answered.
    pub fn detach(&self, node: NodeId, generation: u64) {
        if let Some(node) = self.table().nodes.get_mut(&node)
            && node.link.as_ref().is_some_and(|link| link.generation == generation)
        {
            node.link = None;
        }
        self.links.send_modify(|links| *links += 1);
    }

    /// Ends every daemon's stream: they come back, and say what they have.
    pub fn detach_all(&self) {
        self.table().nodes.values_mut().for_each(|node| node.link = None);
        self.links.send_modify(|links| *links += 1);
    }

    /// A sign of life, perhaps with news of its space. False: another stream of this daemon has taken over.
    pub fn seen(&self, node: NodeId, generation: u64, heartbeat: Option<Heartbeat>) -> bool {
        let now = self.clock.boot();
        let mut table = self.table();
        let Some(node) = table.nodes.get_mut(&node) else { return false };
        if node.link.as_ref().is_none_or(|link| link.generation != generation) {
            return false;
        }
        node.seen = now;
        if let Some(heartbeat) = heartbeat {
            let first = node.heartbeat.is_none();
            node.heartbeat = Some(heartbeat);
            drop(table);
            if first {
                // Its space is known from now on: an allocation may be waiting for that.
                self.links.send_modify(|links| *links += 1);
            }
        }
        true
    }

    /// A client could not append to this daemon.
    pub fn suspect(&self, node: NodeId) {
        let now = self.clock.boot();
        if let Some(node) = self.table().nodes.get_mut(&node) {
            let since = match node.complaint {
                Some(last) if now < last.since + INCIDENT => return,
                last => last.map(|last| last.since),
            };
            let repeated = since.is_some_and(|since| now < since + MEMORY);
            node.complaint = Some(Complaint { since: now, repeated });
        }
    }

    /// Everything that the daemon has was compared with what it should have.
    pub fn reported(&self, node: NodeId) {
        if let Some(node) = self.table().nodes.get_mut(&node) {
            node.reported = true;
        }
    }

    /// The daemon's report has chunks that this cluster does not know.
    pub fn unknown(&self, node: NodeId, more: u64) {
        if let Some(node) = self.table().nodes.get_mut(&node) {
            node.unknown += more;
        }
    }

    /// The daemon carried out an order, or could not.
    pub fn done(&self, node: NodeId, generation: u64, done: OrderDone) {
        let waiting = self
            .table()
            .nodes
            .get_mut(&node)
            .and_then(|node| node.link.as_mut())
            .filter(|link| link.generation == generation)
            .and_then(|link| link.pending.remove(&done.id));
        if let Some(waiting) = waiting {
            // Whoever gave the order may have stopped waiting.
            let _late = waiting.send(done);
        }
    }

    /// Gives an order and waits for it to be carried out. A daemon that is away is waited for, one that is dead is not.
    /// An order whose stream breaks is given again: all orders may be repeated.
    pub async fn order(
        &self,
        term: u64,
        node: NodeId,
        op: &order::Op,
        deadline: Instant,
    ) -> Result<OrderDone, OrderError> {
        let mut links = self.links.subscribe();
        loop {
            links.borrow_and_update();
            let Some((orders, order, answer)) = self.prepare(term, node, op) else {
                if self.health(node) == Health::Dead {
                    return Err(OrderError::Away);
                }
                // Looks again once a second: a daemon dies without anything happening.
                let look = deadline.min(Instant::now() + Duration::from_secs(1));
                match tokio::time::timeout_at(look, links.changed()).await {
                    Ok(_) => {}
                    Err(_) if look < deadline => {}
                    Err(_) => return Err(OrderError::Away),
                }
                continue;
            };
            let id = order.id;
            let result = tokio::time::timeout_at(deadline, async {
                orders.send(order).await.ok()?;
                answer.await.ok()
            })
            .await;
            match result {
                Ok(Some(OrderDone { failure: Some(failure), .. })) => {
                    return Err(OrderError::Refused(failure.into()));
                }
                Ok(Some(done)) => return Ok(done),
                Ok(None) => {
                    // The stream broke. Its end is noted in a moment: do not spin until then.
                    let soon = deadline.min(Instant::now() + Duration::from_millis(50));
                    let _noted_or_not = tokio::time::timeout_at(soon, links.changed()).await;
                }
                Err(_) => {
                    self.forget_order(node, id);
                    return Err(OrderError::TimedOut);
                }
            }
        }
    }

    fn prepare(
        &self,
        term: u64,
        node: NodeId,
        op: &order::Op,
    ) -> Option<(mpsc::Sender<Order>, Order, oneshot::Receiver<OrderDone>)> {
        let mut table = self.table();
        let id = table.next_order;
        table.next_order += 1;
        let link = table.nodes.get_mut(&node)?.link.as_mut()?;
        let (sender, answer) = oneshot::channel();
        link.pending.insert(id, sender);
        Some((link.orders.clone(), Order { id, term, op: Some(op.clone()) }, answer))
    }

    fn forget_order(&self, node: NodeId, id: u64) {
        if let Some(link) = self.table().nodes.get_mut(&node).and_then(|node| node.link.as_mut()) {
            link.pending.remove(&id);
        }
    }

    /// Whether a daemon can be given orders right now.
    pub fn is_attached(&self, node: NodeId) -> bool {
        self.table().nodes.get(&node).is_some_and(|node| node.link.is_some())
    }

    /// Whether a daemon can be relied on. One that nobody knows is dead.
    pub fn health(&self, node: NodeId) -> Health {
        let now = self.clock.boot();
        self.table().nodes.get(&node).map_or(Health::Dead, |node| node.health(now))
    }

    /// The daemons for placement to choose from.
    pub fn candidates(&self) -> Vec<Candidate> {
        let now = self.clock.boot();
        let table = self.table();
        let known = table.nodes.values().filter_map(|node| Some((node, node.heartbeat.as_ref()?)));
        known
            .map(|(node, heartbeat)| Candidate {
                node: NodeId(node.row.node),
                domain: node.domain(),
                free: ByteLen(heartbeat.free_bytes),
                total: ByteLen(heartbeat.total_bytes),
                health: node.health(now),
                draining: node.row.draining,
            })
            .collect()
    }

    /// The daemons that hold a chunk's replicas. One that nobody knows is dead.
    pub fn holders(&self, chunk: &v1::ChunkState) -> Vec<Holder> {
        let now = self.clock.boot();
        let table = self.table();
        let holder = |id: &u64| {
            let node = table.nodes.get(&NodeId(*id));
            Holder {
                node: NodeId(*id),
                domain: node.map(Node::domain).unwrap_or_default(),
                health: node.map_or(Health::Dead, |node| node.health(now)),
                draining: node.is_some_and(|node| node.row.draining),
                reported: node.is_some_and(|node| node.reported),
                fill: node.and_then(|node| node.heartbeat.as_ref()).map_or(1000, |beat| {
                    placement::fill(ByteLen(beat.free_bytes), ByteLen(beat.total_bytes))
                }),
            }
        };
        chunk.nodes.iter().map(holder).collect()
    }

    /// A daemon is about to have so many bytes more, or fewer: its free space counts as that until its next heartbeat says what
    /// it is. Else all that is decided between two heartbeats would choose the same emptiest daemon, and overfill it.
    pub fn expect(&self, node: NodeId, more: i64) {
        let mut table = self.table();
        if let Some(beat) = table.nodes.get_mut(&node).and_then(|node| node.heartbeat.as_mut()) {
            beat.free_bytes = beat.free_bytes.saturating_sub_signed(more).min(beat.total_bytes);
        }
    }

    /// Where a daemon is reached.
    pub fn address(&self, node: NodeId) -> Option<String> {
        self.table().nodes.get(&node).map(|node| node.row.address.clone())
    }

    /// A daemon is drained, or is not any more.
    pub fn set_draining(&self, node: NodeId, draining: bool) {
        if let Some(node) = self.table().nodes.get_mut(&node) {
            node.row.draining = draining;
        }
    }

    /// Whether a daemon ever registered and was not removed.
    pub fn is_known(&self, node: NodeId) -> bool {
        self.table().nodes.contains_key(&node)
    }

    /// A daemon was removed. Its stream ends.
    pub fn remove(&self, node: NodeId) {
        self.table().nodes.remove(&node);
    }

    /// Learns of daemons that come and go.
    pub fn links(&self) -> watch::Receiver<u64> {
        self.links.subscribe()
    }

    /// Fills in where a daemon is; how it does.
    pub fn locate(&self, replica: &mut v1::Replica) -> Health {
        let now = self.clock.boot();
        let table = self.table();
        let Some(node) = table.nodes.get(&NodeId(replica.node)) else { return Health::Dead };
        replica.address.clone_from(&node.row.address);
        replica.host.clone_from(&node.row.host);
        node.health(now)
    }

    /// Space of the daemons that are not dead.
    pub fn space(&self) -> Space {
        let now = self.clock.boot();
        let table = self.table();
        let mut space = Space::default();
        for node in table.nodes.values().filter(|node| node.health(now) != Health::Dead) {
            if let Some(heartbeat) = &node.heartbeat {
                space.total = space.total.saturating_add(heartbeat.total_bytes);
                space.free = space.free.saturating_add(heartbeat.free_bytes);
            }
        }
        space
    }

    /// Every daemon for `dfs status`, with the number of chunks that are not known and the directories that failed.
    pub fn status(&self) -> Vec<(NodeStatus, u64, Vec<String>)> {
        let now = self.clock.boot();
        let table = self.table();
        table
            .nodes
            .values()
            .map(|node| {
                let heartbeat = node.heartbeat.clone().unwrap_or_default();
                let failed =
                    heartbeat.dirs.iter().filter(|dir| dir.failed).map(|dir| dir.path.clone()).collect();
                let status = NodeStatus {
                    node: node.row.node,
                    address: node.row.address.clone(),
                    host: node.row.host.clone(),
                    rack: node.row.rack.clone(),
                    state: node.health(now).name().to_owned(),
                    total_bytes: heartbeat.total_bytes,
                    used_bytes: heartbeat.used_bytes,
                    free_bytes: heartbeat.free_bytes,
                    chunks: heartbeat.chunks,
                    last_seen_ms: millis(now.saturating_sub(node.seen)),
                    draining: node.row.draining,
                    ..NodeStatus::default()
                };
                (status, node.unknown, failed)
            })
            .collect()
    }
}

impl Node {
    fn new(row: NodeRow, now: Duration) -> Self {
        Self { row, link: None, seen: now, heartbeat: None, complaint: None, reported: false, unknown: 0 }
    }

    fn domain(&self) -> Domain {
        Domain { host: self.row.host.clone(), rack: self.row.rack.clone() }
    }

    fn health(&self, now: Duration) -> Health {
        let silent = now.saturating_sub(self.seen);
        if silent >= Duration::from_millis(NODE_DEAD_MS) {
            return Health::Dead;
        }
        if silent >= Duration::from_millis(NODE_SUSPECT_MS) || self.link.is_none() {
            return Health::Suspect;
        }
        match self.complaint {
            Some(Complaint { since, repeated: true }) if now < since + DISTRUST => Health::Suspect,
            Some(Complaint { since, repeated: false }) if now < since + DOUBT => {
                if silent >= BEAT_MISSED {
                    Health::Suspect
                } else {
                    Health::Doubted
                }
            }
            Some(_) | None => Health::Up,
        }
    }
}

/// A duration in whole milliseconds.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    struct Stopped;
    impl Clock for Stopped {
        fn system(&self) -> std::time::SystemTime {
            std::time::UNIX_EPOCH
        }
        fn boot(&self) -> Duration {
            seconds(100.0)
        }
    }

    fn node(complaint: Option<Complaint>) -> Node {
        let (orders, _) = mpsc::channel(1);
        let mut node = Node::new(NodeRow::default(), seconds(100.0));
        node.link = Some(Link { instance: 1, generation: 1, orders, pending: BTreeMap::new() });
        node.complaint = complaint;
        node
    }

    #[test]
    fn silence_makes_a_daemon_suspect_and_then_dead_and_a_lost_stream_suspect_at_once() {
        let mut node = node(None);
        assert_eq!(node.health(seconds(102.9)), Health::Up);
        assert_eq!(node.health(seconds(103.0)), Health::Suspect);
        assert_eq!(node.health(seconds(110.0)), Health::Dead);
        node.link = None;
        assert_eq!(node.health(seconds(100.0)), Health::Suspect);
    }

    #[test]
    fn one_complaint_makes_a_daemon_doubted_and_a_second_one_suspect() {
        let first = node(Some(Complaint { since: seconds(99.0), repeated: false }));
        assert_eq!(first.health(seconds(100.5)), Health::Doubted);
        assert_eq!(first.health(seconds(101.5)), Health::Suspect, "it missed a heartbeat");
        let mut beaten = first;
        beaten.seen = seconds(104.5);
        assert_eq!(beaten.health(seconds(104.5)), Health::Up);
        let again = node(Some(Complaint { since: seconds(99.0), repeated: true }));
        assert_eq!(again.health(seconds(100.5)), Health::Suspect);
    }

    #[test]
    fn complaints_of_one_incident_count_once() {
        let row = NodeRow { node: 1, ..NodeRow::default() };
        let nodes = Nodes::new(Arc::new(Stopped), vec![row.clone()], seconds(100.0));
        let _attached = nodes.attach(row, 1);
        nodes.suspect(NodeId(1));
        nodes.suspect(NodeId(1));
        assert_eq!(nodes.health(NodeId(1)), Health::Doubted);
        if let Some(node) = nodes.table().nodes.get_mut(&NodeId(1)) {
            node.complaint = Some(Complaint { since: seconds(95.0), repeated: false });
        }
        nodes.suspect(NodeId(1));
        assert_eq!(nodes.health(NodeId(1)), Health::Suspect);
    }

    #[tokio::test]
    async fn orders_wait_for_daemons_that_are_away_but_not_for_dead_ones() {
        let row = NodeRow { node: 1, ..NodeRow::default() };
        let nodes = Nodes::new(Arc::new(Stopped), vec![row.clone()], seconds(100.0));
        let op = order::Op::Delete(v1::DeleteOrder { chunk: 5 });
        let deadline = Instant::now() + seconds(0.3);
        let away = nodes.order(1, NodeId(1), &op, deadline).await;
        assert!(matches!(away, Err(OrderError::Away)) && Instant::now() >= deadline, "{away:?}");
        let later = Instant::now() + seconds(60.0);
        assert!(matches!(nodes.order(1, NodeId(2), &op, later).await, Err(OrderError::Away)));
        assert!(Instant::now() < later);

        let daemon = async {
            tokio::time::sleep(seconds(0.1)).await;
            let mut attached = nodes.attach(row, 1);
            let order = attached.orders.recv().await.expect("an order");
            assert_eq!((order.term, order.op), (1, Some(op.clone())));
            nodes.done(
                NodeId(1),
                attached.generation,
                OrderDone { id: order.id, length: 7, ..OrderDone::default() },
            );
        };
        let (done, ()) = tokio::join!(nodes.order(1, NodeId(1), &op, Instant::now() + seconds(30.0)), daemon);
        assert_eq!(done.expect("carried out").length, 7);
    }
}
