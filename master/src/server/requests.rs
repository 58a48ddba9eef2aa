//! Carries out one request, or the questions of one frame.

use super::answers::Appends;
use super::change::{self, Change};
use super::connection::{Answered, Done, Link, Rights};
use super::memory::Verdict;
use super::term::Term;
use super::{Gone, answer, failed, store_failed};
use crate::leases::locks::{self, Lock, Outcome, Owner, Range, WaiterId};
use crate::leases::opens::{Access, Ticket};
use crate::leases::table::{Clock, Kind};
use crate::placement::{Health, NoPlace};
use crate::state::{self, Applied};
use dfs_proto::limits::{ALLOC_CHUNKS_MAX, NODE_SUSPECT_MS, REPLICAS_MAX};
use dfs_proto::v1::{
    self, Answer, Command, Cred, ErrorCode, Mutation, Query, Reply, answer::Body, chunk_state::Phase,
    command, hold, mutation, query,
};
use dfs_proto::{ByteLen, ChunkId, FsError, InodeNo, NodeId};
use futures::FutureExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Slices sent along with an Open.
const OPEN_SLICES: u32 = 16;
/// How long whoever buffers changes of an inode may take to say what it looks like; then he is to give them up.
const ASK_WAIT: Duration = Duration::from_secs(1);
/// Questions answered before others get a turn.
const READS_IN_A_ROW: usize = 64;

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

fn reply(seq: u64, answer: Answer) -> Answered {
    Answered { reply: Reply { seq, answer: Some(answer), ..Reply::default() }, leases: Vec::new() }
}

/// An answer that may be cached under leases, some of which come with it.
fn leased(seq: u64, shown: Shown) -> Answered {
    let Shown { answer, seen, leases } = shown;
    Answered { reply: Reply { seq, answer: Some(answer), seen: seen.to_proto(), ..Reply::default() }, leases }
}

/// An answer from the state as it was at `seen`.
struct Shown {
    answer: Answer,
    seen: Clock,
    /// The inodes of which the session gets leases with it.
    leases: Vec<InodeNo>,
}

impl Shown {
    fn new(answer: Answer, seen: Clock) -> Self {
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
    mut mutation: Mutation,
) -> Result<Done, Gone> {
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
    let repeated = match state::is_answered(&*link.term.kv(), link.session, seq) {
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
fn opened(link: &Link, ino: u64) -> Result<Access, FsError> {
    link.term.memory().opens.access(link.session, InodeNo(ino)).ok_or_else(|| not_opened(ino))
}

fn not_opened(ino: u64) -> FsError {
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
            .place(&candidates, replicas, capacity, &mut || term.shared.env.random())
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
        let up = candidates.iter().filter(|candidate| candidate.health <= Health::Doubted).count();
        let waited = term.now().saturating_sub(term.elected);
        let left = Duration::from_millis(NODE_SUSPECT_MS).saturating_sub(waited);
        if up >= replicas || left.is_zero() {
            return candidates;
        }
        let step = left.min(Duration::from_millis(100));
        let _changed_or_not = tokio::time::timeout(step, links.changed()).await;
    }
}

// ---- questions and holds ----

/// A question or a hold that is answered from memory.
pub struct Read {
    pub seq: u64,
    pub cred: Cred,
    pub op: ReadOp,
}

/// See [`Read`].
pub enum ReadOp {
    Query(Query),
    Hold(hold::Op),
}

/// Answers the questions of one frame after one confirmation that this master still leads: from then on the applied
/// state holds everything that was answered before they arrived.
pub async fn read(link: Arc<Link>, reads: Vec<Read>) -> Result<Done, Gone> {
    // An Open counts before it looks; see `leases/opens.rs`.
    let mut opens = reads.iter().map(|read| Opening::begin(&link, read)).collect::<Vec<_>>();
    link.term.shared.confirm().await?;
    let mut replies = Vec::with_capacity(reads.len());
    let mut waiting = Vec::new();
    for (at, (read, opening)) in reads.into_iter().zip(opens.drain(..)).enumerate() {
        if at % READS_IN_A_ROW == READS_IN_A_ROW - 1 {
            tokio::task::yield_now().await;
        }
        match look(&link, &read, opening.as_ref()) {
            Ok(shown) => replies.push(leased(read.seq, shown)),
            Err(Hidden(ino)) => waiting.push(look_behind(Arc::clone(&link), read, opening, ino).boxed()),
        }
    }
    Ok(Done::Replies(replies, waiting))
}

/// What an answer would say of this inode is not true: another session buffers changes of it.
struct Hidden(InodeNo);

/// Answers when the changes that another session buffers are committed.
async fn look_behind(
    link: Arc<Link>,
    read: Read,
    opening: Option<Opening>,
    mut hidden: InodeNo,
) -> Result<Done, Gone> {
    // Whoever only wants to know what it looks like asks the one who changes it, and does not disturb him.
    if let ReadOp::Query(Query { op: Some(query::Op::GetAttr(_) | query::Op::Lookup(_)) }) = &read.op
        && let Some(answer) = look_at_anothers(&link, &read, hidden).await
    {
        return Ok(Done::Reply(reply(read.seq, answer)));
    }
    loop {
        let _seen = change::see(&link, hidden).await?;
        match look(&link, &read, opening.as_ref()) {
            Ok(shown) => return Ok(Done::Reply(leased(read.seq, shown))),
            // A name that stands for something else by now, or somebody who was quicker.
            Err(Hidden(ino)) => hidden = ino,
        }
    }
}

/// The attributes of an inode with what another session buffers of it. None: it does not say.
async fn look_at_anothers(link: &Link, read: &Read, ino: InodeNo) -> Option<Answer> {
    let ReadOp::Query(query) = &read.op else { return None };
    let asked = link.term.memory().ask(link.session, ino)?;
    let told = tokio::time::timeout(ASK_WAIT, asked).await.ok()?.ok()??;
    let mut answer = ask(link, &read.cred, query);
    let Some(Body::Entry(v1::Entry { attr: Some(attr), .. })) = &mut answer.body else { return None };
    // A name that stands for something else by now is looked up in the usual way.
    if attr.ino != ino.get() || attr.ino != told.ino {
        return None;
    }
    *attr = v1::Attr {
        // What was told is of this version, whatever has been committed since.
        version: told.version,
        mode: told.mode,
        uid: told.uid,
        gid: told.gid,
        size: told.size,
        blocks: told.blocks,
        atime: told.atime,
        mtime: told.mtime,
        ctime: told.ctime,
        ..*attr
    };
    Some(answer)
}

/// Answers a question or a hold from the applied state.
fn look(link: &Arc<Link>, read: &Read, opening: Option<&Opening>) -> Result<Shown, Hidden> {
    let seen = link.term.memory().leases.clock();
    match &read.op {
        ReadOp::Query(query) => {
            let answer = ask(link, &read.cred, query);
            let leases = lease_what_is_shown(link, query, &answer, seen)?;
            Ok(Shown { answer, seen, leases })
        }
        ReadOp::Hold(hold::Op::Open(open)) => match opening {
            Some(opening) => opening.look(&read.cred, open, seen),
            None => Ok(Shown::new(failed(gone(InodeNo(open.ino))), seen)),
        },
        ReadOp::Hold(hold) => Ok(Shown::new(hold_now(link, hold), seen)),
    }
}

fn ask(link: &Link, cred: &Cred, query: &Query) -> Answer {
    let access = match &query.op {
        Some(query::Op::GetSlices(slices)) => opened(link, slices.ino),
        Some(query::Op::GetChunks(chunks)) => opened(link, chunks.ino),
        _ => Ok(Access { read: true, write: false }),
    };
    let reads = match access {
        Ok(access) => access.read,
        Err(error) => return failed(error),
    };
    match state::query(&*link.term.kv(), cred, query) {
        Ok(mut answer) => {
            // Whoever has it open for writing only may see where its bytes are (lseek), but gets no token for them.
            if reads {
                link.term.complete(link.session, &mut answer, Appends::None);
            }
            answer
        }
        Err(error) => failed(store_failed("answering a question", &error)),
    }
}

/// Gives leases on what an answer shows. An answer that what others buffer would falsify is to be given again later, but for
/// a directory's page, whose entries then come without a lease.
fn lease_what_is_shown(
    link: &Link,
    query: &Query,
    answer: &Answer,
    seen: Clock,
) -> Result<Vec<InodeNo>, Hidden> {
    use query::Op;
    let (mut memory, session) = (link.term.memory(), link.session);
    let dir = match &query.op {
        Some(Op::Lookup(lookup)) => Some(lookup.parent),
        Some(Op::ReadDir(read)) => Some(read.ino),
        _ => None,
    };
    let ino = match (&query.op, &answer.body) {
        (Some(Op::GetSlices(slices)), Some(Body::Layout(_))) => Some(slices.ino),
        (Some(Op::GetXattr(xattr)), Some(Body::Data(_))) => Some(xattr.ino),
        (Some(Op::ListXattr(xattr)), Some(Body::Names(_))) => Some(xattr.ino),
        (Some(Op::ReadLink(link)), Some(Body::Data(_))) => Some(link.ino),
        (_, Some(Body::Entry(entry))) => entry.attr.as_ref().map(|attr| attr.ino),
        // Refused by what the attributes said.
        (Some(Op::Access(access)), _) => Some(access.ino),
        _ => None,
    };
    if let Some(ino) = ino.map(InodeNo).filter(|ino| memory.leases.is_hidden(session, *ino)) {
        return Err(Hidden(ino));
    }
    let mut granted = Vec::new();
    let known = |body: &Body| match body {
        Body::Failure(failure) => failure.code() == ErrorCode::ErrorNotFound,
        _ => true,
    };
    if answer.body.as_ref().is_some_and(known) {
        granted.extend(dir.into_iter().chain(ino).map(InodeNo));
    }
    if let Some(Body::DirPage(page)) = &answer.body {
        for entry in page.entries.iter().filter(|entry| entry.attr.is_some()) {
            // What others buffer is not in it: it is shown, but not to be believed.
            let ino = InodeNo(entry.ino);
            if !memory.leases.is_hidden(session, ino) {
                granted.push(ino);
            }
        }
    }
    // A stream that was replaced tells nobody of a lease.
    let serving = memory.serves(session, link.generation);
    granted.retain(|ino| serving && memory.leases.grant(session, *ino, Kind::Read, seen));
    memory.dispatch();
    Ok(granted)
}

fn hold_now(link: &Link, hold: &hold::Op) -> Answer {
    let term = &link.term;
    match hold {
        hold::Op::Close(close) => {
            let ino = InodeNo(close.ino);
            let mut memory = term.memory();
            if memory.serves(link.session, link.generation) && memory.opens.close(link.session, ino) {
                let granted = memory.locks.release_file(ino, link.session);
                memory.wake(granted);
            }
            empty()
        }
        hold::Op::ReleaseLocks(release) => {
            let owner = Owner { session: link.session, key: release.owner };
            let mut memory = term.memory();
            let granted = memory.locks.release_owner(InodeNo(release.ino), owner);
            memory.wake(granted);
            empty()
        }
        hold::Op::CancelLock(cancel) => {
            term.memory().cancel_wait(link.session, cancel.seq);
            empty()
        }
        hold::Op::SealChunk(seal) => seal_chunk(link, seal),
        // They may wait, and are carried out on their own.
        hold::Op::Open(_) | hold::Op::Lock(_) | hold::Op::GetLock(_) | hold::Op::TakeLease(_) => {
            failed(ErrorCode::ErrorInvalid)
        }
    }
}

fn gone(ino: InodeNo) -> FsError {
    FsError::new(ErrorCode::ErrorStale, format!("inode {ino} is gone"))
}

fn empty() -> Answer {
    answer(Body::Empty(v1::Empty {}))
}

/// An Open that was counted, and is not granted yet.
struct Opening {
    link: Arc<Link>,
    ino: InodeNo,
    granted: AtomicBool,
}

impl Opening {
    /// Counts the open. None: it is not an Open, or the inode is being freed.
    fn begin(link: &Arc<Link>, read: &Read) -> Option<Self> {
        let ReadOp::Hold(hold::Op::Open(open)) = &read.op else { return None };
        let ino = InodeNo(open.ino);
        let mut memory = link.term.memory();
        let counts = memory.serves(link.session, link.generation) && memory.opens.open(link.session, ino);
        drop(memory);
        // Made only when it counts: dropping one takes the lock and takes a count back.
        counts.then(|| Self { link: Arc::clone(link), ino, granted: AtomicBool::new(false) })
    }

    fn look(&self, cred: &Cred, open: &v1::Open, seen: Clock) -> Result<Shown, Hidden> {
        let (kv, session) = (self.link.term.kv(), self.link.session);
        let refused = |error: FsError| Ok(Shown::new(failed(error), seen));
        if self.link.term.memory().leases.is_hidden(session, self.ino) {
            return Err(Hidden(self.ino));
        }
        let attr = match state::check_open(&*kv, cred, open) {
            Ok(Ok(attr)) => attr,
            Ok(Err(error)) => return refused(error),
            Err(error) => return refused(store_failed("opening a file", &error)),
        };
        let leases = {
            let mut memory = self.link.term.memory();
            if memory.leases.is_hidden(session, self.ino) {
                return Err(Hidden(self.ino));
            }
            self.granted.store(true, Ordering::Relaxed);
            let access = Access { read: open.read || open.exec, write: open.write };
            memory.opens.allow(session, self.ino, access);
            if attr.nlink == 0 {
                memory.opens.orphaned(self.ino);
            }
            let granted = memory.serves(session, self.link.generation)
                && ((open.write && memory.leases.grant(session, self.ino, Kind::Write, seen))
                    || memory.leases.grant(session, self.ino, Kind::Read, seen));
            memory.dispatch();
            if granted { vec![self.ino] } else { Vec::new() }
        };
        let mut layout = None;
        if open.read && attr.kind() == v1::Kind::File && attr.size > 0 {
            match state::layout(&*kv, self.ino, 0, attr.size, OPEN_SLICES) {
                Ok(Ok(slices)) => layout = Some(slices),
                // Only a courtesy: the client asks when it reads.
                Ok(Err(_)) => {}
                Err(error) => {
                    store_failed("reading slices", &error);
                }
            }
        }
        let mut answer = answer(Body::Opened(v1::Opened { attr: Some(attr), layout }));
        self.link.term.complete(session, &mut answer, Appends::None);
        Ok(Shown { answer, seen, leases })
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if !*self.granted.get_mut() {
            let mut memory = self.link.term.memory();
            if memory.serves(self.link.session, self.link.generation) {
                memory.opens.close(self.link.session, self.ino);
            }
        }
    }
}

/// Gives a lease, once nobody else's is in its way.
pub async fn take_lease(link: Arc<Link>, seq: u64, take: v1::TakeLease) -> Result<Done, Gone> {
    let refused = |error: FsError| Ok(Done::Reply(reply(seq, failed(error))));
    let ino = InodeNo(take.ino);
    let kind = if take.kind() == v1::LeaseKind::LeaseWrite { Kind::Write } else { Kind::Read };
    if kind == Kind::Write {
        let access = opened(&link, take.ino);
        if !access.as_ref().is_ok_and(|access| access.write) {
            return refused(access.err().unwrap_or_else(|| not_opened(take.ino)));
        }
    }
    match state::attr(&*link.term.kv(), ino) {
        Ok(Some(_)) => {}
        Ok(None) => return refused(gone(ino)),
        Err(error) => return refused(store_failed("reading an inode", &error)),
    }
    if link.term.memory().leases.is_full(link.session, ino) {
        // Whoever reads can do without; whoever writes tries again.
        let code = if kind == Kind::Read { ErrorCode::ErrorNoLocks } else { ErrorCode::ErrorUnavailable };
        return refused(FsError::new(code, "all leases are taken; some are asked back"));
    }
    change::take(&link, ino, kind).await?;
    link.term.shared.confirm().await?;
    let seen = link.term.memory().leases.clock();
    let answer = match state::attr(&*link.term.kv(), ino) {
        Ok(Some(attr)) => answer(Body::Leased(v1::Leased { attr: Some(attr) })),
        Ok(None) => failed(gone(ino)),
        Err(error) => failed(store_failed("reading an inode", &error)),
    };
    Ok(Done::Reply(leased(seq, Shown { answer, seen, leases: vec![ino] })))
}

/// The client appends no more to one of its chunks.
fn seal_chunk(link: &Link, seal: &v1::SealChunk) -> Answer {
    let term = &link.term;
    let id = ChunkId(seal.chunk);
    match state::chunk_state(&*term.kv(), id) {
        Ok(Some(chunk)) if chunk.session != link.session.get() => failed(FsError::new(
            ErrorCode::ErrorNotPermitted,
            format!("chunk {id} belongs to another session"),
        )),
        Ok(Some(chunk)) => {
            if seal.failed {
                for node in seal.suspects.iter().filter(|node| chunk.nodes.contains(node)) {
                    term.nodes.suspect(NodeId(*node));
                }
            }
            if chunk.phase() != Phase::Sealed {
                term.jobs.seal(id, seal.failed);
            }
            empty()
        }
        Ok(None) => empty(),
        Err(error) => failed(store_failed("reading a chunk", &error)),
    }
}

// ---- locks ----

fn wanted(link: &Link, lock: &v1::Lock, kind: locks::Kind) -> Result<Lock, FsError> {
    if lock.start > lock.end {
        return Err(FsError::new(ErrorCode::ErrorInvalid, "a lock that ends before it begins"));
    }
    let owner = Owner { session: link.session, key: lock.owner };
    Ok(Lock { owner, range: Range { start: lock.start, end: lock.end }, kind, pid: lock.pid })
}

/// Takes a lock, waits for it, or gives it back.
pub async fn lock(link: Arc<Link>, seq: u64, lock: v1::Lock) -> Result<Done, Gone> {
    let done = |answer| Ok(Done::Reply(reply(seq, answer)));
    let ino = InodeNo(lock.ino);
    let kind = match lock.r#type() {
        v1::lock::Type::Read => locks::Kind::Read,
        v1::lock::Type::Write => locks::Kind::Write,
        v1::lock::Type::Unlock => {
            let range = Range { start: lock.start, end: lock.end };
            if lock.start > lock.end {
                return done(failed(ErrorCode::ErrorInvalid));
            }
            let owner = Owner { session: link.session, key: lock.owner };
            let mut memory = link.term.memory();
            let granted = memory.locks.unlock(ino, owner, range);
            memory.wake(granted);
            return done(empty());
        }
    };
    let wanted = match wanted(&link, &lock, kind) {
        Ok(wanted) => wanted,
        Err(error) => return done(failed(error)),
    };
    // A lock that its holder is yet to assert must not be given to somebody else.
    link.term.reclaimed().await?;
    link.term.shared.confirm().await?;
    let outcome = {
        let mut memory = link.term.memory();
        if !memory.serves(link.session, link.generation) {
            return Err(Gone::default());
        }
        memory.lock(ino, wanted, lock.wait, seq)
    };
    let verdict = match outcome {
        Ok(Outcome::Held) => return done(empty()),
        Ok(Outcome::WouldBlock | Outcome::Waiting(_)) => return done(failed(ErrorCode::ErrorWouldBlock)),
        Ok(Outcome::Deadlock) => return done(failed(ErrorCode::ErrorDeadlock)),
        Ok(Outcome::TooMany) => return done(failed(ErrorCode::ErrorNoLocks)),
        Err((id, verdict)) => {
            let _wait = Wait { link: Arc::clone(&link), id };
            verdict.await
        }
    };
    match verdict {
        Ok(Verdict::Held) => {
            // The grant may have taken hours: it counts only if this master still leads.
            link.term.shared.confirm().await?;
            done(empty())
        }
        Ok(Verdict::Interrupted) => done(failed(ErrorCode::ErrorInterrupted)),
        // The session was asserted anew or has ended: whoever serves it now is asked again.
        Err(_) => Err(Gone::default()),
    }
}

/// A wait for a lock; it ends with its stream.
struct Wait {
    link: Arc<Link>,
    id: WaiterId,
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.link.term.memory().forget_wait(self.id);
    }
}

/// Tells whose lock is in the way.
pub async fn get_lock(link: Arc<Link>, seq: u64, lock: v1::GetLock) -> Result<Done, Gone> {
    let done = |answer| Ok(Done::Reply(reply(seq, answer)));
    let kind = match lock.r#type() {
        v1::lock::Type::Read => locks::Kind::Read,
        v1::lock::Type::Write => locks::Kind::Write,
        v1::lock::Type::Unlock => return done(failed(ErrorCode::ErrorInvalid)),
    };
    let owner = Owner { session: link.session, key: lock.owner };
    let range = Range { start: lock.start, end: lock.end };
    if lock.start > lock.end {
        return done(failed(ErrorCode::ErrorInvalid));
    }
    link.term.reclaimed().await?;
    link.term.shared.confirm().await?;
    let conflict = link.term.memory().locks.conflict(InodeNo(lock.ino), &Lock { owner, range, kind, pid: 0 });
    let state = conflict.map_or(v1::LockState::default(), |held| v1::LockState {
        held: true,
        start: held.range.start,
        end: held.range.end,
        r#type: match held.kind {
            locks::Kind::Read => v1::lock::Type::Read.into(),
            locks::Kind::Write => v1::lock::Type::Write.into(),
        },
        // A process of another machine means nothing here; fcntl(2) shows it as -1 or 0.
        pid: if held.owner.session == link.session { held.pid } else { 0 },
    });
    done(answer(Body::Lock(state)))
}
