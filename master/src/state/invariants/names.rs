//! The namespace: every inode has as many names as it counts, every directory hangs on the root, attributes add up.

use super::faults::Subject;
use super::{Found, Violations, orphan_row};
use crate::state::acl;
use crate::state::keys;
use crate::state::ops::attr::CAPABILITY;
use crate::state::rows::Inode;
use dfs_proto::InodeNo;
use dfs_proto::v1::{self, Kind};
use std::collections::{BTreeMap, BTreeSet};

/// What the dentries say about each inode.
#[derive(Default)]
pub struct Counts {
    names: BTreeMap<u64, u64>,
    entries: BTreeMap<u64, u64>,
    subdirs: BTreeMap<u64, u64>,
    parent: BTreeMap<u64, u64>,
}

impl Counts {
    pub fn names(&self, ino: u64) -> u64 {
        self.names.get(&ino).copied().unwrap_or(0)
    }

    pub fn entries(&self, ino: u64) -> u64 {
        self.entries.get(&ino).copied().unwrap_or(0)
    }

    /// What an inode's link count should be: a directory's are its name, its own dot and its directories' dots.
    pub fn nlink(&self, ino: u64, is_dir: bool) -> u64 {
        let names = self.names(ino);
        match (is_dir, names > 0 || ino == InodeNo::ROOT.get()) {
            (true, true) => 2 + self.subdirs.get(&ino).copied().unwrap_or(0),
            (true, false) => 0,
            (false, _) => names,
        }
    }

    /// In which directory the name of a directory is; the root is in itself.
    pub fn parent(&self, ino: u64) -> Option<u64> {
        if ino == InodeNo::ROOT.get() { Some(ino) } else { self.parent.get(&ino).copied() }
    }
}

pub fn check(found: &Found, cluster: &v1::ClusterRow, violations: &mut Violations) -> Counts {
    let counts = check_dentries(found, cluster, violations);
    for (ino, inode) in &found.inodes {
        check_inode(*ino, inode, found, &counts, violations);
    }
    check_reachable(found, violations);
    for ino in found.orphans.keys() {
        violations.unless(found.inodes.contains_key(ino), orphan_row(*ino), || {
            format!("orphan {ino} does not exist")
        });
    }
    let root = InodeNo::ROOT.get();
    violations.unless(found.inodes.get(&root).is_some_and(Inode::is_dir), Subject::Missing(root), || {
        "there is no root directory".into()
    });
    check_xattrs(found, violations);
    counts
}

fn check_dentries(found: &Found, cluster: &v1::ClusterRow, violations: &mut Violations) -> Counts {
    let mut counts = Counts::default();
    let hash_key: Option<[u8; 16]> = cluster.hash_key.as_ref().try_into().ok();
    for ((parent, hash, name), row) in &found.dentries {
        let shown = || format!("entry {:?} of directory {parent}", String::from_utf8_lossy(name));
        let subject = || Subject::Entry(*parent, *hash, name.clone());
        violations.unless(
            hash_key.is_some_and(|key| keys::name_hash(&key, name) == *hash),
            subject(),
            || format!("{} has the wrong hash", shown()),
        );
        match found.inodes.get(parent) {
            None => {
                violations.push(Subject::Missing(*parent), format!("{}, which does not exist", shown()));
            }
            Some(inode) if inode.is_dir() => {}
            Some(_) => {
                // Nobody gets there: it is no name.
                violations.push(subject(), format!("{}, which is not a directory", shown()));
                continue;
            }
        }
        *counts.names.entry(row.ino).or_default() += 1;
        *counts.entries.entry(*parent).or_default() += 1;
        match found.inodes.get(&row.ino) {
            None => violations
                .push(subject(), format!("{} names inode {}, which does not exist", shown(), row.ino)),
            Some(inode) => {
                violations.unless(inode.attr.kind == row.kind, subject(), || {
                    format!("{} has the wrong kind", shown())
                });
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
    let subject = || Subject::Inode(ino);
    violations.unless(attr.ino == ino, subject(), || format!("inode {ino} calls itself {}", attr.ino));
    violations
        .unless(attr.kind() != Kind::Unspecified, Subject::Nothing, || format!("inode {ino} is of no kind"));
    let nlink = counts.nlink(ino, inode.is_dir());
    violations.unless(u64::from(attr.nlink) == nlink, subject(), || {
        format!("inode {ino} has nlink {} and should have {nlink}", attr.nlink)
    });
    violations.unless(found.orphans.contains_key(&ino) == (attr.nlink == 0), subject(), || {
        format!("inode {ino} has nlink {}, but is it an orphan?", attr.nlink)
    });
    if inode.is_dir() {
        let (names, entries) = (counts.names(ino), counts.entries(ino));
        violations.unless(names <= 1, Subject::Nothing, || format!("directory {ino} has {names} names"));
        violations.unless(attr.size == entries, subject(), || {
            format!("directory {ino} has size {} and {entries} entries", attr.size)
        });
        violations.unless(counts.parent(ino).is_none_or(|parent| parent == attr.parent), subject(), || {
            format!("directory {ino} takes {} for its parent", attr.parent)
        });
    }
    if inode.kind() == Kind::Symlink {
        violations.unless(attr.size == inode.target.len() as u64, subject(), || {
            format!("symlink {ino} has the wrong size")
        });
    }
    violations.unless(attr.blocks == inode.mapped.get().div_ceil(512), subject(), || {
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
                    let text = format!("directory {ino} does not hang on the root");
                    violations.push(Subject::Nothing, text);
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
        let row = Subject::Row(keys::xattr(InodeNo(*ino), name, *part));
        violations
            .unless(found.inodes.contains_key(ino), row, || format!("{}, which does not exist", shown()));
        if *part > 0 {
            let before = found.xattrs.get(&(*ino, name.clone(), part - 1));
            let follows = before == Some(&keys::XATTR_PART) && *length > 0;
            violations
                .unless(follows, Subject::Nothing, || format!("{} has a gap before part {part}", shown()));
        } else {
            flagged.insert((*ino, name.as_slice()));
        }
    }
    for (ino, inode) in &found.inodes {
        if inode.attr.nlink == 0 {
            continue; // being freed in steps
        }
        let marks = marks(&flagged, *ino);
        violations.unless(!inode.attr.bare || marks.bare, Subject::Inode(*ino), || {
            format!("inode {ino} is marked as bare, but has attributes")
        });
        let flags = [
            (acl::ACCESS, marks.has_acl, inode.attr.has_acl),
            (acl::DEFAULT, marks.has_default_acl, inode.attr.has_default_acl),
            (CAPABILITY, marks.has_capability, inode.attr.has_capability),
        ];
        for (name, there, flag) in flags {
            violations.unless(there == flag, Subject::Inode(*ino), || {
                format!("inode {ino} has its mark for {:?} wrong", String::from_utf8_lossy(name))
            });
        }
    }
}

/// What an inode's row says of its extended attributes.
pub struct Marks {
    pub has_acl: bool,
    pub has_default_acl: bool,
    pub has_capability: bool,
    /// It has none but ACLs.
    pub bare: bool,
}

impl Marks {
    pub fn of(found: &Found, ino: u64) -> Self {
        let own = found.xattrs.range((ino, Vec::new(), 0)..(ino + 1, Vec::new(), 0));
        let own = own.filter(|((_, _, part), _)| *part == 0);
        marks(&own.map(|((ino, name, _), _)| (*ino, name.as_slice())).collect(), ino)
    }
}

fn marks(names: &BTreeSet<(u64, &[u8])>, ino: u64) -> Marks {
    let has = |name: &'static [u8]| names.contains(&(ino, name));
    let mut own = names.range((ino, &[][..])..(ino + 1, &[][..])).map(|(_, name)| *name);
    Marks {
        has_acl: has(acl::ACCESS),
        has_default_acl: has(acl::DEFAULT),
        has_capability: has(CAPABILITY),
        bare: own.all(|name| name == acl::ACCESS || name == acl::DEFAULT),
    }
}
