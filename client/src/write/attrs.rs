//! Attributes that a program set on a file with bytes that are not committed: they go to the master with the bytes, in
//! one command. Unpacking an archive writes a file, sets its times, owner and mode, and closes it. Pure.

use super::RunNo;
use dfs_proto::cred::{PRIVILEGED, SET_GID};
use dfs_proto::v1::{Attr, Cred, SetAttr, Timestamp};

/// What may be set together with bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttrSet {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub atime: Option<Timestamp>,
    pub mtime: Option<Timestamp>,
}

impl AttrSet {
    /// What a change sets; None: it changes something that the bytes must not wait for, or that only the master can say.
    #[must_use]
    pub fn of(change: &SetAttr) -> Option<Self> {
        let set = Self {
            mode: change.mode,
            uid: change.uid,
            gid: change.gid,
            atime: change.atime,
            mtime: change.mtime,
        };
        let rest = SetAttr { ino: change.ino, ..set.change() };
        (rest == *change).then_some(set)
    }

    /// As the master takes it.
    #[must_use]
    pub fn change(self) -> SetAttr {
        let Self { mode, uid, gid, atime, mtime } = self;
        SetAttr { mode, uid, gid, atime, mtime, ..SetAttr::default() }
    }

    /// Whether the master will certainly allow it, and what comes of it can be told here.
    #[must_use]
    pub fn is_certain(self, cred: &Cred, attr: &Attr) -> bool {
        let chowns = self.uid.is_some() || self.gid.is_some();
        let plain = attr.flags == 0 && !attr.has_acl && !attr.has_capability;
        // An owner's change takes privileges away, one after the other: the order would matter.
        let settled = !chowns || attr.mode & PRIVILEGED == 0;
        let allowed = cred.uid == 0
            || (cred.uid == attr.uid && !chowns && self.mode.is_none_or(|mode| mode & SET_GID == 0));
        plain && settled && allowed
    }

    /// Takes over a later change.
    pub fn then(&mut self, later: Self) {
        self.mode = later.mode.or(self.mode);
        self.uid = later.uid.or(self.uid);
        self.gid = later.gid.or(self.gid);
        self.atime = later.atime.or(self.atime);
        self.mtime = later.mtime.or(self.mtime);
    }

    /// Shows attributes as they will be.
    pub fn show(self, attr: &mut Attr) {
        attr.mode = self.mode.unwrap_or(attr.mode);
        attr.uid = self.uid.unwrap_or(attr.uid);
        attr.gid = self.gid.unwrap_or(attr.gid);
        attr.atime = self.atime.or(attr.atime);
        attr.mtime = self.mtime.or(attr.mtime);
    }

    /// Bytes of somebody without privileges came: those set before are gone.
    pub fn kill_priv(&mut self) {
        self.mode = self.mode.map(|mode| mode & !PRIVILEGED);
    }
}

/// Attributes that wait for a commit.
#[derive(Clone, Debug)]
pub struct Pending {
    /// Its place among the inode's runs: bytes of earlier ones are committed before it or with it.
    pub run: RunNo,
    /// On whose behalf.
    pub cred: Cred,
    pub set: AttrSet,
    /// When it was set last, in the master's time.
    pub ctime: Timestamp,
}

impl Pending {
    /// Takes over a later one, and its place.
    pub fn then(&mut self, later: &Self) {
        self.run = later.run;
        self.set.then(later.set);
        self.ctime = later.ctime;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certain_waits_for_the_bytes() {
        let at = |seconds| Timestamp { seconds, nanos: 0 };
        let change = SetAttr { ino: 7, mode: Some(0o644), mtime: Some(at(1)), ..SetAttr::default() };
        let set = AttrSet::of(&change).unwrap();
        assert_eq!((set.mode, set.mtime, set.uid), (Some(0o644), Some(at(1)), None));
        for other in [
            SetAttr { size: Some(0), ..change },
            SetAttr { mtime_now: true, ..change },
            SetAttr { kill_priv: true, ..change },
            SetAttr { flags: Some(0), ..change },
            SetAttr { replicas: Some(2), ..change },
        ] {
            assert_eq!(AttrSet::of(&other), None);
        }
        let owner = Cred { uid: 5, gid: 5, ..Cred::default() };
        let file = Attr { uid: 5, gid: 5, mode: 0o600, ..Attr::default() };
        let chown = AttrSet { uid: Some(5), ..AttrSet::default() };
        assert!(set.is_certain(&owner, &file) && set.is_certain(&Cred::default(), &file));
        assert!(!set.is_certain(&Cred { uid: 6, ..owner.clone() }, &file));
        assert!(!set.is_certain(&owner, &Attr { has_acl: true, ..file }));
        assert!(!set.is_certain(&Cred::default(), &Attr { flags: 16, ..file }));
        assert!(!AttrSet { mode: Some(0o2755), ..set }.is_certain(&owner, &file));
        assert!(!chown.is_certain(&owner, &file) && chown.is_certain(&Cred::default(), &file));
        assert!(!chown.is_certain(&Cred::default(), &Attr { mode: 0o4755, ..file }));
    }
}
