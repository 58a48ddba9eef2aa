//! The life of a mount: connect, mount, serve, flush, unmount.

use crate::assist::{Task, assist};
use crate::cli::MountWish;
use crate::daemon::{PidFile, Starter};
use crate::fail::Failure;
use crate::fuse::Dfs;
use crate::kernel::Kernel;
use crate::killable::Registry;
use crate::mountpoint::{self, Mount};
use crate::options::Options;
use dfs_client::{Client, ClientConfig};
use dfs_env::Env;
use dfs_proto::v1::{ErrorCode, Kind};
use dfs_proto::{FsError, FsResult, InodeNo, limits};
use fuser::{Config, MountOption, Session, SessionACL};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Threads that read requests: two nearly double small operations (docs/BENCHMARKS.md), more cost more than they bring.
const FUSE_THREADS: usize = 2;
/// How far the kernel reads ahead, in KiB; the client reads further ahead by itself.
const READ_AHEAD_KIB: u32 = 1024;
/// How long programs that still use the mount are served once it is being taken away.
const LINGER: Duration = Duration::from_secs(5);
/// How long until unmounting is tried again.
const AGAIN: Duration = Duration::from_millis(100);
/// How long the kernel may take to hand over pages that were written to shared mappings.
const KERNEL_FLUSH: Duration = Duration::from_secs(30);

/// The client's settings: the file's and the environment's, then what the options say.
///
/// # Errors
/// They make no sense.
pub fn settings(env: &Env, options: &Options, place: &Path) -> Result<ClientConfig, Failure> {
    let file = options.config.as_deref();
    let loaded = match &options.masters {
        Some(masters) => dfs_client::settings::parse_masters(masters, "masters")
            .and_then(|_| dfs_client::settings::load_with(env, file, Some(masters))),
        None => dfs_client::settings::load(env, file),
    };
    let mut config = loaded.map_err(Failure::usage)?;
    if config.name.is_empty() {
        config.name = format!("dfs-mount {}", place.display());
    }
    config.write_memory = options.write_memory.unwrap_or(config.write_memory);
    config.read_cache = options.read_cache.unwrap_or(config.read_cache);
    config.operation_timeout = options.operation_timeout.unwrap_or(config.operation_timeout);
    if options.soft {
        let default = Duration::from_millis(limits::OPERATION_MS);
        config.operation_timeout = config.operation_timeout.or(Some(default));
    }
    config.noatime |= options.noatime;
    config.flush_on_close = options.flush_on_close.unwrap_or(config.flush_on_close);
    Ok(config)
}

/// Serves a mount until it is unmounted or a signal asks for its end. Answers the exit status.
pub fn serve(wish: &MountWish, place: PathBuf, config: ClientConfig, starter: Starter) -> u8 {
    let runtime = match dfs_env::runtime::build("dfs") {
        Ok(runtime) => runtime,
        Err(error) => return fail(starter, &Failure::operation(error)),
    };
    let limit =
        config.operation_timeout.map(|limit| limit + Duration::from_millis(limits::OPERATION_SLACK_MS));
    let bound = config.operation_timeout.unwrap_or(Duration::from_millis(limits::OPERATION_MS));
    let client = match runtime.block_on(Client::connect(Env::real(), config)) {
        Ok(client) => client,
        Err(error) => return fail(starter, &Failure::operation(error)),
    };
    let served = Served { place, client, runtime, bound, limit };
    // Before there is a mount that a signal could leave behind.
    let listening = {
        let _runtime = served.runtime.enter();
        Ending::listen()
    };
    let mut ending = match listening {
        Ok(ending) => ending,
        Err(error) => return fail(starter, &Failure::operation(format!("no signal handler: {error}"))),
    };
    let (status, written) = match served.start(wish) {
        Ok(running) => served.run(running, wish, starter, &mut ending),
        Err(failure) => (fail(starter, &failure), true),
    };
    let flushed = served.runtime.block_on(served.leave(written, &mut ending));
    served.runtime.shutdown_timeout(Duration::from_secs(1));
    match flushed {
        Ok(()) => {
            tracing::info!("ended");
            status
        }
        Err(error) => {
            tracing::error!(%error, "not everything could be written");
            1
        }
    }
}

/// What asks for the end of a mount. The second time it is in a hurry.
struct Ending {
    terminate: Signal,
    interrupt: Signal,
}

impl Ending {
    fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn fail(starter: Starter, failure: &Failure) -> u8 {
    tracing::error!("{failure}");
    starter.failed(failure);
    failure.status
}

struct Served {
    place: PathBuf,
    client: Client,
    runtime: Runtime,
    /// How long flushing may take at the end.
    bound: Duration,
    /// How long any request may take; `None`: as long as it does.
    limit: Option<Duration>,
}

/// A mount that is there.
struct Running {
    session: Session<Dfs>,
    registry: Arc<Registry>,
    /// As the kernel lists it.
    mount: Option<Mount>,
    _pid_file: Option<PidFile>,
}

impl Served {
    fn start(&self, wish: &MountWish) -> Result<Running, Failure> {
        let root = self.root(&wish.options)?;
        let pid_file = match &wish.pid_file {
            Some(path) => Some(
                PidFile::create(path.clone())
                    .map_err(|error| Failure::operation(format!("pid file {}: {error}", path.display())))?,
            ),
            None => None,
        };
        let registry = Arc::new(Registry::new(self.limit));
        let fs = Dfs::new(self.client.clone(), root, Arc::clone(&registry), self.runtime.handle().clone());
        let shared = fs.shared();
        let config = kernel_config(&wish.options, &self.client.cluster_id(), is_root());
        let session = Session::new(fs, &self.place, &config).map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => "; is the kernel module loaded (modprobe fuse)?",
                io::ErrorKind::PermissionDenied if !is_root() => "; may this user open /dev/fuse?",
                _ => "",
            };
            Failure::operation(format!("cannot mount on {}: {error}{hint}", self.place.display()))
        })?;
        let kernel = Kernel::new(&session)
            .map_err(|error| Failure::operation(format!("no descriptor for the device: {error}")))?;
        shared.mounted(kernel);
        let watching = registry.watch().map_err(|error| Failure::operation(format!("no thread: {error}")))?;
        // It ends by itself when the registry is stopped.
        drop(watching);
        let mount = mountpoint::mounted_on(&self.place)
            .map_err(|error| Failure::operation(format!("/proc: {error}")))?;
        if let Some(mount) = &mount {
            mountpoint::set_read_ahead(mount, READ_AHEAD_KIB);
        }
        Ok(Running { session, registry, mount, _pid_file: pid_file })
    }

    /// The directory that becomes the root.
    fn root(&self, options: &Options) -> Result<InodeNo, Failure> {
        let Some(path) = &options.subdir else { return Ok(InodeNo::ROOT) };
        let attr = self
            .runtime
            .block_on(self.client.resolve(path.as_bytes()))
            .map_err(|error| Failure::operation(format!("subdir={path}: {error}")))?;
        if attr.kind != Kind::Dir as i32 {
            return Err(Failure::operation(format!("subdir={path}: not a directory")));
        }
        Ok(InodeNo(attr.ino))
    }

    /// Answers the exit status, and whether everything was written as far as is known.
    fn run(&self, running: Running, wish: &MountWish, starter: Starter, ending: &mut Ending) -> (u8, bool) {
        let Running { session, registry, mount, _pid_file } = running;
        let (ended, mut end) = oneshot::channel();
        let thread = std::thread::Builder::new().name("fuse".to_owned()).spawn(move || {
            // Nobody listens any more when the process is about to exit.
            let _ = ended.send(session.run());
        });
        // A thread that cannot be started has dropped the session, which unmounts.
        if let Err(error) = thread {
            return (fail(starter, &Failure::operation(format!("no thread: {error}"))), true);
        }
        let written = self.runtime.block_on(async {
            tracing::info!(place = %self.place.display(), cluster = %self.client.cluster_id(), "mounted");
            if let Err(error) = starter.ready(wish.log_file.as_ref()) {
                tracing::warn!(%error, "whoever started this could not be told that the mount is usable");
            }
            tokio::select! {
                result = &mut end => {
                    report_end(result);
                    true
                }
                () = ending.asked() => self.stop(&mut end, ending).await,
            }
        });
        registry.stop();
        self.leave_nothing(mount.as_ref());
        (0, written)
    }

    /// Flushes and unmounts, as far as programs that use the mount allow. Answers whether everything was written.
    async fn stop(&self, end: &mut oneshot::Receiver<io::Result<()>>, ending: &mut Ending) -> bool {
        tracing::info!("unmounting");
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Stopping]) {
            tracing::debug!(%error, "systemd was not told");
        }
        let (mut written, mut hurry) = (false, false);
        tokio::select! {
            done = self.write_out() => written = done,
            () = ending.asked() => hurry = true,
        }
        if !hurry {
            tokio::select! {
                done = tokio::time::timeout(LINGER, self.unmount()) => hurry = done.is_err(),
                () = ending.asked() => hurry = true,
            }
        }
        if hurry {
            tracing::warn!("programs that still use the mount get errors from here on");
            if let Err(error) = assist(Task::Abort, &self.place, LINGER).await {
                tracing::error!(%error, "the mount could not be removed");
            }
        }
        match tokio::time::timeout(LINGER, end).await {
            Ok(result) => report_end(result),
            Err(_) => tracing::warn!("the kernel keeps the mount until the last program has left it"),
        }
        written
    }

    /// What programs changed in shared mappings, then everything that is kept here.
    async fn write_out(&self) -> bool {
        let all = async {
            match assist(Task::Write, &self.place, KERNEL_FLUSH.min(self.bound)).await {
                Ok(()) => {}
                Err(error) => tracing::warn!(%error, "the kernel's pages could not all be written"),
            }
            self.client.sync().await
        };
        match tokio::time::timeout(self.bound, all).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::error!(%error, "flushing failed");
                false
            }
            Err(_) => {
                tracing::error!("not everything was written within {:?}", self.bound);
                false
            }
        }
    }

    /// Unmounts as soon as nobody uses it.
    async fn unmount(&self) {
        let mut told = false;
        loop {
            match assist(Task::Unmount, &self.place, LINGER).await {
                Ok(()) => return,
                // Somebody unmounted it meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
                Err(error) if !told => {
                    tracing::warn!(%error, "the mount cannot be removed yet");
                    told = true;
                }
                Err(_) => {}
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Ends the session. `written`: what is left is to be written first, if there is any.
    async fn leave(&self, written: bool, ending: &mut Ending) -> FsResult<()> {
        if written {
            tokio::select! {
                flushed = self.client.shutdown() => return flushed,
                () = ending.asked() => {}
            }
        }
        self.client.leave().await;
        Err(FsError::new(ErrorCode::ErrorTimedOut, "it was given up"))
    }

    /// No dead mount stays behind, whatever ended the session.
    fn leave_nothing(&self, ours: Option<&Mount>) {
        let Ok(Some(there)) = mountpoint::mounted_on(&self.place) else { return };
        if ours == Some(&there)
            && let Err(error) = self.runtime.block_on(assist(Task::Abort, &self.place, LINGER))
        {
            tracing::error!(%error, "a dead mount stays behind");
        }
    }
}

fn report_end(result: Result<io::Result<()>, oneshot::error::RecvError>) {
    match result {
        Ok(Ok(())) => tracing::info!("unmounted"),
        Ok(Err(error)) => tracing::error!(%error, "the session ended"),
        Err(_) => tracing::error!("the session's thread ended without a word"),
    }
}

fn is_root() -> bool {
    // SAFETY: it cannot fail and touches no memory.
    unsafe { libc::geteuid() == 0 }
}

fn kernel_config(options: &Options, cluster: &str, root: bool) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(format!("dfs#{}", cluster.replace(',', "_"))),
        // Not Subtype: as root the FUSE library keeps that for itself, and the type would be plain "fuse".
        MountOption::CUSTOM("subtype=dfs".to_owned()),
        MountOption::DefaultPermissions,
    ];
    let chosen = [
        (options.read_only, MountOption::RO),
        (options.noexec, MountOption::NoExec),
        (options.noatime, MountOption::NoAtime),
        (options.sync, MountOption::Sync),
        (options.dirsync, MountOption::DirSync),
        // Like any file system that root mounts.
        (options.suid.unwrap_or(root), MountOption::Suid),
        (options.dev.unwrap_or(root), MountOption::Dev),
    ];
    config.mount_options.extend(chosen.into_iter().filter_map(|(wanted, option)| wanted.then_some(option)));
    config.acl = if options.allow_other.unwrap_or(root) { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(FUSE_THREADS);
    config.clone_fd = true;
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_shares_its_mount_and_keeps_devices_unless_told_otherwise() {
        let config = kernel_config(&Options::default(), "a,b", true);
        assert_eq!(config.acl, SessionACL::All);
        assert!(config.mount_options.contains(&MountOption::Suid));
        assert!(config.mount_options.contains(&MountOption::FSName("dfs#a_b".to_owned())));
        let config = kernel_config(&Options::default(), "a", false);
        assert_eq!(config.acl, SessionACL::Owner);
        assert!(!config.mount_options.contains(&MountOption::Dev));
        let mut options = Options::default();
        options.add("ro,noallow_other,nosuid").expect("good options");
        let config = kernel_config(&options, "a", true);
        assert_eq!(config.acl, SessionACL::Owner);
        assert!(
            config.mount_options.contains(&MountOption::RO)
                && !config.mount_options.contains(&MountOption::Suid)
        );
    }
}
