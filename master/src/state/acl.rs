//! POSIX access control lists (POSIX.1e draft 17, acl(5)) in the format of the kernel's xattrs, version 2: a header
//! `version u32`, then entries `tag u16, perm u16, id u32`, little endian. The access ACL and the mode say the same thing:
//! the group bits of the mode are the ACL's mask.

use super::access;
use super::kv::Tx;
use super::rows::{Inode, OpResult, refused};
use dfs_proto::v1::{Attr, Cred, ErrorCode};
use std::io;

/// The xattr that holds the access ACL.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// The xattr that holds what a directory's new entries get.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const HEADER: usize = 4;
const ENTRY: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tag {
    UserObj,
    User,
    GroupObj,
    Group,
    Mask,
    Other,
}

impl Tag {
    const ALL: [(Self, u16); 6] = [
        (Self::UserObj, 0x01),
        (Self::User, 0x02),
        (Self::GroupObj, 0x04),
        (Self::Group, 0x08),
        (Self::Mask, 0x10),
        (Self::Other, 0x20),
    ];

    fn from_code(code: u16) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == code).map(|(tag, _)| *tag)
    }

    fn code(self) -> u16 {
        Self::ALL.iter().find(|(tag, _)| *tag == self).map_or(0, |(_, code)| *code)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AclEntry {
    pub tag: Tag,
    pub perm: u32,
    /// Of User and Group entries; u32::MAX in the others.
    pub id: u32,
}

/// A valid list: owner, named users, owning group, named groups, mask, others, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acl(Vec<AclEntry>);

/// What a list says of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Granted,
    Denied,
}

/// The inode's access ACL, if it says more than the mode.
pub fn access_acl(tx: &Tx<'_>, inode: &Inode) -> io::Result<Option<Acl>> {
    load(tx, inode, inode.attr.has_acl, ACCESS)
}

/// What the directory gives to its new entries.
pub fn default_acl(tx: &Tx<'_>, inode: &Inode) -> io::Result<Option<Acl>> {
    load(tx, inode, inode.attr.has_default_acl, DEFAULT)
}

fn load(tx: &Tx<'_>, inode: &Inode, present: bool, name: &[u8]) -> io::Result<Option<Acl>> {
    if !present {
        return Ok(None);
    }
    let value = tx.xattr(inode.ino(), name)?.unwrap_or_default();
    match Acl::parse(&value) {
        Ok(Some(acl)) => Ok(Some(acl)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("inode {} has an ACL that cannot be read", inode.ino()),
        )),
    }
}

impl Acl {
    /// Reads an xattr's value; None for a list without entries, which means "no ACL".
    pub fn parse(value: &[u8]) -> OpResult<Option<Self>> {
        if value.is_empty() {
            return Ok(None);
        }
        if value.len() < HEADER || !(value.len() - HEADER).is_multiple_of(ENTRY) {
            return refused(ErrorCode::ErrorInvalid, "an ACL of impossible length");
        }
        let (header, rest) = value.split_at(HEADER);
        if header != VERSION.to_le_bytes() {
            return refused(ErrorCode::ErrorNotSupported, "an ACL of an unknown version");
        }
        let mut entries = Vec::with_capacity(rest.len() / ENTRY);
        for entry in rest.chunks_exact(ENTRY) {
            let short = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
            let Some(tag) = Tag::from_code(short(0)) else {
                return refused(ErrorCode::ErrorInvalid, "an ACL entry of an unknown kind");
            };
            let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            let named = matches!(tag, Tag::User | Tag::Group);
            entries.push(AclEntry { tag, perm: u32::from(short(2)), id: if named { id } else { u32::MAX } });
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let acl = Self(entries);
        if acl.is_valid() {
            Ok(Some(acl))
        } else {
            refused(ErrorCode::ErrorInvalid, "an ACL that is not valid")
        }
    }

    /// posix_acl_valid() of the kernel.
    fn is_valid(&self) -> bool {
        let count = |tag| self.0.iter().filter(|entry| entry.tag == tag).count();
        let named = count(Tag::User) + count(Tag::Group) > 0;
        self.0.is_sorted_by_key(|entry| entry.tag)
            && self.0.iter().all(|entry| entry.perm <= 7)
            && self.0.iter().all(|e| e.id != u32::MAX || !matches!(e.tag, Tag::User | Tag::Group))
            && [Tag::UserObj, Tag::GroupObj, Tag::Other].iter().all(|tag| count(*tag) == 1)
            && count(Tag::Mask) <= 1
            && (!named || count(Tag::Mask) == 1)
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut value = Vec::with_capacity(HEADER + ENTRY * self.0.len());
        value.extend_from_slice(&VERSION.to_le_bytes());
        for entry in &self.0 {
            value.extend_from_slice(&entry.tag.code().to_le_bytes());
            value.extend_from_slice(&(entry.perm as u16).to_le_bytes());
            value.extend_from_slice(&entry.id.to_le_bytes());
        }
        value
    }

    fn perm(&self, tag: Tag) -> Option<u32> {
        self.0.iter().find(|entry| entry.tag == tag).map(|entry| entry.perm)
    }

    fn perm_mut(&mut self, tag: Tag) -> Option<&mut u32> {
        self.0.iter_mut().find(|entry| entry.tag == tag).map(|entry| &mut entry.perm)
    }

    /// Whether the permission bits of a mode say all that this list says.
    pub fn is_minimal(&self) -> bool {
        self.0.len() == 3
    }

    /// The permission bits (0777) of a mode that belong to this list.
    pub fn mode(&self) -> u32 {
        let group = self.perm(Tag::Mask).or_else(|| self.perm(Tag::GroupObj)).unwrap_or(0);
        self.perm(Tag::UserObj).unwrap_or(0) << 6 | group << 3 | self.perm(Tag::Other).unwrap_or(0)
    }

    /// The list after chmod(2): owner, mask (without one the owning group) and others follow the mode.
    pub fn chmod(&mut self, mode: u32) {
        let group = if self.perm(Tag::Mask).is_some() { Tag::Mask } else { Tag::GroupObj };
        for (tag, shift) in [(Tag::UserObj, 6), (group, 3), (Tag::Other, 0)] {
            if let Some(perm) = self.perm_mut(tag) {
                *perm = mode >> shift & 7;
            }
        }
    }

    /// A default list becomes the access list of a new inode that was asked for with `mode`: each limits the other.
    /// Answers the mode that results. (posix_acl_create_masq() of the kernel.)
    pub fn inherit(&mut self, mode: u32) -> u32 {
        let group = if self.perm(Tag::Mask).is_some() { Tag::Mask } else { Tag::GroupObj };
        for (tag, shift) in [(Tag::UserObj, 6), (group, 3), (Tag::Other, 0)] {
            if let Some(perm) = self.perm_mut(tag) {
                *perm &= mode >> shift & 7;
            }
        }
        mode & !0o777 | self.mode()
    }

    /// posix_acl_permission() of the kernel: who is not the owner is judged by the first entry that names him.
    pub fn check(&self, cred: &Cred, attr: &Attr, want: u32) -> Verdict {
        let mask = self.perm(Tag::Mask).unwrap_or(7);
        let verdict = |granted: bool| if granted { Verdict::Granted } else { Verdict::Denied };
        let allows = |perm: u32| perm & want == want;
        if cred.uid == attr.uid {
            return verdict(self.perm(Tag::UserObj).is_some_and(allows));
        }
        if let Some(user) = self.0.iter().find(|entry| entry.tag == Tag::User && entry.id == cred.uid) {
            return verdict(allows(user.perm & mask));
        }
        let mut in_some_group = false;
        for entry in &self.0 {
            let gid = match entry.tag {
                Tag::GroupObj => attr.gid,
                Tag::Group => entry.id,
                Tag::UserObj | Tag::User | Tag::Mask | Tag::Other => continue,
            };
            if access::in_group(cred, gid) {
                in_some_group = true;
                // Any one group that grants everything is enough, then only the mask decides.
                if allows(entry.perm) {
                    return verdict(allows(entry.perm & mask));
                }
            }
        }
        verdict(!in_some_group && self.perm(Tag::Other).is_some_and(allows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn acl(entries: &[(Tag, u32, u32)]) -> Acl {
        Acl(entries.iter().map(|(tag, perm, id)| AclEntry { tag: *tag, perm: *perm, id: *id }).collect())
    }

    fn cred(uid: u32, gid: u32, groups: &[u32]) -> Cred {
        Cred { uid, gid, groups: groups.to_vec() }
    }

    const NONE: u32 = u32::MAX;

    fn sample() -> Acl {
        acl(&[
            (Tag::UserObj, 7, NONE),
            (Tag::User, 6, 10),
            (Tag::GroupObj, 4, NONE),
            (Tag::Group, 7, 20),
            (Tag::Mask, 5, NONE),
            (Tag::Other, 1, NONE),
        ])
    }

    #[test]
    fn the_first_entry_that_names_the_caller_decides_under_the_mask() {
        let attr = Attr { uid: 1, gid: 2, ..Default::default() };
        let check = |cred: Cred, want| sample().check(&cred, &attr, want);
        assert_eq!(check(cred(1, 9, &[]), 7), Verdict::Granted);
        assert_eq!(check(cred(10, 9, &[]), 4), Verdict::Granted);
        assert_eq!(check(cred(10, 9, &[]), 2), Verdict::Denied, "the mask takes write away");
        assert_eq!(check(cred(10, 9, &[20]), 1), Verdict::Denied, "the named user comes before groups");
        assert_eq!(check(cred(5, 2, &[]), 4), Verdict::Granted);
        assert_eq!(check(cred(5, 2, &[]), 1), Verdict::Denied, "a member does not fall through to others");
        assert_eq!(check(cred(5, 2, &[20]), 5), Verdict::Granted);
        assert_eq!(check(cred(5, 5, &[]), 1), Verdict::Granted);
        assert_eq!(check(cred(5, 5, &[]), 4), Verdict::Denied);
    }

    #[test]
    fn mode_and_list_limit_each_other() {
        let mut list = sample();
        assert_eq!(list.mode(), 0o751);
        assert_eq!(list.inherit(0o2660), 0o2640);
        assert_eq!(list.mode(), 0o640);
        list.chmod(0o777);
        assert_eq!(list.mode(), 0o777);
        assert_eq!(list.perm(Tag::GroupObj), Some(4), "chmod moves the mask, not the owning group");
    }

    #[test]
    fn lists_that_are_not_valid_are_refused() {
        let bad = [
            acl(&[(Tag::UserObj, 7, NONE), (Tag::GroupObj, 7, NONE)]),
            acl(&[
                (Tag::UserObj, 7, NONE),
                (Tag::User, 7, 5),
                (Tag::GroupObj, 7, NONE),
                (Tag::Other, 0, NONE),
            ]),
            acl(&[(Tag::Other, 7, NONE), (Tag::GroupObj, 7, NONE), (Tag::UserObj, 0, NONE)]),
            acl(&[(Tag::UserObj, 8, NONE), (Tag::GroupObj, 7, NONE), (Tag::Other, 0, NONE)]),
        ];
        for list in bad {
            assert!(Acl::parse(&list.encode()).is_err(), "{list:?}");
        }
        assert!(matches!(Acl::parse(&[]), Ok(None)));
        assert!(matches!(Acl::parse(&[2, 0, 0, 0]), Ok(None)));
        assert!(Acl::parse(&[2, 0, 0]).is_err());
        assert!(Acl::parse(&[1, 0, 0, 0]).is_err());
    }

    proptest! {
        #[test]
        fn a_list_survives_its_encoding(users in prop::collection::vec((0_u32..8, 0_u32..100), 0..5), perms in prop::array::uniform4(0_u32..8)) {
            let mut entries = vec![(Tag::UserObj, perms[0], NONE)];
            entries.extend(users.iter().map(|(perm, id)| (Tag::User, *perm, *id)));
            entries.push((Tag::GroupObj, perms[1], NONE));
            entries.push((Tag::Mask, perms[2], NONE));
            entries.push((Tag::Other, perms[3], NONE));
            let list = acl(&entries);
            prop_assert_eq!(Acl::parse(&list.encode()).unwrap(), Some(list));
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>) {
            if let Ok(Some(list)) = Acl::parse(&bytes) {
                prop_assert_eq!(Acl::parse(&list.encode()).unwrap(), Some(list));
            }
        }
    }
}
