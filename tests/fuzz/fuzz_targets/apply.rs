//! Whatever commands get into the log, the state machine answers each, panics at none, and keeps its invariants; then
//! whatever is asked is answered.
#![no_main]

use dfs_master::state::{BATCH_VERSION, Kv, MemKv, apply, check_invariants, query};
use dfs_proto::v1::{self, command::Body, system};
use libfuzzer_sys::fuzz_target;
use prost::Message;

/// A new cluster with a session.
fn cluster() -> MemKv {
    let kv = MemKv::new();
    let hash_key = bytes::Bytes::from_static(&[7; 16]);
    let init = system::Op::Init(v1::Init { hash_key, replicas: 3, chunk_size: 1 << 20 });
    let open = system::Op::OpenSession(v1::OpenSession::default());
    let commands = [init, open].map(|op| v1::Command {
        body: Some(Body::System(v1::System { op: Some(op) })),
        ..v1::Command::default()
    });
    // As before there were wishes for replicas: that these are kept is true as long as the leader says so only if it is (SetWishes,
    // Reviewed), and here everything is said.
    let batch = v1::Batch { version: 1, commands: commands.into() };
    kv.apply(&apply(&kv, &batch).expect("sound").0).expect("memory");
    kv
}

fuzz_target!(|bytes: &[u8]| {
    let Some((split, bytes)) = bytes.split_first() else { return };
    let (batch, question) = bytes.split_at(bytes.len() * usize::from(*split) / 256);
    let (Ok(batch), Ok(question)) = (v1::Batch::decode(batch), v1::Query::decode(question)) else { return };
    let batch = v1::Batch { version: BATCH_VERSION, ..batch };
    let kv = cluster();
    let (writes, answers) = apply(&kv, &batch).expect("nothing of ours is damaged");
    assert_eq!(answers.len(), batch.commands.len());
    kv.apply(&writes).expect("memory");
    assert_eq!(check_invariants(&kv), Vec::<String>::new());
    let _ = query(&kv, &v1::Cred::default(), &question).expect("nothing of ours is damaged");
});
