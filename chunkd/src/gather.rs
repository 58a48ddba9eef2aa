//! Makes a chunk of pieces of others, on the master's order: compaction.
//!
//! Each daemon gathers for itself, from what it has, else from others, and verifies all of it; the digests that they answer must be
//! alike before the master uses what was made. Until then nobody knows the new chunk: the master hears of it when it is
//! there, and has it deleted if it does not want it any more.

use crate::copy::{Begun, Copier, Failed, Making, Whole, unavailable};
use crate::store::orders::Settled;
use bytes::Bytes;
use dfs_proto::checksum::{crc32c, unit_checksums};
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{
    FETCH_PROGRESS_MS, FETCH_TOKEN_MS, GATHER_PIECES_MAX, GATHER_SOURCES_MAX, RECORD_MAX,
};
use dfs_proto::{ByteLen, ChunkId, Epoch, FsError, FsResult, PROTOCOL_VERSION, v1};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// Bytes of one record of the new chunk, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    source: usize,
    offset: u64,
    length: usize,
    ino: u64,
    file_offset: u64,
}

/// Pieces cut into what fits into a record.
fn parts(pieces: &[v1::GatherPiece]) -> impl Iterator<Item = Part> + '_ {
    pieces.iter().flat_map(|piece| {
        (0..piece.length).step_by(RECORD_MAX).map(move |skipped| Part {
            source: piece.source as usize,
            offset: piece.offset + skipped,
            length: usize::try_from(piece.length - skipped).unwrap_or(RECORD_MAX).min(RECORD_MAX),
            ino: piece.ino,
            file_offset: piece.file_offset.wrapping_add(skipped),
        })
    })
}

/// Parts that follow each other in one source and are read at once: how many of them, and their length.
fn run(parts: &[Part]) -> (usize, usize) {
    let (mut count, mut length) = (0, 0);
    for part in parts {
        let follows = part.source == parts[0].source && part.offset == parts[0].offset + length as u64;
        if !follows || length + part.length > RECORD_MAX {
            break;
        }
        count += 1;
        length += part.length;
    }
    (count, length)
}

/// An order that can be carried out: pieces of sources that are named, as long together as is said.
fn check(order: &v1::GatherOrder) -> FsResult<()> {
    let bad =
        |text: &str| Err(FsError::new(ErrorCode::ErrorInvalid, format!("chunk {}: {text}", order.chunk)));
    if order.sources.len() > GATHER_SOURCES_MAX || order.pieces.len() > GATHER_PIECES_MAX {
        return bad("more sources or pieces than one order may name");
    }
    let named = |piece: &v1::GatherPiece| (piece.source as usize) < order.sources.len();
    let whole =
        |piece: &v1::GatherPiece| piece.length > 0 && piece.offset.checked_add(piece.length).is_some();
    if !order.pieces.iter().all(|piece| named(piece) && whole(piece)) {
        return bad("a piece of nothing");
    }
    let sum = order.pieces.iter().try_fold(0_u64, |sum, piece| sum.checked_add(piece.length));
    if order.length == 0 || sum != Some(order.length) {
        return bad("its pieces do not add up");
    }
    Ok(())
}

/// A stream of reads to another daemon, one at a time.
struct Reader {
    requests: mpsc::Sender<v1::ReadRequest>,
    replies: Streaming<v1::ReadReply>,
    token: Bytes,
    chunk: ChunkId,
}

impl Reader {
    async fn read(&mut self, offset: u64, length: usize) -> FsResult<Bytes> {
        let request = v1::ReadRequest {
            id: offset,
            version: PROTOCOL_VERSION,
            chunk: self.chunk.get(),
            offset,
            length: u32::try_from(length).expect("at most RECORD_MAX"),
            token: self.token.clone(),
        };
        let ended = || FsError::new(ErrorCode::ErrorUnavailable, "it ended the stream");
        self.requests.send(request).await.map_err(|_| ended())?;
        let reply = self.replies.message().await.map_err(|status| unavailable(&status))?.ok_or_else(ended)?;
        if let Some(failure) = reply.failure {
            return Err(failure.into());
        }
        cut(reply.start, &reply.units, &reply.data, offset, length)
    }
}

/// Other daemons that pieces are taken from, each for a chunk: open streams, and those that failed.
#[derive(Default)]
struct Readers {
    open: BTreeMap<(u64, String), Reader>,
    failed: BTreeSet<(u64, String)>,
}

/// The bytes that were asked for out of whole units, each verified.
fn cut(start: u64, units: &[v1::Unit], data: &Bytes, offset: u64, length: usize) -> FsResult<Bytes> {
    let corrupt = || FsError::new(ErrorCode::ErrorCorrupt, format!("damaged bytes at {offset}"));
    let mut at = 0;
    for unit in units {
        let end = at + unit.length as usize;
        if data.get(at..end).is_none_or(|bytes| crc32c(bytes) != unit.checksum) {
            return Err(corrupt());
        }
        at = end;
    }
    let from = offset.checked_sub(start).and_then(|from| usize::try_from(from).ok()).ok_or_else(corrupt)?;
    if at != data.len() || from + length > data.len() {
        return Err(corrupt());
    }
    Ok(data.slice(from..from + length))
}

impl Copier {
    /// Carries out a gather order: answers when the chunk is whole, in its place and durable.
    ///
    /// # Errors
    /// ERROR_INVALID; ERROR_NO_SPACE; ERROR_UNAVAILABLE or ERROR_CORRUPT when a piece is not to be had; what the disk says.
    pub async fn gather_pieces(&self, order: v1::GatherOrder) -> FsResult<Settled> {
        check(&order)?;
        let wait = Duration::from_millis(if order.wait_ms > 0 { order.wait_ms } else { FETCH_TOKEN_MS });
        let late = |_| FsError::new(ErrorCode::ErrorTimedOut, format!("not gathered within {wait:?}"));
        tokio::time::timeout(wait, self.gather_all(&order)).await.map_err(late)?
    }

    async fn gather_all(&self, order: &v1::GatherOrder) -> FsResult<Settled> {
        let what = Whole {
            chunk: ChunkId(order.chunk),
            epoch: Epoch(order.epoch),
            capacity: ByteLen(order.length),
            length: order.length,
        };
        let settled = match self.begin(&what, false).await? {
            Begun::Here(settled) => settled,
            Begun::Making(draft) => {
                self.take_pieces(&draft, order).await?;
                self.install(what.chunk, draft).await?
            }
        };
        // Whoever ordered it may not wait for it any more.
        self.store.note(what.chunk);
        tracing::debug!(chunk = %what.chunk, length = settled.length, "gathered");
        Ok(settled)
    }

    async fn take_pieces(&self, draft: &Making, order: &v1::GatherOrder) -> FsResult<()> {
        let parts: Vec<Part> = parts(&order.pieces).collect();
        let (mut left, mut readers) = (&parts[..], Readers::default());
        while !left.is_empty() {
            let (count, length) = run(left);
            let (now, later) = left.split_at(count);
            left = later;
            let source = &order.sources[now[0].source];
            // Pieces come source by source.
            readers.open.retain(|(chunk, _), _| *chunk == source.chunk);
            let bytes = self.take(source, &mut readers, now[0].offset, length).await?;
            let (mut records, mut at) = (Vec::with_capacity(count), 0);
            let mut offset = draft.length();
            for part in now {
                let payload = bytes.slice(at..at + part.length);
                records.push(v1::FetchedRecord {
                    offset,
                    ino: part.ino,
                    file_offset: part.file_offset,
                    checksums: unit_checksums(&payload),
                    payload,
                });
                at += part.length;
                offset += part.length as u64;
            }
            self.add(draft, records).await.map_err(|failed| match failed {
                Failed::Here(error) | Failed::There(error) => error,
            })?;
            self.gathering.pass(length as u64, order.bytes_per_second).await;
        }
        Ok(())
    }

    /// Bytes of a chunk: from here, else from the first of the others that has them.
    async fn take(
        &self,
        source: &v1::GatherSource,
        readers: &mut Readers,
        offset: u64,
        length: usize,
    ) -> FsResult<Bytes> {
        let chunk = ChunkId(source.chunk);
        let here = |found: v1::ChunkFound| found.sealed && !found.damaged;
        let mut cause = None;
        if self.store.found(chunk).is_some_and(here) {
            match self.store.read(chunk, offset, length).await {
                Ok(piece) => return cut(piece.start, &piece.units, &piece.data, offset, length),
                Err(error) => cause = Some(error),
            }
        }
        // Each failure may cost seconds, and there may be very many pieces: those that failed before are asked last.
        let mut addresses: Vec<&String> = source.addresses.iter().collect();
        addresses.sort_by_key(|address| readers.failed.contains(&(source.chunk, (*address).clone())));
        for address in addresses {
            let key = (source.chunk, address.clone());
            let was_open = readers.open.contains_key(&key);
            let mut taken = self.take_from(address, chunk, &mut readers.open, offset, length).await;
            if taken.is_err() && was_open {
                // A token that has expired, a daemon that was started again: a new stream may do.
                readers.open.remove(&key);
                taken = self.take_from(address, chunk, &mut readers.open, offset, length).await;
            }
            match taken {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    tracing::info!(%chunk, source = address, %error, "a source of a piece failed");
                    readers.open.remove(&key);
                    readers.failed.insert(key);
                    cause = Some(error.during(address));
                }
            }
        }
        // It says nothing about the disk here.
        let cause = cause.unwrap_or_else(|| ErrorCode::ErrorNoChunk.into());
        let code = match cause.code {
            code @ (ErrorCode::ErrorCorrupt | ErrorCode::ErrorNoChunk) => code,
            _ => ErrorCode::ErrorUnavailable,
        };
        Err(FsError { code, ..cause }
            .during(format!("chunk {chunk}: no source has {length} bytes at {offset}")))
    }

    async fn take_from(
        &self,
        address: &str,
        chunk: ChunkId,
        readers: &mut BTreeMap<(u64, String), Reader>,
        offset: u64,
        length: usize,
    ) -> FsResult<Bytes> {
        let bound = Duration::from_millis(FETCH_PROGRESS_MS);
        let key = (chunk.get(), address.to_owned());
        let taking = async {
            let reader = match readers.entry(key) {
                std::collections::btree_map::Entry::Occupied(reader) => reader.into_mut(),
                std::collections::btree_map::Entry::Vacant(place) => {
                    let (mut client, token) = self.reach(address, chunk).await?;
                    let (requests, outgoing) = mpsc::channel(1);
                    let replies = client.read(ReceiverStream::new(outgoing)).await;
                    let replies = replies.map_err(|status| unavailable(&status))?.into_inner();
                    place.insert(Reader { requests, replies, token, chunk })
                }
            };
            reader.read(offset, length).await
        };
        let late = |_| FsError::new(ErrorCode::ErrorTimedOut, format!("nothing came within {bound:?}"));
        tokio::time::timeout(bound, taking).await.map_err(late)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(source: u32, offset: u64, length: u64) -> v1::GatherPiece {
        v1::GatherPiece { source, offset, length, ino: 7, file_offset: 1000 }
    }

    #[test]
    fn pieces_become_records_and_neighbours_are_read_at_once() {
        let long = RECORD_MAX as u64 + 10;
        let all: Vec<Part> =
            parts(&[piece(0, 5, 10), piece(0, 15, 10), piece(0, 30, 10), piece(1, 40, long)]).collect();
        let shown: Vec<_> = all.iter().map(|part| (part.source, part.offset, part.length)).collect();
        assert_eq!(
            shown,
            [(0, 5, 10), (0, 15, 10), (0, 30, 10), (1, 40, RECORD_MAX), (1, 40 + RECORD_MAX as u64, 10)]
        );
        assert_eq!((all[4].ino, all[4].file_offset), (7, 1000 + RECORD_MAX as u64));
        assert_eq!((run(&all), run(&all[2..]), run(&all[3..])), ((2, 20), (1, 10), (1, RECORD_MAX)));
    }

    #[test]
    fn orders_that_do_not_add_up_are_refused() {
        let order = |pieces: Vec<v1::GatherPiece>, length| v1::GatherOrder {
            length,
            sources: vec![v1::GatherSource::default()],
            pieces,
            ..v1::GatherOrder::default()
        };
        assert_eq!(check(&order(vec![piece(0, 0, 5), piece(0, 9, 5)], 10)), Ok(()));
        for bad in [
            order(vec![], 0),
            order(vec![piece(0, 0, 5)], 6),
            order(vec![piece(1, 0, 5)], 5),
            order(vec![piece(0, 0, 0), piece(0, 0, 5)], 5),
            order(vec![piece(0, u64::MAX, 5)], 5),
        ] {
            assert_eq!(check(&bad).map_err(|error| error.code), Err(ErrorCode::ErrorInvalid), "{bad:?}");
        }
    }

    #[test]
    fn what_is_cut_out_was_verified_and_is_all_there() {
        let data = Bytes::from_static(b"abcdefg");
        let unit = |bytes: &[u8]| v1::Unit { length: bytes.len() as u32, checksum: crc32c(bytes) };
        let units = [unit(b"abc"), unit(b"defg")];
        assert_eq!(cut(10, &units, &data, 12, 3), Ok(Bytes::from_static(b"cde")));
        let bad =
            |result: FsResult<Bytes>| result.map_err(|error| error.code) == Err(ErrorCode::ErrorCorrupt);
        assert!(bad(cut(10, &units, &data, 9, 3)) && bad(cut(10, &units, &data, 12, 6)));
        assert!(bad(cut(10, &units[..1], &data, 10, 3)) && bad(cut(10, &units, &data.slice(1..), 12, 1)));
        assert!(bad(cut(10, &units, &Bytes::from_static(b"abcdefG"), 10, 1)));
    }
}
