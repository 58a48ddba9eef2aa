//! The few ioctls that make sense here: chattr's flags, and who serves a mount.

use super::answer::{Answer, Caller};
use super::state::Shared;
use dfs_proto::v1::{self, ErrorCode};
use dfs_proto::{FsError, FsResult, InodeNo};
use fuser::{Errno, ReplyIoctl};

/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS` of linux/fs.h, as 64-bit and 32-bit programs number them.
const GET_FLAGS: [u32; 2] = [0x8008_6601, 0x8004_6601];
const SET_FLAGS: [u32; 2] = [0x4008_6602, 0x4004_6602];
/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR`: the same flags as XFS numbers them. The kernel asks so before it sets any.
const GET_XFLAGS: u32 = 0x801c_581f;
const SET_XFLAGS: u32 = 0x401c_5820;
/// `struct fsxattr`, in bytes; its first word are the flags, the rest is all zeroes here.
const XFLAGS_LEN: usize = 28;
/// The flags that are kept, and how XFS numbers them.
const IMMUTABLE: (u32, u32) = (0x10, 0x08);
const APPEND_ONLY: (u32, u32) = (0x20, 0x10);
/// `_IOR('d', 0x70, u32)`: the process id of the dfs-mount that serves the file.
pub const SERVER_PID: u32 = 0x8004_6470;

/// An ioctl that is understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    ServerPid,
    GetFlags,
    GetXflags,
    SetFlags(u32),
}

impl Command {
    /// `None`: no such ioctl here.
    fn parse(number: u32, input: &[u8]) -> Option<FsResult<Self>> {
        let word = || input.first_chunk::<4>().map(|word| u32::from_ne_bytes(*word));
        let flags = match number {
            SERVER_PID => return Some(Ok(Self::ServerPid)),
            GET_XFLAGS => return Some(Ok(Self::GetXflags)),
            get if GET_FLAGS.contains(&get) => return Some(Ok(Self::GetFlags)),
            set if SET_FLAGS.contains(&set) => {
                word().filter(|flags| flags & !(IMMUTABLE.0 | APPEND_ONLY.0) == 0)
            }
            SET_XFLAGS => word().and_then(from_xflags).filter(|_| input[4..].iter().all(|byte| *byte == 0)),
            _ => return None,
        };
        Some(flags.map(Self::SetFlags).ok_or_else(|| {
            FsError::new(ErrorCode::ErrorNotSupported, "file flags other than immutable and append-only")
        }))
    }
}

fn to_xflags(flags: u32) -> u32 {
    [IMMUTABLE, APPEND_ONLY].iter().filter(|(flag, _)| flags & flag != 0).map(|(_, xflag)| xflag).sum()
}

fn from_xflags(xflags: u32) -> Option<u32> {
    let flags =
        [IMMUTABLE, APPEND_ONLY].iter().filter(|(_, xflag)| xflags & xflag != 0).map(|(flag, _)| flag).sum();
    (to_xflags(flags) == xflags).then_some(flags)
}

impl Shared {
    pub async fn ioctl(
        &self,
        caller: Caller,
        ino: InodeNo,
        number: u32,
        input: Vec<u8>,
        room: u32,
        answer: Answer<ReplyIoctl>,
    ) {
        let result = match Command::parse(number, &input) {
            None => return answer.refuse(Errno::ENOTTY),
            Some(Ok(command)) => self.carry_out(caller, ino, command).await,
            Some(Err(error)) => Err(error),
        };
        answer.give(result, |reply, mut bytes| {
            // The kernel's own calls have room for an int although the number says long (fs/fuse/ioctl.c).
            bytes.truncate(room as usize);
            reply.ioctl(0, &bytes);
        });
    }

    async fn carry_out(&self, caller: Caller, ino: InodeNo, command: Command) -> FsResult<Vec<u8>> {
        match command {
            Command::ServerPid => Ok(std::process::id().to_ne_bytes().to_vec()),
            Command::GetFlags => {
                let flags = self.client.getattr(ino).await?.flags;
                Ok(u64::from(flags).to_ne_bytes().to_vec())
            }
            Command::GetXflags => {
                let mut bytes = to_xflags(self.client.getattr(ino).await?.flags).to_ne_bytes().to_vec();
                bytes.resize(XFLAGS_LEN, 0);
                Ok(bytes)
            }
            Command::SetFlags(flags) => {
                let change = v1::SetAttr { ino: ino.get(), flags: Some(flags), ..v1::SetAttr::default() };
                self.setattr(caller, change).await?;
                Ok(Vec::new())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_understood_in_both_numberings_and_others_are_refused() {
        let set = |number, word: u32| Command::parse(number, &word.to_ne_bytes());
        assert_eq!(set(SET_FLAGS[0], 0x30), Some(Ok(Command::SetFlags(0x30))));
        assert!(matches!(set(SET_FLAGS[1], 0x40), Some(Err(_))));
        let mut xattr = [0; XFLAGS_LEN];
        xattr[..4].copy_from_slice(&0x18_u32.to_ne_bytes());
        assert_eq!(Command::parse(SET_XFLAGS, &xattr), Some(Ok(Command::SetFlags(0x30))));
        xattr[9] = 1;
        assert!(matches!(Command::parse(SET_XFLAGS, &xattr), Some(Err(_))), "a project id");
        assert!(matches!(Command::parse(SET_XFLAGS, &0x2_u32.to_ne_bytes()), Some(Err(_))));
        assert!(matches!(Command::parse(SET_FLAGS[0], b""), Some(Err(_))));
        assert_eq!(Command::parse(SERVER_PID, b""), Some(Ok(Command::ServerPid)));
        assert!(Command::parse(0x5401, b"").is_none(), "TCGETS");
        assert_eq!((to_xflags(0x20), from_xflags(0x10)), (0x10, Some(0x20)));
    }
}
