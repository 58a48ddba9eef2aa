//! Names and attributes, from the client to a real master and back.

mod support;

use dfs_client::{Attr, Client, Cred, InodeNo, v1};
use dfs_proto::error::ErrorCode;
use std::collections::BTreeSet;
use std::time::Duration;
use support::{Cluster, ROOT, Shape, new, root, user};

fn ino(attr: &Attr) -> InodeNo {
    InodeNo(attr.ino)
}

async fn make(client: &Client, parent: InodeNo, name: &str, kind: v1::Kind) -> Attr {
    client.create(&root(), new(parent, name, kind)).await.expect(name).attr
}

async fn names(client: &Client, dir: InodeNo) -> BTreeSet<String> {
    let (mut found, mut cookie) = (BTreeSet::new(), 0);
    loop {
        let page = client.read_dir(&root(), dir, cookie, 100, true).await.expect("a page");
        for entry in &page.entries {
            assert!(entry.cookie > cookie, "cookies rise");
            cookie = entry.cookie;
            assert_eq!(entry.attr.map(|attr| attr.ino), Some(entry.ino));
            assert!(found.insert(String::from_utf8_lossy(&entry.name).into_owned()), "twice");
        }
        if page.end {
            return found;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_come_move_and_go() {
    let cluster = Cluster::start(Shape::default()).await;
    let client = cluster.client().await;
    let dir = make(&client, ROOT, "d", v1::Kind::Dir).await;
    let file = make(&client, ino(&dir), "f", v1::Kind::File).await;
    assert_eq!(client.lookup(&root(), ino(&dir), b"f").await.map(|attr| attr.ino), Ok(file.ino));
    assert_eq!(client.getattr(ROOT).await.expect("root").nlink, 3);
    let exists = client.create(&root(), new(ino(&dir), "f", v1::Kind::File)).await.expect_err("there");
    assert_eq!(exists.code, ErrorCode::ErrorExists);

    client.rename(&root(), ino(&dir), b"f", ROOT, b"g", false, false).await.expect("renamed");
    let gone = client.lookup(&root(), ino(&dir), b"f").await.expect_err("gone");
    assert_eq!(gone.code, ErrorCode::ErrorNotFound);
    assert!(matches!(client.cached_lookup(ino(&dir), b"f"), Some(Err(_))), "known to be absent");
    assert_eq!(client.lookup(&root(), ROOT, b"g").await.map(|attr| attr.ino), Ok(file.ino));

    let linked = client.link(&root(), ino(&file), ino(&dir), b"h").await.expect("linked");
    assert_eq!(linked.nlink, 2);
    client.unlink(&root(), ROOT, b"g").await.expect("unlinked");
    assert_eq!(client.getattr(ino(&file)).await.expect("one name left").nlink, 1);
    let full = client.rmdir(&root(), ROOT, b"d").await.expect_err("not empty");
    assert_eq!(full.code, ErrorCode::ErrorNotEmpty);
    client.unlink(&root(), ino(&dir), b"h").await.expect("unlinked");
    client.rmdir(&root(), ROOT, b"d").await.expect("removed");
    assert!(names(&client, ROOT).await.is_empty());
    assert_eq!(client.getattr(ROOT).await.expect("root").nlink, 2);
    client.shutdown().await.expect("clean end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rename_exchanges_and_refuses_to_replace() {
    let cluster = Cluster::start(Shape::default()).await;
    let client = cluster.client().await;
    let (a, b) =
        (make(&client, ROOT, "a", v1::Kind::File).await, make(&client, ROOT, "b", v1::Kind::Dir).await);
    let error = client.rename(&root(), ROOT, b"a", ROOT, b"b", true, false).await.expect_err("there");
    assert_eq!(error.code, ErrorCode::ErrorExists);
    client.rename(&root(), ROOT, b"a", ROOT, b"b", false, true).await.expect("exchanged");
    for (name, attr) in [(b"a", b), (b"b", a)] {
        let cached = client.cached_lookup(ROOT, name).expect("known").expect("there").0;
        assert_eq!(cached.ino, attr.ino);
        assert_eq!(client.lookup(&root(), ROOT, name).await.map(|found| found.ino), Ok(attr.ino));
    }
    let c = make(&client, ROOT, "c", v1::Kind::File).await;
    client.rename(&root(), ROOT, b"c", ROOT, b"b", false, false).await.expect("replaced");
    assert_eq!(client.lookup(&root(), ROOT, b"b").await.map(|found| found.ino), Ok(c.ino));
    client.link(&root(), ino(&c), ROOT, b"also c").await.expect("linked");
    client.rename(&root(), ROOT, b"b", ROOT, b"also c", false, false).await.expect("nothing to do");
    for name in [&b"b"[..], b"also c"] {
        assert_eq!(client.lookup(&root(), ROOT, name).await.map(|found| found.ino), Ok(c.ino));
    }
    assert_eq!(names(&client, ROOT).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_known_of_a_directory_is_what_the_master_knows() {
    let cluster = Cluster::start(Shape::default()).await;
    let (client, other) = (cluster.client().await, cluster.client().await);
    client.getattr(ROOT).await.expect("root");
    let calls: Vec<_> = (0..50)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(async move {
                let kind = if number % 2 == 0 { v1::Kind::Dir } else { v1::Kind::File };
                let name = format!("n{number}");
                make(&client, ROOT, &name, kind).await;
                if number % 3 == 0 {
                    match kind {
                        v1::Kind::Dir => client.rmdir(&root(), ROOT, name.as_bytes()).await,
                        _ => client.unlink(&root(), ROOT, name.as_bytes()).await,
                    }
                    .expect("removed");
                }
            })
        })
        .collect();
    for call in calls {
        call.await.expect("no panic");
    }
    let ours = client.getattr(ROOT).await.expect("root");
    let theirs = other.getattr(ROOT).await.expect("root");
    assert_eq!((ours.size, ours.nlink, ours.mtime), (theirs.size, theirs.nlink, theirs.mtime));
    assert_eq!(ours.version, theirs.version);
    // One after the other, nothing is asked in between, and it is right all the same.
    for number in 0..5 {
        make(&client, ROOT, &format!("m{number}"), v1::Kind::Dir).await;
        let known = client.cached_attr(ROOT).expect("still known").0;
        assert_eq!(u64::from(known.nlink), u64::from(ours.nlink) + number + 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_clients_change_is_seen_after_a_second_at_most() {
    let cluster = Cluster::start(Shape::default()).await;
    let (client, other) = (cluster.client().await, cluster.client().await);
    assert!(client.lookup(&root(), ROOT, b"new").await.is_err());
    let made = make(&other, ROOT, "new", v1::Kind::File).await;
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    assert_eq!(client.lookup(&root(), ROOT, b"new").await.map(|attr| attr.ino), Ok(made.ino));
    let change = v1::SetAttr { ino: made.ino, mode: Some(0o600), ..v1::SetAttr::default() };
    other.setattr(&root(), change).await.expect("changed");
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    assert_eq!(client.getattr(ino(&made)).await.expect("there").mode, 0o600);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_are_the_masters_to_check() {
    let cluster = Cluster::start(Shape::default()).await;
    let client = cluster.client().await;
    let secret = v1::Create { mode: 0o700, ..new(ROOT, "secret", v1::Kind::Dir) };
    let secret = client.create(&root(), secret).await.expect("made").attr;
    let somebody: Cred = user(1000);
    let denied = client.lookup(&somebody, ino(&secret), b"x").await.expect_err("denied");
    assert_eq!(denied.code, ErrorCode::ErrorAccess);
    let denied = client.create(&somebody, new(ROOT, "x", v1::Kind::File)).await.expect_err("denied");
    assert_eq!(denied.code, ErrorCode::ErrorAccess);
    assert_eq!(
        client.access(&somebody, ino(&secret), 4).await.expect_err("denied").code,
        ErrorCode::ErrorAccess
    );
    assert!(client.access(&root(), ino(&secret), 7).await.is_ok());
    let chown = v1::SetAttr { ino: secret.ino, uid: Some(1000), ..v1::SetAttr::default() };
    assert_eq!(
        client.setattr(&somebody, chown).await.expect_err("denied").code,
        ErrorCode::ErrorNotPermitted
    );
    client.setattr(&root(), chown).await.expect("given away");
    client.create(&somebody, new(ino(&secret), "mine", v1::Kind::File)).await.expect("his now");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn symlinks_xattrs_paths_and_space() {
    let cluster = Cluster::start(Shape::default()).await;
    let client = cluster.client().await;
    let link = v1::Create { target: "../else where".into(), ..new(ROOT, "link", v1::Kind::Symlink) };
    let link = client.create(&root(), link).await.expect("made").attr;
    assert_eq!(&client.readlink(ino(&link)).await.expect("read")[..], b"../else where");
    let file = make(&client, ROOT, "file", v1::Kind::File).await;
    let missing = client.getxattr(&root(), ino(&file), b"user.a").await.expect_err("none");
    assert_eq!(missing.code, ErrorCode::ErrorNoData);
    client.setxattr(&root(), ino(&file), b"user.a", b"1", false, false).await.expect("set");
    client.setxattr(&root(), ino(&file), b"user.b", &[7; 60_000], true, false).await.expect("set");
    assert!(client.setxattr(&root(), ino(&file), b"user.a", b"2", true, false).await.is_err());
    assert_eq!(&client.getxattr(&root(), ino(&file), b"user.a").await.expect("value")[..], b"1");
    assert_eq!(client.listxattr(&root(), ino(&file)).await.expect("names").len(), 2);
    client.removexattr(&root(), ino(&file), b"user.b").await.expect("removed");
    assert_eq!(client.listxattr(&root(), ino(&file)).await.expect("names"), ["user.a"]);
    let too_big = client.setxattr(&root(), ino(&file), b"user.c", &[0; 70_000], false, false).await;
    assert_eq!(too_big.expect_err("too big").code, ErrorCode::ErrorTooBig);

    let dir = make(&client, ROOT, "d", v1::Kind::Dir).await;
    let deep = make(&client, ino(&dir), "e", v1::Kind::Dir).await;
    assert_eq!(client.resolve_as(&root(), b"/d/e").await.map(|attr| attr.ino), Ok(deep.ino));
    assert_eq!(client.resolve_as(&root(), b"/").await.map(|attr| attr.ino), Ok(ROOT.get()));
    assert!(client.resolve_as(&root(), b"/d/none").await.is_err());
    let long = [b'x'; 256];
    assert_eq!(
        client.lookup(&root(), ROOT, &long).await.expect_err("long").code,
        ErrorCode::ErrorNameTooLong
    );
    assert!(client.statfs().await.expect("numbers").files >= 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_directory_is_listed_whole() {
    let cluster = Cluster::start(Shape::default()).await;
    let client = cluster.client().await;
    let calls: Vec<_> = (0..20)
        .map(|part| {
            let client = client.clone();
            tokio::spawn(async move {
                for number in 0..100 {
                    make(&client, ROOT, &format!("{part}-{number}"), v1::Kind::File).await;
                }
            })
        })
        .collect();
    for call in calls {
        call.await.expect("no panic");
    }
    assert_eq!(names(&client, ROOT).await.len(), 2000);
    assert_eq!(client.getattr(ROOT).await.expect("root").size, 2000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_conflict_across_clients_and_waiting_can_be_given_up() {
    let cluster = Cluster::start(Shape::default()).await;
    let (one, two) = (cluster.client().await, cluster.client().await);
    let file = ino(&make(&one, ROOT, "f", v1::Kind::File).await);
    let lock = |owner: u64, kind: v1::lock::Type, wait: bool| v1::Lock {
        ino: file.get(),
        owner,
        start: 0,
        end: u64::MAX,
        r#type: kind.into(),
        wait,
        pid: 42,
    };
    one.setlk(file, lock(1, v1::lock::Type::Write, false)).await.expect("free");
    let busy = two.setlk(file, lock(1, v1::lock::Type::Read, false)).await.expect_err("held");
    assert_eq!(busy.code, ErrorCode::ErrorWouldBlock);
    assert!(two.getlk(file, lock(1, v1::lock::Type::Read, false)).await.expect("asked").held);
    let given_up = two.setlk(file, lock(1, v1::lock::Type::Write, true));
    assert!(tokio::time::timeout(Duration::from_millis(100), given_up).await.is_err());
    let waiting = {
        let two = two.clone();
        let lock = lock(2, v1::lock::Type::Write, true);
        tokio::spawn(async move { two.setlk(file, lock).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    one.release_locks(file, 1).await.expect("released");
    waiting.await.expect("no panic").expect("granted to the one that still waits");
    two.release_locks(file, 2).await.expect("released");
    one.setlk(file, lock(1, v1::lock::Type::Write, false)).await.expect("nobody else has it");

    // Nobody waits for the close of the last file, but who asks after it gets the lock.
    let closing = one.closing(file, 1);
    let asked = {
        let (one, lock) = (one.clone(), lock(2, v1::lock::Type::Write, false));
        tokio::spawn(async move { one.setlk(file, lock).await })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!asked.is_finished());
    one.close_locks(closing).await.expect("released");
    asked.await.expect("no panic").expect("free");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_master_is_a_pause() {
    let mut cluster = Cluster::start(Shape::default()).await;
    let client = cluster.client().await;
    let file = ino(&make(&client, ROOT, "held", v1::Kind::File).await);
    let lock = v1::Lock { ino: file.get(), owner: 9, end: 99, r#type: 1, ..v1::Lock::default() };
    client.setlk(file, lock).await.expect("locked");
    let session = client.session();
    let making = {
        let client = client.clone();
        tokio::spawn(async move {
            for number in 0..200 {
                make(&client, ROOT, &format!("f{number}"), v1::Kind::File).await;
            }
        })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster.stop_master(1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    cluster.start_master(1).await;
    making.await.expect("no error was seen");
    assert_eq!(names(&client, ROOT).await.len(), 201);
    assert_eq!(client.session(), session);
    let other = cluster.client().await;
    assert!(
        other.getlk(file, v1::Lock { owner: 1, ..lock }).await.expect("asked").held,
        "the lock was asserted again"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn losing_the_leader_of_three_is_a_pause() {
    let mut cluster = Cluster::start(Shape { masters: 3, ..Shape::default() }).await;
    let client = cluster.client().await;
    let making: Vec<_> = (0..4)
        .map(|part| {
            let client = client.clone();
            tokio::spawn(async move {
                for number in 0..100 {
                    make(&client, ROOT, &format!("{part}-{number}"), v1::Kind::File).await;
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let leader = cluster.leader(&client);
    cluster.stop_master(leader).await;
    for part in making {
        part.await.expect("no error was seen");
    }
    assert_eq!(names(&client, ROOT).await.len(), 400);
    assert_ne!(cluster.leader(&client), leader);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_a_master_ends_all_the_same() {
    let mut cluster = Cluster::start(Shape::default()).await;
    let client = cluster.client().await;
    make(&client, ROOT, "f", v1::Kind::File).await;
    cluster.stop_master(1).await;
    let before = std::time::Instant::now();
    client.shutdown().await.expect("nothing was left to write");
    assert!(before.elapsed() < Duration::from_secs(4), "{:?}", before.elapsed());
    assert!(client.getattr(ROOT).await.is_err());
}
