//! The few ioctls that make sense here: chattr's flags, and who serves a mount.

use super::answer::{Answer, Caller};
use super::state::Shared;
use dfs_proto::v1::{self, ErrorCode};
use dfs_proto::{FsError, FsResult, InodeNo};
use fuser::{Errno, ReplyIoctl};

/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS` of linux/fs.h, as 64-bit and 32-bit programs number them.
const GET_FLAGS: [u32; 2] = [0x8008_6601, 0x8004_6601];
const SET_FLAGS: [u32; 2] = [0x4008_6602, 0x4004_6602];
/// The flags that are kept: immutable and append-only.
const FLAGS_KEPT: u32 = 0x10 | 0x20;
/// `_IOR('d', 0x70, u32)`: the process id of the dfs-mount that serves the file.
pub const SERVER_PID: u32 = 0x8004_6470;

impl Shared {
    pub async fn ioctl(
        &self,
        caller: Caller,
        ino: InodeNo,
        command: u32,
        input: Vec<u8>,
        room: u32,
        answer: Answer<ReplyIoctl>,
    ) {
        let result = match command {
            SERVER_PID => Ok(std::process::id()),
            get if GET_FLAGS.contains(&get) => self.client.getattr(ino).await.map(|attr| attr.flags),
            set if SET_FLAGS.contains(&set) => self.set_flags(caller, ino, &input).await.map(|()| 0),
            _ => return answer.refuse(Errno::ENOTTY),
        };
        match result {
            Ok(word) => {
                // The kernel asks for an int although the number says long (see fs/fuse/ioctl.c): as much as fits.
                let mut bytes = u64::from(word).to_ne_bytes().to_vec();
                bytes.truncate(room as usize);
                answer.send(|reply| reply.ioctl(0, &bytes));
            }
            Err(error) => answer.fail(&error),
        }
    }

    async fn set_flags(&self, caller: Caller, ino: InodeNo, input: &[u8]) -> FsResult<()> {
        let word = input.first_chunk::<4>().ok_or_else(|| FsError::from(ErrorCode::ErrorInvalid))?;
        let flags = u32::from_ne_bytes(*word);
        if flags & !FLAGS_KEPT != 0 {
            return Err(FsError::new(ErrorCode::ErrorNotSupported, format!("file flags {flags:#x}")));
        }
        let change = v1::SetAttr { ino: ino.get(), flags: Some(flags), ..v1::SetAttr::default() };
        self.setattr(caller, change).await.map(drop)
    }
}
