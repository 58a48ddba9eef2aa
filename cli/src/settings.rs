//! Where the masters are: `--masters`, `DFS_MASTERS`, `~/.config/dfs/config.toml`, `/etc/dfs/client.toml`, in this order.

use crate::Result;
use crate::error::CliError;
use dfs_client::ClientConfig;
use dfs_client::settings::{DEFAULT_PATH, SettingsError, load_with, parse_masters};
use dfs_env::Env;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The settings for this run. Both files have the keys of `deploy/client.toml`.
pub fn load(env: &Env, masters: Option<&str>, timeout_s: Option<u64>) -> Result<ClientConfig> {
    if let Some(list) = masters {
        parse_masters(list, "--masters or DFS_MASTERS")
            .map_err(|error| CliError::Usage(error.to_string()))?;
    }
    let own = own_file(|name| std::env::var_os(name).map(PathBuf::from));
    let file = own.as_deref().filter(|path| path.exists());
    let mut config = match load_with(env, file, masters) {
        // The user's file may leave the masters to the machine's.
        Err(SettingsError::NoMasters) if file.is_some() && Path::new(DEFAULT_PATH).exists() => {
            load_with(env, None, masters)
        }
        result => result,
    }
    .map_err(|error| match error {
        SettingsError::NoMasters => CliError::Usage(format!(
            "no masters: give --masters HOST:PORT,… or set DFS_MASTERS, or write masters = [\"host:port\"] to {}",
            own.as_deref().unwrap_or(Path::new(DEFAULT_PATH)).display()
        )),
        error => CliError::Usage(error.to_string()),
    })?;
    if let Some(seconds) = timeout_s {
        config.connect_timeout = Duration::from_secs(seconds.max(1));
        config.operation_timeout = Some(Duration::from_secs(seconds.max(1)));
    }
    if config.name.is_empty() {
        "dfs".clone_into(&mut config.name);
    }
    Ok(config)
}

/// The user's own settings file (XDG Base Directory Specification).
fn own_file(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let base = variable("XDG_CONFIG_HOME")
        .filter(|path| path.is_absolute())
        .or_else(|| variable("HOME").map(|home| home.join(".config")))?;
    Some(base.join("dfs/config.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_file_is_where_xdg_says() {
        let file = |xdg: Option<&'static str>, home: Option<&'static str>| {
            own_file(move |name| if name == "HOME" { home } else { xdg }.map(PathBuf::from))
        };
        assert_eq!(file(None, Some("/home/a")), Some("/home/a/.config/dfs/config.toml".into()));
        assert_eq!(file(Some("/x"), Some("/home/a")), Some("/x/dfs/config.toml".into()));
        assert_eq!(file(Some("relative"), Some("/home/a")), Some("/home/a/.config/dfs/config.toml".into()));
        assert_eq!(file(None, None), None);
    }
}
