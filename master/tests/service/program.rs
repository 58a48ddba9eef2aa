//! The program itself: what it prints, and how it ends.

use crate::harness::{config, key, start};
use dfs_env::Env;
use dfs_master::StartError;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn master() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dfs-master"));
    command.env_remove("RUST_LOG");
    command
}

/// Exit status and the one line on stderr.
fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let output = master().args(arguments).output().expect("runs");
    (output.status.code(), String::from_utf8(output.stderr).expect("text"))
}

fn write(dir: &Path, listen: &str, extra: &str) -> String {
    std::fs::write(dir.join("key"), "a cluster key for tests").unwrap();
    let path = dir.join("master.toml");
    let (data, key) = (dir.join("data"), dir.join("key"));
    let text = format!(
        "id = 1\nlisten = {listen:?}\ndata = {:?}\ncluster_key_file = {:?}\n{extra}",
        data.display().to_string(),
        key.display().to_string()
    );
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn help_and_version_are_complete_and_succeed() {
    let output = master().arg("--help").output().expect("runs");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for word in ["--config", "--check-config", "--log", "Exit status"] {
        assert!(text.contains(word), "{word} is missing in {text}");
    }
    assert!(master().arg("--version").output().expect("runs").status.success());
}

#[test]
fn bad_input_gets_one_line_and_status_2() {
    let dir = tempfile::tempdir().unwrap();
    let unknown = write(dir.path(), "127.0.0.1:0", "colour = 1\n");
    for (arguments, expected) in [
        (vec!["--bogus"], "unexpected argument '--bogus'"),
        (vec!["--config", "/nowhere/x.toml"], "cannot read /nowhere/x.toml"),
        (vec!["--config", unknown.as_str()], "unknown field `colour`"),
        (vec!["--log", "a=b=c"], "--log"),
    ] {
        let (status, text) = run(&arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {text}");
        assert!(text.contains(expected) && text.starts_with("dfs-master: "), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    let valid = write(dir.path(), "127.0.0.1:0", "");
    assert_eq!(run(&["--config", &valid, "--check-config"]).0, Some(0));
    assert!(!dir.path().join("data").exists(), "checking touches nothing");
}

#[test]
fn a_port_in_use_gets_one_line_and_status_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let config = write(dir.path(), &address, "");
    let (status, text) = run(&["--config", &config, "--log", "error"]);
    assert_eq!(status, Some(1));
    assert_eq!(text, format!("dfs-master: cannot listen on {address}: the port is in use\n"));
}

#[test]
fn sigterm_stops_it_cleanly_and_soon() {
    let dir = tempfile::tempdir().unwrap();
    let config = write(dir.path(), "127.0.0.1:0", "");
    let mut child = master().args(["--config", &config]).stderr(Stdio::piped()).spawn().expect("runs");
    let mut stderr = child.stderr.take().unwrap();
    let mut log = String::new();
    let mut buffer = [0; 4096];
    while !log.contains("serving") {
        let n = stderr.read(&mut buffer).expect("reads");
        assert!(n > 0, "it ended: {log}");
        log.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    // SAFETY: the child is ours and has not been waited for, so its id is not reused.
    let sent = unsafe { libc::kill(i32::try_from(child.id()).unwrap(), libc::SIGTERM) };
    assert_eq!(sent, 0);
    let began = Instant::now();
    let status = child.wait().expect("ends");
    assert!(status.success(), "{status:?}: {log}");
    assert!(began.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_of_another_cluster_or_node_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    start(dir.path()).await.shutdown().await;
    let other_node = dfs_master::Config { id: 2, ..config(dir.path()) };
    let other = dfs_proto::token::ClusterKey::new(b"another cluster's key").unwrap();
    assert_ne!(other.cluster_id(), key().cluster_id());
    let other_cluster = dfs_master::Config { key: other, ..config(dir.path()) };
    for config in [other_node, other_cluster] {
        match dfs_master::start(Env::real(), config).await {
            Err(StartError::Usage(text)) => assert_eq!(text.lines().count(), 1, "{text}"),
            Err(StartError::Failed(text)) => panic!("not a usage error: {text}"),
            Ok(_) => panic!("it started"),
        }
    }
    start(dir.path()).await.shutdown().await;
}
