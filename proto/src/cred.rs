//! Who asks, and the bits of a mode that depend on it.

use crate::v1::Cred;

pub const SET_UID: u32 = 0o4000;
pub const SET_GID: u32 = 0o2000;
pub const GROUP_EXEC: u32 = 0o010;
/// The bits that writes and chowns by others end.
pub const PRIVILEGED: u32 = SET_UID | SET_GID;

impl Cred {
    /// The number that users and groups without rights have.
    pub const NOBODY: u32 = 65_534;

    /// Somebody without rights of his own.
    #[must_use]
    pub fn nobody() -> Self {
        Self { uid: Self::NOBODY, gid: Self::NOBODY, groups: Vec::new() }
    }

    /// Uid 0 has every capability.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    #[must_use]
    pub fn in_group(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }

    /// A mode, of a file of the group `gid`, without the bits that a write or chown by this caller ends
    /// (`setattr_should_drop_suidgid` of the kernel).
    #[must_use]
    pub fn end_privileges(&self, mode: u32, gid: u32) -> u32 {
        let member = self.is_root() || self.in_group(gid);
        // Without execute permission for the group the bit means mandatory locking: members may keep it.
        let set_gid = if mode & GROUP_EXEC != 0 || !member { SET_GID } else { 0 };
        mode & !SET_UID & !set_gid
    }
}
