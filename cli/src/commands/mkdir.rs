//! `dfs mkdir`

use super::{Context, Each};
use crate::Result;
use crate::error::{About, CliError, reason};
use crate::format;
use crate::remote::{Last, Remote};
use dfs_client::v1::{Create, Kind};
use dfs_proto::error::ErrorCode;
use serde_json::json;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

#[derive(clap::Args, Debug)]
pub struct Args {
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
    /// Missing directories above it, too; one that is there is no error
    #[arg(short, long)]
    parents: bool,
    /// The mode, octal
    #[arg(short, long, value_name = "MODE", value_parser = octal)]
    mode: Option<u32>,
}

fn octal(text: &str) -> std::result::Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err("an octal number up to 7777 is wanted".to_owned()),
    }
}

pub async fn run(context: &Context, args: Args) -> Result {
    context
        .with_remote(async |remote| {
            let (mut each, mut made) = (Each::new(), Vec::new());
            for path in &args.paths {
                let path = path.clone().into_vec();
                each.note(one(remote, &path, &args, &mut made).await)?;
            }
            if context.output.json {
                context.output.value(&json!({ "made": made }))?;
            }
            each.end()
        })
        .await
}

async fn one(remote: &Remote, path: &[u8], args: &Args, made: &mut Vec<serde_json::Value>) -> Result {
    // "a/b/" names what "a/b" names.
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    let path = &path[..end];
    if args.parents {
        let slashes = (1..path.len()).filter(|at| path[*at] == b'/' && path[at - 1] != b'/');
        for at in slashes {
            make(remote, &path[..at], None, true, made).await?;
        }
    }
    make(remote, path, args.mode, args.parents, made).await
}

/// Makes one directory whose parent is there.
async fn make(
    remote: &Remote,
    path: &[u8],
    mode: Option<u32>,
    may_exist: bool,
    made: &mut Vec<serde_json::Value>,
) -> Result {
    let place = remote.walk(path, if may_exist { Last::Follow } else { Last::Keep }).await?;
    if let Some(attr) = &place.attr {
        return if may_exist && attr.kind() == Kind::Dir {
            Ok(())
        } else {
            Err(CliError::failed(place.shown(), reason(&ErrorCode::ErrorExists.into())))
        };
    }
    let what = Create {
        parent: place.parent.get(),
        name: place.name.clone().into(),
        kind: Kind::Dir.into(),
        mode: mode.unwrap_or(0o777),
        umask: if mode.is_some() { 0 } else { remote.umask },
        exclusive: true,
        ..Create::default()
    };
    match remote.client.create(&remote.cred, what).await {
        // Somebody else was quicker.
        Err(error) if error.code == ErrorCode::ErrorExists && may_exist => Ok(()),
        result => {
            result.about(place.shown())?;
            made.push(format::name_json(path));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        assert_eq!(octal("1777"), Ok(0o1777));
        assert!(octal("8").is_err() && octal("17777").is_err() && octal("rwx").is_err());
    }
}
