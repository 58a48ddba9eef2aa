//! Whose data directory it is: a lock against a second process, and the file `IDENTITY` against a mix-up.

use super::StartError;
use super::joining::Joining;
use super::sled_kv::replace_file;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::Path;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    format: u32,
    cluster: String,
    node: u64,
    role: String,
    /// Which restore or recovery began this master's Raft group, in milliseconds since 1970; 0: none. Masters of different
    /// groups have different histories and must not talk.
    #[serde(default, skip_serializing_if = "is_formed")]
    group: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_formed(group: &u64) -> bool {
    *group == 0
}

const FORMAT: u32 = 1;
const ROLE: &str = "master";

/// A data directory that is this master's.
pub struct Claimed {
    /// Keeps other processes out while it lives.
    pub lock: fs::File,
    /// See [`Identity::group`].
    pub group: u64,
}

/// The file with what will be IDENTITY once a restore is complete.
pub const RESTORING: &str = "RESTORING";

fn failed(dir: &Path, what: &str, error: &io::Error) -> StartError {
    StartError::Failed(format!("{what} {}: {error}", dir.display()))
}

/// Keeps every other process out of a data directory, made when missing.
///
/// # Errors
/// `Failed` when another process uses it or it cannot be worked with.
pub fn lock(dir: &Path) -> Result<fs::File, StartError> {
    fs::create_dir_all(dir).map_err(|error| failed(dir, "cannot make the data directory", &error))?;
    let lock = fs::OpenOptions::new().create(true).append(true).open(dir.join("LOCK"));
    let lock = lock.map_err(|error| failed(dir, "cannot write to the data directory", &error))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(fs::TryLockError::WouldBlock) => {
            Err(StartError::Failed(format!("{} is in use by another process", dir.display())))
        }
        Err(fs::TryLockError::Error(error)) => Err(failed(dir, "cannot lock the data directory", &error)),
    }
}

/// The text of a new identity.
///
/// # Errors
/// `Failed` when it cannot be made.
pub fn text(cluster: &str, node: u64, group: u64) -> Result<String, StartError> {
    let identity =
        Identity { format: FORMAT, cluster: cluster.to_owned(), node, role: ROLE.to_owned(), group };
    toml::to_string(&identity).map_err(|error| StartError::Failed(error.to_string()))
}

/// Takes a data directory, made when missing, for one master of one cluster. It stays locked while the lock lives. A new
/// one is noted as that of a joining master when there are others to join.
///
/// # Errors
/// `Usage` when it belongs to somebody else, `Failed` when another process uses it or it cannot be worked with.
pub fn claim(dir: &Path, cluster: &str, node: u64, others: bool) -> Result<Claimed, StartError> {
    let lock = lock(dir)?;
    let path = dir.join("IDENTITY");
    let group = match fs::read_to_string(&path) {
        Ok(text) => check(&text, cluster, node)
            .map_err(|reason| StartError::Usage(format!("data directory {}: {reason}", dir.display())))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            refuse_foreign(dir)?;
            if others {
                Joining::begin(dir)
                    .map_err(|error| failed(dir, "cannot write to the data directory", &error))?;
            }
            replace_file(&path, text(cluster, node, 0)?.as_bytes())
                .map_err(|error| failed(dir, "cannot write IDENTITY into the data directory", &error))?;
            0
        }
        // What was written as text and is none any more was changed by the medium, or is somebody else's.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(StartError::Usage(format!(
                "data directory {}: its IDENTITY is damaged: not text",
                dir.display()
            )));
        }
        Err(error) => return Err(failed(dir, "cannot read IDENTITY in the data directory", &error)),
    };
    Ok(Claimed { lock, group })
}

/// Notes that a directory is of a group that began with a restore or a recovery.
///
/// # Errors
/// When it cannot be written.
pub fn set_group(dir: &Path, group: u64) -> io::Result<()> {
    let path = dir.join("IDENTITY");
    let mut identity: Identity = toml::from_str(&fs::read_to_string(&path)?).map_err(io::Error::other)?;
    identity.group = group;
    replace_file(&path, toml::to_string(&identity).map_err(io::Error::other)?.as_bytes())
}

/// The identity's group, if it is this master's.
fn check(text: &str, cluster: &str, node: u64) -> Result<u64, String> {
    // The format first: a later one may have keys that this program does not know.
    let format = toml::from_str::<toml::Table>(text).ok().and_then(|keys| keys.get("format")?.as_integer());
    if let Some(format) = format.filter(|format| *format != i64::from(FORMAT)) {
        return Err(format!("it has format {format}, this program knows {FORMAT}"));
    }
    let found: Identity = toml::from_str(text)
        .map_err(|error| format!("its IDENTITY is damaged: {}", error.message().replace('\n', " ")))?;
    if found.cluster != cluster {
        Err(format!("it belongs to cluster {}, the cluster key is that of {cluster}", found.cluster))
    } else if found.role != ROLE {
        Err(format!("it belongs to a {}, not to a {ROLE}", found.role))
    } else if found.node != node {
        Err(format!("it belongs to master {}, this is master {node}", found.node))
    } else {
        Ok(found.group)
    }
}

/// Refuses a directory without an identity in which there is anything.
///
/// # Errors
/// `Usage` when there is, `Failed` when it cannot be read.
pub fn refuse_foreign(dir: &Path) -> Result<(), StartError> {
    if dir.join(super::survivor::RECOVERY).exists() {
        let why = "a recovery in it did not come to its end: repeat it";
        return Err(StartError::Usage(format!("data directory {}: {why}", dir.display())));
    }
    let found = foreign(dir).map_err(|error| failed(dir, "cannot read the data directory", &error))?;
    let Some(name) = found else { return Ok(()) };
    let why = if dir.join(RESTORING).exists() {
        "a restore into it did not come to its end: repeat it".to_owned()
    } else {
        format!("it has no IDENTITY but holds {name}: refusing to use it")
    };
    Err(StartError::Usage(format!("data directory {}: {why}", dir.display())))
}

/// Something in the directory that a new data directory does not have.
pub fn foreign(dir: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let of_a_recovery = name == super::survivor::RECOVERY || name == super::survivor::BEFORE;
        let harmless = name == "LOCK" || name == "lost+found" || name == "IDENTITY.tmp" || of_a_recovery;
        if !harmless && !Joining::is_note(&name) {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(result: Result<Claimed, StartError>) -> String {
        match result.map(|claimed| claimed.group) {
            Err(StartError::Usage(line)) if !line.contains('\n') => line,
            other => panic!("expected one line about wrong use, got {other:?}"),
        }
    }

    #[test]
    fn a_directory_is_for_one_master_of_one_cluster_and_one_process() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("a/b");
        let lock = claim(&dir, "c1", 1, false).unwrap();
        let busy = claim(&dir, "c1", 1, false);
        assert!(matches!(busy, Err(StartError::Failed(line)) if line.contains("in use by another process")));
        drop(lock);
        assert_eq!(claim(&dir, "c1", 1, false).unwrap().group, 0);
        set_group(&dir, 7).unwrap();
        assert_eq!(claim(&dir, "c1", 1, false).unwrap().group, 7);
        assert!(usage(claim(&dir, "c2", 1, false)).contains("belongs to cluster c1"));
        assert!(usage(claim(&dir, "c1", 2, false)).contains("belongs to master 1"));
        let text = fs::read_to_string(dir.join("IDENTITY")).unwrap();
        fs::write(dir.join("IDENTITY"), text.replace("master", "chunkd")).unwrap();
        assert!(usage(claim(&dir, "c1", 1, false)).contains("belongs to a chunkd"));
        fs::write(dir.join("IDENTITY"), text.replace("format = 1", "format = 2\nnew = true")).unwrap();
        assert!(usage(claim(&dir, "c1", 1, false)).contains("format 2, this program knows 1"));
        fs::write(dir.join("IDENTITY"), "format = ").unwrap();
        assert!(usage(claim(&dir, "c1", 1, false)).contains("damaged"));
    }

    #[test]
    fn a_directory_with_other_things_in_it_is_refused() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("thesis.txt"), "").unwrap();
        assert!(usage(claim(home.path(), "c1", 1, false)).contains("thesis.txt"));
    }
}
