//! Space and numbers of files.

use super::{Client, own_cred, unexpected};
use dfs_proto::FsResult;
use dfs_proto::v1::{self, answer, query};

impl Client {
    /// The cluster's space, as statfs(2) shows it.
    ///
    /// # Errors
    /// The session's.
    pub async fn statfs(&self) -> FsResult<v1::FsStats> {
        match self.inner.master.query(&own_cred(), query::Op::StatFs(v1::StatFs {})).await? {
            answer::Body::StatFs(stats) => Ok(stats),
            other => Err(unexpected(&other)),
        }
    }
}
