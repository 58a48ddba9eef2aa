//! The command line, also as mount(8) and umount(8) call their helpers.

use crate::assist::Task;
use crate::fail::Failure;
use crate::mountpoint::How;
use crate::options::Options;
use clap::Parser;
use clap::error::ErrorKind;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const AFTER_HELP: &str = "\
Options of -o (separated by commas):
  ro, rw                   without the right to write; with it
  subdir=/PATH             mount this directory of the cluster instead of its root
  masters=H:P+H:P          the masters' addresses
  config=FILE              settings to use instead of /etc/dfs/client.toml
  allow_other              other users may enter (always so when root mounts; noallow_other: not)
  noatime, relatime        leave access times alone; keep them as relatime does (default)
  flush_on_close           a close waits until what was written is durable (default; noflush_on_close: not for small files while
                           all goes well, which is not ready for daily use)
  write_memory=SIZE        memory for bytes that are not written yet (256MiB)
  read_cache=SIZE          memory for bytes that were read (256MiB)
  soft, timeout=SECONDS    an operation that the cluster does not answer fails after so long: EIO or ETIMEDOUT (soft, 60)
  hard                     it waits for ever, and can be killed (the same: timeout=0)
  suid, dev, exec, sync, dirsync and their opposites, and what fstab adds (_netdev, nofail, x-…)

SOURCE may name the masters and the directory: HOST:PORT,HOST:PORT:/PATH; any other name says nothing.
In fstab:  dfs  /mnt/dfs  fuse.dfs  _netdev,noatime  0 0

Exit status: 0 the mount is usable; 1 it failed; 2 the input makes no sense. Either way one line says why.";

/// Mounts a dfs cluster. Returns when the mount is usable.
#[derive(Parser, Debug)]
#[command(name = "dfs-mount", version, after_help = AFTER_HELP, max_term_width = 110)]
struct Cli {
    /// Mount options, separated by commas (see below)
    #[arg(short = 'o', value_name = "OPTIONS", allow_hyphen_values = true)]
    options: Vec<String>,
    /// The masters' addresses; else those of DFS_MASTERS, else those of the settings
    #[arg(long, value_name = "H:P,…")]
    masters: Option<String>,
    /// Stay in the foreground and log to standard error; tells systemd when the mount is usable
    #[arg(long)]
    foreground: bool,
    /// Where to log
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Where to write the process id
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// How much to log: error, warn, info, debug, trace, or a filter as of RUST_LOG [default: info]
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
    /// Write everything out, unmount, and wait for the process to end
    #[arg(long)]
    unmount: bool,
    /// With --unmount: also while files are open there
    #[arg(long, short = 'l')]
    lazy: bool,
    /// With --unmount: at once, whoever waits for it gets an error, what is not written is lost
    #[arg(long)]
    force: bool,
    /// What dfs-mount has another process do for it.
    #[arg(long, hide = true, value_enum)]
    assist: Option<Task>,
    /// [SOURCE] MOUNTPOINT
    #[arg(value_name = "[SOURCE] MOUNTPOINT", required = true, num_args = 1..=2)]
    places: Vec<OsString>,

    // What mount(8) and umount(8) may pass to their helpers and what means nothing here.
    #[arg(short = 's', hide = true)]
    _sloppy: bool,
    #[arg(short = 'n', hide = true)]
    _no_mtab: bool,
    #[arg(short = 'v', hide = true)]
    _verbose: bool,
    #[arg(short = 'r', hide = true)]
    _read_only_if_busy: bool,
    #[arg(short = 'i', hide = true)]
    _no_helpers: bool,
    /// mount(8): everything but the mount itself. umount(8): even if it hangs.
    #[arg(short = 'f', hide = true)]
    fake: bool,
    #[arg(short = 'N', hide = true)]
    _namespace: Option<String>,
    #[arg(short = 't', hide = true)]
    _fs_type: Option<String>,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Wish {
    Mount(Box<MountWish>),
    Unmount {
        place: PathBuf,
        how: How,
    },
    /// A call that dfs-mount cannot make itself.
    Assist {
        task: Task,
        place: PathBuf,
    },
    /// A text for standard output: help or version.
    Show(String),
}

/// A mount that somebody wants.
#[derive(Debug, PartialEq, Eq)]
pub struct MountWish {
    pub place: PathBuf,
    pub options: Options,
    pub foreground: bool,
    /// Check everything, mount nothing.
    pub fake: bool,
    pub log_file: Option<PathBuf>,
    pub pid_file: Option<PathBuf>,
    pub log: Option<String>,
}

/// Understands the command line.
///
/// # Errors
/// With one line when it makes no sense.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Wish, Failure> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // umount(8) calls its helper by this name.
    let umount = arguments
        .first()
        .and_then(|name| Path::new(name).file_name())
        .is_some_and(|name| name == "umount.fuse.dfs");
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Wish::Show(error.to_string()));
        }
        Err(error) => return Err(Failure::usage(first_line(&error))),
    };
    let mut places = cli.places;
    let place = PathBuf::from(places.pop().expect("clap wants at least one"));
    let source = places.pop();
    if let Some(task) = cli.assist {
        return Ok(Wish::Assist { task, place });
    }
    if umount || cli.unmount {
        if source.is_some() {
            return Err(Failure::usage("--unmount takes one mount point"));
        }
        // umount(8) calls it -f.
        let how = match (cli.force || (umount && cli.fake), cli.lazy) {
            (true, _) => How::Abort,
            (false, true) => How::Lazy,
            (false, false) => How::Now,
        };
        return Ok(Wish::Unmount { place, how });
    }
    let mut options = Options::default();
    cli.options.iter().try_for_each(|list| options.add(list)).map_err(Failure::usage)?;
    if cli.masters.is_some() {
        options.masters = cli.masters;
    }
    if let Some(source) = source {
        options.add_source(&source.to_string_lossy()).map_err(Failure::usage)?;
    }
    // The process leaves its directory: paths must not depend on it.
    let absolute = |path: PathBuf| {
        std::path::absolute(&path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
    };
    options.config = options.config.map(absolute).transpose()?;
    Ok(Wish::Mount(Box::new(MountWish {
        place,
        options,
        foreground: cli.foreground,
        fake: cli.fake,
        log_file: cli.log_file.map(absolute).transpose()?,
        pid_file: cli.pid_file.map(absolute).transpose()?,
        log: cli.log,
    })))
}

/// clap explains over many lines; the first says what is wrong.
fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    // "the following required arguments were not provided:" goes on in the next line.
    let mut lines = text.lines().map(str::trim);
    let mut line = lines.next().unwrap_or_default().trim_start_matches("error: ").to_owned();
    if line.ends_with(':') {
        line = format!("{line} {}", lines.next().unwrap_or_default());
    }
    format!("{line} (see --help)")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Wish, Failure> {
        parse(line.split_whitespace().map(OsString::from))
    }

    fn mount(line: &str) -> MountWish {
        match parsed(line) {
            Ok(Wish::Mount(wish)) => *wish,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn a_mount_is_understood_in_every_spelling() {
        let plain = mount("dfs-mount /mnt/dfs");
        assert_eq!((plain.place.as_path(), plain.foreground), (Path::new("/mnt/dfs"), false));
        let helper =
            mount("/sbin/mount.fuse.dfs h:1:/sub /mnt/dfs -n -s -v -t fuse.dfs -o rw,_netdev,noatime");
        assert_eq!(helper.options.masters.as_deref(), Some("h:1"));
        assert_eq!(helper.options.subdir.as_deref(), Some("/sub"));
        assert!(helper.options.noatime);
        let all = mount(
            "dfs-mount -o ro -o subdir=/a --masters h:1,i:2 --foreground --log debug --pid-file p dfs m",
        );
        assert!(all.options.read_only && all.foreground);
        assert_eq!(all.options.masters.as_deref(), Some("h:1,i:2"));
        assert!(all.pid_file.is_some_and(|path| path.is_absolute()));
    }

    #[test]
    fn unmounting_is_understood_in_both_spellings() {
        let wanted = |how| Ok(Wish::Unmount { place: "/mnt/dfs".into(), how });
        assert_eq!(parsed("dfs-mount --unmount /mnt/dfs"), wanted(How::Now));
        assert_eq!(parsed("/sbin/umount.fuse.dfs /mnt/dfs -l"), wanted(How::Lazy));
        assert_eq!(parsed("/sbin/umount.fuse.dfs /mnt/dfs -l -f"), wanted(How::Abort));
        assert_eq!(parsed("dfs-mount --unmount --force /mnt/dfs"), wanted(How::Abort));
    }

    #[test]
    fn what_makes_no_sense_gets_one_line_and_status_2() {
        for (line, words) in [
            ("dfs-mount", "required"),
            ("dfs-mount a b c", "unexpected"),
            ("dfs-mount --colour m", "--colour"),
            ("dfs-mount -o colour m", "unknown option 'colour'"),
            ("dfs-mount :/a m", "':/a' is not a source"),
            ("dfs-mount --unmount a b", "one mount point"),
        ] {
            let failure = parsed(line).expect_err(line);
            assert_eq!(failure.status, 2);
            assert!(failure.line.contains(words) && !failure.line.contains('\n'), "{line}: {failure}");
        }
        assert!(matches!(parsed("dfs-mount --help"), Ok(Wish::Show(text)) if text.contains("subdir=/PATH")));
    }
}
