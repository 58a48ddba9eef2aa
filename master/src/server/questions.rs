//! Answers questions, opens files and gives leases: what is read of the applied state and of the leader's memory.

use super::answers::Appends;
use super::change;
use super::connection::{Done, Link};
use super::requests::{Shown, leased, not_opened, opened, reply};
use super::{Gone, answer, failed, store_failed};
use crate::leases::locks::Owner;
use crate::leases::opens::Access;
use crate::leases::table::{Clock, Kind};
use crate::state;
use dfs_proto::v1::{self, Answer, Cred, ErrorCode, Query, answer::Body, chunk_state::Phase, hold, query};
use dfs_proto::{ChunkId, FsError, InodeNo, NodeId};
use futures::FutureExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// Slices sent along with an Open.
const OPEN_SLICES: u32 = 16;
/// How long whoever buffers changes of an inode may take to say what it looks like; then he is to give them up.
const ASK_WAIT: Duration = Duration::from_secs(1);
/// How often he is asked because he answers without knowing of all that was committed before.
const ASKS: usize = 4;
/// How often the state is looked at while others change what is asked about; then the question takes its turn with them.
const LOOKS: usize = 4;
/// Questions answered before others get a turn.
const READS_IN_A_ROW: usize = 64;
/// A page with this many entries that come without a lease, because the log has not noted yet that the session may have it,
/// waits for that, but not for longer than this.
const UNNOTED: usize = 8;
const NOTE_WAIT: Duration = Duration::from_secs(1);

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
        match look(&link, &read, opening.as_ref(), Patience::ForNotes) {
            Ok(shown) => replies.push(leased(read.seq, shown)),
            Err(Unready::Hidden(ino)) => {
                waiting.push(look_behind(Arc::clone(&link), read, opening, ino).boxed());
            }
            Err(Unready::Unnoted(noted)) => {
                waiting.push(look_when_noted(Arc::clone(&link), read, noted).boxed());
            }
        }
    }
    Ok(Done::Replies(replies, waiting))
}

/// Why an answer is to be given later.
enum Unready {
    /// What it would say of this inode is not true: another session buffers changes of it.
    Hidden(InodeNo),
    /// Leases on what it lists are to be had once the log has noted something, which this tells of.
    Unnoted(watch::Receiver<u64>),
}

/// What else than the truth an answer is to wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    /// Leases on what it lists.
    ForNotes,
    Nothing,
}

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
        match look(&link, &read, opening.as_ref(), Patience::Nothing) {
            Ok(shown) => return Ok(Done::Reply(leased(read.seq, shown))),
            // A name that stands for something else by now, or somebody who was quicker.
            Err(Unready::Hidden(ino)) => hidden = ino,
            Err(Unready::Unnoted(_)) => {}
        }
        // Whoever changes it meanwhile gets his turn.
        tokio::task::yield_now().await;
    }
}

/// Answers with a page of a directory when leases on its entries are to be had: else each entry would be asked for again.
async fn look_when_noted(link: Arc<Link>, read: Read, mut noted: watch::Receiver<u64>) -> Result<Done, Gone> {
    let asked = link.term.now();
    loop {
        let left = NOTE_WAIT.saturating_sub(link.term.now().saturating_sub(asked));
        let in_time =
            !left.is_zero() && matches!(tokio::time::timeout(left, noted.changed()).await, Ok(Ok(())));
        let patience = if in_time { Patience::ForNotes } else { Patience::Nothing };
        match look(&link, &read, None, patience) {
            Ok(shown) => return Ok(Done::Reply(leased(read.seq, shown))),
            Err(Unready::Unnoted(again)) => noted = again,
            Err(Unready::Hidden(ino)) => return look_behind(link, read, None, ino).await,
        }
    }
}

/// The attributes of an inode with what another session buffers of it. None: it does not say.
async fn look_at_anothers(link: &Link, read: &Read, ino: InodeNo) -> Option<Answer> {
    let ReadOp::Query(query) = &read.op else { return None };
    for _ in 0..ASKS {
        // Others have seen what is committed by now: he is to answer when he has heard of it, too.
        let committed = state::attr(&*link.term.kv(), ino).ok()??.version;
        let asked = link.term.memory().ask(link.session, ino, committed)?;
        let told = tokio::time::timeout(ASK_WAIT, asked).await.ok()?.ok()??;
        if told.version < committed {
            continue;
        }
        let mut answer = ask(link, &read.cred, query);
        let Some(Body::Entry(v1::Entry { attr: Some(attr), .. })) = &mut answer.body else { return None };
        // A name that stands for something else by now is looked up in the usual way.
        if attr.ino != ino.get()
            || (attr.ino, attr.generation, attr.kind) != (told.ino, told.generation, told.kind)
        {
            return None;
        }
        // What was committed after he answered came after this.
        *attr = told;
        return Some(answer);
    }
    None
}

/// Answers a question or a hold from the applied state.
fn look(
    link: &Arc<Link>,
    read: &Read,
    opening: Option<&Opening>,
    patience: Patience,
) -> Result<Shown, Unready> {
    let seen = link.term.memory().leases.clock();
    match &read.op {
        ReadOp::Query(query) => {
            let (answer, seen) = ask_in_time(link, &read.cred, query, seen)?;
            let leases = lease_what_is_shown(link, query, &answer, seen, patience)?;
            Ok(Shown { answer, seen, leases })
        }
        ReadOp::Hold(hold::Op::Open(open)) => match opening {
            Some(opening) => opening.look(&read.cred, open, seen),
            None => Ok(Shown::new(failed(gone(InodeNo(open.ino))), seen)),
        },
        ReadOp::Hold(hold) => Ok(Shown::new(hold_now(link, hold), seen)),
    }
}

/// Answers a question if nobody buffers changes that would falsify the answer, and says when that was seen. Whoever committed
/// his and gave them up between the look at the state and the look at the leases has changed the inode since then.
fn ask_in_time(link: &Link, cred: &Cred, query: &Query, mut seen: Clock) -> Result<(Answer, Clock), Unready> {
    let mut looks = 1;
    loop {
        let answer = ask(link, cred, query);
        let hides = query.op.as_ref().and_then(|op| state::shown_as_committed(op, cred, &answer));
        let Some(ino) = hides else { return Ok((answer, seen)) };
        let memory = link.term.memory();
        if memory.leases.is_hidden(link.session, ino) {
            return Err(Unready::Hidden(ino));
        }
        if !memory.leases.has_changed(link.session, ino, seen) {
            return Ok((answer, seen));
        }
        if looks == LOOKS {
            return Err(Unready::Hidden(ino));
        }
        (seen, looks) = (memory.leases.clock(), looks + 1);
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

/// Gives leases on what an answer shows, but for what others hold write leases on. With patience, a page of a directory many
/// of whose entries come without one for a moment only is to be given again later.
fn lease_what_is_shown(
    link: &Link,
    query: &Query,
    answer: &Answer,
    seen: Clock,
    patience: Patience,
) -> Result<Vec<InodeNo>, Unready> {
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
    if serving && patience == Patience::ForNotes {
        let unnoted =
            granted.iter().filter(|ino| !memory.leases.is_noted(session, **ino, Kind::Read)).count();
        if unnoted >= UNNOTED {
            let noted = memory.tell_when_noted();
            memory.dispatch();
            return Err(Unready::Unnoted(noted));
        }
    }
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

pub fn empty() -> Answer {
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

    fn look(&self, cred: &Cred, open: &v1::Open, seen: Clock) -> Result<Shown, Unready> {
        let (kv, session) = (self.link.term.kv(), self.link.session);
        let refused = |error: FsError| Ok(Shown::new(failed(error), seen));
        if self.link.term.memory().leases.is_hidden(session, self.ino) {
            return Err(Unready::Hidden(self.ino));
        }
        let attr = match state::check_open(&*kv, cred, open) {
            Ok(Ok(attr)) => attr,
            Ok(Err(error)) => return refused(error),
            Err(error) => return refused(store_failed("opening a file", &error)),
        };
        let leases = {
            let mut memory = self.link.term.memory();
            if memory.leases.is_hidden(session, self.ino) {
                return Err(Unready::Hidden(self.ino));
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
