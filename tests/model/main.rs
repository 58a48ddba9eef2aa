//! The model test: several processes with different users do the same random system calls in two directories, one on a
//! dfs mount, one on a file system that is believed (ext4), and after each call everything that POSIX says something
//! about is compared: result, errno, the stat of every object named and of its directory, whether their times moved, and
//! the bytes of files. Every few hundred steps the whole trees are.
//!
//! `dfs-model --mount DIR --reference DIR [--operations N] [--seed N]`, as root. Both directories must be empty.

mod act;
mod op;

use act::{Outcome, Seen, bytes, digest, lstat_at, seen};
use op::{Op, draw};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

/// Users of the processes: uid, gid, supplementary groups.
const USERS: [(u32, u32, &[u32]); 5] = [
    (0, 0, &[]),
    (1001, 1001, &[2001]),
    (1002, 1002, &[2001, 2002]),
    (1001, 1001, &[2001]),
    (1003, 2002, &[]),
];
/// The trees are compared as a whole after this many steps.
const WHOLE: u64 = 500;

struct Arguments {
    mount: String,
    reference: String,
    operations: u64,
    seed: u64,
}

fn arguments() -> Result<Arguments, String> {
    let mut found = BTreeMap::new();
    let mut all = std::env::args().skip(1);
    while let Some(name) = all.next() {
        let value = all.next().ok_or_else(|| format!("{name} needs a value"))?;
        found.insert(name, value);
    }
    let number = |found: &mut BTreeMap<String, String>, name: &str, default| match found.remove(name) {
        None => Ok(default),
        Some(text) => text.parse::<u64>().map_err(|error| format!("{name}: {error}")),
    };
    let arguments = Arguments {
        operations: number(&mut found, "--operations", 20_000)?,
        seed: number(&mut found, "--seed", 1)?,
        mount: found.remove("--mount").ok_or("--mount is missing")?,
        reference: found.remove("--reference").ok_or("--reference is missing")?,
    };
    match found.pop_first() {
        None => Ok(arguments),
        Some((name, _)) => Err(format!("{name} is unknown")),
    }
}

/// A process that carries out steps.
struct Actor {
    process: Child,
    steps: ChildStdin,
    outcomes: BufReader<ChildStdout>,
}

impl Actor {
    fn start(roots: &[File; 2], (uid, gid, groups): (u32, u32, &'static [u32])) -> std::io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("actor").args(roots.iter().map(|root| root.as_raw_fd().to_string()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let kept = roots.each_ref().map(AsRawFd::as_raw_fd);
        // SAFETY: only system calls that are allowed between fork and exec, and no memory is taken.
        unsafe {
            command.pre_exec(move || {
                for fd in kept {
                    if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                let all = libc::setgroups(groups.len(), groups.as_ptr()) == 0
                    && libc::setgid(gid) == 0
                    && libc::setuid(uid) == 0;
                if all { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            });
        }
        let mut process = command.spawn()?;
        let steps = process.stdin.take().expect("piped");
        let outcomes = BufReader::new(process.stdout.take().expect("piped"));
        Ok(Self { process, steps, outcomes })
    }

    fn step(&mut self, op: &Op) -> std::io::Result<[Outcome; 2]> {
        let mut line = serde_json::to_string(op)?;
        line.push('\n');
        self.steps.write_all(line.as_bytes())?;
        line.clear();
        self.outcomes.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

/// The directory that holds a path's last name.
fn parent(path: &str) -> &str {
    path.trim_end_matches('/').rsplit_once('/').map_or(".", |(parent, _)| parent)
}

/// An object in one tree, as root sees it.
#[derive(Debug, PartialEq, Eq)]
enum Object {
    Missing(i32),
    There { seen: Seen, bytes: Option<String> },
}

fn read_all(root: RawFd, path: &str) -> Option<String> {
    let path = bytes(path);
    // SAFETY: the path ends with a zero; the descriptor becomes the file's, which closes it.
    let mut file = unsafe {
        let fd = libc::openat(root, path.as_ptr(), libc::O_RDONLY | libc::O_NOATIME | libc::O_CLOEXEC);
        (fd >= 0).then(|| <File as std::os::fd::FromRawFd>::from_raw_fd(fd))?
    };
    let mut all = Vec::new();
    match std::io::Read::read_to_end(&mut file, &mut all) {
        Ok(_) => Some(digest(&all)),
        Err(error) => Some(error.to_string()),
    }
}

fn look(root: RawFd, path: &str, before: Option<&libc::stat>) -> Object {
    match lstat_at(root, path) {
        Err(errno) => Object::Missing(errno),
        Ok(stat) => {
            let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
            let bytes = if is_file { read_all(root, path) } else { None };
            Object::There { seen: seen(before, &stat), bytes }
        }
    }
}

/// What `path` and everything below it is, by name.
fn walk(root: RawFd, path: &str, all: &mut BTreeMap<String, String>) {
    let Ok(stat) = lstat_at(root, path) else {
        all.insert(path.to_owned(), "missing".to_owned());
        return;
    };
    let object = look(root, path, None);
    let proc_path = format!("/proc/self/fd/{root}/{path}");
    let mut xattrs = Vec::new();
    let kind = stat.st_mode & libc::S_IFMT;
    if kind != libc::S_IFLNK && path.is_ascii() {
        for name in ["user.a", "user.b", "trusted.t", "system.posix_acl_access", "system.posix_acl_default"] {
            let mut value = vec![0_u8; 1024];
            let (path, name_bytes) = (bytes(&proc_path), bytes(name));
            // SAFETY: both strings end with a zero, the buffer is as long as it says.
            let n = unsafe {
                libc::lgetxattr(path.as_ptr(), name_bytes.as_ptr(), value.as_mut_ptr().cast(), value.len())
            };
            if let Ok(n) = usize::try_from(n) {
                xattrs.push(format!("{name}={}", digest(&value[..n])));
            }
        }
    }
    all.insert(path.to_owned(), format!("{object:?} {xattrs:?}"));
    if kind == libc::S_IFDIR {
        let names = std::fs::read_dir(&proc_path).map(|names| {
            names
                .filter_map(Result::ok)
                .map(|entry| {
                    std::os::unix::ffi::OsStrExt::as_bytes(entry.file_name().as_os_str())
                        .iter()
                        .map(|byte| char::from(*byte))
                        .collect::<String>()
                })
                .collect::<Vec<_>>()
        });
        for name in names.unwrap_or_default() {
            walk(root, &format!("{path}/{name}"), all);
        }
    }
}

/// Says where two trees differ.
fn compare_trees(roots: &[File; 2]) -> Result<(), String> {
    let [ours, theirs] = roots.each_ref().map(|root| {
        let mut all = BTreeMap::new();
        walk(root.as_raw_fd(), ".", &mut all);
        all
    });
    for path in ours.keys().chain(theirs.keys()) {
        if ours.get(path) != theirs.get(path) {
            return Err(format!(
                "{path}\n  dfs       {:?}\n  reference {:?}",
                ours.get(path),
                theirs.get(path)
            ));
        }
    }
    Ok(())
}

/// One step in both trees, and everything that it may have touched.
fn step(roots: &[File; 2], actor: &mut Actor, op: &Op) -> Result<(), String> {
    let mut paths: Vec<&str> = Vec::new();
    for path in op.paths() {
        paths.extend([path.as_str(), parent(path)]);
    }
    let before = roots
        .each_ref()
        .map(|root| paths.iter().map(|path| lstat_at(root.as_raw_fd(), path).ok()).collect::<Vec<_>>());
    let outcomes = actor.step(op).map_err(|error| format!("the process ended: {error}"))?;
    let [mut ours, mut theirs] = outcomes;
    if op.leaves_times_open() {
        for file in ours.files.iter_mut().chain(&mut theirs.files).flatten() {
            (file.mtime_changed, file.ctime_changed) = (false, false);
        }
    }
    if ours != theirs {
        return Err(format!("the outcomes differ\n  dfs       {ours:?}\n  reference {theirs:?}"));
    }
    for (at, path) in paths.iter().enumerate() {
        let [ours, theirs] =
            [0, 1].map(|side: usize| look(roots[side].as_raw_fd(), path, before[side][at].as_ref()));
        if ours != theirs {
            return Err(format!("{path} differs afterwards\n  dfs       {ours:?}\n  reference {theirs:?}"));
        }
    }
    Ok(())
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let open = |path: &str| File::open(path).map_err(|error| format!("{path}: {error}"));
    let roots = [open(&arguments.mount)?, open(&arguments.reference)?];
    for root in &roots {
        // SAFETY: only numbers are passed.
        if unsafe { libc::fchmod(root.as_raw_fd(), 0o777) } != 0 {
            return Err(format!("chmod of a root: {}", std::io::Error::last_os_error()));
        }
    }
    let mut actors = Vec::new();
    for user in USERS {
        actors.push(Actor::start(&roots, user).map_err(|error| format!("starting a process: {error}"))?);
    }
    let mut rng = StdRng::seed_from_u64(arguments.seed);
    let mut last: VecDeque<String> = VecDeque::new();
    let mut worked = 0_u64;
    for number in 0..arguments.operations {
        let who = rng.random_range(0..actors.len());
        let op = draw(&mut rng, arguments.seed.is_multiple_of(2));
        last.push_back(format!("{number}: uid {} {op:?}", USERS[who].0));
        if last.len() > 30 {
            last.pop_front();
        }
        let mut result = step(&roots, &mut actors[who], &op);
        if result.is_ok() && (number % WHOLE == WHOLE - 1 || number + 1 == arguments.operations) {
            result = compare_trees(&roots).map_err(|difference| format!("the trees differ: {difference}"));
        }
        if let Err(difference) = result {
            let steps: Vec<String> = last.into_iter().collect();
            return Err(format!(
                "seed {}, step {number}: {difference}\nlast steps:\n{}",
                arguments.seed,
                steps.join("\n")
            ));
        }
        worked += 1;
    }
    for mut actor in actors {
        drop(actor.steps);
        actor.process.wait().map_err(|error| error.to_string())?;
    }
    println!("seed {}: {worked} operations, no difference", arguments.seed);
    Ok(())
}

fn main() -> ExitCode {
    let mut arguments_given = std::env::args().skip(1);
    if arguments_given.next().as_deref() == Some("actor") {
        let mut root = || arguments_given.next().and_then(|fd| fd.parse().ok()).expect("a descriptor");
        act::run([root(), root()]);
        return ExitCode::SUCCESS;
    }
    match arguments().and_then(|arguments| run(&arguments)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dfs-model: {error}");
            ExitCode::FAILURE
        }
    }
}
