//! The errno, link count and time rules of Linux, one by one.

use super::*;
use Kind::{Char, Dir, Fifo, File, Symlink};

#[test]
fn a_new_cluster_has_a_root_and_nothing_works_before() {
    let kv = MemKv::new();
    let open = |version| v1::Batch {
        version,
        commands: vec![v1::Command {
            body: Some(command::Body::System(v1::System {
                op: Some(system::Op::OpenSession(v1::OpenSession::default())),
            })),
            ..Default::default()
        }],
    };
    let (writes, results) = apply(&kv, &open(BATCH_VERSION)).unwrap();
    assert!(writes.is_empty());
    assert!(matches!(
        &results[0],
        Applied::System(v1::SystemAnswer { body: Some(system_answer::Body::Failure(_)) })
    ));
    assert!(apply(&kv, &open(9)).is_err(), "a log of another version is not guessed at");
    let w = World::new();
    let first = cluster_row(&w.kv).unwrap().unwrap();
    let again =
        v1::Init { hash_key: bytes::Bytes::from_static(b"another key....."), replicas: 1, chunk_size: 8 };
    w.system(system::Op::Init(again)).unwrap();
    let second = cluster_row(&w.kv).unwrap().unwrap();
    assert_eq!((first.hash_key, first.replicas), (second.hash_key, second.replicas));
    assert_eq!(w.attr(ROOT).unwrap().nlink, 2);
    w.check();
}

#[test]
fn create_lookup_and_the_times_of_the_parent() {
    let w = World::new();
    let before = w.attr(ROOT).unwrap();
    let file = w.make(&root(), ROOT, "a", File, 0o6666).unwrap();
    assert_eq!((file.mode, file.nlink, file.size, file.blocks), (0o6644, 1, 0, 0));
    let after = w.attr(ROOT).unwrap();
    assert!(after.mtime.unwrap().key() > before.mtime.unwrap().key());
    assert_eq!(after.mtime, after.ctime);
    assert_eq!((after.version, after.size, after.nlink), (before.version + 1, 1, 2));
    let dir = w.make(&root(), ROOT, "d", Dir, 0o1777).unwrap();
    assert_eq!((dir.mode, dir.nlink, dir.parent), (0o1755, 2, ROOT));
    assert_eq!(w.attr(ROOT).unwrap().nlink, 3);
    assert_eq!(w.lookup(&root(), dir.ino, "..").unwrap().ino, ROOT);
    assert_eq!(w.lookup(&root(), dir.ino, ".").unwrap().ino, dir.ino);
    assert_eq!(code(w.lookup(&root(), ROOT, "b")), ErrorCode::ErrorNotFound);
    assert_eq!(code(w.lookup(&root(), file.ino, "b")), ErrorCode::ErrorNotDir);
    assert_eq!(code(w.lookup(&root(), 999, "b")), ErrorCode::ErrorStale);
    assert_eq!(code(w.lookup(&root(), ROOT, &"n".repeat(NAME_MAX + 1))), ErrorCode::ErrorNameTooLong);
    let link = w.make(&root(), ROOT, "l", Symlink, 0).unwrap();
    assert_eq!((link.mode, link.size), (0o777, 6));
    w.check();
}

#[test]
fn create_refuses_as_open_and_mknod_do() {
    let w = World::new();
    let file = w.make(&root(), ROOT, "f", File, 0o644).unwrap();
    let dir = w.make(&root(), ROOT, "d", Dir, 0o755).unwrap();
    let make = |name: &str, kind| w.make(&root(), ROOT, name, kind, 0o644);
    assert_eq!(code(make("f", File)), ErrorCode::ErrorExists);
    assert_eq!(code(make(".", Dir)), ErrorCode::ErrorExists);
    assert_eq!(code(make(&"n".repeat(256), File)), ErrorCode::ErrorNameTooLong);
    assert_eq!(code(make("a/b", File)), ErrorCode::ErrorInvalid);
    assert_eq!(code(w.make(&root(), file.ino, "x", File, 0)), ErrorCode::ErrorNotDir);
    assert_eq!(code(w.make(&root(), 999, "x", File, 0)), ErrorCode::ErrorStale);
    assert_eq!(code(w.make(&user(5), ROOT, "x", File, 0)), ErrorCode::ErrorAccess);
    assert_eq!(code(w.make(&user(5), ROOT, "f", File, 0)), ErrorCode::ErrorExists, "the name is seen first");
    let shared = |name: &str| v1::Create { exclusive: false, ..new(ROOT, name, File, 0o600) };
    assert_eq!(w.create(&user(5), shared("f")).unwrap().ino, file.ino);
    assert_eq!(code(w.create(&root(), shared("d"))), ErrorCode::ErrorIsDir);
    w.unlink(&root(), ROOT, "d", true).unwrap();
    assert_eq!(code(w.make(&root(), dir.ino, "x", File, 0)), ErrorCode::ErrorNotFound, "a removed directory");
    w.chmod(&root(), ROOT, 0o777).unwrap();
    let device = v1::Create { rdev: 0x103, ..new(ROOT, "c", Char, 0o666) };
    assert_eq!(code(w.create(&user(5), device.clone())), ErrorCode::ErrorNotPermitted);
    assert_eq!(w.create(&root(), device).unwrap().rdev, 0x103);
    let fifo = w.make(&user(5), ROOT, "p", Fifo, 0o666).unwrap();
    assert_eq!((fifo.kind(), fifo.uid, fifo.gid), (Fifo, 5, 5));
    let long = v1::Create { target: vec![b'x'; 4096].into(), ..new(ROOT, "l", Symlink, 0) };
    assert_eq!(code(w.create(&root(), long)), ErrorCode::ErrorNameTooLong);
    w.check();
}

#[test]
fn unlink_and_rmdir() {
    let w = World::new();
    let file = w.make(&root(), ROOT, "f", File, 0o644).unwrap();
    let dir = w.make(&root(), ROOT, "d", Dir, 0o755).unwrap();
    w.make(&root(), dir.ino, "inside", File, 0o644).unwrap();
    w.link(&root(), file.ino, dir.ino, "second").unwrap();
    assert_eq!(code(w.unlink(&root(), ROOT, "d", false)), ErrorCode::ErrorIsDir);
    assert_eq!(code(w.unlink(&root(), ROOT, "f", true)), ErrorCode::ErrorNotDir);
    assert_eq!(code(w.unlink(&root(), ROOT, "d", true)), ErrorCode::ErrorNotEmpty);
    assert_eq!(code(w.unlink(&root(), ROOT, "x", false)), ErrorCode::ErrorNotFound);
    assert_eq!(code(w.unlink(&root(), ROOT, ".", true)), ErrorCode::ErrorInvalid);
    assert_eq!(code(w.unlink(&root(), dir.ino, "..", true)), ErrorCode::ErrorNotEmpty);
    let left = w.unlink(&root(), ROOT, "f", false).unwrap();
    assert_eq!(left.nlink, 1);
    assert!(left.ctime.unwrap().key() > file.ctime.unwrap().key());
    assert_eq!(orphans(&w.kv, InodeNo(0), 9).unwrap(), vec![]);
    assert_eq!(w.unlink(&root(), dir.ino, "second", false).unwrap().nlink, 0);
    assert_eq!(orphans(&w.kv, InodeNo(0), 9).unwrap(), vec![InodeNo(file.ino)]);
    assert!(w.attr(file.ino).is_ok(), "open files live on");
    assert_eq!(code(w.link(&root(), file.ino, ROOT, "again")), ErrorCode::ErrorNotFound);
    w.unlink(&root(), dir.ino, "inside", false).unwrap();
    assert_eq!(w.unlink(&root(), ROOT, "d", true).unwrap().nlink, 0);
    assert_eq!(w.attr(ROOT).unwrap().nlink, 2);
    w.check();
    w.reap_all();
    assert_eq!(code(w.attr(file.ino)), ErrorCode::ErrorStale);
    assert_eq!(cluster_row(&w.kv).unwrap().unwrap().files, 1);
    w.check();
}

#[test]
fn a_file_without_a_name_may_get_one() {
    let w = World::new();
    let op = v1::Create { anonymous: true, ..new(ROOT, "", File, 0o600) };
    let file = w.create(&root(), op.clone()).unwrap();
    assert_eq!(file.nlink, 0);
    assert_eq!(w.attr(ROOT).unwrap().size, 0);
    w.check();
    assert_eq!(w.link(&root(), file.ino, ROOT, "named").unwrap().nlink, 1);
    assert_eq!(code(w.link(&root(), file.ino, ROOT, "named")), ErrorCode::ErrorExists);
    w.create(&root(), op).unwrap();
    w.reap_all();
    assert_eq!(w.lookup(&root(), ROOT, "named").unwrap().ino, file.ino);
    assert_eq!(cluster_row(&w.kv).unwrap().unwrap().files, 2);
    w.check();
}

#[test]
fn link_refuses_directories_and_too_many() {
    let w = World::new();
    let dir = w.make(&root(), ROOT, "d", Dir, 0o755).unwrap();
    assert_eq!(code(w.link(&root(), dir.ino, ROOT, "e")), ErrorCode::ErrorNotPermitted);
    let file = w.make(&root(), ROOT, "f", File, 0o644).unwrap();
    let row = w.kv.get(&keys::inode(InodeNo(file.ino))).unwrap().unwrap();
    let mut row: v1::InodeRow = prost::Message::decode(row.as_slice()).unwrap();
    row.attr.as_mut().unwrap().nlink = dfs_proto::limits::LINK_MAX;
    let value = prost::Message::encode_to_vec(&row);
    w.kv.apply(&WriteSet::from([(keys::inode(InodeNo(file.ino)), Some(value))])).unwrap();
    assert_eq!(code(w.link(&root(), file.ino, ROOT, "g")), ErrorCode::ErrorTooManyLinks);
    assert!(
        check_invariants(&w.kv).iter().any(|violation| violation.contains("nlink")),
        "and fsck sees such things"
    );
}

#[test]
fn rename_replaces_as_posix_says() {
    let w = World::new();
    let a = w.make(&root(), ROOT, "a", Dir, 0o755).unwrap();
    let b = w.make(&root(), ROOT, "b", Dir, 0o755).unwrap();
    let f = w.make(&root(), a.ino, "f", File, 0o644).unwrap();
    let mv = |from, to| w.rename(&root(), from, to, "");
    assert_eq!(code(mv((ROOT, "x"), (ROOT, "y"))), ErrorCode::ErrorNotFound);
    assert_eq!(code(mv((ROOT, "a"), (a.ino, "a"))), ErrorCode::ErrorInvalid);
    assert_eq!(code(mv((a.ino, "f"), (ROOT, "a"))), ErrorCode::ErrorNotEmpty);
    assert_eq!(code(mv((a.ino, "f"), (ROOT, "b"))), ErrorCode::ErrorIsDir);
    assert_eq!(code(mv((ROOT, "b"), (a.ino, "f"))), ErrorCode::ErrorNotDir);
    assert_eq!(code(mv((ROOT, "b"), (ROOT, "a"))), ErrorCode::ErrorNotEmpty);
    assert_eq!(code(mv((ROOT, "."), (ROOT, "z"))), ErrorCode::ErrorBusy);
    assert_eq!(code(w.rename(&root(), (ROOT, "a"), (ROOT, "b"), "noreplace")), ErrorCode::ErrorExists);
    assert_eq!(code(w.rename(&root(), (ROOT, "a"), (ROOT, "c"), "exchange")), ErrorCode::ErrorNotFound);
    // Over an empty directory, then into another one: ".." and the link counts follow.
    let renamed = mv((ROOT, "a"), (ROOT, "b")).unwrap();
    assert_eq!((renamed.moved.unwrap().ino, renamed.replaced.unwrap().ino), (a.ino, b.ino));
    assert_eq!(renamed.replaced.unwrap().nlink, 0);
    let c = w.make(&root(), ROOT, "c", Dir, 0o755).unwrap();
    mv((ROOT, "b"), (c.ino, "b")).unwrap();
    assert_eq!((w.attr(ROOT).unwrap().nlink, w.attr(c.ino).unwrap().nlink), (3, 3));
    assert_eq!(w.lookup(&root(), a.ino, "..").unwrap().ino, c.ino);
    // Two names of one inode stay both.
    w.link(&root(), f.ino, ROOT, "g").unwrap();
    let same = mv((a.ino, "f"), (ROOT, "g")).unwrap();
    assert_eq!((same.moved.unwrap().nlink, same.replaced), (2, None));
    assert!(w.lookup(&root(), a.ino, "f").is_ok());
    w.check();
}

#[test]
fn rename_exchanges_files_and_directories() {
    let w = World::new();
    let a = w.make(&root(), ROOT, "a", Dir, 0o755).unwrap();
    let b = w.make(&root(), a.ino, "b", Dir, 0o755).unwrap();
    let f = w.make(&root(), ROOT, "f", File, 0o644).unwrap();
    assert_eq!(code(w.rename(&root(), (ROOT, "a"), (a.ino, "b"), "exchange")), ErrorCode::ErrorInvalid);
    assert_eq!(code(w.rename(&root(), (a.ino, "b"), (ROOT, "a"), "exchange")), ErrorCode::ErrorInvalid);
    w.rename(&root(), (a.ino, "b"), (ROOT, "f"), "exchange").unwrap();
    assert_eq!(w.lookup(&root(), ROOT, "f").unwrap().ino, b.ino);
    assert_eq!(w.lookup(&root(), a.ino, "b").unwrap().ino, f.ino);
    assert_eq!(w.lookup(&root(), b.ino, "..").unwrap().ino, ROOT);
    assert_eq!((w.attr(ROOT).unwrap().nlink, w.attr(a.ino).unwrap().nlink), (4, 2));
    w.check();
}

#[test]
fn immutable_and_append_only_hold_for_root_too() {
    let w = World::new();
    let f = w.make(&root(), ROOT, "f", File, 0o644).unwrap();
    let flags =
        |ino, flags| w.set_attr(&root(), v1::SetAttr { ino, flags: Some(flags), ..Default::default() });
    flags(f.ino, rows::FLAG_IMMUTABLE).unwrap();
    assert_eq!(code(w.chmod(&root(), f.ino, 0o600)), ErrorCode::ErrorNotPermitted);
    assert_eq!(code(w.unlink(&root(), ROOT, "f", false)), ErrorCode::ErrorNotPermitted);
    assert_eq!(code(w.link(&root(), f.ino, ROOT, "g")), ErrorCode::ErrorNotPermitted);
    assert_eq!(code(w.set_xattr(&root(), f.ino, "user.a", b"")), ErrorCode::ErrorNotPermitted);
    let open = |append| {
        let open = v1::Open { ino: f.ino, write: true, append, ..Default::default() };
        check_open(&w.kv, &root(), &open).unwrap().map_err(|error| error.code)
    };
    assert_eq!(open(true).unwrap_err(), ErrorCode::ErrorNotPermitted);
    flags(f.ino, rows::FLAG_APPEND).unwrap();
    assert_eq!(open(false).unwrap_err(), ErrorCode::ErrorNotPermitted);
    assert!(open(true).is_ok());
    let truncate = v1::SetAttr { ino: f.ino, size: Some(0), by_handle: true, ..Default::default() };
    assert_eq!(code(w.set_attr(&root(), truncate)), ErrorCode::ErrorNotPermitted);
    assert_eq!(code(w.rename(&root(), (ROOT, "f"), (ROOT, "g"), "")), ErrorCode::ErrorNotPermitted);
    flags(f.ino, 0).unwrap();
    flags(ROOT, rows::FLAG_APPEND).unwrap();
    assert_eq!(code(w.unlink(&root(), ROOT, "f", false)), ErrorCode::ErrorNotPermitted);
    w.make(&root(), ROOT, "new", File, 0o644).unwrap();
    w.check();
}

#[test]
fn many_names_are_listed_once_in_stable_pages() {
    let w = World::new();
    let names = 3000;
    for number in 0..names {
        w.make(&root(), ROOT, &format!("file-{number}"), File, 0o644).unwrap();
    }
    let (mut cookie, mut seen, mut pages) = (0, std::collections::BTreeSet::new(), 0);
    loop {
        let page = w.page(ROOT, cookie, 100);
        pages += 1;
        for entry in &page.entries {
            assert!(entry.cookie > cookie && entry.cookie > 2);
            assert_eq!(entry.attr.unwrap().ino, entry.ino);
            cookie = entry.cookie;
            assert!(seen.insert(entry.name.clone()));
        }
        // What goes meanwhile does not move the others.
        if pages == 3 {
            let gone = page.entries[0].name.clone();
            w.unlink(&root(), ROOT, std::str::from_utf8(&gone).unwrap(), false).unwrap();
        }
        if page.end {
            break;
        }
    }
    assert_eq!(seen.len(), names);
    assert_eq!(w.page(ROOT, cookie, 10), v1::DirPage { entries: vec![], end: true });
}

#[test]
fn entries_of_one_hash_are_never_parted() {
    let w = World::new();
    let file = w.make(&root(), ROOT, "real", File, 0o644).unwrap();
    let row = prost::Message::encode_to_vec(&v1::DentryRow { ino: file.ino, kind: File.into() });
    let names = ["x", "y", "z"];
    let writes =
        names.iter().map(|name| (keys::dentry(InodeNo(ROOT), 77, name.as_bytes()), Some(row.clone())));
    w.kv.apply(&writes.collect()).unwrap();
    let page = w.page(ROOT, 0, 1);
    assert_eq!(page.entries.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>(), names);
    assert!(!page.end);
    assert_eq!(w.page(ROOT, 77, 1).entries.len(), 1);
}

#[test]
fn paths_are_resolved_without_following_symlinks() {
    let w = World::new();
    let dir = w.make(&root(), ROOT, "d", Dir, 0o700).unwrap();
    let file = w.make(&root(), dir.ino, "f", File, 0o644).unwrap();
    let link = w.make(&root(), ROOT, "l", Symlink, 0).unwrap();
    let resolve = |cred: &Cred, path: &str| {
        let op = v1::ResolvePath { path: path.to_owned().into() };
        w.ask(cred, v1::query::Op::ResolvePath(op)).map(|body| attr_of(body).ino)
    };
    assert_eq!(resolve(&root(), "/").unwrap(), ROOT);
    assert_eq!(resolve(&root(), "//d/./../d/f").unwrap(), file.ino);
    assert_eq!(resolve(&root(), "/l").unwrap(), link.ino);
    assert_eq!(code(resolve(&root(), "/l/x")), ErrorCode::ErrorNotDir);
    assert_eq!(code(resolve(&root(), "/d/f/")), ErrorCode::ErrorNotDir);
    assert_eq!(code(resolve(&root(), "d")), ErrorCode::ErrorInvalid);
    assert_eq!(code(resolve(&user(5), "/d/f")), ErrorCode::ErrorAccess);
    assert_eq!(code(resolve(&root(), "/d/none")), ErrorCode::ErrorNotFound);
}

#[test]
fn replicas_and_chunk_size_are_attributes_that_files_take_over_from_their_directory() {
    let w = World::new();
    let file = w.make(&root(), ROOT, "file", File, 0o644).unwrap();
    let dir = w.make(&root(), ROOT, "dir", Dir, 0o755).unwrap();
    let name = "user.dfs.replication";
    assert_eq!(code(w.get_xattr(&root(), dir.ino, name)), ErrorCode::ErrorNoData);
    let set = w.set_xattr(&root(), dir.ino, name, b"2").unwrap();
    assert_eq!((set.replicas, set.chunk_size), (2, 0));
    w.set_xattr(&root(), dir.ino, "user.dfs.chunk_size", b"1MiB").unwrap();
    assert_eq!(w.get_xattr(&root(), dir.ino, name).unwrap(), b"2");
    assert_eq!(w.get_xattr(&root(), dir.ino, "user.dfs.chunk_size").unwrap(), b"1048576");
    let made = w.make(&root(), dir.ino, "made", File, 0o600).unwrap();
    assert_eq!((made.replicas, made.chunk_size), (2, 1 << 20));
    assert_eq!((file.replicas, file.chunk_size), (0, 0));
    for (name, value) in [
        (name, b"0".as_slice()),
        (name, b"10"),
        (name, b"many"),
        (name, b"5000000000"),
        ("user.dfs.chunk_size", b"7"),
        ("user.dfs.other", b"1"),
    ] {
        assert_eq!(
            code(w.set_xattr(&root(), dir.ino, name, value)),
            ErrorCode::ErrorInvalid,
            "{name} {value:?}"
        );
    }
    let remove = |cred: &Cred| {
        let op = v1::RemoveXattr { ino: made.ino, name: name.into() };
        w.mutate(cred, mutation::Op::RemoveXattr(op)).map(attr_of)
    };
    assert!(remove(&user(9)).is_err());
    assert_eq!(remove(&root()).unwrap().replicas, 0);
    assert_eq!(code(remove(&root())), ErrorCode::ErrorNoData);
    w.check();
}
