//! Three daemons over loopback: appends reach all, failures name the culprit, reads verify.

mod common;

use common::*;
use dfs_chunkd::StartError;
use dfs_proto::error::ErrorCode;
use dfs_proto::token::{ClusterKey, Rights};
use dfs_proto::{ChunkId, SessionId, v1};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_appends_of_several_chunks_are_on_all_three() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let daemons: [_; 3] = start_all(dir.path()).await;
    let mut client = Client::connect(&daemons[0]).await;
    let forward = [&daemons[1], &daemons[2]];
    let (chunks, records, length) = ([1, 2, 3], 40, 100_000);
    let mut requests = Vec::new();
    for record in 0..records {
        for chunk in chunks {
            let offset = record * length as u64;
            let mut request = append(chunk, offset, payload(chunk + record, length), &forward);
            request.id = chunk * 1_000 + record;
            request.sync = record % 8 == 7;
            requests.push(request);
        }
    }
    for (reply, request) in client.append_all(requests.clone()).await.into_iter().zip(&requests) {
        let end = request.offset + length as u64;
        assert_eq!(reply.failure, None);
        assert!(reply.length >= end && (!request.sync || reply.synced >= end), "{reply:?}");
    }
    for daemon in &daemons {
        let mut client = Client::connect(daemon).await;
        for chunk in chunks {
            for record in 0..records {
                let expected = payload(chunk + record, length);
                let offset = record * length as u64;
                let found = client.read(chunk, offset, u32::try_from(length).expect("small")).await;
                assert!(found.expect("read") == expected, "chunk {chunk} record {record}");
            }
        }
    }
    for daemon in daemons {
        let begin = Instant::now();
        daemon.shutdown().await;
        assert!(begin.elapsed() < Duration::from_millis(1_500), "connected clients do not hold up a stop");
    }
    // Everything again after a restart.
    let daemons: [_; 3] = start_all(dir.path()).await;
    for daemon in &daemons {
        let found: Vec<_> = daemon.store().report().iter().map(|found| (found.chunk, found.length)).collect();
        assert_eq!(found, chunks.map(|chunk| (chunk, records * length as u64)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_good_token_or_another_version_gets_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let [daemon] = start_all(dir.path()).await;
    let mut client = Client::connect(&daemon).await;
    let good = append(1, 0, payload(1, 10), &[]);
    let other_key = ClusterKey::new(b"another secret of some cluster").expect("long enough");
    let issue = |key: &ClusterKey, chunk, rights, expiry_ms| {
        key.issue(SessionId(1), ChunkId(chunk), rights, expiry_ms).into()
    };
    for bad in [
        bytes::Bytes::new(),
        issue(&other_key, 1, Rights::APPEND, u64::MAX),
        issue(&key(), 2, Rights::APPEND, u64::MAX),
        issue(&key(), 1, Rights::READ, u64::MAX),
        issue(&key(), 1, Rights::APPEND, 1),
    ] {
        let reply = client.append(v1::AppendRequest { token: bad, ..good.clone() }).await;
        assert_eq!(reply.failed_node, daemon.node());
        assert_eq!(code(reply), ErrorCode::ErrorBadToken);
    }
    let error = failure(client.append(v1::AppendRequest { version: 9, ..good.clone() }).await);
    assert_eq!(error.code, ErrorCode::ErrorVersion);
    assert!(error.message.contains("version 1") && error.message.contains("version 9"), "{error}");
    assert_eq!(client.append(good).await.failure, None);
    let ask = |token, version| v1::ReadRequest { id: 7, version, chunk: 1, offset: 0, length: 10, token };
    for (token, version, code) in [
        (bytes::Bytes::new(), 1, ErrorCode::ErrorBadToken),
        (issue(&key(), 1, Rights::APPEND, u64::MAX), 1, ErrorCode::ErrorBadToken),
        (issue(&key(), 1, Rights::READ, u64::MAX), 2, ErrorCode::ErrorVersion),
    ] {
        let reply = client.ask(ask(token, version)).await;
        assert_eq!(dfs_proto::FsError::from(reply.failure.expect("refused")).code, code);
        assert!(reply.data.is_empty());
    }
    assert!(client.read(1, 0, 10).await.is_ok());
    assert_eq!(client.read(1, 5, 6).await.expect_err("beyond").code, ErrorCode::ErrorRange);
    assert_eq!(client.read(2, 0, 1).await.expect_err("unknown").code, ErrorCode::ErrorNoChunk);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_replica_is_named_at_once_and_back_when_it_is_back() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let [first, second, third] = start_all(dir.path()).await;
    let mut client = Client::connect(&first).await;
    let forward = [&second, &third];
    assert_eq!(client.append(append(1, 0, payload(1, 10), &forward)).await.failure, None);
    let mut request = append(1, 10, payload(2, 10), &forward);
    let address = third.address().to_owned();
    third.shutdown().await;
    let begin = Instant::now();
    let reply = client.append(request.clone()).await;
    assert_eq!(reply.failed_address, address);
    let error = failure(reply);
    assert!(error.code == ErrorCode::ErrorUnavailable && error.message.contains(&address), "{error}");
    assert!(begin.elapsed() < Duration::from_millis(1_500), "{:?}", begin.elapsed());
    let mut config = config(dir.path(), "d2");
    config.listen.clone_from(&address);
    let _third = start(config).await;
    // A retry: the first two have it already.
    request.id = 99;
    let reply = client.append(request).await;
    assert_eq!((reply.failure, reply.length), (None, 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_hangs_is_given_up_in_time() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let [first, second] = start_all(dir.path()).await;
    // It takes connections and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = silent.local_addr().expect("an address").to_string();
    let mut client = Client::connect(&first).await;
    for offset in [0, 10] {
        let mut request = append(1, offset, payload(offset, 10), &[&second]);
        request.forward.push(address.clone());
        let begin = Instant::now();
        let reply = client.append(request).await;
        assert_eq!(reply.failed_address, address);
        assert_eq!(code(reply), ErrorCode::ErrorUnavailable);
        let took = begin.elapsed();
        assert!(took < Duration::from_millis(2_500), "{took:?}");
    }
    assert_eq!(second.store().report()[0].length, 20, "the others went on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_refuses_is_named_with_its_cause() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let [first] = start_all(dir.path()).await;
    let mut small = config(dir.path(), "small");
    small.capacity = Some(10_000.into());
    let small = start(small).await;
    let mut client = Client::connect(&first).await;
    assert_eq!(client.append(append(1, 0, payload(1, 8_000), &[&small])).await.failure, None);
    let reply = client.append(append(1, 8_000, payload(1, 8_000), &[&small])).await;
    assert_eq!((reply.failed_node, reply.failed_address.as_str()), (small.node(), small.address()));
    assert_eq!(code(reply), ErrorCode::ErrorNoSpace);
    // Nobody forwards to himself, nor a record that is too long.
    assert_eq!(code(client.append(append(2, 0, payload(1, 8), &[&first])).await), ErrorCode::ErrorInvalid);
    let long = append(2, 0, payload(1, (1 << 20) + 1), &[]);
    assert_eq!(code(client.append(long).await), ErrorCode::ErrorInvalid);
    let longest = append(2, 0, payload(1, 1 << 20), &[]);
    assert_eq!(client.append(longest).await.failure, None);
    assert!(client.read(2, 0, 1 << 20).await.expect("read") == payload(1, 1 << 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_of_eight_bytes_work() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let daemons: [_; 2] = start_all(dir.path()).await;
    let mut client = Client::connect(&daemons[0]).await;
    let mut requests = Vec::new();
    for chunk in 1..=60 {
        for (offset, length) in [(0, 3), (3, 5)] {
            let mut request = append(chunk, offset, payload(chunk + offset, length), &[&daemons[1]]);
            (request.id, request.capacity, request.sync) = (chunk * 10 + offset, 8, offset > 0);
            requests.push(request);
        }
        let mut request = append(chunk, 8, payload(0, 1), &[&daemons[1]]);
        (request.id, request.capacity) = (chunk * 10 + 8, 8);
        requests.push(request);
    }
    for (n, reply) in client.append_all(requests).await.into_iter().enumerate() {
        match n % 3 {
            2 => assert_eq!(code(reply), ErrorCode::ErrorRange),
            _ => assert_eq!(reply.failure, None),
        }
    }
    for daemon in &daemons {
        let mut client = Client::connect(daemon).await;
        for chunk in 1..=60 {
            let expected = [payload(chunk, 3), payload(chunk + 3, 5)].concat();
            assert_eq!(client.read(chunk, 0, 8).await.expect("read"), expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_on_disk_is_found_by_whoever_reads_and_the_daemon_lives_on() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let [daemon] = start_all(dir.path()).await;
    let mut client = Client::connect(&daemon).await;
    for chunk in [1, 2] {
        let mut request = append(chunk, 0, payload(1, 50_000), &[]);
        request.sync = true;
        assert_eq!(client.append(request).await.failure, None);
    }
    let files = chunk_files(&dir.path().join("d0"));
    for (file, at) in files.iter().zip([64 + 20, 40_000]) {
        let mut bytes = std::fs::read(file).expect("read");
        bytes[at] ^= 0x10;
        std::fs::write(file, bytes).expect("written");
    }
    let error = client.read(1, 20_000, 10).await.expect_err("a damaged header");
    assert_eq!(error.code, ErrorCode::ErrorCorrupt);
    assert!(error.message.contains("chunk 1") && error.message.contains("offset 0"), "{error}");
    assert_eq!(
        client.read(2, 39_000, 1_000).await.expect_err("a damaged unit").code,
        ErrorCode::ErrorCorrupt
    );
    assert!(client.read(2, 0, 1_000).await.is_ok(), "other units are good");
    assert_eq!(client.append(append(3, 0, payload(1, 10), &[])).await.failure, None);
}

#[tokio::test]
async fn bad_starts_get_one_clear_line() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let [daemon] = start_all(dir.path()).await;
    let mut taken = config(dir.path(), "other");
    taken.listen = daemon.address().to_owned();
    let StartError::Failed(text) = try_start(taken).await.map(|_| ()).expect_err("the port is taken") else {
        panic!("exit status 1 is promised")
    };
    assert!(text.contains(daemon.address()) && text.contains("in use") && !text.contains('\n'), "{text}");
    let twice = try_start(config(dir.path(), "d0")).await.map(|_| ()).expect_err("the directory is taken");
    assert!(matches!(&twice, StartError::Failed(text) if text.contains("another daemon")), "{twice}");
    let mut foreign = config(dir.path(), "d0");
    foreign.cluster_key_file = dir.path().join("other.key");
    let missing = try_start(foreign.clone()).await.map(|_| ()).expect_err("no key");
    assert!(matches!(&missing, StartError::Usage(text) if text.contains("other.key")), "{missing}");
    std::fs::write(&foreign.cluster_key_file, b"short").expect("written");
    let short = try_start(foreign.clone()).await.map(|_| ()).expect_err("a short key");
    assert!(matches!(&short, StartError::Usage(text) if text.contains("16 bytes")), "{short}");
    daemon.shutdown().await;
    std::fs::write(&foreign.cluster_key_file, b"the secret of another cluster").expect("written");
    let other = try_start(foreign).await.map(|_| ()).expect_err("another cluster");
    assert!(matches!(&other, StartError::Usage(text) if text.contains("belongs to cluster")), "{other}");
}
