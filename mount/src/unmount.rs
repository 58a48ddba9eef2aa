//! `dfs-mount --unmount` and `umount.fuse.dfs`: returns when everything written is durable and the process has ended, so
//! that `umount /mnt/dfs; poweroff` loses nothing.

use crate::daemon::wait_for_end;
use crate::fail::Failure;
use crate::fuse::SERVER_PID;
use crate::mountpoint::{self, FS_TYPE, How};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

/// How long the process may take to end once it is unmounted: what is left to do is bounded by its operation time-out.
const END: Duration = Duration::from_secs(120);
/// How long whoever wants it out of the tree at once waits for what is to be written; dfs-mount goes on with it.
const LAZY_FLUSH: Duration = Duration::from_secs(10);

/// Flushes and unmounts; with [`How::Abort`] only the latter.
///
/// # Errors
/// Nothing of dfs is mounted there; it is busy; bytes could not be written (then it stays mounted, unless `how` says otherwise).
pub fn run(named: &Path, how: How) -> Result<(), Failure> {
    let shown = named.display();
    let absolute = std::path::absolute(named).map_err(|error| Failure::usage(format!("{shown}: {error}")))?;
    // Whoever wants to be rid of it asks it nothing: it may not answer.
    let dead = how != How::Abort && mountpoint::is_dead(&absolute);
    let place = if dead || how == How::Abort { Ok(absolute) } else { named.canonicalize() };
    let place = place.map_err(|error| Failure::usage(format!("{shown}: {error}")))?;
    let mounted =
        mountpoint::mounted_on(&place).map_err(|error| Failure::operation(format!("/proc: {error}")))?;
    if mounted.is_none_or(|mount| mount.fs_type != FS_TYPE) {
        return Err(Failure::usage(format!("{shown}: no dfs is mounted there")));
    }
    let unmount = |how| {
        mountpoint::unmount(&place, how).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => Failure::operation(format!("{shown} is busy")),
            _ => Failure::operation(format!("{shown}: {error}")),
        })
    };
    if dead {
        return unmount(How::Lazy);
    }
    if how == How::Abort {
        return unmount(how);
    }
    let process = match flush_within(&place, (how == How::Lazy).then_some(LAZY_FLUSH)) {
        Ok(process) => process,
        Err(error) if how == How::Lazy => {
            eprintln!("dfs-mount: {shown}: not everything could be written: {error}");
            return unmount(how);
        }
        Err(error) => {
            return Err(Failure::operation(format!("{shown}: not everything could be written: {error}")));
        }
    };
    unmount(how)?;
    // A lazy unmount lives as long as files are open.
    if how == How::Lazy {
        return Ok(());
    }
    match wait_for_end(process, END) {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(Failure::operation(format!("{shown}: process {process} has not ended after {END:?}")))
        }
        Err(error) => Err(Failure::operation(format!("{shown}: process {process}: {error}"))),
    }
}

/// As [`flush`], but for so long at most: what hangs then ends with this process.
fn flush_within(place: &Path, bound: Option<Duration>) -> io::Result<u32> {
    let Some(bound) = bound else { return flush(place) };
    let (sender, flushed) = std::sync::mpsc::channel();
    let place = place.to_owned();
    std::thread::Builder::new().name("flush".to_owned()).spawn(move || {
        // Nobody listens any more when it took too long.
        let _late = sender.send(flush(&place));
    })?;
    flushed.recv_timeout(bound).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Makes everything durable that was written through a mount, and answers the process that serves it.
fn flush(place: &Path) -> io::Result<u32> {
    let root = File::open(place)?;
    // SAFETY: the descriptor is open. Dirty pages of shared mappings go to the process.
    if unsafe { libc::syncfs(root.as_raw_fd()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    root.sync_all()?;
    let mut process = 0_u32;
    // SAFETY: the ioctl writes four bytes (its number says so), which `process` has room for.
    if unsafe { libc::ioctl(root.as_raw_fd(), libc::Ioctl::from(SERVER_PID), &raw mut process) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_mounted_cannot_be_unmounted() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for place in [dir.path().to_owned(), dir.path().join("missing"), "/proc".into()] {
            let failure = run(&place, How::Now).expect_err("not ours");
            assert_eq!(failure.status, 2, "{failure}");
            assert_eq!(run(&place, How::Abort).expect_err("not ours").status, 2);
        }
    }
}
