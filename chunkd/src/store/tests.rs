//! Chunk files through their whole life, on a disk that loses power, flips bits and fails.

use super::format::{Entry, FILE_HEADER, RECORD_HEADER};
use super::recovery::Condition;
use super::test_disk::TestDisk;
use super::*;
use bytes::Bytes;
use dfs_env::Disk;
use dfs_proto::checksum::{unit_checksums, units_match};
use dfs_proto::limits::CHECKSUM_UNIT;
use dfs_proto::{ByteLen, ByteOffset, Epoch, InodeNo};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

pub(super) const ID: ChunkId = ChunkId(0x1234);

fn env(disk: &TestDisk) -> Env {
    Env { disk: Arc::new(disk.clone()), threads: false, ..Env::real() }
}

pub(super) async fn store_of(disk: &TestDisk, capacity: Option<u64>, dirs: &[&str]) -> Store {
    let all = dirs.iter().map(|dir| DataDir::new(PathBuf::from(dir), None)).collect();
    Store::open(env(disk), Dirs::new(env(disk), all, capacity, 0), "cluster").await
}

pub(super) async fn open(disk: &TestDisk) -> Store {
    store_of(disk, None, &["/a"]).await
}

pub(super) fn path() -> PathBuf {
    DataDir::new("/a".into(), None).chunk_path(ID)
}

pub(super) fn payload(seed: u64, length: usize) -> Bytes {
    (0..length as u64).map(|at| (seed * 131 + at * 7 + at / 251).to_le_bytes()[0]).collect()
}

pub(super) fn record(epoch: u32, offset: u64, payload: Bytes) -> NewRecord {
    NewRecord {
        epoch: Epoch(epoch),
        offset: ByteOffset(offset),
        ino: InodeNo(5),
        file_offset: ByteOffset(offset),
        checksums: unit_checksums(&payload),
        payload,
        capacity: ByteLen(64 << 20),
    }
}

/// Appends a record of `length` bytes made from its offset.
async fn add(store: &Store, epoch: u32, offset: u64, length: usize, sync: bool) -> FsResult<Held> {
    store.append(ID, record(epoch, offset, payload(offset, length)), sync).await
}

pub(super) fn code<T: std::fmt::Debug>(result: FsResult<T>) -> ErrorCode {
    result.expect_err("refused").code
}

/// Reads a range, verifies it as a client does, and checks that whole units cover it.
pub(super) async fn read(store: &Store, offset: u64, length: usize) -> FsResult<Vec<u8>> {
    let piece = store.read(ID, offset, length).await?;
    let mut rest = piece.data.clone();
    for unit in &piece.units {
        let bytes = rest.split_to(unit.length as usize);
        if !units_match(&bytes, &[unit.checksum]) {
            return Err(ErrorCode::ErrorCorrupt.into());
        }
    }
    assert!(rest.is_empty() && piece.start <= offset);
    let skip = usize::try_from(offset - piece.start).expect("small");
    assert!(piece.data.len() >= skip + length, "the range is covered");
    Ok(piece.data[skip..skip + length].to_vec())
}

pub(super) fn entries(lengths: &[usize]) -> Vec<Entry> {
    let (mut offset, mut position) = (0, FILE_HEADER as u64);
    lengths
        .iter()
        .map(|length| {
            let entry = Entry { offset, position, length: u32::try_from(*length).expect("small") };
            (offset, position) = (entry.end(), entry.end_position());
            entry
        })
        .collect()
}

pub(super) async fn build(store: &Store, lengths: &[usize], sync: bool) {
    for entry in entries(lengths) {
        add(store, 1, entry.offset, entry.length as usize, sync).await.expect("appended");
    }
}

/// All bytes that [`build`] wrote.
pub(super) fn bytes_of(lengths: &[usize]) -> Vec<u8> {
    entries(lengths).iter().flat_map(|entry| payload(entry.offset, entry.length as usize)).collect()
}

#[tokio::test]
async fn any_range_is_answered_with_whole_units_before_and_after_the_seal() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    let lengths = [40_000, 1, 16_384, 3, 100_000, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 16_385];
    build(&store, &lengths, false).await;
    let whole = bytes_of(&lengths);
    for sealed in [false, true] {
        if sealed {
            store
                .order(ID, ChunkOrder::Seal { epoch: Epoch(2), length: whole.len() as u64 })
                .await
                .expect("sealed");
        }
        for (offset, length) in [(0, whole.len()), (39_999, 3), (50_000, 1), (56_380, 100_100), (156_390, 40)]
        {
            let found = read(&store, offset as u64, length).await.expect("read");
            assert!(found == whole[offset..offset + length], "{offset} {length}");
        }
        let piece = store.read(ID, 20_000, 10).await.expect("read");
        assert_eq!((piece.start, piece.data.len()), (CHECKSUM_UNIT as u64, CHECKSUM_UNIT));
        assert_eq!(code(read(&store, whole.len() as u64 - 1, 2).await), ErrorCode::ErrorRange);
        assert_eq!(code(store.read(ID, 0, 0).await), ErrorCode::ErrorInvalid);
        assert_eq!(code(store.read(ChunkId(9), 0, 1).await), ErrorCode::ErrorNoChunk);
    }
    let again = open(&disk).await;
    assert!(read(&again, 0, whole.len()).await.expect("read by the footer") == whole);
    assert_eq!(again.report()[0], store.report()[0]);
}

#[tokio::test]
async fn a_stream_passes_by_and_small_records_stay_in_memory() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    let entries = entries(&[1000, 200_000, 300_000, 1000]);
    let ends: Vec<u64> = entries.iter().map(Entry::end_position).collect();
    let forgotten = || std::mem::take(&mut *lock(&disk.faults.forgotten));
    for (entry, sync) in entries.iter().zip([true, false, true, true]) {
        add(&store, 1, entry.offset, entry.length as usize, sync).await.expect("appended");
    }
    let page = |position: u64| position / 4096 * 4096;
    let expected = [
        (page(ends[0])..ends[1], false),
        (page(ends[1])..ends[2], false),
        // One fdatasync for both; the small record after them is none of it.
        (page(ends[0])..ends[2], true),
    ];
    assert_eq!(forgotten(), expected);
}

#[tokio::test]
async fn offsets_follow_the_length_and_retries_must_match() {
    let store = open(&TestDisk::default()).await;
    assert_eq!(code(add(&store, 1, 10, 10, false).await), ErrorCode::ErrorNoChunk);
    assert_eq!(store.count(), 0, "a refused append leaves nothing");
    assert_eq!(add(&store, 1, 0, 10, false).await.expect("new").length, 10);
    assert_eq!(add(&store, 1, 10, 10, true).await.expect("new"), Held { length: 20, synced: 20 });
    assert_eq!(add(&store, 1, 0, 10, false).await.expect("a retry").length, 20);
    assert_eq!(code(add(&store, 1, 30, 10, false).await), ErrorCode::ErrorConflict);
    assert_eq!(code(add(&store, 1, 10, 11, false).await), ErrorCode::ErrorConflict);
    assert_eq!(code(add(&store, 1, 5, 5, false).await), ErrorCode::ErrorConflict);
    let other = record(1, 0, payload(77, 10));
    assert_eq!(code(store.append(ID, other, false).await), ErrorCode::ErrorConflict);
    let mut damaged = record(1, 20, payload(20, 10));
    damaged.checksums[0] ^= 1;
    assert_eq!(code(store.append(ID, damaged, false).await), ErrorCode::ErrorCorrupt);
    let beyond = record(1, u64::MAX - 3, payload(0, 10));
    assert_eq!(code(store.append(ID, beyond, false).await), ErrorCode::ErrorInvalid);
    assert_eq!(add(&store, 1, 20, 0, true).await.expect("a sync"), Held { length: 20, synced: 20 });
    assert_eq!(code(add(&store, 1, 21, 0, true).await), ErrorCode::ErrorConflict);
}

#[tokio::test]
async fn a_refused_record_in_a_batch_stops_only_itself_and_those_that_needed_it() {
    let store = open(&TestDisk::default()).await;
    // Submitted before any of them runs, so they are one batch.
    let results = futures::future::join_all([
        store.append(ID, record(1, 0, payload(0, 10)), false),
        store.append(ID, record(1, 10, payload(10, 10)), true),
        store.append(ID, record(0, 20, payload(20, 10)), false),
        store.append(ID, record(1, 0, payload(0, 10)), false),
        store.append(ID, record(1, 20, payload(20, 10)), false),
        store.append(ID, record(1, 40, payload(40, 10)), false),
    ])
    .await;
    let codes: Vec<_> =
        results.iter().map(|result| result.as_ref().map(|held| held.length).map_err(|e| e.code)).collect();
    let stale = Err(ErrorCode::ErrorStaleEpoch);
    assert_eq!(codes, [Ok(10), Ok(30), stale, Ok(20), Ok(30), Err(ErrorCode::ErrorConflict)]);
}

#[tokio::test]
async fn capacity_is_kept_also_when_it_is_eight_bytes() {
    let store = open(&TestDisk::default()).await;
    let small =
        |offset, length| NewRecord { capacity: ByteLen(8), ..record(1, offset, payload(offset, length)) };
    assert_eq!(store.append(ID, small(0, 5), false).await.expect("fits").length, 5);
    assert_eq!(code(store.append(ID, small(5, 4), false).await), ErrorCode::ErrorRange);
    assert_eq!(store.append(ID, small(5, 3), true).await.expect("fits").length, 8);
    let sealed = store.order(ID, ChunkOrder::Seal { epoch: Epoch(2), length: 8 }).await.expect("sealed");
    assert_eq!(sealed.length, 8);
    assert_eq!(read(&store, 2, 6).await.expect("read").len(), 6);
}

#[tokio::test]
async fn a_fence_holds_after_a_restart_and_where_no_chunk_was() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    build(&store, &[10, 10], false).await;
    let fenced = store.order(ID, ChunkOrder::Fence(Epoch(2))).await.expect("fenced");
    assert_eq!((fenced.epoch, fenced.length), (Epoch(2), 20));
    assert_eq!(store.order(ID, ChunkOrder::Fence(Epoch(2))).await, Ok(fenced), "again");
    assert_eq!(code(store.order(ID, ChunkOrder::Fence(Epoch(1))).await), ErrorCode::ErrorStaleEpoch);
    let nothing = store.order(ChunkId(8), ChunkOrder::Fence(Epoch(2))).await.expect("fenced");
    assert_eq!(nothing.length, 0);
    disk.cut_power(|| false);
    let store = open(&disk).await;
    assert_eq!(code(add(&store, 1, 20, 10, false).await), ErrorCode::ErrorStaleEpoch);
    assert_eq!(code(add(&store, 1, 0, 10, false).await), ErrorCode::ErrorStaleEpoch, "a retry too");
    let late = store.append(ChunkId(8), record(1, 0, payload(0, 10)), false).await;
    assert_eq!(code(late), ErrorCode::ErrorStaleEpoch);
    assert_eq!(store.order(ID, ChunkOrder::Fence(Epoch(2))).await, Ok(fenced));
    assert!(read(&store, 0, 20).await.expect("read") == bytes_of(&[10, 10]));
}

#[tokio::test]
async fn a_seal_cuts_whole_records_and_is_for_ever() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    build(&store, &[10, 20, 30], true).await;
    let seal = |epoch, length| ChunkOrder::Seal { epoch: Epoch(epoch), length };
    store.order(ID, ChunkOrder::Fence(Epoch(3))).await.expect("fenced");
    assert_eq!(code(store.order(ID, seal(2, 30)).await), ErrorCode::ErrorStaleEpoch);
    assert_eq!(code(store.order(ID, seal(3, 61)).await), ErrorCode::ErrorRange);
    assert_eq!(code(store.order(ID, seal(3, 11)).await), ErrorCode::ErrorConflict);
    assert_eq!(code(store.order(ChunkId(9), seal(3, 0)).await), ErrorCode::ErrorNoChunk);
    let sealed = store.order(ID, seal(3, 30)).await.expect("sealed");
    // Another replica that never had the third record agrees on the digest.
    let other = open(&TestDisk::default()).await;
    build(&other, &[10, 20], true).await;
    assert_eq!(other.order(ID, seal(3, 30)).await, Ok(sealed));
    for store in [store, open(&disk).await] {
        assert_eq!(store.order(ID, seal(3, 30)).await, Ok(sealed), "again");
        assert_eq!(code(store.order(ID, seal(3, 10)).await), ErrorCode::ErrorConflict);
        assert_eq!(store.order(ID, ChunkOrder::Fence(Epoch(4))).await.expect("known").length, 30);
        assert_eq!(code(add(&store, 3, 30, 10, false).await), ErrorCode::ErrorConflict);
        assert_eq!(code(read(&store, 20, 11).await), ErrorCode::ErrorRange);
        assert!(read(&store, 0, 30).await.expect("read") == bytes_of(&[10, 20]));
    }
}

#[tokio::test]
async fn a_deleted_chunk_is_gone_and_its_space_is_back() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    build(&store, &[100], true).await;
    assert!(store.0.dirs.totals().used_bytes > 100);
    store.order(ID, ChunkOrder::Delete).await.expect("deleted");
    store.order(ID, ChunkOrder::Delete).await.expect("again");
    assert_eq!((store.0.dirs.totals().used_bytes, store.count()), (0, 0));
    disk.cut_power(|| false);
    assert!(disk.files().is_empty());
    build(&store, &[50], true).await;
    assert!(read(&store, 0, 50).await.expect("read") == bytes_of(&[50]));
}

#[tokio::test]
async fn full_means_no_space_and_nothing_is_lost() {
    let disk = TestDisk::default();
    let store = store_of(&disk, Some(2_000), &["/a"]).await;
    add(&store, 1, 0, 1_000, true).await.expect("fits");
    assert_eq!(code(add(&store, 1, 1_000, 1_000, true).await), ErrorCode::ErrorNoSpace);
    // The disk itself is full: half a record was written and is cut again.
    *lock(&disk.faults.write_below) = Some(("/a".into(), std::io::ErrorKind::StorageFull));
    assert_eq!(code(add(&store, 1, 1_000, 10, true).await), ErrorCode::ErrorNoSpace);
    *lock(&disk.faults.write_below) = None;
    assert_eq!(add(&store, 1, 1_000, 10, true).await.expect("room again").length, 1_010);
    let again = open(&disk).await;
    assert!(read(&again, 0, 1_010).await.expect("read") == bytes_of(&[1_000, 10]));
}

#[tokio::test]
async fn small_appends_find_zeroes_written_ahead_and_nothing_of_them_stays() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    let file_len = |disk: &TestDisk| disk.content(&path()).expect("there").len();
    build(&store, &[100], true).await;
    let ahead = file_len(&disk);
    assert!(ahead > 200_000, "{ahead}");
    let lengths = [100, 30_000, 1, 4_096];
    for entry in &entries(&lengths)[1..] {
        add(&store, 1, entry.offset, entry.length as usize, true).await.expect("appended");
        assert_eq!(file_len(&disk), ahead, "an append over zeroes changes no length");
    }
    // A start takes what is left of them for what they are.
    drop(store);
    let end = usize::try_from(entries(&lengths).last().expect("some").end_position()).expect("small");
    let Opened::Chunk(found) = recovery::open(&disk, &path(), ID, cluster_bytes("cluster")).expect("opened")
    else {
        panic!("not a chunk")
    };
    assert_eq!((found.condition, found.remark, found.position), (Condition::Open, None, end as u64));
    assert_eq!(file_len(&disk), end);
    // Streams bring no zeroes, and cut none off.
    let store = open(&disk).await;
    add(&store, 1, found.length, 1 << 20, false).await.expect("appended");
    let length = found.length + (1 << 20);
    assert!(file_len(&disk) < end + (1 << 20) + 2_000);
    add(&store, 1, length, 10, true).await.expect("appended");
    let before = file_len(&disk);
    let used = store.0.dirs.totals().used_bytes;
    store.order(ID, ChunkOrder::Seal { epoch: Epoch(2), length: length + 10 }).await.expect("sealed");
    assert!(file_len(&disk) + 200_000 < before, "a seal leaves no zeroes");
    assert_eq!(used - store.0.dirs.totals().used_bytes, (before - file_len(&disk)) as u64);
    assert_eq!(read(&store, 0, 100).await.expect("read"), payload(0, 100));
}

#[tokio::test]
async fn zeroes_are_not_what_fills_a_disk() {
    let disk = TestDisk::default();
    let store = store_of(&disk, Some(120_000), &["/a"]).await;
    for at in 0..25 {
        add(&store, 1, at * 4_000, 4_000, true).await.expect("there is room for the bytes");
    }
    assert!(disk.content(&path()).expect("there").len() < 120_000);
    // Nor do they stand in their own way.
    let disk = TestDisk::default();
    let store = store_of(&disk, Some(266_600), &["/a"]).await;
    for at in 0..60 {
        add(&store, 1, at * 4_000, 4_000, true).await.expect("the zeroes make room");
    }
}

#[tokio::test]
async fn a_failed_directory_is_left_and_the_others_go_on() {
    let disk = TestDisk::default();
    let store = store_of(&disk, None, &["/a", "/b"]).await;
    *lock(&disk.faults.write_below) = Some(("/b".into(), std::io::ErrorKind::Other));
    build(&store, &[10], true).await;
    assert!(disk.content(&path()).is_some(), "the chunk went to /a");
    let failed: Vec<bool> = store.0.dirs.report().iter().map(|dir| dir.failed).collect();
    assert_eq!(failed, [false, true]);
    *lock(&disk.faults.write_below) = Some(("/".into(), std::io::ErrorKind::Other));
    assert_eq!(code(add(&store, 1, 10, 10, true).await), ErrorCode::ErrorIo);
    let other = store.append(ChunkId(7), record(1, 0, payload(0, 10)), false).await;
    assert_eq!(code(other), ErrorCode::ErrorIo);
    assert!(read(&store, 0, 10).await.is_ok(), "reads go on");
}

#[tokio::test]
async fn a_failed_fdatasync_is_never_made_good() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    build(&store, &[10], true).await;
    disk.faults.sync.store(true, Ordering::Relaxed);
    assert_eq!(code(add(&store, 1, 10, 10, true).await), ErrorCode::ErrorIo);
    disk.faults.sync.store(false, Ordering::Relaxed);
    assert_eq!(code(add(&store, 1, 20, 0, true).await), ErrorCode::ErrorIo);
    assert_eq!(code(add(&store, 1, 20, 10, false).await), ErrorCode::ErrorIo);
    assert_eq!(code(store.order(ID, ChunkOrder::Fence(Epoch(2))).await), ErrorCode::ErrorIo);
    assert!(store.report()[0].damaged);
    disk.cut_power(|| false);
    assert_eq!(open(&disk).await.report()[0].length, 10);
}

#[tokio::test]
async fn a_process_that_starts_again_does_not_believe_what_the_last_one_could_not_sync() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    build(&store, &[2000], true).await;
    disk.faults.sync.store(true, Ordering::Relaxed);
    assert_eq!(code(add(&store, 1, 2000, 2000, true).await), ErrorCode::ErrorIo);
    disk.faults.sync.store(false, Ordering::Relaxed);
    drop(store);
    // The process ends, the power stays: the kernel still shows what is not on the disk, and calls it clean.
    let store = open(&disk).await;
    let held = store.report()[0].length;
    assert_eq!(held, 2000);
    drop(store);
    disk.cut_power(|| false);
    assert_eq!(open(&disk).await.report()[0].length, held, "what was reported is there");
}

#[tokio::test]
async fn many_who_sync_share_a_few_fdatasyncs() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    let appends = (0..500).map(|n| store.append(ID, record(1, n * 10, payload(n * 10, 10)), true));
    for held in futures::future::join_all(appends).await {
        assert!(held.expect("synced").synced >= 10);
    }
    let syncs = disk.faults.syncs.load(Ordering::Relaxed);
    assert!(syncs <= 20, "{syncs} fdatasyncs for 500 appends");
}

#[tokio::test]
async fn a_flipped_bit_in_the_middle_is_reported_and_nothing_is_cut() {
    let disk = TestDisk::default();
    build(&open(&disk).await, &[100, 100, 100], true).await;
    let second = entries(&[100, 100, 100])[1];
    let at = usize::try_from(second.payload_position()).expect("small");
    disk.tamper(&path(), |bytes| bytes[at + 5] ^= 4);
    let before = disk.content(&path()).expect("there").len();
    let store = open(&disk).await;
    assert_eq!(disk.content(&path()).expect("there").len(), before, "not cut");
    let found = store.report()[0];
    assert!(found.damaged && !found.sealed && found.length == 100);
    assert!(read(&store, 0, 100).await.is_ok());
    let error = read(&store, 50, 100).await.expect_err("damaged");
    assert_eq!(error.code, ErrorCode::ErrorCorrupt);
    assert!(error.message.contains("chunk 4660") && error.message.contains("offset 100"), "{error}");
    assert_eq!(code(add(&store, 1, 100, 10, false).await), ErrorCode::ErrorCorrupt);
    // A fence is kept behind the damage; a seal below it heals the file.
    assert_eq!(store.order(ID, ChunkOrder::Fence(Epoch(2))).await.expect("fenced").length, 100);
    let store = open(&disk).await;
    assert_eq!((store.report()[0].epoch, store.report()[0].length), (2, 100));
    assert_eq!(
        code(store.order(ID, ChunkOrder::Seal { epoch: Epoch(2), length: 200 }).await),
        ErrorCode::ErrorRange
    );
    store.order(ID, ChunkOrder::Seal { epoch: Epoch(2), length: 100 }).await.expect("sealed");
    let found = open(&disk).await.report()[0];
    assert!(found.sealed && !found.damaged && found.length == 100);
}

#[tokio::test]
async fn flipped_bits_in_a_sealed_chunk_are_found_by_reads_and_the_store_lives_on() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    build(&store, &[100, 100], true).await;
    store.order(ID, ChunkOrder::Seal { epoch: Epoch(2), length: 200 }).await.expect("sealed");
    let (first, second) = (entries(&[100, 100])[0], entries(&[100, 100])[1]);
    disk.tamper(&path(), |bytes| {
        bytes[usize::try_from(first.payload_position()).expect("small") + 3] ^= 1;
        bytes[usize::try_from(second.position).expect("small") + 30] ^= 1;
    });
    for store in [&store, &open(&disk).await] {
        let error = read(store, 50, 10).await.expect_err("its payload is damaged");
        assert_eq!(error.code, ErrorCode::ErrorCorrupt);
        assert!(error.message.contains("offset 0"), "{error}");
        let error = read(store, 150, 10).await.expect_err("damaged");
        assert_eq!(error.code, ErrorCode::ErrorCorrupt);
        assert!(error.message.contains("offset 100"), "{error}");
    }
    // Without the footer the second record's header is needed for the index, too.
    let store = open(&disk).await;
    disk.tamper(&path(), |bytes| bytes.truncate(bytes.len() - 10));
    assert_eq!(code(store.read(ID, 0, 100).await), ErrorCode::ErrorCorrupt);
    disk.tamper(&path(), |bytes| bytes[usize::try_from(second.position).expect("small") + 30] ^= 1);
    assert_eq!(code(store.read(ID, 0, 100).await), ErrorCode::ErrorCorrupt, "still its own damage");
    assert!(store.read(ID, 100, 100).await.is_ok());
}

#[tokio::test]
async fn a_torn_footer_is_written_again() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    build(&store, &[100, 100], true).await;
    store.order(ID, ChunkOrder::Seal { epoch: Epoch(2), length: 200 }).await.expect("sealed");
    let whole = disk.content(&path()).expect("there");
    let report = store.report();
    for cut in 1..=104 {
        disk.tamper(&path(), |bytes| bytes.truncate(whole.len() - cut));
        assert_eq!(open(&disk).await.report(), report);
        assert!(disk.content(&path()).expect("there") == whole);
    }
    // Without the Seal record there was no seal.
    disk.tamper(&path(), |bytes| bytes.truncate(whole.len() - 105));
    let store = open(&disk).await;
    assert!(!store.report()[0].sealed && store.report()[0].length == 200);
    assert_eq!(
        code(add(&store, 1, 200, 10, true).await),
        ErrorCode::ErrorStaleEpoch,
        "the header has the epoch"
    );
    assert_eq!(add(&store, 2, 200, 10, true).await.expect("open again").length, 210);
}

#[tokio::test]
async fn what_is_no_chunk_file_of_ours_is_left_alone() {
    let disk = TestDisk::default();
    let store = open(&disk).await;
    build(&store, &[100], true).await;
    let bytes = disk.content(&path()).expect("there");
    let dir = DataDir::new("/a".into(), None);
    for (id, change) in [(1_u64, 0_usize), (2, 8)] {
        let file = disk.open(&dir.chunk_path(ChunkId(id)), dfs_env::disk::OpenMode::CreateNew).expect("new");
        let mut bytes = bytes.clone();
        if change > 0 {
            // A later format, with a valid checksum.
            bytes[change] = 9;
            let sum = dfs_proto::checksum::crc32c(&bytes[..FILE_HEADER - 4]);
            bytes[FILE_HEADER - 4..FILE_HEADER].copy_from_slice(&sum.to_le_bytes());
        }
        file.write_all_at(&bytes, 0).expect("written");
    }
    disk.open(Path::new("/a/chunks/07/note.txt"), dfs_env::disk::OpenMode::CreateNew).expect("new");
    let store = open(&disk).await;
    assert_eq!(store.report().iter().map(|found| found.chunk).collect::<Vec<_>>(), [ID.get()]);
    assert_eq!(disk.files().len(), 4);
    // Nor is it overwritten, and it is no fault of the directory.
    let taken = store.append(ChunkId(1), record(1, 0, payload(0, 10)), false).await;
    assert_eq!(code(taken), ErrorCode::ErrorIo);
    assert!(!store.0.dirs.report()[0].failed);
    assert_eq!(disk.content(&dir.chunk_path(ChunkId(1))), Some(bytes.clone()));
    // A file that was being created when the power went holds nothing and goes.
    let torn = dir.chunk_path(ChunkId(3));
    disk.open(&torn, dfs_env::disk::OpenMode::CreateNew)
        .expect("new")
        .write_all_at(&bytes[..40], 0)
        .expect("written");
    open(&disk).await;
    assert!(disk.content(&torn).is_none());
}

#[test]
fn a_record_inside_a_payload_is_no_record() {
    let disk = TestDisk::default();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    runtime.block_on(async {
        let store = open(&disk).await;
        build(&store, &[100, 100], true).await;
        // Somebody stores this very chunk file in the chunk, and the end of it is torn.
        let copy = Bytes::from(disk.content(&path()).expect("there"));
        store.append(ID, record(1, 200, copy), false).await.expect("appended");
        disk.tamper(&path(), |bytes| bytes.truncate(bytes.len() - 1));
        let store = open(&disk).await;
        assert_eq!((store.report()[0].length, store.report()[0].damaged), (200, false));
    });
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(prop_oneof![1_usize..50, 1_000_usize..20_000], 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_file_cut_at_any_byte_keeps_every_whole_record(lengths in lengths(), cut: proptest::sample::Index) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        runtime.block_on(async {
            let disk = TestDisk::default();
            build(&open(&disk).await, &lengths, false).await;
            let cut = cut.index(disk.content(&path()).expect("there").len());
            disk.tamper(&path(), |bytes| bytes.truncate(cut));
            let store = open(&disk).await;
            let whole: Vec<_> = entries(&lengths).into_iter().filter(|entry| entry.end_position() <= cut as u64).collect();
            let end = whole.last().map_or(0, Entry::end);
            if cut < FILE_HEADER {
                assert_eq!((store.count(), disk.files().len()), (0, 0));
            } else {
                assert_eq!(store.report()[0].length, end);
                assert!(!store.report()[0].damaged);
                assert_eq!(add(&store, 1, end, 30, true).await.expect("goes on").length, end + 30);
                let expected = [&bytes_of(&lengths)[..usize::try_from(end).expect("small")], &payload(end, 30)].concat();
                assert!(read(&open(&disk).await, 0, expected.len()).await.expect("read") == expected);
            }
        });
    }

    #[test]
    fn a_flipped_bit_never_changes_what_is_read(lengths in lengths(), bit: proptest::sample::Index, seal: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        runtime.block_on(async {
            let disk = TestDisk::default();
            let store = open(&disk).await;
            build(&store, &lengths, true).await;
            let expected = bytes_of(&lengths);
            if seal {
                let order = ChunkOrder::Seal { epoch: Epoch(2), length: expected.len() as u64 };
                store.order(ID, order).await.expect("sealed");
            }
            let bit = bit.index(disk.content(&path()).expect("there").len() * 8);
            disk.tamper(&path(), |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            let store = open(&disk).await;
            for entry in entries(&lengths) {
                let range = usize::try_from(entry.offset).expect("small")..usize::try_from(entry.end()).expect("small");
                let untouched = (bit / 8) as u64 >= entry.end_position();
                match read(&store, entry.offset, entry.length as usize).await {
                    Ok(bytes) => assert!(bytes == expected[range]),
                    Err(error) => assert!(!untouched, "a record before the flipped bit is lost: {error}"),
                }
            }
        });
    }

    #[test]
    fn what_was_synced_survives_a_power_cut(
        steps in proptest::collection::vec((prop_oneof![1_usize..50, 1_000_usize..20_000], 0_u8..4), 1..15),
        keep in proptest::collection::vec(any::<bool>(), 1..200),
        fence: bool, seal: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        runtime.block_on(async {
            let disk = TestDisk::default();
            let store = open(&disk).await;
            let (mut end, mut synced, mut lengths) = (0, 0, Vec::new());
            for (length, sync) in steps {
                let held = add(&store, 1, end, length, sync == 0).await.expect("appended");
                lengths.push(length);
                end = held.length;
                synced = synced.max(held.synced);
            }
            if fence {
                store.order(ID, ChunkOrder::Fence(Epoch(2))).await.expect("fenced");
                synced = end;
            }
            if seal {
                let order = ChunkOrder::Seal { epoch: Epoch(2), length: synced };
                store.order(ID, order).await.expect(if synced == 0 { "an empty seal" } else { "sealed" });
            }
            let mut bits = keep.iter().cycle();
            disk.cut_power(|| *bits.next().expect("a cycle"));
            let store = open(&disk).await;
            let found = store.report().first().copied().unwrap_or_default();
            assert!(found.length >= synced, "{} of {synced} synced bytes survived", found.length);
            assert!(!found.damaged, "a power cut is no damage");
            assert!(!fence || found.epoch == 2);
            assert!(!seal || (found.sealed && found.length == synced));
            let expected = bytes_of(&lengths);
            for entry in entries(&lengths).into_iter().filter(|entry| entry.end() <= found.length) {
                let range = usize::try_from(entry.offset).expect("small")..usize::try_from(entry.end()).expect("small");
                assert!(read(&store, entry.offset, entry.length as usize).await.expect("read") == expected[range]);
            }
            // Whatever was left behind, the master can always end the chunk at what was synced, and again after that.
            let seal = ChunkOrder::Seal { epoch: Epoch(3), length: synced };
            if found.chunk != 0 {
                let length = store.order(ID, seal).await.expect("sealed").length;
                assert_eq!(length, synced);
                assert_eq!(open(&disk).await.report()[0].length, synced);
            }
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_power_cut_inside_any_operation_takes_back_nothing_that_was_answered(
        lengths in proptest::collection::vec(prop_oneof![1_usize..50, 500_usize..3_000], 1..6),
        committed: proptest::sample::Index,
        changes in 0_u64..40,
        keep in proptest::collection::vec(any::<bool>(), 1..200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        runtime.block_on(async {
            let disk = TestDisk::default();
            let store = open(&disk).await;
            *lock(&disk.faults.changes_left) = Some(changes);
            // The client: every record is synced, some are committed. Then the chunk is fenced and sealed there.
            let committed = entries(&lengths)[committed.index(lengths.len())].end();
            let (mut synced, mut end) = (0, 0);
            for length in &lengths {
                if let Ok(held) = add(&store, 1, end, *length, true).await {
                    (synced, end) = (held.synced, held.length);
                }
            }
            let fenced = store.order(ID, ChunkOrder::Fence(Epoch(2))).await.is_ok();
            let seal = || ChunkOrder::Seal { epoch: Epoch(2), length: committed };
            // The master orders a seal only after fences were answered.
            let sealed = fenced && store.order(ID, seal()).await.is_ok();
            let mut bits = keep.iter().cycle();
            disk.cut_power(|| *bits.next().expect("a cycle"));
            let store = open(&disk).await;
            let found = store.report().first().copied().unwrap_or_default();
            assert!(found.length >= synced.min(if fenced { committed } else { u64::MAX }), "{found:?}");
            assert!(!found.damaged && (!fenced || found.epoch >= 2), "{found:?}");
            assert!(!sealed || (found.sealed && found.length == committed), "{found:?}");
            if fenced {
                assert_eq!(code(add(&store, 1, found.length, 10, false).await), ErrorCode::ErrorStaleEpoch);
                if found.length >= committed {
                    assert_eq!(store.order(ID, seal()).await.expect("sealed").length, committed);
                    let expected = bytes_of(&lengths);
                    for store in [&store, &open(&disk).await] {
                        let read = read(store, 0, usize::try_from(committed).expect("small")).await.expect("read");
                        assert!(read[..] == expected[..read.len()]);
                    }
                }
            }
        });
    }
}

#[tokio::test]
async fn a_torn_unsynced_middle_is_not_called_damage() {
    let disk = TestDisk::default();
    build(&open(&disk).await, &[100, 100, 100], false).await;
    let second = entries(&[100, 100, 100])[1];
    let from = usize::try_from(second.position).expect("small");
    disk.tamper(&path(), |bytes| bytes[from..from + RECORD_HEADER].fill(0));
    let found = recovery::open(&disk, &path(), ID, cluster_bytes("cluster")).expect("read");
    let Opened::Chunk(found) = found else { panic!("{found:?}") };
    assert_eq!((found.condition, found.length), (Condition::Damaged { proven: false }, 100));
    let store = open(&disk).await;
    assert!(!store.report()[0].damaged && store.report()[0].length == 100);
    assert_eq!(code(add(&store, 1, 100, 10, false).await), ErrorCode::ErrorCorrupt);
}

#[tokio::test]
async fn a_file_cut_anywhere_in_or_before_its_first_record_is_no_chunk_or_an_empty_one() {
    for length in [0, 1, FILE_HEADER - 1, FILE_HEADER, FILE_HEADER + 1, FILE_HEADER + RECORD_HEADER] {
        let disk = TestDisk::default();
        build(&open(&disk).await, &[100], false).await;
        disk.tamper(&path(), |bytes| bytes.truncate(length));
        match recovery::open(&disk, &path(), ID, cluster_bytes("cluster")).expect("read") {
            Opened::Nothing => assert!(length < FILE_HEADER),
            Opened::Chunk(found) => assert!(length >= FILE_HEADER && found.length == 0),
            Opened::Foreign(why) => panic!("{length}: {why}"),
        }
    }
}
