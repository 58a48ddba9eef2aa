//! News for the kernel: what it is to drop of its caches. Written to the device as it is, for the FUSE library has no
//! word for epochs and does not tell an inode that the kernel does not know from one that it does (fs/fuse/dev.c).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

/// `FUSE_NOTIFY_INVAL_INODE` and `FUSE_NOTIFY_INC_EPOCH` of linux/fuse.h.
const INVAL_INODE: i32 = 2;
const INC_EPOCH: i32 = 8;
/// `struct fuse_out_header`: length, code, and 0 for the request that it answers none of.
const HEADER: usize = 16;

/// The device of one mount.
pub struct Kernel {
    device: File,
    /// The kernel knows epochs (Linux 6.16 and later).
    pub epochs: bool,
}

/// What the kernel answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Done,
    /// It does not know the inode, or not yet.
    Unknown,
}

impl Kernel {
    /// On a duplicate of the session's device.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(device: impl AsFd) -> io::Result<Self> {
        let device: OwnedFd = device.as_fd().try_clone_to_owned()?;
        let mut kernel = Self { device: device.into(), epochs: true };
        // Nothing is cached yet: the first epoch is as good as any.
        if let Err(error) = kernel.forget_names() {
            tracing::info!(%error, "this kernel knows no epochs: it believes names for a second at most");
            kernel.epochs = false;
        }
        Ok(kernel)
    }

    /// Every name is looked up again before it is believed. Takes no lock and waits for nothing.
    ///
    /// # Errors
    /// The kernel is too old for it, or the mount is gone.
    pub fn forget_names(&self) -> io::Result<()> {
        self.tell(INC_EPOCH, &[]).map(drop)
    }

    /// Attributes and ACLs of an inode are asked again before they are believed. Waits for nothing.
    ///
    /// # Errors
    /// The mount is gone.
    pub fn forget_attr(&self, node: fuser::INodeNo) -> io::Result<Told> {
        self.forget_inode(node, -1, 0)
    }

    /// As [`Kernel::forget_attr`], and drops the pages of a range (length 0: to the end). Waits for reads of them that are
    /// under way, and for writes of a part of a page.
    ///
    /// # Errors
    /// The mount is gone.
    pub fn forget_pages(&self, node: fuser::INodeNo, offset: u64, length: u64) -> io::Result<Told> {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.forget_inode(node, signed(offset), signed(length))
    }

    fn forget_inode(&self, node: fuser::INodeNo, offset: i64, length: i64) -> io::Result<Told> {
        let payload = [node.0.to_ne_bytes(), offset.to_ne_bytes(), length.to_ne_bytes()].concat();
        match self.tell(INVAL_INODE, &payload) {
            Ok(()) => Ok(Told::Done),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Told::Unknown),
            Err(error) => Err(error),
        }
    }

    fn tell(&self, code: i32, payload: &[u8]) -> io::Result<()> {
        // One write is one message.
        let written = (&self.device).write(&message(code, payload))?;
        if written == HEADER + payload.len() {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel took a part of a notification"))
        }
    }
}

fn message(code: i32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + payload.len()).expect("a few bytes");
    [&length.to_ne_bytes()[..], &code.to_ne_bytes(), &0_u64.to_ne_bytes(), payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notification_is_a_header_without_a_request_and_its_payload() {
        assert_eq!(message(INC_EPOCH, &[]), [16, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(message(INVAL_INODE, &[7; 24])[..8], [40, 0, 0, 0, 2, 0, 0, 0]);
    }
}
