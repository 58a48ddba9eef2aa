//! Which parts of a file have data, and how they are cut into pieces.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// The parts of a local file that are not holes. A file system that knows no holes answers one range.
pub fn local_data(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, at, libc::SEEK_DATA) {
            Ok(start) => start,
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(whole(size)),
            Err(error) => return Err(error),
        };
        if start >= size {
            break;
        }
        let end = seek(file, start, libc::SEEK_HOLE)?.min(size);
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

/// One range over all of a file.
pub fn whole(size: u64) -> Vec<Range<u64>> {
    (size > 0).then_some(0..size).into_iter().collect()
}

/// The ranges cut at multiples of `piece` bytes.
pub fn pieces(ranges: &[Range<u64>], piece: u64) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let end = ((at / piece + 1) * piece).min(range.end);
            pieces.push(at..end);
            at = end;
        }
    }
    pieces
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: lseek takes no pointers. The file's position is used by nobody: all reads name their offset.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_left_out() {
        let file = tempfile::tempfile().expect("temporary file");
        file.write_all_at(b"x", 0).expect("written");
        file.write_all_at(b"y", 10 << 20).expect("written");
        file.set_len(20 << 20).expect("sized");
        let ranges = local_data(&file, 20 << 20).expect("ranges");
        assert_eq!(ranges.first().expect("data").start, 0);
        let data: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        assert!(ranges.len() == 1 || data < 10 << 20, "{ranges:?}");
    }

    proptest! {
        #[test]
        fn pieces_cover_the_ranges_and_nothing_else(
            lengths in proptest::collection::vec((1_u64..1000, 1_u64..1000), 0..20), piece in 1_u64..500
        ) {
            let mut at = 0;
            let ranges: Vec<_> = lengths.iter().map(|(gap, len)| { let s = at + gap; at = s + len; s..at }).collect();
            let cut = pieces(&ranges, piece);
            prop_assert!(cut.iter().all(|r| r.start < r.end && r.start / piece == (r.end - 1) / piece));
            let mut joined: Vec<Range<u64>> = Vec::new();
            for r in cut {
                match joined.last_mut() {
                    Some(last) if last.end == r.start => last.end = r.end,
                    _ => joined.push(r),
                }
            }
            prop_assert_eq!(joined, ranges);
        }
    }
}
