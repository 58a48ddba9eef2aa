//! Who may talk Raft: a master of the same cluster, shown by a MAC under the cluster key over every message.

use super::codec::{Body, Envelope, invalid};
use bytes::Bytes;
use dfs_proto::PROTOCOL_VERSION;
use dfs_proto::token::ClusterKey;
use dfs_proto::v1;
use prost::Message;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tonic::Status;

const MESSAGE: &str = "raft message";
const PART: &str = "raft snapshot part";

/// This master's identity among the others.
#[derive(Clone)]
pub struct Auth {
    pub id: u64,
    pub cluster: String,
    pub key: ClusterKey,
    pub group: Arc<Group>,
    /// Where its own settings say that the others are; they overrule the replicated membership.
    pub addresses: Arc<BTreeMap<u64, String>>,
}

/// Which history this master's Raft group has: the one it was formed with, or that of a restore or a recovery. A master of
/// another history must not be heard: its votes and entries would mix what is not the same.
#[derive(Default)]
pub struct Group {
    number: AtomicU64,
    /// A master without any history takes that of whoever takes it in; where that is noted.
    empty: Mutex<Option<PathBuf>>,
}

impl Group {
    /// The group of a data directory; `empty`: its master has no history yet.
    pub fn new(number: u64, dir: PathBuf, empty: bool) -> Self {
        Self { number: AtomicU64::new(number), empty: Mutex::new(empty.then_some(dir)) }
    }

    fn number(&self) -> u64 {
        self.number.load(Ordering::Acquire)
    }

    /// From here on this master has a history: it takes that of nobody else any more.
    pub fn begins(&self) {
        *self.empty.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Hears of a group; the refusal if it is another one.
    fn check(&self, theirs: u64) -> Result<(), Status> {
        if self.number() == theirs {
            return Ok(());
        }
        let mut empty = self.empty.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = self.number();
        if ours == theirs {
            return Ok(());
        }
        if theirs < ours {
            let text = "a master of before the last restore or recovery: its data directory must be emptied";
            return Err(Status::failed_precondition(text));
        }
        let Some(dir) = empty.as_ref() else {
            let text =
                "this master is of before the last restore or recovery: its data directory must be emptied";
            return Err(Status::failed_precondition(text));
        };
        // Once in the life of a data directory, before anything of that history is kept in it.
        super::identity::set_group(dir, theirs).map_err(|error| Status::internal(error.to_string()))?;
        self.number.store(theirs, Ordering::Release);
        *empty = None;
        Ok(())
    }
}

impl Auth {
    /// A message with its proof.
    pub fn seal(&self, to: u64, call: u64, body: Body) -> v1::RaftMessage {
        let body = Bytes::from(
            Envelope { from: self.id, to, call, group: self.group.number(), body: Some(body) }
                .encode_to_vec(),
        );
        let proof = self.key.mac(MESSAGE, &body).to_vec().into();
        v1::RaftMessage {
            id: call,
            version: PROTOCOL_VERSION,
            cluster_id: self.cluster.clone(),
            body,
            entries: Vec::new(),
            proof,
        }
    }

    /// Checks a message: version, cluster, proof, and that it is for this master.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn open(&self, message: v1::RaftMessage) -> Result<Envelope, Status> {
        self.check_peer(message.version, &message.cluster_id)?;
        if !self.key.verify(MESSAGE, &message.body, &message.proof) {
            return Err(Status::unauthenticated("the message's proof is wrong: another cluster key?"));
        }
        let envelope = Envelope::decode(message.body)
            .map_err(|error| Status::invalid_argument(format!("a message that cannot be read: {error}")))?;
        // Who is to be added is asked for its number.
        let anybody = envelope.to == 0 && matches!(envelope.body, Some(Body::Probe(_)));
        if envelope.to != self.id && !anybody {
            return Err(Status::failed_precondition(format!(
                "this is master {}, not master {}: check the peers' addresses",
                self.id, envelope.to
            )));
        }
        self.group.check(envelope.group)?;
        if matches!(envelope.body, Some(Body::Append(_) | Body::Snapshot(_))) {
            self.group.begins();
        }
        Ok(envelope)
    }

    fn check_peer(&self, version: u32, cluster: &str) -> Result<(), Status> {
        if version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "protocol version {version}, this master speaks {PROTOCOL_VERSION}"
            )));
        }
        if cluster != self.cluster {
            return Err(Status::permission_denied(format!(
                "cluster {cluster}, this is cluster {}",
                self.cluster
            )));
        }
        Ok(())
    }

    /// A part of a snapshot's bytes; `head` is the sealed first message in the first part, empty in the others.
    pub fn seal_part(
        &self,
        call: u64,
        offset: u64,
        data: Bytes,
        head: Bytes,
        last: bool,
    ) -> v1::SnapshotPart {
        let proof = self.key.mac(PART, &part_bytes(call, offset, &data, last)).to_vec().into();
        let (version, cluster_id) = (PROTOCOL_VERSION, self.cluster.clone());
        v1::SnapshotPart { version, cluster_id, meta: head, data, last, proof }
    }

    /// Checks a part of the snapshot `call` whose bytes stand at `offset`.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn open_part(&self, call: u64, offset: u64, part: &v1::SnapshotPart) -> Result<(), Status> {
        self.check_peer(part.version, &part.cluster_id)?;
        if !self.key.verify(PART, &part_bytes(call, offset, &part.data, part.last), &part.proof) {
            return Err(Status::unauthenticated("the snapshot part's proof is wrong"));
        }
        Ok(())
    }
}

fn part_bytes(call: u64, offset: u64, data: &[u8], last: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(17 + data.len());
    bytes.extend(call.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes.push(u8::from(last));
    bytes.extend(data);
    bytes
}

/// The body of a reply.
///
/// # Errors
/// When the other master could not do what was asked, or sent none.
pub fn reply_body(envelope: Envelope) -> io::Result<Body> {
    match envelope.body {
        Some(Body::Failed(reason)) => Err(io::Error::other(reason)),
        Some(body) => Ok(body),
        None => Err(invalid("a reply of an unknown kind")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::codec::ProbeRow;

    fn auth(id: u64, key: &[u8]) -> Auth {
        let key = ClusterKey::new(key).unwrap();
        Auth { id, cluster: key.cluster_id(), key, group: Arc::default(), addresses: Arc::default() }
    }

    #[test]
    fn masters_of_different_histories_do_not_hear_each_other() {
        let dir = tempfile::tempdir().unwrap();
        drop(crate::raft::identity::claim(dir.path(), "c", 2, false).unwrap());
        let of = |id, group| Auth { group: Arc::new(group), ..auth(id, b"0123456789abcdef") };
        let probe = |from: &Auth, to: u64| from.seal(to, 7, Body::Probe(ProbeRow::default()));
        let restored = of(1, Group::new(5, PathBuf::new(), false));
        let old = of(2, Group::new(0, PathBuf::new(), false));
        for (from, to, at) in [(&restored, 2, &old), (&old, 1, &restored)] {
            let refused = at.open(probe(from, to)).unwrap_err();
            assert!(refused.message().contains("must be emptied"), "{refused}");
        }
        let new = of(2, Group::new(0, dir.path().to_owned(), true));
        new.open(probe(&restored, 2)).unwrap();
        restored.open(probe(&new, 1)).unwrap();
        assert!(new.open(probe(&of(3, Group::default()), 2)).is_err(), "it has a history now");
        let identity = std::fs::read_to_string(dir.path().join("IDENTITY")).unwrap();
        assert!(identity.contains("group = 5"), "{identity}");
        // One that has heard entries of its own group has a history, although it was not restarted since.
        let taken_in = of(3, Group::new(0, dir.path().to_owned(), true));
        taken_in.open(probe(&old, 3)).unwrap();
        taken_in.open(old.seal(3, 8, Body::Append(crate::raft::codec::AppendRow::default()))).unwrap();
        assert!(taken_in.open(probe(&restored, 3)).is_err());
    }

    #[test]
    fn only_a_master_of_the_cluster_is_heard() {
        let (one, two) = (auth(1, b"0123456789abcdef"), auth(2, b"0123456789abcdef"));
        let message = one.seal(2, 7, Body::Probe(ProbeRow::default()));
        let envelope = two.open(message.clone()).unwrap();
        assert_eq!((envelope.from, envelope.call), (1, 7));
        assert!(one.open(message.clone()).unwrap_err().message().contains("this is master 1"));
        let stranger = auth(2, b"fedcba9876543210");
        assert_eq!(stranger.open(message.clone()).unwrap_err().code(), tonic::Code::PermissionDenied);
        let forged = v1::RaftMessage { cluster_id: stranger.cluster.clone(), ..message.clone() };
        assert_eq!(stranger.open(forged).unwrap_err().code(), tonic::Code::Unauthenticated);
        let newer = v1::RaftMessage { version: PROTOCOL_VERSION + 1, ..message };
        assert!(two.open(newer).unwrap_err().message().contains("protocol version"));
    }

    #[test]
    fn snapshot_parts_cannot_be_moved_or_cut_off() {
        let one = auth(1, b"0123456789abcdef");
        let part = one.seal_part(7, 10, Bytes::from_static(b"abc"), Bytes::new(), false);
        assert!(one.open_part(7, 10, &part).is_ok());
        assert!(one.open_part(7, 11, &part).is_err());
        assert!(one.open_part(8, 10, &part).is_err());
        assert!(one.open_part(7, 10, &v1::SnapshotPart { last: true, ..part }).is_err());
    }
}
