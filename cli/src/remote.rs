//! A connected client, acting for the user who runs the program, and paths.

use crate::Result;
use crate::error::{About, CliError, reason};
use crate::format;
use dfs_client::v1::{Attr, Cred, DirEntry, Kind};
use dfs_client::{Client, ClientConfig, InodeNo};
use dfs_env::Env;
use dfs_proto::error::ErrorCode;
use dfs_proto::limits;
use std::collections::VecDeque;

/// As Linux's MAXSYMLINKS.
const SYMLINKS_MAX: usize = 40;

/// A connected client and on whose behalf it acts.
#[derive(Clone)]
pub struct Remote {
    pub client: Client,
    pub cred: Cred,
    /// The process's file mode creation mask.
    pub umask: u32,
}

/// Whether a path's last component is followed when it is a symlink.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Last {
    Follow,
    Keep,
}

/// Where a path leads.
#[derive(Clone, Debug)]
pub struct Place {
    /// The directory and the name in it. The root's are itself and an empty name.
    pub parent: InodeNo,
    pub name: Vec<u8>,
    /// What is there; `None`: nothing yet, but the directory exists.
    pub attr: Option<Attr>,
    /// As the user wrote it, for messages.
    pub path: Vec<u8>,
}

impl Place {
    /// The path for messages.
    pub fn shown(&self) -> String {
        format::name(&self.path)
    }

    /// What is there.
    pub fn existing(&self) -> Result<&Attr> {
        self.attr.as_ref().ok_or_else(|| missing(&self.path))
    }

    /// Whether a directory is there.
    pub fn is_dir(&self) -> bool {
        self.attr.as_ref().is_some_and(|attr| attr.kind() == Kind::Dir)
    }
}

fn missing(path: &[u8]) -> CliError {
    CliError::failed(format::name(path), reason(&ErrorCode::ErrorNotFound.into()))
}

impl Remote {
    /// Connects, for at most the configured time.
    pub async fn connect(env: Env, config: ClientConfig) -> Result<Self> {
        let masters = config.masters.join(",");
        let client = Client::connect(env, config).await.map_err(|error| {
            CliError::Failed(format!("cannot reach the cluster at {masters}: {}", reason(&error)))
        })?;
        Ok(Self { client, cred: process_cred(), umask: process_umask() })
    }

    /// Flushes, says goodbye, and reports what could not be written.
    pub async fn close(&self) -> Result {
        self.client.shutdown().await.about("closing the session")
    }

    /// Walks a path from the root.
    pub async fn walk(&self, path: &[u8], last: Last) -> Result<Place> {
        let shown = || format::name(path);
        if path.len() > limits::PATH_MAX {
            return Err(CliError::failed(shown(), reason(&ErrorCode::ErrorNameTooLong.into())));
        }
        let root = self.client.getattr(InodeNo::ROOT).await.about(shown())?;
        let here = |attr: Attr| Place {
            parent: InodeNo::ROOT,
            name: Vec::new(),
            attr: Some(attr),
            path: path.to_vec(),
        };
        let mut place = here(root);
        let mut todo: VecDeque<Vec<u8>> = components(path);
        // "name/" names a directory, as in the kernel.
        let directory = path.ends_with(b"/");
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            let Some(attr) = place.attr.as_ref() else { return Err(missing(path)) };
            let parent = InodeNo(attr.ino);
            let found = match self.client.lookup(&self.cred, parent, &name).await {
                Ok(found) => Some(found),
                Err(error) if error.code == ErrorCode::ErrorNotFound => None,
                Err(error) => return Err(CliError::failed(shown(), reason(&error))),
            };
            let follow = last == Last::Follow || directory || !todo.is_empty();
            if let Some(link) = found.as_ref().filter(|found| found.kind() == Kind::Symlink && follow) {
                links += 1;
                if links > SYMLINKS_MAX {
                    return Err(CliError::failed(shown(), reason(&ErrorCode::ErrorLoop.into())));
                }
                let target = self.client.readlink(InodeNo(link.ino)).await.about(shown())?;
                if target.starts_with(b"/") {
                    place = here(root);
                }
                for component in components(&target).into_iter().rev() {
                    todo.push_front(component);
                }
                continue;
            }
            place = Place { parent, name, attr: found, path: path.to_vec() };
        }
        if directory && place.attr.as_ref().is_some_and(|attr| attr.kind() != Kind::Dir) {
            return Err(CliError::failed(shown(), reason(&ErrorCode::ErrorNotDir.into())));
        }
        Ok(place)
    }

    /// What is at a path.
    pub async fn existing(&self, path: &[u8], last: Last) -> Result<(Place, Attr)> {
        let place = self.walk(path, last).await?;
        let attr = *place.existing()?;
        Ok((place, attr))
    }

    /// Where something named `name` goes when the user says `target`: into it if it is a directory, else there.
    pub async fn destination(&self, target: &[u8], name: &[u8]) -> Result<Place> {
        let place = self.walk(target, Last::Follow).await?;
        if place.is_dir() {
            return self.walk(&join(target, name), Last::Follow).await;
        }
        if target.ends_with(b"/") {
            return Err(missing(target));
        }
        Ok(place)
    }

    /// Everything in a directory with its attributes, sorted by name.
    pub async fn list(&self, ino: InodeNo, path: &[u8]) -> Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        let mut cookie = 0;
        loop {
            let page = self
                .client
                .read_dir(&self.cred, ino, cookie, limits::DIR_PAGE_MAX, true)
                .await
                .about(format::name(path))?;
            // A page without entries that claims not to be the end must not become a loop without end.
            let Some(last) = page.entries.last() else { break };
            cookie = last.cookie;
            entries.extend(page.entries);
            if page.end {
                break;
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }
}

/// The names in a path; "." and empty ones left out.
pub fn components(path: &[u8]) -> VecDeque<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .map(<[u8]>::to_vec)
        .collect()
}

/// The last name of a path; `None` for the root and what ends with "..".
pub fn base_name(path: &[u8]) -> Option<Vec<u8>> {
    components(path).pop_back().filter(|name| name.as_slice() != b"..")
}

/// A path below another.
pub fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = directory.to_vec();
    if !path.ends_with(b"/") {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

fn process_cred() -> Cred {
    let mut groups: Vec<libc::gid_t> = vec![0; limits::GROUPS_MAX];
    // SAFETY: `groups` has room for as many as the length says; the calls cannot fail otherwise and keep nothing.
    let (uid, gid, count) = unsafe {
        let room = libc::c_int::try_from(groups.len()).unwrap_or(libc::c_int::MAX);
        (libc::geteuid(), libc::getegid(), libc::getgroups(room, groups.as_mut_ptr()))
    };
    groups.truncate(usize::try_from(count).unwrap_or(0));
    Cred { uid, gid, groups }
}

fn process_umask() -> u32 {
    // SAFETY: umask cannot fail. It can only be read by setting it; no file is made by another thread in between,
    // because this runs before any transfer starts.
    unsafe {
        let mask = libc::umask(0o077);
        libc::umask(mask);
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_come_apart_and_together() {
        assert_eq!(components(b"//a/./b//"), [b"a".to_vec(), b"b".to_vec()]);
        assert_eq!(base_name(b"/a/b/"), Some(b"b".to_vec()));
        assert_eq!(base_name(b"/"), None);
        assert_eq!(base_name(b"a/.."), None);
        assert_eq!(join(b"/", b"a"), b"/a");
        assert_eq!(join(b"/a", b"b"), b"/a/b");
    }
}
