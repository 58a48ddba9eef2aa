//! Stands between the data plane and the session.
//!
//! * The attribute cache sees commits before the data plane drops the bytes they cover: so the size that a program sees never
//!   falls back to that of an older answer.
//! * Bytes that were kept under a write lease are committed under it. When it was lost with its session, they may be
//!   committed in the next one only if nobody else has changed the file in between; else they are lost, and whoever wrote them
//!   is told.

use super::own_cred;
use crate::cache::{Cache, Touched, Underway};
use crate::leases::Kind;
use crate::session::Session;
use crate::{Defaults, Master};
use async_trait::async_trait;
use dfs_proto::v1::{self, Cred, ErrorCode, LeaseKind, Timestamp, answer, hold, mutation, query};
use dfs_proto::{FsError, FsResult, InodeNo, SessionId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

pub(super) struct Observer {
    session: Arc<Session>,
    cache: Arc<Cache>,
    /// Commits of which nobody knows whether they happened before their session was lost: when they were made.
    unsure: Mutex<HashMap<InodeNo, Option<Timestamp>>>,
}

impl Observer {
    pub fn new(session: Arc<Session>, cache: Arc<Cache>) -> Self {
        Self { session, cache, unsure: Mutex::default() }
    }

    // Every change is a single step: a poisoned map is whole.
    fn unsure(&self) -> MutexGuard<'_, HashMap<InodeNo, Option<Timestamp>>> {
        self.unsure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn commit(&self, cred: &Cred, commit: v1::Commit) -> FsResult<answer::Body> {
        let (ino, made) = (InodeNo(commit.ino), commit.ctime);
        if let Some(version) = self.session.leases().lost_at(ino) {
            // Whatever the cause, what was kept must not be committed any more: the data plane drops it and tells.
            let regained = self.regain(ino, version).await;
            regained.map_err(|error| FsError { code: ErrorCode::ErrorConflict, ..error })?;
            self.session.leases().settle_lost(ino, version);
        }
        // Under a write lease nobody else can see it before its answer is here.
        let seen_by_others = self.session.leases().kind(ino) != Some(Kind::Write);
        let mut doubt = seen_by_others.then(|| Underway::begin(&self.cache, Touched::inode(ino)));
        let (ticket, session) = (self.cache.ticket(), self.session.session());
        let heard = self.session.change(cred, mutation::Op::Commit(commit)).await;
        match &heard.result {
            Ok(answer::Body::Entry(v1::Entry { attr: Some(attr), .. })) => {
                self.unsure().remove(&ino);
                self.cache.learn(&ticket.at(heard.seen), attr);
            }
            Err(_) if !heard.answered || self.session.session() != session => {
                self.unsure().insert(ino, made);
            }
            _ => {}
        }
        if let Some(doubt) = &mut doubt {
            doubt.answered = heard.answered;
        }
        heard.result
    }

    /// Makes sure that nobody else has changed an inode since this version, on which a lease was lost, nor will before the commit.
    async fn regain(&self, ino: InodeNo, version: u64) -> FsResult<()> {
        let ticket = self.cache.ticket();
        // Whoever holds a lease has not to wait for one, behind those who may wait for his: nobody else changes the inode.
        let heard = if self.session.leases().tenure(ino).is_some() {
            let question = v1::GetAttr { ino: ino.get(), generation: 0 };
            self.session.ask(&own_cred(), query::Op::GetAttr(question)).await
        } else {
            let take = v1::TakeLease { ino: ino.get(), kind: LeaseKind::LeaseWrite.into() };
            self.session.get(&own_cred(), hold::Op::TakeLease(take)).await
        };
        let attr = match heard.result? {
            answer::Body::Leased(v1::Leased { attr: Some(attr) })
            | answer::Body::Entry(v1::Entry { attr: Some(attr), .. }) => attr,
            other => return Err(super::unexpected(&other)),
        };
        let unsure = self.unsure().remove(&ino);
        // The last commit in the old session may have happened: that was this client's own change.
        let own = unsure.is_some_and(|made| attr.version == version + 1 && attr.ctime == made);
        if attr.version != version && !own {
            let text = "the session was lost, and somebody else has changed the file since: what was written is lost";
            tracing::error!(%ino, was = version, is = attr.version, "{text}");
            return Err(FsError::new(ErrorCode::ErrorIo, text));
        }
        self.cache.put_attr(&ticket.at(heard.seen), &attr);
        Ok(())
    }
}

#[async_trait]
impl Master for Observer {
    async fn mutate(&self, cred: &Cred, change: mutation::Op) -> FsResult<answer::Body> {
        match change {
            mutation::Op::Commit(commit) => self.commit(cred, commit).await,
            change => Master::mutate(&*self.session, cred, change).await,
        }
    }

    async fn query(&self, cred: &Cred, question: v1::query::Op) -> FsResult<answer::Body> {
        self.session.query(cred, question).await
    }

    async fn hold(&self, cred: &Cred, hold: hold::Op) -> FsResult<answer::Body> {
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
