//! Carries out changes.

use super::answers::Appends;
use super::change::Change;
use super::connection::{Answered, Done, Link, Rights};
use super::term::Term;
use super::{Gone, failed, store_failed};
use crate::leases::opens::{Access, Ticket};
use crate::leases::table::Clock;
use crate::placement::NoPlace;
use crate::state::{self, Applied};
use dfs_proto::limits::{ALLOC_CHUNKS_MAX, EARLIER_SESSIONS_MAX, NODE_SUSPECT_MS, REPLICAS_MAX};
use dfs_proto::v1::{
    self, Answer, Command, Cred, ErrorCode, Mutation, Reply, answer::Body, command, mutation,
};
use dfs_proto::{ByteLen, FsError, InodeNo, SessionId};
use std::sync::Arc;
use std::time::Duration;

/// On whose behalf a request runs; nobody's when the client did not say, certainly not root's.
pub fn cred(cred: Option<Cred>, rights: Rights) -> Cred {
    let mut cred = cred.unwrap_or_else(Cred::nobody);
    if rights == Rights::RootIsNobody {
        for id in [&mut cred.uid, &mut cred.gid].into_iter().chain(&mut cred.groups) {
            *id = if *id == 0 { Cred::NOBODY } else { *id };
        }
    }
    cred
}

/// The answer to a request of a kind this version does not have.
pub fn not_understood(seq: u64) -> Answered {
    let error = FsError::new(ErrorCode::ErrorNotSupported, "the request has no operation this master knows");
    reply(seq, failed(error))
}

pub fn reply(seq: u64, answer: Answer) -> Answered {
    Answered { reply: Reply { seq, answer: Some(answer), ..Reply::default() }, leases: Vec::new() }
}

/// An answer that may be cached under leases, some of which come with it.
pub fn leased(seq: u64, shown: Shown) -> Answered {
    let Shown { answer, seen, leases } = shown;
    Answered { reply: Reply { seq, answer: Some(answer), seen: seen.to_proto(), ..Reply::default() }, leases }
}

/// An answer from the state as it was at `seen`.
pub struct Shown {
    pub answer: Answer,
    pub seen: Clock,
    /// The inodes of which the session gets leases with it.
    pub leases: Vec<InodeNo>,
}

impl Shown {
    pub fn new(answer: Answer, seen: Clock) -> Self {
        Self { answer, seen, leases: Vec::new() }
    }
}

// ---- mutations ----

/// Has a change applied.
pub async fn mutate(
    link: Arc<Link>,
    seq: u64,
    lowest_unanswered: u64,
    cred: Cred,
    earlier: Vec<v1::EarlierSession>,
    mut mutation: Mutation,
) -> Result<Done, Gone> {
    if earlier.len() > EARLIER_SESSIONS_MAX {
        let error = FsError::new(ErrorCode::ErrorInvalid, format!("{} earlier sessions", earlier.len()));
        return Ok(Done::Reply(reply(seq, failed(error))));
    }
    if let Err(error) = check_opens(&link, mutation.op.as_ref()) {
        return Ok(Done::Reply(reply(seq, failed(error))));
    }
    let Some(op) = &mutation.op else { return Ok(Done::Reply(not_understood(seq))) };
    if let mutation::Op::Commit(commit) = op {
        let (ino, now) = (InodeNo(commit.ino), link.term.now());
        link.term.memory().leases.progress(link.session, ino, now);
    }
    let change = match Change::begin(&link, op).await? {
        Ok(change) => change,
        Err(error) => return Ok(Done::Reply(reply(seq, failed(error)))),
    };
    // What it answers then may be old: others have changed things since.
    let sessions = earlier.iter().map(|before| SessionId(before.session)).chain([link.session]);
    let repeated = match state::is_answered(&*link.term.kv(), sessions, seq) {
        Ok(repeated) => repeated,
        Err(error) => {
            return Ok(Done::Reply(reply(seq, failed(store_failed("looking for an answer", &error)))));
        }
    };
    let mut appends = Appends::None;
    let mut creating = None;
    match &mut mutation.op {
        Some(mutation::Op::AllocChunks(alloc)) => {
            appends = Appends::All;
            if let Err(error) = place(&link.term, alloc).await {
                return Ok(Done::Reply(reply(seq, failed(error))));
            }
        }
        Some(mutation::Op::Create(create)) if create.open => creating = Some(Creating::begin(&link)),
        Some(_) | None => {}
    }
    let opening = creating.is_some();
    let linking = matches!(mutation.op, Some(mutation::Op::Link(_)));
    let command = Command {
        session: link.session.get(),
        seq,
        lowest_unanswered,
        now: None,
        cred: Some(cred),
        body: Some(command::Body::Mutation(mutation)),
        earlier,
    };
    let (applied, change) = change.propose(command).await?;
    let mut answer = match applied {
        Applied::Answer(answer) => answer,
        Applied::System(_) => {
            failed(FsError::new(ErrorCode::ErrorIo, "the state machine took a request for a system command"))
        }
    };
    settle(&link, &answer, creating, linking);
    let created = matches!(&answer.body, Some(Body::Entry(entry)) if entry.created);
    if repeated {
        drop(change);
        link.term.complete(link.session, &mut answer, appends);
        return Ok(Done::Reply(reply(seq, answer)));
    }
    let (seen, leases) = change.end(&answer, opening && created);
    link.term.complete(link.session, &mut answer, appends);
    Ok(Done::Reply(leased(seq, Shown { answer, seen, leases })))
}

/// What the session has opened an inode for.
pub fn opened(link: &Link, ino: u64) -> Result<Access, FsError> {
    link.term.memory().opens.access(link.session, InodeNo(ino)).ok_or_else(|| not_opened(ino))
}

pub fn not_opened(ino: u64) -> FsError {
    FsError::new(ErrorCode::ErrorAccess, format!("this session has not opened inode {ino} for that"))
}

/// Refuses what only an open file allows, and this session has not opened it for that.
fn check_opens(link: &Link, op: Option<&mutation::Op>) -> Result<(), FsError> {
    let has = |ino: u64, wanted: fn(Access) -> bool| {
        if wanted(opened(link, ino)?) { Ok(()) } else { Err(not_opened(ino)) }
    };
    match op {
        Some(mutation::Op::Commit(commit)) => has(commit.ino, |access| access.write),
        Some(mutation::Op::Fallocate(fallocate)) => has(fallocate.ino, |access| access.write),
        Some(mutation::Op::SetAttr(set)) if set.by_handle => has(set.ino, |access| access.write),
        Some(mutation::Op::CopyRange(copy)) => {
            has(copy.from, |access| access.read)?;
            has(copy.to, |access| access.write)
        }
        _ => Ok(()),
    }
}

/// Keeps the open table in step with what was applied.
fn settle(link: &Link, answer: &Answer, creating: Option<Creating>, linking: bool) {
    let orphan = match &answer.body {
        Some(Body::Entry(v1::Entry { attr: Some(attr), created, .. })) => {
            if let Some(creating) = creating {
                creating.end(attr, *created);
            } else if linking {
                // O_TMPFILE and linkat: it was without a name, and has its first one now.
                link.term.memory().opens.named(InodeNo(attr.ino));
            }
            return;
        }
        Some(Body::Unlinked(unlinked)) => unlinked.attr.as_ref(),
        Some(Body::Renamed(renamed)) => renamed.replaced.as_ref(),
        _ => None,
    };
    if let Some(creating) = creating {
        creating.fail();
    }
    if let Some(attr) = orphan
        && attr.nlink == 0
    {
        link.term.memory().opens.orphaned(InodeNo(attr.ino));
    }
}

/// A Create that opens, from before it is proposed until its open is counted; see `leases/opens.rs`.
struct Creating {
    link: Arc<Link>,
    ticket: Option<Ticket>,
}

impl Creating {
    fn begin(link: &Arc<Link>) -> Self {
        let ticket = link.term.memory().opens.creating();
        Self { link: Arc::clone(link), ticket: Some(ticket) }
    }

    /// `created`: it was made, not found: who made it may do everything. (Who found it has yet to ask.)
    fn end(mut self, attr: &v1::Attr, created: bool) {
        let Some(ticket) = self.ticket.take() else { return };
        let ino = InodeNo(attr.ino);
        let mut memory = self.link.term.memory();
        // A stream that was replaced meanwhile counts nothing: its client asks again through the new one.
        if memory.serves(self.link.session, self.link.generation) && memory.opens.open(self.link.session, ino)
        {
            memory.opens.allow(self.link.session, ino, Access { read: created, write: created });
            if attr.nlink == 0 {
                memory.opens.orphaned(ino);
            }
            memory.opens.created(ticket);
        } else {
            let now = self.link.term.now();
            memory.abandon(ticket, now);
        }
    }

    fn fail(mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.link.term.memory().opens.created(ticket);
        }
    }
}

impl Drop for Creating {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let now = self.link.term.now();
            self.link.term.memory().abandon(ticket, now);
        }
    }
}

/// Chooses daemons for the chunks that are to be allocated.
async fn place(term: &Term, alloc: &mut v1::AllocChunks) -> Result<(), FsError> {
    alloc.count = alloc.count.clamp(1, ALLOC_CHUNKS_MAX);
    let replicas = if alloc.replicas == 0 { term.replicas } else { alloc.replicas.min(REPLICAS_MAX) };
    let replicas = usize::try_from(replicas).unwrap_or(1);
    let capacity = ByteLen(if alloc.chunk_size == 0 { term.chunk_size } else { alloc.chunk_size });
    let mut candidates = arrived(term, replicas).await;
    alloc.placements.clear();
    for _ in 0..alloc.count {
        let places = term
            .placement
            .place(&candidates, &[], replicas, capacity, &mut || term.shared.env.random())
            .map_err(|error| {
                let code = match error {
                    NoPlace::NoNodes => ErrorCode::ErrorNoNodes,
                    NoPlace::Full => ErrorCode::ErrorNoSpace,
                };
                FsError::new(code, error.to_string())
            })?;
        for candidate in candidates.iter_mut().filter(|candidate| places.contains(&candidate.node)) {
            candidate.free = ByteLen(candidate.free.get().saturating_sub(capacity.get()));
        }
        alloc.placements.push(v1::Placement { nodes: places.iter().map(|node| node.get()).collect() });
        if candidates.iter().all(|candidate| candidate.free.get() == 0) {
            // Chunks allocated ahead of need must not make the cluster look full: one is enough to find out.
            alloc.count = u32::try_from(alloc.placements.len()).unwrap_or(1);
            break;
        }
    }
    Ok(())
}

/// The daemons to choose from. Right after an election they are only coming back: a chunk should not be born with too
/// few replicas because of that.
async fn arrived(term: &Term, replicas: usize) -> Vec<crate::placement::Candidate> {
    let mut links = term.nodes.links();
    loop {
        links.borrow_and_update();
        let candidates = term.nodes.candidates();
        let up = candidates.iter().filter(|candidate| candidate.is_open()).count();
        let waited = term.now().saturating_sub(term.elected);
        let left = Duration::from_millis(NODE_SUSPECT_MS).saturating_sub(waited);
        if up >= replicas || left.is_zero() {
            return candidates;
        }
        let step = left.min(Duration::from_millis(100));
        let _changed_or_not = tokio::time::timeout(step, links.changed()).await;
    }
}
