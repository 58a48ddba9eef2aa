//! `dfs sync`: the kernel sends no SYNCFS to FUSE, so sync(1) does not reach dfs-mount. An fsync of the mount's root does, and
//! there it stands for everything: it returns when all that was written through the mount is durable.

use super::{Context, Each};
use crate::Result;
use crate::error::{About, CliError};
use serde_json::json;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

#[derive(clap::Args, Debug)]
pub struct Args {
    /// Where dfs is mounted (default: every dfs mount of this machine)
    #[arg(value_name = "MOUNTPOINT")]
    mountpoints: Vec<PathBuf>,
}

pub async fn run(context: &Context, args: Args) -> Result {
    let text = std::fs::read("/proc/self/mountinfo").about("/proc/self/mountinfo")?;
    let mounted = dfs_mounts(&text);
    let wanted = if args.mountpoints.is_empty() {
        mounted
    } else {
        for point in &args.mountpoints {
            let full = std::path::absolute(point).about(point.display())?;
            if !mounted.contains(&full) && !full.canonicalize().is_ok_and(|full| mounted.contains(&full)) {
                return Err(CliError::failed(point.display(), "no dfs is mounted there"));
            }
        }
        args.mountpoints
    };
    let mut each = Each::new();
    let mut done = Vec::new();
    for point in wanted {
        let path = point.clone();
        let synced = tokio::task::spawn_blocking(move || File::open(path)?.sync_all())
            .await
            .map_err(std::io::Error::other);
        if each.note(synced.and_then(|result| result).about(point.display()))?.is_some() {
            done.push(point.display().to_string());
        }
    }
    context.output.summary(&json!({ "synced": done }), &format!("synced {} mount(s)", done.len()))?;
    each.end()
}

/// The mount points of dfs in the text of /proc/self/mountinfo (proc(5)): field 5 and, after a lone dash, the type.
fn dfs_mounts(text: &[u8]) -> Vec<PathBuf> {
    let mounts = text.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let point = fields.nth(4)?;
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        (kind == b"fuse.dfs").then(|| PathBuf::from(OsString::from_vec(unescape(point))))
    });
    mounts.collect()
}

/// Undoes the kernel's `\040` for a space, and the like.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let code = field.get(at + 1..at + 4).filter(|_| field[at] == b'\\');
        let byte = code
            .and_then(|code| std::str::from_utf8(code).ok())
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        match byte {
            Some(byte) => {
                bytes.push(byte);
                at += 4;
            }
            None => {
                bytes.push(field[at]);
                at += 1;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dfs_mounts_are_found_in_the_mount_table() {
        let text = b"36 35 98:0 / /mnt rw,noatime master:1 - ext3 /dev/root rw\n\
            40 35 0:50 / /mnt/a\\040b rw shared:5 - fuse.dfs dfs rw\n\
            41 35 0:51 / /mnt/x rw - fuse.other x rw\n";
        assert_eq!(dfs_mounts(text), [PathBuf::from("/mnt/a b")]);
        assert_eq!(unescape(b"\\134\\0"), b"\\\\0");
    }
}
