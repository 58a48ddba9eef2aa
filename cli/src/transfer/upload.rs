//! From local files and pipes into the cluster. A file appears under its name when it is whole: it is written under a
//! temporary name, flushed, and renamed.

use super::{Options, PIECE, PIECES_AT_ONCE, Progress, STEP, ranges, temporary_name};
use crate::Result;
use crate::error::{About, CliError};
use crate::format;
use crate::remote::{Place, Remote, join};
use dfs_client::v1::{Attr, Create, Kind, SetAttr, Timestamp};
use dfs_client::{InodeNo, OpenFile, OpenFlags, Privileges};
use dfs_env::Env;
use futures::TryStreamExt;
use std::fs::{File, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;

/// What an upload needs.
pub struct Upload {
    pub remote: Remote,
    pub env: Env,
    pub options: Options,
    pub progress: Progress,
}

/// One file of a tree, on its way.
struct Job {
    local: PathBuf,
    place: Place,
}

impl Upload {
    /// Uploads one local file or, with `recursive`, a tree.
    pub async fn path(&self, local: &Path, place: Place) -> Result {
        let meta = std::fs::symlink_metadata(local).about(local.display())?;
        if meta.is_dir() {
            if !self.options.recursive {
                return Err(CliError::failed(local.display(), "Is a directory (-r copies it)"));
            }
            return self.tree(local, place).await;
        }
        // What is named on the command line is followed when it is a symlink; inside trees symlinks stay symlinks.
        self.file(local, &place).await
    }

    /// Uploads one regular file, or what a device or pipe says until its end.
    async fn file(&self, local: &Path, place: &Place) -> Result {
        if self.leave(place)? {
            return Ok(());
        }
        let file = File::open(local).about(local.display())?;
        let meta = file.metadata().about(local.display())?;
        if meta.is_dir() {
            return Err(CliError::failed(local.display(), "Is a directory (-r copies it)"));
        }
        if !meta.is_file() {
            return self.stream(tokio::fs::File::from_std(file), place, 0o666).await;
        }
        let file = Arc::new(file);
        self.replace(place, meta.mode() & 0o777, Some(&meta), |open| {
            self.pieces(file, local, meta.len(), open)
        })
        .await
    }

    /// Uploads what comes out of a pipe.
    pub async fn stream(&self, mut input: impl AsyncRead + Unpin, place: &Place, mode: u32) -> Result {
        if self.leave(place)? {
            return Ok(());
        }
        self.replace(place, mode, None, |open| async move {
            let mut buffer = vec![0; STEP];
            let privileges = Privileges::of_writer(&self.remote.cred);
            let mut at = 0;
            loop {
                let filled = fill(&mut input, &mut buffer).await.about("reading the input")?;
                if filled == 0 {
                    return Ok(at);
                }
                self.remote
                    .client
                    .write(&open, at, &buffer[..filled], &privileges)
                    .await
                    .about(place.shown())?;
                at += filled as u64;
                self.progress.moved(filled as u64);
            }
        })
        .await
    }

    /// Whether what is there stays.
    fn leave(&self, place: &Place) -> Result<bool> {
        match &place.attr {
            Some(attr) if attr.kind() == Kind::Dir => Err(CliError::failed(place.shown(), "Is a directory")),
            Some(attr) if attr.kind() != Kind::File => Err(CliError::failed(
                place.shown(),
                format!("is a {}, not a file", format::kind(attr.kind())),
            )),
            there => Ok(there.is_some() && self.options.keep_existing),
        }
    }

    /// Makes a file under a temporary name, lets `fill` write it and answer its size, makes it durable and renames it.
    async fn replace<F: Future<Output = Result<u64>>>(
        &self,
        place: &Place,
        mode: u32,
        meta: Option<&Metadata>,
        fill: impl FnOnce(Arc<OpenFile>) -> F,
    ) -> Result {
        let (client, cred) = (&self.remote.client, &self.remote.cred);
        let name = temporary_name(&place.name, self.env.random());
        let what = Create {
            parent: place.parent.get(),
            name: name.clone().into(),
            kind: Kind::File.into(),
            // A file that is replaced keeps its mode.
            mode: place.attr.as_ref().map_or(mode, |attr| attr.mode & 0o777),
            umask: if place.attr.is_some() || self.options.preserve { 0 } else { self.remote.umask },
            exclusive: true,
            ..Create::default()
        };
        let flags = OpenFlags { write: true, ..OpenFlags::default() };
        let (entry, open) = client.create_open(cred, what, flags).await.about(place.shown())?;
        let work = async {
            let size = fill(Arc::clone(&open)).await?;
            client.flush(&open).await.about(place.shown())?;
            self.finish(&entry.attr, size, meta, place).await?;
            client
                .rename(cred, place.parent, &name, place.parent, &place.name, false, false)
                .await
                .about(place.shown())
        };
        let result = self.progress.stop.or(work).await;
        if result.is_err() {
            // The first error is what the user must hear of; a temporary file that stays is hidden, and named so.
            if let Err(error) = client.unlink(cred, place.parent, &name).await {
                tracing::warn!(%error, name = %format::name(&name), "a temporary file stays behind");
            }
        }
        let released = client.release(open).await.about(place.shown());
        result?;
        released?;
        self.progress.file_done();
        Ok(())
    }

    /// Size (a hole at the end was not written) and times.
    async fn finish(&self, attr: &Attr, size: u64, meta: Option<&Metadata>, place: &Place) -> Result {
        let stamp = |seconds, nanos: i64| Timestamp { seconds, nanos: u32::try_from(nanos).unwrap_or(0) };
        let kept = meta.filter(|_| self.options.preserve);
        let now = self.remote.client.getattr(InodeNo(attr.ino)).await.about(place.shown())?;
        if now.size == size && kept.is_none() {
            return Ok(());
        }
        let change = SetAttr {
            ino: attr.ino,
            size: (now.size != size).then_some(size),
            atime: kept.map(|meta| stamp(meta.atime(), meta.atime_nsec())),
            mtime: kept.map(|meta| stamp(meta.mtime(), meta.mtime_nsec())),
            ..SetAttr::default()
        };
        self.remote.client.setattr(&self.remote.cred, change).await.about(place.shown()).map(drop)
    }

    /// The data of a regular file, several pieces at a time.
    async fn pieces(&self, file: Arc<File>, local: &Path, size: u64, open: Arc<OpenFile>) -> Result<u64> {
        let data = ranges::local_data(&file, size).about(local.display())?;
        let privileges = &Privileges::of_writer(&self.remote.cred);
        futures::stream::iter(ranges::pieces(&data, PIECE).into_iter().map(Ok))
            .try_for_each_concurrent(PIECES_AT_ONCE, |piece| {
                let (file, open) = (Arc::clone(&file), Arc::clone(&open));
                async move {
                    let mut at = piece.start;
                    while at < piece.end {
                        let want = usize::try_from(piece.end - at).map_or(STEP, |left| left.min(STEP));
                        let block = read_block(&file, at, want).await.about(local.display())?;
                        if block.is_empty() {
                            return Err(CliError::failed(
                                local.display(),
                                "became shorter while it was read",
                            ));
                        }
                        self.remote
                            .client
                            .write(&open, at, &block, privileges)
                            .await
                            .about(local.display())?;
                        at += block.len() as u64;
                        self.progress.moved(block.len() as u64);
                    }
                    Ok(())
                }
            })
            .await?;
        Ok(size)
    }

    /// Uploads a tree: one task walks and makes directories, several move files.
    async fn tree(&self, local: &Path, place: Place) -> Result {
        let walk = |jobs| self.walk(local, place, jobs);
        self.progress.tree(walk, |job: Job| async move { self.entry(&job.local, &job.place).await }).await
    }

    /// Makes the directories of a tree and sends what is in them. An error ends a directory, not the walk.
    async fn walk(&self, local: &Path, place: Place, jobs: mpsc::Sender<Job>) -> Result {
        let mut todo = vec![(local.to_owned(), place)];
        let mut first = true;
        while let Some((local, place)) = todo.pop() {
            let listed = self.directory(&local, &place).await;
            let (ino, made, names) = match listed {
                // Nothing can be done when even the top fails.
                Err(error) if first => return Err(error),
                Err(error) => {
                    self.progress.note(Err(error));
                    continue;
                }
                Ok(listed) => listed,
            };
            first = false;
            for name in names {
                if self.progress.stop.is_stopped() {
                    return Err(CliError::Interrupted);
                }
                let child = local.join(&name);
                let path = join(&place.path, name.as_bytes());
                let found = if made { Ok(None) } else { self.lookup(ino, name.as_bytes(), &path).await };
                let attr = match found {
                    Ok(attr) => attr,
                    Err(error) => {
                        self.progress.note(Err(error));
                        continue;
                    }
                };
                let place = Place { parent: ino, name: name.into_vec(), attr, path };
                if std::fs::symlink_metadata(&child).is_ok_and(|meta| meta.is_dir()) {
                    todo.push((child, place));
                } else if jobs.send(Job { local: child, place }).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn lookup(&self, parent: InodeNo, name: &[u8], path: &[u8]) -> Result<Option<Attr>> {
        match self.remote.client.lookup(&self.remote.cred, parent, name).await {
            Ok(attr) => Ok(Some(attr)),
            Err(error) if error.code == dfs_proto::error::ErrorCode::ErrorNotFound => Ok(None),
            Err(error) => Err(error).about(format::name(path)),
        }
    }

    /// Makes a directory unless it is there. Answers it, whether it is new, and the names in the local one.
    async fn directory(
        &self,
        local: &Path,
        place: &Place,
    ) -> Result<(InodeNo, bool, Vec<std::ffi::OsString>)> {
        let meta = std::fs::metadata(local).about(local.display())?;
        let mut names = std::fs::read_dir(local)
            .and_then(|entries| {
                entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<Vec<_>>>()
            })
            .about(local.display())?;
        names.sort();
        if let Some(attr) = &place.attr {
            if attr.kind() != Kind::Dir {
                return Err(CliError::failed(place.shown(), "Not a directory"));
            }
            return Ok((InodeNo(attr.ino), false, names));
        }
        let what = Create {
            parent: place.parent.get(),
            name: place.name.clone().into(),
            kind: Kind::Dir.into(),
            // Without the owner's rights nothing could be put into it.
            mode: (meta.mode() & 0o777) | 0o700,
            umask: if self.options.preserve { 0 } else { self.remote.umask },
            exclusive: true,
            ..Create::default()
        };
        let made = self.remote.client.create(&self.remote.cred, what).await.about(place.shown())?;
        Ok((InodeNo(made.attr.ino), true, names))
    }

    /// One entry of a tree that is not a directory.
    async fn entry(&self, local: &Path, place: &Place) -> Result {
        let meta = std::fs::symlink_metadata(local).about(local.display())?;
        if meta.is_file() {
            return self.file(local, place).await;
        }
        if !meta.is_symlink() {
            return Err(CliError::failed(
                local.display(),
                "neither a file nor a directory nor a symlink; left out",
            ));
        }
        if place.attr.is_some() {
            return if self.options.keep_existing {
                Ok(())
            } else {
                Err(CliError::failed(place.shown(), "File exists"))
            };
        }
        let target = std::fs::read_link(local).about(local.display())?;
        let what = Create {
            parent: place.parent.get(),
            name: place.name.clone().into(),
            kind: Kind::Symlink.into(),
            mode: 0o777,
            target: target.into_os_string().into_vec().into(),
            exclusive: true,
            ..Create::default()
        };
        self.remote.client.create(&self.remote.cred, what).await.about(place.shown())?;
        self.progress.file_done();
        Ok(())
    }
}

/// One positioned read, off the runtime's threads.
async fn read_block(file: &Arc<File>, at: u64, want: usize) -> std::io::Result<Vec<u8>> {
    let file = Arc::clone(file);
    let read = tokio::task::spawn_blocking(move || {
        let mut block = vec![0; want];
        let got = file.read_at(&mut block, at)?;
        block.truncate(got);
        Ok(block)
    });
    read.await.map_err(std::io::Error::other)?
}

/// Fills the buffer as far as the input goes; a pipe gives a few KiB at a time.
pub async fn fill(input: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]).await? {
            0 => break,
            got => filled += got,
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pipes_small_pieces_become_whole_blocks() {
        let (mut writer, mut reader) = tokio::io::duplex(3);
        let writing = tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut writer, b"0123456789").await.expect("written");
        });
        let mut buffer = [0; 8];
        assert_eq!(fill(&mut reader, &mut buffer).await.expect("read"), 8);
        assert_eq!(&buffer, b"01234567");
        assert_eq!(fill(&mut reader, &mut buffer).await.expect("read"), 2);
        assert_eq!(fill(&mut reader, &mut buffer).await.expect("read"), 0);
        writing.await.expect("ended");
    }
}
