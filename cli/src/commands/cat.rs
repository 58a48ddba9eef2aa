//! `dfs cat`

use super::{Context, Each};
use crate::Result;
use crate::error::About;
use crate::output::Output;
use crate::remote::Last;
use crate::transfer::download::Download;
use crate::transfer::{Options, Progress};
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(required = true, value_name = "FILE")]
    files: Vec<OsString>,
}

pub async fn run(context: &Context, args: Args) -> Result {
    context
        .with_remote(async |remote| {
            let download = Download {
                remote: remote.clone(),
                env: context.env.clone(),
                options: Options { recursive: false, preserve: false, keep_existing: false },
                // No bar: it would run through the text.
                progress: Progress::new(Output { quiet: true, ..context.output }, None)
                    .about("catching signals")?,
            };
            let mut output = tokio::io::stdout();
            let mut each = Each::new();
            for file in &args.files {
                let path = file.as_bytes();
                let result = match remote.existing(path, Last::Follow).await {
                    Ok((_, attr)) => download.stream(path, &attr, &mut output).await,
                    Err(error) => Err(error),
                };
                each.note(result)?;
            }
            each.end()
        })
        .await
}
