//! Three masters: redirects, and nothing lost when the leader goes.

use crate::harness::*;
use dfs_master::{Config, Master};
use dfs_proto::v1::{ErrorCode, Hello};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Free ports, as far as one can tell.
fn ports(count: usize) -> Vec<u16> {
    let listeners: Vec<_> =
        (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    listeners.iter().map(|listener| listener.local_addr().expect("bound").port()).collect()
}

fn group(dir: &Path) -> BTreeMap<u64, Config> {
    let peers: BTreeMap<u64, String> =
        (1..).zip(ports(3)).map(|(id, port)| (id, format!("127.0.0.1:{port}"))).collect();
    let config = |(id, address): (&u64, &String)| {
        let mut config = Config::new(*id, address, &dir.join(id.to_string()), key());
        config.peers.clone_from(&peers);
        config.session_ttl_ms = 5000;
        (*id, config)
    };
    peers.iter().map(config).collect()
}

async fn find_leader(masters: &BTreeMap<u64, Master>, hello: Hello) -> (u64, Client) {
    for _ in 0..400 {
        for (id, master) in masters {
            match attach(master.address(), hello.clone()).await {
                Attach::Served(client) => return (*id, *client),
                Attach::Refused(failure, leader) => {
                    assert_eq!(failure.code(), ErrorCode::ErrorNotLeader, "{failure:?}");
                    assert!(
                        leader.is_empty()
                            || masters.values().any(|master| master.address() == leader)
                            || masters.len() < 3,
                        "{leader}"
                    );
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nobody leads");
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_name_the_leader_and_a_new_one_has_everything() {
    let dir = tempfile::tempdir().unwrap();
    let mut masters = BTreeMap::new();
    for (id, config) in group(dir.path()) {
        masters.insert(id, start_with(config).await);
    }
    let (leader, mut client) = find_leader(&masters, hello()).await;
    let address = masters[&leader].address().to_owned();
    for (id, master) in &masters {
        if *id != leader {
            eventually("the follower names the leader", || async {
                matches!(attach(master.address(), hello()).await, Attach::Refused(_, named) if named == address)
            })
            .await;
            assert_eq!(status(master.address()).await.leader, address);
        }
    }
    let seq = client.send(mutation_op(create("kept", false))).await;
    let answer = client.answer(seq).await;
    assert_eq!(code(&answer), ErrorCode::ErrorOk);
    masters.remove(&leader).unwrap().shutdown().await;

    let (_, mut client) = find_leader(&masters, client.resume()).await;
    client.send_again(seq, mutation_op(create("kept", false))).await;
    assert_eq!(client.answer(seq).await, answer);
    for master in masters.into_values() {
        master.shutdown().await;
    }
}
