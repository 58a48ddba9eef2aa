//! rename(2) with RENAME_NOREPLACE and RENAME_EXCHANGE, in the order of do_renameat2() and vfs_rename() of the kernel.

use super::remove::lose_name;
use super::{Caller, State, check_name, directory, is_dots};
use crate::state::access::{self, EXEC, WRITE};
use crate::state::kv::Tx;
use crate::state::rows::{Inode, OpResult, refused};
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, ErrorCode, answer::Body};

/// The deepest directory tree a rename walks up. Far above what PATH_MAX lets anybody reach; a bound on the walk.
const DEPTH_MAX: usize = 1 << 20;

/// Both ends of a rename, looked up.
struct Ends {
    from: InodeNo,
    to: InodeNo,
    moved: Inode,
    /// What stands under the new name.
    target: Option<Inode>,
}

pub fn rename(s: &mut State<'_>, by: &Caller<'_>, op: &v1::Rename) -> OpResult<Body> {
    if op.no_replace && op.exchange {
        return refused(ErrorCode::ErrorInvalid, "RENAME_NOREPLACE with RENAME_EXCHANGE");
    }
    let from = directory(&s.tx, InodeNo(op.parent))?;
    access::require(&s.tx, by.cred, &from, EXEC)?;
    let to = directory(&s.tx, InodeNo(op.new_parent))?;
    access::require(&s.tx, by.cred, &to, EXEC)?;
    check_name(&op.name)?;
    check_name(&op.new_name)?;
    if is_dots(&op.name) || is_dots(&op.new_name) {
        return Err(ErrorCode::ErrorBusy.into());
    }
    let Some(moved) = s.find(from.ino(), &op.name)? else { return Err(ErrorCode::ErrorNotFound.into()) };
    let target = s.find(to.ino(), &op.new_name)?;
    if op.no_replace && target.is_some() {
        return Err(ErrorCode::ErrorExists.into());
    }
    if op.exchange && target.is_none() {
        return Err(ErrorCode::ErrorNotFound.into());
    }
    let moved = s.named(&moved)?;
    let target = target.map(|dentry| s.named(&dentry)).transpose()?;
    let ends = Ends { from: from.ino(), to: to.ino(), moved, target };
    check_loops(&s.tx, &ends, op.exchange)?;
    if ends.target.as_ref().is_some_and(|target| target.ino() == ends.moved.ino()) {
        // Two names of one inode: POSIX wants nothing to happen.
        return Ok(Body::Renamed(v1::Renamed { moved: Some(ends.moved.attr), replaced: None }));
    }
    check_permissions(s, by, &from, &to, &ends, op.exchange)?;
    if op.exchange { exchange(s, op, ends) } else { replace(s, op, ends) }
}

/// A directory must not become its own ancestor.
fn check_loops(tx: &Tx<'_>, ends: &Ends, exchange: bool) -> OpResult<()> {
    if ends.from == ends.to {
        return Ok(());
    }
    if ends.moved.is_dir() && is_at_or_above(tx, ends.moved.ino(), ends.to)? {
        return refused(ErrorCode::ErrorInvalid, "a directory cannot move below itself");
    }
    if let Some(target) = &ends.target
        && target.is_dir()
        && target.attr.size > 0
        && is_at_or_above(tx, target.ino(), ends.from)?
    {
        let code = if exchange { ErrorCode::ErrorInvalid } else { ErrorCode::ErrorNotEmpty };
        return refused(code, "the new name is a directory above the old one");
    }
    Ok(())
}

/// Whether `dir` is `below` or one of its ancestors.
fn is_at_or_above(tx: &Tx<'_>, dir: InodeNo, below: InodeNo) -> OpResult<bool> {
    let mut at = below;
    for _ in 0..DEPTH_MAX {
        if at == dir {
            return Ok(true);
        }
        if at == InodeNo::ROOT {
            return Ok(false);
        }
        // Nothing is above a removed directory, whatever its ".." once was.
        match tx.find_inode(at)? {
            Some(inode) if inode.attr.nlink > 0 => at = InodeNo(inode.attr.parent),
            _ => return Ok(false),
        }
    }
    refused(ErrorCode::ErrorLoop, "the directories are too deep")
}

fn check_permissions(
    s: &State<'_>,
    by: &Caller<'_>,
    from: &Inode,
    to: &Inode,
    ends: &Ends,
    exchange: bool,
) -> OpResult<()> {
    access::may_remove(&s.tx, by.cred, from, &ends.moved)?;
    match &ends.target {
        None => access::may_add(&s.tx, by.cred, to)?,
        Some(target) => {
            access::may_remove(&s.tx, by.cred, to, target)?;
            match (ends.moved.is_dir(), target.is_dir()) {
                (true, false) if !exchange => return Err(ErrorCode::ErrorNotDir.into()),
                (false, true) if !exchange => return Err(ErrorCode::ErrorIsDir.into()),
                _ => {}
            }
        }
    }
    if ends.from != ends.to {
        // A directory that changes its parent changes its "..".
        let exchanged = ends.target.as_ref().filter(|_| exchange);
        for dir in [Some(&ends.moved), exchanged].into_iter().flatten().filter(|inode| inode.is_dir()) {
            access::require(&s.tx, by.cred, dir, WRITE)?;
        }
    }
    match &ends.target {
        Some(target) if !exchange && target.is_dir() && target.attr.size > 0 => {
            Err(ErrorCode::ErrorNotEmpty.into())
        }
        _ => Ok(()),
    }
}

fn exchange(s: &mut State<'_>, op: &v1::Rename, ends: Ends) -> OpResult<Body> {
    let Ends { from, to, mut moved, target } = ends;
    let Some(mut target) = target else { return Err(ErrorCode::ErrorNotFound.into()) };
    s.put_dentry(from, &op.name, &target);
    s.put_dentry(to, &op.new_name, &moved);
    let (moved_dir, target_dir) = (u32::from(moved.is_dir()), u32::from(target.is_dir()));
    let now = s.now;
    s.update(from, |dir| {
        if from != to {
            dir.attr.nlink = dir.attr.nlink + target_dir - moved_dir;
        }
        dir.modified(now);
    })?;
    if from != to {
        s.update(to, |dir| {
            dir.attr.nlink = dir.attr.nlink + moved_dir - target_dir;
            dir.modified(now);
        })?;
    }
    // Either may be the other's parent's sibling, never its parent: that was refused as a loop. So the rows are apart.
    for (inode, parent) in [(&mut moved, to), (&mut target, from)] {
        if inode.is_dir() {
            inode.attr.parent = parent.get();
        }
        inode.changed(now);
        s.tx.put_inode(inode);
    }
    Ok(Body::Renamed(v1::Renamed { moved: Some(moved.attr), replaced: Some(target.attr) }))
}

fn replace(s: &mut State<'_>, op: &v1::Rename, ends: Ends) -> OpResult<Body> {
    let Ends { from, to, mut moved, target } = ends;
    let key = s.dentry_key(from, &op.name);
    s.tx.delete(key);
    s.put_dentry(to, &op.new_name, &moved);
    let now = s.now;
    let moved_dir = u32::from(moved.is_dir());
    let replaced_dir = u32::from(target.as_ref().is_some_and(Inode::is_dir));
    let added = u64::from(target.is_none());
    s.update(from, |dir| {
        dir.attr.size -= 1;
        dir.attr.nlink -= moved_dir;
        dir.modified(now);
    })?;
    s.update(to, |dir| {
        dir.attr.size += added;
        dir.attr.nlink = dir.attr.nlink + moved_dir - replaced_dir;
        if from != to {
            dir.modified(now);
        }
    })?;
    let mut replaced = None;
    if let Some(mut target) = target {
        lose_name(s, &mut target);
        s.tx.put_inode(&target);
        replaced = Some(target.attr);
    }
    if moved.is_dir() {
        moved.attr.parent = to.get();
    }
    moved.changed(now);
    s.tx.put_inode(&moved);
    Ok(Body::Renamed(v1::Renamed { moved: Some(moved.attr), replaced }))
}
