//! Going to the background: the command returns when the mount is usable, or with the one line that says why it is not.

use crate::fail::Failure;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::PathBuf;

/// Tells whoever started dfs-mount how it went; once.
pub enum Starter {
    /// A shell that waits in the foreground, or systemd.
    Foreground,
    /// The parent process, which waits at the other end of a pipe.
    Parent(File),
}

/// What a process is after [`detach`].
pub enum Role {
    /// The one that the user started: to exit with this status.
    Parent(u8),
    /// The one that serves the mount.
    Child(Starter),
}

/// Forks; the child leaves the terminal. To be called before any thread is started.
///
/// # Errors
/// When the system has no process or pipe left.
pub fn detach() -> io::Result<Role> {
    let (mut reader, writer) = io::pipe()?;
    // SAFETY: this process has a single thread, so the child may do whatever it could have done.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            // SAFETY: touches no memory. It cannot fail: a forked child leads no process group.
            unsafe { libc::setsid() };
            std::env::set_current_dir("/")?;
            Ok(Role::Child(Starter::Parent(File::from(OwnedFd::from(writer)))))
        }
        _ => {
            drop(writer);
            let mut said = Vec::new();
            reader.read_to_end(&mut said)?;
            Ok(Role::Parent(report(&said)))
        }
    }
}

/// Prints what the child said, and answers the exit status: its first byte.
fn report(said: &[u8]) -> u8 {
    match said.split_first() {
        Some((0, _)) => 0,
        Some((&status, line)) => {
            eprintln!("dfs-mount: {}", String::from_utf8_lossy(line));
            status
        }
        None => {
            eprintln!("dfs-mount: it ended before the mount was usable; --foreground --log debug shows more");
            1
        }
    }
}

impl Starter {
    /// The mount is usable. From here on output goes to `log`, or nowhere.
    ///
    /// # Errors
    /// When the starter or the log cannot be reached.
    pub fn ready(self, log: Option<&PathBuf>) -> io::Result<()> {
        match self {
            Self::Foreground => {
                sd_notify::notify(&[sd_notify::NotifyState::Ready, sd_notify::NotifyState::Status("mounted")])
            }
            Self::Parent(mut pipe) => {
                let null = File::options().read(true).write(true).open("/dev/null")?;
                let output = match log {
                    Some(path) => File::options().create(true).append(true).open(path)?,
                    None => null.try_clone()?,
                };
                for (from, to) in [(&null, 0), (&output, 1), (&output, 2)] {
                    // SAFETY: both are open descriptors of this process; 0 to 2 belong to nobody but the standard streams.
                    if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                pipe.write_all(&[0])
            }
        }
    }

    /// It did not work.
    pub fn failed(self, failure: &Failure) {
        match self {
            Self::Foreground => eprintln!("dfs-mount: {failure}"),
            Self::Parent(mut pipe) => {
                let mut said = vec![failure.status];
                said.extend_from_slice(failure.line.as_bytes());
                // A parent that was killed meanwhile has nobody to tell.
                let _ = pipe.write_all(&said);
            }
        }
    }
}

/// Standard streams that were closed by whoever started us are opened on /dev/null: the FUSE library wants no
/// descriptor of its own below 3.
///
/// # Errors
/// When /dev/null cannot be opened.
pub fn open_standard_streams() -> io::Result<()> {
    loop {
        let null = OwnedFd::from(File::options().read(true).write(true).open("/dev/null")?);
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        // Stays open as a standard stream.
        let _ = null.into_raw_fd();
    }
}

/// Writes the process id to a file, which is removed when this is dropped.
pub struct PidFile(PathBuf);

impl PidFile {
    /// # Errors
    /// When the file cannot be written.
    pub fn create(path: PathBuf) -> io::Result<Self> {
        std::fs::write(&path, format!("{}\n", std::process::id()))?;
        Ok(Self(path))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the pid file stays");
        }
    }
}

/// Waits for a process that is not a child to end; false: it has not within `bound`.
///
/// # Errors
/// When it cannot be watched.
pub fn wait_for_end(pid: u32, bound: std::time::Duration) -> io::Result<bool> {
    // SAFETY: pidfd_open takes two integers and touches no memory.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if descriptor < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ESRCH) { Ok(true) } else { Err(error) };
    }
    let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
    // SAFETY: the descriptor was just opened and belongs to nobody else.
    let process = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let mut poll = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let bound = i32::try_from(bound.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: `poll` is one valid structure that outlives the call.
    match unsafe { libc::poll(&raw mut poll, 1, bound) } {
        -1 => Err(io::Error::last_os_error()),
        ready => Ok(ready > 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_end_of_a_process_is_seen() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().expect("sleep");
        assert!(!wait_for_end(child.id(), Duration::from_millis(20)).expect("watched"));
        child.kill().expect("killed");
        assert!(wait_for_end(child.id(), Duration::from_secs(10)).expect("watched"));
        child.wait().expect("reaped");
    }

    #[test]
    fn the_pid_file_goes_with_the_process() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("pid");
        let file = PidFile::create(path.clone()).expect("written");
        let text = std::fs::read_to_string(&path).expect("read");
        assert_eq!(text.trim().parse(), Ok(std::process::id()));
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn the_parent_repeats_the_childs_status() {
        assert_eq!(report(&[0]), 0);
        assert_eq!(report(b"\x02no"), 2);
        assert_eq!(report(b""), 1);
    }
}
