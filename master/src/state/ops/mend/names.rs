//! Entries and inodes that do not agree.

use super::{Line, is_evident};
use crate::state::keys;
use crate::state::kv::Tx;
use crate::state::ops::create::GENERATION;
use crate::state::ops::orphan::{self, Orphan};
use crate::state::ops::{State, find_dentry, wish};
use crate::state::restored::Base;
use crate::state::rows::{Inode, OpResult};
use bytes::Bytes;
use dfs_proto::v1::{self, Attr, DentryRow, Kind, fault::What};
use dfs_proto::{ByteLen, InodeNo};
use std::collections::BTreeSet;
use std::io;

/// Where inodes that have lost their names get one, below the root; as in fsck of ext4.
pub const LOST_AND_FOUND: &[u8] = b"lost+found";

/// Removes an entry that names nothing, or that is in what is no directory; else sets its hash and kind right.
pub fn entry(s: &mut State<'_>, op: &v1::EntryPlace) -> OpResult<Line> {
    let parent = InodeNo(op.parent);
    let key = keys::dentry(parent, op.hash, &op.name);
    let Some(row) = s.tx.row::<DentryRow>(&key)? else { return Ok(None) };
    let Some(dir) = s.tx.find_inode(parent)? else { return Ok(None) };
    let name = String::from_utf8_lossy(&op.name).into_owned();
    if !dir.is_dir() {
        s.tx.delete(key);
        return Ok(Some(format!("the entry {name:?} of inode {parent}, no directory, is removed")));
    }
    let Some(inode) = s.tx.find_inode(InodeNo(row.ino))? else {
        if is_evident(s, InodeNo(row.ino))? {
            return Ok(None);
        }
        s.tx.delete(key);
        lose_entry(s, dir, row.kind() == Kind::Dir);
        return Ok(Some(format!(
            "the entry {name:?} of directory {parent} is removed: inode {} does not exist",
            row.ino
        )));
    };
    let right = s.dentry_key(parent, &op.name);
    let new = DentryRow { ino: row.ino, kind: inode.attr.kind };
    if right == key && new == row {
        return Ok(None);
    }
    if right != key {
        match s.tx.row::<DentryRow>(&right)? {
            // One name, two inodes: which of them it was nobody can tell.
            Some(other) if other.ino != row.ino => return Ok(None),
            Some(_) => lose_entry(s, dir, inode.is_dir()),
            None => changed(s, dir),
        }
        s.tx.delete(key);
    }
    s.tx.put_row(right, &new);
    Ok(Some(format!("the entry {name:?} of directory {parent} is where it should be")))
}

fn changed(s: &mut State<'_>, mut dir: Inode) {
    dir.modified(s.now);
    s.tx.put_inode(&dir);
}

/// A directory has one entry less. What its row counts wrongly besides is found by the next check.
fn lose_entry(s: &mut State<'_>, mut dir: Inode, is_dir: bool) {
    dir.attr.size = dir.attr.size.saturating_sub(1);
    if is_dir && dir.attr.nlink > 2 {
        dir.attr.nlink -= 1;
    }
    changed(s, dir);
}

/// A row as nobody's caches know it: of root, for root alone.
fn fresh(s: &State<'_>, ino: InodeNo, kind: Kind, parent: InodeNo) -> Inode {
    let (now, is_dir) = (Some(s.now), kind == Kind::Dir);
    let attr = Attr {
        ino: ino.get(),
        generation: GENERATION,
        kind: kind.into(),
        mode: if is_dir { 0o700 } else { 0o600 },
        nlink: if is_dir { 2 } else { 1 },
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        version: Base::of_second(u64::try_from(s.now.seconds).unwrap_or(0)).lift(1),
        parent: if is_dir { parent.get() } else { 0 },
        ..Attr::default()
    };
    Inode { attr, target: Bytes::new(), mapped: ByteLen(0) }
}

/// Makes an inode again that only slices or entries are left of.
pub fn missing(s: &mut State<'_>, op: &v1::MissingInode) -> OpResult<Line> {
    let ino = InodeNo(op.ino);
    let is_root = ino == InodeNo::ROOT;
    if s.tx.find_inode(ino)?.is_some() || !(is_root || is_evident(s, ino)?) {
        return Ok(None);
    }
    let mut inode = fresh(s, ino, op.kind(), InodeNo(op.parent));
    if is_root {
        inode.attr.mode = 0o755;
    }
    inode.attr.nlink = op.nlink;
    inode.attr.size = op.size;
    inode.set_mapped(ByteLen(op.mapped));
    wish::note(s, &inode);
    s.tx.put_inode(&inode);
    s.cluster.files += 1;
    Ok(Some(format!("inode {ino} is made again; mode, owner and times are lost")))
}

/// Sets what an inode's row says of other rows.
pub fn inode(s: &mut State<'_>, op: &v1::InodeRepair) -> OpResult<Line> {
    let ino = InodeNo(op.ino);
    let Some(mut inode) = s.tx.find_inode(ino)? else { return Ok(None) };
    let old = inode.clone();
    if (old.attr.version, old.mapped.get()) != (op.seen_version, op.seen_mapped) {
        return Ok(None);
    }
    let kept = orphan::find(s, ino)?;
    inode.attr.ino = op.ino;
    inode.attr.nlink = op.nlink;
    inode.attr.size = op.size;
    inode.attr.parent = op.parent;
    inode.attr.has_acl = op.has_acl;
    inode.attr.has_default_acl = op.has_default_acl;
    inode.attr.has_capability = op.has_capability;
    inode.attr.bare = op.bare;
    inode.set_mapped(ByteLen(op.mapped));
    match (op.nlink, kept) {
        (0, None) => orphan::put(s, ino, Orphan::Unlinked),
        (1.., Some(_)) => orphan::delete(s, ino),
        (0, Some(_)) | (1.., None) if inode == old => return Ok(None),
        (0, Some(_)) | (1.., None) => {}
    }
    inode.changed(s.now);
    s.tx.put_inode(&inode);
    let (attr, mapped) = (inode.attr, inode.mapped);
    Ok(Some(format!("inode {ino} has nlink {}, size {} and {mapped} mapped bytes", attr.nlink, attr.size)))
}

/// Gives an inode that has lost its name one in `/lost+found`, which is made if there is none.
pub fn nameless(s: &mut State<'_>, op: &v1::NamelessInode) -> OpResult<Line> {
    let ino = InodeNo(op.ino);
    let Some(mut inode) = s.tx.find_inode(ino)? else { return Ok(None) };
    if inode.attr.version != op.seen_version || inode.attr.nlink == 0 || ino == InodeNo::ROOT {
        return Ok(None);
    }
    let Some(mut dir) = lost_and_found(s)? else { return Ok(None) };
    let name = format!("#{ino}");
    if dir.ino() == ino || s.find(dir.ino(), name.as_bytes())?.is_some() {
        return Ok(None);
    }
    s.put_dentry(dir.ino(), name.as_bytes(), &inode);
    dir.attr.size += 1;
    if inode.is_dir() {
        dir.attr.nlink += 1;
        inode.attr.parent = dir.attr.ino;
    } else {
        inode.attr.nlink = 1;
    }
    dir.modified(s.now);
    s.tx.put_inode(&dir);
    orphan::delete(s, ino);
    inode.changed(s.now);
    s.tx.put_inode(&inode);
    Ok(Some(format!("inode {ino}, which had no name, is /lost+found/{name}")))
}

fn lost_and_found(s: &mut State<'_>) -> OpResult<Option<Inode>> {
    if let Some(dentry) = s.find(InodeNo::ROOT, LOST_AND_FOUND)? {
        return Ok(s.tx.find_inode(InodeNo(dentry.ino))?.filter(Inode::is_dir));
    }
    let Some(mut root) = s.tx.find_inode(InodeNo::ROOT)? else { return Ok(None) };
    let ino = InodeNo(s.cluster.next_ino);
    s.cluster.next_ino += 1;
    s.cluster.files += 1;
    let dir = fresh(s, ino, Kind::Dir, InodeNo::ROOT);
    s.tx.put_inode(&dir);
    s.put_dentry(InodeNo::ROOT, LOST_AND_FOUND, &dir);
    root.attr.size += 1;
    root.attr.nlink += 1;
    root.modified(s.now);
    s.tx.put_inode(&root);
    Ok(Some(dir))
}

/// The inodes whose attributes or names faults are about: what clients may cache.
///
/// # Errors
/// When the store cannot be read.
pub fn touched(tx: &Tx<'_>, hash_key: Option<&[u8; 16]>, faults: &[v1::Fault]) -> io::Result<Vec<InodeNo>> {
    let mut inos = BTreeSet::new();
    for what in faults.iter().filter_map(|fault| fault.what.as_ref()) {
        match what {
            What::Entry(op) => {
                inos.insert(InodeNo(op.parent));
                let row: Option<DentryRow> = tx.row(&keys::dentry(InodeNo(op.parent), op.hash, &op.name))?;
                inos.extend(row.map(|row| InodeNo(row.ino)));
            }
            What::Missing(op) => {
                inos.insert(InodeNo(op.ino));
            }
            What::Inode(op) => {
                inos.insert(InodeNo(op.ino));
            }
            What::Nameless(op) => {
                inos.extend([InodeNo(op.ino), InodeNo::ROOT]);
                let lost = hash_key.map(|key| find_dentry(tx, key, InodeNo::ROOT, LOST_AND_FOUND));
                inos.extend(lost.transpose()?.flatten().map(|row| InodeNo(row.ino)));
            }
            What::Row(_)
            | What::Slice(_)
            | What::Extent(_)
            | What::Chunk(_)
            | What::Counters(_)
            | What::Numbers(_)
            | What::Wish(_) => {}
        }
    }
    Ok(inos.into_iter().collect())
}
