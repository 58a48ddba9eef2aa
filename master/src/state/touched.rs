//! What a change will touch, before it is proposed: others' leases on that are recalled first.

use super::keys;
use super::kv::{Kv, Tx};
use super::ops::find_dentry;
use super::rows::corrupt;
use bytes::Bytes;
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, mutation::Op};
use std::io;

/// The names that a change makes, removes or replaces.
#[must_use]
pub fn names_of(op: &Op) -> Vec<(InodeNo, Bytes)> {
    match op {
        Op::Create(op) if !op.anonymous => vec![(InodeNo(op.parent), op.name.clone())],
        Op::Unlink(op) => vec![(InodeNo(op.parent), op.name.clone())],
        Op::Link(op) => vec![(InodeNo(op.new_parent), op.new_name.clone())],
        Op::Rename(op) => {
            vec![(InodeNo(op.parent), op.name.clone()), (InodeNo(op.new_parent), op.new_name.clone())]
        }
        _ => Vec::new(),
    }
}

/// The inodes whose attributes, names or bytes a change may alter, as long as its names stand for what they do now. Those
/// that it makes are not among them: nobody knows of them.
///
/// # Errors
/// The store's.
pub fn touched(kv: &dyn Kv, op: &Op) -> io::Result<Vec<InodeNo>> {
    let mut inos: Vec<InodeNo> = match op {
        Op::SetAttr(op) => vec![InodeNo(op.ino)],
        Op::SetXattr(op) => vec![InodeNo(op.ino)],
        Op::RemoveXattr(op) => vec![InodeNo(op.ino)],
        Op::Commit(op) => vec![InodeNo(op.ino)],
        Op::Fallocate(op) => vec![InodeNo(op.ino)],
        Op::CopyRange(op) => vec![InodeNo(op.to)],
        Op::Link(op) => vec![InodeNo(op.ino)],
        Op::Create(_) | Op::Unlink(_) | Op::Rename(_) | Op::AllocChunks(_) | Op::Touch(_) => Vec::new(),
    };
    let names = names_of(op);
    if names.is_empty() {
        return Ok(inos);
    }
    let tx = Tx::new(kv);
    let key = keys::cluster();
    let Some(cluster) = tx.row::<v1::ClusterRow>(&key)? else { return Ok(inos) };
    let hash_key =
        cluster.hash_key.as_ref().try_into().map_err(|_| corrupt(&key, "a hash key of the wrong length"))?;
    for (parent, name) in names {
        let found = find_dentry(&tx, hash_key, parent, &name)?;
        // A name that is there already is found, not made, and one that is not there cannot be removed: nothing changes.
        let makes = matches!(op, Op::Create(_) | Op::Link(_));
        let removes = matches!(op, Op::Unlink(_))
            || matches!(op, Op::Rename(op) if op.name == name && op.parent == parent.get());
        if (makes && found.is_some()) || (removes && found.is_none()) {
            return Ok(Vec::new());
        }
        inos.push(parent);
        inos.extend(found.map(|dentry| InodeNo(dentry.ino)));
    }
    Ok(inos)
}
