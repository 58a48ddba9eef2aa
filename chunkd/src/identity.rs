//! Whose data directories these are: IDENTITY, and the lock against a second daemon.

use crate::store::dirs::DataDir;
use crate::store::durable;
use crate::terms::Terms;
use dfs_env::Env;
use dfs_env::disk::Disk;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The format of data directories that this program knows.
const FORMAT: u32 = 1;
const ROLE: &str = "chunkd";

/// Why a daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// What it was given makes no sense: exit status 2.
    #[error("{0}")]
    Usage(String),
    /// It makes sense and did not work: exit status 1.
    #[error("{0}")]
    Failed(String),
}

/// The text of an IDENTITY file.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Identity {
    format: u32,
    cluster: String,
    node: u64,
    role: String,
}

/// Data directories that belong to this daemon and to no other process.
pub struct Claim {
    pub node: u64,
    pub dirs: Vec<Arc<DataDir>>,
    pub terms: Terms,
    /// Dropped last: the directories are free again.
    pub locks: Vec<Box<dyn Any + Send + Sync>>,
}

/// What one directory turned out to be.
enum Seen {
    Ours(u64),
    New,
    Failed(String),
}

/// Takes possession of the data directories; new ones get the node's identity. Blocks.
///
/// # Errors
/// Usage: a directory belongs to another cluster, node or kind of daemon, or holds chunks of nobody. Failed: another
/// process has it, or no directory can be used.
pub fn claim(env: &Env, paths: &[PathBuf], cluster: &str) -> Result<Claim, StartError> {
    let disk = &*env.disk;
    let mut locks = Vec::new();
    let mut seen = Vec::new();
    for path in paths {
        seen.push(look(disk, path, cluster, &mut locks)?);
    }
    let node = agree_on_node(env, paths, &seen)?;
    let mut dirs = Vec::new();
    for (path, seen) in paths.iter().zip(seen) {
        let failed = match seen {
            Seen::Failed(cause) => Some(cause),
            Seen::Ours(_) => durable::make_chunk_dirs(disk, path).err().map(|error| error.to_string()),
            Seen::New => begin(disk, path, cluster, node).err().map(|error| error.to_string()),
        };
        if let Some(cause) = &failed {
            tracing::error!(dir = %path.display(), cause, "this data directory is out of use");
        }
        dirs.push(DataDir::new(path.clone(), failed));
    }
    if dirs.iter().all(|dir| dir.failure().is_some()) {
        let causes: Vec<String> = dirs
            .iter()
            .map(|dir| format!("{}: {}", dir.path.display(), dir.failure().unwrap_or_default()))
            .collect();
        return Err(StartError::Failed(format!("no data directory can be used: {}", causes.join("; "))));
    }
    let terms = Terms::open(env.clone(), &dirs);
    Ok(Claim { node, dirs, terms, locks })
}

/// The directories that have an identity must have the same one; without any this daemon gets a new number.
fn agree_on_node(env: &Env, paths: &[PathBuf], seen: &[Seen]) -> Result<u64, StartError> {
    let mut node: Option<(u64, &Path)> = None;
    for (path, seen) in paths.iter().zip(seen) {
        let Seen::Ours(number) = seen else { continue };
        match node {
            Some((other, first)) if other != *number => {
                return Err(StartError::Usage(format!(
                    "{} belongs to node {number}, but {} to node {other}",
                    path.display(),
                    first.display()
                )));
            }
            _ => node = Some((*number, path)),
        }
    }
    // 48 bits: also a number in JSON and TOML, and never by chance the same in one cluster.
    Ok(node.map_or_else(|| (env.random() >> 16).max(1), |(node, _)| node))
}

fn look(
    disk: &dyn Disk,
    path: &Path,
    cluster: &str,
    locks: &mut Vec<Box<dyn Any + Send + Sync>>,
) -> Result<Seen, StartError> {
    if let Err(error) = disk.create_dir_all(path) {
        return Ok(Seen::Failed(error.to_string()));
    }
    match disk.lock(&path.join("LOCK")) {
        Ok(held) => locks.push(held),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            return Err(StartError::Failed(format!("{} is in use by another daemon", path.display())));
        }
        Err(error) => return Ok(Seen::Failed(error.to_string())),
    }
    let file = path.join("IDENTITY");
    let text = match disk.read(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return look_new(disk, path),
        Err(error) => return Ok(Seen::Failed(format!("IDENTITY: {error}"))),
    };
    let refuse = |what: String| Err(StartError::Usage(format!("{}: {what}", file.display())));
    let identity: Identity = match std::str::from_utf8(&text).map(toml::from_str) {
        Ok(Ok(identity)) => identity,
        _ => return refuse("this is no identity of a data directory".to_owned()),
    };
    if identity.format != FORMAT {
        return refuse(format!("format {}, this program knows format {FORMAT}", identity.format));
    }
    if identity.role != ROLE {
        return refuse(format!("this directory belongs to a {}, not to a {ROLE}", identity.role));
    }
    if identity.cluster != cluster {
        return refuse(format!(
            "this directory belongs to cluster {}, the cluster key is for {cluster}",
            identity.cluster
        ));
    }
    Ok(Seen::Ours(identity.node))
}

/// A directory without an identity must not hold chunks: whose would they be?
fn look_new(disk: &dyn Disk, path: &Path) -> Result<Seen, StartError> {
    for byte in 0..=255_u8 {
        let folder = path.join("chunks").join(format!("{byte:02x}"));
        match disk.list(&folder) {
            Ok(found) if found.is_empty() => {}
            Ok(_) => {
                let text = format!("{} holds chunks, but its IDENTITY is missing", path.display());
                return Err(StartError::Usage(text));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Ok(Seen::Failed(error.to_string())),
        }
    }
    Ok(Seen::New)
}

/// The directories for chunks first, the identity last: with it the directory is complete.
fn begin(disk: &dyn Disk, path: &Path, cluster: &str, node: u64) -> io::Result<()> {
    durable::make_chunk_dirs(disk, path)?;
    let identity = Identity { format: FORMAT, cluster: cluster.to_owned(), node, role: ROLE.to_owned() };
    let text = toml::to_string(&identity).map_err(io::Error::other)?;
    tracing::info!(dir = %path.display(), node, cluster, "a new data directory");
    durable::replace(disk, &path.join("IDENTITY"), text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(root: &Path, names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(|name| root.join(name)).collect()
    }

    fn refusal(env: &Env, paths: &[PathBuf], cluster: &str) -> (bool, String) {
        match claim(env, paths, cluster).map(|_| ()).expect_err("refused") {
            StartError::Usage(text) => (true, text),
            StartError::Failed(text) => (false, text),
        }
    }

    #[test]
    fn all_directories_get_one_identity_and_keep_it() {
        let (env, root) = (Env::real(), tempfile::tempdir().expect("temporary directory"));
        let both = dirs(root.path(), &["a", "b"]);
        let node = claim(&env, &both[..1], "c1").expect("new").node;
        assert!(node > 0 && node < 1 << 48);
        assert_eq!(claim(&env, &both, "c1").expect("one more").node, node);
        assert_eq!(claim(&env, &both[1..], "c1").expect("known").node, node);
    }

    #[test]
    fn what_belongs_to_others_is_refused_in_one_line() {
        let (env, root) = (Env::real(), tempfile::tempdir().expect("temporary directory"));
        let all = dirs(root.path(), &["a", "b", "m", "n", "o"]);
        claim(&env, &all[..1], "c1").expect("new");
        claim(&env, &all[1..2], "c1").expect("new");
        for (path, text) in [
            (&all[2], "format = 1\ncluster = \"c1\"\nnode = 1\nrole = \"master\"\n"),
            (&all[3], "format = 2\ncluster = \"c1\"\nnode = 1\nrole = \"chunkd\"\n"),
            (&all[4], "\0\0\0"),
        ] {
            env.disk.create_dir_all(path).expect("made");
            env.disk.replace(&path.join("IDENTITY"), text.as_bytes()).expect("written");
        }
        for (paths, cluster, word) in [
            (&all[..1], "c2", "cluster c1"),
            (&all[..2], "c1", "belongs to node"),
            (&all[2..3], "c1", "belongs to a master"),
            (&all[3..4], "c1", "format 2"),
            (&all[4..], "c1", "no identity"),
        ] {
            let (usage, text) = refusal(&env, paths, cluster);
            assert!(usage && text.contains(word) && !text.contains('\n'), "{text}");
        }
        std::fs::write(all[0].join("chunks/07/0000000000000007.chunk"), b"x").expect("written");
        std::fs::remove_file(all[0].join("IDENTITY")).expect("removed");
        assert!(refusal(&env, &all[..1], "c1").1.contains("IDENTITY is missing"));
    }

    #[test]
    fn a_second_daemon_is_kept_out() {
        let (env, root) = (Env::real(), tempfile::tempdir().expect("temporary directory"));
        let paths = dirs(root.path(), &["a"]);
        let held = claim(&env, &paths, "c1").expect("free");
        let (usage, text) = refusal(&env, &paths, "c1");
        assert!(!usage && text.contains("in use by another daemon"), "{text}");
        drop(held);
        claim(&env, &paths, "c1").expect("free again");
    }

    #[test]
    fn a_directory_that_cannot_be_used_does_not_stop_the_others() {
        let (env, root) = (Env::real(), tempfile::tempdir().expect("temporary directory"));
        let paths = dirs(root.path(), &["a", "file/b"]);
        std::fs::write(root.path().join("file"), b"").expect("written");
        let claim = super::claim(&env, &paths, "c1").expect("one is enough");
        assert!(claim.dirs[0].failure().is_none() && claim.dirs[1].failure().is_some());
        assert!(refusal(&env, &paths[1..], "c1").1.contains("no data directory"));
    }
}
