//! Whatever commands get into the log, the state machine answers each, panics at none, and keeps its invariants; then
//! whatever is asked is answered.
#![no_main]

use dfs_master::state::{MemKv, apply, check_invariants, query};
use dfs_proto::v1;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    let Some((split, bytes)) = bytes.split_first() else { return };
    let (batch, question) = bytes.split_at(bytes.len() * usize::from(*split) / 256);
    let (Ok(batch), Ok(question)) = (v1::Batch::decode(batch), v1::Query::decode(question)) else { return };
    let mut kv = MemKv::new();
    let (writes, answers) = apply(&kv, &batch).expect("nothing of ours is damaged");
    assert_eq!(answers.len(), batch.commands.len());
    kv.write(&writes);
    check_invariants(&kv).expect("kept");
    let _ = query(&kv, &v1::Cred::default(), &question).expect("nothing of ours is damaged");
});
