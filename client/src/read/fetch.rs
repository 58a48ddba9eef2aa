//! Gets verified bytes of a chunk from whichever replica has them, soonest.

use super::access::{Accesses, Place};
use super::cache::Run;
use super::peers::{Peer, Peers};
use dfs_proto::checksum::crc32c;
use dfs_proto::error::ErrorCode;
use dfs_proto::v1::{ChunkAccess, ReadReply, ReadRequest};
use dfs_proto::{ChunkId, FsError, FsResult, PROTOCOL_VERSION};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long one daemon may take for one read when there is nobody else to ask.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Rounds over all replicas after which damage that every one of them shows is believed.
const ROUNDS_FINAL: u32 = 3;

pub(crate) struct Fetcher {
    peers: Peers,
    accesses: Arc<Accesses>,
    operation_timeout: Option<Duration>,
    next_id: AtomicU64,
}

impl Fetcher {
    pub(crate) fn new(peers: Peers, accesses: Arc<Accesses>, operation_timeout: Option<Duration>) -> Self {
        Self { peers, accesses, operation_timeout, next_id: AtomicU64::new(1) }
    }

    pub(crate) fn peers(&self) -> &Peers {
        &self.peers
    }

    /// The bytes `[from, from + len)` of a chunk, and what else came with them.
    ///
    /// # Errors
    /// ErrorNoChunk: the chunk is gone, the layout is to be fetched again. ErrorIo: every replica is damaged, or none
    /// answered within the operation time-out.
    pub(crate) async fn fetch(&self, place: Place, from: u64, len: usize) -> FsResult<Run> {
        let chunk = place.chunk;
        let clock = &self.peers.env().clock;
        let began = clock.boot();
        let mut pause = Duration::from_millis(20);
        for round in 0_u32.. {
            let access = self.accesses.get(place, round > 0).await?;
            let error = match self.ask_replicas(&access, from, len).await {
                Ok(run) => return Ok(run),
                Err(error) => error,
            };
            let late = self
                .operation_timeout
                .is_some_and(|bound| clock.boot().saturating_sub(began) + pause > bound);
            match error.code {
                // Asked again with a fresh list of replicas first: it may only have moved.
                ErrorCode::ErrorNoChunk if round > 0 => return Err(error),
                ErrorCode::ErrorCorrupt if round + 1 >= ROUNDS_FINAL => {
                    return Err(FsError { code: ErrorCode::ErrorIo, ..error });
                }
                _ if late => {
                    return Err(FsError::new(ErrorCode::ErrorIo, format!("chunk {chunk}: {error}")));
                }
                _ => {
                    tracing::debug!(%chunk, %error, "no replica answered a read, trying again");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
        Err(ErrorCode::ErrorIo.into())
    }

    /// Asks one replica after the other, the next one also when the one before takes long. The error that says most:
    /// unreachable (may come back) before damaged before missing.
    async fn ask_replicas(&self, access: &ChunkAccess, from: u64, len: usize) -> FsResult<Run> {
        let chunk = ChunkId(access.chunk);
        let mut waiting = self.peers.order(chunk, &access.replicas).into_iter();
        let mut asked = FuturesUnordered::new();
        let mut hedge_after = Duration::ZERO;
        let mut worst: Option<FsError> = None;
        loop {
            if asked.is_empty() || hedge_after.is_zero() {
                match waiting.next() {
                    Some(peer) => {
                        hedge_after = peer.hedge_after();
                        asked.push(self.ask_one(peer, access, from, len));
                    }
                    None if asked.is_empty() => break,
                    None => hedge_after = ATTEMPT,
                }
            }
            match tokio::time::timeout(hedge_after, asked.next()).await {
                Ok(Some(Ok(run))) => return Ok(run),
                Ok(Some(Err(error))) => {
                    let rank = |error: &FsError| match error.code {
                        ErrorCode::ErrorNoChunk => 0,
                        ErrorCode::ErrorCorrupt => 1,
                        _ => 2,
                    };
                    if worst.as_ref().is_none_or(|worst| rank(&error) > rank(worst)) {
                        worst = Some(error);
                    }
                    hedge_after = Duration::ZERO;
                }
                Ok(None) => {}
                Err(_) => hedge_after = Duration::ZERO,
            }
        }
        Err(worst.unwrap_or_else(|| {
            FsError::new(ErrorCode::ErrorUnavailable, format!("chunk {chunk} has no replica now"))
        }))
    }

    async fn ask_one(&self, peer: Arc<Peer>, access: &ChunkAccess, from: u64, len: usize) -> FsResult<Run> {
        let chunk = ChunkId(access.chunk);
        let request = ReadRequest {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            version: PROTOCOL_VERSION,
            chunk: access.chunk,
            offset: from,
            length: u32::try_from(len).expect("at most READ_MAX"),
            token: access.token.clone(),
        };
        let reply = match tokio::time::timeout(ATTEMPT, self.peers.ask(&peer, request)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => {
                self.peers.blame(&peer);
                return Err(error);
            }
            Err(_) => {
                self.peers.blame(&peer);
                let text = format!("{} did not answer a read", peer.address());
                return Err(FsError::new(ErrorCode::ErrorTimedOut, text));
            }
        };
        verify(reply, from, len).inspect_err(|error| {
            tracing::warn!(%chunk, address = peer.address(), %error, "a replica could not be read");
            match error.code {
                ErrorCode::ErrorCorrupt | ErrorCode::ErrorNoChunk => self.peers.note_damage(&peer, chunk),
                _ => self.peers.blame(&peer),
            }
        })
    }
}

/// Checks a reply end to end: its units are whole, match their checksums, and cover what was asked for.
fn verify(reply: ReadReply, from: u64, len: usize) -> FsResult<Run> {
    if let Some(failure) = reply.failure {
        return Err(failure.into());
    }
    let corrupt = |what: &str| FsError::new(ErrorCode::ErrorCorrupt, format!("damaged bytes: {what}"));
    let mut rest: &[u8] = &reply.data;
    for unit in &reply.units {
        let len = usize::try_from(unit.length).map_err(|_| corrupt("a unit is too long"))?;
        if len > rest.len() {
            return Err(corrupt("the units are longer than the bytes"));
        }
        let (bytes, others) = rest.split_at(len);
        if crc32c(bytes) != unit.checksum {
            return Err(corrupt("a checksum does not match"));
        }
        rest = others;
    }
    if !rest.is_empty() {
        return Err(corrupt("bytes without a checksum"));
    }
    let run = Run { start: reply.start, bytes: reply.data };
    if run.part(from, len).is_none() {
        return Err(corrupt("they are not the ones asked for"));
    }
    Ok(run)
}

#[cfg(test)]
mod tests {
    use super::*;
    use dfs_proto::v1::Unit;

    fn reply(start: u64, parts: &[&[u8]]) -> ReadReply {
        let unit = |part: &&[u8]| Unit { length: part.len() as u32, checksum: crc32c(part) };
        ReadReply {
            start,
            units: parts.iter().map(unit).collect(),
            data: parts.concat().into(),
            ..ReadReply::default()
        }
    }

    #[test]
    fn only_whole_and_sound_answers_are_taken() {
        let good = reply(10, &[b"abc", b"defg"]);
        assert_eq!(verify(good.clone(), 12, 3).unwrap().part(12, 3).unwrap(), "cde");
        let code = |reply, from, len| verify(reply, from, len).unwrap_err().code;
        assert_eq!(code(good.clone(), 9, 3), ErrorCode::ErrorCorrupt);
        assert_eq!(code(good.clone(), 12, 6), ErrorCode::ErrorCorrupt);
        let mut flipped = good.clone();
        flipped.data = b"abcdefG".to_vec().into();
        assert_eq!(code(flipped, 10, 2), ErrorCode::ErrorCorrupt, "all that came is checked");
        let mut short = good.clone();
        short.units.pop();
        assert_eq!(code(short, 10, 2), ErrorCode::ErrorCorrupt);
        let mut long = good;
        long.units[1].length = 5;
        assert_eq!(code(long, 10, 2), ErrorCode::ErrorCorrupt);
    }
}
