//! Copies: as good as their source, never half there, and what they replace stays until they are whole.

use super::test_disk::TestDisk;
use super::tests::{ID, build, bytes_of, code, entries, open, path, read, store_of};
use super::*;
use dfs_proto::error::ErrorCode;
use proptest::prelude::*;
use std::path::Path;

const EPOCH: Epoch = Epoch(2);
const CAPACITY: ByteLen = ByteLen(64 << 20);

/// A sealed chunk of such records, on a disk of its own.
async fn source(lengths: &[usize]) -> Store {
    let store = open(&TestDisk::default()).await;
    build(&store, lengths, true).await;
    seal(&store, total(lengths)).await.expect("sealed");
    store
}

fn total(lengths: &[usize]) -> u64 {
    lengths.iter().map(|length| *length as u64).sum()
}

async fn seal(store: &Store, length: u64) -> FsResult<Settled> {
    store.order(ID, ChunkOrder::Seal { epoch: EPOCH, length }).await
}

/// Copies the chunk from one store to another.
async fn copy(from: &Store, to: &Store, length: u64) -> FsResult<Settled> {
    let mut draft = to.draft(ID, EPOCH, CAPACITY, length).await?;
    while draft.length() < length {
        draft.add(&from.records(ID, draft.length(), length).await?)?;
    }
    draft.finish()?;
    to.order(ID, ChunkOrder::Install(Box::new(draft))).await
}

#[tokio::test]
async fn a_copy_is_what_its_source_is() {
    let lengths = [100, 20_000, 1 << 20, 1, 300_000, 1 << 20, 17];
    let from = source(&lengths).await;
    let disk = TestDisk::default();
    let to = open(&disk).await;
    let copied = copy(&from, &to, total(&lengths)).await.expect("copied");
    let again = seal(&from, total(&lengths)).await.expect("again");
    assert_eq!(copied, again, "the same epoch, length and digest");
    disk.cut_power(|| false);
    for store in [to, open(&disk).await] {
        let found = store.report();
        assert!(found.len() == 1 && found[0].sealed && !found[0].damaged, "{found:?}");
        assert_eq!(seal(&store, total(&lengths)).await, Ok(copied));
        for entry in entries(&lengths) {
            let range = usize::try_from(entry.offset).unwrap()..usize::try_from(entry.end()).unwrap();
            let bytes = read(&store, entry.offset, entry.length as usize).await.expect("read");
            assert!(bytes == bytes_of(&lengths)[range]);
        }
    }
    assert_eq!(disk.files(), [path()], "nothing is left over");
}

#[tokio::test]
async fn what_is_in_the_wrong_place_or_damaged_is_not_taken() {
    let from = source(&[10, 20, 30]).await;
    let disk = TestDisk::default();
    let to = open(&disk).await;
    let records = from.records(ID, 0, 60).await.expect("read");
    assert_eq!(records.len(), 3);
    assert_eq!(from.records(ID, 10, 30).await.expect("read").len(), 1, "only whole records below the end");
    assert_eq!(code(from.records(ID, 11, 60).await), ErrorCode::ErrorRange);
    let mut draft = to.draft(ID, EPOCH, CAPACITY, 60).await.expect("begun");
    let begun = to.draft(ID, EPOCH, CAPACITY, 60).await.map(drop);
    assert_eq!(code(begun), ErrorCode::ErrorBusy, "one at a time");
    assert_eq!(code(draft.add(&records[1..])), ErrorCode::ErrorCorrupt);
    let mut changed = records.clone();
    changed[1].payload = bytes::Bytes::from_static(b"other bytes, as many");
    assert_eq!(code(draft.add(&changed)), ErrorCode::ErrorCorrupt);
    assert_eq!(draft.length(), 10, "the good record before it was taken");
    assert_eq!(code(draft.finish()), ErrorCode::ErrorRange);
    drop(draft);
    assert_eq!((disk.files().len(), to.0.dirs.totals().used_bytes), (0, 0));
    copy(&from, &to, 60).await.expect("anew");
}

#[tokio::test]
async fn a_copy_whose_disk_refuses_a_write_goes_on_where_it_was() {
    let lengths = [10, 20, 30];
    let from = source(&lengths).await;
    let disk = TestDisk::default();
    let to = open(&disk).await;
    let mut draft = to.draft(ID, EPOCH, CAPACITY, 60).await.expect("begun");
    let records = from.records(ID, 0, 60).await.expect("read");
    draft.add(&records[..1]).expect("taken");
    *lock(&disk.faults.write_below) = Some(("/a".into(), std::io::ErrorKind::StorageFull));
    assert_eq!(code(draft.add(&records[1..])), ErrorCode::ErrorNoSpace);
    assert_eq!(draft.length(), 10);
    assert_eq!(code(draft.finish()), ErrorCode::ErrorRange, "no copy with a hole");
    *lock(&disk.faults.write_below) = None;
    draft.add(&records[1..]).expect("taken");
    draft.finish().expect("whole");
    to.order(ID, ChunkOrder::Install(Box::new(draft))).await.expect("installed");
    assert!(read(&to, 0, 60).await.expect("read") == bytes_of(&lengths));
    to.verify(ID).await.expect("every byte");
}

#[tokio::test]
async fn a_chunk_of_very_many_records_is_copied() {
    let lengths = vec![3; 2 * dfs_proto::limits::FETCH_RECORDS + 5];
    let from = source(&lengths).await;
    let dir = tempfile::tempdir().expect("a directory");
    let all = vec![DataDir::new(dir.path().to_owned(), None)];
    durable::make_chunk_dirs(&dfs_env::disk::RealDisk, dir.path()).expect("made");
    let env = Env::real();
    let to = Store::open(env.clone(), Dirs::new(env, all, None, 0), "cluster").await;
    copy(&from, &to, total(&lengths)).await.expect("copied");
    to.verify(ID).await.expect("every byte");
}

#[tokio::test]
async fn a_copy_left_by_a_crash_is_removed_by_the_next_start() {
    let from = source(&[10, 20]).await;
    let disk = TestDisk::default();
    let to = open(&disk).await;
    let mut draft = to.draft(ID, EPOCH, CAPACITY, 30).await.expect("begun");
    draft.add(&from.records(ID, 0, 30).await.expect("read")).expect("taken");
    std::mem::forget(draft);
    assert_eq!(disk.files(), [path().with_extension(draft::DRAFT)]);
    let again = open(&disk).await;
    assert_eq!((disk.files().len(), again.count()), (0, 0));
}

#[tokio::test]
async fn damage_that_is_found_is_reported_once_and_healed_by_a_copy() {
    let lengths = [100, 200, 300];
    let from = source(&lengths).await;
    let disk = TestDisk::default();
    let to = open(&disk).await;
    copy(&from, &to, 600).await.expect("copied");
    let position = usize::try_from(entries(&lengths)[1].payload_position()).unwrap();
    disk.tamper(&path(), |bytes| bytes[position] ^= 1);
    assert_eq!(code(to.records(ID, 100, 600).await), ErrorCode::ErrorCorrupt);
    let found = to.noted().await;
    assert!(found.len() == 1 && found[0].damaged && found[0].chunk == ID.get());
    assert_eq!(code(to.records(ID, 100, 600).await), ErrorCode::ErrorCorrupt);
    let more = tokio::time::timeout(std::time::Duration::from_millis(20), to.noted()).await;
    assert!(more.is_err(), "it is known");
    assert_eq!(to.records(ID, 0, 100).await.expect("good").len(), 1, "what is good is read");
    copy(&from, &to, 600).await.expect("copied");
    assert!(!to.report()[0].damaged);
    assert!(read(&to, 0, 600).await.expect("read") == bytes_of(&lengths));
}

#[tokio::test]
async fn a_copy_leaves_a_directory_that_has_failed() {
    let lengths = [100, 200];
    let from = source(&lengths).await;
    let disk = TestDisk::default();
    let to = store_of(&disk, None, &["/a", "/b"]).await;
    copy(&from, &to, 300).await.expect("copied");
    let there = disk.files().remove(0);
    let failed = to.0.dirs.all.iter().find(|dir| there.starts_with(&dir.path)).expect("one of them");
    failed.fail(&ErrorCode::ErrorIo.into());
    assert!(to.report()[0].damaged, "its disk cannot be relied on");
    copy(&from, &to, 300).await.expect("copied");
    assert!(!to.report()[0].damaged);
    let files = disk.files();
    assert!(files.len() == 1 && !files[0].starts_with(Path::new(&failed.path)), "{files:?}");
    assert!(read(&to, 0, 300).await.expect("read") == bytes_of(&lengths));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_flipped_bit_of_a_sealed_chunk_is_found_by_a_scrub(
        lengths in proptest::collection::vec(prop_oneof![1_usize..50, 500_usize..40_000], 1..6),
        bit: proptest::sample::Index,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        runtime.block_on(async {
            let disk = TestDisk::default();
            let store = open(&disk).await;
            build(&store, &lengths, true).await;
            store.order(ID, ChunkOrder::Fence(EPOCH)).await.expect("fenced");
            seal(&store, total(&lengths)).await.expect("sealed");
            let bytes = disk.content(&path()).expect("there").len();
            assert_eq!(store.verify(ID).await.expect("whole").length, total(&lengths));
            let bit = bit.index(bytes * 8);
            disk.tamper(&path(), |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            assert_eq!(code(store.verify(ID).await), ErrorCode::ErrorCorrupt);
            assert!(store.noted().await[0].damaged);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Wherever the power goes: afterwards there is what was there before, or the whole copy; the copy once it was answered.
    #[test]
    fn a_power_cut_inside_a_copy_leaves_the_old_replica_or_the_new_one(
        lengths in proptest::collection::vec(prop_oneof![1_usize..50, 500_usize..30_000], 1..6),
        old: bool,
        failed: bool,
        changes in 0_u64..16,
        keep in proptest::collection::vec(any::<bool>(), 1..200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
        runtime.block_on(async {
            let from = source(&lengths).await;
            let disk = TestDisk::default();
            let store = store_of(&disk, None, &["/a", "/b"]).await;
            if old {
                build(&store, &lengths[..1], true).await;
            }
            let before = store.report();
            if old && failed {
                // The copy goes to the other directory.
                let there = disk.files().remove(0);
                let all = &store.0.dirs.all;
                all.iter().find(|dir| there.starts_with(&dir.path)).expect("one of them").fail(&ErrorCode::ErrorIo.into());
            }
            *lock(&disk.faults.changes_left) = Some(changes);
            let copied = copy(&from, &store, total(&lengths)).await.is_ok();
            let mut bits = keep.iter().cycle();
            disk.cut_power(|| *bits.next().expect("a cycle"));
            let store = store_of(&disk, None, &["/a", "/b"]).await;
            let after = store.report();
            match after.first() {
                Some(found) if found.sealed => {
                    assert_eq!(found.length, total(&lengths));
                    let length = usize::try_from(found.length.min(1 << 20)).unwrap();
                    assert!(read(&store, 0, length).await.expect("read") == bytes_of(&lengths)[..length]);
                }
                _ => {
                    assert!(!copied, "it was answered: {after:?}");
                    assert_eq!(after, before);
                }
            }
            assert!(disk.files().iter().all(|path| path.extension().is_some_and(|end| end == "chunk")));
            assert_eq!(copy(&from, &store, total(&lengths)).await.expect("now").length, total(&lengths));
        });
    }
}
