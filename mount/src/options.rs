//! The options of `-o`, as fstab and mount(8) hand them over.

use dfs_proto::units::parse_bytes;
use std::path::PathBuf;
use std::time::Duration;

/// What `-o` said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub read_only: bool,
    /// The directory of the cluster that becomes the root of the mount, absolute; `None`: its root.
    pub subdir: Option<String>,
    /// Whether other users than the mounting one may enter; `None`: if root mounts.
    pub allow_other: Option<bool>,
    pub noatime: bool,
    pub flush_on_close: Option<bool>,
    pub noexec: bool,
    /// `None`: allowed if root mounts.
    pub suid: Option<bool>,
    pub dev: Option<bool>,
    pub sync: bool,
    pub dirsync: bool,
    /// Addresses, separated by commas.
    pub masters: Option<String>,
    pub config: Option<PathBuf>,
    /// In bytes.
    pub write_memory: Option<u64>,
    pub read_cache: Option<u64>,
    /// `Some(None)`: operations wait for the cluster as long as it takes.
    pub operation_timeout: Option<Option<Duration>>,
    /// Operations fail after a while whatever the settings say.
    pub soft: bool,
}

/// Options that are mount(8)'s or systemd's own business, or ask for what is so anyway.
const IGNORED: &[&str] = &[
    "defaults",
    "auto",
    "noauto",
    "nofail",
    "_netdev",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "rw",
    "async",
    "exec",
    "atime",
    "relatime",
    "diratime",
    "nodiratime",
    "lazytime",
    "nolazytime",
    "silent",
    "loud",
    "iversion",
    "noiversion",
    "nomand",
    "default_permissions",
];

impl Options {
    /// Adds a comma-separated list; later options win.
    ///
    /// # Errors
    /// One line about the first option that is unknown or makes no sense.
    pub fn add(&mut self, list: &str) -> Result<(), String> {
        list.split(',').filter(|option| !option.is_empty()).try_for_each(|option| self.set(option))
    }

    fn set(&mut self, option: &str) -> Result<(), String> {
        if option.starts_with("x-") || option.starts_with("X-") {
            return Ok(());
        }
        match option.split_once('=') {
            Some((key, value)) => self.set_value(key, value),
            None => self.set_flag(option),
        }
    }

    fn set_flag(&mut self, option: &str) -> Result<(), String> {
        match option {
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "allow_other" => self.allow_other = Some(true),
            "noallow_other" => self.allow_other = Some(false),
            "noatime" => self.noatime = true,
            "relatime" | "atime" => self.noatime = false,
            "flush_on_close" => self.flush_on_close = Some(true),
            "noflush_on_close" => self.flush_on_close = Some(false),
            "noexec" => self.noexec = true,
            "exec" => self.noexec = false,
            "suid" => self.suid = Some(true),
            "nosuid" => self.suid = Some(false),
            "dev" => self.dev = Some(true),
            "nodev" => self.dev = Some(false),
            "sync" => self.sync = true,
            "async" => self.sync = false,
            "dirsync" => self.dirsync = true,
            "hard" => (self.operation_timeout, self.soft) = (Some(None), false),
            "soft" => {
                // The settings' time-out, unless it was said which one.
                self.operation_timeout = self.operation_timeout.filter(Option::is_some);
                self.soft = true;
            }
            "strictatime" => {
                return Err("option 'strictatime' is not supported: access times are kept as relatime does"
                    .to_owned());
            }
            "remount" => return Err("option 'remount' is not supported: unmount and mount again".to_owned()),
            "subdir" | "masters" | "config" | "write_memory" | "read_cache" | "timeout"
            | "operation_timeout" => {
                return Err(format!("option '{option}' needs a value ({option}=…)"));
            }
            ignored if IGNORED.contains(&ignored) => {}
            unknown => return Err(format!("unknown option '{unknown}'")),
        }
        Ok(())
    }

    fn set_value(&mut self, key: &str, value: &str) -> Result<(), String> {
        let bytes = || parse_bytes(value).map_err(|error| format!("option '{key}': {error}"));
        match key {
            "subdir" => {
                if !value.starts_with('/') {
                    return Err(format!("option 'subdir': '{value}' is not an absolute path"));
                }
                let path = value.trim_end_matches('/');
                self.subdir = (!path.is_empty()).then(|| path.to_owned());
            }
            // fstab separates options by commas, so addresses are separated by '+' here.
            "masters" => self.masters = Some(value.replace('+', ",")),
            "config" => self.config = Some(PathBuf::from(value)),
            "write_memory" => {
                let bytes = bytes()?;
                if bytes < 1 << 20 {
                    return Err("option 'write_memory' must be at least 1MiB".to_owned());
                }
                self.write_memory = Some(bytes);
            }
            "read_cache" => self.read_cache = Some(bytes()?),
            "timeout" | "operation_timeout" => {
                let seconds = value
                    .strip_suffix('s')
                    .unwrap_or(value)
                    .parse::<u64>()
                    .map_err(|_| format!("option '{key}': '{value}' is not a number of seconds"))?;
                self.operation_timeout = Some((seconds != 0).then(|| Duration::from_secs(seconds)));
                self.soft &= seconds != 0;
            }
            "comment" => {}
            _ => return Err(format!("unknown option '{key}'")),
        }
        Ok(())
    }

    /// What the SOURCE of mount(8) says: `[dfs#]HOST:PORT[,HOST:PORT…][:/SUBDIR]`; any other name says nothing.
    ///
    /// # Errors
    /// One line about a directory that makes no sense.
    pub fn add_source(&mut self, source: &str) -> Result<(), String> {
        let place = source.strip_prefix("dfs#").unwrap_or(source);
        if !place.contains(':') {
            return Ok(());
        }
        let (masters, subdir) = match place.find(":/") {
            Some(at) => (&place[..at], Some(&place[at + 1..])),
            None => (place, None),
        };
        if masters.is_empty() {
            return Err(format!("'{source}' is not a source like HOST:PORT,HOST:PORT:/SUBDIR"));
        }
        if self.masters.is_none() {
            self.masters = Some(masters.replace('+', ","));
        }
        match subdir {
            Some(subdir) if self.subdir.is_none() => self.set_value("subdir", subdir),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(list: &str) -> Result<Options, String> {
        let mut options = Options::default();
        options.add(list).map(|()| options)
    }

    #[test]
    fn every_option_is_read() {
        let options = parsed(
            "ro,subdir=/a/b/,allow_other,noatime,flush_on_close,noexec,nosuid,nodev,sync,dirsync,masters=h:1+[::1]:2,config=/c,\
             write_memory=64MiB,read_cache=1GiB,timeout=5s",
        )
        .expect("good options");
        let wanted = Options {
            read_only: true,
            subdir: Some("/a/b".to_owned()),
            allow_other: Some(true),
            noatime: true,
            flush_on_close: Some(true),
            noexec: true,
            suid: Some(false),
            dev: Some(false),
            sync: true,
            dirsync: true,
            masters: Some("h:1,[::1]:2".to_owned()),
            config: Some(PathBuf::from("/c")),
            write_memory: Some(64 << 20),
            read_cache: Some(1 << 30),
            operation_timeout: Some(Some(Duration::from_secs(5))),
            soft: false,
        };
        assert_eq!(options, wanted);
    }

    #[test]
    fn what_fstab_adds_is_accepted_and_later_options_win() {
        let noise =
            "defaults,_netdev,nofail,noauto,x-systemd.automount,X-mount.mkdir,comment=x,user,,relatime";
        assert_eq!(parsed(noise), Ok(Options::default()));
        assert_eq!(parsed("ro,rw,noexec,exec,noatime,relatime,sync,async"), Ok(Options::default()));
        assert_eq!(parsed("subdir=/").map(|options| options.subdir), Ok(None));
        let patience = |list: &str| {
            let options = parsed(list).expect(list);
            (options.operation_timeout, options.soft)
        };
        let seconds = |seconds| Some(Some(Duration::from_secs(seconds)));
        assert_eq!(patience("hard"), (Some(None), false));
        assert_eq!(patience("soft"), (None, true));
        assert_eq!(patience("hard,operation_timeout=0"), (Some(None), false));
        assert_eq!(patience("timeout=5,hard"), (Some(None), false));
        assert_eq!(patience("soft,timeout=0"), (Some(None), false));
        assert_eq!(patience("hard,soft"), (None, true));
        assert_eq!(patience("hard,timeout=7"), (seconds(7), false));
        assert_eq!(patience("timeout=7,soft"), (seconds(7), true));
    }

    #[test]
    fn what_is_unknown_or_senseless_gets_one_line() {
        for (list, line) in [
            ("ro,colour", "unknown option 'colour'"),
            ("colour=red", "unknown option 'colour'"),
            ("strictatime", "access times are kept as relatime does"),
            ("remount", "unmount and mount again"),
            ("subdir=a", "'a' is not an absolute path"),
            ("subdir", "option 'subdir' needs a value"),
            ("write_memory=1KiB", "at least 1MiB"),
            ("read_cache=apples", "option 'read_cache'"),
            ("timeout=soon", "option 'timeout': 'soon' is not a number of seconds"),
            ("timeout", "option 'timeout' needs a value"),
        ] {
            let error = parsed(list).expect_err(list);
            assert!(error.contains(line) && !error.contains('\n'), "{list}: {error}");
        }
    }

    #[test]
    fn a_source_names_masters_and_a_directory_and_options_win_over_it() {
        let read = |source: &str, options: &str| {
            let mut read = parsed(options).expect("good options");
            read.add_source(source).map(|()| (read.masters, read.subdir))
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(read("dfs", ""), Ok((None, None)));
        assert_eq!(read("none", ""), Ok((None, None)));
        assert_eq!(read("h:1", ""), Ok((text("h:1"), None)));
        assert_eq!(read("dfs#h:1,i:2:/a", ""), Ok((text("h:1,i:2"), text("/a"))));
        assert_eq!(read("h:1:/a", "masters=j:3,subdir=/b"), Ok((text("j:3"), text("/b"))));
        assert_eq!(read("storage", ""), Ok((None, None)));
        assert!(read(":/a", "").is_err());
    }
}
