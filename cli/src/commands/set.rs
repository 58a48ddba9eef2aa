//! `dfs set`

use super::{Context, Each};
use crate::Result;
use crate::error::About;
use crate::format;
use crate::remote::{Last, Remote, join};
use dfs_client::InodeNo;
use dfs_client::v1::{Kind, SetAttr};
use dfs_proto::limits::REPLICAS_MAX;
use dfs_proto::units::parse_bytes;
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

#[derive(clap::Args, Debug)]
#[command(group(clap::ArgGroup::new("what").required(true).multiple(true).args(["replicas", "chunk_size"])))]
pub struct Args {
    /// Copies of every byte, those included that are there already: repair makes and removes them afterwards, in the background.
    /// `default`: as many as the cluster's default. What several files share has as many as the one wants that wants most
    #[arg(long, value_name = "N", value_parser = replicas)]
    replicas: Option<u32>,
    /// Bytes of each chunk that is written from now on, as 64MiB; `default`: the cluster's default
    #[arg(long, value_name = "SIZE", value_parser = chunk_size)]
    chunk_size: Option<u64>,
    /// Directories, and everything below them
    #[arg(short, long)]
    recursive: bool,
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
}

fn replicas(text: &str) -> std::result::Result<u32, String> {
    match text.parse() {
        _ if text == "default" => Ok(0),
        Ok(number) if (1..=REPLICAS_MAX).contains(&number) => Ok(number),
        _ => Err(format!("a number from 1 to {REPLICAS_MAX} or 'default' is wanted")),
    }
}

fn chunk_size(text: &str) -> std::result::Result<u64, String> {
    match parse_bytes(text) {
        _ if text == "default" => Ok(0),
        Ok(0) => Err("a chunk of 0 bytes holds nothing".to_owned()),
        Ok(size) => Ok(size),
        Err(error) => Err(error.to_string()),
    }
}

pub async fn run(context: &Context, args: Args) -> Result {
    context
        .with_remote(async |remote| {
            let (mut each, mut count) = (Each::new(), 0_u64);
            for path in &args.paths {
                let path = path.as_bytes();
                let Some((_, attr)) = each.note(remote.existing(path, Last::Follow).await)? else { continue };
                let mut left = vec![(InodeNo(attr.ino), attr.kind(), path.to_vec())];
                while let Some((ino, kind, path)) = left.pop() {
                    if matches!(kind, Kind::File | Kind::Dir) {
                        let done = change(remote, ino, &path, &args).await;
                        count += u64::from(each.note(done)?.is_some());
                    }
                    if args.recursive && kind == Kind::Dir {
                        left.extend(each.note(below(remote, ino, &path).await)?.unwrap_or_default());
                    }
                }
            }
            if context.output.json {
                context.output.value(&json!({ "changed": count }))?;
            }
            each.end()
        })
        .await
}

async fn change(remote: &Remote, ino: InodeNo, path: &[u8], args: &Args) -> Result {
    let Args { replicas, chunk_size, .. } = *args;
    let change = SetAttr { ino: ino.get(), replicas, chunk_size, ..SetAttr::default() };
    remote.client.setattr(&remote.cred, change).await.about(format::name(path)).map(drop)
}

/// What is in a directory.
async fn below(remote: &Remote, ino: InodeNo, path: &[u8]) -> Result<Vec<(InodeNo, Kind, Vec<u8>)>> {
    let entries = remote.list(ino, path).await?;
    let entries = entries.into_iter().filter_map(|entry| {
        let attr = entry.attr?;
        Some((InodeNo(attr.ino), attr.kind(), join(path, &entry.name)))
    });
    Ok(entries.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_numbers_sizes_or_the_default() {
        assert_eq!((replicas("2"), replicas("default")), (Ok(2), Ok(0)));
        assert!(replicas("0").is_err() && replicas("10").is_err() && replicas("two").is_err());
        assert_eq!((chunk_size("1MiB"), chunk_size("default")), (Ok(1 << 20), Ok(0)));
        assert!(chunk_size("0").is_err() && chunk_size("large").is_err());
    }
}
