//! Who asks.

use crate::v1::Cred;

impl Cred {
    /// The number that users and groups without rights have.
    pub const NOBODY: u32 = 65_534;

    /// Somebody without rights of his own.
    #[must_use]
    pub fn nobody() -> Self {
        Self { uid: Self::NOBODY, gid: Self::NOBODY, groups: Vec::new() }
    }
}
