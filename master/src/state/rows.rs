//! Rows as the operations see them: typed access to a transaction, the inode as a struct, and how an operation fails.

use super::keys;
use super::kv::Tx;
use bytes::Bytes;
use dfs_proto::v1::{self, Attr, ErrorCode, Kind, Timestamp};
use dfs_proto::{ByteLen, ChunkId, FsError, InodeNo, NodeId, SessionId};
use prost::Message;
use std::io;
use std::ops::ControlFlow;

/// FS_IMMUTABLE_FL of linux/fs.h: nothing about the inode changes.
pub const FLAG_IMMUTABLE: u32 = 0x10;
/// FS_APPEND_FL of linux/fs.h: a file grows only at its end, a directory loses no entry.
pub const FLAG_APPEND: u32 = 0x20;
/// FS_FL_USER_MODIFIABLE of linux/fs.h: the flags that chattr may change.
pub const FLAGS_MODIFIABLE: u32 = 0x0003_80ff;

/// Why an operation did not happen.
#[derive(Debug)]
pub enum OpError {
    /// The caller may not or can not: the command answers this and writes nothing.
    Refused(FsError),
    /// The store failed or holds nonsense: the whole batch stops, nothing of it is applied.
    Broken(io::Error),
}

/// What an operation returns.
pub type OpResult<T> = Result<T, OpError>;

impl From<io::Error> for OpError {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl From<FsError> for OpError {
    fn from(error: FsError) -> Self {
        Self::Refused(error)
    }
}

impl From<ErrorCode> for OpError {
    fn from(code: ErrorCode) -> Self {
        Self::Refused(code.into())
    }
}

/// A refusal with its cause in words.
pub fn refused<T>(code: ErrorCode, message: impl Into<String>) -> OpResult<T> {
    Err(OpError::Refused(FsError::new(code, message)))
}

/// Separates refusals, which are answers, from failures of the store.
pub fn answered<T>(result: OpResult<T>) -> io::Result<Result<T, FsError>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(OpError::Refused(error)) => Ok(Err(error)),
        Err(OpError::Broken(error)) => Err(error),
    }
}

/// A row that cannot be, found at `key`.
pub fn corrupt(key: &[u8], what: impl std::fmt::Display) -> io::Error {
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    io::Error::new(io::ErrorKind::InvalidData, format!("state row {hex}: {what}"))
}

/// Reads a row's value as its message.
pub fn decode<M: Message + Default>(key: &[u8], value: &[u8]) -> io::Result<M> {
    M::decode(value).map_err(|error| corrupt(key, error))
}

/// A number of a key that the table's layout promises.
pub fn number(key: &[u8], index: usize) -> io::Result<u64> {
    keys::number(key, index).ok_or_else(|| corrupt(key, "the key is too short"))
}

impl Tx<'_> {
    /// The row at `key`.
    pub fn row<M: Message + Default>(&self, key: &[u8]) -> io::Result<Option<M>> {
        self.get(key)?.map(|value| decode(key, &value)).transpose()
    }

    pub fn put_row(&mut self, key: Vec<u8>, row: &impl Message) {
        self.put(key, row.encode_to_vec());
    }

    /// The rows of a range, at most `limit` of them, each through `read`.
    pub fn collect<T>(
        &self,
        (from, to): &keys::KeyRange,
        limit: usize,
        mut read: impl FnMut(&[u8], &[u8]) -> io::Result<T>,
    ) -> io::Result<Vec<T>> {
        let (mut rows, mut failure) = (Vec::new(), None);
        if limit == 0 {
            return Ok(rows);
        }
        self.scan(from, to, &mut |key, value| {
            match read(key, value) {
                Ok(row) => rows.push(row),
                Err(error) => failure = Some(error),
            }
            if failure.is_some() || rows.len() == limit {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        failure.map_or(Ok(rows), Err)
    }

    /// The inode, or None where there is none of this number.
    pub fn find_inode(&self, ino: InodeNo) -> io::Result<Option<Inode>> {
        let key = keys::inode(ino);
        self.row::<v1::InodeRow>(&key)?.map(|row| Inode::from_row(&key, row)).transpose()
    }

    /// The inode; its absence is ESTALE, as it is for a handle whose file is gone: the kernel walks the path again.
    pub fn inode(&self, ino: InodeNo) -> OpResult<Inode> {
        match self.find_inode(ino)? {
            Some(inode) => Ok(inode),
            None => refused(ErrorCode::ErrorStale, format!("inode {ino} does not exist")),
        }
    }

    pub fn put_inode(&mut self, inode: &Inode) {
        self.put_row(keys::inode(inode.ino()), &inode.to_row());
    }

    pub fn find_chunk(&self, chunk: ChunkId) -> io::Result<Option<v1::ChunkState>> {
        self.row(&keys::chunk(chunk))
    }

    pub fn put_chunk(&mut self, state: &v1::ChunkState) {
        self.put_row(keys::chunk(ChunkId(state.chunk)), state);
    }

    pub fn find_session(&self, session: SessionId) -> io::Result<Option<v1::SessionRow>> {
        self.row(&keys::session(session))
    }

    /// The whole value of an xattr.
    pub fn xattr(&self, ino: InodeNo, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let parts = self.collect(&keys::xattr_parts(ino, name), usize::MAX, |_, value| Ok(value.to_vec()))?;
        Ok((!parts.is_empty()).then(|| parts.concat()))
    }

    pub fn put_xattr(&mut self, ino: InodeNo, name: &[u8], value: &[u8]) -> io::Result<()> {
        self.delete_xattr(ino, name)?;
        self.put(keys::xattr(ino, name, 0), value[..value.len().min(keys::XATTR_PART)].to_vec());
        for (part, bytes) in (0..).zip(value.chunks(keys::XATTR_PART)).skip(1) {
            self.put(keys::xattr(ino, name, part), bytes.to_vec());
        }
        Ok(())
    }

    /// Deletes an xattr; answers whether there was one.
    pub fn delete_xattr(&mut self, ino: InodeNo, name: &[u8]) -> io::Result<bool> {
        let old = self.collect(&keys::xattr_parts(ino, name), usize::MAX, |key, _| Ok(key.to_vec()))?;
        let found = !old.is_empty();
        for key in old {
            self.delete(key);
        }
        Ok(found)
    }

    pub fn find_node(&self, node: NodeId) -> io::Result<Option<v1::NodeRow>> {
        self.row(&keys::node(node))
    }
}

/// An inode's row, its parts always there.
#[derive(Debug, Clone, PartialEq)]
pub struct Inode {
    pub attr: Attr,
    /// A symlink's text.
    pub target: Bytes,
    /// The sum of the slices' lengths.
    pub mapped: ByteLen,
}

impl Inode {
    pub fn from_row(key: &[u8], row: v1::InodeRow) -> io::Result<Self> {
        let attr = row.attr.ok_or_else(|| corrupt(key, "an inode without attributes"))?;
        Ok(Self { attr, target: row.target, mapped: ByteLen(row.mapped_bytes) })
    }

    pub fn to_row(&self) -> v1::InodeRow {
        v1::InodeRow { attr: Some(self.attr), target: self.target.clone(), mapped_bytes: self.mapped.get() }
    }

    pub fn ino(&self) -> InodeNo {
        InodeNo(self.attr.ino)
    }

    pub fn kind(&self) -> Kind {
        self.attr.kind()
    }

    pub fn is_dir(&self) -> bool {
        self.kind() == Kind::Dir
    }

    pub fn is_file(&self) -> bool {
        self.kind() == Kind::File
    }

    pub fn has_flag(&self, flag: u32) -> bool {
        self.attr.flags & flag != 0
    }

    /// Something about the inode changed, its content did not.
    pub fn changed(&mut self, now: Timestamp) {
        self.attr.ctime = Some(now);
        self.attr.version += 1;
    }

    /// The inode's content changed: a file's bytes, a directory's entries.
    pub fn modified(&mut self, now: Timestamp) {
        self.attr.mtime = Some(now);
        self.changed(now);
    }

    /// More or fewer bytes are mapped than before; `blocks` follows.
    pub fn set_mapped(&mut self, mapped: ByteLen) {
        self.mapped = mapped;
        self.attr.blocks = mapped.get().div_ceil(512);
    }
}
