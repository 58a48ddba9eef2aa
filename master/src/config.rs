//! The settings of a master: `master.toml`, checked before anything is touched.

use crate::raft::{RaftConfig, Storage};
use dfs_env::Env;
use dfs_proto::limits;
use dfs_proto::token::ClusterKey;
use dfs_proto::units::{ByteSize, format_bytes};
use ipnet::{IpNet, Ipv4Net};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Everything that a master must know.
#[derive(Clone)]
pub struct Config {
    /// This master's number in the Raft group.
    pub id: u64,
    /// `host:port` to listen on; port 0 takes a free one.
    pub listen: String,
    /// `host:port` that others reach this master by. Empty: what it listens on.
    pub advertise: String,
    /// Where the Raft log, the state and the snapshots are kept.
    pub data: PathBuf,
    /// The secret shared with the other masters and the chunk daemons.
    pub key: ClusterKey,
    /// The masters of a new cluster, this one included. Empty: this one alone.
    pub peers: BTreeMap<u64, String>,
    /// There is a cluster, to which this master is added with `dfs master add`: it never forms one.
    pub join: bool,
    /// Replicas of a chunk, unless its file says otherwise. Decided at the first start of a cluster.
    pub replicas: u32,
    /// Bytes of a chunk, unless its file says otherwise. Decided at the first start of a cluster.
    pub chunk_size: u64,
    /// Bytes that are kept free on the disk of `data`; 0: none.
    pub reserve_bytes: u64,
    /// Memory for the state store's cache.
    pub state_cache_bytes: u64,
    /// Log entries between two snapshots.
    pub snapshot_every_entries: u64,
    /// How long a session outlives its last sign of life.
    pub session_ttl_ms: u64,
    /// Networks of clients whose root is nobody.
    pub root_squash: Vec<IpNet>,
    /// Bytes a second that each chunk daemon copies at most to make replicas; 0: no limit.
    pub repair_bandwidth: u64,
    /// How long bytes that no file has any more are kept on the chunk daemons at least, for a restore from a backup.
    pub keep_deleted: Duration,
    /// The same for the compaction of half-dead chunks, and for how long nothing of one may have been removed before.
    pub compaction_bandwidth: u64,
    pub compact_after_ms: u64,
    /// How often a leader shows itself, and after how long a silence at least others want to lead (at most twice that).
    pub raft_heartbeat_ms: u64,
    pub raft_election_ms: u64,
    /// Real disks, or the simulator's.
    pub storage: Storage,
}

/// A configuration that cannot be used: one line for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    id: u64,
    listen: String,
    #[serde(default)]
    advertise: String,
    data: PathBuf,
    cluster_key_file: PathBuf,
    #[serde(default)]
    peers: Vec<Peer>,
    #[serde(default)]
    join: bool,
    #[serde(default = "replicas")]
    replicas: u32,
    #[serde(default = "chunk_size")]
    chunk_size: ByteSize,
    #[serde(default = "reserve")]
    reserve: ByteSize,
    #[serde(default = "state_cache")]
    state_cache: ByteSize,
    #[serde(default = "snapshot_every")]
    snapshot_every: u64,
    #[serde(default = "session_ttl_s")]
    session_ttl_s: u64,
    #[serde(default)]
    root_squash: Vec<IpNet>,
    #[serde(default = "repair_bandwidth")]
    repair_bandwidth: ByteSize,
    #[serde(default)]
    keep_deleted_s: u64,
    #[serde(default = "compaction_bandwidth")]
    compaction_bandwidth: ByteSize,
    #[serde(default = "compact_after_s")]
    compact_after_s: u64,
    #[serde(default = "raft_heartbeat_ms")]
    raft_heartbeat_ms: u64,
    #[serde(default = "raft_election_ms")]
    raft_election_ms: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    id: u64,
    address: String,
}

/// A year.
const KEEP_DELETED_MAX_MS: u64 = 365 * 24 * 3600 * 1000;

const fn replicas() -> u32 {
    3
}
const fn chunk_size() -> ByteSize {
    ByteSize(limits::CHUNK_SIZE_DEFAULT)
}
const fn reserve() -> ByteSize {
    ByteSize(limits::MASTER_RESERVE)
}
const fn state_cache() -> ByteSize {
    ByteSize(256 << 20)
}
const fn repair_bandwidth() -> ByteSize {
    ByteSize(limits::REPAIR_BANDWIDTH)
}
const fn compaction_bandwidth() -> ByteSize {
    ByteSize(limits::COMPACTION_BANDWIDTH)
}
const fn compact_after_s() -> u64 {
    limits::COMPACT_AFTER_MS / 1000
}
const fn snapshot_every() -> u64 {
    50_000
}
const fn session_ttl_s() -> u64 {
    limits::SESSION_TTL_MS / 1000
}
fn raft_heartbeat_ms() -> u64 {
    millis(RaftConfig::HEARTBEAT)
}
fn raft_election_ms() -> u64 {
    millis(RaftConfig::ELECTION.0)
}
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Config {
    /// Settings with every default, for a group of one.
    #[must_use]
    pub fn new(id: u64, listen: &str, data: &Path, key: ClusterKey) -> Self {
        Self {
            id,
            listen: listen.to_owned(),
            advertise: String::new(),
            data: data.to_owned(),
            key,
            peers: BTreeMap::new(),
            join: false,
            replicas: replicas(),
            chunk_size: chunk_size().get(),
            reserve_bytes: reserve().get(),
            state_cache_bytes: state_cache().get(),
            snapshot_every_entries: snapshot_every(),
            session_ttl_ms: session_ttl_s() * 1000,
            root_squash: Vec::new(),
            repair_bandwidth: repair_bandwidth().get(),
            keep_deleted: Duration::ZERO,
            compaction_bandwidth: compaction_bandwidth().get(),
            compact_after_ms: compact_after_s() * 1000,
            raft_heartbeat_ms: raft_heartbeat_ms(),
            raft_election_ms: raft_election_ms(),
            storage: Storage::Disk,
        }
    }

    /// How others reach this master, as the settings say.
    #[must_use]
    pub fn advertised(&self) -> &str {
        if self.advertise.is_empty() { &self.listen } else { &self.advertise }
    }

    /// Reads and checks a configuration file and the cluster key it names.
    ///
    /// # Errors
    /// One line that names the file, and the line and key where there is one.
    pub fn load(env: &Env, path: &Path) -> Result<Self, ConfigError> {
        let bytes = env
            .disk
            .read(path)
            .map_err(|error| ConfigError(format!("cannot read {}: {error}", path.display())))?;
        let text = String::from_utf8(bytes)
            .map_err(|_| ConfigError(format!("{}: not UTF-8 text", path.display())))?;
        let file = parse(path, &text)?;
        let secret = env.disk.read(&file.cluster_key_file).map_err(|error| {
            ConfigError(format!("cannot read the cluster key {}: {error}", file.cluster_key_file.display()))
        })?;
        let key = ClusterKey::new(&secret)
            .map_err(|error| ConfigError(format!("{}: {error}", file.cluster_key_file.display())))?;
        file.check(key).map_err(|error| ConfigError(format!("{}: {error}", path.display())))
    }

    /// Checks values against the limits of the system.
    ///
    /// # Errors
    /// One line that names the setting.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fail = |text: String| Err(ConfigError(text));
        if self.id == 0 {
            return fail("id must be 1 or more".to_owned());
        }
        check_address("listen", &self.listen)?;
        if !self.advertise.is_empty() {
            check_address("advertise", &self.advertise)?;
        }
        if self.advertise.is_empty() && unspecified(&self.listen) {
            return fail(format!(
                "advertise is missing: others cannot reach this master by its listen address {}",
                self.listen
            ));
        }
        let Self { replicas, chunk_size, .. } = *self;
        if !(1..=limits::REPLICAS_MAX).contains(&replicas) {
            return fail(format!("replicas = {replicas} is not between 1 and {}", limits::REPLICAS_MAX));
        }
        if !(limits::CHUNK_SIZE_MIN..=limits::CHUNK_SIZE_MAX).contains(&chunk_size) {
            return fail(format!(
                "chunk_size = {chunk_size} is not between {} and {}",
                format_bytes(limits::CHUNK_SIZE_MIN),
                format_bytes(limits::CHUNK_SIZE_MAX)
            ));
        }
        if self.reserve_bytes > 0 {
            within("reserve", self.reserve_bytes, 4 << 20, 1 << 40)?;
        }
        within("state_cache", self.state_cache_bytes, 1 << 20, 1 << 40)?;
        within("snapshot_every", self.snapshot_every_entries, 100, 100_000_000)?;
        within("session_ttl_s", self.session_ttl_ms, 1000, 3_600_000)?;
        within("keep_deleted_s", self.keep_deleted.as_secs().saturating_mul(1000), 0, KEEP_DELETED_MAX_MS)?;
        within("compact_after_s", self.compact_after_ms, 0, 86_400_000)?;
        within("raft_heartbeat_ms", self.raft_heartbeat_ms, 10, 10_000)?;
        within("raft_election_ms", self.raft_election_ms, self.raft_heartbeat_ms * 2, 60_000)?;
        self.check_peers()
    }

    fn check_peers(&self) -> Result<(), ConfigError> {
        let fail = |text: String| Err(ConfigError(text));
        if self.join && !self.peers.is_empty() {
            return fail(
                "join = true and [[peers]] exclude each other: the cluster tells who its masters are"
                    .to_owned(),
            );
        }
        for (id, address) in &self.peers {
            if *id == 0 {
                return fail("a peer's id must be 1 or more".to_owned());
            }
            check_address("a peer's address", address)?;
        }
        let Some(own) = self.peers.get(&self.id) else {
            if self.peers.is_empty() {
                return Ok(());
            }
            return fail(format!("[[peers]] must list this master too (id = {})", self.id));
        };
        let advertise = self.advertised();
        if own != advertise {
            return fail(format!(
                "[[peers]] has the address {own} for this master, but it is known by {advertise}"
            ));
        }
        if self.peers.len().is_multiple_of(2) {
            return fail(format!(
                "{} masters survive no more failures than {}: take 1, 3, 5 or 7",
                self.peers.len(),
                self.peers.len() - 1
            ));
        }
        if self.peers.len() > 7 {
            return fail(format!("{} masters are too many: take 1, 3, 5 or 7", self.peers.len()));
        }
        Ok(())
    }
}

impl File {
    fn check(self, key: ClusterKey) -> Result<Config, ConfigError> {
        let mut peers = BTreeMap::new();
        for peer in self.peers {
            if peers.insert(peer.id, peer.address).is_some() {
                return Err(ConfigError(format!("[[peers]] lists id {} twice", peer.id)));
            }
        }
        let ttl = self.session_ttl_s.checked_mul(1000);
        let compact_after = self.compact_after_s.checked_mul(1000);
        let config = Config {
            id: self.id,
            listen: self.listen,
            advertise: self.advertise,
            data: self.data,
            key,
            peers,
            join: self.join,
            replicas: self.replicas,
            chunk_size: self.chunk_size.get(),
            reserve_bytes: self.reserve.get(),
            state_cache_bytes: self.state_cache.get(),
            snapshot_every_entries: self.snapshot_every,
            session_ttl_ms: ttl.ok_or_else(|| ConfigError("session_ttl_s is too large".to_owned()))?,
            root_squash: self.root_squash.into_iter().map(canonical).collect(),
            repair_bandwidth: self.repair_bandwidth.get(),
            keep_deleted: Duration::from_secs(self.keep_deleted_s),
            compaction_bandwidth: self.compaction_bandwidth.get(),
            compact_after_ms: compact_after
                .ok_or_else(|| ConfigError("compact_after_s is too large".to_owned()))?,
            raft_heartbeat_ms: self.raft_heartbeat_ms,
            raft_election_ms: self.raft_election_ms,
            storage: Storage::Disk,
        };
        config.validate()?;
        Ok(config)
    }
}

/// Turns toml's report of many lines into one.
fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
        let line = line.map(|line| format!("{line}: ")).unwrap_or_default();
        let message = error.message().lines().collect::<Vec<_>>().join("; ");
        ConfigError(format!("{}:{}{message}", path.display(), if line.is_empty() { " " } else { &line }))
    })
}

fn within(name: &str, value: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let (unit, scale) = if name.ends_with("_s") { (" s", 1000) } else { ("", 1) };
    Err(ConfigError(format!(
        "{name} = {}{unit} is not between {} and {}",
        value / scale,
        least / scale,
        most / scale
    )))
}

/// A network of IPv4 addresses written as IPv6 ones (`::ffff:10.0.0.0/104`), as what it is: peers are compared so.
fn canonical(network: IpNet) -> IpNet {
    match (network.addr().to_canonical(), network.prefix_len().checked_sub(96)) {
        (IpAddr::V4(address), Some(prefix)) if matches!(network, IpNet::V6(_)) => {
            Ipv4Net::new(address, prefix).map_or(network, IpNet::V4)
        }
        _ => network,
    }
}

/// Whether an address is `host:port`.
///
/// # Errors
/// One line that names the setting.
pub fn check_address(name: &str, address: &str) -> Result<(), ConfigError> {
    let valid = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains(['/', ' ']) && port.parse::<u16>().is_ok()
    });
    if valid { Ok(()) } else { Err(ConfigError(format!("{name} = {address:?} is not host:port"))) }
}

/// Whether an address means every interface, which nobody can connect to.
fn unspecified(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, _)| matches!(host, "0.0.0.0" | "[::]" | "*"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Config, String> {
        let key = ClusterKey::new(b"0123456789abcdef").expect("long enough");
        parse(Path::new("m.toml"), text).and_then(|file| file.check(key)).map_err(|error| error.to_string())
    }

    const LEAST: &str = "id = 1\nlisten = \"127.0.0.1:7100\"\ndata = \"/d\"\ncluster_key_file = \"/k\"\n";

    #[test]
    fn the_least_configuration_is_a_group_of_one_with_defaults() {
        let config = check(LEAST).expect("valid");
        assert_eq!((config.replicas, config.chunk_size), (3, 64 << 20));
        assert_eq!(config.session_ttl_ms, 20_000);
        assert!(config.peers.is_empty());
    }

    #[test]
    fn sizes_take_units_and_tiny_chunks_are_allowed() {
        let config = check(&format!("{LEAST}chunk_size = \"8\"\nstate_cache = \"64MiB\"\n")).expect("valid");
        assert_eq!((config.chunk_size, config.state_cache_bytes), (8, 64 << 20));
        assert_eq!(check(&format!("{LEAST}chunk_size = 8\n")).expect("valid").chunk_size, 8);
    }

    #[test]
    fn every_mistake_has_its_one_line() {
        for (extra, expected) in [
            ("chunk_sise = 8\n", "m.toml:5: unknown field `chunk_sise`"),
            ("replicas = 0\n", "replicas = 0 is not between 1 and 9"),
            ("chunk_size = \"7\"\n", "chunk_size = 7 is not between 8 B and 4 GiB"),
            ("reserve = \"1MiB\"\n", "reserve = 1048576 is not between 4194304 and"),
            ("chunk_size = \"many\"\n", "\"many\" is not a size"),
            ("session_ttl_s = 0\n", "session_ttl_s = 0 s is not between 1 and 3600"),
            ("advertise = \"nowhere\"\n", "advertise = \"nowhere\" is not host:port"),
            ("[[peers]]\nid = 2\naddress = \"b:1\"\n", "must list this master too (id = 1)"),
            ("[[peers]]\nid = 1\naddress = \"b:1\"\n", "but it is known by 127.0.0.1:7100"),
            ("join = true\n[[peers]]\nid = 1\naddress = \"127.0.0.1:7100\"\n", "exclude each other"),
            ("id = 2\n", "duplicate key"),
            ("replicas = \"three\"\n", "invalid type"),
            ("root_squash = [\"10.0.0.0/33\"]\n", "m.toml:5: invalid IP address syntax"),
        ] {
            let error = check(&format!("{LEAST}{extra}")).map(|_| ()).expect_err(extra);
            assert!(error.contains(expected), "{extra:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let error = check("id = 1\n").map(|_| ()).expect_err("incomplete");
        assert!(error.contains("missing field `listen`"), "{error}");
        let error = check(&LEAST.replace("127.0.0.1", "0.0.0.0")).map(|_| ()).expect_err("unreachable");
        assert!(error.contains("advertise is missing"), "{error}");
    }

    #[test]
    fn networks_are_kept_as_peers_are_compared() {
        let text = "root_squash = [\"::ffff:10.0.0.0/104\", \"10.1.0.0/16\", \"fd00:1::/32\"]\n";
        let networks = check(&format!("{LEAST}{text}")).expect("valid").root_squash;
        let expected =
            ["10.0.0.0/8", "10.1.0.0/16", "fd00:1::/32"].map(|net| net.parse().expect("a network"));
        assert_eq!(networks, expected);
    }

    #[test]
    fn an_even_number_of_masters_is_refused() {
        let peer = |id: u64| format!("[[peers]]\nid = {id}\naddress = \"127.0.0.1:{}\"\n", 7099 + id);
        let group = |n: u64| (1..=n).map(peer).collect::<String>();
        assert!(check(&format!("{LEAST}{}", group(3))).is_ok());
        let error = check(&format!("{LEAST}{}", group(2))).map(|_| ()).expect_err("even");
        assert!(error.contains("2 masters survive no more failures than 1"), "{error}");
    }
}
