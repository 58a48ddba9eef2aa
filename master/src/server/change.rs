//! A change on its way: it waits for its names and for the leases of others, is proposed, and lets go when it was applied.

use super::connection::Link;
use super::memory::Memory;
use super::term::Term;
use super::{Gone, store_failed};
use crate::leases::names::Turn;
use crate::leases::table::{ClaimId, Clock, Kind, What};
use crate::state::{self, Applied};
use dfs_proto::v1::{self, Answer, Command, answer::Body, mutation};
use dfs_proto::{FsResult, InodeNo, SessionId};
use futures::future::BoxFuture;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// What a change holds, from before it is proposed until it was applied.
pub struct Change {
    link: Arc<Link>,
    turn: Option<Turn>,
    claim: Option<ClaimId>,
    /// When nothing was in its way any more.
    seen: Clock,
    parents: Vec<InodeNo>,
}

impl Change {
    /// Waits until nobody else caches or buffers what the change touches. Bounded: a session that does not give its leases
    /// back expires.
    pub async fn begin(link: &Arc<Link>, op: &mutation::Op) -> Result<FsResult<Self>, Gone> {
        let names = state::names_of(op);
        let parents = names.iter().map(|(parent, _)| *parent).collect();
        let seen = link.term.memory().leases.clock();
        let mut change = Self { link: Arc::clone(link), turn: None, claim: None, seen, parents };
        if !names.is_empty() {
            let (turn, waiting) = link.term.memory().take_names(names);
            change.turn = Some(turn);
            if let Some(waiting) = waiting {
                waiting.await.map_err(|_| Gone::default())?;
            }
        }
        if let mutation::Op::CopyRange(copy) = op {
            drop(see(link, InodeNo(copy.from)).await?);
        }
        let inos = match state::touched(&*link.term.kv(), op) {
            Ok(inos) => inos,
            Err(error) => return Ok(Err(store_failed("looking what a change touches", &error))),
        };
        if !inos.is_empty() {
            let (id, waiting) = link.term.memory().claim(link.session, What::Change, inos, link.term.now());
            change.claim = Some(id);
            if let Some(waiting) = waiting {
                waiting.await.map_err(|_| Gone::default())?;
            }
        }
        change.seen = link.term.memory().leases.clock();
        Ok(Ok(change))
    }

    /// Proposes the change. Whoever stops waiting for it leaves it to itself: what it holds is let go when it was applied.
    pub async fn propose(self, command: Command) -> Result<(Applied, Self), Gone> {
        let shared = Arc::clone(&self.link.term.shared);
        let proposal = async move { shared.propose(command).await };
        Proposed { proposal: Some(Box::pin(proposal)), change: Some(self) }.await
    }

    /// It was applied. Answers since when nobody else has changed what it touched, and the inodes of which the session gets
    /// leases with the answer.
    pub fn end(mut self, answer: &Answer, opened: bool) -> (Clock, Vec<InodeNo>) {
        let mut memory = self.link.term.memory();
        let now = self.link.term.now();
        if let Some(claim) = self.claim.take() {
            memory.end_claim(claim, now);
        }
        let mut granted = Vec::new();
        let mut grant = |memory: &mut Memory, ino: InodeNo, kind: Kind| {
            // A stream that was replaced tells nobody of a lease.
            let given = memory.serves(self.link.session, self.link.generation)
                && memory.leases.grant(self.link.session, ino, kind, self.seen);
            if given {
                granted.push(ino);
            }
            given
        };
        let (attrs, failed) = match &answer.body {
            Some(Body::Entry(entry)) => ([entry.attr, None], false),
            Some(Body::Unlinked(unlinked)) => ([unlinked.attr, None], false),
            Some(Body::Renamed(renamed)) => ([renamed.moved, renamed.replaced], false),
            Some(Body::Copied(copied)) => ([copied.attr, None], false),
            _ => ([None, None], true),
        };
        for attr in attrs.into_iter().flatten().filter(|attr| attr.nlink > 0 || opened) {
            let (ino, writes) = (InodeNo(attr.ino), opened && attr.kind() == v1::Kind::File);
            let _ = (writes && grant(&mut memory, ino, Kind::Write)) || grant(&mut memory, ino, Kind::Read);
        }
        for ino in attrs.into_iter().flatten().filter(|attr| attr.nlink == 0).map(|attr| InodeNo(attr.ino)) {
            // The client knows it from the answer.
            if !memory.opens.is_open(ino) {
                memory.leases.forget(self.link.session, ino, now);
            }
        }
        for parent in self.parents.iter().filter(|_| !failed) {
            grant(&mut memory, *parent, Kind::Read);
        }
        memory.dispatch();
        drop(memory);
        (self.seen, granted)
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        let mut memory = self.link.term.memory();
        if let Some(claim) = self.claim.take() {
            memory.end_claim(claim, self.link.term.now());
        }
        if let Some(turn) = self.turn.take() {
            memory.give_back_names(turn);
        }
    }
}

/// A claim that has passed; it ends when it is dropped.
pub struct Claim {
    term: Arc<Term>,
    id: ClaimId,
}

impl Claim {
    /// The cluster's own: waits until nobody caches anything of these inodes.
    pub async fn of_the_cluster(term: &Arc<Term>, inos: &[InodeNo]) -> Result<Self, Gone> {
        Self::of(term, SessionId(0), What::Change, inos.to_vec()).await
    }

    async fn of(term: &Arc<Term>, session: SessionId, what: What, inos: Vec<InodeNo>) -> Result<Self, Gone> {
        let (id, waiting) = term.memory().claim(session, what, inos, term.now());
        // Given up, too, by whoever stops waiting.
        let claim = Self { term: Arc::clone(term), id };
        if let Some(waiting) = waiting {
            waiting.await.map_err(|_| Gone::default())?;
        }
        Ok(claim)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.term.memory().end_claim(self.id, self.term.now());
    }
}

/// Waits until no other session buffers changes of an inode; none begins to while what is answered lives.
pub async fn see(link: &Link, ino: InodeNo) -> Result<Claim, Gone> {
    Claim::of(&link.term, link.session, What::See, vec![ino]).await
}

/// Waits for a lease, which is to be sent with the answer.
pub async fn take(link: &Link, ino: InodeNo, kind: Kind) -> Result<(), Gone> {
    Claim::of(&link.term, link.session, What::Take(kind), vec![ino]).await.map(drop)
}

/// A change that was proposed.
struct Proposed {
    proposal: Option<BoxFuture<'static, Result<Applied, Gone>>>,
    change: Option<Change>,
}

impl Future for Proposed {
    type Output = Result<(Applied, Change), Gone>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(proposal) = &mut self.proposal else { return Poll::Pending };
        let Poll::Ready(applied) = proposal.as_mut().poll(context) else { return Poll::Pending };
        self.proposal = None;
        match (applied, self.change.take()) {
            (Ok(applied), Some(change)) => Poll::Ready(Ok((applied, change))),
            (Err(gone), _) => Poll::Ready(Err(gone)),
            (Ok(_), None) => Poll::Pending,
        }
    }
}

impl Drop for Proposed {
    fn drop(&mut self) {
        // Its client has gone, but it may be applied all the same.
        if let Some(proposal) = self.proposal.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let change = self.change.take();
            runtime.spawn(async move {
                if proposal.await.is_err() {
                    tracing::debug!("a change whose client has gone was not applied by this master");
                }
                drop(change);
            });
        }
    }
}
