//! `dfs stat`

use super::{Context, Each};
use crate::Result;
use crate::error::{About, CliError};
use crate::format;
use crate::remote::{Last, Remote};
use dfs_client::v1::{Attr, ChunkAccess, GetSlices, Kind, Layout, Slice, answer, query};
use dfs_client::{InodeNo, OpenFlags};
use dfs_proto::limits::LAYOUT_SLICES_MAX;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
    /// Follow symlinks
    #[arg(short = 'L', long)]
    dereference: bool,
    /// Where the bytes are: slices, chunks, how many replicas these are to have, and those that they have
    #[arg(short, long)]
    chunks: bool,
}

pub async fn run(context: &Context, args: Args) -> Result {
    context
        .with_remote(async |remote| {
            let (mut each, mut values) = (Each::new(), Vec::new());
            for path in &args.paths {
                if let Some(value) = each.note(one(context, remote, path.as_bytes(), &args).await)? {
                    values.push(value);
                }
            }
            if context.output.json {
                context.output.value(&Value::Array(values))?;
            }
            each.end()
        })
        .await
}

async fn one(context: &Context, remote: &Remote, path: &[u8], args: &Args) -> Result<Value> {
    let last = if args.dereference { Last::Follow } else { Last::Keep };
    let (_, attr) = remote.existing(path, last).await?;
    let shown = format::name(path);
    let target = match attr.kind() {
        Kind::Symlink => Some(remote.client.readlink(InodeNo(attr.ino)).await.about(&shown)?),
        _ => None,
    };
    let mut value = format::attr_json(path, &attr, target.as_deref());
    let mut text = human(path, &attr, target.as_deref());
    if args.chunks && attr.kind() == Kind::File {
        // Where its bytes are is for those who may read them.
        let flags = OpenFlags { read: true, ..OpenFlags::default() };
        let open = remote.client.open(&remote.cred, InodeNo(attr.ino), flags).await.about(&shown)?;
        let layout = layout(remote, &attr, &shown).await;
        remote.client.release(open).await.about(&shown)?;
        let (slices, chunks) = layout?;
        text.push_str(&layout_text(&slices, &chunks));
        value["slices"] = layout_json(&slices, &chunks);
    }
    if !context.output.json {
        context.output.text(&text)?;
    }
    Ok(value)
}

fn human(path: &[u8], attr: &Attr, target: Option<&[u8]>) -> String {
    let name = match target {
        Some(target) => format!("{} -> {}", format::name(path), format::name(target)),
        None => format::name(path),
    };
    format!(
        "  File: {name}\n  Kind: {:<18} Inode: {:<12} Links: {}\n  Size: {:<17} Blocks: {:<12} Version: {}\n\
         Access: {:04o} {:<12}  Uid: {:<14} Gid: {}\nAccess: {}\nModify: {}\nChange: {}\n Birth: {}\n",
        format::kind(attr.kind()),
        attr.ino,
        attr.nlink,
        attr.size,
        attr.blocks,
        attr.version,
        attr.mode,
        format::mode(attr),
        attr.uid,
        attr.gid,
        format::utc_time(attr.atime),
        format::utc_time(attr.mtime),
        format::utc_time(attr.ctime),
        format::utc_time(attr.btime),
    )
}

/// Every slice of a file and the chunks they lie in.
async fn layout(
    remote: &Remote,
    attr: &Attr,
    shown: &str,
) -> Result<(Vec<Slice>, BTreeMap<u64, ChunkAccess>)> {
    let (mut slices, mut chunks) = (Vec::new(), BTreeMap::new());
    let mut offset = 0;
    while offset < attr.size {
        let question =
            GetSlices { ino: attr.ino, offset, length: attr.size - offset, max_slices: LAYOUT_SLICES_MAX };
        let answer =
            remote.client.master().query(&remote.cred, query::Op::GetSlices(question)).await.about(shown)?;
        let answer::Body::Layout(Layout { slices: found, chunks: access, complete_to, .. }) = answer else {
            return Err(CliError::failed(shown, "the master answered something else than slices"));
        };
        slices.extend(found.into_iter().filter(|slice| slice.file_offset >= offset || offset == 0));
        chunks.extend(access.into_iter().map(|chunk| (chunk.chunk, chunk)));
        if complete_to <= offset {
            break;
        }
        offset = complete_to;
    }
    Ok((slices, chunks))
}

fn replicas(chunk: Option<&ChunkAccess>) -> Vec<String> {
    chunk
        .map(|chunk| chunk.replicas.iter().map(|replica| replica.address.clone()).collect())
        .unwrap_or_default()
}

fn layout_text(slices: &[Slice], chunks: &BTreeMap<u64, ChunkAccess>) -> String {
    let rows: Vec<Vec<String>> = slices
        .iter()
        .map(|slice| {
            let chunk = chunks.get(&slice.chunk);
            vec![
                slice.file_offset.to_string(),
                slice.length.to_string(),
                slice.chunk.to_string(),
                slice.chunk_offset.to_string(),
                if chunk.is_some_and(|chunk| chunk.sealed) { "sealed" } else { "open" }.to_owned(),
                chunk.map_or(0, |chunk| chunk.wanted_replicas).to_string(),
                replicas(chunk).join(" "),
            ]
        })
        .collect();
    crate::output::table(&[">OFFSET", ">LENGTH", ">CHUNK", ">AT", "STATE", ">WANTED", "REPLICAS"], &rows)
}

fn layout_json(slices: &[Slice], chunks: &BTreeMap<u64, ChunkAccess>) -> Value {
    slices
        .iter()
        .map(|slice| {
            let chunk = chunks.get(&slice.chunk);
            json!({
                "offset": slice.file_offset, "length": slice.length, "chunk": slice.chunk,
                "chunk_offset": slice.chunk_offset, "sealed": chunk.is_some_and(|chunk| chunk.sealed),
                "epoch": chunk.map(|chunk| chunk.epoch), "replicas": replicas(chunk),
                "wanted_replicas": chunk.map(|chunk| chunk.wanted_replicas),
            })
        })
        .collect()
}
