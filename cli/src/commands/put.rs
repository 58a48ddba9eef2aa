//! `dfs put`

use super::{Context, Each};
use crate::Result;
use crate::error::{About, CliError};
use crate::format;
use crate::remote::{Remote, base_name};
use crate::transfer::upload::Upload;
use crate::transfer::{Options, Progress};
use serde_json::json;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Local files or directories; - is standard input
    #[arg(required = true, value_name = "LOCAL")]
    sources: Vec<OsString>,
    /// Where they go: an existing directory, or the new name of a single one
    #[arg(value_name = "REMOTE")]
    target: OsString,
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
    let sources: Vec<PathBuf> = args.sources.iter().map(PathBuf::from).collect();
    let pipe = sources.iter().any(|source| source.as_os_str() == "-");
    if pipe && sources.len() > 1 {
        return Err(CliError::Usage("put: - cannot be mixed with other sources".to_owned()));
    }
    let total = if pipe { None } else { Some(sources.iter().map(|source| size_of(source)).sum()) };
    let options =
        Options { recursive: args.recursive, preserve: args.preserve, keep_existing: args.no_clobber };
    context
        .with_remote(async |remote| {
            let upload = Upload {
                remote: remote.clone(),
                env: context.env.clone(),
                options,
                progress: Progress::new(context.output, total).about("catching signals")?,
            };
            let result = put_all(remote, &upload, &sources, &args.target.into_vec()).await;
            upload.progress.bar.finish_and_clear();
            let (files, bytes, errors) = upload.progress.counts();
            if matches!(result, Err(CliError::Interrupted | CliError::Usage(_))) {
                return result;
            }
            context.output.summary(
                &json!({"files": files, "bytes": bytes, "ok": result.is_ok() && errors == 0}),
                &format!("put {files} file(s), {}", format::size(bytes)),
            )?;
            result?;
            if errors > 0 { Err(CliError::Reported) } else { Ok(()) }
        })
        .await
}

async fn put_all(remote: &Remote, upload: &Upload, sources: &[PathBuf], target: &[u8]) -> Result {
    if sources.len() > 1 && !remote.walk(target, crate::remote::Last::Follow).await?.is_dir() {
        return Err(CliError::failed(format::name(target), "several sources need an existing directory"));
    }
    if sources[0].as_os_str() == "-" {
        let place = remote.walk(target, crate::remote::Last::Follow).await?;
        return upload.stream(tokio::io::stdin(), &place, 0o666).await;
    }
    let mut each = Each::new();
    for source in sources {
        upload.progress.bar.set_message(source.display().to_string());
        let result = match name_of(source) {
            Ok(name) => match remote.destination(target, &name).await {
                Ok(place) => upload.path(source, place).await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        each.note(result)?;
    }
    each.end()
}

/// The last name of a local path, "." and ".." resolved.
fn name_of(source: &Path) -> Result<Vec<u8>> {
    if let Some(name) = base_name(source.as_os_str().as_bytes()) {
        return Ok(name);
    }
    let full = source.canonicalize().about(source.display())?;
    Ok(full.file_name().map(OsStr::as_bytes).unwrap_or_default().to_vec())
}

/// The bytes of a file or of everything below a directory, for the progress bar; what cannot be read counts nothing.
fn size_of(path: &Path) -> u64 {
    let mut total = 0;
    let mut todo = vec![path.to_owned()];
    while let Some(path) = todo.pop() {
        let Ok(meta) = std::fs::symlink_metadata(&path) else { continue };
        if meta.is_dir() {
            let Ok(entries) = std::fs::read_dir(&path) else { continue };
            todo.extend(entries.filter_map(|entry| entry.ok().map(|entry| entry.path())));
        } else if meta.is_file() {
            total += meta.len();
        }
    }
    total
}
