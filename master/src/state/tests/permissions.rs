//! Who may do what: modes, groups, sticky and setgid directories, ACLs, xattr namespaces, chown, chmod and times.

use super::*;
use Kind::{Dir, Fifo, File, Symlink};

fn member(uid: u32, groups: &[u32]) -> Cred {
    Cred { uid, gid: uid, groups: groups.to_vec() }
}

fn set(ino: u64) -> v1::SetAttr {
    v1::SetAttr { ino, ..Default::default() }
}

/// A world with a directory /w that everybody may write, and in it a file of user 5.
fn world() -> (World, u64, Attr) {
    let w = World::new();
    let dir = w.make(&root(), ROOT, "w", Dir, 0o777).unwrap().ino;
    w.chmod(&root(), dir, 0o777).unwrap();
    let file = w.make(&user(5), dir, "f", File, 0o640).unwrap();
    (w, dir, file)
}

#[test]
fn search_and_read_permission_of_directories() {
    let (w, dir, _) = world();
    let read = |cred: &Cred, plus| {
        w.ask(cred, v1::query::Op::ReadDir(v1::ReadDir { ino: dir, plus, ..Default::default() }))
    };
    w.chmod(&root(), dir, 0o711).unwrap();
    assert!(w.lookup(&user(5), dir, "f").is_ok());
    assert_eq!(code(read(&user(5), false)), ErrorCode::ErrorAccess);
    assert_eq!(code(w.unlink(&user(5), dir, "f", false)), ErrorCode::ErrorAccess);
    w.chmod(&root(), dir, 0o744).unwrap();
    assert_eq!(code(w.lookup(&user(5), dir, "f")), ErrorCode::ErrorAccess);
    match read(&user(5), true).unwrap() {
        answer::Body::DirPage(page) => assert_eq!(page.entries[0].attr, None, "names yes, attributes no"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn open_asks_for_the_bits_of_owner_group_and_others() {
    let (w, _, file) = world();
    let open = |cred: &Cred, read, write, exec| {
        let open = v1::Open { ino: file.ino, read, write, exec, ..Default::default() };
        check_open(&w.kv, cred, &open).unwrap().map_err(|error| error.code)
    };
    assert!(open(&user(5), true, true, false).is_ok());
    assert!(open(&member(6, &[5]), true, false, false).is_ok());
    assert_eq!(open(&member(6, &[5]), true, true, false).unwrap_err(), ErrorCode::ErrorAccess);
    assert_eq!(open(&user(6), true, false, false).unwrap_err(), ErrorCode::ErrorAccess);
    assert!(open(&root(), true, true, false).is_ok());
    assert_eq!(
        open(&root(), false, false, true).unwrap_err(),
        ErrorCode::ErrorAccess,
        "nobody may execute it"
    );
    w.chmod(&user(5), file.ino, 0o601).unwrap();
    assert!(open(&root(), false, false, true).is_ok());
    w.chmod(&user(5), file.ino, 0o077).unwrap();
    assert_eq!(
        open(&user(5), true, false, false).unwrap_err(),
        ErrorCode::ErrorAccess,
        "the owner is the owner only"
    );
    let dir = v1::Open { ino: ROOT, write: true, ..Default::default() };
    assert_eq!(check_open(&w.kv, &root(), &dir).unwrap().unwrap_err().code, ErrorCode::ErrorIsDir);
}

#[test]
fn sticky_directories_protect_the_files_of_others() {
    let (w, dir, _) = world();
    w.chmod(&root(), dir, 0o1777).unwrap();
    assert_eq!(code(w.unlink(&user(6), dir, "f", false)), ErrorCode::ErrorNotPermitted);
    assert_eq!(code(w.rename(&user(6), (dir, "f"), (dir, "g"), "")), ErrorCode::ErrorNotPermitted);
    w.make(&user(6), dir, "mine", File, 0o644).unwrap();
    assert_eq!(code(w.rename(&user(6), (dir, "mine"), (dir, "f"), "")), ErrorCode::ErrorNotPermitted);
    w.unlink(&user(5), dir, "f", false).unwrap();
    w.unlink(&root(), dir, "mine", false).unwrap();
}

#[test]
fn moving_a_directory_needs_write_on_it() {
    let (w, dir, _) = world();
    let sub = w.make(&user(5), dir, "sub", Dir, 0o755).unwrap();
    w.make(&user(5), dir, "other", Dir, 0o777).unwrap();
    let other = w.lookup(&root(), dir, "other").unwrap().ino;
    w.chmod(&user(5), other, 0o777).unwrap();
    assert_eq!(code(w.rename(&user(6), (dir, "sub"), (other, "sub"), "")), ErrorCode::ErrorAccess);
    w.rename(&user(6), (dir, "sub"), (dir, "sub2"), "").unwrap();
    w.rename(&user(5), (dir, "sub2"), (other, "sub"), "").unwrap();
    assert_eq!(w.lookup(&root(), sub.ino, "..").unwrap().ino, other);
    w.check();
}

#[test]
fn setgid_directories_hand_down_their_group() {
    let (w, dir, _) = world();
    w.set_attr(&root(), v1::SetAttr { gid: Some(70), mode: Some(0o2777), ..set(dir) }).unwrap();
    let file = w.make(&user(6), dir, "a", File, 0o2755).unwrap();
    assert_eq!((file.gid, file.mode), (70, 0o755), "a foreigner gets no setgid program of that group");
    let file = w.make(&member(6, &[70]), dir, "b", File, 0o2755).unwrap();
    assert_eq!((file.gid, file.mode), (70, 0o2755));
    let sub = w.make(&user(6), dir, "c", Dir, 0o755).unwrap();
    assert_eq!((sub.gid, sub.mode), (70, 0o2755));
}

#[test]
fn chmod_and_chown_are_for_the_owner_and_for_root() {
    let (w, _, file) = world();
    assert_eq!(code(w.chmod(&user(6), file.ino, 0o777)), ErrorCode::ErrorNotPermitted);
    assert_eq!(w.chmod(&user(5), file.ino, 0o6755).unwrap().mode, 0o6755);
    let chown = |cred: &Cred, uid, gid| w.set_attr(cred, v1::SetAttr { uid, gid, ..set(file.ino) });
    assert_eq!(code(chown(&user(5), Some(6), None)), ErrorCode::ErrorNotPermitted);
    assert_eq!(code(chown(&user(5), None, Some(6))), ErrorCode::ErrorNotPermitted);
    let changed = chown(&member(5, &[70]), None, Some(70)).unwrap();
    assert_eq!((changed.gid, changed.mode), (70, 0o755), "setuid and setgid go");
    assert_eq!(w.chmod(&user(5), file.ino, 0o2755).unwrap().mode, 0o755, "not a member of 70");
    w.chmod(&root(), file.ino, 0o6745).unwrap();
    let changed = chown(&root(), Some(7), None).unwrap();
    assert_eq!(
        (changed.uid, changed.mode),
        (7, 0o2745),
        "setgid without group execute is for locks, root keeps it"
    );
    let link = w.make(&root(), ROOT, "l", Symlink, 0).unwrap();
    assert_eq!(code(w.chmod(&root(), link.ino, 0o600)), ErrorCode::ErrorNotSupported);
    assert_eq!(w.set_attr(&root(), v1::SetAttr { uid: Some(9), ..set(link.ino) }).unwrap().uid, 9);
}

#[test]
fn truncate_and_writes_clear_setuid() {
    let (w, _, file) = world();
    let mode = |mode| w.chmod(&user(5), file.ino, mode).unwrap();
    mode(0o6777);
    let truncate = v1::SetAttr { size: Some(10), ..set(file.ino) };
    let cut = w.set_attr(&user(6), truncate).unwrap();
    assert_eq!((cut.mode, cut.size, cut.mtime == cut.ctime), (0o777, 10, true));
    mode(0o6777);
    assert_eq!(w.set_attr(&root(), truncate).unwrap().mode, 0o6777);
    mode(0o700);
    assert_eq!(code(w.set_attr(&user(6), truncate)), ErrorCode::ErrorAccess);
    assert!(w.set_attr(&user(6), v1::SetAttr { by_handle: true, ..truncate }).is_ok());
    let too_big = v1::SetAttr { size: Some(1 << 63), ..set(file.ino) };
    assert_eq!(code(w.set_attr(&root(), too_big)), ErrorCode::ErrorFileTooBig);
    assert_eq!(code(w.set_attr(&root(), v1::SetAttr { size: Some(0), ..set(ROOT) })), ErrorCode::ErrorIsDir);
    w.set_xattr(&root(), file.ino, "security.capability", b"caps").unwrap();
    mode(0o4711);
    let op = v1::Commit { ino: file.ino, kill_priv: true, ..Default::default() };
    let killed = attr_of(w.mutate(&user(6), mutation::Op::Commit(op)).unwrap());
    assert_eq!(killed.mode, 0o711);
    assert_eq!(code(w.get_xattr(&root(), file.ino, "security.capability")), ErrorCode::ErrorNoData);
    w.check();
}

#[test]
fn a_chown_that_names_nobody_ends_privileges_and_is_the_owners_where_it_does() {
    let (w, _, file) = world();
    let nobody = v1::SetAttr { kill_priv: true, ..set(file.ino) };
    w.chmod(&user(5), file.ino, 0o6755).unwrap();
    assert_eq!(code(w.set_attr(&user(6), nobody)), ErrorCode::ErrorNotPermitted);
    assert_eq!(w.set_attr(&user(5), nobody).unwrap().mode, 0o755);
    assert_eq!(w.set_attr(&user(6), nobody).unwrap().mode, 0o755);
    w.chmod(&user(5), file.ino, 0o2745).unwrap();
    assert_eq!(
        w.set_attr(&root(), nobody).unwrap().mode,
        0o2745,
        "without execution for the group members keep it"
    );
    w.check();
}

#[test]
fn what_is_set_with_bytes_is_checked_like_any_change_and_happens_with_them_or_not_at_all() {
    let (w, _, file) = world();
    let old = Some(Timestamp { seconds: 7, nanos: 7 });
    let slice = |chunk: &v1::ChunkAccess| v1::CommitSlice {
        file_offset: 0,
        chunk: chunk.chunk,
        chunk_offset: 0,
        length: 10,
        epoch: chunk.epoch,
        record_end: 10,
    };
    let chunk = w.alloc(1).remove(0);
    let commit = |cred: &v1::Cred, slices: Vec<v1::CommitSlice>, set: v1::SetAttr| {
        let op = v1::Commit { ino: file.ino, slices, set: Some(set), ..v1::Commit::default() };
        w.mutate(cred, mutation::Op::Commit(op)).map(attr_of)
    };
    let chmod = v1::SetAttr { mode: Some(0o640), mtime: old, ..set(0) };
    let before = w.attr(file.ino).unwrap();
    assert_eq!(code(commit(&user(6), vec![slice(&chunk)], chmod)), ErrorCode::ErrorNotPermitted);
    assert_eq!(w.attr(file.ino).unwrap(), before, "neither bytes nor attributes");
    let done = commit(&user(5), vec![slice(&chunk)], chmod).unwrap();
    assert_eq!((done.mode, done.size, done.mtime), (0o640, 10, old));
    assert_eq!(done.version, before.version + 1);
    // Without bytes the time of the last write stays.
    let chown = v1::SetAttr { uid: Some(6), ..set(0) };
    assert_eq!(code(commit(&user(5), vec![], chown)), ErrorCode::ErrorNotPermitted);
    let done = commit(&root(), vec![], chown).unwrap();
    assert_eq!((done.uid, done.mtime), (6, old));
    for other in [v1::SetAttr { size: Some(0), ..set(0) }, v1::SetAttr { flags: Some(0), ..set(0) }] {
        assert_eq!(code(commit(&root(), vec![], other)), ErrorCode::ErrorInvalid);
    }
    w.check();
}

#[test]
fn times_follow_utimensat() {
    let (w, _, file) = world();
    let old = Some(Timestamp { seconds: -5, nanos: 7 });
    let both_now = v1::SetAttr { atime_now: true, mtime_now: true, ..set(file.ino) };
    assert_eq!(code(w.set_attr(&user(6), both_now)), ErrorCode::ErrorAccess);
    w.chmod(&user(5), file.ino, 0o666).unwrap();
    assert!(w.set_attr(&user(6), both_now).is_ok(), "writers may say now");
    let one_now = v1::SetAttr { mtime_now: true, ..set(file.ino) };
    assert_eq!(code(w.set_attr(&user(6), one_now)), ErrorCode::ErrorNotPermitted);
    let given = v1::SetAttr { mtime: old, ..set(file.ino) };
    assert_eq!(code(w.set_attr(&user(6), given)), ErrorCode::ErrorNotPermitted);
    let done = w.set_attr(&user(5), given).unwrap();
    assert_eq!(done.mtime, old);
    assert!(done.ctime.unwrap().seconds > 1_000_000);
    let bad = v1::SetAttr { mtime: Some(Timestamp { seconds: 0, nanos: 1_000_000_000 }), ..set(file.ino) };
    assert_eq!(code(w.set_attr(&user(5), bad)), ErrorCode::ErrorInvalid);
    // Lazy atime: a maximum, no new version.
    let touch = |seconds| {
        let items = vec![v1::TouchItem { ino: file.ino, atime: Some(Timestamp { seconds, nanos: 0 }) }];
        w.mutate(&user(6), mutation::Op::Touch(v1::Touch { items })).unwrap();
        w.attr(file.ino).unwrap()
    };
    let version = w.attr(file.ino).unwrap().version;
    assert_eq!(touch(5).atime.unwrap(), w.attr(file.ino).unwrap().atime.unwrap());
    let far = touch(i64::MAX);
    assert!(far.atime.unwrap().seconds < 2_000_000, "never in the future");
    assert_eq!(far.version, version);
}

#[test]
fn policy_and_flags_are_checked() {
    let (w, _, file) = world();
    let nodump = v1::SetAttr { flags: Some(0x40), ..set(file.ino) };
    assert_eq!(code(w.set_attr(&user(6), nodump)), ErrorCode::ErrorNotPermitted);
    assert_eq!(w.set_attr(&user(5), nodump).unwrap().flags, 0x40);
    let immutable = v1::SetAttr { flags: Some(0x50), ..set(file.ino) };
    assert_eq!(code(w.set_attr(&user(5), immutable)), ErrorCode::ErrorNotPermitted);
    let unknown = v1::SetAttr { flags: Some(0x8000_0000), ..set(file.ino) };
    assert_eq!(code(w.set_attr(&root(), unknown)), ErrorCode::ErrorNotSupported);
    let policy = |replicas, chunk_size| {
        w.set_attr(
            &root(),
            v1::SetAttr { replicas: Some(replicas), chunk_size: Some(chunk_size), ..set(ROOT) },
        )
    };
    assert_eq!(code(policy(10, 0)), ErrorCode::ErrorInvalid);
    assert_eq!(code(policy(2, 7)), ErrorCode::ErrorInvalid);
    policy(2, 8).unwrap();
    let child = w.make(&root(), ROOT, "child", File, 0o644).unwrap();
    assert_eq!((child.replicas, child.chunk_size), (2, 8), "directories hand their policy down");
}

fn acl_bytes(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(perm.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

const ANY: u32 = u32::MAX;
const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

#[test]
fn an_access_acl_lets_a_named_user_in_and_chmod_moves_its_mask() {
    let (w, _, file) = world();
    let list = acl_bytes(&[(1, 6, ANY), (2, 6, 9), (4, 4, ANY), (0x10, 6, ANY), (0x20, 0, ANY)]);
    assert_eq!(code(w.set_xattr(&user(6), file.ino, ACCESS, &list)), ErrorCode::ErrorNotPermitted);
    assert_eq!(w.set_xattr(&user(5), file.ino, ACCESS, &list).unwrap().mode, 0o660);
    assert_eq!(w.get_xattr(&user(6), file.ino, ACCESS).unwrap(), list);
    let write = |cred: &Cred| {
        let open = v1::Open { ino: file.ino, write: true, ..Default::default() };
        check_open(&w.kv, cred, &open).unwrap().is_ok()
    };
    assert!(write(&user(9)) && !write(&member(8, &[5])) && !write(&user(8)));
    assert_eq!(w.chmod(&user(5), file.ino, 0o640).unwrap().mode, 0o640);
    assert!(!write(&user(9)), "the mask says so");
    let masked = acl_bytes(&[(1, 6, ANY), (2, 6, 9), (4, 4, ANY), (0x10, 4, ANY), (0x20, 0, ANY)]);
    assert_eq!(w.get_xattr(&user(5), file.ino, ACCESS).unwrap(), masked);
    // A list that says no more than the mode is the mode.
    let minimal = acl_bytes(&[(1, 7, ANY), (4, 5, ANY), (0x20, 5, ANY)]);
    assert_eq!(w.set_xattr(&user(5), file.ino, ACCESS, &minimal).unwrap().mode, 0o755);
    assert_eq!(code(w.get_xattr(&user(5), file.ino, ACCESS)), ErrorCode::ErrorNoData);
    let remove = v1::RemoveXattr { ino: file.ino, name: ACCESS.into() };
    w.mutate(&user(5), mutation::Op::RemoveXattr(remove)).unwrap();
    assert_eq!(code(w.set_xattr(&user(5), file.ino, ACCESS, b"rubbish")), ErrorCode::ErrorInvalid);
    assert_eq!(code(w.set_xattr(&user(5), file.ino, DEFAULT, &list)), ErrorCode::ErrorAccess);
    w.check();
}

#[test]
fn a_default_acl_replaces_the_umask_and_goes_down() {
    let (w, dir, _) = world();
    let default = acl_bytes(&[(1, 7, ANY), (2, 7, 9), (4, 7, ANY), (0x10, 7, ANY), (0x20, 5, ANY)]);
    w.set_xattr(&root(), dir, DEFAULT, &default).unwrap();
    let file = w.make(&user(5), dir, "new", File, 0o666).unwrap();
    assert_eq!(file.mode, 0o664, "no umask");
    let got = acl_bytes(&[(1, 6, ANY), (2, 7, 9), (4, 7, ANY), (0x10, 6, ANY), (0x20, 4, ANY)]);
    assert_eq!(w.get_xattr(&user(5), file.ino, ACCESS).unwrap(), got);
    let sub = w.make(&user(5), dir, "sub", Dir, 0o777).unwrap();
    assert_eq!(sub.mode, 0o775);
    assert_eq!(w.get_xattr(&user(5), sub.ino, DEFAULT).unwrap(), default);
    let link = w.make(&user(5), dir, "link", Symlink, 0).unwrap();
    assert_eq!(link.mode, 0o777);
    assert_eq!(code(w.set_xattr(&root(), link.ino, ACCESS, &got)), ErrorCode::ErrorNotSupported);
    w.unlink(&root(), dir, "new", false).unwrap();
    w.reap_all();
    w.check();
}

#[test]
fn xattr_namespaces_limits_and_flags() {
    let (w, dir, file) = world();
    let set = |cred: &Cred, ino, name: &str, value: &[u8]| w.set_xattr(cred, ino, name, value);
    let big = vec![7; dfs_proto::limits::XATTR_VALUE_MAX];
    set(&user(5), file.ino, "user.big", &big).unwrap();
    assert_eq!(w.get_xattr(&user(5), file.ino, "user.big").unwrap(), big);
    set(&user(5), file.ino, "user.big", b"small").unwrap();
    assert_eq!(w.get_xattr(&user(5), file.ino, "user.big").unwrap(), b"small");
    set(&user(5), file.ino, "user.empty", b"").unwrap();
    assert_eq!(w.get_xattr(&user(5), file.ino, "user.empty").unwrap(), b"");
    assert_eq!(code(set(&user(5), file.ino, "user.x", &[0; (64 << 10) + 1])), ErrorCode::ErrorTooBig);
    assert_eq!(
        code(set(&user(5), file.ino, &format!("user.{}", "n".repeat(251)), b"")),
        ErrorCode::ErrorRange
    );
    assert_eq!(code(set(&user(5), file.ino, "user.", b"")), ErrorCode::ErrorInvalid);
    assert_eq!(code(set(&user(5), file.ino, "other.x", b"")), ErrorCode::ErrorNotSupported);
    assert_eq!(code(set(&user(5), file.ino, "system.nfs4_acl", b"")), ErrorCode::ErrorNotSupported);
    assert_eq!(code(set(&user(5), file.ino, "trusted.x", b"")), ErrorCode::ErrorNotPermitted);
    assert_eq!(code(set(&user(5), file.ino, "security.x", b"")), ErrorCode::ErrorNotPermitted);
    assert_eq!(code(set(&user(6), file.ino, "user.x", b"")), ErrorCode::ErrorAccess);
    assert_eq!(code(w.get_xattr(&user(6), file.ino, "user.big")), ErrorCode::ErrorAccess);
    set(&root(), file.ino, "trusted.x", b"1").unwrap();
    set(&root(), file.ino, "security.x", b"2").unwrap();
    assert_eq!(code(w.get_xattr(&user(5), file.ino, "trusted.x")), ErrorCode::ErrorNoData);
    assert_eq!(w.get_xattr(&user(6), file.ino, "security.x").unwrap(), b"2");
    let list = |cred: &Cred| match w
        .ask(cred, v1::query::Op::ListXattr(v1::ListXattr { ino: file.ino }))
        .unwrap()
    {
        answer::Body::Names(names) => {
            names.names.into_iter().map(|name| String::from_utf8(name.to_vec()).unwrap()).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(list(&user(5)), ["security.x", "user.big", "user.empty"]);
    assert_eq!(list(&root()), ["security.x", "trusted.x", "user.big", "user.empty"]);
    let flags = |name: &str, create, replace| {
        let op = v1::SetXattr {
            ino: file.ino,
            name: name.to_owned().into(),
            create,
            replace,
            ..Default::default()
        };
        w.mutate(&user(5), mutation::Op::SetXattr(op))
    };
    assert_eq!(code(flags("user.big", true, false)), ErrorCode::ErrorExists);
    assert_eq!(code(flags("user.none", false, true)), ErrorCode::ErrorNoData);
    let fifo = w.make(&user(5), dir, "p", Fifo, 0o666).unwrap();
    assert_eq!(code(set(&user(5), fifo.ino, "user.x", b"")), ErrorCode::ErrorNotPermitted);
    let remove = |name: &str| {
        w.mutate(
            &user(5),
            mutation::Op::RemoveXattr(v1::RemoveXattr { ino: file.ino, name: name.to_owned().into() }),
        )
    };
    remove("user.big").unwrap();
    assert_eq!(code(remove("user.big")), ErrorCode::ErrorNoData);
    w.check();
}
