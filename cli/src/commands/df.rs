//! `dfs df`

use super::Context;
use crate::Result;
use crate::error::About;
use crate::format;
use crate::output::table;
use serde_json::json;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Exact sizes
    #[arg(short, long)]
    bytes: bool,
}

pub async fn run(context: &Context, args: Args) -> Result {
    context
        .with_remote(async |remote| {
            let stats = remote.client.statfs().await.about("df")?;
            if context.output.json {
                return context.output.value(&json!({
                    "total_bytes": stats.total_bytes, "used_bytes": stats.used_bytes,
                    "free_bytes": stats.free_bytes, "live_bytes": stats.live_bytes,
                    "files": stats.files, "chunks": stats.chunks,
                }));
            }
            let size = |bytes: u64| if args.bytes { bytes.to_string() } else { format::size(bytes) };
            let row = vec![
                format!("dfs {}", remote.client.cluster_id()),
                size(stats.total_bytes),
                size(stats.used_bytes),
                size(stats.free_bytes),
                percent(stats.used_bytes, stats.free_bytes),
                size(stats.live_bytes),
                stats.files.to_string(),
                stats.chunks.to_string(),
            ];
            let headings = ["CLUSTER", ">SIZE", ">USED", ">FREE", ">USE%", ">FILE DATA", ">FILES", ">CHUNKS"];
            context.output.text(&table(&headings, &[row]))
        })
        .await
}

/// How much of what can be used is used, rounded up as df(1) does.
fn percent(used: u64, free: u64) -> String {
    let all = u128::from(used) + u128::from(free);
    if all == 0 { "-".to_owned() } else { format!("{}%", (u128::from(used) * 100).div_ceil(all)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_rounded_up() {
        assert_eq!(percent(0, 10), "0%");
        assert_eq!(percent(1, 999), "1%");
        assert_eq!(percent(10, 0), "100%");
        assert_eq!(percent(0, 0), "-");
    }
}
