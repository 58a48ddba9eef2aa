//! How many replicas a chunk is to have: as many as the file wants that wants most of those with bytes in it.
//!
//! ```text
//!   a commit, a copy ──▶ raises the chunk's number at once
//!   SetAttr ──▶ the file is noted ──▶ the leader looks who else uses its chunks ──▶ SetWishes ──▶ Reviewed: noted no more
//! ```
//!
//! So no chunk's number is below what a file wants that uses it, unless the file is noted. It is lowered only if no slice began
//! to use the chunk since the leader began to look at its users, page by page: [`ChunkState::joined`] counts those. A file that
//! stops to use a chunk lowers nothing; what is too high then is found when the replicas of a file that still uses it are set.

use super::{State, slices};
use crate::state::keys;
use crate::state::rows::{Inode, OpResult, corrupt, refused};
use dfs_proto::limits::{REAP_ROWS_MAX, REPLICAS_MAX};
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{self, Attr, ChunkState, ClusterRow, ErrorCode, system_answer::Body};
use dfs_proto::{ByteOffset, ChunkId, InodeNo};
use std::io;

/// How many replicas a file is to have.
#[must_use]
pub fn of(cluster: &ClusterRow, attr: &Attr) -> u32 {
    let replicas = if attr.replicas == 0 { cluster.replicas } else { attr.replicas };
    replicas.clamp(1, REPLICAS_MAX)
}

/// A file begins to use a chunk, which the caller writes.
pub fn join(s: &State<'_>, chunk: &mut ChunkState, inode: &Inode) {
    if s.keeps_wishes {
        chunk.wanted_replicas = chunk.wanted_replicas.max(of(&s.cluster, &inode.attr));
        count(s, chunk);
    }
}

/// A slice begins to use a chunk, which the caller writes.
pub fn count(s: &State<'_>, chunk: &mut ChunkState) {
    if s.keeps_wishes {
        chunk.joined += 1;
    }
}

/// A user of a chunk has another key from now on: who looks at the users page by page may have missed it.
pub fn moved(s: &mut State<'_>, id: ChunkId) -> OpResult<()> {
    if s.keeps_wishes {
        let mut chunk =
            s.tx.find_chunk(id)?
                .ok_or_else(|| corrupt(&keys::chunk(id), "used by a slice, but not there"))?;
        count(s, &mut chunk);
        s.tx.put_chunk(&chunk);
    }
    Ok(())
}

/// How many replicas a file wants was set, or may not be what its chunks are to have: they are to be looked at.
pub fn note(s: &mut State<'_>, inode: &Inode) {
    if s.keeps_wishes && inode.is_file() {
        s.tx.put(keys::review(inode.ino()), inode.attr.version.to_be_bytes().to_vec());
    }
}

/// Whether a file is noted.
pub fn is_noted(s: &State<'_>, ino: InodeNo) -> io::Result<bool> {
    Ok(s.tx.get(&keys::review(ino))?.is_some())
}

/// Whether a file wants more replicas than a chunk that it uses is to have.
pub fn lacks(s: &State<'_>, inode: &Inode) -> io::Result<bool> {
    let wish = of(&s.cluster, &inode.attr);
    let all = keys::slices(inode.ino(), ByteOffset(0), ByteOffset(u64::MAX));
    let chunks = s.tx.collect(&all, usize::MAX, |key, value| Ok(slices::read_row(key, value)?.1.chunk))?;
    let mut last = None;
    for id in chunks {
        if last.replace(id) != Some(id)
            && s.tx.find_chunk(ChunkId(id))?.is_some_and(|chunk| chunk.wanted_replicas < wish)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Of damage: what no chunk can be to have.
pub fn set_right(s: &State<'_>, chunk: &mut ChunkState) {
    if s.keeps_wishes {
        chunk.wanted_replicas = chunk.wanted_replicas.clamp(1, REPLICAS_MAX);
    }
}

/// A file is gone.
pub fn forget(s: &mut State<'_>, ino: InodeNo) -> OpResult<()> {
    let key = keys::review(ino);
    if s.keeps_wishes && s.tx.get(&key)?.is_some() {
        s.tx.delete(key);
    }
    Ok(())
}

/// Sets what chunks are to have. Answers those that were left as they are: their users may be others than the leader saw.
pub fn set(s: &mut State<'_>, op: &v1::SetWishes) -> OpResult<Body> {
    if op.wishes.len() > REAP_ROWS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many chunks in one command");
    }
    let mut left = Vec::new();
    for wish in &op.wishes {
        if !(1..=REPLICAS_MAX).contains(&wish.replicas) {
            return refused(ErrorCode::ErrorInvalid, "replicas out of range");
        }
        let Some(mut chunk) = s.tx.find_chunk(ChunkId(wish.chunk))? else { continue };
        let lowers = wish.replicas < chunk.wanted_replicas;
        if lowers && (chunk.phase() != Phase::Sealed || chunk.joined != wish.joined) {
            left.push(wish.chunk);
            continue;
        }
        chunk.wanted_replicas = wish.replicas;
        s.tx.put_chunk(&chunk);
    }
    Ok(Body::Chunks(v1::ChunkList { chunks: left }))
}

/// The chunks of these files have got what the files want, unless that was set again since.
pub fn reviewed(s: &mut State<'_>, op: &v1::Reviewed) -> OpResult<Body> {
    if op.files.len() > REAP_ROWS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many files in one command");
    }
    for file in &op.files {
        let key = keys::review(InodeNo(file.ino));
        if s.tx.get(&key)?.is_some_and(|since| since[..] == file.version.to_be_bytes()) {
            s.tx.delete(key);
        }
    }
    Ok(Body::Empty(v1::Empty {}))
}
