//! File bytes, from the client to real chunk daemons and back.

mod support;

use dfs_client::{Attr, Client, InodeNo, OpenFile, OpenFlags, Privileges, SeekKind, v1};
use dfs_proto::error::ErrorCode;
use std::sync::Arc;
use std::time::Duration;
use support::{Cluster, ROOT, Shape, new, root, user};

const READ: OpenFlags =
    OpenFlags { read: true, write: false, append: false, truncate: false, exec: false, sync: false };
const WRITE: OpenFlags = OpenFlags { write: true, ..READ };
const APPEND: OpenFlags = OpenFlags { append: true, ..WRITE };

async fn cluster(chunk_size: u64) -> Cluster {
    Cluster::start(Shape { chunkds: 2, chunk_size, ..Shape::default() }).await
}

async fn create(client: &Client, name: &str) -> Arc<OpenFile> {
    let (entry, file) =
        client.create_open(&root(), new(ROOT, name, v1::Kind::File), WRITE).await.expect(name);
    assert!(entry.created);
    file
}

async fn write(client: &Client, file: &OpenFile, offset: u64, data: &[u8]) {
    for (at, part) in data.chunks(128 << 10).enumerate() {
        let offset = offset + (at * (128 << 10)) as u64;
        match client.try_write(file, offset, part, &Privileges::Keep) {
            Some(result) => result.expect("written"),
            None => client.write(file, offset, part, &Privileges::Keep).await.expect("written"),
        }
    }
}

async fn read(client: &Client, file: &OpenFile) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let part = client.read(file, all.len() as u64, 128 << 10).await.expect("read");
        if part.is_empty() {
            return all;
        }
        all.extend_from_slice(&part);
    }
}

/// Another client's view: only what is committed.
async fn read_afresh(cluster: &Cluster, name: &str) -> Vec<u8> {
    let client = cluster.client().await;
    let attr = client.lookup(&root(), ROOT, name.as_bytes()).await.expect(name);
    let file = client.open(&root(), InodeNo(attr.ino), READ).await.expect("open");
    let data = read(&client, &file).await;
    client.release(file).await.expect("closed");
    client.shutdown().await.expect("clean end");
    data
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 251) as u8).collect()
}

fn by_handle(file: &OpenFile) -> v1::SetAttr {
    v1::SetAttr { ino: file.ino.get(), by_handle: true, ..v1::SetAttr::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_come_back_before_and_after_the_commit() {
    let cluster = cluster(1 << 20).await;
    let client = cluster.client().await;
    let data = pattern(5 << 20);
    let file = create(&client, "f").await;
    write(&client, &file, 0, &data).await;
    assert_eq!(
        client.getattr(file.ino).await.expect("attr").size,
        data.len() as u64,
        "own writes show at once"
    );
    assert!(read(&client, &file).await == data, "before the flush");
    client.flush(&file).await.expect("flushed");
    let committed: Attr = client.getattr(file.ino).await.expect("attr");
    assert_eq!(committed.size, data.len() as u64);
    assert!(read(&client, &file).await == data, "after the flush");
    assert!(read_afresh(&cluster, "f").await == data, "for others");
    write(&client, &file, 1000, b"over").await;
    client.release(file).await.expect("closed");
    client.shutdown().await.expect("clean end");
    let mut expected = data;
    expected[1000..1004].copy_from_slice(b"over");
    assert!(
        read_afresh(&cluster, "f").await == expected,
        "what a closed file had left is flushed at the end"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_of_eight_bytes_work() {
    let cluster = cluster(8).await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let data = pattern(1001);
    for (at, part) in data.chunks(7).enumerate() {
        client.write(&file, (at * 7) as u64, part, &Privileges::Keep).await.expect("written");
        if at % 20 == 0 {
            client.fsync(file.ino).await.expect("flushed");
        }
    }
    client.flush(&file).await.expect("flushed");
    assert!(read_afresh(&cluster, "f").await == data);
    client.unlink(&root(), ROOT, b"f").await.expect("unlinked");
    assert!(read(&client, &file).await == data, "it lives while it is open");
    client.release(file).await.expect("closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_land_one_after_the_other() {
    let cluster = cluster(1 << 20).await;
    let client = cluster.client().await;
    let first = create(&client, "log").await;
    client.write(&first, 0, b"head", &Privileges::Keep).await.expect("written");
    let writers: Vec<_> = (0..4)
        .map(|writer: u8| {
            let (client, ino) = (client.clone(), first.ino);
            tokio::spawn(async move {
                let file = client.open(&root(), ino, APPEND).await.expect("open");
                for _ in 0..50 {
                    client.append(&file, &[writer; 10], &Privileges::Keep).await.expect("appended");
                }
                client.flush(&file).await.expect("flushed");
                client.release(file).await.expect("closed");
            })
        })
        .collect();
    for writer in writers {
        writer.await.expect("no panic");
    }
    client.flush(&first).await.expect("flushed");
    let data = read_afresh(&cluster, "log").await;
    assert_eq!(data.len(), 4 + 2000);
    assert!(data[4..].chunks(10).all(|part| part.iter().all(|byte| *byte == part[0])), "none is torn");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncation_holes_and_seeks() {
    let cluster = cluster(1 << 20).await;
    let client = cluster.client().await;
    let file = create(&client, "sparse").await;
    let far = 1_u64 << 40;
    client.write(&file, far, b"end", &Privileges::Keep).await.expect("written");
    assert_eq!(client.getattr(file.ino).await.expect("attr").size, far + 3);
    assert_eq!(client.seek(&file, 0, SeekKind::Data).await, Ok(far));
    assert_eq!(client.seek(&file, 0, SeekKind::Hole).await, Ok(0));
    assert_eq!(client.seek(&file, far + 1, SeekKind::Hole).await, Ok(far + 3));
    let past = client.seek(&file, far + 3, SeekKind::Data).await.expect_err("past the end");
    assert_eq!(past.code, ErrorCode::ErrorNoDeviceAddress);
    assert!(client.read(&file, far / 2, 100).await.expect("hole").iter().all(|byte| *byte == 0));
    assert!(client.getattr(file.ino).await.expect("attr").blocks < 10_000);

    client.setattr(&root(), v1::SetAttr { size: Some(4), ..by_handle(&file) }).await.expect("cut");
    client.write(&file, 8, b"x", &Privileges::Keep).await.expect("written");
    assert_eq!(read(&client, &file).await, b"\0\0\0\0\0\0\0\0x");
    client.setattr(&root(), v1::SetAttr { size: Some(20), ..by_handle(&file) }).await.expect("extended");
    client.flush(&file).await.expect("flushed");
    assert_eq!(read_afresh(&cluster, "sparse").await, b"\0\0\0\0\0\0\0\0x\0\0\0\0\0\0\0\0\0\0\0");
    let truncating = OpenFlags { truncate: true, ..WRITE };
    let again = client.open(&root(), file.ino, truncating).await.expect("open");
    assert_eq!(client.getattr(file.ino).await.expect("attr").size, 0);
    assert!(read(&client, &again).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allocation_and_copies_by_reference() {
    let cluster = cluster(1 << 20).await;
    let client = cluster.client().await;
    let (from, to) = (create(&client, "from").await, create(&client, "to").await);
    let data = pattern(300_000);
    write(&client, &from, 0, &data).await;
    let copied = client.copy_range(&root(), &from, 0, &to, 5, data.len() as u64).await.expect("copied");
    assert_eq!(copied, data.len() as u64);
    let both = read(&client, &to).await;
    assert!(both.len() == data.len() + 5 && both[5..] == data[..] && both[..5] == [0; 5]);
    client.fallocate(&root(), &to, 0, 100, true, true, false).await.expect("punched");
    let punched = read(&client, &to).await;
    assert!(punched[..100].iter().all(|byte| *byte == 0) && punched[100..] == both[100..]);
    assert!(read(&client, &from).await == data, "the original is whole");
    client.fallocate(&root(), &to, 0, 400_000, false, false, false).await.expect("extended");
    assert_eq!(client.getattr(to.ino).await.expect("attr").size, 400_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_and_modes_follow_writes_and_are_kept_when_set() {
    let cluster = cluster(1 << 20).await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    let before = client.getattr(file.ino).await.expect("attr");
    tokio::time::sleep(Duration::from_millis(20)).await;
    client.write(&file, 0, b"x", &Privileges::Keep).await.expect("written");
    let dirty = client.getattr(file.ino).await.expect("attr");
    assert!(dirty.mtime.map(|time| time.key()) > before.mtime.map(|time| time.key()));
    let old = v1::Timestamp { seconds: 1_000_000_000, nanos: 5 };
    let set = v1::SetAttr { mtime: Some(old), ..by_handle(&file) };
    client.setattr(&root(), set).await.expect("set");
    client.flush(&file).await.expect("flushed");
    assert_eq!(client.getattr(file.ino).await.expect("attr").mtime, Some(old), "no later commit undoes it");

    let mode = v1::SetAttr { mode: Some(0o6777), ..by_handle(&file) };
    client.setattr(&root(), mode).await.expect("set");
    let others = client.open(&user(1000), file.ino, WRITE).await.expect("open");
    assert!(client.try_write(&others, 0, b"y", &Privileges::of_writer(&user(1000))).is_none());
    client.write(&others, 0, b"y", &Privileges::of_writer(&user(1000))).await.expect("written");
    assert_eq!(
        client.getattr(file.ino).await.expect("attr").mode,
        0o777,
        "a write by a user clears the bits"
    );

    let seen = client.getattr(file.ino).await.expect("attr");
    client.read(&file, 0, 1).await.expect("read");
    let read = client.getattr(file.ino).await.expect("attr");
    assert!(read.atime.map(|time| time.key()) > seen.mtime.map(|time| time.key()), "relatime");
    client.sync().await.expect("synced");
    let fresh = cluster.client().await.getattr(file.ino).await.expect("attr");
    assert_eq!(fresh.atime, read.atime, "the master has it too");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlinked_file_lives_until_it_is_closed() {
    let cluster = cluster(1 << 20).await;
    let client = cluster.client().await;
    let file = create(&client, "f").await;
    client.write(&file, 0, b"before", &Privileges::Keep).await.expect("written");
    client.unlink(&root(), ROOT, b"f").await.expect("unlinked");
    client.write(&file, 6, b" after", &Privileges::Keep).await.expect("written");
    client.fsync(file.ino).await.expect("flushed");
    assert_eq!(read(&client, &file).await, b"before after");
    assert_eq!(client.getattr(file.ino).await.expect("attr").nlink, 0);
    let ino = file.ino;
    client.release(file).await.expect("closed");
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(client.getattr(ino).await.expect_err("freed").code, ErrorCode::ErrorStale);

    let hidden = v1::Create { anonymous: true, ..new(ROOT, "", v1::Kind::File) };
    let (_, file) = client.create_open(&root(), hidden, WRITE).await.expect("O_TMPFILE");
    client.write(&file, 0, b"shown", &Privileges::Keep).await.expect("written");
    client.link(&root(), file.ino, ROOT, b"named").await.expect("linked");
    client.release(file).await.expect("closed");
    client.sync().await.expect("synced");
    assert_eq!(read_afresh(&cluster, "named").await, b"shown");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_files_are_all_there() {
    let cluster = cluster(1 << 20).await;
    let client = cluster.client().await;
    let parts: Vec<_> = (0..8)
        .map(|part| {
            let client = client.clone();
            tokio::spawn(async move {
                for number in 0..50 {
                    let name = format!("{part}-{number}");
                    let file = create(&client, &name).await;
                    write(&client, &file, 0, name.repeat(100).as_bytes()).await;
                    client.flush(&file).await.expect("flushed");
                    client.release(file).await.expect("closed");
                }
            })
        })
        .collect();
    for part in parts {
        part.await.expect("no panic");
    }
    let other = cluster.client().await;
    for part in 0..8 {
        for number in 0..50 {
            let name = format!("{part}-{number}");
            let attr = other.lookup(&root(), ROOT, name.as_bytes()).await.expect("there");
            let file = other.open(&root(), InodeNo(attr.ino), READ).await.expect("open");
            assert_eq!(read(&other, &file).await, name.repeat(100).as_bytes());
            other.release(file).await.expect("closed");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_was_there_is_opened_with_the_right_to_it() {
    let cluster = cluster(1 << 20).await;
    let client = cluster.client().await;
    let secret = v1::Create { mode: 0o600, ..new(ROOT, "f", v1::Kind::File) };
    client.create(&root(), secret).await.expect("made");
    let shared = v1::SetAttr { ino: ROOT.get(), mode: Some(0o777), ..v1::SetAttr::default() };
    client.setattr(&root(), shared).await.expect("set");
    let open = v1::Create { exclusive: false, ..new(ROOT, "f", v1::Kind::File) };
    let denied = client.create_open(&user(5), open.clone(), WRITE).await.err().expect("denied");
    assert_eq!(denied.code, ErrorCode::ErrorAccess);
    let (entry, file) = client.create_open(&root(), open, WRITE).await.expect("opened");
    assert!(!entry.created);
    client.release(file).await.expect("closed");
    let read_only = client.open(&root(), InodeNo(entry.attr.ino), READ).await.expect("open");
    assert!(client.write(&read_only, 0, b"x", &Privileges::Keep).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_chunk_daemon_is_a_pause() {
    for chunk_size in [64, 4 << 20] {
        let mut cluster = Cluster::start(Shape { chunkds: 3, chunk_size, ..Shape::default() }).await;
        let client = cluster.client().await;
        let data = pattern(if chunk_size == 64 { 4_000 } else { 24 << 20 });
        let file = create(&client, "f").await;
        let half = data.len() / 2;
        write(&client, &file, 0, &data[..half]).await;
        client.fsync(file.ino).await.expect("durable");
        let writing = {
            let (client, file, rest) = (client.clone(), Arc::clone(&file), data[half..].to_vec());
            tokio::spawn(async move {
                for (at, part) in rest.chunks(rest.len() / 20).enumerate() {
                    write(&client, &file, (half + at * (rest.len() / 20)) as u64, part).await;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                client.flush(&file).await.expect("durable");
            })
        };
        tokio::time::sleep(Duration::from_millis(60)).await;
        cluster.chunkds[0].take().expect("it runs").shutdown().await;
        writing.await.expect("no error was seen");
        assert!(read(&client, &file).await == data, "with chunks of {chunk_size}");
        assert!(read_afresh(&cluster, "f").await == data, "with chunks of {chunk_size}");
    }
}
