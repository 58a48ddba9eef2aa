//! What a change will touch, before it is proposed: others' leases on that are recalled first. And what of an answer somebody
//! may have changed already who is yet to say so.

use super::acl;
use super::keys;
use super::kv::{Kv, Tx};
use super::ops::attr::CAPABILITY;
use super::ops::{find_dentry, mend};
use super::rows::corrupt;
use bytes::Bytes;
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, Answer, Cred, answer::Body, mutation::Op, query};
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

/// The inode of which an answer says something that whoever holds a write lease on it may have changed and not committed:
/// bytes, size, times, owner, mode and what follows from them. None: whatever he keeps, the answer is true.
///
/// Nobody keeps changes of extended attributes to himself. But bytes end capabilities, the mode is a part of the ACL, and who
/// may see the user's own ones depends on mode and owner.
#[must_use]
pub fn shown_as_committed(question: &query::Op, cred: &Cred, answer: &Answer) -> Option<InodeNo> {
    let ino = match (question, answer.body.as_ref()?) {
        (query::Op::GetSlices(op), Body::Layout(_)) => op.ino,
        (query::Op::GetXattr(op), _) if op.name.starts_with(b"user.") && cred.uid != 0 => op.ino,
        (query::Op::GetXattr(op), Body::Data(_)) if [CAPABILITY, acl::ACCESS].contains(&&op.name[..]) => {
            op.ino
        }
        (query::Op::ListXattr(op), Body::Names(list)) if list.names.iter().any(|name| name == CAPABILITY) => {
            op.ino
        }
        // Refused by what the attributes said, or not.
        (query::Op::Access(op), _) => op.ino,
        (_, Body::Entry(entry)) => entry.attr.as_ref()?.ino,
        _ => return None,
    };
    Some(InodeNo(ino))
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

/// The inodes whose attributes or names mending these faults may alter.
///
/// # Errors
/// The store's.
pub fn mended_inodes(kv: &dyn Kv, faults: &[v1::Fault]) -> io::Result<Vec<InodeNo>> {
    let tx = Tx::new(kv);
    let cluster = tx.row::<v1::ClusterRow>(&keys::cluster())?.unwrap_or_default();
    mend::touched(&tx, cluster.hash_key.as_ref().try_into().ok(), faults)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfs_proto::FsError;
    use dfs_proto::v1::ErrorCode;

    #[test]
    fn what_others_buffer_may_falsify_attributes_and_bytes_but_few_extended_attributes() {
        let (root, user) = (Cred::default(), Cred { uid: 5, ..Cred::default() });
        let hides = |op: &query::Op, cred: &Cred, body: Body| {
            shown_as_committed(op, cred, &Answer { body: Some(body) }).map(InodeNo::get)
        };
        let value = || Body::Data(Bytes::from_static(b"value"));
        let absent = || Body::Failure(FsError::from(ErrorCode::ErrorNoData).into());
        let get = |name: &'static str| {
            query::Op::GetXattr(v1::GetXattr { ino: 7, name: Bytes::from_static(name.as_bytes()) })
        };
        for name in ["security.selinux", "trusted.x", "system.posix_acl_default"] {
            assert_eq!((hides(&get(name), &user, value()), hides(&get(name), &user, absent())), (None, None));
        }
        for name in ["security.capability", "system.posix_acl_access"] {
            assert_eq!(
                (hides(&get(name), &root, value()), hides(&get(name), &root, absent())),
                (Some(7), None)
            );
        }
        assert_eq!(
            (hides(&get("user.x"), &root, value()), hides(&get("user.x"), &user, absent())),
            (None, Some(7))
        );
        let list = query::Op::ListXattr(v1::ListXattr { ino: 7 });
        let names =
            |name: &'static str| Body::Names(v1::Names { names: vec![Bytes::from_static(name.as_bytes())] });
        assert_eq!(
            (hides(&list, &user, names("user.x")), hides(&list, &user, names("security.capability"))),
            (None, Some(7))
        );
        let lookup = query::Op::Lookup(v1::Lookup { parent: 1, name: Bytes::from_static(b"f") });
        let entry =
            v1::Entry { attr: Some(v1::Attr { ino: 7, ..v1::Attr::default() }), ..v1::Entry::default() };
        assert_eq!(hides(&lookup, &root, Body::Entry(entry)), Some(7));
        assert_eq!(hides(&lookup, &root, absent()), None);
    }
}
