//! Messages between processes, as anybody may send them: decoded, made into our types, encoded again.
#![no_main]

use dfs_proto::{FsError, v1};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn same<M: Message + Default + PartialEq>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    let again = M::decode(message.encode_to_vec().as_slice()).expect("what was encoded can be decoded");
    assert!(message == again);
    Some(message)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 14 {
        0 => drop(same::<v1::AppendRequest>(bytes)),
        1 => {
            if let Some(failure) = same::<v1::AppendReply>(bytes).and_then(|reply| reply.failure) {
                let _ = FsError::from(failure).to_string();
            }
        }
        2 => drop(same::<v1::ReadRequest>(bytes)),
        3 => drop(same::<v1::ReadReply>(bytes)),
        4 => drop(same::<v1::Batch>(bytes)),
        5 => drop(same::<v1::Query>(bytes)),
        6 => drop(same::<v1::ClientFrame>(bytes)),
        7 => drop(same::<v1::MasterFrame>(bytes)),
        8 => drop(same::<v1::NodeFrame>(bytes)),
        9 => drop(same::<v1::OrderFrame>(bytes)),
        10 => drop(same::<v1::RaftMessage>(bytes)),
        11 => drop(same::<v1::SnapshotPart>(bytes)),
        12 => drop(same::<v1::StatusRequest>(bytes)),
        _ => drop(same::<v1::StatusReply>(bytes)),
    }
});
