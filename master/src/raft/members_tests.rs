//! Whole masters over loopback whose group changes, and leaders that hand over.

use super::ChangeError;
use super::tests::{Cluster, init, until};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::time::Instant;

/// What a change of the group comes to at whoever leads.
async fn change<T>(
    cluster: &Cluster,
    order: impl AsyncFn(&super::Node) -> Result<T, ChangeError>,
) -> Result<T, String> {
    loop {
        let leader = cluster.leader().await;
        match order(&cluster.nodes[&leader].0).await {
            Ok(done) => return Ok(done),
            Err(ChangeError::Refused(reason)) => return Err(reason),
            Err(ChangeError::Elsewhere(_)) => tokio::time::sleep(std::time::Duration::from_millis(10)).await,
        }
    }
}

async fn add(cluster: &Cluster, id: u64) -> Result<(u64, bool), String> {
    change(cluster, async |node| node.add_master(&cluster.peers[&id]).await).await
}

async fn remove(cluster: &Cluster, id: u64) -> Result<bool, String> {
    change(cluster, async |node| node.remove_master(id).await).await
}

async fn votes(cluster: &Cluster, id: u64) {
    for _ in 0..2_000 {
        change(cluster, async |node| node.tend_members().await).await.unwrap();
        let leader = cluster.leader().await;
        let members = cluster.nodes[&leader].0.status().members;
        if members.iter().any(|member| member.id == id && member.voter) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("master {id} does not vote");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_master_becomes_three_and_one_again_and_who_was_removed_disturbs_nobody() {
    let mut cluster = Cluster::alone(15).await;
    cluster.leader().await;
    init(&cluster.nodes[&1].0).await;
    cluster.register(1..60).await;
    until("the log is purged", || cluster.nodes[&1].0.status().purged > 15).await;
    assert!(add(&cluster, 2).await.unwrap_err().contains("127.0.0.1"), "nobody is there");
    for id in [2, 3] {
        cluster.up(id).await;
        assert!(!cluster.nodes[&id].0.leadership().borrow().leading);
        assert_eq!(add(&cluster, id).await, Ok((id, false)));
        votes(&cluster, id).await;
        assert_eq!(add(&cluster, id).await, Ok((id, true)), "again");
        cluster.register(id * 100..id * 100 + 10).await;
    }
    let all: Vec<u64> = (1..60).chain(200..210).chain(300..310).collect();
    cluster.agree(&all).await;
    assert_eq!(cluster.nodes[&1].0.voters().len(), 3);

    // Any one may go, now.
    let leader = cluster.leader().await;
    cluster.down(leader).await;
    cluster.register(400..405).await;
    cluster.up(leader).await;
    cluster.agree(&all.iter().copied().chain(400..405).collect::<Vec<_>>()).await;

    // The leader itself: another one leads before it goes.
    let leader = cluster.leader().await;
    assert_eq!(remove(&cluster, leader).await, Ok(true));
    assert_eq!(remove(&cluster, leader).await, Ok(false), "again");
    let next = cluster.leader().await;
    assert_ne!(next, leader);
    let term = cluster.nodes[&next].0.status().term;
    // It wants to lead until it hears that it is none of them, and nobody minds.
    cluster.down(leader).await;
    cluster.up(leader).await;
    cluster.register(500..520).await;
    let begun = Instant::now();
    while begun.elapsed() < std::time::Duration::from_secs(4) {
        assert!(!cluster.nodes[&leader].0.leadership().borrow().leading);
        assert!(cluster.nodes[&leader].0.confirm().await.is_err());
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let now = cluster.nodes[&next].0.status();
    assert!(now.members.iter().all(|member| member.id != leader));
    assert_eq!((now.term, cluster.leader().await), (term, next), "the lead did not change");
    assert!(add(&cluster, leader).await.unwrap_err().contains("remove its data directory"));
    cluster.down(leader).await;
    fs::remove_dir_all(cluster.dir(leader)).unwrap();

    // Of two, the other one must agree.
    let other = (1..=3).find(|id| *id != leader && *id != next).unwrap();
    cluster.down(other).await;
    let refusal = remove(&cluster, other).await;
    assert!(refusal.is_err(), "{refusal:?}");
    cluster.up(other).await;
    assert_eq!(remove(&cluster, other).await, Ok(true));
    cluster.register(600..605).await;
    assert!(remove(&cluster, next).await.unwrap_err().contains("the only one"));
    cluster.down(other).await;
    let all: Vec<u64> = all.into_iter().chain(400..405).chain(500..520).chain(600..605).collect();
    cluster.agree(&all).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_hands_over_sooner_than_it_would_be_missed() {
    let mut cluster = Cluster::start(1_000_000, false).await;
    let first = cluster.leader().await;
    init(&cluster.nodes[&first].0).await;
    cluster.register(1..20).await;
    let mut count = 20;
    for round in 0..6_u64 {
        let leader = cluster.leader().await;
        let node = std::sync::Arc::clone(&cluster.nodes[&leader].0);
        let stop = AtomicBool::new(false);
        let begun = Instant::now();
        let (handed, ()) = tokio::join!(
            async {
                let handed = node.hand_over(false).await;
                stop.store(true, Ordering::SeqCst);
                handed
            },
            async {
                // While others propose.
                while !stop.load(Ordering::SeqCst) {
                    cluster.register(count..count + 1).await;
                    count += 1;
                }
            }
        );
        let took = begun.elapsed();
        let address = handed.unwrap().unwrap_or_else(|| panic!("round {round}: no leader"));
        let next = cluster.leader().await;
        assert_eq!(cluster.peers[&next], address);
        assert_ne!(next, leader);
        eprintln!("round {round}: {leader} handed over to {next} within {took:?}");
        // Nobody leads for 600 ms at least when a leader dies here.
        assert!(took < std::time::Duration::from_millis(600), "{took:?}");
    }
    cluster.agree(&(1..count).collect::<Vec<_>>()).await;

    // With one of three dead the other one takes over; with nobody left the leader stays.
    let leader = cluster.leader().await;
    let dead = (1..=3).find(|id| *id != leader).unwrap();
    cluster.down(dead).await;
    let node = std::sync::Arc::clone(&cluster.nodes[&leader].0);
    let last = (1..=3).find(|id| *id != leader && *id != dead).unwrap();
    assert_eq!(node.hand_over(false).await, Ok(Some(cluster.peers[&last].clone())));
    let node = std::sync::Arc::clone(&cluster.nodes[&last].0);
    until("the next one leads", || node.leadership().borrow().leading).await;
    cluster.down(leader).await;
    assert!(node.hand_over(false).await.unwrap_err().contains("no other master"));
    assert!(node.leadership().borrow().leading);
    cluster.stop().await;
}
