//! New inodes and new names: create, mknod, mkdir, symlink, O_TMPFILE and link.

use super::orphan::{self, Orphan};
use super::{Caller, State, check_name, directory, entry, is_dots};
use crate::state::access::{self, EXEC, GROUP_EXEC, SET_GID};
use crate::state::acl::{self, Acl};
use crate::state::rows::{FLAG_APPEND, FLAG_IMMUTABLE, Inode, OpResult, refused};
use bytes::Bytes;
use dfs_proto::limits::{LINK_MAX, PATH_MAX};
use dfs_proto::v1::{self, Attr, ErrorCode, Kind, answer::Body};
use dfs_proto::{ByteLen, InodeNo};

/// Inode numbers are never used again, so one generation is enough for every handle.
pub const GENERATION: u64 = 1;

pub fn create(s: &mut State<'_>, by: &Caller<'_>, op: &v1::Create) -> OpResult<Body> {
    let mut parent = directory(&s.tx, InodeNo(op.parent))?;
    access::require(&s.tx, by.cred, &parent, EXEC)?;
    if !op.anonymous {
        check_new_name(&op.name)?;
        if let Some(dentry) = s.find(parent.ino(), &op.name)? {
            return existing(s, op, &dentry);
        }
    }
    access::may_add(&s.tx, by.cred, &parent)?;
    check_kind(by, op)?;
    let (inode, acls) = new_inode(s, by, &parent, op)?;
    for (name, list) in &acls {
        s.tx.put_xattr(inode.ino(), name, &list.encode())?;
    }
    s.tx.put_inode(&inode);
    s.cluster.files += 1;
    if op.anonymous {
        orphan::put(s, inode.ino(), Orphan::Anonymous);
    } else {
        s.put_dentry(parent.ino(), &op.name, &inode);
        parent.attr.size += 1;
        parent.attr.nlink += u32::from(inode.is_dir());
        parent.modified(s.now);
        s.tx.put_inode(&parent);
    }
    let dir_version = if op.anonymous { 0 } else { parent.attr.version };
    Ok(Body::Entry(v1::Entry { attr: Some(inode.attr), created: true, dir_version }))
}

fn check_new_name(name: &[u8]) -> OpResult<()> {
    check_name(name)?;
    if is_dots(name) { Err(ErrorCode::ErrorExists.into()) } else { Ok(()) }
}

/// The name is taken: O_CREAT without O_EXCL takes a file as it is, everything else fails.
fn existing(s: &State<'_>, op: &v1::Create, dentry: &v1::DentryRow) -> OpResult<Body> {
    if op.exclusive || op.kind() != Kind::File {
        return Err(ErrorCode::ErrorExists.into());
    }
    let inode = s.named(dentry)?;
    match inode.kind() {
        Kind::File => Ok(entry(&inode, false)),
        Kind::Dir => Err(ErrorCode::ErrorIsDir.into()),
        Kind::Unspecified | Kind::Symlink | Kind::Char | Kind::Block | Kind::Fifo | Kind::Socket => {
            Err(ErrorCode::ErrorExists.into())
        }
    }
}

fn check_kind(by: &Caller<'_>, op: &v1::Create) -> OpResult<()> {
    match op.kind() {
        Kind::Unspecified => return refused(ErrorCode::ErrorInvalid, "no kind of file is named"),
        Kind::Symlink if op.target.is_empty() => {
            return refused(ErrorCode::ErrorNotFound, "an empty symlink");
        }
        Kind::Symlink if op.target.len() >= PATH_MAX => return Err(ErrorCode::ErrorNameTooLong.into()),
        Kind::Symlink if op.target.contains(&0) => {
            return refused(ErrorCode::ErrorInvalid, "a symlink with a zero byte");
        }
        // A character device 0:0 is overlayfs' whiteout: anybody may make it, it opens nothing.
        Kind::Char if op.rdev != 0 && !access::is_root(by.cred) => {
            return Err(ErrorCode::ErrorNotPermitted.into());
        }
        Kind::Block if !access::is_root(by.cred) => return Err(ErrorCode::ErrorNotPermitted.into()),
        Kind::File | Kind::Dir | Kind::Symlink | Kind::Char | Kind::Block | Kind::Fifo | Kind::Socket => {}
    }
    if op.anonymous && op.kind() != Kind::File {
        return refused(ErrorCode::ErrorInvalid, "only a file can go without a name");
    }
    Ok(())
}

/// The mode asked for, as the parent's setgid bit lets it be: inode_init_owner() and mode_strip_sgid() of the kernel.
fn mode_below(by: &Caller<'_>, parent: &Attr, op: &v1::Create) -> u32 {
    let inherits = parent.mode & SET_GID != 0;
    match op.kind() {
        Kind::Symlink => 0o777,
        Kind::Dir => op.mode & 0o1777 | if inherits { SET_GID } else { 0 },
        _ => {
            let mode = op.mode & 0o7777;
            let both = SET_GID | GROUP_EXEC;
            let foreign = !access::is_root(by.cred) && !access::in_group(by.cred, parent.gid);
            if mode & both == both && inherits && foreign { mode & !SET_GID } else { mode }
        }
    }
}

/// ACLs with the names of their xattrs.
type Acls = Vec<(&'static [u8], Acl)>;

/// The new inode and its ACLs; takes a number for it.
fn new_inode(s: &mut State<'_>, by: &Caller<'_>, parent: &Inode, op: &v1::Create) -> OpResult<(Inode, Acls)> {
    let kind = op.kind();
    let mut mode = mode_below(by, &parent.attr, op);
    let mut acls = Vec::new();
    let (mut has_acl, mut has_default_acl) = (false, false);
    let inherited = if kind == Kind::Symlink { None } else { acl::default_acl(&s.tx, parent)? };
    match inherited {
        Some(default) => {
            let mut list = default.clone();
            mode = list.inherit(mode);
            if !list.is_minimal() {
                has_acl = true;
                acls.push((acl::ACCESS, list));
            }
            if kind == Kind::Dir {
                has_default_acl = true;
                acls.push((acl::DEFAULT, default));
            }
        }
        None if kind == Kind::Symlink => {}
        None => mode &= !(op.umask & 0o777),
    }
    let target = if kind == Kind::Symlink { op.target.clone() } else { Bytes::new() };
    let gid = if parent.attr.mode & SET_GID != 0 { parent.attr.gid } else { by.cred.gid };
    let ino = s.cluster.next_ino;
    s.cluster.next_ino += 1;
    let now = Some(s.now);
    let attr = Attr {
        ino,
        generation: GENERATION,
        kind: op.kind,
        mode,
        uid: by.cred.uid,
        gid,
        nlink: if op.anonymous { 0 } else { 1 + u32::from(kind == Kind::Dir) },
        rdev: if matches!(kind, Kind::Char | Kind::Block) { op.rdev } else { 0 },
        size: target.len() as u64,
        blocks: 0,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        version: 1,
        flags: 0,
        replicas: parent.attr.replicas,
        chunk_size: parent.attr.chunk_size,
        parent: if kind == Kind::Dir { parent.attr.ino } else { 0 },
        has_acl,
        has_default_acl,
        has_capability: false,
        bare: true,
    };
    Ok((Inode { attr, target, mapped: ByteLen(0) }, acls))
}

pub fn link(s: &mut State<'_>, by: &Caller<'_>, op: &v1::Link) -> OpResult<Body> {
    let mut inode = s.tx.inode(InodeNo(op.ino))?;
    let mut parent = directory(&s.tx, InodeNo(op.new_parent))?;
    access::require(&s.tx, by.cred, &parent, EXEC)?;
    check_new_name(&op.new_name)?;
    if s.find(parent.ino(), &op.new_name)?.is_some() {
        return Err(ErrorCode::ErrorExists.into());
    }
    access::may_add(&s.tx, by.cred, &parent)?;
    if inode.has_flag(FLAG_APPEND | FLAG_IMMUTABLE) || inode.is_dir() {
        return Err(ErrorCode::ErrorNotPermitted.into());
    }
    if inode.attr.nlink == 0 {
        // Only what O_TMPFILE made may get a name; what was unlinked stays so.
        if orphan::find(s, inode.ino())? != Some(Orphan::Anonymous) {
            return Err(ErrorCode::ErrorNotFound.into());
        }
        orphan::delete(s, inode.ino());
    }
    if inode.attr.nlink >= LINK_MAX {
        return Err(ErrorCode::ErrorTooManyLinks.into());
    }
    inode.attr.nlink += 1;
    inode.changed(s.now);
    s.tx.put_inode(&inode);
    s.put_dentry(parent.ino(), &op.new_name, &inode);
    parent.attr.size += 1;
    parent.modified(s.now);
    s.tx.put_inode(&parent);
    Ok(entry(&inode, false))
}
