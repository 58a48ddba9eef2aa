//! Files of which the number of replicas was set: what their chunks are to be told.
//!
//! ```text
//!   noted files ──▶ their chunks ──▶ too few replicas are wanted of one ──▶ Tell it
//!                                ──▶ too many, by what all who use it want ──▶ Tell it, if it is sealed; else Seal, and the file waits
//!                   nothing to be told ──▶ the file is done
//! ```
//!
//! A file of which a chunk was told something is looked at again: it is done once nothing was found. Meanwhile nothing is lowered
//! below what a file wants that uses it (`state/ops/wish.rs` tells why), so that what was seen at the file's first chunk is still
//! true at its last one.
//!
//! This file decides; `server/wishing.rs` proposes. It reads in pages and keeps no more than the bounds say, whatever the files.

use crate::state::{self, FurtherUser, Kv};
use dfs_proto::limits::{REVIEW_CHUNKS, WISHES_PER_COMMAND};
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{ChunkState, SliceRow, Wish};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, InodeNo};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Slices, extents and users read at once.
const PAGE: usize = if cfg!(test) { 2 } else { 1024 };

/// A file that is noted, and the version that the note was made at.
pub type Noted = (InodeNo, u64);

/// What came of looking at files. Those that are in neither list wait for a chunk to be sealed.
#[derive(Default, Debug)]
pub struct Looked {
    /// Every chunk of these is to have what they want, or more for a reason.
    pub done: Vec<Noted>,
    /// Chunks of these were told something.
    pub told: Vec<Noted>,
}

/// What is to be done before it goes on.
#[derive(Default, PartialEq, Debug)]
pub struct Todo {
    /// At most [`WISHES_PER_COMMAND`].
    pub wishes: Vec<Wish>,
    /// Open chunks that are to have fewer replicas.
    pub seals: Vec<ChunkId>,
}

/// What is left to be done for a chunk, or for a file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    Nothing,
    /// It was told something, and is to be looked at again.
    Told,
    /// It can be told nothing yet.
    Waits,
}

/// A look at files, one after the other.
pub struct Review<'f> {
    files: &'f [Noted],
    /// How far it is in the first of them.
    from: ByteOffset,
    last: Option<ChunkId>,
    left: Left,
    looked: Looked,
    todo: Todo,
    /// What `todo` tells chunks.
    told: BTreeMap<ChunkId, u32>,
    /// Chunks of which somebody wants as many replicas as they are to have: that number, and how many had joined.
    justified: BTreeMap<ChunkId, (u32, u64)>,
    /// Chunks that are to be sealed first.
    waiting: BTreeSet<ChunkId>,
}

impl<'f> Review<'f> {
    /// Looks at these files.
    #[must_use]
    pub fn of(files: &'f [Noted]) -> Self {
        Self {
            files,
            from: ByteOffset(0),
            last: None,
            left: Left::Nothing,
            looked: Looked::default(),
            todo: Todo::default(),
            told: BTreeMap::new(),
            justified: BTreeMap::new(),
            waiting: BTreeSet::new(),
        }
    }

    /// Goes on until there is something to do; None: every file was looked at. What was to be done before is in the state.
    ///
    /// # Errors
    /// The store's.
    pub async fn next(&mut self, kv: &dyn Kv) -> io::Result<Option<Todo>> {
        self.told.clear();
        while let Some((file, rest)) = self.files.split_first() {
            let page = match wish_of(kv, file.0)? {
                Some(wish) => {
                    let page = state::slices(kv, file.0, self.from, PAGE)?;
                    if !self.slices(kv, &page, wish).await? {
                        return Ok(Some(std::mem::take(&mut self.todo)));
                    }
                    page
                }
                // It is gone.
                None => Vec::new(),
            };
            if let Some((at, _)) = page.last().filter(|_| page.len() == PAGE) {
                self.from = *at + ByteLen(1);
                tokio::task::yield_now().await;
                continue;
            }
            match std::mem::replace(&mut self.left, Left::Nothing) {
                Left::Nothing => self.looked.done.push(*file),
                Left::Told => self.looked.told.push(*file),
                Left::Waits => {}
            }
            (self.files, self.from, self.last) = (rest, ByteOffset(0), None);
        }
        let todo = std::mem::take(&mut self.todo);
        Ok((todo != Todo::default()).then_some(todo))
    }

    /// What came of it.
    #[must_use]
    pub fn end(self) -> Looked {
        self.looked
    }

    /// Looks at the chunks of a page of a file's slices. False: something has to be done first; it goes on from there.
    async fn slices(&mut self, kv: &dyn Kv, page: &[(ByteOffset, SliceRow)], wish: u32) -> io::Result<bool> {
        for (at, slice) in page {
            // Slices of one chunk often lie side by side.
            let id = ChunkId(slice.chunk);
            if self.last.replace(id) == Some(id) {
                continue;
            }
            let left = self.chunk(kv, id, wish).await?;
            self.left = self.left.max(left);
            if self.todo.wishes.len().max(self.todo.seals.len()) >= WISHES_PER_COMMAND {
                self.from = *at + ByteLen(1);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// One chunk, in which a file has bytes that wants so many replicas.
    async fn chunk(&mut self, kv: &dyn Kv, id: ChunkId, wish: u32) -> io::Result<Left> {
        // Before its users: whoever begins to use it afterwards is noticed by that.
        let Some(chunk) = state::chunk_state(kv, id)? else {
            // Compaction has just moved the bytes.
            return Ok(Left::Told);
        };
        if self.told.get(&id).is_some_and(|told| *told >= wish) {
            return Ok(Left::Told);
        }
        let wanted = chunk.wanted_replicas;
        if wish < wanted && self.waiting.contains(&id) {
            return Ok(Left::Waits);
        }
        let replicas = if wish >= wanted {
            wish
        } else if self.justified.get(&id) == Some(&(wanted, chunk.joined)) {
            wanted
        } else {
            most(kv, &chunk).await?.max(wish)
        };
        if replicas >= wanted {
            if self.justified.len() >= REVIEW_CHUNKS {
                self.justified.clear();
            }
            self.justified.insert(id, (replicas, chunk.joined));
        }
        if replicas == wanted {
            return Ok(Left::Nothing);
        }
        if replicas < wanted && chunk.phase() != Phase::Sealed {
            if chunk.phase() == Phase::Open {
                self.todo.seals.push(id);
            }
            if self.waiting.len() >= REVIEW_CHUNKS {
                self.waiting.clear();
            }
            self.waiting.insert(id);
            return Ok(Left::Waits);
        }
        self.todo.wishes.push(Wish { chunk: id.get(), replicas, joined: chunk.joined });
        self.told.insert(id, replicas);
        Ok(Left::Told)
    }
}

/// How many replicas a file wants; None: there is no such file any more.
fn wish_of(kv: &dyn Kv, ino: InodeNo) -> io::Result<Option<u32>> {
    let (attr, cluster) = (state::attr(kv, ino)?, state::cluster_row(kv)?);
    Ok(attr.zip(cluster).map(|(attr, cluster)| state::wish(&cluster, &attr)))
}

/// The greatest number that is wanted by those that use a chunk. As soon as that is what the chunk is to have anyway, nobody else
/// is looked at.
struct Users<'k> {
    kv: &'k dyn Kv,
    enough: u32,
    most: u32,
    /// Slices of one file lie side by side.
    last: Option<InodeNo>,
}

impl Users<'_> {
    /// Whether enough was found.
    fn look(&mut self, ino: InodeNo) -> io::Result<bool> {
        if self.last.replace(ino) != Some(ino) {
            self.most = wish_of(self.kv, ino)?.unwrap_or(0).max(self.most);
        }
        Ok(self.most >= self.enough)
    }
}

/// What the file wants that wants most of those that use a chunk. The first users of extents before the further ones: nobody
/// becomes a first user who was a further one without [`ChunkState::joined`] telling it.
async fn most(kv: &dyn Kv, chunk: &ChunkState) -> io::Result<u32> {
    let (id, mut from) = (ChunkId(chunk.chunk), ByteOffset(0));
    let mut users = Users { kv, enough: chunk.wanted_replicas, most: 0, last: None };
    loop {
        let page = state::extents(kv, id, from, PAGE)?;
        for (_, extent) in page.iter().filter(|(_, extent)| extent.has_first) {
            if users.look(InodeNo(extent.first_ino))? {
                return Ok(users.most);
            }
        }
        let Some((at, last)) = page.last().filter(|_| page.len() == PAGE) else { break };
        from = *at + ByteLen(last.length);
        tokio::task::yield_now().await;
    }
    let mut from = FurtherUser { extent: ByteOffset(0), ino: InodeNo(0), at: ByteOffset(0) };
    loop {
        let page = state::further_users(kv, id, from, PAGE)?;
        for user in &page {
            if users.look(user.ino)? {
                return Ok(users.most);
            }
        }
        let Some(last) = page.last().filter(|_| page.len() == PAGE) else { return Ok(users.most) };
        from = FurtherUser { at: last.at + ByteLen(1), ..*last };
        tokio::task::yield_now().await;
    }
}
