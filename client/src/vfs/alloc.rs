//! fallocate, lseek for data and holes, copy_file_range.

use super::attr::check_end;
use super::{Client, OpenFile, entry, own_cred, unexpected};
use crate::cache::Touched;
use dfs_proto::v1::{self, Cred, ErrorCode, answer, mutation, query};
use dfs_proto::{FsError, FsResult, InodeNo, limits};

/// What lseek(2) looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekKind {
    Data,
    Hole,
}

impl Client {
    /// fallocate(2). Flushes what is held of the file before.
    ///
    /// # Errors
    /// ErrorInvalid, ErrorFileTooBig, ErrorNotSupported, and those of the flush.
    #[expect(clippy::too_many_arguments, reason = "they are fallocate's, its mode as names")]
    pub async fn fallocate(
        &self,
        cred: &Cred,
        file: &OpenFile,
        offset: u64,
        length: u64,
        keep_size: bool,
        punch_hole: bool,
        zero_range: bool,
    ) -> FsResult<()> {
        if length == 0 {
            return Err(FsError::new(ErrorCode::ErrorInvalid, "an empty range"));
        }
        check_end(offset, length)?;
        let inner = &self.inner;
        inner.flush_if_dirty(file.ino).await?;
        let change = v1::Fallocate { ino: file.ino.get(), offset, length, keep_size, punch_hole, zero_range };
        let touched = Touched::inode(file.ino);
        let (made, answer) = inner.change(cred, mutation::Op::Fallocate(change), touched).await;
        inner.data.forget_layout(file.ino);
        match answer.and_then(entry) {
            Ok(attr) => {
                inner.cache.learn(&made.ticket, &attr);
                Ok(())
            }
            Err(error) => {
                inner.cache.forget_attr(file.ino);
                Err(error)
            }
        }
    }

    /// The next byte of data, or of a hole, at `offset` or after it. The end of the file counts as a hole.
    ///
    /// # Errors
    /// ErrorNoDeviceAddress (ENXIO) at or past the end of the file, or when no data follows; those of the flush.
    pub async fn seek(&self, file: &OpenFile, offset: u64, kind: SeekKind) -> FsResult<u64> {
        let inner = &self.inner;
        inner.flush_if_dirty(file.ino).await?;
        let size = inner.attr_now(file.ino).await?.size;
        let past_the_end = || FsError::new(ErrorCode::ErrorNoDeviceAddress, "no data there");
        if offset >= size {
            return Err(past_the_end());
        }
        let mut at = offset;
        while at < size {
            let layout = self.layout(file.ino, at, size - at).await?;
            if let Some(found) = scan(&layout.slices, &mut at, size, kind) {
                return Ok(found);
            }
            // Slices up to `complete_to` were looked at; without progress there would be no end.
            let next = layout.complete_to.max(at);
            if next <= at && layout.slices.is_empty() {
                break;
            }
            if kind == SeekKind::Hole && layout.complete_to > at {
                return Ok(at);
            }
            at = next;
        }
        match kind {
            SeekKind::Data => Err(past_the_end()),
            SeekKind::Hole => Ok(size),
        }
    }

    /// Copies a range by reference: no bytes are moved. Flushes what is held of both files before, so the master's
    /// committed map is what the program wrote. Answers how many bytes were copied.
    ///
    /// # Errors
    /// ErrorInvalid (overlapping ranges of one file), ErrorFileTooBig, and those of the flush.
    pub async fn copy_range(
        &self,
        cred: &Cred,
        from: &OpenFile,
        from_offset: u64,
        to: &OpenFile,
        to_offset: u64,
        length: u64,
    ) -> FsResult<u64> {
        check_end(to_offset, length)?;
        let inner = &self.inner;
        inner.flush_if_dirty(from.ino).await?;
        inner.flush_if_dirty(to.ino).await?;
        let change = v1::CopyRange {
            from: from.ino.get(),
            from_offset,
            to: to.ino.get(),
            to_offset,
            length,
            kill_priv: cred.uid != 0,
        };
        let touched = Touched::inode(to.ino);
        let (made, answer) = inner.change(cred, mutation::Op::CopyRange(change), touched).await;
        inner.data.forget_layout(to.ino);
        match answer {
            Ok(answer::Body::Copied(copied)) => {
                match &copied.attr {
                    Some(attr) => inner.cache.learn(&made.ticket, attr),
                    None => inner.cache.forget_attr(to.ino),
                }
                Ok(copied.length)
            }
            Ok(other) => Err(unexpected(&other)),
            Err(error) => {
                inner.cache.forget_attr(to.ino);
                Err(error)
            }
        }
    }

    async fn layout(&self, ino: InodeNo, offset: u64, length: u64) -> FsResult<v1::Layout> {
        let max_slices = limits::LAYOUT_SLICES_MAX;
        let question = query::Op::GetSlices(v1::GetSlices { ino: ino.get(), offset, length, max_slices });
        match self.inner.master.query(&own_cred(), question).await? {
            answer::Body::Layout(layout) => Ok(layout),
            other => Err(unexpected(&other)),
        }
    }
}

/// Looks through slices in file order. Moves `at` over what it has seen; answers the position if it was found.
fn scan(slices: &[v1::Slice], at: &mut u64, size: u64, kind: SeekKind) -> Option<u64> {
    for slice in slices {
        let end = slice.file_offset + slice.length;
        if end <= *at {
            continue;
        }
        match kind {
            SeekKind::Data => return Some(slice.file_offset.max(*at)).filter(|found| *found < size),
            SeekKind::Hole if slice.file_offset > *at => return Some(*at),
            SeekKind::Hole => *at = end.min(size),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(file_offset: u64, length: u64) -> v1::Slice {
        v1::Slice { file_offset, length, ..v1::Slice::default() }
    }

    #[test]
    fn data_and_holes_are_found_between_slices() {
        let slices = [slice(10, 5), slice(15, 5), slice(30, 5)];
        let find = |mut at: u64, kind| scan(&slices, &mut at, 40, kind).ok_or(at);
        assert_eq!(find(0, SeekKind::Data), Ok(10));
        assert_eq!(find(12, SeekKind::Data), Ok(12));
        assert_eq!(find(20, SeekKind::Data), Ok(30));
        assert_eq!(find(35, SeekKind::Data), Err(35));
        assert_eq!(find(0, SeekKind::Hole), Ok(0));
        assert_eq!(find(10, SeekKind::Hole), Ok(20));
        assert_eq!(find(32, SeekKind::Hole), Err(35));
    }
}
