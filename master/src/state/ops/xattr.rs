//! Extended attributes: namespaces and permissions as xattr_permission() of the kernel has them, ACLs kept with the mode.

use super::policy::Policy;
use super::{Caller, State, attr, entry};
use crate::state::access::{self, READ, SET_GID, STICKY, WRITE};
use crate::state::acl::{self, Acl};
use crate::state::keys;
use crate::state::kv::Tx;
use crate::state::rows::{FLAG_APPEND, FLAG_IMMUTABLE, Inode, OpResult, corrupt, refused};
use dfs_proto::InodeNo;
use dfs_proto::limits::{XATTR_LIST_MAX, XATTR_NAME_MAX, XATTR_VALUE_MAX};
use dfs_proto::v1::{self, Cred, ErrorCode, Kind, answer::Body};
use std::io;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Space {
    User,
    Trusted,
    Security,
    AccessAcl,
    DefaultAcl,
}

fn space_of(name: &[u8]) -> OpResult<Space> {
    if name.len() > XATTR_NAME_MAX {
        return refused(ErrorCode::ErrorRange, "the attribute's name is too long");
    }
    if name.contains(&0) {
        return refused(ErrorCode::ErrorInvalid, "an attribute's name with a zero byte");
    }
    let spaces =
        [(b"user.".as_slice(), Space::User), (b"trusted.", Space::Trusted), (b"security.", Space::Security)];
    for (prefix, space) in spaces {
        if let Some(rest) = name.strip_prefix(prefix) {
            return if rest.is_empty() { Err(ErrorCode::ErrorInvalid.into()) } else { Ok(space) };
        }
    }
    match name {
        acl::ACCESS => Ok(Space::AccessAcl),
        acl::DEFAULT => Ok(Space::DefaultAcl),
        _ => refused(ErrorCode::ErrorNotSupported, "attributes are user., trusted., security. or POSIX ACLs"),
    }
}

/// Only files and directories carry user attributes: the permission bits of the others mean something else.
fn carries_user_attributes(inode: &Inode) -> bool {
    inode.is_file() || inode.is_dir()
}

/// Whether the caller may read this attribute.
pub fn may_read(tx: &Tx<'_>, cred: &Cred, inode: &Inode, name: &[u8]) -> OpResult<()> {
    match space_of(name)? {
        Space::User if !carries_user_attributes(inode) => Err(ErrorCode::ErrorNoData.into()),
        Space::User => access::require(tx, cred, inode, READ),
        Space::Trusted if !access::is_root(cred) => Err(ErrorCode::ErrorNoData.into()),
        Space::Trusted | Space::Security | Space::AccessAcl | Space::DefaultAcl => Ok(()),
    }
}

fn may_write(tx: &Tx<'_>, cred: &Cred, inode: &Inode, space: Space) -> OpResult<()> {
    if inode.has_flag(FLAG_IMMUTABLE | FLAG_APPEND) {
        return refused(ErrorCode::ErrorNotPermitted, "the immutable or append-only flag is set");
    }
    let forbidden = match space {
        Space::User if !carries_user_attributes(inode) => true,
        Space::User => {
            let sticky_dir = inode.is_dir() && inode.attr.mode & STICKY != 0;
            if sticky_dir && !access::owns(cred, &inode.attr) {
                return Err(ErrorCode::ErrorNotPermitted.into());
            }
            return access::require(tx, cred, inode, WRITE);
        }
        Space::Trusted | Space::Security => !access::is_root(cred),
        Space::AccessAcl | Space::DefaultAcl if inode.kind() == Kind::Symlink => {
            return refused(ErrorCode::ErrorNotSupported, "symlinks have no ACL");
        }
        Space::AccessAcl | Space::DefaultAcl => !access::owns(cred, &inode.attr),
    };
    if forbidden { Err(ErrorCode::ErrorNotPermitted.into()) } else { Ok(()) }
}

pub fn set(s: &mut State<'_>, by: &Caller<'_>, op: &v1::SetXattr) -> OpResult<Body> {
    let space = space_of(&op.name)?;
    if op.value.len() > XATTR_VALUE_MAX {
        return Err(ErrorCode::ErrorTooBig.into());
    }
    let mut inode = s.tx.inode(InodeNo(op.ino))?;
    may_write(&s.tx, by.cred, &inode, space)?;
    if let Some(policy) = Policy::named(&op.name)? {
        return policy.set(s, by, op);
    }
    match space {
        Space::AccessAcl => set_access_acl(s, by, &mut inode, Acl::parse(&op.value)?)?,
        Space::DefaultAcl => set_default_acl(s, &mut inode, Acl::parse(&op.value)?)?,
        Space::User | Space::Trusted | Space::Security => set_plain(s, &mut inode, op)?,
    }
    inode.changed(s.now);
    s.tx.put_inode(&inode);
    Ok(entry(&inode, false))
}

fn set_plain(s: &mut State<'_>, inode: &mut Inode, op: &v1::SetXattr) -> OpResult<()> {
    let exists = s.tx.get(&keys::xattr(inode.ino(), &op.name, 0))?.is_some();
    if op.create && exists {
        return Err(ErrorCode::ErrorExists.into());
    }
    if op.replace && !exists {
        return Err(ErrorCode::ErrorNoData.into());
    }
    if !exists {
        let listed: usize = names(&s.tx, inode.ino())?.iter().map(|name| name.len() + 1).sum();
        if listed + op.name.len() + 1 > XATTR_LIST_MAX {
            return refused(ErrorCode::ErrorNoSpace, "the inode has too many attributes");
        }
    }
    s.tx.put_xattr(inode.ino(), &op.name, &op.value)?;
    inode.attr.has_capability |= op.name.as_ref() == attr::CAPABILITY;
    inode.attr.bare = false;
    Ok(())
}

/// An access ACL sets the mode; one that says no more than the mode is not kept. (posix_acl_update_mode() of the kernel.)
fn set_access_acl(s: &mut State<'_>, by: &Caller<'_>, inode: &mut Inode, list: Option<Acl>) -> OpResult<()> {
    if let Some(list) = &list {
        inode.attr.mode = inode.attr.mode & !0o777 | list.mode();
        if !access::is_root(by.cred) && !access::in_group(by.cred, inode.attr.gid) {
            inode.attr.mode &= !SET_GID;
        }
    }
    let kept = list.filter(|list| !list.is_minimal());
    inode.attr.has_acl = kept.is_some();
    put_acl(s, inode.ino(), acl::ACCESS, kept)
}

fn set_default_acl(s: &mut State<'_>, inode: &mut Inode, list: Option<Acl>) -> OpResult<()> {
    if !inode.is_dir() && list.is_some() {
        return refused(ErrorCode::ErrorAccess, "only directories have a default ACL");
    }
    inode.attr.has_default_acl = list.is_some();
    put_acl(s, inode.ino(), acl::DEFAULT, list)
}

fn put_acl(s: &mut State<'_>, ino: InodeNo, name: &[u8], list: Option<Acl>) -> OpResult<()> {
    match list {
        Some(list) => s.tx.put_xattr(ino, name, &list.encode())?,
        None => {
            s.tx.delete_xattr(ino, name)?;
        }
    }
    Ok(())
}

pub fn remove(s: &mut State<'_>, by: &Caller<'_>, op: &v1::RemoveXattr) -> OpResult<Body> {
    let space = space_of(&op.name)?;
    let mut inode = s.tx.inode(InodeNo(op.ino))?;
    if op.name.as_ref() == attr::CAPABILITY && !inode.has_flag(FLAG_IMMUTABLE | FLAG_APPEND) {
        // Whoever may write ends it by writing.
        access::require(&s.tx, by.cred, &inode, WRITE)?;
    } else {
        may_write(&s.tx, by.cred, &inode, space)?;
    }
    if let Some(policy) = Policy::named(&op.name)? {
        return policy.remove(s, by, inode.ino());
    }
    let found = s.tx.delete_xattr(inode.ino(), &op.name)?;
    match space {
        // No error on Linux, the mode is one, too; and nothing has changed.
        Space::AccessAcl | Space::DefaultAcl if !found => return Ok(entry(&inode, false)),
        Space::AccessAcl => inode.attr.has_acl = false,
        Space::DefaultAcl => inode.attr.has_default_acl = false,
        Space::User | Space::Trusted | Space::Security if !found => return Err(ErrorCode::ErrorNoData.into()),
        Space::User | Space::Trusted | Space::Security => {}
    }
    inode.attr.has_capability &= op.name.as_ref() != attr::CAPABILITY;
    inode.changed(s.now);
    s.tx.put_inode(&inode);
    Ok(entry(&inode, false))
}

/// The value of an attribute.
pub fn value(tx: &Tx<'_>, inode: &Inode, name: &[u8]) -> OpResult<Option<Vec<u8>>> {
    match Policy::named(name)? {
        Some(policy) => Ok(policy.value(&inode.attr)),
        None => Ok(tx.xattr(inode.ino(), name)?),
    }
}

/// The names of an inode's attributes, in order.
pub fn names(tx: &Tx<'_>, ino: InodeNo) -> io::Result<Vec<Vec<u8>>> {
    let parts = tx.collect(&keys::xattrs(ino), usize::MAX, |key, _| match keys::xattr_name(key) {
        Some((name, part)) => Ok((part == 0).then(|| name.to_vec())),
        None => Err(corrupt(key, "an attribute's key without a part")),
    })?;
    Ok(parts.into_iter().flatten().collect())
}

/// The names that the caller may see.
pub fn visible_names(tx: &Tx<'_>, cred: &Cred, ino: InodeNo) -> io::Result<Vec<Vec<u8>>> {
    let mut names = names(tx, ino)?;
    names.retain(|name| access::is_root(cred) || !name.starts_with(b"trusted."));
    Ok(names)
}
