//! The session's stream: connects to the leader, sends what waits, hands out answers, and does so again when it breaks.

use super::Shared;
use super::requests::named_leader;
use super::route::Route;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::v1::session_client::SessionClient;
use dfs_proto::v1::{ClientFrame, ErrorCode, MasterFrame};
use dfs_proto::{FsError, limits};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, timeout};
use tonic::Streaming;
use tonic::transport::Channel;

/// How long a master may take to welcome a session: a new one goes through its log.
const WELCOME: Duration = Duration::from_secs(5);
/// A master that said nothing for this long, keep-alives included, is given up.
const SILENCE: Duration = Duration::from_millis(2 * limits::KEEP_ALIVE_MS + 1_000);
/// How often silence and keep-alives are looked after.
const TICK: Duration = Duration::from_millis(500);
/// How long an address is waited for before the next one is tried beside it: one that nobody answers, a machine that is off, must not
/// cost the whole time-out of a connection.
const STAGGER: Duration = Duration::from_millis(250);
/// A stream that ended sooner is not replaced at once.
const SHORT: Duration = Duration::from_secs(1);

/// How an attempt or a stream ended.
enum End {
    /// The session is over, by our own wish.
    Closed,
    /// Nothing came of it, or it broke.
    Failed(String),
    /// The master does not want us; `leader`: where it says to go.
    Refused { error: FsError, leader: Option<String> },
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Failed(cause) => f.write_str(cause),
            Self::Refused { error, .. } => error.fmt(f),
        }
    }
}

/// Keeps the session connected until it is closed or hopeless.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut route = Route::new(shared.masters.clone());
    loop {
        let (address, pause) = route.next(shared.env.random());
        let mut closed = shared.closed.subscribe();
        let attempt = async {
            tokio::time::sleep(pause).await;
            match dial(&shared, address, &mut route).await {
                Ok((address, channel)) => {
                    let end = attempt(&shared, &address, channel, &mut route).await;
                    (address, end)
                }
                Err((address, cause)) => (address, End::Failed(cause)),
            }
        };
        let (address, end) = tokio::select! {
            biased;
            _ = closed.wait_for(|closed| *closed) => return shared.finish(),
            end = attempt => end,
        };
        match end {
            End::Closed => return shared.finish(),
            End::Failed(cause) => {
                tracing::debug!(%address, %cause, "no session with this master");
                route.failed(&address, cause);
            }
            End::Refused { error, .. } if error.code == ErrorCode::ErrorSessionExpired => {
                tracing::warn!(%address, "the session expired; opening a new one");
                shared.expired();
                route.refused(&address, error, None);
            }
            End::Refused { error, leader } => {
                tracing::debug!(%address, %error, ?leader, "the master refused the session");
                route.refused(&address, error, leader);
            }
        }
        shared.disconnected(route.causes());
        if let Some(error) = route.hopeless() {
            return shared.break_down(&error);
        }
    }
}

/// Connects to an address, or to another master if that one takes long or fails: the first connection that stands. The last
/// failure when there is none.
async fn dial(
    shared: &Arc<Shared>,
    first: String,
    route: &mut Route,
) -> Result<(String, Channel), (String, String)> {
    let connect = |address: String| async move {
        let connected = rpc::connect(&shared.env, &address, Tuning::default()).await;
        (address, connected.map_err(|error| error.to_string()))
    };
    let mut others = route.others(&first).into_iter();
    let mut dials = FuturesUnordered::from_iter([connect(first)]);
    loop {
        let ended = tokio::select! {
            biased;
            ended = dials.next() => ended,
            () = tokio::time::sleep(STAGGER), if others.len() > 0 => None,
        };
        match ended {
            Some((address, Ok(channel))) => return Ok((address, channel)),
            Some((address, Err(cause))) if dials.is_empty() && others.len() == 0 => {
                return Err((address, cause));
            }
            Some((address, Err(cause))) => route.failed(&address, cause),
            None => {}
        }
        dials.extend(others.next().map(connect));
    }
}

/// One connection, from its first frame to its end.
async fn attempt(shared: &Arc<Shared>, address: &str, channel: Channel, route: &mut Route) -> End {
    let mut client = SessionClient::new(channel)
        .max_decoding_message_size(limits::MESSAGE_MAX)
        .max_encoding_message_size(limits::MESSAGE_MAX);
    let outbound = Outbound::new(shared);
    let opening = async {
        let mut stream = client.attach(outbound).await?.into_inner();
        let first = stream.message().await?;
        Ok::<_, tonic::Status>((stream, first))
    };
    let (stream, first) = match timeout(WELCOME, opening).await {
        Ok(Ok((stream, Some(first)))) => (stream, first),
        Ok(Ok((_, None))) => return End::Failed("closed the stream without a word".to_owned()),
        Ok(Err(status)) => return End::Failed(describe(&status)),
        Err(_) => return End::Failed(format!("connected, but no welcome within {WELCOME:?}")),
    };
    if let Err(cause) = shared.of_this_history(&first) {
        // Whatever it says is of the past, also that the session is unknown. The same is told once, not each second.
        if route.is_news(address) {
            tracing::warn!(%address, %cause, "this master is not listened to");
        }
        return End::Failed(cause);
    }
    if first.welcome.is_some() {
        route.learn(&first.masters);
    } else {
        route.hear(&first.masters);
    }
    if let Err(end) = accept(shared, address, first) {
        return end;
    }
    let began = Instant::now();
    tracing::info!(%address, "connected to the leading master");
    let end = serve(shared, stream, route).await;
    if !matches!(end, End::Closed) {
        tracing::warn!(%address, %end, "the connection to the master broke; looking for the leader");
    }
    route.lost(began.elapsed() < SHORT);
    end
}

/// The first frame: a welcome or a refusal.
fn accept(shared: &Arc<Shared>, address: &str, first: MasterFrame) -> Result<(), End> {
    refusal(&first)?;
    let Some(welcome) = &first.welcome else {
        return Err(End::Failed("sent neither a welcome nor a refusal".to_owned()));
    };
    if welcome.version != dfs_proto::PROTOCOL_VERSION {
        let text = format!(
            "the master speaks protocol version {}, this client {}",
            welcome.version,
            dfs_proto::PROTOCOL_VERSION
        );
        return Err(End::Refused { error: FsError::new(ErrorCode::ErrorVersion, text), leader: None });
    }
    shared.take_welcome(address, welcome).map_err(|error| End::Refused { error, leader: None })?;
    shared.received(first);
    Ok(())
}

fn refusal(frame: &MasterFrame) -> Result<(), End> {
    match &frame.refusal {
        Some(failure) => {
            Err(End::Refused { error: FsError::from(failure.clone()), leader: named_leader(frame) })
        }
        None => Ok(()),
    }
}

/// A welcomed stream, until it ends.
async fn serve(shared: &Arc<Shared>, mut stream: Streaming<MasterFrame>, route: &mut Route) -> End {
    let mut heard = Instant::now();
    let mut asked = heard;
    let mut tick = tokio::time::interval(TICK);
    let lost = |cause: String| End::Failed(cause);
    loop {
        tokio::select! {
            frame = stream.message() => match frame {
                Ok(Some(frame)) => {
                    heard = Instant::now();
                    route.learn(&frame.masters);
                    if let Err(refused) = refusal(&frame) {
                        return refused;
                    }
                    if shared.received(frame) {
                        return lost("the master lost the lead".to_owned());
                    }
                }
                Ok(None) | Err(_) if shared.goodbye_sent() => return End::Closed,
                Ok(None) => return lost("the master closed the stream".to_owned()),
                Err(status) => return lost(describe(&status)),
            },
            _ = tick.tick() => {
                if heard.elapsed() > SILENCE {
                    return lost(format!("the master was silent for {:?}", heard.elapsed()));
                }
                if asked.elapsed() >= shared.keep_alive_interval() {
                    asked = Instant::now();
                    shared.keep_alive();
                }
            }
        }
    }
}

fn describe(status: &tonic::Status) -> String {
    use std::error::Error;
    let text = match status.source() {
        Some(source) => rpc::root_cause(source),
        None => status.message().to_owned(),
    };
    if text.is_empty() { status.code().description().to_owned() } else { text }
}

/// What a stream sends. The connection asks for the next frame when it can take one, and a frame takes everything that
/// waits at that moment: batches form by themselves, without a timer and without a task in between.
struct Outbound {
    shared: Arc<Shared>,
    stream: u64,
    hello: Option<ClientFrame>,
}

impl Outbound {
    fn new(shared: &Arc<Shared>) -> Self {
        let (stream, hello) = shared.hello();
        let hello = ClientFrame { hello: Some(hello), ..ClientFrame::default() };
        Self { shared: Arc::clone(shared), stream, hello: Some(hello) }
    }
}

impl futures::Stream for Outbound {
    type Item = ClientFrame;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<ClientFrame>> {
        if let Some(hello) = self.hello.take() {
            return Poll::Ready(Some(hello));
        }
        let mut state = self.shared.state();
        if state.stream != self.stream || state.goodbye_sent() {
            return Poll::Ready(None);
        }
        match state.frame(self.shared.env.clock.boot()) {
            Some(frame) => Poll::Ready(Some(frame)),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}
