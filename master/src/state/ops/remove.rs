//! Names that go away: unlink and rmdir. An inode that lost its last name becomes an orphan; `orphan` frees it later.

use super::orphan::{self, Orphan};
use super::{Caller, State, check_name, directory};
use crate::state::access::{self, EXEC};
use crate::state::rows::{Inode, OpResult};
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, ErrorCode, answer::Body};

pub fn unlink(s: &mut State<'_>, by: &Caller<'_>, op: &v1::Unlink) -> OpResult<Body> {
    let mut parent = directory(&s.tx, InodeNo(op.parent))?;
    access::require(&s.tx, by.cred, &parent, EXEC)?;
    check_name(&op.name)?;
    match (op.name.as_ref(), op.directory) {
        (b"." | b"..", false) => return Err(ErrorCode::ErrorIsDir.into()),
        (b".", true) => return Err(ErrorCode::ErrorInvalid.into()),
        (b"..", true) => return Err(ErrorCode::ErrorNotEmpty.into()),
        _ => {}
    }
    let Some(dentry) = s.find(parent.ino(), &op.name)? else { return Err(ErrorCode::ErrorNotFound.into()) };
    let mut victim = s.named(&dentry)?;
    access::may_remove(&s.tx, by.cred, &parent, &victim)?;
    match (op.directory, victim.is_dir()) {
        (true, false) => return Err(ErrorCode::ErrorNotDir.into()),
        (false, true) => return Err(ErrorCode::ErrorIsDir.into()),
        (true, true) if victim.attr.size > 0 => return Err(ErrorCode::ErrorNotEmpty.into()),
        _ => {}
    }
    let key = s.dentry_key(parent.ino(), &op.name);
    s.tx.delete(key);
    parent.attr.size -= 1;
    parent.attr.nlink -= u32::from(victim.is_dir());
    parent.modified(s.now);
    s.tx.put_inode(&parent);
    lose_name(s, &mut victim);
    s.tx.put_inode(&victim);
    Ok(Body::Unlinked(v1::Unlinked { attr: Some(victim.attr) }))
}

/// One name of the inode is gone. The caller writes the inode.
pub fn lose_name(s: &mut State<'_>, inode: &mut Inode) {
    // A directory has one name only; its other links are "." and its children's "..".
    inode.attr.nlink = if inode.is_dir() { 0 } else { inode.attr.nlink - 1 };
    inode.changed(s.now);
    if inode.attr.nlink == 0 {
        orphan::put(s, inode.ino(), Orphan::Unlinked);
    }
}
