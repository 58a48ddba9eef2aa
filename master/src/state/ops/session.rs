//! The cluster's first command, and sessions.

use super::State;
use super::create::GENERATION;
use crate::state::rows::{Inode, OpResult, number};
use crate::state::{ended, keys};
use bytes::Bytes;
use dfs_proto::limits::{CHUNK_SIZE_MAX, CHUNK_SIZE_MIN, REPLICAS_MAX};
use dfs_proto::v1::{self, Attr, ErrorCode, Kind, LeaseKind, Timestamp, system_answer::Body};
use dfs_proto::{ByteLen, FsError, InodeNo, SessionId};

/// The settings of a new cluster, as they were in its first command.
pub fn first_cluster_row(op: &v1::Init, now: Timestamp) -> Result<v1::ClusterRow, FsError> {
    let in_range = op.hash_key.len() == 16
        && (1..=REPLICAS_MAX).contains(&op.replicas)
        && (CHUNK_SIZE_MIN..=CHUNK_SIZE_MAX).contains(&op.chunk_size);
    if !in_range {
        return Err(FsError::new(ErrorCode::ErrorInvalid, "hash key, replicas or chunk size out of range"));
    }
    Ok(v1::ClusterRow {
        format: keys::FORMAT,
        hash_key: op.hash_key.clone(),
        replicas: op.replicas,
        chunk_size: op.chunk_size,
        now: Some(now),
        next_ino: InodeNo::ROOT.get() + 1,
        next_chunk: 1,
        next_session: 1,
        files: 1,
        live_bytes: 0,
        chunks: 0,
        wishes_hold: false,
        newer: Vec::new(),
        mended: 0,
    })
}

/// Makes the root directory of a new cluster.
pub fn init(s: &mut State<'_>) {
    let now = Some(s.now);
    let attr = Attr {
        ino: InodeNo::ROOT.get(),
        generation: GENERATION,
        kind: Kind::Dir.into(),
        mode: 0o755,
        nlink: 2,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        version: 1,
        parent: InodeNo::ROOT.get(),
        bare: true,
        ..Default::default()
    };
    s.tx.put_inode(&Inode { attr, target: Bytes::new(), mapped: ByteLen(0) });
}

pub fn open(s: &mut State<'_>, op: &v1::OpenSession) -> Body {
    let session = SessionId(s.cluster.next_session);
    s.cluster.next_session += 1;
    let row = v1::SessionRow {
        nonce: op.nonce,
        client: op.client.clone(),
        host: op.host.clone(),
        opened: Some(s.now),
        lowest_unanswered: 0,
    };
    s.tx.put_row(keys::session(session), &row);
    Body::Session(session.get())
}

/// Ends a session. Its answers are forgotten if it said goodbye, and kept for a while if it was lost. Its chunks are listed: they are to be fenced and sealed. Repeating it lists
/// those that still are not sealed.
pub fn close(s: &mut State<'_>, op: &v1::CloseSession) -> OpResult<Body> {
    let session = SessionId(op.target);
    if let Some(row) = s.tx.find_session(session)?.filter(|_| op.keep_answers) {
        ended::keep(s, session, &row)?;
    }
    s.tx.delete(keys::session(session));
    let answers = (!ended::is_kept(s, session)?).then(|| keys::answers_of(session));
    for rows in answers.into_iter().chain([keys::leased_of(session)]) {
        for key in s.tx.collect(&rows, usize::MAX, |key, _| Ok(key.to_vec()))? {
            s.tx.delete(key);
        }
    }
    let chunks = s.tx.collect(&keys::unsealed_of(session), usize::MAX, |key, _| number(key, 1))?;
    Ok(Body::Chunks(v1::ChunkList { chunks }))
}

/// Notes where sessions may hold leases from now on; for sessions that are gone it does nothing.
pub fn note_leases(s: &mut State<'_>, op: &v1::NoteLeases) -> OpResult<Body> {
    for note in &op.notes {
        let session = SessionId(note.session);
        if s.tx.find_session(session)?.is_none() {
            continue;
        }
        for (kind, buckets) in
            [(LeaseKind::LeaseRead, &note.read_buckets), (LeaseKind::LeaseWrite, &note.write_buckets)]
        {
            for bucket in buckets {
                s.tx.put(keys::leased(session, kind as u64, *bucket), Vec::new());
            }
        }
    }
    Ok(Body::Empty(v1::Empty {}))
}
