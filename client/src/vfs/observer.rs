//! Lets the attribute cache see the commits of the data plane, before the data plane drops the bytes they cover: so the
//! size that a program sees never falls back to that of an older answer.

use crate::cache::Cache;
use crate::session::Session;
use crate::{Defaults, Master};
use async_trait::async_trait;
use dfs_proto::v1::{self, Cred, Timestamp};
use dfs_proto::{FsResult, SessionId};
use std::sync::Arc;
use tokio::sync::watch;

pub(super) struct Observer {
    session: Arc<Session>,
    cache: Arc<Cache>,
}

impl Observer {
    pub fn new(session: Arc<Session>, cache: Arc<Cache>) -> Self {
        Self { session, cache }
    }
}

#[async_trait]
impl Master for Observer {
    async fn mutate(&self, cred: &Cred, change: v1::mutation::Op) -> FsResult<v1::answer::Body> {
        let commit = matches!(change, v1::mutation::Op::Commit(_));
        let ticket = self.cache.ticket();
        let answer = self.session.mutate(cred, change).await?;
        if commit && let v1::answer::Body::Entry(v1::Entry { attr: Some(attr), .. }) = &answer {
            self.cache.learn(&ticket, attr);
        }
        Ok(answer)
    }

    async fn query(&self, cred: &Cred, question: v1::query::Op) -> FsResult<v1::answer::Body> {
        self.session.query(cred, question).await
    }

    async fn hold(&self, cred: &Cred, hold: v1::hold::Op) -> FsResult<v1::answer::Body> {
        self.session.hold(cred, hold).await
    }

    fn now(&self) -> Timestamp {
        self.session.now()
    }

    fn session(&self) -> SessionId {
        self.session.session()
    }

    fn defaults(&self) -> Defaults {
        self.session.defaults()
    }

    fn session_changed(&self) -> watch::Receiver<SessionId> {
        self.session.session_changed()
    }
}
