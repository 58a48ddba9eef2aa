//! Who may do what: permission bits, ACLs, the sticky bit and the immutable and append-only flags, in the order in which
//! Linux asks (fs/namei.c: inode_permission, may_create, may_delete). Uid 0 has every capability.

use super::acl::{self, Verdict};
use super::kv::Tx;
use super::rows::{FLAG_APPEND, FLAG_IMMUTABLE, Inode, OpResult, refused};
use dfs_proto::v1::{Attr, Cred, ErrorCode};
use std::io;

/// Bits of a permission mask, as in access(2).
pub const READ: u32 = 4;
pub const WRITE: u32 = 2;
pub const EXEC: u32 = 1;

pub use dfs_proto::cred::{GROUP_EXEC, SET_GID};

pub const STICKY: u32 = 0o1000;
const ANY_EXEC: u32 = 0o111;

pub fn is_root(cred: &Cred) -> bool {
    cred.is_root()
}

pub fn in_group(cred: &Cred, gid: u32) -> bool {
    cred.in_group(gid)
}

/// Owner of the inode, or somebody with CAP_FOWNER.
pub fn owns(cred: &Cred, attr: &Attr) -> bool {
    is_root(cred) || cred.uid == attr.uid
}

/// Whether mode and ACL let the caller do all of `mask`.
pub fn permits(tx: &Tx<'_>, cred: &Cred, inode: &Inode, mask: u32) -> io::Result<bool> {
    let attr = &inode.attr;
    if is_root(cred) {
        // CAP_DAC_OVERRIDE: everything but executing what nobody may execute.
        return Ok(inode.is_dir() || mask & EXEC == 0 || attr.mode & ANY_EXEC != 0);
    }
    let granted = if cred.uid == attr.uid {
        attr.mode >> 6
    } else {
        if inode.attr.has_acl
            && attr.mode & 0o070 != 0
            && let Some(acl) = acl::access_acl(tx, inode)?
        {
            match acl.check(cred, attr, mask) {
                Verdict::Granted => return Ok(true),
                Verdict::Denied => return Ok(false),
            }
        }
        if in_group(cred, attr.gid) { attr.mode >> 3 } else { attr.mode }
    };
    Ok(granted & mask == mask)
}

/// Refuses what mode, ACL or the immutable flag do not let the caller do.
pub fn require(tx: &Tx<'_>, cred: &Cred, inode: &Inode, mask: u32) -> OpResult<()> {
    if mask & WRITE != 0 && inode.has_flag(FLAG_IMMUTABLE) {
        return refused(ErrorCode::ErrorNotPermitted, "the immutable flag is set");
    }
    if permits(tx, cred, inode, mask)? { Ok(()) } else { Err(ErrorCode::ErrorAccess.into()) }
}

/// Whether an entry may be added to the directory.
pub fn may_add(tx: &Tx<'_>, cred: &Cred, dir: &Inode) -> OpResult<()> {
    if dir.attr.nlink == 0 {
        return refused(ErrorCode::ErrorNotFound, "the directory was removed");
    }
    require(tx, cred, dir, WRITE | EXEC)
}

/// Whether the victim's entry may be taken out of the directory.
pub fn may_remove(tx: &Tx<'_>, cred: &Cred, dir: &Inode, victim: &Inode) -> OpResult<()> {
    require(tx, cred, dir, WRITE | EXEC)?;
    let sticky = dir.attr.mode & STICKY != 0
        && !is_root(cred)
        && cred.uid != victim.attr.uid
        && cred.uid != dir.attr.uid;
    if sticky || dir.has_flag(FLAG_APPEND) || victim.has_flag(FLAG_APPEND | FLAG_IMMUTABLE) {
        return Err(ErrorCode::ErrorNotPermitted.into());
    }
    Ok(())
}
