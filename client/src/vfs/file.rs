//! open, read, write, append, flush, fsync, release.

use super::attr::{check_end, is_dense};
use super::files::Remains;
use super::{Client, Inner, OpenFile, OpenFlags, Privileges, attr_of, own_cred, unexpected};
use crate::data::Under;
use crate::leases::Term;
use crate::read::ANY_VERSION;
use bytes::Bytes;
use dfs_proto::cred::PRIVILEGED;
use dfs_proto::v1::{self, Cred, ErrorCode, answer, hold};
use dfs_proto::{FsError, FsResult, InodeNo};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// How often a read begins again because somebody else has changed the file meanwhile.
const READ_ATTEMPTS: u32 = 8;
/// Files that are closed and not stored yet, up to which close does not wait.
const LEFT_MAX: usize = 1024;

impl Client {
    /// Opens a regular file: the master checks the right to and keeps the inode while it is open. Its first slices come
    /// with the answer, so reading a small file asks the master nothing more.
    ///
    /// # Errors
    /// ErrorAccess, ErrorIsDir, ErrorStale, and the session's.
    pub async fn open(&self, cred: &Cred, ino: InodeNo, flags: OpenFlags) -> FsResult<Arc<OpenFile>> {
        let inner = &self.inner;
        inner.settle_attrs(ino).await?;
        let (ticket, asked) = (inner.cache.ticket(), inner.data.asking(ino));
        let question = v1::Open {
            ino: ino.get(),
            read: flags.read,
            write: flags.write || flags.truncate,
            exec: flags.exec,
            append: flags.append,
        };
        let heard = inner.session.get(cred, hold::Op::Open(question)).await;
        let ticket = ticket.at(heard.seen);
        let opened = match heard.result? {
            answer::Body::Opened(opened) => opened,
            other => return Err(unexpected(&other)),
        };
        let state = inner.files.opened(ino);
        let file = OpenFile::new(state, flags);
        let attr = match attr_of(opened.attr) {
            Ok(attr) => attr,
            Err(error) => {
                self.release(file).await?;
                return Err(error);
            }
        };
        inner.cache.put_attr(&ticket, &attr);
        if flags.write || flags.append {
            inner.follow_policy(&attr);
        }
        if flags.truncate {
            let cut =
                v1::SetAttr { ino: ino.get(), size: Some(0), by_handle: true, ..v1::SetAttr::default() };
            if let Err(error) = self.setattr(cred, cut).await {
                self.release(file).await?;
                return Err(error);
            }
        } else if let Some(layout) = &opened.layout {
            inner.data.learn_layout(ino, layout, asked);
        }
        Ok(file)
    }

    /// Reads; fewer bytes than asked only at the end of the file.
    ///
    /// # Errors
    /// ErrorIo when no replica has the bytes, ErrorStale, ErrorTimedOut, and the session's.
    pub async fn read(&self, file: &OpenFile, offset: u64, len: usize) -> FsResult<Bytes> {
        let (inner, leases) = (&self.inner, self.inner.session.leases());
        for attempt in 0.. {
            inner.settle_lost(file.ino).await;
            let tenure = leases.tenure(file.ino);
            let mut attr = inner.attr_now(file.ino).await?;
            if offset >= attr.size || len == 0 {
                return Ok(Bytes::new());
            }
            inner.accessed(&attr);
            let left = usize::try_from(attr.size - offset).unwrap_or(usize::MAX);
            if attempt == READ_ATTEMPTS {
                attr.version = ANY_VERSION;
            }
            match inner.data.read(file.ino, &file.read_state, &attr, offset, len.min(left)).await {
                // Where the bytes are was asked for after somebody had changed the file.
                Err(error) if error.code == ErrorCode::ErrorConflict && attempt < READ_ATTEMPTS => {}
                // A part may have come from what was kept here, another from what somebody else wrote after that.
                Ok(_) if tenure.is_some() && leases.tenure(file.ino) != tenure && attempt < READ_ATTEMPTS => {
                }
                result => return result,
            }
        }
        unreachable!("the last attempt takes any version")
    }

    /// Writes without waiting, if that is possible; `None`: call [`Client::write`] (or [`Client::append`]).
    pub fn try_write(
        &self,
        file: &OpenFile,
        offset: u64,
        data: &[u8],
        privileges: &Privileges,
    ) -> Option<FsResult<()>> {
        if file.flags.append || file.flags.sync || self.inner.loses_privileges(file, privileges) {
            return None;
        }
        if let Err(error) = check_writable(file).and_then(|()| check_end(offset, data.len() as u64)) {
            return Some(Err(error));
        }
        self.inner.mark_written(file, privileges, false);
        let leases = self.inner.session.leases();
        leases.writing(file.ino, None, || self.inner.data.try_write(file.ino, offset, data)).flatten()
    }

    /// Writes. The bytes are buffered unless the file was opened with `sync`; a file opened with `append` ignores the
    /// offset. Waits while too many bytes are buffered.
    ///
    /// # Errors
    /// ErrorFileTooBig; ErrorNoSpace, ErrorIo, ErrorTimedOut, also of an earlier write in the background.
    pub async fn write(
        &self,
        file: &OpenFile,
        offset: u64,
        data: &[u8],
        privileges: &Privileges,
    ) -> FsResult<()> {
        if file.flags.append {
            return self.append(file, data, privileges).await.map(drop);
        }
        self.inner.write_at(file, offset, data, privileges).await
    }

    /// Takes what the kernel writes back of a shared mapping, without waiting, if that is possible; `None`: call
    /// [`Client::write_back`].
    pub fn try_write_back(&self, ino: InodeNo, offset: u64, data: &[u8]) -> Option<FsResult<()>> {
        if let Err(error) = check_end(offset, data.len() as u64) {
            return Some(Err(error));
        }
        let leases = self.inner.session.leases();
        leases.keeping(ino, || self.inner.data.try_write(ino, offset, data)).flatten()
    }

    /// Takes what the kernel writes back of a shared mapping. Under any lease it waits for nobody else: he may wait for the
    /// lease, and the lease for these pages.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn write_back(&self, ino: InodeNo, offset: u64, data: &[u8]) -> FsResult<()> {
        check_end(offset, data.len() as u64)?;
        let leases = self.inner.session.leases();
        self.inner.write_under(ino, offset, data, Under::AnyLease(leases)).await
    }

    /// The lease under which an inode may be read and what was read be kept, waited for in its turn if there is none.
    /// None: there is none to be had now.
    pub async fn read_lease(&self, ino: InodeNo) -> Option<Term> {
        self.inner.take_read_lease(ino).await
    }

    /// What was read under a lease is where it is to be kept: others may have the lease now.
    pub fn has_read(&self, ino: InodeNo) {
        self.inner.session.leases().used(ino);
    }

    /// Writes at the end of the file as it is at that moment, and answers where that was.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn append(&self, file: &OpenFile, data: &[u8], privileges: &Privileges) -> FsResult<u64> {
        let _one_at_a_time = file.state.append.lock().await;
        let (inner, ino) = (&self.inner, file.ino);
        let leases = inner.session.leases();
        check_writable(file)?;
        let loses = inner.loses_privileges(file, privileges);
        inner.mark_written(file, privileges, loses);
        loop {
            inner.settle_lost(ino).await;
            // Nobody else can move the end while this client alone may write.
            inner.take_write_lease(ino).await?;
            let term = leases.term(ino);
            let offset = inner.attr_now(ino).await?.size;
            check_end(offset, data.len() as u64)?;
            let attempt = || leases.writing(ino, term, || inner.data.try_write(ino, offset, data));
            match term.and_then(|_| attempt()) {
                Some(Some(result)) => {
                    result?;
                    if loses || file.flags.sync {
                        inner.data.flush(ino).await?;
                    }
                    return Ok(offset);
                }
                Some(None) => inner.data.room().await?,
                // The lease was wanted elsewhere before it served here.
                None => {}
            }
        }
    }

    /// Everything written through this client is committed and durable, and an error of a write in the background is reported.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn flush(&self, file: &OpenFile) -> FsResult<()> {
        if file.flags.write || file.flags.append {
            self.fsync(file.ino).await?;
        }
        Ok(())
    }

    /// What close(2) does: an error of a write in the background is reported, and what was written is on its way. Waits until it is
    /// durable unless it is little, the file has no holes, and everything goes well (`write/weather.rs`): then that takes some
    /// milliseconds more, and an error is for whoever writes or syncs the file next.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn close(&self, file: &OpenFile) -> FsResult<()> {
        if !file.flags.write && !file.flags.append {
            return Ok(());
        }
        let inner = &self.inner;
        if !inner.config.flush_on_close && inner.background.count() < LEFT_MAX {
            let dense = inner.cache.last_attr(file.ino).filter(is_dense);
            if inner.data.leave(file.ino, dense.map(|attr| attr.size))? {
                return Ok(());
            }
        }
        self.fsync(file.ino).await
    }

    /// Returns when the bytes, size and times of an inode are durable: the bytes on every replica, the commit on a
    /// majority of masters. Changes of names are durable before they return, so a directory needs nothing.
    ///
    /// # Errors
    /// As [`Client::write`].
    pub async fn fsync(&self, ino: InodeNo) -> FsResult<()> {
        self.inner.data.flush(ino).await.map(drop)
    }

    /// Gives back an open file. Does not wait for the master: what is left to write (mmap) is flushed and the open is
    /// given back in the background, in this order. A write lease becomes a read lease, so that others can look at the file
    /// without asking for it.
    ///
    /// # Errors
    /// When the session is broken for good.
    pub async fn release(&self, file: Arc<OpenFile>) -> FsResult<()> {
        let inner = &self.inner;
        let ino = file.ino;
        let remains = inner.files.closed(ino);
        if remains == Remains::Nothing {
            inner.data.discard(ino);
            inner.surrender(ino);
        }
        let close = hold::Op::Close(v1::Close { ino: ino.get() });
        if inner.data.dirty(ino).is_none() {
            if remains == Remains::Named {
                inner.session.write_no_more(ino, || inner.data.dirty(ino).is_none());
            }
            return inner.session.hold_later(&own_cred(), close).await;
        }
        let (data, session) = (Arc::clone(&inner.data), Arc::clone(&inner.session));
        let files = Arc::clone(&inner.files);
        inner.background.spawn(async move {
            if let Err(error) = data.flush(ino).await {
                tracing::warn!(%ino, %error, "the last bytes of a closed file could not be written");
                // For the next write, flush or sync of this inode: nobody waits here who could be told.
                data.keep_error(ino, error);
            }
            if remains == Remains::Named && !files.is_open(ino) {
                session.write_no_more(ino, || data.dirty(ino).is_none());
            }
            if let Err(error) = session.hold_later(&own_cred(), close).await {
                tracing::warn!(%ino, %error, "a file could not be closed at the master");
            }
        });
        Ok(())
    }
}

impl Inner {
    async fn write_at(
        &self,
        file: &OpenFile,
        offset: u64,
        data: &[u8],
        privileges: &Privileges,
    ) -> FsResult<()> {
        check_writable(file)?;
        check_end(offset, data.len() as u64)?;
        let loses = self.loses_privileges(file, privileges);
        self.mark_written(file, privileges, loses);
        let leases = self.session.leases();
        self.write_under(file.ino, offset, data, Under::WriteLease(leases)).await?;
        if loses || file.flags.sync {
            // The cleared bits must show at once, not when the bytes happen to be committed.
            self.data.flush(file.ino).await?;
        }
        Ok(())
    }

    /// Buffers bytes under write leases. Nobody sees them here before anybody could see them elsewhere.
    async fn write_under(&self, ino: InodeNo, offset: u64, data: &[u8], under: Under<'_>) -> FsResult<()> {
        let mut done = 0;
        loop {
            done += self.data.write(ino, offset + done as u64, &data[done..], under).await?;
            if done == data.len() {
                return Ok(());
            }
            self.settle_lost(ino).await;
            // Under any lease there is nothing to wait for but what was settled just now.
            let enough = matches!(under, Under::AnyLease(leases) if leases.tenure(ino).is_some());
            if !enough {
                self.take_write_lease(ino).await?;
            }
        }
    }

    /// Whether a write through this file must clear set-user-id or set-group-id.
    fn loses_privileges(&self, file: &OpenFile, privileges: &Privileges) -> bool {
        let known = || self.cache.last_attr(file.ino).map(|attr| self.overlaid(attr));
        *privileges != Privileges::Keep && known().is_some_and(|attr| attr.mode & PRIVILEGED != 0)
    }

    /// Writes that end privileges say so with their bytes: those that find some, and the first through each open, as what
    /// this client knows of them may be old.
    fn mark_written(&self, file: &OpenFile, privileges: &Privileges, loses: bool) {
        if let Privileges::EndedBy(writer) = privileges
            && (!file.dropped.swap(true, Ordering::Relaxed) || loses)
        {
            self.data.kill_priv(file.ino, writer);
        }
    }
}

fn check_writable(file: &OpenFile) -> FsResult<()> {
    if file.flags.write || file.flags.append {
        return Ok(());
    }
    Err(FsError::new(ErrorCode::ErrorAccess, "the file is not open for writing"))
}
