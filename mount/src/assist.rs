//! A process beside dfs-mount for the calls that may wait for dfs-mount: a thread of its own would hang in the kernel with the
//! device open, and the mount could not even be ended with SIGKILL.

use crate::mountpoint::{self, How};
use clap::ValueEnum;
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tokio::time::Instant;

/// How often it is looked whether the process has ended.
const POLL: Duration = Duration::from_millis(20);
/// The exit status for what has no errno.
const OTHER: u8 = 255;

/// What it does; its exit status is an errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Task {
    /// Has the kernel hand over what programs have changed in shared mappings.
    Write,
    /// As umount(8).
    Unmount,
    /// Ends every request that is under way with an error, and takes the mount out of the tree.
    Abort,
}

/// A process that does not outlive the wish for it.
struct Assistant(Child);

impl Drop for Assistant {
    fn drop(&mut self) {
        // It may have ended; and one that hangs in the kernel ends when dfs-mount does.
        if matches!(self.0.try_wait(), Ok(None)) {
            let _killed = self.0.kill();
        }
    }
}

/// Has a process do it.
///
/// # Errors
/// What the call said; TimedOut after `bound`.
pub async fn assist(task: Task, place: &Path, bound: Duration) -> io::Result<()> {
    let name = task.to_possible_value().expect("no task is hidden").get_name().to_owned();
    let mut command = Command::new("/proc/self/exe");
    command.args(["--assist", &name]).arg(place);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let (mut assistant, until) = (Assistant(child), Instant::now() + bound);
    loop {
        if let Some(status) = assistant.0.try_wait()? {
            return match status.code() {
                Some(0) => Ok(()),
                Some(code) if code != i32::from(OTHER) => Err(io::Error::from_raw_os_error(code)),
                _ => Err(io::Error::other(format!("the process that does it ended with {status}"))),
            };
        }
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Does it, in that process. Answers the exit status.
pub fn run(task: Task, place: &Path) -> u8 {
    let done = match task {
        Task::Write => write_pages(place),
        Task::Unmount => mountpoint::unmount(place, How::Now),
        Task::Abort => mountpoint::unmount(place, How::Abort),
    };
    match done {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().and_then(|code| u8::try_from(code).ok()).unwrap_or(OTHER),
    }
}

fn write_pages(place: &Path) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let root = std::fs::File::open(place)?;
    // SAFETY: the descriptor is open and the call touches no memory.
    if unsafe { libc::syncfs(root.as_raw_fd()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_is_the_errno() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert_eq!(run(Task::Write, dir.path()), 0);
        assert_eq!(i32::from(run(Task::Write, &dir.path().join("missing"))), libc::ENOENT);
    }
}
