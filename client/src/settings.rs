//! Reads `client.toml`, and `DFS_MASTERS` from the environment, which wins over the file's `masters`.

use crate::ClientConfig;
use dfs_env::Env;
use dfs_proto::units::ByteSize;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the settings are unless a program is told otherwise.
pub const DEFAULT_PATH: &str = "/etc/dfs/client.toml";
/// The environment variable with the masters' addresses, separated by commas.
pub const MASTERS_VARIABLE: &str = "DFS_MASTERS";

/// Why the settings cannot be used. One line, fit for the user; exit status 2.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("{path}: {cause}", path = path.display())]
    Read { path: PathBuf, cause: std::io::Error },
    #[error("{path}: {cause}", path = path.display())]
    Parse { path: PathBuf, cause: String },
    #[error("{place}: '{address}' is not an address like host:port")]
    Address { place: String, address: String },
    #[error("no masters: name them in {DEFAULT_PATH} (masters = [\"host:port\"]) or in {MASTERS_VARIABLE}")]
    NoMasters,
}

/// The keys of `client.toml`; `deploy/client.toml` documents each.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    masters: Option<Vec<String>>,
    name: Option<String>,
    host: Option<String>,
    cluster: Option<String>,
    write_memory: Option<ByteSize>,
    read_cache: Option<ByteSize>,
    readahead: Option<ByteSize>,
    operation_timeout_s: Option<u64>,
    connect_timeout_s: Option<u64>,
    noatime: Option<bool>,
    flush_on_close: Option<bool>,
}

/// The settings from `path`, or from [`DEFAULT_PATH`] when there is one, under those of the environment.
///
/// # Errors
/// When a named file cannot be read, has an unknown key or a value that makes no sense, or no master is named anywhere.
pub fn load(env: &Env, path: Option<&Path>) -> Result<ClientConfig, SettingsError> {
    load_with(env, path, std::env::var(MASTERS_VARIABLE).ok().as_deref())
}

/// As [`load`], with the masters of a command line or of the environment given; empty or `None`: the file's.
///
/// # Errors
/// As [`load`].
pub fn load_with(
    env: &Env,
    path: Option<&Path>,
    masters: Option<&str>,
) -> Result<ClientConfig, SettingsError> {
    let place = path.unwrap_or(Path::new(DEFAULT_PATH));
    let mut config = match env.disk.read(place) {
        Ok(bytes) => {
            let text = String::from_utf8(bytes).map_err(|_| SettingsError::Parse {
                path: place.to_owned(),
                cause: "this is not UTF-8 text".to_owned(),
            })?;
            parse(place, &text)?
        }
        // Only the default file may be missing: a file that was named is meant.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.is_none() => {
            ClientConfig::default()
        }
        Err(cause) => return Err(SettingsError::Read { path: place.to_owned(), cause }),
    };
    if let Some(list) = masters.map(str::trim).filter(|list| !list.is_empty()) {
        config.masters = parse_masters(list, MASTERS_VARIABLE)?;
    }
    if config.masters.is_empty() {
        return Err(SettingsError::NoMasters);
    }
    if config.host.is_empty() {
        config.host = host_name();
    }
    Ok(config)
}

/// Addresses separated by commas; `place` is where they stood, for the error.
///
/// # Errors
/// When one of them is not `host:port`.
pub fn parse_masters(list: &str, place: &str) -> Result<Vec<String>, SettingsError> {
    list.split(',')
        .map(str::trim)
        .filter(|address| !address.is_empty())
        .map(|a| check_address(a, place))
        .collect()
}

/// The settings in a file's text.
///
/// # Errors
/// When a key is unknown or a value makes no sense; the text names the line.
pub fn parse(path: &Path, text: &str) -> Result<ClientConfig, SettingsError> {
    let file: File = toml::from_str(text)
        .map_err(|error| SettingsError::Parse { path: path.to_owned(), cause: one_line(text, &error) })?;
    let default = ClientConfig::default();
    let place = path.display().to_string();
    let masters = file.masters.unwrap_or_default();
    let masters =
        masters.iter().map(|address| check_address(address, &place)).collect::<Result<Vec<_>, _>>()?;
    let config = ClientConfig {
        masters,
        name: file.name.unwrap_or_default(),
        host: file.host.unwrap_or_default(),
        cluster_id: file.cluster.unwrap_or_default(),
        write_memory: file.write_memory.map_or(default.write_memory, |size| size.0),
        read_cache: file.read_cache.map_or(default.read_cache, |size| size.0),
        readahead: file.readahead.map_or(default.readahead, |size| size.0),
        operation_timeout: match file.operation_timeout_s {
            None => default.operation_timeout,
            Some(0) => None,
            Some(seconds) => Some(Duration::from_secs(seconds)),
        },
        connect_timeout: file.connect_timeout_s.map_or(default.connect_timeout, Duration::from_secs),
        noatime: file.noatime.unwrap_or(default.noatime),
        flush_on_close: file.flush_on_close.unwrap_or(default.flush_on_close),
        ..default
    };
    let bad = |cause: &str| Err(SettingsError::Parse { path: path.to_owned(), cause: cause.to_owned() });
    if config.write_memory < 1 << 20 {
        return bad("write_memory must be at least 1MiB");
    }
    if config.connect_timeout.is_zero() {
        return bad("connect_timeout_s must be at least 1");
    }
    Ok(config)
}

fn check_address(address: &str, place: &str) -> Result<String, SettingsError> {
    let good = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty()
            && !host.contains(char::is_whitespace)
            && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    if good {
        Ok(address.to_owned())
    } else {
        Err(SettingsError::Address { place: place.to_owned(), address: address.to_owned() })
    }
}

/// TOML's errors draw the place over several lines; ours take one.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let cause = error.message().replace('\n', " ");
    match error.span() {
        Some(span) => {
            let line = 1 + text.get(..span.start).map_or(0, |before| before.matches('\n').count());
            format!("line {line}: {cause}")
        }
        None => cause,
    }
}

/// This machine's name; empty when it has none.
#[must_use]
pub fn host_name() -> String {
    let mut buffer = [0_u8; 256];
    // SAFETY: the pointer and the length describe `buffer`, which outlives the call.
    let result = unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len()) };
    if result != 0 {
        return String::new();
    }
    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
    String::from_utf8_lossy(&buffer[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<ClientConfig, String> {
        parse(Path::new("client.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_read() {
        let config = parsed(
            "masters = ['a:1', '[::1]:2']\nname = 'n'\nhost = 'h'\ncluster = 'c'\nwrite_memory = '64MiB'\n\
             read_cache = '1GiB'\nreadahead = '1MiB'\noperation_timeout_s = 0\nconnect_timeout_s = 3\nnoatime = true\nflush_on_close = false",
        )
        .expect("good settings");
        assert_eq!(config.masters, ["a:1", "[::1]:2"]);
        assert_eq!((config.write_memory, config.read_cache, config.readahead), (64 << 20, 1 << 30, 1 << 20));
        assert_eq!((config.operation_timeout, config.connect_timeout), (None, Duration::from_secs(3)));
        assert!(
            config.noatime
                && !config.flush_on_close
                && config.name == "n"
                && config.host == "h"
                && config.cluster_id == "c"
        );
    }

    #[test]
    fn bad_settings_get_one_line_that_names_the_file_and_the_cause() {
        for (text, cause) in [
            ("masters = ['a:1']\ncolour = 'red'", "line 2: unknown field `colour`"),
            ("masters = ['a']", "'a' is not an address like host:port"),
            ("masters = ['a:0']", "'a:0' is not an address like host:port"),
            ("write_memory = '64 apples'", "line 1"),
            ("write_memory = 5", "write_memory must be at least 1MiB"),
            ("masters = 'a:1", "line 1"),
        ] {
            let error = parsed(text).expect_err(text);
            assert!(error.starts_with("client.toml: ") && error.contains(cause), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn the_environment_wins_and_only_the_default_file_may_be_missing() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("client.toml");
        let env = Env::real();
        assert!(matches!(load_with(&env, Some(&path), Some("a:1")), Err(SettingsError::Read { .. })));
        std::fs::write(&path, "masters = ['a:1']").expect("written");
        assert_eq!(load_with(&env, Some(&path), None).expect("settings").masters, ["a:1"]);
        let config = load_with(&env, Some(&path), Some("b:2, c:3")).expect("settings");
        assert_eq!(config.masters, ["b:2", "c:3"]);
        assert!(!config.host.is_empty());
        std::fs::write(&path, "").expect("written");
        assert!(matches!(load_with(&env, Some(&path), Some(" ")), Err(SettingsError::NoMasters)));
    }
}
