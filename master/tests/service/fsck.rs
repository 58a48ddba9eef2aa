//! `dfs fsck --repair` on a running master whose state is damaged.

use crate::harness::*;
use bytes::Bytes;
use dfs_env::{Env, rpc};
use dfs_master::state::{WriteSet, check_invariants, keys};
use dfs_proto::InodeNo;
use dfs_proto::v1::{
    FsckReply, FsckRequest, GetAttr, Hello, InodeRow, LeaseKind, admin_client::AdminClient, answer::Body,
    query,
};
use prost::Message;

/// Every reply of a check, as one.
async fn fsck(address: &str, repair: bool) -> FsckReply {
    let env = Env::real();
    let channel = rpc::connect(&env, address, rpc::Tuning::default()).await.expect("connects");
    let now_ms = env.clock.system_ms();
    let purpose = if repair { "fsck repair" } else { "fsck" };
    let challenge = status(address).await.challenge;
    let proof = Bytes::copy_from_slice(&key().proof(purpose, 0, now_ms, challenge));
    let request = FsckRequest { deep: false, now_ms, proof, repair };
    let mut replies = AdminClient::new(channel).fsck(request).await.expect("begins").into_inner();
    let mut all = FsckReply::default();
    while let Some(reply) = soon(replies.message()).await.expect("goes on") {
        let (mut problems, mut mended) = (all.problems, all.mended);
        problems.extend(reply.problems.iter().cloned());
        mended.extend(reply.mended.iter().cloned());
        all = FsckReply { problems, mended, ..reply };
    }
    assert!(all.done);
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_found_mended_and_not_hidden_from_who_caches_it() {
    let dir = tempfile::tempdir().unwrap();
    let master = start(dir.path()).await;
    let address = master.address().to_owned();
    let mut holder = serve(&address, Hello { takes_leases: true, ..hello() }).await;
    let ino = holder.create("f", false).await.ino;
    assert_eq!(fsck(&address, true).await.mended, Vec::<String>::new());

    let kv = master.node().kv();
    let row_key = keys::inode(InodeNo(ino));
    let mut row = InodeRow::decode(kv.get(&row_key).unwrap().unwrap().as_slice()).unwrap();
    row.attr.as_mut().unwrap().nlink = 5;
    kv.apply(&WriteSet::from([
        (row_key, Some(row.encode_to_vec())),
        (keys::orphan(InodeNo(4711)), Some(vec![0])),
    ]))
    .unwrap();
    let attributes = || query::Op::GetAttr(GetAttr { ino, generation: 0 });
    eventually_leased(&mut holder, ino, attributes()).await;
    assert_eq!(fsck(&address, false).await.problems.len(), 2);

    let mending = tokio::spawn({
        let address = address.clone();
        async move { fsck(&address, true).await }
    });
    let recall = holder.recall().await;
    assert_eq!(recall.ino, ino);
    holder.give_back(&recall).await;
    let reply = soon(mending).await.unwrap();
    assert_eq!((reply.mended.len(), reply.problems.len()), (2, 0), "{reply:?}");
    let Body::Entry(entry) = holder.query(attributes()).await else { panic!("no attributes") };
    assert_eq!(entry.attr.unwrap().nlink, 1);
    assert_eq!(check_invariants(&*kv), Vec::<String>::new());
    assert_eq!(fsck(&address, false).await.problems, Vec::<String>::new());
    holder.goodbye().await;
    master.shutdown().await;
}

/// Asks until an answer brings a lease.
async fn eventually_leased(client: &mut Client, ino: u64, op: query::Op) {
    for _ in 0..200 {
        client.query(op.clone()).await;
        if client.holds(ino) != LeaseKind::LeaseNone {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("no lease");
}
