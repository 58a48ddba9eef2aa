//! Turns the synced records of an inode into the slices of one commit. Pure.

use super::inode::Record;
use dfs_proto::v1::CommitSlice;
use std::collections::BTreeMap;

/// A piece of a record that a commit will show.
#[derive(Clone, Copy)]
struct Part {
    length: u64,
    chunk: u64,
    chunk_offset: u64,
    epoch: u32,
    record_end: u64,
}

impl Part {
    /// Leaves out the first bytes.
    fn skip(mut self, bytes: u64) -> Self {
        self.chunk_offset += bytes;
        self.length -= bytes;
        self
    }
}

/// The slices of records given oldest first: where two overlap, the later one's bytes count; neighbours in file and
/// chunk become one slice. Slices never overlap and stand in file order.
#[must_use]
pub fn slices(records: &[Record]) -> Vec<CommitSlice> {
    let mut parts: BTreeMap<u64, Part> = BTreeMap::new();
    for record in records {
        let (from, to) = (record.offset, record.file_end());
        clear(&mut parts, from, to);
        parts.insert(
            from,
            Part {
                length: to - from,
                chunk: record.chunk.get(),
                chunk_offset: record.chunk_offset,
                epoch: record.epoch.get(),
                record_end: record.chunk_end(),
            },
        );
    }
    let mut slices: Vec<CommitSlice> = Vec::with_capacity(parts.len());
    for (file_offset, part) in parts {
        if let Some(last) = slices.last_mut()
            && last.file_offset + last.length == file_offset
            && (last.chunk, last.epoch) == (part.chunk, part.epoch)
            && last.chunk_offset + last.length == part.chunk_offset
        {
            last.length += part.length;
            last.record_end = part.record_end;
            continue;
        }
        slices.push(CommitSlice {
            file_offset,
            chunk: part.chunk,
            chunk_offset: part.chunk_offset,
            length: part.length,
            epoch: part.epoch,
            record_end: part.record_end,
        });
    }
    slices
}

/// Takes a file range away from the parts.
fn clear(parts: &mut BTreeMap<u64, Part>, from: u64, to: u64) {
    if let Some((&start, part)) = parts.range_mut(..from).next_back()
        && start + part.length > from
    {
        let whole = *part;
        part.length = from - start;
        if start + whole.length > to {
            parts.insert(to, whole.skip(to - start));
        }
    }
    while let Some((&start, &part)) = parts.range(from..to).next() {
        parts.remove(&start);
        if start + part.length > to {
            parts.insert(to, part.skip(to - start));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::write::RunNo;
    use bytes::Bytes;
    use dfs_proto::{ChunkId, Epoch};
    use proptest::prelude::*;
    use std::time::Duration;

    fn record(offset: u64, len: usize, chunk: u64, chunk_offset: u64) -> Record {
        Record {
            run: RunNo(1),
            offset,
            bytes: Bytes::from(vec![0; len]),
            since: Duration::ZERO,
            chunk: ChunkId(chunk),
            epoch: Epoch(1),
            chunk_offset,
        }
    }

    #[test]
    fn contiguous_records_become_one_slice_that_ends_with_the_last_record() {
        let slices = slices(&[record(0, 10, 7, 100), record(10, 5, 7, 110), record(15, 5, 8, 0)]);
        assert_eq!(slices.len(), 2);
        assert_eq!((slices[0].length, slices[0].chunk_offset, slices[0].record_end), (15, 100, 115));
        assert_eq!((slices[1].file_offset, slices[1].chunk), (15, 8));
    }

    #[test]
    fn what_a_later_record_hides_is_left_out_and_record_ends_stay_with_their_bytes() {
        let slices = slices(&[record(0, 100, 7, 0), record(40, 20, 7, 100)]);
        let seen: Vec<_> =
            slices.iter().map(|s| (s.file_offset, s.length, s.chunk_offset, s.record_end)).collect();
        assert_eq!(seen, [(0, 40, 0, 100), (40, 20, 100, 120), (60, 40, 60, 100)]);
    }

    proptest! {
        #[test]
        fn every_byte_comes_from_the_last_record_that_wrote_it(
            writes in proptest::collection::vec((0_u64..200, 1_usize..80, 1_u64..3), 1..12)
        ) {
            let mut ends = [0_u64; 4];
            let mut model = std::collections::BTreeMap::new();
            let records: Vec<Record> = writes.iter().map(|&(offset, len, chunk)| {
                let at = ends[chunk as usize];
                ends[chunk as usize] += len as u64;
                for byte in 0..len as u64 { model.insert(offset + byte, (chunk, at + byte, at + len as u64)); }
                record(offset, len, chunk, at)
            }).collect();
            let mut seen = std::collections::BTreeMap::new();
            for slice in slices(&records) {
                let last = model[&(slice.file_offset + slice.length - 1)];
                prop_assert_eq!(slice.record_end, last.2);
                for byte in 0..slice.length {
                    let old = seen.insert(slice.file_offset + byte, (slice.chunk, slice.chunk_offset + byte));
                    prop_assert!(old.is_none());
                }
            }
            let model: std::collections::BTreeMap<_, _> = model.into_iter().map(|(at, (c, o, _))| (at, (c, o))).collect();
            prop_assert_eq!(seen, model);
        }
    }
}
