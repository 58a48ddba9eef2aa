//! `dfs tree`

use super::Context;
use super::ls::nested;
use crate::Result;
use crate::error::CliError;
use crate::format;
use crate::remote::{Last, Remote, join};
use dfs_client::InodeNo;
use dfs_client::v1::{Attr, Kind};
use serde_json::Value;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

/// How deep a tree is shown at most: a bound for the stack.
const DEPTH_MAX: u32 = 512;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(value_name = "PATH", default_value = "/")]
    path: OsString,
    /// How many levels to show
    #[arg(short = 'L', long, value_name = "LEVELS", value_parser = clap::value_parser!(u32).range(1..=i64::from(DEPTH_MAX)))]
    level: Option<u32>,
    /// Directories only
    #[arg(short, long)]
    directories: bool,
    /// Names that begin with a dot, too
    #[arg(short, long)]
    all: bool,
    /// Sizes
    #[arg(short, long)]
    sizes: bool,
}

struct Walk<'a> {
    context: &'a Context,
    remote: &'a Remote,
    args: &'a Args,
    directories: u64,
    files: u64,
    failed: bool,
}

pub async fn run(context: &Context, args: Args) -> Result {
    context
        .with_remote(async |remote| {
            let path = args.path.as_bytes();
            let (_, attr) = remote.existing(path, Last::Follow).await?;
            let mut walk = Walk { context, remote, args: &args, directories: 0, files: 0, failed: false };
            if !context.output.json {
                context.output.text(&format!("{}\n", format::name(path)))?;
            }
            let value = walk.below(path.to_vec(), attr, String::new(), 1).await?;
            if context.output.json {
                context.output.value(&value)?;
            } else {
                context
                    .output
                    .text(&format!("\n{} directories, {} files\n", walk.directories, walk.files))?;
            }
            if walk.failed { Err(CliError::Reported) } else { Ok(()) }
        })
        .await
}

impl Walk<'_> {
    async fn below(&mut self, path: Vec<u8>, attr: Attr, indent: String, level: u32) -> Result<Value> {
        if attr.kind() != Kind::Dir || level > self.args.level.unwrap_or(DEPTH_MAX) {
            return Ok(nested(&path, &attr, &[]));
        }
        let mut entries = match self.remote.list(InodeNo(attr.ino), &path).await {
            Ok(entries) => entries,
            Err(CliError::Failed(line)) => {
                eprintln!("dfs: {line}");
                self.failed = true;
                return Ok(nested(&path, &attr, &[]));
            }
            Err(error) => return Err(error),
        };
        entries.retain(|entry| {
            (self.args.all || !entry.name.starts_with(b"."))
                && (!self.args.directories || entry.kind() == Kind::Dir)
        });
        let mut children = Vec::new();
        let count = entries.len();
        for (index, entry) in entries.into_iter().enumerate() {
            let Some(attr) = entry.attr else { continue };
            let last = index + 1 == count;
            if attr.kind() == Kind::Dir {
                self.directories += 1;
            } else {
                self.files += 1;
            }
            if !self.context.output.json {
                let branch = if last { "└── " } else { "├── " };
                let size = if self.args.sizes {
                    format!("[{:>5}]  ", format::size(attr.size))
                } else {
                    String::new()
                };
                self.context
                    .output
                    .text(&format!("{indent}{branch}{size}{}\n", format::name(&entry.name)))?;
            }
            let deeper = format!("{indent}{}", if last { "    " } else { "│   " });
            let child = Box::pin(self.below(join(&path, &entry.name), attr, deeper, level + 1)).await?;
            // The tree of values is for JSON only: a listing of millions need not be kept.
            if self.context.output.json {
                children.push(child);
            }
        }
        Ok(nested(&path, &attr, &children))
    }
}
