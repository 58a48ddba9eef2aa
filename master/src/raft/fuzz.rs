//! What the fuzzer reaches of this module's decoders (tests/fuzz).

use super::codec::{self, Body, Envelope};
use super::disk_log::DiskLog;
use super::snapshot::SnapshotData;
use super::types::Entry;
use prost::Message;
use std::path::Path;

/// A message between masters, made into what openraft takes.
pub fn envelope(bytes: &[u8]) {
    let Ok(envelope) = Envelope::decode(bytes) else { return };
    match envelope.body {
        Some(Body::Append(append)) => {
            let _ = codec::vote(append.vote.as_ref());
            let _ = codec::log_id(append.previous.as_ref());
            let entries: std::io::Result<Vec<Entry>> =
                append.entries.into_iter().map(TryInto::try_into).collect();
            drop(entries);
        }
        Some(Body::Vote(vote)) => drop(codec::vote(vote.vote.as_ref())),
        Some(Body::Snapshot(snapshot)) => {
            let _ = codec::vote(snapshot.vote.as_ref());
            let _ = snapshot.meta.map(|meta| meta.snapshot_meta());
        }
        _ => {}
    }
}

/// A snapshot file.
pub fn snapshot(bytes: &[u8]) {
    let _ = SnapshotData::memory(bytes.to_vec().into()).verify();
}

/// A directory whose only log file has these bytes. What is opened can be read.
///
/// # Panics
/// When the directory cannot be used, or an opened log cannot be read.
pub fn log(dir: &Path, bytes: &[u8]) {
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir).expect("a directory");
    // The name that the first file gets.
    std::fs::write(dir.join("r-00_000_000_000_000_000_000.wal"), bytes).expect("written");
    if let Ok(log) = DiskLog::open(dir) {
        let (_, last) = log.ends().expect("open");
        let entries = log.read(0, u64::MAX, usize::MAX).expect("readable");
        assert_eq!(entries.last().map(|(id, _)| *id), last.filter(|_| !entries.is_empty()));
        log.close();
    }
    std::fs::remove_dir_all(dir).expect("removed");
}
