//! Figures, not verdicts: `cargo test --release -p dfs-master --test service -- --ignored --nocapture speed`.

use crate::harness::*;
use dfs_proto::v1::{ClientFrame, ErrorCode, Request};
use std::time::Instant;

const ONE_BY_ONE: u64 = 500;
const FRAMES: u64 = 100;
const PER_FRAME: u64 = 100;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures"]
async fn speed_of_creates_and_lookups() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.session_ttl_ms = 60_000;
    let master = start_with(config).await;
    let mut client = client(master.address()).await;
    let began = Instant::now();
    for at in 0..ONE_BY_ONE {
        client.create(&format!("one{at}"), false).await;
    }
    let each = began.elapsed() / u32::try_from(ONE_BY_ONE).unwrap();
    println!("create, one after the other: {each:?} each");
    let began = Instant::now();
    for at in 0..ONE_BY_ONE {
        client.lookup(&format!("one{at}")).await.unwrap();
    }
    let each = began.elapsed() / u32::try_from(ONE_BY_ONE).unwrap();
    println!("lookup, one after the other: {each:?} each");
    let began = Instant::now();
    let first = 1_000_000;
    let mut answered = first;
    for frame in 0..FRAMES {
        // Ten frames are under way at a time.
        while answered + 10 * PER_FRAME < first + frame * PER_FRAME {
            assert_eq!(code(&client.answer(answered).await), ErrorCode::ErrorOk);
            answered += 1;
        }
        let request = |seq: u64| Request {
            seq,
            cred: Some(dfs_proto::v1::Cred::default()),
            op: Some(mutation_op(create(&format!("many{seq}"), false))),
            ..Request::default()
        };
        let seqs = first + frame * PER_FRAME..first + (frame + 1) * PER_FRAME;
        let requests = seqs.map(request).collect();
        let frame = ClientFrame { requests, lowest_unanswered: answered, ..ClientFrame::default() };
        client.send_frame(frame).await;
    }
    while answered < first + FRAMES * PER_FRAME {
        assert_eq!(code(&client.answer(answered).await), ErrorCode::ErrorOk);
        answered += 1;
    }
    let rate = (FRAMES * PER_FRAME * 1_000_000_000) / u64::try_from(began.elapsed().as_nanos()).unwrap();
    println!("create, many at a time: {rate} a second");
    master.shutdown().await;
}
