//! `dfs gc`

use super::Context;
use super::leader::KeyFile;
use crate::Result;
use crate::format;
use dfs_client::v1::{GcReply, GcRequest};
use serde_json::json;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Only say what would be deleted or compacted
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    key: KeyFile,
}

/// Has space given back that files need no more, at once; or says how much that is.
pub async fn run(context: &Context, args: Args) -> Result {
    let dry_run = args.dry_run;
    let reply = args
        .key
        .order(context, async |mut master, by| {
            let (now_ms, proof) = (by.now_ms(), by.proof("gc", 0));
            master.gc(GcRequest { dry_run, now_ms, proof }).await
        })
        .await?
        .into_inner();
    if context.output.json {
        let GcReply { dead_chunks, dead_bytes, half_dead_chunks, half_dead_bytes, copied_bytes, orphans } =
            reply;
        context.output.value(&json!({
            "dry_run": dry_run, "dead_chunks": dead_chunks, "dead_bytes": dead_bytes,
            "half_dead_chunks": half_dead_chunks, "half_dead_bytes": half_dead_bytes,
            "copied_bytes": copied_bytes, "orphans": orphans,
        }))
    } else {
        context.output.text(&human(&reply, dry_run))
    }
}

fn human(reply: &GcReply, dry_run: bool) -> String {
    let (delete, compact) = if dry_run { ("would be", "would be") } else { ("are being", "are being") };
    let mut text = format!(
        "{} chunks that no file uses {delete} deleted: {}\n{} half-dead chunks {compact} compacted: {}, copying {}\n",
        reply.dead_chunks,
        format::size(reply.dead_bytes),
        reply.half_dead_chunks,
        format::size(reply.half_dead_bytes),
        format::size(reply.copied_bytes),
    );
    if reply.orphans > 0 {
        text.push_str(&format!("{} removed files are still open, and keep their bytes\n", reply.orphans));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_is_done_or_would_be() {
        let reply = GcReply { dead_chunks: 2, orphans: 3, ..GcReply::default() };
        assert!(human(&reply, true).starts_with("2 chunks that no file uses would be deleted"));
        assert!(
            human(&reply, false).contains("are being compacted")
                && human(&reply, false).contains("3 removed")
        );
    }
}
