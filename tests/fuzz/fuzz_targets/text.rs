//! What people write: configuration files and sizes; and tokens, which clients send back.
#![no_main]

use dfs_proto::token::{ClusterKey, Rights};
use dfs_proto::{ChunkId, units};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let key = ClusterKey::new(&[7; 32]).expect("long enough");
    assert!(key.check(bytes, ChunkId(1), Rights::READ, 0).is_err());
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = dfs_chunkd::config::Config::parse(text);
    let _ = dfs_client::settings::parse(std::path::Path::new("client.toml"), text);
    let _ = dfs_client::settings::parse_masters(text, "somewhere");
    let _ = units::parse_bytes(text);
});
