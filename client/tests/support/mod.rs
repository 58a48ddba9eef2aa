//! A cluster of real masters and chunk daemons in this process, on ports and directories of its own.
#![allow(dead_code, reason = "each test program uses a part of it")]

use dfs_chunkd::Daemon;
use dfs_client::{Client, ClientConfig, Cred, InodeNo, v1};
use dfs_env::Env;
use dfs_master::raft::Storage;
use dfs_proto::token::ClusterKey;
use dfs_proto::units::ByteSize;
use std::collections::BTreeMap;
use std::time::Duration;
use tempfile::TempDir;

const KEY: &[u8] = b"a cluster key of some length";

pub const ROOT: InodeNo = InodeNo::ROOT;

pub fn root() -> Cred {
    Cred::default()
}

pub fn user(uid: u32) -> Cred {
    Cred { uid, gid: uid, groups: Vec::new() }
}

/// How a cluster is made.
pub struct Shape {
    pub masters: u64,
    pub chunkds: usize,
    pub replicas: u32,
    pub chunk_size: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self { masters: 1, chunkds: 0, replicas: 2, chunk_size: 1 << 20 }
    }
}

pub struct Cluster {
    pub dir: TempDir,
    pub masters: BTreeMap<u64, Option<dfs_master::Master>>,
    pub chunkds: Vec<Option<Daemon>>,
    peers: BTreeMap<u64, String>,
    shape: Shape,
}

impl Cluster {
    pub async fn start(shape: Shape) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("key"), KEY).expect("key file");
        let mut peers = BTreeMap::new();
        for id in 1..=shape.masters {
            peers.insert(id, free_address());
        }
        let mut cluster = Self { dir, masters: BTreeMap::new(), chunkds: Vec::new(), peers, shape };
        for id in 1..=cluster.shape.masters {
            cluster.start_master(id).await;
        }
        for at in 0..cluster.shape.chunkds {
            let daemon = cluster.daemon(at).await;
            cluster.chunkds.push(Some(daemon));
        }
        cluster
    }

    pub async fn start_master(&mut self, id: u64) {
        let config = dfs_master::Config {
            id,
            listen: self.peers[&id].clone(),
            advertise: String::new(),
            data: self.dir.path().join(format!("master-{id}")),
            key: ClusterKey::new(KEY).expect("long enough"),
            peers: self.peers.clone(),
            join: false,
            replicas: self.shape.replicas,
            chunk_size: self.shape.chunk_size,
            reserve_bytes: 0,
            state_cache_bytes: 32 << 20,
            snapshot_every_entries: 10_000,
            session_ttl_ms: 20_000,
            root_squash: Vec::new(),
            repair_bandwidth: 0,
            keep_deleted: Duration::ZERO,
            compaction_bandwidth: 0,
            compact_after_ms: 10_000,
            raft_heartbeat_ms: 100,
            raft_election_ms: 500,
            storage: Storage::Disk,
        };
        let master = dfs_master::start(Env::real(), config).await.expect("a master");
        self.masters.insert(id, Some(master));
    }

    pub async fn stop_master(&mut self, id: u64) {
        if let Some(master) = self.masters.get_mut(&id).and_then(Option::take) {
            master.shutdown().await;
        }
    }

    async fn daemon(&self, at: usize) -> Daemon {
        let dir = self.dir.path().join(format!("chunkd-{at}"));
        std::fs::create_dir_all(&dir).expect("data directory");
        let config = dfs_chunkd::Config {
            listen: "127.0.0.1:0".to_owned(),
            advertise: None,
            masters: self.addresses(),
            data: vec![dir],
            cluster_key_file: self.dir.path().join("key"),
            host: Some(format!("host-{at}")),
            rack: String::new(),
            capacity: None,
            reserve: ByteSize(0),
            scrub_bandwidth: 0.into(),
        };
        Daemon::start(Env::real(), config).await.expect("a chunk daemon")
    }

    pub fn addresses(&self) -> Vec<String> {
        self.peers.values().cloned().collect()
    }

    /// The master that leads, as a client sees it.
    pub fn leader(&self, client: &Client) -> u64 {
        let leader = client.leader();
        self.peers.iter().find(|(_, address)| **address == leader).map_or(0, |(id, _)| *id)
    }

    pub async fn client(&self) -> Client {
        self.client_with(|_| {}).await
    }

    pub async fn client_with(&self, change: impl FnOnce(&mut ClientConfig)) -> Client {
        let mut config = ClientConfig::new(self.addresses());
        config.name = "test".to_owned();
        config.operation_timeout = Some(Duration::from_secs(20));
        change(&mut config);
        Client::connect(Env::real(), config).await.expect("a client")
    }
}

fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").to_string()
}

/// What makes a regular file, directory or something else.
pub fn new(parent: InodeNo, name: &str, kind: v1::Kind) -> v1::Create {
    let mode = if kind == v1::Kind::Dir { 0o755 } else { 0o644 };
    v1::Create {
        parent: parent.get(),
        name: name.as_bytes().to_vec().into(),
        kind: kind.into(),
        mode,
        exclusive: true,
        ..v1::Create::default()
    }
}
