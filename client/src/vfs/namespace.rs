//! create, mkdir, symlink, mknod, unlink, rmdir, rename, link, readlink.

use super::{Client, Inner, OpenFile, OpenFlags, attr_of, check_name, entry, own_cred, unexpected};
use crate::cache::{Ticket, Touched};
use bytes::Bytes;
use dfs_proto::v1::{self, Attr, Cred, answer, hold, mutation, query};
use dfs_proto::{FsResult, InodeNo};
use std::sync::Arc;

/// What [`Client::create`] made or found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    pub attr: Attr,
    /// False: it was there before.
    pub created: bool,
}

impl Client {
    /// Makes a file, directory, symlink, device, fifo or socket.
    ///
    /// # Errors
    /// ErrorExists, ErrorAccess, ErrorNotDir, ErrorNameTooLong, ErrorNoSpace …, and the session's.
    pub async fn create(&self, cred: &Cred, what: v1::Create) -> FsResult<Entry> {
        if !what.anonymous {
            check_name(&what.name)?;
        }
        let (parent, name) = (InodeNo(what.parent), what.name.clone());
        let anonymous = what.anonymous;
        let cache = &self.inner.cache;
        let touched = if anonymous { Touched::default() } else { Touched::name(parent, &name) };
        let (change, answer) = self.inner.change(cred, mutation::Op::Create(what), touched).await;
        let ticket = change.ticket;
        let made = answer.and_then(|body| match body {
            answer::Body::Entry(made) => {
                let attr = attr_of(made.attr)?;
                if made.created && !anonymous {
                    cache.made_name(parent, &name, made.dir_version);
                }
                if made.created && is_dir(&attr) {
                    cache.made_dir(&ticket, &attr);
                }
                Ok(Entry { attr, created: made.created })
            }
            other => Err(unexpected(&other)),
        });
        match made {
            Ok(made) => {
                cache.learn(&ticket, &made.attr);
                if made.created && !anonymous {
                    cache.dir_changed(parent, made.attr.ctime, 1, i32::from(is_dir(&made.attr)));
                }
                if !anonymous {
                    cache.set_name(&ticket, parent, &name, Some(InodeNo(made.attr.ino)));
                }
                Ok(Entry { attr: self.inner.overlaid(made.attr), ..made })
            }
            Err(error) => {
                cache.forget_name(parent, &name);
                cache.forget_attr(parent);
                Err(error)
            }
        }
    }

    /// Makes a regular file and opens it in one step; without `exclusive` a file that is there is opened.
    ///
    /// # Errors
    /// As [`Client::create`], and as [`Client::open`] for a file that was there.
    pub async fn create_open(
        &self,
        cred: &Cred,
        what: v1::Create,
        flags: OpenFlags,
    ) -> FsResult<(Entry, Arc<OpenFile>)> {
        let made = self.create(cred, v1::Create { open: true, ..what }).await?;
        let ino = InodeNo(made.attr.ino);
        if made.created {
            let state = self.inner.files.opened(ino);
            if made.attr.nlink == 0 {
                self.inner.files.unlinked(ino);
            }
            // A new file has no slices: its first read need not ask.
            let layout = v1::Layout { complete_to: u64::MAX, attr: Some(made.attr), ..v1::Layout::default() };
            self.inner.data.learn_layout(ino, &layout, self.inner.data.asking(ino));
            self.inner.follow_policy(&made.attr);
            return Ok((made, OpenFile::new(state, flags)));
        }
        // Found, not made: creating did not check the right to open it. The open that the creation counted is given
        // back once the checked one is counted, so that the file cannot vanish in between.
        let opened = self.open(cred, ino, flags).await;
        self.inner.session.hold_later(&own_cred(), hold::Op::Close(v1::Close { ino: ino.get() })).await?;
        let file = opened?;
        let attr = self.inner.attr_now(ino).await?;
        Ok((Entry { attr, created: false }, file))
    }

    /// Removes a name that is not a directory's. A file that is open lives on until it is closed.
    ///
    /// # Errors
    /// ErrorNotFound, ErrorIsDir, ErrorAccess, ErrorNotPermitted (sticky directory), and the session's.
    pub async fn unlink(&self, cred: &Cred, parent: InodeNo, name: &[u8]) -> FsResult<()> {
        self.inner.remove(cred, parent, name, false).await
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// ErrorNotEmpty, and those of [`Client::unlink`].
    pub async fn rmdir(&self, cred: &Cred, parent: InodeNo, name: &[u8]) -> FsResult<()> {
        self.inner.remove(cred, parent, name, true).await
    }

    /// Renames, replacing what has the new name; or, with `exchange`, swaps two names. The bytes this client holds of
    /// what is moved are flushed before, so that no crash shows an empty file under the new name.
    ///
    /// # Errors
    /// As rename(2), and those of the flush.
    #[expect(clippy::too_many_arguments, reason = "they are renameat2's")]
    pub async fn rename(
        &self,
        cred: &Cred,
        parent: InodeNo,
        name: &[u8],
        new_parent: InodeNo,
        new_name: &[u8],
        no_replace: bool,
        exchange: bool,
    ) -> FsResult<()> {
        check_name(name)?;
        check_name(new_name)?;
        self.inner.flush_named(cred, parent, name).await?;
        if exchange {
            self.inner.flush_named(cred, new_parent, new_name).await?;
        }
        let change = v1::Rename {
            parent: parent.get(),
            name: Bytes::copy_from_slice(name),
            new_parent: new_parent.get(),
            new_name: Bytes::copy_from_slice(new_name),
            no_replace,
            exchange,
        };
        let cache = &self.inner.cache;
        let known = |dir: InodeNo, name: &[u8]| cache.name(dir, name).and_then(|(ino, _)| ino);
        let (moved, replaced) = (known(parent, name), known(new_parent, new_name));
        let touched = Touched::name(parent, name).and_name(new_parent, new_name).and(moved).and(replaced);
        let (made, answer) = self.inner.change(cred, mutation::Op::Rename(change), touched).await;
        for dir in [parent, new_parent] {
            cache.forget_attr(dir);
            cache.changed_names(dir);
        }
        match answer {
            Ok(answer::Body::Renamed(renamed)) => {
                self.inner.renamed(&made.ticket, (parent, name), (new_parent, new_name), exchange, &renamed);
                Ok(())
            }
            Ok(other) => Err(unexpected(&other)),
            Err(error) => {
                cache.forget_name(parent, name);
                cache.forget_name(new_parent, new_name);
                Err(error)
            }
        }
    }

    /// Gives an inode one more name. The bytes this client holds of it are flushed before.
    ///
    /// # Errors
    /// ErrorExists, ErrorNotPermitted (a directory), ErrorTooManyLinks, and those of the flush.
    pub async fn link(
        &self,
        cred: &Cred,
        ino: InodeNo,
        new_parent: InodeNo,
        new_name: &[u8],
    ) -> FsResult<Attr> {
        check_name(new_name)?;
        self.inner.flush_if_dirty(ino).await?;
        let change = v1::Link {
            ino: ino.get(),
            new_parent: new_parent.get(),
            new_name: Bytes::copy_from_slice(new_name),
        };
        let cache = &self.inner.cache;
        let touched = Touched::name(new_parent, new_name).and(Some(ino));
        let (made, answer) = self.inner.change(cred, mutation::Op::Link(change), touched).await;
        cache.changed_names(new_parent);
        match answer.and_then(entry) {
            Ok(attr) => {
                cache.dir_changed(new_parent, attr.ctime, 1, 0);
                cache.set_name(&made.ticket, new_parent, new_name, Some(ino));
                cache.learn(&made.ticket, &attr);
                self.inner.files.linked(ino);
                Ok(self.inner.overlaid(attr))
            }
            Err(error) => {
                cache.forget_name(new_parent, new_name);
                cache.forget_attr(new_parent);
                cache.forget_attr(ino);
                Err(error)
            }
        }
    }

    /// Where a symlink points.
    ///
    /// # Errors
    /// ErrorInvalid when it is no symlink, and the session's.
    pub async fn readlink(&self, ino: InodeNo) -> FsResult<Bytes> {
        let question = query::Op::ReadLink(v1::ReadLink { ino: ino.get() });
        match self.inner.master.query(&own_cred(), question).await? {
            answer::Body::Data(target) => Ok(target),
            other => Err(unexpected(&other)),
        }
    }
}

impl Inner {
    async fn remove(&self, cred: &Cred, parent: InodeNo, name: &[u8], directory: bool) -> FsResult<()> {
        check_name(name)?;
        if cred.uid != 0
            && let Some((Some(ino), _)) = self.cache.name(parent, name)
            && let Err(error) = self.settle_attrs(ino).await
        {
            // In a sticky directory the owner counts. What cannot be written can be removed all the same.
            tracing::debug!(%ino, %error, "a file is removed whose attributes could not be set");
        }
        let change = v1::Unlink { parent: parent.get(), name: Bytes::copy_from_slice(name), directory };
        let known = self.cache.name(parent, name).and_then(|(ino, _)| ino);
        let touched = Touched::name(parent, name).and(known);
        let (made, answer) = self.change(cred, mutation::Op::Unlink(change), touched).await;
        self.cache.changed_names(parent);
        match answer {
            Ok(answer::Body::Unlinked(v1::Unlinked { attr })) => {
                self.cache.set_name(&made.ticket, parent, name, None);
                let time = attr.as_ref().and_then(|attr| attr.ctime);
                self.cache.dir_changed(parent, time, -1, -i32::from(directory));
                if let Some(attr) = attr {
                    self.learn_linked(&made.ticket, &attr);
                }
                Ok(())
            }
            Ok(other) => Err(unexpected(&other)),
            Err(error) => {
                self.cache.forget_name(parent, name);
                self.cache.forget_attr(parent);
                Err(error)
            }
        }
    }

    /// Keeps what a rename did to two names.
    fn renamed(
        &self,
        ticket: &Ticket,
        old: (InodeNo, &[u8]),
        new: (InodeNo, &[u8]),
        exchange: bool,
        renamed: &v1::Renamed,
    ) {
        let ino = |attr: &Option<Attr>| attr.as_ref().map(|attr| InodeNo(attr.ino));
        let (moved, replaced) = (ino(&renamed.moved), ino(&renamed.replaced));
        // Renaming one link onto another of the same inode leaves both names, and is answered as if nothing had been
        // replaced: with several links nobody can tell.
        let links = |attr: &Attr| !is_dir(attr) && attr.nlink > 1;
        let same = old == new || (replaced.is_none() && renamed.moved.as_ref().is_some_and(links));
        match (exchange, replaced) {
            (true, None) => self.cache.forget_name(old.0, old.1),
            (false, _) if moved.is_none() || same => self.cache.forget_name(old.0, old.1),
            (true, Some(replaced)) => self.cache.set_name(ticket, old.0, old.1, Some(replaced)),
            (false, _) => self.cache.set_name(ticket, old.0, old.1, None),
        }
        match moved {
            Some(moved) => self.cache.set_name(ticket, new.0, new.1, Some(moved)),
            None => self.cache.forget_name(new.0, new.1),
        }
        for attr in [renamed.moved, renamed.replaced].into_iter().flatten() {
            self.learn_linked(ticket, &attr);
        }
    }

    /// Keeps the attributes of an inode that may have lost its last name. What is held of a file without names and
    /// opens need not be written.
    fn learn_linked(&self, ticket: &Ticket, attr: &Attr) {
        self.cache.learn(ticket, attr);
        self.remains.keep(attr);
        let ino = InodeNo(attr.ino);
        if attr.nlink == 0 && !self.files.unlinked(ino) {
            if attr.kind == v1::Kind::File as i32 {
                self.data.discard(ino);
            }
            self.session.leases().forget(ino);
        }
    }

    /// Flushes what is held of the inode behind a name. Only inodes in [`super::files::Files`] can have such bytes, so
    /// mostly nothing is asked. A name that is not there is the next operation's to report.
    async fn flush_named(&self, cred: &Cred, parent: InodeNo, name: &[u8]) -> FsResult<()> {
        if self.files.is_empty() && self.background.is_idle() {
            return Ok(());
        }
        let ino = match self.cache.name(parent, name) {
            Some((ino, _)) => ino,
            None => self.lookup_at_master(cred, parent, name).await.ok().map(|attr| InodeNo(attr.ino)),
        };
        match ino {
            Some(ino) => self.flush_if_dirty(ino).await,
            None => Ok(()),
        }
    }
}

fn is_dir(attr: &Attr) -> bool {
    attr.kind == v1::Kind::Dir as i32
}
