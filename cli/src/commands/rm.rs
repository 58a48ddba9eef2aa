//! `dfs rm`

use super::{Context, Each};
use crate::Result;
use crate::error::{About, CliError};
use crate::format;
use crate::remote::{Last, Remote, base_name, join};
use dfs_client::v1::Kind;
use dfs_client::{FsResult, InodeNo};
use dfs_proto::error::ErrorCode;
use futures::StreamExt;
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

/// How many names of one directory are removed at a time.
const AT_ONCE: usize = 64;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
    /// Directories with everything in them
    #[arg(short, long)]
    recursive: bool,
    /// What is not there is no error
    #[arg(short, long)]
    force: bool,
}

pub async fn run(context: &Context, args: Args) -> Result {
    context
        .with_remote(async |remote| {
            let (mut each, mut removed) = (Each::new(), 0);
            for path in &args.paths {
                each.note(one(remote, path.as_bytes(), &args, &mut removed).await)?;
            }
            context.output.summary(&json!({"removed": removed}), &format!("removed {removed}"))?;
            each.end()
        })
        .await
}

async fn one(remote: &Remote, path: &[u8], args: &Args, removed: &mut u64) -> Result {
    if base_name(path).is_none() {
        return Err(CliError::failed(
            format::name(path),
            "refusing to remove a directory above everything else",
        ));
    }
    let place = remote.walk(path, Last::Keep).await?;
    let Some(attr) = &place.attr else {
        return if args.force { Ok(()) } else { place.existing().map(drop) };
    };
    if attr.kind() != Kind::Dir {
        remote.client.unlink(&remote.cred, place.parent, &place.name).await.about(place.shown())?;
    } else if args.recursive {
        empty(remote, InodeNo(attr.ino), path.to_vec(), removed).await?;
        remote.client.rmdir(&remote.cred, place.parent, &place.name).await.about(place.shown())?;
    } else {
        return Err(CliError::failed(place.shown(), "Is a directory (-r removes it)"));
    }
    *removed += 1;
    Ok(())
}

/// Removes everything in a directory. An error does not keep the rest from being removed.
async fn empty(remote: &Remote, ino: InodeNo, path: Vec<u8>, removed: &mut u64) -> Result {
    let mut each = Each::new();
    let entries = remote.list(ino, &path).await?;
    let (directories, others): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|entry| entry.kind() == Kind::Dir);
    for entry in directories {
        let below = join(&path, &entry.name);
        if each.note(Box::pin(empty(remote, InodeNo(entry.ino), below.clone(), removed)).await)?.is_some() {
            let result = gone(remote.client.rmdir(&remote.cred, ino, &entry.name).await);
            *removed += u64::from(each.note(result.about(format::name(&below)))?.is_some());
        }
    }
    let mut results =
        futures::stream::iter(others)
            .map(|entry| async move {
                (gone(remote.client.unlink(&remote.cred, ino, &entry.name).await), entry.name)
            })
            .buffer_unordered(AT_ONCE);
    while let Some((result, name)) = results.next().await {
        let shown = format::name(&join(&path, &name));
        *removed += u64::from(each.note(result.about(shown))?.is_some());
    }
    each.end()
}

/// What somebody else has removed already is removed.
fn gone(result: FsResult<()>) -> FsResult<()> {
    match result {
        Err(error) if error.code == ErrorCode::ErrorNotFound => Ok(()),
        result => result,
    }
}
