//! The place of a mount: whether it may be used, what is mounted there, and taking that away.

use crate::fail::Failure;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The type that mounts of dfs show.
pub const FS_TYPE: &str = "fuse.dfs";

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Not while it is used.
    Now,
    /// Out of the tree at once; files that are open keep it alive until they are closed.
    Lazy,
    /// As `Lazy`, and whatever waits for the file system gets an error first (root only; else as `Lazy`).
    Abort,
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub major: u32,
    pub minor: u32,
    pub place: PathBuf,
    pub fs_type: String,
}

/// The mounts in the text of `/proc/self/mountinfo` (proc(5)), oldest first.
#[must_use]
pub fn parse_mounts(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n').filter_map(parse_mount).collect()
}

fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let place = unescape(fields.nth(1)?);
    // Optional fields end with a lone dash.
    let fs_type = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        place: PathBuf::from(std::ffi::OsString::from_vec(place)),
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
    })
}

/// Blanks and the like stand as `\040` in mountinfo.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let code = after
            .first_chunk::<3>()
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(first);
                rest = after;
            }
        }
    }
    plain
}

/// What is mounted on `place`, the topmost.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn mounted_on(place: &Path) -> io::Result<Option<Mount>> {
    let mounts = parse_mounts(&std::fs::read("/proc/self/mountinfo")?);
    Ok(mounts.into_iter().rev().find(|mount| mount.place == place))
}

/// The mount point that a user named, absolute, if it can be used. The remains of a dfs-mount that was killed are
/// cleared away.
///
/// # Errors
/// It is missing, no directory, or dfs is mounted there already.
pub fn check(named: &Path) -> Result<PathBuf, Failure> {
    let shown = named.display();
    if let Ok(absolute) = std::path::absolute(named)
        && is_dead(&absolute)
        && matches!(mounted_on(&absolute), Ok(Some(mount)) if mount.fs_type == FS_TYPE)
    {
        unmount(&absolute, How::Lazy).map_err(|error| {
            Failure::operation(format!("{shown}: a dead mount is there and could not be removed: {error}"))
        })?;
    }
    let place = named.canonicalize().map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT) => Failure::usage(format!("mount point {shown} does not exist")),
        Some(libc::ENOTDIR) => Failure::usage(format!("mount point {shown} is not a directory")),
        _ => Failure::usage(format!("mount point {shown}: {error}")),
    })?;
    if !place.is_dir() {
        return Err(Failure::usage(format!("mount point {shown} is not a directory")));
    }
    let mounted = mounted_on(&place).map_err(|error| Failure::operation(format!("/proc: {error}")))?;
    if mounted.is_some_and(|mount| mount.fs_type == FS_TYPE) {
        return Err(Failure::usage(format!("mount point {shown} is busy: dfs is mounted there already")));
    }
    Ok(place)
}

/// Whether a FUSE file system is mounted there whose process is gone.
#[must_use]
pub fn is_dead(place: &Path) -> bool {
    std::fs::metadata(place).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
}

/// Unmounts. Now and lazily it may wait for the file system to take what programs have changed in shared mappings.
///
/// # Errors
/// As umount2(2); EBUSY when it is used.
pub fn unmount(place: &Path, how: How) -> io::Result<()> {
    let path = CString::new(place.as_os_str().as_bytes())?;
    let flags = libc::UMOUNT_NOFOLLOW
        | match how {
            How::Now => 0,
            How::Lazy => libc::MNT_DETACH,
            How::Abort => libc::MNT_DETACH | libc::MNT_FORCE,
        };
    // SAFETY: `path` ends with a zero byte and outlives the call.
    if unsafe { libc::umount2(path.as_ptr(), flags) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(error);
    }
    // Not root: the set-user-id helper may.
    let mut helper = Command::new("fusermount3");
    helper.arg("-u").args((how != How::Now).then_some("-z")).arg("--").arg(place);
    let output =
        helper.output().map_err(|cause| io::Error::new(cause.kind(), format!("fusermount3: {cause}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") {
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    } else {
        Err(io::Error::other(said.trim().to_owned()))
    }
}

/// Lets the kernel read ahead further than the FUSE library can ask for. Root only, and a matter of speed: a failure is
/// logged.
pub fn set_read_ahead(mount: &Mount, kib: u32) {
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", mount.major, mount.minor);
    if let Err(error) = std::fs::write(&path, kib.to_string()) {
        tracing::info!(path, %error, "the kernel reads ahead as it would by itself");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"21 1 0:20 / / rw shared:1 - ext4 /dev/vda rw\n\
        36 21 0:33 / /mnt/a\\040b rw,nosuid shared:2 master:1 - fuse.dfs dfs#x rw,user_id=0\n\
        37 21 0:34 / /mnt/c rw - fuse.sshfs host rw\nnonsense\n";

    #[test]
    fn mounts_are_read_with_blanks_in_their_names() {
        let mounts = parse_mounts(TEXT);
        assert_eq!(mounts.len(), 3);
        let wanted = Mount { major: 0, minor: 33, place: "/mnt/a b".into(), fs_type: "fuse.dfs".to_owned() };
        assert_eq!(mounts[1], wanted);
        assert_eq!(mounts[2].fs_type, "fuse.sshfs");
        assert_eq!(unescape(b"a\\0"), b"a\\0");
    }

    #[test]
    fn a_mount_point_must_be_a_directory() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert!(check(dir.path()).is_ok());
        for (place, line) in [
            (file.clone(), "is not a directory"),
            (file.join("x"), "is not a directory"),
            (dir.path().join("x"), "does not exist"),
        ] {
            let failure = check(&place).expect_err("unusable");
            assert!(failure.status == 2 && failure.line.contains(line), "{failure}");
        }
    }

    #[test]
    fn the_root_is_mounted_and_a_plain_directory_is_not() {
        assert!(mounted_on(Path::new("/proc")).expect("readable").is_some());
        let dir = tempfile::tempdir().expect("temporary directory");
        assert_eq!(mounted_on(dir.path()).expect("readable"), None);
    }
}
