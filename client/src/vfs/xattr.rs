//! Extended attributes.

use super::{Client, entry, unexpected};
use crate::cache::Touched;
use bytes::Bytes;
use dfs_proto::v1::{self, Attr, Cred, ErrorCode, answer, mutation, query};
use dfs_proto::{FsError, FsResult, InodeNo, limits};

impl Client {
    /// The value of an extended attribute.
    ///
    /// # Errors
    /// ErrorNoData when there is none of that name, ErrorAccess, and the session's.
    pub async fn getxattr(&self, cred: &Cred, ino: InodeNo, name: &[u8]) -> FsResult<Bytes> {
        check_xattr_name(name)?;
        if let Some((attr, _)) = self.inner.cache.attr(ino)
            && lacks(&attr, name)
        {
            return Err(ErrorCode::ErrorNoData.into());
        }
        let question = v1::GetXattr { ino: ino.get(), name: Bytes::copy_from_slice(name) };
        match self.inner.master.query(cred, query::Op::GetXattr(question)).await? {
            answer::Body::Data(value) => Ok(value),
            other => Err(unexpected(&other)),
        }
    }

    /// Sets an extended attribute; `create`: only if it is new, `replace`: only if it is there.
    ///
    /// # Errors
    /// ErrorExists, ErrorNoData, ErrorTooBig, ErrorNotPermitted, and the session's.
    pub async fn setxattr(
        &self,
        cred: &Cred,
        ino: InodeNo,
        name: &[u8],
        value: &[u8],
        create: bool,
        replace: bool,
    ) -> FsResult<()> {
        check_xattr_name(name)?;
        if value.len() > limits::XATTR_VALUE_MAX {
            return Err(FsError::new(
                ErrorCode::ErrorTooBig,
                format!("a value of {} bytes; {} are allowed", value.len(), limits::XATTR_VALUE_MAX),
            ));
        }
        let change = v1::SetXattr {
            ino: ino.get(),
            name: Bytes::copy_from_slice(name),
            value: Bytes::copy_from_slice(value),
            create,
            replace,
        };
        self.change_xattr(cred, ino, mutation::Op::SetXattr(change)).await
    }

    /// The names of the extended attributes that the caller may see: `trusted.*` is for root.
    ///
    /// # Errors
    /// The session's.
    pub async fn listxattr(&self, cred: &Cred, ino: InodeNo) -> FsResult<Vec<Bytes>> {
        let question = query::Op::ListXattr(v1::ListXattr { ino: ino.get() });
        match self.inner.master.query(cred, question).await? {
            answer::Body::Names(names) => Ok(names.names),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// ErrorNoData, ErrorNotPermitted, and the session's.
    pub async fn removexattr(&self, cred: &Cred, ino: InodeNo, name: &[u8]) -> FsResult<()> {
        check_xattr_name(name)?;
        let change = v1::RemoveXattr { ino: ino.get(), name: Bytes::copy_from_slice(name) };
        self.change_xattr(cred, ino, mutation::Op::RemoveXattr(change)).await
    }

    /// Also an ACL, which changes the mode: the attributes come with the answer.
    async fn change_xattr(&self, cred: &Cred, ino: InodeNo, change: mutation::Op) -> FsResult<()> {
        self.inner.settle_attrs(ino).await?;
        let (made, answer) = self.inner.change(cred, change, Touched::inode(ino)).await;
        match answer.and_then(entry) {
            Ok(attr) => {
                self.inner.cache.learn(&made.ticket, &attr);
                self.inner.remains.keep(&attr);
                // The change may have been one of replicas or chunk size.
                self.inner.follow_policy(&attr);
                Ok(())
            }
            Err(error) => {
                self.inner.cache.forget_attr(ino);
                Err(error)
            }
        }
    }
}

/// Whether attributes tell that an inode has no such extended attribute. The kernel asks for these before each write and
/// each change of owner.
fn lacks(attr: &Attr, name: &[u8]) -> bool {
    match name {
        b"security.capability" => !attr.has_capability,
        b"system.posix_acl_access" => !attr.has_acl,
        b"system.posix_acl_default" => !attr.has_default_acl,
        // Not user.*: who may read these depends on who asks, and some are shown of every file.
        _ => attr.bare && [&b"security."[..], b"trusted."].iter().any(|space| name.starts_with(space)),
    }
}

fn check_xattr_name(name: &[u8]) -> FsResult<()> {
    if name.is_empty() || name.len() > limits::XATTR_NAME_MAX {
        return Err(FsError::new(
            ErrorCode::ErrorRange,
            format!("an attribute name of {} bytes", name.len()),
        ));
    }
    Ok(())
}
