//! `dfs get`

use super::{Context, Each};
use crate::Result;
use crate::error::{About, CliError};
use crate::format;
use crate::remote::{Last, Remote, base_name};
use crate::transfer::download::Download;
use crate::transfer::{Options, Progress};
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Files or directories; of several the last is the local target
    #[arg(required = true, value_name = "REMOTE… [LOCAL]")]
    paths: Vec<OsString>,
    /// Directories with everything in them
    #[arg(short, long)]
    recursive: bool,
    /// Keep modes and modification times
    #[arg(short, long)]
    preserve: bool,
    /// Leave files that are there as they are
    #[arg(short, long)]
    no_clobber: bool,
}

pub async fn run(context: &Context, args: Args) -> Result {
    let mut paths: Vec<Vec<u8>> = args.paths.into_iter().map(OsStringExt::into_vec).collect();
    let target = match paths.len() {
        1 => PathBuf::from("."),
        _ => PathBuf::from(OsString::from_vec(paths.pop().unwrap_or_default())),
    };
    let pipe = target.as_os_str() == "-";
    if pipe && (paths.len() > 1 || args.recursive) {
        return Err(CliError::Usage("get: only one file can go to standard output".to_owned()));
    }
    if paths.len() > 1 && !target.is_dir() {
        return Err(CliError::failed(target.display(), "several sources need an existing directory"));
    }
    let options =
        Options { recursive: args.recursive, preserve: args.preserve, keep_existing: args.no_clobber };
    context
        .with_remote(async |remote| {
            let download = Download {
                remote: remote.clone(),
                env: context.env.clone(),
                options,
                progress: Progress::new(context.output, Some(0)).about("catching signals")?,
            };
            let mut each = Each::new();
            for path in &paths {
                each.note(one(remote, &download, path, &target, pipe).await)?;
            }
            download.progress.bar.finish_and_clear();
            let (files, bytes, errors) = download.progress.counts();
            let failed = each.failed || errors > 0;
            if !pipe {
                context.output.summary(
                    &json!({"files": files, "bytes": bytes, "ok": !failed}),
                    &format!("got {files} file(s), {}", format::size(bytes)),
                )?;
            }
            if failed { Err(CliError::Reported) } else { Ok(()) }
        })
        .await
}

async fn one(remote: &Remote, download: &Download, path: &[u8], target: &Path, pipe: bool) -> Result {
    let (_, attr) = remote.existing(path, Last::Follow).await?;
    download.progress.bar.set_message(format::name(path));
    download.progress.bar.inc_length(attr.size);
    if pipe {
        return download.stream(path, &attr, &mut tokio::io::stdout()).await;
    }
    let local = match (target.is_dir(), base_name(path)) {
        (true, Some(name)) => target.join(OsStr::from_bytes(&name)),
        _ => target.to_owned(),
    };
    download.path(path, &attr, &local).await
}
