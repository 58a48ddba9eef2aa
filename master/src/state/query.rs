//! Questions about the state: they change nothing and are answered from what is applied.

use super::access::{self, EXEC, READ};
use super::keys;
use super::kv::{Kv, Tx};
use super::ops::{directory, find_dentry, slices, xattr};
use super::rows::{FLAG_APPEND, Inode, OpResult, answered, corrupt, decode, number, refused};
use bytes::Bytes;
use dfs_proto::limits::{DIR_PAGE_MAX, FILE_SIZE_MAX, GET_CHUNKS_MAX, LAYOUT_SLICES_MAX, NAME_MAX, PATH_MAX};
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{self, Attr, ChunkAccess, ChunkState, Cred, ErrorCode, Kind, answer::Body, query::Op};
use dfs_proto::{ByteLen, ByteOffset, ChunkId, FsResult, InodeNo, NodeId};
use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;

/// A question's state: the store and the key of the directory hashes.
struct Reader<'k> {
    tx: Tx<'k>,
    cluster: v1::ClusterRow,
    hash_key: [u8; 16],
}

/// Answers a question; what the caller may not know is [`Body::Failure`]. Tokens and the space figures of statfs are left
/// to the server, which knows the key and the daemons.
pub fn query(kv: &dyn Kv, cred: &Cred, query: &v1::Query) -> io::Result<v1::Answer> {
    let body = match answered(answer(kv, cred, query))? {
        Ok(body) => body,
        Err(error) => Body::Failure(error.into()),
    };
    Ok(v1::Answer { body: Some(body) })
}

fn answer(kv: &dyn Kv, cred: &Cred, query: &v1::Query) -> OpResult<Body> {
    let reader = Reader::new(kv)?;
    let tx = &reader.tx;
    match query.op.as_ref() {
        Some(Op::Lookup(op)) => reader.lookup(cred, InodeNo(op.parent), &op.name).map(|inode| entry(&inode)),
        Some(Op::GetAttr(op)) => get_attr(tx, op),
        Some(Op::ReadDir(op)) => reader.read_dir(cred, op),
        Some(Op::ReadLink(op)) => read_link(tx, InodeNo(op.ino)),
        Some(Op::GetXattr(op)) => get_xattr(tx, cred, op),
        Some(Op::ListXattr(op)) => list_xattr(tx, cred, InodeNo(op.ino)),
        Some(Op::GetSlices(op)) => {
            let inode = tx.inode(InodeNo(op.ino))?;
            Ok(Body::Layout(layout_of(tx, &inode, op.offset, op.length, op.max_slices)?))
        }
        Some(Op::StatFs(_)) => Ok(Body::StatFs(v1::FsStats {
            files: reader.cluster.files,
            chunks: reader.cluster.chunks,
            live_bytes: reader.cluster.live_bytes,
            ..Default::default()
        })),
        Some(Op::GetChunks(op)) => get_chunks(tx, op),
        Some(Op::Access(op)) => {
            let inode = tx.inode(InodeNo(op.ino))?;
            access::require(tx, cred, &inode, op.mask & 7)?;
            Ok(entry(&inode))
        }
        Some(Op::ResolvePath(op)) => reader.resolve(cred, &op.path).map(|inode| entry(&inode)),
        None => refused(ErrorCode::ErrorNotSupported, "a question this master does not know"),
    }
}

fn entry(inode: &Inode) -> Body {
    Body::Entry(v1::Entry { attr: Some(inode.attr), ..v1::Entry::default() })
}

impl<'k> Reader<'k> {
    fn new(kv: &'k dyn Kv) -> OpResult<Self> {
        let tx = Tx::new(kv);
        let key = keys::cluster();
        let Some(cluster) = tx.row::<v1::ClusterRow>(&key)? else {
            return refused(ErrorCode::ErrorUnavailable, "the cluster has not been initialised yet");
        };
        let hash_key = cluster
            .hash_key
            .as_ref()
            .try_into()
            .map_err(|_| corrupt(&key, "a hash key of the wrong length"))?;
        Ok(Self { tx, cluster, hash_key })
    }

    fn lookup(&self, cred: &Cred, parent: InodeNo, name: &[u8]) -> OpResult<Inode> {
        let dir = directory(&self.tx, parent)?;
        self.step(cred, dir, name)
    }

    /// From a directory to what a name in it means.
    fn step(&self, cred: &Cred, dir: Inode, name: &[u8]) -> OpResult<Inode> {
        access::require(&self.tx, cred, &dir, EXEC)?;
        if name.len() > NAME_MAX {
            return Err(ErrorCode::ErrorNameTooLong.into());
        }
        match name {
            b"." => Ok(dir),
            b".." => self.tx.inode(InodeNo(dir.attr.parent)),
            name => match find_dentry(&self.tx, &self.hash_key, dir.ino(), name)? {
                Some(dentry) => self.named(InodeNo(dentry.ino)),
                None => Err(ErrorCode::ErrorNotFound.into()),
            },
        }
    }

    fn named(&self, ino: InodeNo) -> OpResult<Inode> {
        let inode = self.tx.find_inode(ino)?;
        Ok(inode.ok_or_else(|| corrupt(&keys::inode(ino), "named, but not there"))?)
    }

    /// Walks an absolute path. Symlinks are not followed: one on the way is not a directory, one at the end is the answer.
    fn resolve(&self, cred: &Cred, path: &[u8]) -> OpResult<Inode> {
        if path.len() > PATH_MAX {
            return Err(ErrorCode::ErrorNameTooLong.into());
        }
        if path.first() != Some(&b'/') {
            return refused(ErrorCode::ErrorInvalid, "the path is not absolute");
        }
        let mut inode = self.tx.inode(InodeNo::ROOT)?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            if !inode.is_dir() {
                return Err(ErrorCode::ErrorNotDir.into());
            }
            inode = self.step(cred, inode, name)?;
        }
        if path.ends_with(b"/") && !inode.is_dir() {
            return Err(ErrorCode::ErrorNotDir.into());
        }
        Ok(inode)
    }

    fn read_dir(&self, cred: &Cred, op: &v1::ReadDir) -> OpResult<Body> {
        let dir = directory(&self.tx, InodeNo(op.ino))?;
        access::require(&self.tx, cred, &dir, READ)?;
        let wanted = if op.max_entries == 0 { DIR_PAGE_MAX } else { op.max_entries.min(DIR_PAGE_MAX) };
        let (entries, end) = page(&self.tx, dir.ino(), op.cookie, wanted as usize)?;
        let mut page = v1::DirPage { entries, end };
        // What the entries are is for those who may search the directory.
        if op.plus && access::permits(&self.tx, cred, &dir, EXEC)? {
            for entry in &mut page.entries {
                entry.attr = Some(self.named(InodeNo(entry.ino))?.attr);
            }
        }
        Ok(Body::DirPage(page))
    }
}

/// The entries after a cookie, and whether nothing follows them. A page is longer than asked for rather than to part
/// entries that share a cookie: the next page begins behind the cookie.
fn page(tx: &Tx<'_>, dir: InodeNo, cookie: u64, wanted: usize) -> io::Result<(Vec<v1::DirEntry>, bool)> {
    let (from, to) = keys::dentries_after(dir, cookie.max(keys::COOKIE_RESERVED));
    let mut entries: Vec<v1::DirEntry> = Vec::new();
    let (mut failure, mut end) = (None, true);
    tx.scan(&from, &to, &mut |key, value| {
        let entry = match read_entry(key, value) {
            Ok(entry) => entry,
            Err(error) => {
                failure = Some(error);
                return ControlFlow::Break(());
            }
        };
        if entries.len() >= wanted && entries.last().is_some_and(|last| last.cookie != entry.cookie) {
            end = false;
            return ControlFlow::Break(());
        }
        entries.push(entry);
        ControlFlow::Continue(())
    })?;
    failure.map_or(Ok((entries, end)), Err)
}

fn read_entry(key: &[u8], value: &[u8]) -> io::Result<v1::DirEntry> {
    let row: v1::DentryRow = decode(key, value)?;
    let name = keys::tail(key, 2).ok_or_else(|| corrupt(key, "a dentry without a name"))?;
    let (name, cookie) = (Bytes::copy_from_slice(name), number(key, 1)?);
    Ok(v1::DirEntry { name, ino: row.ino, kind: row.kind, cookie, attr: None })
}

fn get_attr(tx: &Tx<'_>, op: &v1::GetAttr) -> OpResult<Body> {
    let inode = tx.inode(InodeNo(op.ino))?;
    if op.generation != 0 && op.generation != inode.attr.generation {
        return refused(ErrorCode::ErrorStale, "an inode of another generation");
    }
    Ok(entry(&inode))
}

fn read_link(tx: &Tx<'_>, ino: InodeNo) -> OpResult<Body> {
    let inode = tx.inode(ino)?;
    if inode.kind() == Kind::Symlink {
        Ok(Body::Data(inode.target))
    } else {
        refused(ErrorCode::ErrorInvalid, "not a symlink")
    }
}

fn get_xattr(tx: &Tx<'_>, cred: &Cred, op: &v1::GetXattr) -> OpResult<Body> {
    let inode = tx.inode(InodeNo(op.ino))?;
    xattr::may_read(tx, cred, &inode, &op.name)?;
    match xattr::value(tx, &inode, &op.name)? {
        Some(value) => Ok(Body::Data(value.into())),
        None => Err(ErrorCode::ErrorNoData.into()),
    }
}

fn list_xattr(tx: &Tx<'_>, cred: &Cred, ino: InodeNo) -> OpResult<Body> {
    let inode = tx.inode(ino)?;
    let names = xattr::visible_names(tx, cred, inode.ino())?;
    Ok(Body::Names(v1::Names { names: names.into_iter().map(Bytes::from).collect() }))
}

fn get_chunks(tx: &Tx<'_>, op: &v1::GetChunks) -> OpResult<Body> {
    if op.chunks.len() > GET_CHUNKS_MAX {
        return refused(ErrorCode::ErrorInvalid, "too many chunks in one question");
    }
    let mut chunks = Vec::with_capacity(op.chunks.len());
    for (id, at) in op.chunks.iter().copied().map(ChunkId).zip(op.offsets.iter().copied().map(ByteOffset)) {
        let slices = slices::overlapping(tx, InodeNo(op.ino), at, at + ByteLen(1), 1)?;
        if slices.iter().all(|(_, row)| ChunkId(row.chunk) != id) {
            continue;
        }
        // One that is missing was dropped or compacted: the client asks for the slices again.
        if let Some(state) = tx.find_chunk(id)? {
            chunks.push(chunk_access(tx, &state)?);
        }
    }
    Ok(Body::Chunks(v1::Chunks { chunks }))
}

/// Where a chunk lives, without a token.
pub fn chunk_access(tx: &Tx<'_>, state: &ChunkState) -> io::Result<ChunkAccess> {
    let mut replicas = Vec::with_capacity(state.nodes.len());
    for node in state.nodes.iter().copied().map(NodeId) {
        let row = tx
            .find_node(node)?
            .ok_or_else(|| corrupt(&keys::node(node), "holds a replica, but is not there"))?;
        replicas.push(v1::Replica { node: row.node, address: row.address, host: row.host });
    }
    Ok(ChunkAccess {
        chunk: state.chunk,
        epoch: state.epoch,
        replicas,
        token: Bytes::new(),
        capacity: state.capacity,
        sealed: state.phase() == Phase::Sealed,
        length: state.committed,
        wanted_replicas: state.wanted_replicas,
    })
}

/// The slices of a file's range and where their chunks live, without tokens: for the answer to an open.
pub fn layout(
    kv: &dyn Kv,
    ino: InodeNo,
    offset: u64,
    length: u64,
    max: u32,
) -> io::Result<FsResult<v1::Layout>> {
    let tx = Tx::new(kv);
    answered(tx.inode(ino).and_then(|inode| layout_of(&tx, &inode, offset, length, max)))
}

fn layout_of(tx: &Tx<'_>, inode: &Inode, offset: u64, length: u64, max: u32) -> OpResult<v1::Layout> {
    let limit = if max == 0 { LAYOUT_SLICES_MAX } else { max.min(LAYOUT_SLICES_MAX) } as usize;
    let (from, to) = (ByteOffset(offset), ByteOffset(offset.saturating_add(length).min(FILE_SIZE_MAX)));
    let found = slices::overlapping(tx, inode.ino(), from, to, limit)?;
    let mut complete_to = to.max(from);
    if found.len() == limit
        && let Some((at, last)) = found.last()
    {
        complete_to = *at + ByteLen(last.length);
    }
    let mut chunks = BTreeMap::new();
    let mut slices = Vec::with_capacity(found.len());
    for (at, row) in found {
        let id = ChunkId(row.chunk);
        if let std::collections::btree_map::Entry::Vacant(vacant) = chunks.entry(id) {
            let state = tx
                .find_chunk(id)?
                .ok_or_else(|| corrupt(&keys::chunk(id), "named by a slice, but not there"))?;
            vacant.insert(chunk_access(tx, &state)?);
        }
        slices.push(v1::Slice {
            file_offset: at.get(),
            chunk: row.chunk,
            chunk_offset: row.chunk_offset,
            length: row.length,
        });
    }
    Ok(v1::Layout {
        slices,
        chunks: chunks.into_values().collect(),
        complete_to: complete_to.get(),
        attr: Some(inode.attr),
    })
}

/// What somebody who says that he has an inode open may do with it: what he could open it for now, or owns. So it goes on
/// after a failover for everybody but those whose right to open it was taken away meanwhile.
pub fn access_of_holder(
    kv: &dyn Kv,
    ino: InodeNo,
    reader: Option<&Cred>,
    writer: Option<&Cred>,
) -> io::Result<(bool, bool)> {
    let tx = Tx::new(kv);
    let Some(inode) = tx.find_inode(ino)? else { return Ok((false, false)) };
    let may = |cred: Option<&Cred>, mask| match cred {
        Some(cred) if access::owns(cred, &inode.attr) => Ok(true),
        Some(cred) => access::permits(&tx, cred, &inode, mask),
        None => Ok(false),
    };
    let executes = may(reader, EXEC)?;
    Ok((executes || may(reader, READ)?, may(writer, access::WRITE)?))
}

/// Whether the caller may open the inode like this: open(2)'s own checks.
pub fn check_open(kv: &dyn Kv, cred: &Cred, open: &v1::Open) -> io::Result<FsResult<Attr>> {
    answered(may_open(&Tx::new(kv), cred, open))
}

fn may_open(tx: &Tx<'_>, cred: &Cred, open: &v1::Open) -> OpResult<Attr> {
    let inode = tx.inode(InodeNo(open.ino))?;
    match inode.kind() {
        Kind::Dir if open.write => return Err(ErrorCode::ErrorIsDir.into()),
        Kind::Symlink => return Err(ErrorCode::ErrorLoop.into()),
        _ => {}
    }
    if !open.read && !open.write && !open.exec {
        return refused(ErrorCode::ErrorInvalid, "an open for nothing");
    }
    // To be executed a file need not be readable.
    let read = open.read && !open.exec;
    for (asked, mask) in [(read, access::READ), (open.write, access::WRITE), (open.exec, access::EXEC)] {
        if asked {
            access::require(tx, cred, &inode, mask)?;
        }
    }
    if open.write && !open.append && inode.has_flag(FLAG_APPEND) {
        return refused(ErrorCode::ErrorNotPermitted, "the append-only flag is set");
    }
    Ok(inode.attr)
}
