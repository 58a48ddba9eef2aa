//! The read side: which chunk bytes a file's bytes are, and how they come here, verified, before they are asked for.
//!
//! ```text
//! read ─▶ layout (layout.rs) ─▶ parts ─▶ cached run (cache.rs) ────────────────────────────▶ bytes
//!                                  └───▶ a fetch in flight, or a new one ─▶ replicas ────────┘
//!         readahead (ahead.rs) ────────▶   (fetch.rs, peers.rs, access.rs)
//! ```
//!
//! Sequential reads are fetched in blocks of a megabyte of the file, so that a read that lies in one block is a slice
//! of what came from the network; random ones as they are.

pub(crate) mod access;
pub mod ahead;
pub mod cache;
pub(crate) mod fetch;
pub(crate) mod flights;
pub mod layout;
pub(crate) mod peers;

pub use ahead::ReadState;

use crate::leases::Leases;
use crate::master::Master;
use access::{Accesses, Place};
use ahead::BLOCK;
use bytes::{Bytes, BytesMut};
use cache::{Blocks, Run};
use dfs_env::Env;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits::{FILE_SIZE_MAX, LAYOUT_SLICES_MAX};
use dfs_proto::v1::answer::Body;
use dfs_proto::v1::{CommitSlice, Cred, GetSlices, Layout, Slice, query};
use dfs_proto::{ChunkId, FsError, FsResult, InodeNo};
use fetch::Fetcher;
use flights::{Flights, Ticket};
use futures::StreamExt;
use layout::{Asked, Layouts, Segment};
use peers::Peers;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// The version of a file whose attributes need not be those that its bytes are of.
pub const ANY_VERSION: u64 = u64::MAX;
/// Parts of one read that are fetched at the same time.
const PARTS_AT_ONCE: usize = 64;
/// Answers of the master that one layout may take; a file of tiny slices is read in pieces anyway.
const LAYOUT_ANSWERS_MAX: usize = 1024;
/// How many times a read asks anew where bytes are that have moved.
const LAYOUTS_MAX: usize = 3;

/// The read side with its I/O.
pub(crate) struct Reader {
    master: Arc<dyn Master>,
    layouts: Layouts,
    blocks: Arc<Blocks>,
    accesses: Arc<Accesses>,
    fetcher: Arc<Fetcher>,
    flights: Arc<Flights>,
    handle: Handle,
    /// Most bytes read ahead for one open file.
    ahead: u64,
}

/// A piece of a read: bytes of one chunk, all in what one fetch brings.
#[derive(Clone, Copy, Debug)]
struct Part {
    place: Place,
    from: u64,
    len: usize,
    /// What to fetch if it is not here.
    fetch_from: u64,
    fetch_len: usize,
}

fn short(len: u64) -> usize {
    usize::try_from(len).expect("at most a block")
}

/// The parts of a slice that a range of the file falls into. `whole`: fetch whole blocks of the file.
fn parts(ino: InodeNo, slice: &Slice, range: Range<u64>, whole: bool) -> impl Iterator<Item = Part> + use<> {
    let slice = *slice;
    let end = slice.file_offset + slice.length;
    let mut at = range.start.max(slice.file_offset);
    let to = range.end.min(end);
    std::iter::from_fn(move || {
        if at >= to {
            return None;
        }
        let block = at - at % BLOCK;
        let next = (block + BLOCK).min(to);
        let (low, high) =
            if whole { (block.max(slice.file_offset), (block + BLOCK).min(end)) } else { (at, next) };
        let part = Part {
            place: Place { chunk: ChunkId(slice.chunk), ino, offset: at },
            from: slice.chunk_offset + (at - slice.file_offset),
            len: short(next - at),
            fetch_from: slice.chunk_offset + (low - slice.file_offset),
            fetch_len: short(high - low),
        };
        at = next;
        Some(part)
    })
}

impl Reader {
    /// Must be called within a runtime: fetches run there, whoever reads.
    pub(crate) fn new(
        env: &Env,
        master: Arc<dyn Master>,
        read_cache: u64,
        readahead: u64,
        operation_timeout: Option<Duration>,
        leases: Arc<Leases>,
    ) -> Self {
        let handle = Handle::current();
        let accesses = Arc::new(Accesses::new(env.clone(), Arc::clone(&master)));
        let peers = Peers::new(env.clone(), handle.clone());
        Self {
            layouts: Layouts::new(Some(leases)),
            blocks: Arc::new(Blocks::new(read_cache)),
            fetcher: Arc::new(Fetcher::new(peers, Arc::clone(&accesses), operation_timeout)),
            flights: Arc::new(Flights::default()),
            // What is read ahead must still be in the cache when it is asked for.
            ahead: readahead.min(read_cache / 4),
            master,
            accesses,
            handle,
        }
    }

    pub(crate) fn peers(&self) -> &Peers {
        self.fetcher.peers()
    }

    pub(crate) fn keep(&self, chunk: ChunkId, offset: u64, bytes: Bytes) {
        self.blocks.put(chunk, &Run { start: offset, bytes });
    }

    pub(crate) fn committed(&self, ino: InodeNo, slices: &[CommitSlice], version: Option<u64>) {
        self.layouts.committed(ino, slices, version);
    }

    pub(crate) fn forget_layout(&self, ino: InodeNo) {
        self.layouts.forget(ino);
    }

    /// To be called before something is asked whose answer has a layout in it.
    pub(crate) fn asking(&self, ino: InodeNo) -> Asked {
        self.layouts.asking(ino)
    }

    /// An answer about the file from its beginning.
    pub(crate) fn learn_layout(&self, ino: InodeNo, layout: &Layout, asked: Asked) {
        self.accesses.learn(&layout.chunks);
        self.layouts.learn(ino, layout, 0, layout.complete_to, asked);
    }

    /// Where the bytes `[from, to)` of a file are, and where they end: before `to` only with [`ANY_VERSION`].
    async fn segments(
        &self,
        ino: InodeNo,
        from: u64,
        to: u64,
        version: u64,
    ) -> FsResult<(Vec<Segment>, u64)> {
        if let Some(segments) = self.layouts.get(ino, from, to, version) {
            return Ok((segments, to));
        }
        let private = Layouts::new(None);
        let (mut at, mut end) = (from, to);
        for _ in 0..LAYOUT_ANSWERS_MAX {
            let asked = self.layouts.asking(ino);
            let (layout, complete) = self.ask_layout(ino, at).await?;
            if version != ANY_VERSION && layout.attr.is_some_and(|attr| attr.version != version) {
                return Err(FsError::new(ErrorCode::ErrorConflict, "somebody else has changed the file"));
            }
            if version == ANY_VERSION {
                // Of another version than the size that the reader knows: the file may have been cut since.
                end = layout.attr.as_ref().map_or(end, |attr| end.min(attr.size.max(from)));
            }
            self.accesses.learn(&layout.chunks);
            self.layouts.learn(ino, &layout, at, complete, asked);
            // This read began before whatever has changed since: the answer serves it even where it is not kept.
            private.learn(ino, &layout, at, complete, private.asking(ino));
            if complete >= to {
                let segments = private.get(ino, from, end, 0);
                let gaps = || FsError::new(ErrorCode::ErrorIo, "the layout has gaps");
                return segments.map(|segments| (segments, end)).ok_or_else(gaps);
            }
            if complete <= at {
                break;
            }
            at = complete;
        }
        Err(FsError::new(ErrorCode::ErrorIo, format!("the master's layout of inode {ino} does not end")))
    }

    async fn ask_layout(&self, ino: InodeNo, from: u64) -> FsResult<(Layout, u64)> {
        let question = query::Op::GetSlices(GetSlices {
            ino: ino.get(),
            offset: from,
            length: FILE_SIZE_MAX - from,
            max_slices: LAYOUT_SLICES_MAX,
        });
        match self.master.query(&Cred::default(), question).await? {
            Body::Layout(layout) => {
                let complete = layout::complete_to(&layout, from, FILE_SIZE_MAX);
                Ok((layout, complete))
            }
            other => {
                let text = format!("the master gave an answer to another question: {other:?}");
                Err(FsError::new(ErrorCode::ErrorIo, text))
            }
        }
    }

    /// Committed bytes of a file; holes are zeros. `attr`: where the file ends, for reading ahead, and the version that the
    /// bytes must be of. With [`ANY_VERSION`] they are of what the file is now: fewer, if it has become shorter.
    pub(crate) async fn read(
        &self,
        ino: InodeNo,
        state: &ReadState,
        attr: &dfs_proto::v1::Attr,
        offset: u64,
        len: usize,
    ) -> FsResult<Bytes> {
        let end = offset + len as u64;
        let plan = state.plan(offset, end, attr.size.max(end), self.ahead);
        let (range, version) = (offset..end, attr.version);
        let mut result =
            self.read_once(ino, range.clone(), version, plan.sequential, plan.ahead.clone()).await;
        // Moved by compaction since the layout was learned: the master knows where to. It may be moved again meanwhile.
        for _ in 0..LAYOUTS_MAX {
            match &result {
                Err(error) if error.code == ErrorCode::ErrorNoChunk => {
                    self.forget_layout(ino);
                    result = self.read_once(ino, range.clone(), version, plan.sequential, 0..0).await;
                }
                _ => return result,
            }
        }
        result.map_err(|error| match error.code {
            ErrorCode::ErrorNoChunk => FsError { code: ErrorCode::ErrorIo, ..error },
            _ => error,
        })
    }

    async fn read_once(
        &self,
        ino: InodeNo,
        range: Range<u64>,
        version: u64,
        whole: bool,
        ahead: Range<u64>,
    ) -> FsResult<Bytes> {
        let Range { start: offset, end } = range;
        let (segments, end) = self.segments(ino, offset, end, version).await?;
        let single = match &segments[..] {
            [Segment { slice: Some(slice), .. }] => {
                let mut parts = parts(ino, slice, offset..end, whole);
                parts.next().filter(|_| parts.next().is_none())
            }
            _ => None,
        };
        if let Some(part) = single {
            // Without a copy: a slice of the run that came from the network.
            let ticket = self.begin(&part);
            self.read_ahead(ino, ahead);
            return self.finish(&part, ticket).await;
        }
        self.gather(ino, &segments, offset..end, whole, ahead).await
    }

    /// A read of several parts, put together.
    async fn gather(
        &self,
        ino: InodeNo,
        segments: &[Segment],
        range: Range<u64>,
        whole: bool,
        ahead: Range<u64>,
    ) -> FsResult<Bytes> {
        let len = usize::try_from(range.end - range.start)
            .map_err(|_| FsError::new(ErrorCode::ErrorInvalid, "a read is longer than memory"))?;
        let mut data = BytesMut::with_capacity(len);
        let used = || {
            segments.iter().filter_map(|segment| {
                let part = segment.offset..segment.offset + segment.length;
                segment.slice.map(|slice| (slice, part))
            })
        };
        let places =
            used().map(|(slice, part)| Place { chunk: ChunkId(slice.chunk), ino, offset: part.start });
        self.accesses.prepare(ino, places).await?;
        let mut places = Vec::new();
        for (slice, part) in used() {
            let mut at = short_index(part.start - range.start);
            for part in parts(ino, &slice, part, whole) {
                places.push((at, part));
                at += part.len;
            }
        }
        self.read_ahead(ino, ahead);
        let mut fetched = futures::stream::iter(places)
            .map(|(at, part)| async move {
                let bytes = self.finish(&part, self.begin(&part)).await?;
                Ok::<_, FsError>((at, bytes))
            })
            .buffered(PARTS_AT_ONCE);
        while let Some(fetched) = fetched.next().await {
            let (at, bytes) = fetched?;
            // What lies between two parts is a hole.
            data.resize(at, 0);
            data.extend_from_slice(&bytes);
        }
        data.resize(len, 0);
        Ok(data.freeze())
    }

    /// Looks for a part's bytes, and has them fetched if they are neither here nor on their way.
    fn begin(&self, part: &Part) -> Ticket {
        if let Some(bytes) = self.blocks.get(part.place.chunk, part.from, part.len) {
            return Ticket::Here(bytes);
        }
        let (fetcher, blocks) = (Arc::clone(&self.fetcher), Arc::clone(&self.blocks));
        let (place, from, len) = (part.place, part.fetch_from, part.fetch_len);
        let covers = (part.from, part.len);
        self.flights.join(&self.handle, place.chunk, covers, (from, len), move || async move {
            let run = fetcher.fetch(place, from, len).await?;
            blocks.put(place.chunk, &run);
            Ok(run)
        })
    }

    async fn finish(&self, part: &Part, ticket: Ticket) -> FsResult<Bytes> {
        match ticket {
            Ticket::Here(bytes) => Ok(bytes),
            Ticket::Flight(flight) => {
                let run = flight.land().await?;
                run.part(part.from, part.len)
                    .ok_or_else(|| FsError::new(ErrorCode::ErrorIo, "a fetch brought other bytes"))
            }
        }
    }

    /// Starts fetches for a range that will be read soon. Whatever goes wrong shows when it is read.
    fn read_ahead(&self, ino: InodeNo, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Some(segments) = self.layouts.get(ino, range.start, range.end, 0) else {
            return;
        };
        for segment in segments {
            let Some(slice) = segment.slice else { continue };
            for part in parts(ino, &slice, segment.offset..segment.offset + segment.length, true) {
                if self.flights.is_full() {
                    return;
                }
                drop(self.begin(&part));
            }
        }
    }
}

fn short_index(distance: u64) -> usize {
    usize::try_from(distance).expect("within a buffer")
}
