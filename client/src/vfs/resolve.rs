//! Paths, for callers without a kernel in front of them.

use super::{Client, entry};
use bytes::Bytes;
use dfs_proto::v1::{self, Attr, Cred, ErrorCode, query};
use dfs_proto::{FsError, FsResult, limits};

impl Client {
    /// What an absolute path stands for, with the rights of this process's user. Symlinks are not followed.
    ///
    /// # Errors
    /// ErrorNotFound, ErrorNotDir, ErrorAccess, ErrorNameTooLong, and the session's.
    pub async fn resolve(&self, path: &[u8]) -> FsResult<Attr> {
        self.resolve_as(&process_cred(), path).await
    }

    /// As [`Client::resolve`], with somebody else's rights.
    ///
    /// # Errors
    /// As [`Client::resolve`].
    pub async fn resolve_as(&self, cred: &Cred, path: &[u8]) -> FsResult<Attr> {
        if path.len() > limits::PATH_MAX {
            return Err(FsError::new(ErrorCode::ErrorNameTooLong, format!("a path of {} bytes", path.len())));
        }
        let ticket = self.inner.cache.ticket();
        let question = query::Op::ResolvePath(v1::ResolvePath { path: Bytes::copy_from_slice(path) });
        let heard = self.inner.session.ask(cred, question).await;
        let attr = heard.result.and_then(entry)?;
        self.inner.cache.put_attr(&ticket.at(heard.seen), &attr);
        Ok(self.inner.overlaid(attr))
    }
}

/// Who this process is.
#[must_use]
pub fn process_cred() -> Cred {
    // SAFETY: these two cannot fail and touch no memory.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let mut groups = vec![0; limits::GROUPS_MAX];
    // SAFETY: the pointer and the length describe `groups`, which outlives the call.
    let count = unsafe { libc::getgroups(groups.len().try_into().expect("65536 fits"), groups.as_mut_ptr()) };
    groups.truncate(usize::try_from(count).unwrap_or(0));
    Cred { uid, gid, groups }
}
