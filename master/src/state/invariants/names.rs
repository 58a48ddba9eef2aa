//! The namespace: every inode has as many names as it counts, every directory hangs on the root, attributes add up.

use super::{Found, Violations};
use crate::state::acl;
use crate::state::keys;
use crate::state::ops::attr::CAPABILITY;
use crate::state::rows::Inode;
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, Kind};
use std::collections::{BTreeMap, BTreeSet};

/// What the dentries say about each inode.
#[derive(Default)]
struct Counts {
    names: BTreeMap<u64, u64>,
    entries: BTreeMap<u64, u64>,
    subdirs: BTreeMap<u64, u64>,
    parent: BTreeMap<u64, u64>,
}

pub fn check(found: &Found, cluster: &v1::ClusterRow, violations: &mut Violations) {
    let counts = check_dentries(found, cluster, violations);
    for (ino, inode) in &found.inodes {
        check_inode(*ino, inode, found, &counts, violations);
    }
    check_reachable(found, violations);
    for ino in found.orphans.keys() {
        violations.unless(found.inodes.contains_key(ino), || format!("orphan {ino} does not exist"));
    }
    violations.unless(found.inodes.get(&InodeNo::ROOT.get()).is_some_and(Inode::is_dir), || {
        "there is no root directory".into()
    });
    check_xattrs(found, violations);
}

fn check_dentries(found: &Found, cluster: &v1::ClusterRow, violations: &mut Violations) -> Counts {
    let mut counts = Counts::default();
    let hash_key: Option<[u8; 16]> = cluster.hash_key.as_ref().try_into().ok();
    for ((parent, hash, name), row) in &found.dentries {
        let shown = || format!("entry {:?} of directory {parent}", String::from_utf8_lossy(name));
        violations.unless(hash_key.is_some_and(|key| keys::name_hash(&key, name) == *hash), || {
            format!("{} has the wrong hash", shown())
        });
        violations.unless(found.inodes.get(parent).is_some_and(Inode::is_dir), || {
            format!("{}, which is not a directory", shown())
        });
        *counts.names.entry(row.ino).or_default() += 1;
        *counts.entries.entry(*parent).or_default() += 1;
        match found.inodes.get(&row.ino) {
            None => violations.push(format!("{} names inode {}, which does not exist", shown(), row.ino)),
            Some(inode) => {
                violations.unless(inode.attr.kind == row.kind, || format!("{} has the wrong kind", shown()));
                if inode.is_dir() {
                    *counts.subdirs.entry(*parent).or_default() += 1;
                    counts.parent.insert(row.ino, *parent);
                }
            }
        }
    }
    counts
}

fn check_inode(ino: u64, inode: &Inode, found: &Found, counts: &Counts, violations: &mut Violations) {
    let attr = &inode.attr;
    let count = |table: &BTreeMap<u64, u64>| table.get(&ino).copied().unwrap_or(0);
    let names = count(&counts.names);
    let is_root = ino == InodeNo::ROOT.get();
    violations.unless(attr.ino == ino, || format!("inode {ino} calls itself {}", attr.ino));
    violations.unless(attr.kind() != Kind::Unspecified, || format!("inode {ino} is of no kind"));
    let nlink = match (inode.is_dir(), names > 0 || is_root) {
        (true, true) => 2 + count(&counts.subdirs),
        (true, false) => 0,
        (false, _) => names,
    };
    violations.unless(u64::from(attr.nlink) == nlink, || {
        format!("inode {ino} has nlink {} and should have {nlink}", attr.nlink)
    });
    violations.unless(found.orphans.contains_key(&ino) == (attr.nlink == 0), || {
        format!("inode {ino} has nlink {}, but is it an orphan?", attr.nlink)
    });
    if inode.is_dir() {
        let (entries, parent) = (count(&counts.entries), counts.parent.get(&ino).copied());
        violations.unless(names <= 1, || format!("directory {ino} has {names} names"));
        violations.unless(attr.size == entries, || {
            format!("directory {ino} has size {} and {entries} entries", attr.size)
        });
        let parent = if is_root { Some(ino) } else { parent };
        violations.unless(parent.is_none_or(|parent| parent == attr.parent), || {
            format!("directory {ino} takes {} for its parent", attr.parent)
        });
    }
    if inode.kind() == Kind::Symlink {
        violations
            .unless(attr.size == inode.target.len() as u64, || format!("symlink {ino} has the wrong size"));
    }
    violations.unless(attr.blocks == inode.mapped.get().div_ceil(512), || {
        format!("inode {ino} has {} blocks for {} bytes", attr.blocks, inode.mapped)
    });
}

/// Going up from every directory that has a name ends at the root.
fn check_reachable(found: &Found, violations: &mut Violations) {
    let mut good: BTreeSet<u64> = BTreeSet::from([InodeNo::ROOT.get()]);
    for (ino, inode) in &found.inodes {
        if !inode.is_dir() || inode.attr.nlink == 0 {
            continue;
        }
        let (mut way, mut at) = (BTreeSet::new(), *ino);
        while !good.contains(&at) {
            let above = found.inodes.get(&at).map(|inode| inode.attr.parent);
            match above {
                Some(above) if way.insert(at) => at = above,
                _ => {
                    violations.push(format!("directory {ino} does not hang on the root"));
                    break;
                }
            }
        }
        good.extend(way);
    }
}

fn check_xattrs(found: &Found, violations: &mut Violations) {
    let mut flagged: BTreeSet<(u64, &[u8])> = BTreeSet::new();
    for ((ino, name, part), length) in &found.xattrs {
        let shown = || format!("attribute {:?} of inode {ino}", String::from_utf8_lossy(name));
        violations.unless(found.inodes.contains_key(ino), || format!("{}, which does not exist", shown()));
        if *part > 0 {
            let before = found.xattrs.get(&(*ino, name.clone(), part - 1));
            violations.unless(before == Some(&keys::XATTR_PART) && *length > 0, || {
                format!("{} has a gap before part {part}", shown())
            });
        } else {
            flagged.insert((*ino, name.as_slice()));
        }
    }
    for (ino, inode) in &found.inodes {
        if inode.attr.nlink == 0 {
            continue; // being freed in steps
        }
        let mut own = flagged.range((*ino, &[][..])..(*ino + 1, &[][..])).map(|(_, name)| *name);
        violations
            .unless(!inode.attr.bare || own.all(|name| name == acl::ACCESS || name == acl::DEFAULT), || {
                format!("inode {ino} is marked as bare, but has attributes")
            });
        let flags = [
            (acl::ACCESS, inode.attr.has_acl),
            (acl::DEFAULT, inode.attr.has_default_acl),
            (CAPABILITY, inode.attr.has_capability),
        ];
        for (name, flag) in flags {
            violations.unless(flagged.contains(&(*ino, name)) == flag, || {
                format!("inode {ino} has its mark for {:?} wrong", String::from_utf8_lossy(name))
            });
        }
    }
}
