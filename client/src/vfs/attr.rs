//! lookup, getattr, setattr, access.

use super::{Client, Inner, attr_of, check_name, entry, own_cred};
use crate::cache::Touched;
use crate::data::AttrSet;
use crate::leases::Term;
use dfs_proto::v1::{self, Attr, Cred, ErrorCode, Timestamp, mutation, query};
use dfs_proto::{FsError, FsResult, InodeNo};
use std::time::Duration;

impl Client {
    /// What a name in a directory stands for. `..` is the parent.
    ///
    /// # Errors
    /// ErrorNotFound, ErrorNotDir, ErrorAccess (no right to search the directory), and the session's.
    pub async fn lookup(&self, cred: &Cred, parent: InodeNo, name: &[u8]) -> FsResult<Attr> {
        check_name(name)?;
        match self.cached_lookup(parent, name) {
            Some(Ok((attr, _))) => Ok(attr),
            // Others may not be allowed to know.
            Some(Err(error)) if cred.uid == 0 && !self.inner.session.squashes_root() => Err(error),
            _ => self.inner.lookup_at_master(cred, parent, name).await,
        }
    }

    /// The attributes of an inode, if they are known: what [`Client::getattr`] would answer, without waiting. The
    /// duration is how long they may still be believed.
    #[must_use]
    pub fn cached_attr(&self, ino: InodeNo) -> Option<(Attr, Duration)> {
        let (attr, left) = self.inner.cache.attr(ino)?;
        Some((self.inner.overlaid(attr), left))
    }

    /// What [`Client::lookup`] would answer, if that is known. A name that is known to be absent is ErrorNotFound.
    #[must_use]
    pub fn cached_lookup(&self, parent: InodeNo, name: &[u8]) -> Option<FsResult<(Attr, Duration)>> {
        let (ino, left) = self.inner.cache.name(parent, name)?;
        match ino {
            None => Some(Err(ErrorCode::ErrorNotFound.into())),
            Some(ino) => self.cached_attr(ino).map(|(attr, attr_left)| Ok((attr, left.min(attr_left)))),
        }
    }

    /// The inode that a name is known to stand for, with its attributes as they were last known: they are not to be believed.
    /// For root only, to whom owner and mode mean nothing.
    #[must_use]
    pub fn known_name(&self, parent: InodeNo, name: &[u8]) -> Option<Attr> {
        let (ino, _) = self.inner.cache.name(parent, name)?;
        let attr = self.inner.cache.last_attr(ino?).filter(|_| !self.inner.session.squashes_root())?;
        Some(self.inner.overlaid(attr))
    }

    /// Attributes from a directory's page with what this client knows better.
    #[must_use]
    pub fn listed(&self, attr: Attr) -> Attr {
        self.inner.overlaid(attr)
    }

    /// For how long a name's answer may be believed, whatever it stands for; nothing: not at all.
    #[must_use]
    pub fn name_left(&self, parent: InodeNo, name: &[u8]) -> Duration {
        self.inner.cache.name(parent, name).map_or(Duration::ZERO, |(_, left)| left)
    }

    /// The lease on an inode, if there is one: what was read of the inode in one term is good as long as the term lasts.
    #[must_use]
    pub fn lease_term(&self, ino: InodeNo) -> Option<Term> {
        self.inner.session.leases().term(ino)
    }

    /// How long it may still be believed that there is nothing of a name, if that is known.
    #[must_use]
    pub fn cached_absence(&self, parent: InodeNo, name: &[u8]) -> Option<Duration> {
        let (ino, left) = self.inner.cache.name(parent, name)?;
        ino.is_none().then_some(left)
    }

    /// The attributes of an inode, with the size and the times that this client's own writes gave it.
    ///
    /// # Errors
    /// ErrorStale when the inode is gone, and the session's.
    pub async fn getattr(&self, ino: InodeNo) -> FsResult<Attr> {
        match self.cached_attr(ino) {
            Some((attr, _)) => Ok(attr),
            None => match self.inner.ask_attr(ino, 0).await {
                Err(error) if error.code == ErrorCode::ErrorStale => {
                    self.inner.remains.attr(ino).ok_or(error)
                }
                asked => asked,
            },
        }
    }

    /// The attributes of an inode if it is still of this generation (open_by_handle_at, NFS). Asks the master.
    ///
    /// # Errors
    /// ErrorStale when the inode is gone or its number was used again, and the session's.
    pub async fn getattr_generation(&self, ino: InodeNo, generation: u64) -> FsResult<Attr> {
        self.inner.ask_attr(ino, generation).await
    }

    /// Changes attributes; a size cuts or extends the file. Mode, owner and times of a file with bytes that are not
    /// committed go to the master together with the bytes; before other changes the bytes are flushed.
    ///
    /// Clearing set-user-id, set-group-id and capabilities, as an unprivileged truncate does, is decided here.
    ///
    /// # Errors
    /// ErrorNotPermitted, ErrorAccess, ErrorFileTooBig, ErrorInvalid, and those of a flush.
    pub async fn setattr(&self, cred: &Cred, mut change: v1::SetAttr) -> FsResult<Attr> {
        let ino = InodeNo(change.ino);
        if let Some(attr) = self.inner.set_with_bytes(cred, &change) {
            return Ok(attr);
        }
        // A commit that came later would bring back the old size, or the time of the write.
        self.inner.flush_if_dirty(ino).await?;
        if change.atime.is_some() || change.atime_now {
            self.inner.atimes.forget(ino);
        }
        if change.size.is_some() && cred.uid != 0 {
            change.kill_priv = true;
        }
        let resized = change.size.is_some();
        let policy = change.replicas.is_some() || change.chunk_size.is_some();
        let (made, answer) =
            self.inner.change(cred, mutation::Op::SetAttr(change), Touched::inode(ino)).await;
        if resized {
            self.inner.data.forget_layout(ino);
        }
        match answer.and_then(entry) {
            Ok(attr) => {
                self.inner.cache.learn(&made.ticket, &attr);
                // Removed, but not freed yet: then this is what is left of it.
                self.inner.remains.keep(&attr);
                if policy {
                    self.inner.follow_policy(&attr);
                }
                Ok(self.inner.overlaid(attr))
            }
            Err(error) => {
                self.inner.cache.forget_attr(ino);
                let gone = error.code == ErrorCode::ErrorStale;
                let changed = if gone {
                    self.inner.remains.change(cred, &change, self.inner.master.now())
                } else {
                    None
                };
                changed.ok_or(error)
            }
        }
    }

    /// Whether `cred` may read (4), write (2), execute or search (1) an inode.
    ///
    /// # Errors
    /// ErrorAccess when not, and the session's.
    pub async fn access(&self, cred: &Cred, ino: InodeNo, mask: u32) -> FsResult<()> {
        self.inner.settle_attrs(ino).await?;
        let ticket = self.inner.cache.ticket();
        let question = query::Op::Access(v1::Access { ino: ino.get(), mask });
        let heard = self.inner.session.ask(cred, question).await;
        let attr = heard.result.and_then(entry)?;
        self.inner.cache.put_attr(&ticket.at(heard.seen), &attr);
        Ok(())
    }
}

impl Inner {
    /// Keeps a change of a file with bytes that are not committed, to be committed together with them, if the master
    /// will certainly take it. Answers the attributes then.
    fn set_with_bytes(&self, cred: &Cred, change: &v1::SetAttr) -> Option<Attr> {
        let ino = InodeNo(change.ino);
        let set = AttrSet::of(change)?;
        if cred.uid == 0 && self.session.squashes_root() {
            return None;
        }
        let (known, _) = self.cache.attr(ino)?;
        if !set.is_certain(cred, &self.overlaid(known)) {
            return None;
        }
        self.session
            .leases()
            .writing(ino, None, || self.data.set_attrs(ino, cred, set))
            .filter(|kept| *kept)?;
        if set.atime.is_some() {
            self.atimes.forget(ino);
        }
        Some(self.overlaid(known))
    }

    /// Attributes as this client's programs see them: with what it holds but has not committed.
    pub fn overlaid(&self, mut attr: Attr) -> Attr {
        let ino = InodeNo(attr.ino);
        if attr.kind != v1::Kind::File as i32 {
            return self.with_atime(attr);
        }
        // The answer to a commit is learned before the bytes leave memory. Looked at in the other order, the attributes
        // could be from before the commit and the bytes gone: the file would seem shorter than it was.
        let lost = self.session.leases().lost_at(ino).is_some();
        let dirty = self.data.dirty(ino).filter(|_| !lost);
        if let Some(known) = self.cache.last_attr(ino).filter(|known| known.version > attr.version) {
            attr = known;
        }
        if let Some(dirty) = dirty {
            if dirty.end > attr.size {
                // Roughly: a hole before the written bytes would be counted, but never more than fits in memory.
                let grown = (dirty.end - attr.size).min(self.config.write_memory);
                attr.blocks = if is_dense(&attr) {
                    attr.blocks.max((attr.size + grown).div_ceil(512))
                } else {
                    attr.blocks + grown.div_ceil(512)
                };
                attr.size = dirty.end;
            }
            let mut changed = |seen: Timestamp| {
                if attr.ctime.is_none_or(|time| time.key() < seen.key()) {
                    attr.ctime = Some(seen);
                }
            };
            if dirty.end > 0 {
                changed(dirty.mtime);
                // Also where a program had set a time to come.
                attr.mtime = Some(dirty.mtime);
            }
            if let Some((set, ctime)) = dirty.set {
                changed(ctime);
                set.show(&mut attr);
            }
        }
        self.with_atime(attr)
    }

    fn with_atime(&self, mut attr: Attr) -> Attr {
        if let Some(atime) = self.atimes.pending(InodeNo(attr.ino))
            && attr.atime.is_none_or(|time| time.key() < atime.key())
        {
            attr.atime = Some(atime);
        }
        attr
    }

    pub async fn lookup_at_master(&self, cred: &Cred, parent: InodeNo, name: &[u8]) -> FsResult<Attr> {
        let ticket = self.cache.ticket();
        let question = v1::Lookup { parent: parent.get(), name: bytes::Bytes::copy_from_slice(name) };
        let heard = self.session.ask(cred, query::Op::Lookup(question)).await;
        let ticket = ticket.at(heard.seen);
        match heard.result.and_then(entry) {
            Ok(attr) => {
                self.cache.put_attr(&ticket, &attr);
                if name != b".." && name != b"." {
                    self.cache.put_name(&ticket, parent, name, Some(InodeNo(attr.ino)));
                }
                Ok(self.overlaid(attr))
            }
            Err(error) => {
                if error.code == ErrorCode::ErrorNotFound {
                    self.cache.put_name(&ticket, parent, name, None);
                }
                Err(error)
            }
        }
    }

    pub async fn ask_attr(&self, ino: InodeNo, generation: u64) -> FsResult<Attr> {
        let ticket = self.cache.ticket();
        let question = query::Op::GetAttr(v1::GetAttr { ino: ino.get(), generation });
        let heard = self.session.ask(&own_cred(), question).await;
        match heard.result? {
            v1::answer::Body::Entry(answer) => {
                let attr = attr_of(answer.attr)?;
                self.cache.put_attr(&ticket.at(heard.seen), &attr);
                Ok(self.overlaid(attr))
            }
            other => Err(super::unexpected(&other)),
        }
    }

    /// The attributes, asked only when they are not known.
    pub async fn attr_now(&self, ino: InodeNo) -> FsResult<Attr> {
        match self.cache.attr(ino) {
            Some((attr, _)) => Ok(self.overlaid(attr)),
            None => self.ask_attr(ino, 0).await,
        }
    }
}

/// Whether every byte of a file is allocated, as far as its blocks tell.
pub(super) fn is_dense(attr: &Attr) -> bool {
    attr.blocks.saturating_mul(512) >= attr.size
}

/// A size that a file may not have.
pub(super) fn check_end(offset: u64, len: u64) -> FsResult<u64> {
    match offset.checked_add(len) {
        Some(end) if end <= dfs_proto::limits::FILE_SIZE_MAX => Ok(end),
        _ => Err(FsError::new(ErrorCode::ErrorFileTooBig, format!("{len} bytes at offset {offset}"))),
    }
}
