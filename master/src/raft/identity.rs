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
}

const FORMAT: u32 = 1;
const ROLE: &str = "master";

/// Takes a data directory, made when missing, for one master of one cluster. It stays locked while the file lives. A new
/// one is noted as that of a joining master when there are others to join.
///
/// # Errors
/// `Usage` when it belongs to somebody else, `Failed` when another process uses it or it cannot be worked with.
pub fn claim(dir: &Path, cluster: &str, node: u64, others: bool) -> Result<fs::File, StartError> {
    let failed =
        |what: &str, error: io::Error| StartError::Failed(format!("{what} {}: {error}", dir.display()));
    fs::create_dir_all(dir).map_err(|error| failed("cannot make the data directory", error))?;
    let lock = fs::OpenOptions::new().create(true).append(true).open(dir.join("LOCK"));
    let lock = lock.map_err(|error| failed("cannot write to the data directory", error))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            return Err(StartError::Failed(format!("{} is in use by another process", dir.display())));
        }
        Err(fs::TryLockError::Error(error)) => return Err(failed("cannot lock the data directory", error)),
    }
    let path = dir.join("IDENTITY");
    match fs::read_to_string(&path) {
        Ok(text) => check(&text, cluster, node)
            .map_err(|reason| StartError::Usage(format!("data directory {}: {reason}", dir.display())))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(name) =
                foreign(dir).map_err(|error| failed("cannot read the data directory", error))?
            {
                return Err(StartError::Usage(format!(
                    "data directory {}: it has no IDENTITY but holds {name}: refusing to use it",
                    dir.display()
                )));
            }
            if others {
                Joining::begin(dir).map_err(|error| failed("cannot write to the data directory", error))?;
            }
            let identity =
                Identity { format: FORMAT, cluster: cluster.to_owned(), node, role: ROLE.to_owned() };
            let text = toml::to_string(&identity).map_err(|error| StartError::Failed(error.to_string()))?;
            replace_file(&path, text.as_bytes())
                .map_err(|error| failed("cannot write IDENTITY into the data directory", error))?;
        }
        Err(error) => return Err(failed("cannot read IDENTITY in the data directory", error)),
    }
    Ok(lock)
}

fn check(text: &str, cluster: &str, node: u64) -> Result<(), String> {
    let found: Identity = toml::from_str(text)
        .map_err(|error| format!("its IDENTITY is damaged: {}", error.message().replace('\n', " ")))?;
    if found.format != FORMAT {
        Err(format!("it has format {}, this program knows {FORMAT}", found.format))
    } else if found.cluster != cluster {
        Err(format!("it belongs to cluster {}, the cluster key is that of {cluster}", found.cluster))
    } else if found.role != ROLE {
        Err(format!("it belongs to a {}, not to a {ROLE}", found.role))
    } else if found.node != node {
        Err(format!("it belongs to master {}, this is master {node}", found.node))
    } else {
        Ok(())
    }
}

/// Something in the directory that a new data directory does not have.
fn foreign(dir: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if name != "LOCK" && name != "lost+found" && name != "IDENTITY.tmp" && !Joining::is_note(&name) {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(result: Result<fs::File, StartError>) -> String {
        match result {
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
        drop(claim(&dir, "c1", 1, false).unwrap());
        assert!(usage(claim(&dir, "c2", 1, false)).contains("belongs to cluster c1"));
        assert!(usage(claim(&dir, "c1", 2, false)).contains("belongs to master 1"));
        let text = fs::read_to_string(dir.join("IDENTITY")).unwrap();
        fs::write(dir.join("IDENTITY"), text.replace("master", "chunkd")).unwrap();
        assert!(usage(claim(&dir, "c1", 1, false)).contains("belongs to a chunkd"));
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
