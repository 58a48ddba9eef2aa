//! How many replicas and how large chunks: a property of each file and directory, seen as the extended attributes
//! `user.dfs.replication` and `user.dfs.chunk_size`. What is made in a directory takes over the directory's.
//!
//! They are not listed: tools that copy attributes would bring them where they mean nothing, or take them away.

use super::{Caller, State, attr};
use crate::state::rows::{OpResult, refused};
use dfs_proto::InodeNo;
use dfs_proto::units::parse_bytes;
use dfs_proto::v1::{self, Attr, ErrorCode, SetAttr, answer::Body};

/// The names of these attributes and of those to come.
const PREFIX: &[u8] = b"user.dfs.";

/// One of these attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Replication,
    ChunkSize,
}

impl Policy {
    /// What a name stands for; None: an attribute like any other.
    pub fn named(name: &[u8]) -> OpResult<Option<Self>> {
        match name.strip_prefix(PREFIX) {
            None => Ok(None),
            Some(b"replication") => Ok(Some(Self::Replication)),
            Some(b"chunk_size") => Ok(Some(Self::ChunkSize)),
            Some(_) => {
                refused(ErrorCode::ErrorInvalid, "there are user.dfs.replication and user.dfs.chunk_size")
            }
        }
    }

    /// Its value; None: the cluster's default holds.
    pub fn value(self, attr: &Attr) -> Option<Vec<u8>> {
        let number = match self {
            Self::Replication => u64::from(attr.replicas),
            Self::ChunkSize => attr.chunk_size,
        };
        (number != 0).then(|| number.to_string().into_bytes())
    }

    /// The change that sets it; 0 is the cluster's default.
    fn change(self, ino: InodeNo, number: u64) -> OpResult<SetAttr> {
        let change = SetAttr { ino: ino.get(), ..SetAttr::default() };
        match self {
            Self::Replication => match u32::try_from(number) {
                Ok(replicas) => Ok(SetAttr { replicas: Some(replicas), ..change }),
                Err(_) => refused(ErrorCode::ErrorInvalid, "too many replicas"),
            },
            Self::ChunkSize => Ok(SetAttr { chunk_size: Some(number), ..change }),
        }
    }

    /// Sets it from text: a number, or for the chunk size one with a unit.
    pub fn set(self, s: &mut State<'_>, by: &Caller<'_>, op: &v1::SetXattr) -> OpResult<Body> {
        let exists = self.value(&s.tx.inode(InodeNo(op.ino))?.attr).is_some();
        if op.create && exists {
            return Err(ErrorCode::ErrorExists.into());
        }
        if op.replace && !exists {
            return Err(ErrorCode::ErrorNoData.into());
        }
        let text = std::str::from_utf8(&op.value).unwrap_or_default();
        let number = match self {
            Self::Replication => text.trim().parse().ok(),
            Self::ChunkSize => parse_bytes(text.trim()).ok(),
        };
        match number.filter(|number| *number != 0) {
            Some(number) => attr::set_attr(s, by, &self.change(InodeNo(op.ino), number)?),
            None => refused(ErrorCode::ErrorInvalid, "the value is not a number, or not a size"),
        }
    }

    /// Back to the cluster's default.
    pub fn remove(self, s: &mut State<'_>, by: &Caller<'_>, ino: InodeNo) -> OpResult<Body> {
        if self.value(&s.tx.inode(ino)?.attr).is_none() {
            return Err(ErrorCode::ErrorNoData.into());
        }
        attr::set_attr(s, by, &self.change(ino, 0)?)
    }
}
