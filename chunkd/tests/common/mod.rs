//! Daemons in this process, and a client that speaks the protocol to them.
#![allow(dead_code)]

use bytes::Bytes;
use dfs_chunkd::{Config, Daemon, StartError};
use dfs_env::Env;
use dfs_env::rpc::{self, Tuning};
use dfs_proto::checksum::{unit_checksums, units_match};
use dfs_proto::error::ErrorCode;
use dfs_proto::token::{ClusterKey, Rights};
use dfs_proto::{ChunkId, FsError, FsResult, PROTOCOL_VERSION, SessionId, v1};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

pub const SECRET: &[u8] = b"the secret of the test cluster";

pub fn key() -> ClusterKey {
    ClusterKey::new(SECRET).expect("long enough")
}

pub fn config(dir: &Path, name: &str) -> Config {
    let key_file = dir.join("cluster.key");
    std::fs::write(&key_file, SECRET).expect("written");
    Config {
        listen: "127.0.0.1:0".to_owned(),
        advertise: None,
        // Nobody is there: appends and reads need no master.
        masters: vec!["127.0.0.1:1".to_owned()],
        data: vec![dir.join(name)],
        cluster_key_file: key_file,
        host: Some(name.to_owned()),
        rack: String::new(),
        capacity: None,
        reserve: 0.into(),
        scrub_bandwidth: 0.into(),
    }
}

pub async fn start(config: Config) -> Daemon {
    try_start(config).await.expect("started")
}

pub async fn try_start(config: Config) -> Result<Daemon, StartError> {
    Daemon::start(Env::real(), config).await
}

pub async fn start_all<const N: usize>(dir: &Path) -> [Daemon; N] {
    let mut daemons = Vec::new();
    for n in 0..N {
        daemons.push(start(config(dir, &format!("d{n}"))).await);
    }
    daemons.try_into().unwrap_or_else(|_| unreachable!("N were started"))
}

pub fn token(chunk: u64) -> Bytes {
    key().issue(SessionId(1), ChunkId(chunk), Rights::READ.and(Rights::APPEND), u64::MAX).into()
}

pub fn payload(seed: u64, length: usize) -> Bytes {
    (0..length as u64).map(|at| (seed * 31 + at * 7 + at / 253).to_le_bytes()[0]).collect()
}

pub fn append(chunk: u64, offset: u64, payload: Bytes, forward: &[&Daemon]) -> v1::AppendRequest {
    v1::AppendRequest {
        id: offset + 1,
        version: PROTOCOL_VERSION,
        chunk,
        epoch: 1,
        offset,
        ino: 9,
        file_offset: offset,
        checksums: unit_checksums(&payload),
        payload,
        sync: false,
        forward: forward.iter().map(|daemon| daemon.address().to_owned()).collect(),
        token: token(chunk),
        capacity: 64 << 20,
    }
}

/// An append stream and a read stream to one daemon.
pub struct Client {
    appends: mpsc::Sender<v1::AppendRequest>,
    append_replies: Streaming<v1::AppendReply>,
    reads: mpsc::Sender<v1::ReadRequest>,
    read_replies: Streaming<v1::ReadReply>,
}

impl Client {
    pub async fn connect(daemon: &Daemon) -> Self {
        let channel =
            rpc::connect(&Env::real(), daemon.address(), Tuning::default()).await.expect("connected");
        let mut client = v1::chunk_client::ChunkClient::new(channel).max_decoding_message_size(8 << 20);
        let (appends, outgoing) = mpsc::channel(64);
        let append_replies =
            client.append(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
        let (reads, outgoing) = mpsc::channel(64);
        let read_replies = client.read(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
        Self { appends, append_replies, reads, read_replies }
    }

    pub async fn send(&self, request: v1::AppendRequest) {
        self.appends.send(request).await.expect("the stream lives");
    }

    pub async fn reply(&mut self) -> v1::AppendReply {
        tokio::time::timeout(Duration::from_secs(10), self.append_replies.message())
            .await
            .expect("answered in time")
            .expect("the stream lives")
            .expect("the stream goes on")
    }

    pub async fn append(&mut self, request: v1::AppendRequest) -> v1::AppendReply {
        let id = request.id;
        self.send(request).await;
        let reply = self.reply().await;
        assert_eq!(reply.id, id);
        reply
    }

    /// All requests at once; the replies in the order of the requests.
    pub async fn append_all(&mut self, requests: Vec<v1::AppendRequest>) -> Vec<v1::AppendReply> {
        let ids: Vec<u64> = requests.iter().map(|request| request.id).collect();
        let appends = self.appends.clone();
        let sending = tokio::spawn(async move {
            for request in requests {
                appends.send(request).await.expect("the stream lives");
            }
        });
        let mut replies = HashMap::new();
        for _ in &ids {
            let reply = self.reply().await;
            replies.insert(reply.id, reply);
        }
        sending.await.expect("sent");
        ids.iter().map(|id| replies.remove(id).expect("each request has its reply")).collect()
    }

    pub async fn ask(&mut self, request: v1::ReadRequest) -> v1::ReadReply {
        self.reads.send(request).await.expect("the stream lives");
        tokio::time::timeout(Duration::from_secs(10), self.read_replies.message())
            .await
            .expect("answered in time")
            .expect("the stream lives")
            .expect("the stream goes on")
    }

    /// Reads and verifies.
    pub async fn read(&mut self, chunk: u64, offset: u64, length: u32) -> FsResult<Vec<u8>> {
        let request =
            v1::ReadRequest { id: 7, version: PROTOCOL_VERSION, chunk, offset, length, token: token(chunk) };
        let reply = self.ask(request).await;
        assert_eq!(reply.id, 7);
        if let Some(failure) = reply.failure {
            return Err(failure.into());
        }
        let mut rest = reply.data.clone();
        for unit in &reply.units {
            let bytes = rest.split_to(unit.length as usize);
            if !units_match(&bytes, &[unit.checksum]) {
                return Err(ErrorCode::ErrorCorrupt.into());
            }
        }
        let skip = usize::try_from(offset - reply.start).expect("small");
        Ok(reply.data[skip..skip + length as usize].to_vec())
    }
}

pub fn failure(reply: v1::AppendReply) -> FsError {
    reply.failure.expect("refused").into()
}

pub fn code(reply: v1::AppendReply) -> ErrorCode {
    failure(reply).code
}

/// The chunk files below a directory.
pub fn chunk_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for folder in std::fs::read_dir(dir.join("chunks")).expect("there") {
        for file in std::fs::read_dir(folder.expect("there").path()).expect("there") {
            found.push(file.expect("there").path());
        }
    }
    found.sort();
    found
}
