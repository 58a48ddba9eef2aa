//! From the cluster into local files and pipes. A local file appears under its name when it is whole.

use super::{Options, PIECE, PIECES_AT_ONCE, Progress, STEP, ranges, temporary_name};
use crate::Result;
use crate::error::{About, CliError};
use crate::format;
use crate::remote::{Remote, join};
use bytes::Bytes;
use dfs_client::v1::Attr;
use dfs_client::v1::Kind;
use dfs_client::{InodeNo, OpenFile, OpenFlags, SeekKind};
use dfs_env::Env;
use dfs_proto::error::ErrorCode;
use futures::TryStreamExt;
use std::ffi::OsStr;
use std::fs::{File, FileTimes};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

const READ: OpenFlags =
    OpenFlags { read: true, write: false, append: false, truncate: false, exec: false, sync: false };

/// What a download needs.
pub struct Download {
    pub remote: Remote,
    pub env: Env,
    pub options: Options,
    pub progress: Progress,
}

/// One entry of a tree, on its way.
struct Job {
    attr: Attr,
    path: Vec<u8>,
    local: PathBuf,
}

impl Download {
    /// Downloads a file or, with `recursive`, a tree to `local`.
    pub async fn path(&self, path: &[u8], attr: &Attr, local: &Path) -> Result {
        match attr.kind() {
            Kind::Dir if self.options.recursive => self.tree(path, attr, local).await,
            Kind::Dir => Err(CliError::failed(format::name(path), "Is a directory (-r copies it)")),
            _ => self.entry(path, attr, local).await,
        }
    }

    /// Writes a whole file to a pipe. It may grow meanwhile: what is there is read to its end.
    pub async fn stream(&self, path: &[u8], attr: &Attr, output: &mut (impl AsyncWrite + Unpin)) -> Result {
        only_files(path, attr)?;
        let shown = format::name(path);
        let open = self.remote.client.open(&self.remote.cred, InodeNo(attr.ino), READ).await.about(&shown)?;
        let copy = async {
            let mut at = 0;
            loop {
                let block = self.remote.client.read(&open, at, STEP).await.about(&shown)?;
                if block.is_empty() {
                    return output.flush().await.about("standard output");
                }
                output.write_all(&block).await.about("standard output")?;
                at += block.len() as u64;
                self.progress.moved(block.len() as u64);
            }
        };
        let copied = self.progress.stop.or(copy).await;
        let released = self.remote.client.release(Arc::clone(&open)).await.about(&shown);
        copied?;
        self.progress.file_done();
        released
    }

    /// One file or symlink.
    async fn entry(&self, path: &[u8], attr: &Attr, local: &Path) -> Result {
        let there = std::fs::symlink_metadata(local).ok();
        if there.is_some() && self.options.keep_existing {
            return Ok(());
        }
        if attr.kind() == Kind::Symlink {
            let target = self.remote.client.readlink(InodeNo(attr.ino)).await.about(format::name(path))?;
            std::os::unix::fs::symlink(OsStr::from_bytes(&target), local).about(local.display())?;
            self.progress.file_done();
            return Ok(());
        }
        only_files(path, attr)?;
        match std::fs::metadata(local) {
            Ok(meta) if meta.is_dir() => Err(CliError::failed(local.display(), "Is a directory")),
            // A device or a named pipe is written to, not replaced.
            Ok(meta) if !meta.is_file() => {
                let file = File::options().write(true).open(local).about(local.display())?;
                self.stream(path, attr, &mut tokio::fs::File::from_std(file)).await
            }
            _ => self.file(path, attr, local).await,
        }
    }

    /// One regular file: under a temporary name, then renamed.
    async fn file(&self, path: &[u8], attr: &Attr, local: &Path) -> Result {
        let shown = format::name(path);
        let Some(name) = local.file_name() else {
            return Err(CliError::failed(local.display(), "Is a directory"));
        };
        let part = temporary_name(name.as_bytes(), self.env.random());
        let part = local.with_file_name(OsStr::from_bytes(&part));
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(attr.mode & 0o777)
            .open(&part)
            .about(local.display())?;
        let file = Arc::new(file);
        let work = async {
            self.pieces(&shown, attr, &file, local).await?;
            self.finish(attr, &file).about(local.display())?;
            std::fs::rename(&part, local).about(local.display())
        };
        let result = self.progress.stop.or(work).await;
        if result.is_err()
            && let Err(error) = std::fs::remove_file(&part)
        {
            tracing::warn!(%error, part = %part.display(), "a temporary file stays behind");
        }
        result?;
        self.progress.file_done();
        Ok(())
    }

    /// Size (a hole at the end was not written), mode and times.
    fn finish(&self, attr: &Attr, file: &File) -> std::io::Result<()> {
        file.set_len(attr.size)?;
        if self.options.preserve {
            file.set_permissions(std::fs::Permissions::from_mode(attr.mode & 0o777))?;
            let mut times = FileTimes::new();
            if let Some(atime) = attr.atime {
                times = times.set_accessed(atime.to_system());
            }
            if let Some(mtime) = attr.mtime {
                times = times.set_modified(mtime.to_system());
            }
            file.set_times(times)?;
        }
        Ok(())
    }

    /// The data of a file, several pieces at a time; each has an open file of its own, so that each reads ahead.
    async fn pieces(&self, shown: &str, attr: &Attr, file: &Arc<File>, local: &Path) -> Result {
        let open = self.remote.client.open(&self.remote.cred, InodeNo(attr.ino), READ).await.about(shown)?;
        let data = self.data(&open, attr.size).await.about(shown);
        let copied = match data {
            Ok(data) => {
                let pieces = ranges::pieces(&data, PIECE);
                let alone = pieces.len() == 1;
                futures::stream::iter(pieces.into_iter().map(Ok))
                    .try_for_each_concurrent(PIECES_AT_ONCE, |piece| {
                        let open = alone.then(|| Arc::clone(&open));
                        self.piece(shown, attr, open, piece, file, local)
                    })
                    .await
            }
            Err(error) => Err(error),
        };
        let released = self.remote.client.release(open).await.about(shown);
        copied.and(released)
    }

    async fn piece(
        &self,
        shown: &str,
        attr: &Attr,
        given: Option<Arc<OpenFile>>,
        piece: Range<u64>,
        file: &Arc<File>,
        local: &Path,
    ) -> Result {
        let client = &self.remote.client;
        let own = match given {
            Some(_) => None,
            None => Some(client.open(&self.remote.cred, InodeNo(attr.ino), READ).await.about(shown)?),
        };
        let Some(open) = given.as_ref().or(own.as_ref()) else { return Ok(()) };
        let copy = async {
            let mut at = piece.start;
            while at < piece.end {
                let want = usize::try_from(piece.end - at).map_or(STEP, |left| left.min(STEP));
                let block = client.read(open, at, want).await.about(shown)?;
                if block.is_empty() {
                    return Err(CliError::failed(shown, "became shorter while it was read"));
                }
                let length = block.len() as u64;
                write_block(file, at, block).await.about(local.display())?;
                at += length;
                self.progress.moved(length);
            }
            Ok(())
        };
        let copied = copy.await;
        match own {
            Some(own) => copied.and(client.release(own).await.about(shown)),
            None => copied,
        }
    }

    /// The parts of a remote file that are not holes.
    async fn data(&self, open: &OpenFile, size: u64) -> dfs_client::FsResult<Vec<Range<u64>>> {
        let client = &self.remote.client;
        let mut found = Vec::new();
        let mut at = 0;
        while at < size {
            let start = match client.seek(open, at, SeekKind::Data).await {
                Ok(start) => start,
                Err(error) if error.code == ErrorCode::ErrorNoDeviceAddress => break,
                Err(error) => return Err(error),
            };
            let end = client.seek(open, start, SeekKind::Hole).await?.min(size);
            if start >= end {
                break;
            }
            found.push(start..end);
            at = end;
        }
        Ok(found)
    }

    /// Downloads a tree: one task walks and makes directories, several move files.
    async fn tree(&self, path: &[u8], attr: &Attr, local: &Path) -> Result {
        let walk = |jobs| self.walk(path, attr, local, jobs);
        self.progress
            .tree(walk, |job: Job| async move { self.entry(&job.path, &job.attr, &job.local).await })
            .await
    }

    async fn walk(&self, path: &[u8], attr: &Attr, local: &Path, jobs: mpsc::Sender<Job>) -> Result {
        let mut todo = vec![(InodeNo(attr.ino), path.to_vec(), local.to_owned())];
        let mut first = true;
        while let Some((ino, path, local)) = todo.pop() {
            let listed = match make_directory(&local) {
                Ok(()) => self.remote.list(ino, &path).await,
                Err(error) => Err(error),
            };
            let entries = match listed {
                Err(error) if first => return Err(error),
                Err(error) => {
                    self.progress.note(Err(error));
                    continue;
                }
                Ok(entries) => entries,
            };
            first = false;
            for entry in entries {
                if self.progress.stop.is_stopped() {
                    return Err(CliError::Interrupted);
                }
                // No server may lead us out of the directory.
                if entry.name.contains(&b'/') || matches!(&entry.name[..], b"" | b"." | b"..") {
                    self.progress.note(Err(CliError::failed(
                        format::name(&path),
                        "has an entry with an impossible name",
                    )));
                    continue;
                }
                let (path, local) = (join(&path, &entry.name), local.join(OsStr::from_bytes(&entry.name)));
                let Some(attr) = entry.attr else {
                    self.progress
                        .note(Err(CliError::failed(format::name(&path), "vanished while it was copied")));
                    continue;
                };
                if attr.kind() == Kind::Dir {
                    todo.push((InodeNo(attr.ino), path, local));
                } else if jobs.send(Job { attr, path, local }).await.is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

fn make_directory(local: &Path) -> Result {
    match std::fs::create_dir(local) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && local.is_dir() => Ok(()),
        result => result.about(local.display()),
    }
}

fn only_files(path: &[u8], attr: &Attr) -> Result {
    match attr.kind() {
        Kind::File => Ok(()),
        Kind::Dir => Err(CliError::failed(format::name(path), "Is a directory")),
        kind => Err(CliError::failed(format::name(path), format!("is a {}, not a file", format::kind(kind)))),
    }
}

/// One positioned write, off the runtime's threads.
async fn write_block(file: &Arc<File>, at: u64, block: Bytes) -> std::io::Result<()> {
    let file = Arc::clone(file);
    tokio::task::spawn_blocking(move || file.write_all_at(&block, at)).await.map_err(std::io::Error::other)?
}
