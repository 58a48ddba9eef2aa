//! A leader that was replaced long ago and does not know it: it takes in whatever chunk daemon comes by, and has it delete
//! everything that it reports. A daemon that has heard of a later term must not listen.

use crate::disk::SimDisk;
use crate::env::{Clocks, env};
use dfs_env::rpc::{self, Tuning};
use dfs_proto::v1::control_server::{Control, ControlServer};
use dfs_proto::v1::{DeleteOrder, NodeFrame, NodeWelcome, Order, OrderFrame, order};
use futures::stream::BoxStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

/// Its name.
pub const HOST: &str = "old-leader";
/// Until then it is silent: daemons that have heard of no term yet could not know better.
const AWAKE: Duration = Duration::from_secs(3);
/// How long it goes on before a daemon is free to look for somebody else.
const REIGN: Duration = Duration::from_millis(500);
/// No leader has had a lower one.
const TERM: u64 = 0;

type Sender = mpsc::Sender<Result<OrderFrame, Status>>;

struct OldLeader {
    /// How many daemons came.
    greeted: Arc<AtomicU64>,
}

#[tonic::async_trait]
impl Control for OldLeader {
    type AttachStream = BoxStream<'static, Result<OrderFrame, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<NodeFrame>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        if turmoil::sim_elapsed().unwrap_or_default() < AWAKE {
            return Err(Status::unavailable("asleep"));
        }
        self.greeted.fetch_add(1, Ordering::Relaxed);
        let mut inbound = request.into_inner();
        let orders = for_a_while(move |orders: Sender| async move {
            let welcome = NodeWelcome { term: TERM, heartbeat_ms: 0 };
            orders.send(Ok(OrderFrame { welcome: Some(welcome), ..OrderFrame::default() })).await.ok()?;
            let mut id = 0;
            while let Some(frame) = inbound.message().await.ok()? {
                for found in frame.report.unwrap_or_default().chunks {
                    id += 1;
                    let op = Some(order::Op::Delete(DeleteOrder { chunk: found.chunk }));
                    let order = Some(Order { id, term: TERM, op });
                    orders.send(Ok(OrderFrame { order, ..OrderFrame::default() })).await.ok()?;
                }
            }
            None
        });
        Ok(Response::new(orders))
    }
}

/// What a task says for as long as it reigns.
fn for_a_while<F>(speak: impl FnOnce(Sender) -> F) -> BoxStream<'static, Result<OrderFrame, Status>>
where
    F: Future<Output = Option<()>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(16);
    let speaking = speak(sender);
    tokio::spawn(async move { tokio::time::timeout(REIGN, speaking).await });
    let next =
        |mut receiver: mpsc::Receiver<_>| async move { receiver.recv().await.map(|frame| (frame, receiver)) };
    Box::pin(futures::stream::unfold(receiver, next))
}

/// Starts it. `greeted` counts the daemons that came.
pub fn start(sim: &mut turmoil::Sim<'_>, port: u16, greeted: Arc<AtomicU64>) {
    sim.host(HOST, move || {
        let greeted = Arc::clone(&greeted);
        async move {
            let env = env(&SimDisk::default(), &Clocks::new(0), 0);
            let listener = env.net.listen(&format!("{HOST}:{port}")).await?;
            let service = ControlServer::new(OldLeader { greeted });
            rpc::server(Tuning::default())
                .add_service(service)
                .serve_with_incoming(rpc::incoming(listener))
                .await?;
            Ok(())
        }
    });
}
