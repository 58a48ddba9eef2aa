//! `dfs append`

use super::Context;
use crate::Result;
use crate::error::{About, CliError};
use crate::format;
use crate::remote::{Last, Remote};
use crate::transfer::upload::fill;
use crate::transfer::{Progress, STEP};
use dfs_client::v1::{Create, Kind};
use dfs_client::{InodeNo, OpenFile, OpenFlags, Privileges};
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::AsyncRead;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// A local file; - is standard input
    #[arg(value_name = "LOCAL")]
    source: OsString,
    /// The file to append to; made if it is not there
    #[arg(value_name = "REMOTE")]
    target: OsString,
}

pub async fn run(context: &Context, args: Args) -> Result {
    let mut input: Box<dyn AsyncRead + Unpin> = if args.source == "-" {
        Box::new(tokio::io::stdin())
    } else {
        let path = Path::new(&args.source);
        let file = tokio::fs::File::open(path).await.about(path.display())?;
        if file.metadata().await.about(path.display())?.is_dir() {
            return Err(CliError::failed(path.display(), "Is a directory"));
        }
        Box::new(file)
    };
    let path = args.target.as_bytes();
    context
        .with_remote(async |remote| {
            let progress = Progress::new(context.output, None).about("catching signals")?;
            let file = open(remote, path).await?;
            progress.bar.set_message(format::name(path));
            let work = async {
                let mut buffer = vec![0; STEP];
                let privileges = Privileges::of_writer(&remote.cred);
                loop {
                    let filled = fill(&mut input, &mut buffer).await.about(args.source.display())?;
                    if filled == 0 {
                        return remote.client.flush(&file).await.about(format::name(path));
                    }
                    remote
                        .client
                        .append(&file, &buffer[..filled], &privileges)
                        .await
                        .about(format::name(path))?;
                    progress.moved(filled as u64);
                }
            };
            let result = progress.stop.or(work).await;
            let released = remote.client.release(file).await.about(format::name(path));
            progress.bar.finish_and_clear();
            result?;
            released?;
            let (_, bytes, _) = progress.counts();
            context.output.summary(
                &json!({"path": format::name_json(path), "bytes": bytes}),
                &format!("appended {}", format::size(bytes)),
            )
        })
        .await
}

async fn open(remote: &Remote, path: &[u8]) -> Result<Arc<OpenFile>> {
    let flags = OpenFlags { write: true, append: true, ..OpenFlags::default() };
    let place = remote.walk(path, Last::Follow).await?;
    let shown = place.shown();
    match &place.attr {
        Some(attr) if attr.kind() == Kind::File => {
            remote.client.open(&remote.cred, InodeNo(attr.ino), flags).await.about(shown)
        }
        Some(attr) => Err(CliError::failed(shown, format!("is a {}, not a file", format::kind(attr.kind())))),
        None => {
            let what = Create {
                parent: place.parent.get(),
                name: place.name.into(),
                kind: Kind::File.into(),
                mode: 0o666,
                umask: remote.umask,
                ..Create::default()
            };
            let (_, file) = remote.client.create_open(&remote.cred, what, flags).await.about(shown)?;
            Ok(file)
        }
    }
}
