//! The Session service: how a client introduces itself. What follows is in `connection.rs`.

use super::connection::{Connection, Link, Rights};
use super::nodes::millis;
use super::term::Term;
use super::{Gone, HELLO_WAIT, Shared, requests, store_failed};
use crate::leases::locks::{Kind, Lock, Owner, Range};
use crate::leases::opens::Access;
use crate::leases::table as lease;
use crate::state;
use dfs_env::Seldom;
use dfs_env::rpc::Peer;
use dfs_proto::v1::{self, ClientFrame, ErrorCode, Hello, MasterFrame, Timestamp, Welcome};
use dfs_proto::{FsError, InodeNo, PROTOCOL_VERSION, SessionId};
use futures::Stream;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// Answers `Session`.
pub struct SessionService {
    shared: Arc<Shared>,
}

impl SessionService {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }
}

type Frames = Pin<Box<dyn Stream<Item = Result<MasterFrame, Status>> + Send>>;

#[tonic::async_trait]
impl v1::session_server::Session for SessionService {
    type AttachStream = Frames;

    async fn attach(&self, request: Request<Streaming<ClientFrame>>) -> Result<Response<Frames>, Status> {
        // The stream of answers is the connection itself, so that an answer goes out without another task in between.
        let peer = request.extensions().get::<Peer>().map(|peer| peer.0.clone()).unwrap_or_default();
        let start = Stage::Hello(Arc::clone(&self.shared), peer, Box::new(request.into_inner()));
        let frames = futures::stream::unfold(start, |stage| async move {
            match stage {
                Stage::Hello(shared, peer, inbound) => hello(shared, &peer, *inbound).await,
                Stage::Serving(mut connection) => {
                    let frame = connection.next_frame().await?;
                    let over = frame.as_ref().map_or(true, |frame| frame.refusal.is_some());
                    Some((frame, if over { Stage::Over } else { Stage::Serving(connection) }))
                }
                Stage::Over => None,
            }
        });
        Ok(Response::new(Box::pin(frames)))
    }
}

enum Stage {
    /// Not introduced yet; the address that it calls from.
    Hello(Arc<Shared>, String, Box<Streaming<ClientFrame>>),
    Serving(Box<Connection>),
    Over,
}

type Step = (Result<MasterFrame, Status>, Stage);

/// Why a client is not served.
enum Refusal {
    Gone(Gone),
    Failed(FsError),
}

impl From<Gone> for Refusal {
    fn from(gone: Gone) -> Self {
        Self::Gone(gone)
    }
}

impl From<FsError> for Refusal {
    fn from(error: FsError) -> Self {
        Self::Failed(error)
    }
}

/// The last frame of a stream whose master does not lead.
pub fn gone(gone: Gone) -> MasterFrame {
    MasterFrame { refusal: Some(gone.failure()), leader: gone.leader, ..MasterFrame::default() }
}

async fn hello(shared: Arc<Shared>, peer: &str, mut inbound: Streaming<ClientFrame>) -> Option<Step> {
    let mut first = match tokio::time::timeout(HELLO_WAIT, inbound.message()).await {
        Ok(Ok(Some(frame))) => frame,
        Ok(Ok(None) | Err(_)) => return None,
        Err(_) => return Some((Err(Status::deadline_exceeded("no hello")), Stage::Over)),
    };
    let Some(hello) = first.hello.take() else {
        return Some((Err(Status::invalid_argument("the first frame must be a hello")), Stage::Over));
    };
    // The rest of the first frame counts like any other's.
    let rest = ClientFrame { hello: None, ..first };
    let rights = if shared.squashes_root_of(peer) { Rights::RootIsNobody } else { Rights::AsSaid };
    match attach(&shared, rights, hello).await {
        Ok((link, welcome)) => {
            let masters = shared.node.voters();
            let frame = MasterFrame { welcome: Some(welcome), masters, ..MasterFrame::default() };
            let connection = Connection::new(link, rights, inbound, rest)?;
            Some((Ok(frame), Stage::Serving(Box::new(connection))))
        }
        Err(Refusal::Gone(why)) => {
            let masters = shared.node.voters();
            Some((Ok(MasterFrame { masters, ..gone(why) }), Stage::Over))
        }
        Err(Refusal::Failed(error)) => {
            static REFUSED: Seldom = Seldom::new();
            if let Some(unsaid) = REFUSED.now() {
                tracing::info!(%error, peer, unsaid, "a client was refused");
            }
            let term = shared.term.borrow().as_ref().map_or(0, |term| term.number);
            let frame = MasterFrame { refusal: Some(error.into()), term, ..MasterFrame::default() };
            Some((Ok(frame), Stage::Over))
        }
    }
}

/// Opens a session or takes one up again.
async fn attach(shared: &Arc<Shared>, rights: Rights, hello: Hello) -> Result<(Link, Welcome), Refusal> {
    check(shared, &hello)?;
    let term = shared.term().await?;
    let session = if hello.session == 0 {
        term.open_session(hello.nonce, &hello.client, &hello.host).await??
    } else {
        let session = SessionId(hello.session);
        resume(&term, session, hello.nonce).await?;
        session
    };
    let expired = || FsError::new(ErrorCode::ErrorSessionExpired, format!("session {session} has expired"));
    let locks = held_locks(session, &hello.locks);
    let leases = hello.takes_leases.then(|| held_leases(&hello));
    let opens = held_opens(&term, rights, hello.opens)?;
    let now = term.now();
    let (link, last) = {
        let mut memory = term.memory();
        let (generation, replaced) = memory.attach(session, now).ok_or_else(expired)?;
        let last = memory.assert_held(session, opens, &locks, leases, now);
        (Link::new(Arc::clone(&term), session, generation, replaced), last)
    };
    term.reclaim(last);
    tracing::info!(%session, client = hello.client, host = hello.host, resumed = hello.session != 0, "attached");
    let welcome = Welcome {
        session: session.get(),
        cluster_id: shared.cluster_id.clone(),
        ttl_ms: millis(shared.settings.session_ttl),
        now: Some(Timestamp::from_system(shared.env.clock.system())),
        replicas: term.replicas,
        chunk_size: term.chunk_size,
        version: PROTOCOL_VERSION,
        term: term.number,
        root_squash: rights == Rights::RootIsNobody,
    };
    Ok((link, welcome))
}

fn check(shared: &Shared, hello: &Hello) -> Result<(), FsError> {
    if hello.version != PROTOCOL_VERSION {
        return Err(FsError::new(
            ErrorCode::ErrorVersion,
            format!(
                "the client speaks protocol version {}, this master version {PROTOCOL_VERSION}",
                hello.version
            ),
        ));
    }
    if !hello.cluster_id.is_empty() && hello.cluster_id != shared.cluster_id {
        return Err(FsError::new(
            ErrorCode::ErrorWrongCluster,
            format!("the client expects cluster {}, this is {}", hello.cluster_id, shared.cluster_id),
        ));
    }
    Ok(())
}

/// Whether a session may be taken up by whoever knows its nonce.
async fn resume(term: &Term, session: SessionId, nonce: u64) -> Result<(), Refusal> {
    term.shared.confirm().await?;
    let row =
        state::session(&*term.kv(), session).map_err(|error| store_failed("reading a session", &error))?;
    match row {
        Some(row) if row.nonce == nonce => Ok(()),
        Some(_) | None => {
            Err(FsError::new(ErrorCode::ErrorSessionExpired, format!("session {session} has expired")).into())
        }
    }
}

/// The opens that a client asserts, and what they allow.
fn held_opens(
    term: &Term,
    rights: Rights,
    opens: Vec<v1::OpenFile>,
) -> Result<Vec<(InodeNo, u32, Access)>, FsError> {
    let kv = term.kv();
    let allowed = opens.into_iter().map(|open| {
        let [reader, writer] =
            [open.reader, open.writer].map(|cred| cred.map(|cred| requests::cred(Some(cred), rights)));
        let ino = InodeNo(open.ino);
        let (read, write) = state::access_of_holder(&*kv, ino, reader.as_ref(), writer.as_ref())
            .map_err(|error| store_failed("looking at open files", &error))?;
        Ok((ino, open.count, Access { read, write }))
    });
    allowed.collect()
}

/// The leases that a client asserts; one that it names twice it holds to write.
fn held_leases(hello: &Hello) -> Vec<(InodeNo, lease::Kind)> {
    let all = |inos: &[u64], kind| inos.iter().map(move |ino| (InodeNo(*ino), kind)).collect::<Vec<_>>();
    let mut held: BTreeMap<InodeNo, lease::Kind> =
        all(&hello.read_leases, lease::Kind::Read).into_iter().collect();
    held.extend(all(&hello.write_leases, lease::Kind::Write));
    held.into_iter().collect()
}

fn held_locks(session: SessionId, locks: &[v1::HeldLock]) -> Vec<(InodeNo, Lock)> {
    let lock = |held: &v1::HeldLock| {
        let kind = match held.r#type() {
            v1::lock::Type::Read => Kind::Read,
            v1::lock::Type::Write => Kind::Write,
            v1::lock::Type::Unlock => return None,
        };
        let range = Range { start: held.start, end: held.end };
        let owner = Owner { session, key: held.owner };
        (held.start <= held.end).then_some((InodeNo(held.ino), Lock { owner, range, kind, pid: held.pid }))
    };
    locks.iter().filter_map(lock).collect()
}
