//! `dfs fsck`

use super::Context;
use super::leader::KeyFile;
use crate::Result;
use crate::error::CliError;
use dfs_client::v1::{FsckReply, FsckRequest};
use serde_json::json;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Have the chunk daemons read every byte of their replicas, not only say that they are there
    #[arg(long)]
    deep: bool,
    /// Mend what can be mended; what is left is told, and is a failure
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    key: KeyFile,
}

/// Checks the whole cluster while it works. Fails when anything is wrong (with `--repair`: is still wrong), or could not be checked.
pub async fn run(context: &Context, args: Args) -> Result {
    let (deep, repair) = (args.deep, args.repair);
    let purpose = if repair { "fsck repair" } else { "fsck" };
    let mut stream = args
        .key
        .order(context, async |mut master, by| {
            let (now_ms, proof) = (by.now_ms(), by.proof(purpose, 0));
            master.fsck(FsckRequest { deep, now_ms, proof, repair }).await
        })
        .await?
        .into_inner();
    let (mut problems, mut mended, mut last) = (Vec::new(), Vec::new(), FsckReply::default());
    loop {
        let reply = stream.message().await.map_err(|status| CliError::Failed(status.message().to_owned()))?;
        let Some(mut reply) = reply else { break };
        for line in std::mem::take(&mut reply.mended) {
            if !context.output.json {
                context.output.text(&format!("mended: {line}\n"))?;
            }
            mended.push(line);
        }
        for problem in std::mem::take(&mut reply.problems) {
            if !context.output.json {
                context.output.text(&format!("{problem}\n"))?;
            }
            problems.push(problem);
        }
        last = reply;
    }
    if !last.done {
        return Err(CliError::Failed("the check ended before everything was looked at".to_owned()));
    }
    let FsckReply { files, chunks, replicas, replicas_checked, away, lacking, .. } = last;
    if context.output.json {
        context.output.value(&json!({
            "files": files, "chunks": chunks, "replicas": replicas, "replicas_checked": replicas_checked,
            "away": away, "lacking": lacking, "deep": deep, "problems": problems,
            "repair": repair, "mended": mended,
        }))?;
    } else {
        let text =
            format!("{files} files, {chunks} chunks, {replicas_checked} of {replicas} replicas looked at\n");
        context.output.text(&text)?;
    }
    let mut wrong = Vec::new();
    if !problems.is_empty() {
        let count = problems.len();
        let then =
            if repair { "could not be mended" } else { "damaged and missing replicas are being made anew" };
        wrong.push(format!("{count} problems; {then}"));
    }
    if lacking > 0 {
        wrong.push(format!("{lacking} chunks have fewer replicas than they should"));
    }
    if away > 0 {
        wrong.push(format!("{away} replicas are on chunk daemons that are away"));
    }
    if wrong.is_empty() { Ok(()) } else { Err(CliError::Failed(wrong.join("; "))) }
}
