//! `dfs mv`

use super::{Context, Each};
use crate::Result;
use crate::error::{About, CliError};
use crate::format;
use crate::remote::{Last, Remote, base_name, join};
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<OsString>,
    /// An existing directory, or the new name of a single source
    target: OsString,
    /// Replace nothing
    #[arg(short, long)]
    no_clobber: bool,
}

pub async fn run(context: &Context, args: Args) -> Result {
    let target = args.target.into_vec();
    context
        .with_remote(async |remote| {
            let directory = remote.walk(&target, Last::Follow).await?.is_dir();
            if args.sources.len() > 1 && !directory {
                return Err(CliError::failed(
                    format::name(&target),
                    "several sources need an existing directory",
                ));
            }
            let (mut each, mut moved) = (Each::new(), 0);
            for source in args.sources {
                let source = source.into_vec();
                let result = one(remote, &source, &target, directory, args.no_clobber).await;
                moved += u64::from(each.note(result)?.is_some());
            }
            context.output.summary(&json!({"moved": moved}), &format!("moved {moved}"))?;
            each.end()
        })
        .await
}

async fn one(remote: &Remote, source: &[u8], target: &[u8], directory: bool, no_clobber: bool) -> Result {
    let from = remote.walk(source, Last::Keep).await?;
    from.existing()?;
    let Some(name) = base_name(source) else {
        return Err(CliError::failed(from.shown(), "cannot be moved"));
    };
    let to = if directory { join(target, &name) } else { target.to_vec() };
    // A trailing slash asks for a directory that is not there; the kernel allows it when a directory is moved.
    let end = to.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    if end < to.len() && !from.is_dir() {
        return Err(CliError::failed(format::name(&to), "Not a directory"));
    }
    let to = remote.walk(&to[..end], Last::Keep).await?;
    remote
        .client
        .rename(&remote.cred, from.parent, &from.name, to.parent, &to.name, no_clobber, false)
        .await
        .about(format!("{} to {}", from.shown(), to.shown()))
}
