//! The daemon's settings: `chunkd.toml`, described in `deploy/chunkd.toml`.

use dfs_proto::units::ByteSize;
use serde::Deserialize;
use std::path::PathBuf;

/// What `chunkd.toml` says. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `host:port` to listen on; port 0 takes a free one.
    pub listen: String,
    /// What others reach this daemon by; absent: `listen`.
    pub advertise: Option<String>,
    /// The masters, in any order.
    pub masters: Vec<String>,
    /// Data directories, one a disk.
    pub data: Vec<PathBuf>,
    /// The secret that masters and chunk daemons share.
    pub cluster_key_file: PathBuf,
    /// The failure domain: replicas of a chunk go to different hosts. Absent: the machine's name.
    pub host: Option<String>,
    /// A wider failure domain; may be empty.
    #[serde(default)]
    pub rack: String,
    /// The most that all chunk files may take together; absent: what the disks hold.
    pub capacity: Option<ByteSize>,
    /// What is left free on each disk.
    #[serde(default = "default_reserve")]
    pub reserve: ByteSize,
    /// Bytes a second that are verified in search of damage; 0: none.
    #[serde(default = "default_scrub")]
    pub scrub_bandwidth: ByteSize,
}

fn default_scrub() -> ByteSize {
    ByteSize(8 << 20)
}

fn default_reserve() -> ByteSize {
    ByteSize(1 << 30)
}

impl Config {
    /// Reads settings.
    ///
    /// # Errors
    /// One line that says what is wrong, with the line's number where there is one.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let cause = error.message().replace('\n', " ");
            match error.span() {
                Some(span) => {
                    let before = text.get(..span.start).unwrap_or_default();
                    format!("line {}: {cause}", before.matches('\n').count() + 1)
                }
                None => cause,
            }
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        for address in self.masters.iter().chain([&self.listen]).chain(&self.advertise) {
            let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
            if port.is_none_or(|port| port.parse::<u16>().is_err()) {
                return Err(format!("{address:?} is not host:port"));
            }
        }
        if self.masters.is_empty() {
            return Err("`masters` names nobody".to_owned());
        }
        if self.data.is_empty() {
            return Err("`data` names no directory".to_owned());
        }
        for (at, path) in self.data.iter().enumerate() {
            if self.data[..at].contains(path) {
                return Err(format!("`data` names {} twice", path.display()));
            }
        }
        if self.advertise.is_none() && self.listens_everywhere() {
            return Err(format!(
                "`listen` is {:?}, so `advertise` must say what others reach it by",
                self.listen
            ));
        }
        Ok(())
    }

    fn listens_everywhere(&self) -> bool {
        let host = self.listen.rsplit_once(':').map_or("", |(host, _)| host);
        matches!(host, "0.0.0.0" | "[::]" | "*")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
        listen = "127.0.0.1:7200"
        masters = ["m:7100"]
        data = ["/d"]
        cluster_key_file = "/k"
    "#;

    #[test]
    fn the_least_that_must_be_said_is_enough() {
        let config = Config::parse(LEAST).expect("complete");
        assert_eq!(config.reserve, ByteSize(1 << 30));
        assert_eq!((config.capacity, config.host, config.rack.as_str()), (None, None, ""));
    }

    #[test]
    fn the_settings_file_that_is_installed_is_understood() {
        let text = include_str!("../../deploy/chunkd.toml");
        Config::parse(text).expect("as installed");
    }

    #[test]
    fn mistakes_get_one_line() {
        let with = |more: &str| format!("{LEAST}{more}\n");
        for (text, words) in [
            (with("reserv = 1"), ["line 6", "reserv"]),
            (with("reserve = \"much\""), ["line 6", "much"]),
            (with("listen = \"a:1\""), ["line 6", "duplicate"]),
            (LEAST.replace("127.0.0.1", "0.0.0.0"), ["advertise", "0.0.0.0:7200"]),
            (LEAST.replace(":7200", ""), ["127.0.0.1", "host:port"]),
            (LEAST.replace("\"m:7100\"", ""), ["masters", "nobody"]),
            (LEAST.replace("\"/d\"", "\"/d\", \"/d\""), ["/d", "twice"]),
            (LEAST.replace("cluster_key_file", "# "), ["missing", "cluster_key_file"]),
        ] {
            let error = Config::parse(&text).expect_err("refused");
            assert!(words.iter().all(|word| error.contains(word)) && !error.contains('\n'), "{error}");
        }
    }
}
