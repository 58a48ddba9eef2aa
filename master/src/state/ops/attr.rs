//! chmod, chown, truncate, utimensat and chattr, in the order of notify_change() and setattr_prepare() of the kernel.

use super::{Caller, State, data, entry, wish};
use crate::state::access::{self, SET_GID, WRITE};
use crate::state::acl;
use crate::state::kv::Tx;
use crate::state::rows::{FLAG_APPEND, FLAG_IMMUTABLE, FLAGS_MODIFIABLE, Inode, OpResult, refused};
use dfs_proto::InodeNo;
use dfs_proto::limits::{CHUNK_SIZE_MAX, CHUNK_SIZE_MIN, REPLICAS_MAX};
use dfs_proto::v1::{self, Cred, ErrorCode, Kind, answer::Body};

/// The xattr that holds an executable's capabilities.
pub const CAPABILITY: &[u8] = b"security.capability";

pub fn set_attr(s: &mut State<'_>, by: &Caller<'_>, op: &v1::SetAttr) -> OpResult<Body> {
    let mut inode = s.tx.inode(InodeNo(op.ino))?;
    check_flags(&inode, op)?;
    check_size(&s.tx, by.cred, &inode, op)?;
    check_owner(by.cred, &inode, op)?;
    check_times(&s.tx, by.cred, &inode, op)?;
    check_policy(by.cred, &inode, op)?;
    if let Some(size) = op.size {
        data::resize(s, &mut inode, size)?;
        inode.attr.mtime = Some(s.now);
    }
    if op.size.is_some() && !op.kill_priv && !chowns(op) {
        drop_privileges_unless_root(s, by, &mut inode)?;
    }
    set_mode_and_owner(s, by, &mut inode, op)?;
    set_times(s, &mut inode, op);
    inode.attr.flags = op.flags.unwrap_or(inode.attr.flags);
    inode.attr.replicas = op.replicas.unwrap_or(inode.attr.replicas);
    inode.attr.chunk_size = op.chunk_size.unwrap_or(inode.attr.chunk_size);
    inode.changed(s.now);
    if op.replicas.is_some() && inode.mapped.get() > 0 {
        wish::note(s, &inode);
    }
    s.tx.put_inode(&inode);
    Ok(entry(&inode, false))
}

/// What a client kept with the bytes of a file, to be set when they are committed: mode, owner and times.
pub fn set_with_bytes(
    s: &mut State<'_>,
    by: &Caller<'_>,
    inode: &mut Inode,
    op: &v1::SetAttr,
) -> OpResult<()> {
    if op.by_handle
        || op.size.is_some()
        || op.flags.is_some()
        || op.replicas.is_some()
        || op.chunk_size.is_some()
    {
        return refused(ErrorCode::ErrorInvalid, "only mode, owner and times are set together with bytes");
    }
    check_flags(inode, op)?;
    check_owner(by.cred, inode, op)?;
    check_times(&s.tx, by.cred, inode, op)?;
    set_mode_and_owner(s, by, inode, op)?;
    set_times(s, inode, op);
    Ok(())
}

fn chowns(op: &v1::SetAttr) -> bool {
    op.uid.is_some() || op.gid.is_some()
}

fn set_mode_and_owner(
    s: &mut State<'_>,
    by: &Caller<'_>,
    inode: &mut Inode,
    op: &v1::SetAttr,
) -> OpResult<()> {
    if (op.kill_priv || chowns(op)) && !inode.is_dir() {
        drop_privileges(s, by.cred, inode)?;
    }
    inode.attr.uid = op.uid.unwrap_or(inode.attr.uid);
    inode.attr.gid = op.gid.unwrap_or(inode.attr.gid);
    match op.mode {
        Some(mode) => chmod(s, by.cred, inode, mode),
        None => Ok(()),
    }
}

/// Sets the permission bits, the ACL with them.
fn chmod(s: &mut State<'_>, cred: &Cred, inode: &mut Inode, mode: u32) -> OpResult<()> {
    let foreign = !access::is_root(cred) && !access::in_group(cred, inode.attr.gid);
    inode.attr.mode = mode & 0o7777 & if foreign { !SET_GID } else { !0 };
    if let Some(mut list) = acl::access_acl(&s.tx, inode)? {
        list.chmod(mode);
        s.tx.put_xattr(inode.ino(), acl::ACCESS, &list.encode())?;
    }
    Ok(())
}

fn set_times(s: &State<'_>, inode: &mut Inode, op: &v1::SetAttr) {
    if op.atime_now {
        inode.attr.atime = Some(s.now);
    } else if op.atime.is_some() {
        inode.attr.atime = op.atime;
    }
    if op.mtime_now {
        inode.attr.mtime = Some(s.now);
    } else if op.mtime.is_some() {
        inode.attr.mtime = op.mtime;
    }
}

/// setuid and setgid end when somebody else's bytes or owner come in: setattr_should_drop_suidgid() of the kernel.
pub fn drop_privileges(s: &mut State<'_>, writer: &Cred, inode: &mut Inode) -> OpResult<()> {
    drop_capability(s, inode)?;
    inode.attr.mode = writer.end_privileges(inode.attr.mode, inode.attr.gid);
    Ok(())
}

/// The same after a write or a truncate, which leave root's bits alone but not capabilities.
pub fn drop_privileges_unless_root(s: &mut State<'_>, by: &Caller<'_>, inode: &mut Inode) -> OpResult<()> {
    if access::is_root(by.cred) { drop_capability(s, inode) } else { drop_privileges(s, by.cred, inode) }
}

fn drop_capability(s: &mut State<'_>, inode: &mut Inode) -> OpResult<()> {
    if inode.attr.has_capability {
        s.tx.delete_xattr(inode.ino(), CAPABILITY)?;
        inode.attr.has_capability = false;
    }
    Ok(())
}

fn times_set(op: &v1::SetAttr) -> bool {
    let atime = op.atime.is_some() && !op.atime_now;
    let mtime = op.mtime.is_some() && !op.mtime_now;
    // utimensat(2): with one time left as it is, "now" is a time like any other. A truncate says "now" for mtime alone.
    let one_now = op.atime_now != op.mtime_now && op.size.is_none();
    atime || mtime || one_now
}

fn check_flags(inode: &Inode, op: &v1::SetAttr) -> OpResult<()> {
    let changes = op.mode.is_some()
        || op.uid.is_some()
        || op.gid.is_some()
        || op.replicas.is_some()
        || op.chunk_size.is_some()
        || times_set(op);
    let touches = op.atime_now || op.mtime_now;
    if (changes && inode.has_flag(FLAG_IMMUTABLE | FLAG_APPEND))
        || (touches && inode.has_flag(FLAG_IMMUTABLE))
        || (op.size.is_some() && inode.has_flag(FLAG_APPEND))
    {
        return refused(ErrorCode::ErrorNotPermitted, "the immutable or append-only flag is set");
    }
    Ok(())
}

fn check_size(tx: &Tx<'_>, cred: &Cred, inode: &Inode, op: &v1::SetAttr) -> OpResult<()> {
    if op.size.is_none() {
        return Ok(());
    }
    match inode.kind() {
        Kind::File => {}
        Kind::Dir => return Err(ErrorCode::ErrorIsDir.into()),
        Kind::Unspecified | Kind::Symlink | Kind::Char | Kind::Block | Kind::Fifo | Kind::Socket => {
            return refused(ErrorCode::ErrorInvalid, "only files have a size to set");
        }
    }
    if op.by_handle { Ok(()) } else { access::require(tx, cred, inode, WRITE) }
}

fn check_owner(cred: &Cred, inode: &Inode, op: &v1::SetAttr) -> OpResult<()> {
    let attr = &inode.attr;
    let owner = cred.uid == attr.uid;
    let may_uid = op.uid.is_none_or(|uid| owner && uid == attr.uid);
    let may_gid = op.gid.is_none_or(|gid| owner && (gid == attr.gid || access::in_group(cred, gid)));
    if !access::is_root(cred) && (!may_uid || !may_gid) {
        return refused(ErrorCode::ErrorNotPermitted, "chown is not allowed");
    }
    if op.uid == Some(u32::MAX) || op.gid == Some(u32::MAX) {
        return refused(ErrorCode::ErrorInvalid, "-1 is nobody's number");
    }
    // A chown that names nobody, which chown(2) allows to anyone, ends privileges nevertheless.
    let drops = op.kill_priv
        && op.size.is_none()
        && !inode.is_dir()
        && cred.end_privileges(attr.mode, attr.gid) != attr.mode;
    if (op.mode.is_some() || drops) && !access::owns(cred, attr) {
        return refused(ErrorCode::ErrorNotPermitted, "the mode is the owner's to change");
    }
    if op.mode.is_some() && inode.kind() == Kind::Symlink {
        return refused(ErrorCode::ErrorNotSupported, "symlinks have no mode of their own");
    }
    Ok(())
}

fn check_times(tx: &Tx<'_>, cred: &Cred, inode: &Inode, op: &v1::SetAttr) -> OpResult<()> {
    let mut given = [op.atime, op.mtime].into_iter().flatten();
    if given.any(|time| time.nanos >= 1_000_000_000) {
        return refused(ErrorCode::ErrorInvalid, "nanoseconds of a second or more");
    }
    if access::owns(cred, &inode.attr) {
        return Ok(());
    }
    if times_set(op) {
        return refused(ErrorCode::ErrorNotPermitted, "setting times is for the owner");
    }
    let authorised = op.size.is_some() || op.by_handle || op.uid.is_some() || op.gid.is_some();
    if (op.atime_now || op.mtime_now) && !authorised {
        return access::require(tx, cred, inode, WRITE);
    }
    Ok(())
}

/// Flags of chattr(1), and how a file's chunks are to be made.
fn check_policy(cred: &Cred, inode: &Inode, op: &v1::SetAttr) -> OpResult<()> {
    if (op.flags.is_some() || op.replicas.is_some() || op.chunk_size.is_some())
        && !access::owns(cred, &inode.attr)
    {
        return refused(ErrorCode::ErrorNotPermitted, "only the owner may change this");
    }
    if let Some(flags) = op.flags {
        let changed = flags ^ inode.attr.flags;
        if !(inode.is_file() || inode.is_dir()) || changed & !FLAGS_MODIFIABLE != 0 {
            return refused(ErrorCode::ErrorNotSupported, "this inode cannot have these flags");
        }
        if changed & (FLAG_APPEND | FLAG_IMMUTABLE) != 0 && !access::is_root(cred) {
            return refused(ErrorCode::ErrorNotPermitted, "these flags are for root");
        }
    }
    let sizes = CHUNK_SIZE_MIN..=CHUNK_SIZE_MAX;
    if op.replicas.is_some_and(|replicas| replicas > REPLICAS_MAX)
        || op.chunk_size.is_some_and(|size| size != 0 && !sizes.contains(&size))
    {
        return refused(ErrorCode::ErrorInvalid, "replicas or chunk size out of range");
    }
    Ok(())
}
