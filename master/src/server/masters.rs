//! The group of masters: what `dfs master` orders, and what the leader does by itself for those that were added.

use super::admin::{AdminService, not_here};
use super::term::Term;
use crate::raft::ChangeError;
use dfs_proto::v1::change_master_request::Change;
use dfs_proto::v1::{ChangeMasterReply, ChangeMasterRequest, MasterStatus};
use std::sync::Arc;
use std::time::Duration;
use tonic::Status;

/// How often it is looked whether a master that was added has caught up.
const TEND: Duration = Duration::from_millis(250);
/// The other masters are asked for their room in each of so many turns.
const ROOM_TURNS: u32 = 4;

/// Carries out an order; see admin.proto.
pub async fn change(
    service: &AdminService,
    request: ChangeMasterRequest,
) -> Result<ChangeMasterReply, Status> {
    let ChangeMasterRequest { id, now_ms, ref address, ref proof, .. } = request;
    let node = &service.shared.node;
    let changed = match request.change() {
        Change::Add => {
            service.obeying(&format!("add master {address}"), 0, now_ms, proof.clone()).await?;
            check_address(address)?;
            node.add_master(address).await.map(|(id, done)| ChangeMasterReply { id, done, known: true })
        }
        Change::Remove => {
            service.obeying("remove master", id, now_ms, proof.clone()).await?;
            node.remove_master(id).await.map(|known| ChangeMasterReply { id, done: true, known })
        }
        Change::None => return Err(Status::invalid_argument("this master does not know the order")),
    };
    changed.map_err(|error| match error {
        ChangeError::Refused(reason) => Status::failed_precondition(reason),
        ChangeError::Elsewhere(_) => not_here(),
    })
}

fn check_address(address: &str) -> Result<(), Status> {
    crate::config::check_address("the address", address)
        .map_err(|error| Status::invalid_argument(error.to_string()))
}

/// What a leader knows of the others' room ends with its term.
struct Forget(Arc<Term>);

impl Drop for Forget {
    fn drop(&mut self) {
        self.0.shared.node.forget_room();
    }
}

/// Finishes changes of the group that an earlier leader began, lets masters vote that have caught up, and looks after the room
/// on their disks.
pub async fn run(term: Arc<Term>) {
    let _forget = Forget(Arc::clone(&term));
    let (mut told, mut turn) = (String::new(), 0_u32);
    loop {
        tokio::time::sleep(TEND).await;
        turn += 1;
        let short = !term.shared.node.has_room();
        if short || turn.is_multiple_of(ROOM_TURNS) {
            term.shared.node.tend_room().await;
        }
        match term.shared.node.tend_members().await {
            Ok(()) => told.clear(),
            Err(ChangeError::Elsewhere(_)) => return,
            Err(ChangeError::Refused(reason)) if reason == told => {}
            Err(ChangeError::Refused(reason)) => {
                tracing::warn!(%reason, "the group of masters cannot be changed yet");
                told = reason;
            }
        }
    }
}

/// What is to be said about the group.
pub fn warnings(masters: &[MasterStatus]) -> Vec<String> {
    let voters = masters.iter().filter(|master| master.voter).count();
    let mut warnings = Vec::new();
    if voters.is_multiple_of(2) {
        warnings.push(format!("{voters} masters vote, which outlive no more failures than {}", voters - 1));
    }
    for master in masters.iter().filter(|master| !master.voter) {
        warnings
            .push(format!("master {} at {} is catching up and does not vote yet", master.id, master.address));
    }
    warnings
}
