//! What `dfs fsck --repair` makes of every kind of damage, and that it leaves alone what is well.

use super::*;
use crate::state::keys::tag;
use crate::state::ops::orphan::Orphan;
use dfs_proto::limits::MEND_FAULTS_MAX;
use dfs_proto::v1::fault::What;
use dfs_proto::v1::{ChunkState, DentryRow, ExtentRow, InodeRow, LeaseKind};
use dfs_proto::{ByteOffset, NodeId, SessionId};
use proptest::prelude::*;
use prost::Message;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

/// What is in the world that is damaged.
struct Sample {
    w: World,
    dir: u64,
    /// Has the slice [0, 100), in two parts, and a second name in `dir`.
    file: u64,
    /// A clone of the file's middle.
    copy: u64,
    link: u64,
    /// The sealed chunk of the two, one that is idle, and one that is open.
    sealed: u64,
    idle: u64,
    open: u64,
}

fn sample() -> Sample {
    let w = World::new();
    let dir = w.make(&root(), ROOT, "dir", Kind::Dir, 0o755).unwrap().ino;
    let file = w.make(&root(), ROOT, "file", Kind::File, 0o640).unwrap().ino;
    let copy = w.make(&root(), dir, "copy", Kind::File, 0o640).unwrap().ino;
    let link = w.make(&root(), dir, "link", Kind::Symlink, 0).unwrap().ino;
    let gone = w.make(&root(), ROOT, "gone", Kind::File, 0o640).unwrap().ino;
    w.make(&root(), dir, "sub", Kind::Dir, 0o755).unwrap();
    w.link(&root(), file, dir, "second").unwrap();
    w.set_xattr(&root(), file, "user.colour", b"blue").unwrap();
    let chunks: Vec<u64> = w.alloc(3).iter().map(|chunk| chunk.chunk).collect();
    let [sealed, idle, open] = chunks[..] else { panic!("three chunks") };
    let slice = |file_offset, chunk, chunk_offset, length| v1::CommitSlice {
        file_offset,
        chunk,
        chunk_offset,
        length,
        epoch: 1,
        record_end: chunk_offset + length,
    };
    w.commit(file, vec![slice(0, sealed, 0, 100)]).unwrap();
    w.commit(copy, vec![slice(200, sealed, 100, 50)]).unwrap();
    let op = v1::CopyRange { from: file, from_offset: 20, to: copy, length: 60, ..Default::default() };
    w.mutate(&root(), mutation::Op::CopyRange(op)).unwrap();
    w.punch(file, 40, 10);
    w.commit(gone, vec![slice(0, idle, 0, 30)]).unwrap();
    w.commit(link_target(&w, dir), vec![slice(0, open, 0, 70)]).unwrap();
    w.seal(sealed);
    w.seal(idle);
    w.unlink(&root(), ROOT, "gone", false).unwrap();
    w.reap_all();
    w.make(&root(), ROOT, "removed", Kind::File, 0o600).unwrap();
    w.unlink(&root(), ROOT, "removed", false).unwrap();
    w.check();
    Sample { w, dir, file, copy, link, sealed, idle, open }
}

fn link_target(w: &World, dir: u64) -> u64 {
    w.make(&root(), dir, "target", Kind::File, 0o600).unwrap().ino
}

fn rows(kv: &MemKv) -> Rows {
    let (mut rows, (from, to)) = (Rows::new(), keys::everything());
    kv.scan(&from, &to, &mut |key, value| {
        rows.insert(key.to_vec(), value.to_vec());
        ControlFlow::Continue(())
    })
    .unwrap();
    rows
}

fn of_table(rows: &Rows, table: u8) -> Rows {
    rows.iter().filter(|(key, _)| key[0] == table).map(|(key, value)| (key.clone(), value.clone())).collect()
}

impl World {
    fn put_raw(&self, key: Vec<u8>, value: Option<Vec<u8>>) {
        self.kv.apply(&WriteSet::from([(key, value)])).unwrap();
    }

    fn change<M: Message + Default>(&self, key: Vec<u8>, change: impl FnOnce(&mut M)) {
        let mut row = M::decode(self.kv.get(&key).unwrap().expect("a row").as_slice()).unwrap();
        change(&mut row);
        self.put_raw(key, Some(row.encode_to_vec()));
    }

    fn change_attr(&self, ino: u64, change: impl FnOnce(&mut Attr)) {
        self.change::<InodeRow>(keys::inode(InodeNo(ino)), |row| change(row.attr.as_mut().unwrap()));
    }

    fn findings(&self) -> Findings {
        let mut check = Check::default();
        rows(&self.kv).iter().for_each(|(key, value)| check.row(key, value));
        check.findings()
    }

    fn mend(&self, mended: u64, faults: &[v1::Fault]) -> FsResult<Vec<String>> {
        let op = v1::Mend { mended, faults: faults.to_vec() };
        self.system(system::Op::Mend(op)).map(|body| match body {
            system_answer::Body::Mended(mended) => mended.lines,
            other => panic!("{other:?}"),
        })
    }

    /// Mends as the leader does, until nothing is left that can be; what was mended.
    fn repair(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for _ in 0..5 {
            let Findings { faults, mut mended, .. } = self.findings();
            let before = lines.len();
            for faults in faults.chunks(MEND_FAULTS_MAX) {
                lines.extend(self.mend(mended, faults).unwrap());
                mended += 1;
            }
            if lines.len() == before {
                return lines;
            }
        }
        panic!("still not mended: {:?}", self.findings());
    }

    /// The damage is found, mended with one line for each thing, and leaves nothing behind.
    fn heals(&self, found: &str, mended: &[&str]) {
        let problems = self.findings().problems;
        assert!(problems.iter().any(|problem| problem.contains(found)), "{found:?} is not in {problems:#?}");
        let lines = self.repair();
        assert_eq!(lines.len(), mended.len(), "{lines:#?}");
        for (line, part) in lines.iter().zip(mended) {
            assert!(line.contains(part), "{part:?} is not in {lines:#?}");
        }
        self.check();
    }
}

#[test]
fn what_is_well_is_left_alone() {
    let s = sample();
    let findings = s.w.findings();
    assert_eq!((findings.problems, findings.faults), (vec![], vec![]));
    // Not even if somebody names all of it.
    let mut before = rows(&s.w.kv);
    let mut faults = vec![What::Numbers(v1::Empty {})];
    faults.extend(before.keys().map(|key| What::Row(key.clone().into())));
    for key in before.keys() {
        let at = |index| keys::number(key, index).unwrap();
        match key[0] {
            tag::SLICE => faults.push(What::Slice(v1::SlicePlace { ino: at(0), at: at(1) })),
            tag::EXTENT => {
                faults.push(What::Extent(v1::ExtentPlace { chunk: at(0), at: at(1), unused: true }));
            }
            tag::CHUNK => faults.push(What::Chunk(at(0))),
            tag::DENTRY => {
                let name = keys::tail(key, 2).unwrap().to_vec().into();
                faults.push(What::Entry(v1::EntryPlace { parent: at(0), hash: at(1), name }));
            }
            tag::INODE => faults.push(What::Missing(v1::MissingInode { ino: at(0), ..Default::default() })),
            _ => {}
        }
    }
    let faults: Vec<_> = faults.into_iter().map(|what| v1::Fault { what: Some(what) }).collect();
    for (mended, faults) in (0..).zip(faults.chunks(MEND_FAULTS_MAX)) {
        assert_eq!(s.w.mend(mended, faults).unwrap(), Vec::<String>::new());
    }
    let mut after = rows(&s.w.kv);
    before.remove(&keys::cluster());
    after.remove(&keys::cluster());
    assert_eq!(before, after);
    s.w.check();
}

#[test]
fn counters_of_the_cluster_and_of_chunks() {
    let s = sample();
    s.w.change::<v1::ClusterRow>(keys::cluster(), |row| {
        (row.files, row.chunks, row.live_bytes) = (1000, 0, 7);
    });
    s.w.heals("the cluster counts 1000 files", &["the cluster counts"]);
    s.w.change::<ChunkState>(keys::chunk(ChunkId(s.sealed)), |row| row.live = 0);
    s.w.heals("counts 0 live bytes of 150", &["counts 150 live bytes"]);
    s.w.change::<ChunkState>(keys::chunk(ChunkId(s.sealed)), |row| row.nodes = vec![1, 3, 1]);
    s.w.heals("has the replicas [1, 3, 1]", &["rows that follow"]);
    // Files come and go while the check is evaluated: what it says about counters is a difference.
    s.w.change::<v1::ClusterRow>(keys::cluster(), |row| row.files += 5);
    let findings = s.w.findings();
    s.w.make(&root(), s.dir, "new", Kind::File, 0o600).unwrap();
    assert_eq!(s.w.mend(findings.mended, &findings.faults).unwrap().len(), 1);
    s.w.check();
}

#[test]
fn the_next_numbers_are_above_all_that_are_taken() {
    let s = sample();
    s.w.change::<v1::ClusterRow>(keys::cluster(), |row| {
        (row.next_ino, row.next_chunk, row.next_session) = (2, 1, 1);
    });
    s.w.heals("which is taken", &["the next inode is"]);
    let row = cluster_row(&s.w.kv).unwrap().unwrap();
    let now = u64::try_from(row.now.unwrap().seconds).unwrap();
    assert!(row.next_chunk >= now << 20, "numbers may have been given that are not there any more");
}

#[test]
fn rows_that_follow_from_others() {
    let s = sample();
    let (sealed, open, idle) = (ChunkId(s.sealed), ChunkId(s.open), ChunkId(s.idle));
    let session = SessionId(s.w.session);
    let missing: [(&str, Vec<u8>); 3] = [
        ("does not know", keys::replica(NodeId(1), sealed)),
        ("is it sealed", keys::unsealed(session, open)),
        ("is it idle", keys::idle(idle)),
    ];
    for (found, key) in missing {
        s.w.put_raw(key.clone(), None);
        s.w.heals(found, &["the rows that follow from its own"]);
        assert!(s.w.kv.get(&key).unwrap().is_some());
    }
    let (none, now) = (SessionId(77), s.w.now().encode_to_vec());
    let superfluous: [(&str, Vec<u8>, Vec<u8>, &str); 11] = [
        ("said to hold", keys::replica(NodeId(2), sealed), vec![], "not said to hold chunk"),
        ("said to hold", keys::replica(NodeId(2), ChunkId(99)), vec![], "not said to hold chunk 99"),
        ("is it sealed", keys::unsealed(session, sealed), vec![], "not said to be appended to"),
        ("is said to append", keys::unsealed(none, open), vec![], "by session 77"),
        ("is it idle", keys::idle(sealed), now.clone(), "is not said to be idle"),
        ("idle chunk 99", keys::idle(ChunkId(99)), now, "chunk 99 is not said to be idle"),
        ("is reserved", keys::reserved(sealed), vec![], "is not reserved any more"),
        ("leases of session 77", keys::leased(none, LeaseKind::LeaseRead as u64, 3), vec![], "leases of"),
        ("of session 77", keys::answer(none, 4), vec![], "answer 4 of session 77 is forgotten"),
        ("orphan 4711 does not", keys::orphan(InodeNo(4711)), vec![0], "orphan 4711"),
        ("of inode 4711", keys::xattr(InodeNo(4711), b"user.x", 0), vec![1], "an attribute of inode 4711"),
    ];
    for (found, key, value, mended) in superfluous {
        s.w.put_raw(key.clone(), Some(value));
        s.w.heals(found, &[mended]);
        assert_eq!(s.w.kv.get(&key).unwrap(), None);
    }
}

#[test]
fn link_counts_sizes_and_marks_of_inodes() {
    let s = sample();
    s.w.change_attr(s.file, |attr| attr.nlink = 1);
    s.w.heals("has nlink 1 and should have 2", &["nlink 2"]);
    s.w.change_attr(s.dir, |attr| (attr.nlink, attr.size, attr.parent) = (7, 1, 5));
    s.w.heals("has nlink 7 and should have 3", &["nlink 3, size 5"]);
    assert_eq!(s.w.attr(s.dir).unwrap().parent, ROOT);
    s.w.change_attr(s.link, |attr| attr.size = 1);
    s.w.heals("symlink", &["size 6"]);
    s.w.change_attr(s.file, |attr| (attr.size, attr.bare, attr.has_acl) = (60, true, true));
    let version = s.w.attr(s.file).unwrap().version;
    s.w.heals("beyond the size 60", &["size 100"]);
    let attr = s.w.attr(s.file).unwrap();
    assert!(!attr.bare && !attr.has_acl && attr.version > version);
    s.w.change::<InodeRow>(keys::inode(InodeNo(s.copy)), |row| row.mapped_bytes = 1 << 40);
    s.w.heals("mapped bytes", &["mapped bytes"]);
    // Removed, and forgotten to be freed; in use, and said to be freed.
    let removed = orphans(&s.w.kv, InodeNo(0), 9).unwrap()[0];
    s.w.put_raw(keys::orphan(removed), None);
    s.w.heals("is it an orphan?", &["nlink 0"]);
    s.w.put_raw(keys::orphan(InodeNo(s.file)), Some(vec![0]));
    s.w.heals("is it an orphan?", &["nlink 2"]);
    s.w.reap_all();
    assert_eq!((code(s.w.attr(removed.get())), s.w.bytes(s.file).len()), (ErrorCode::ErrorStale, 100));
}

#[test]
fn an_inode_that_changed_since_the_check_is_left_to_the_next_one() {
    let s = sample();
    s.w.change_attr(s.file, |attr| attr.nlink = 9);
    let findings = s.w.findings();
    s.w.link(&root(), s.file, ROOT, "third").unwrap();
    assert_eq!(s.w.mend(findings.mended, &findings.faults).unwrap(), Vec::<String>::new());
    assert_eq!(s.w.attr(s.file).unwrap().nlink, 10);
    s.w.heals("has nlink 10 and should have 3", &["nlink 3"]);
    assert_eq!(code(s.w.mend(findings.mended, &findings.faults)), ErrorCode::ErrorConflict, "of before");
}

#[test]
fn entries_without_inodes_and_inodes_without_entries() {
    let s = sample();
    let key = |parent, name: &str| {
        let hash_key = *b"0123456789abcdef";
        keys::dentry(InodeNo(parent), keys::name_hash(&hash_key, name.as_bytes()), name.as_bytes())
    };
    let entry = |ino, kind: Kind| DentryRow { ino, kind: kind.into() }.encode_to_vec();
    // Its inode is gone and left nothing.
    s.w.put_raw(keys::inode(InodeNo(s.link)), None);
    s.w.heals("names inode", &["the entry \"link\"", "the cluster counts"]);
    assert_eq!(code(s.w.lookup(&root(), s.dir, "link")), ErrorCode::ErrorNotFound);
    // The wrong kind, the wrong hash, not in a directory.
    s.w.put_raw(key(s.dir, "copy"), Some(entry(s.copy, Kind::Fifo)));
    s.w.heals("has the wrong kind", &["is where it should be"]);
    s.w.put_raw(key(s.dir, "copy"), None);
    s.w.put_raw(keys::dentry(InodeNo(s.dir), 99, b"copy"), Some(entry(s.copy, Kind::File)));
    s.w.heals("has the wrong hash", &["is where it should be"]);
    assert_eq!(s.w.lookup(&root(), s.dir, "copy").unwrap().ino, s.copy);
    s.w.put_raw(key(s.file, "x"), Some(entry(s.copy, Kind::File)));
    s.w.heals("is not a directory", &["no directory, is removed"]);
    // No name is left: of a file, then of a directory with all that is in it.
    let bytes = s.w.bytes(s.copy);
    s.w.put_raw(key(s.dir, "copy"), None);
    s.w.heals("has nlink 1 and should have 0", &["nlink 3, size 3", "/lost+found/#"]);
    let lost = s.w.lookup(&root(), ROOT, "lost+found").unwrap();
    assert_eq!((lost.mode, lost.uid, lost.size), (0o700, 0, 1));
    assert_eq!(s.w.lookup(&root(), lost.ino, &format!("#{}", s.copy)).unwrap().ino, s.copy);
    assert_eq!(s.w.bytes(s.copy), bytes);
    s.w.put_raw(key(ROOT, "dir"), None);
    let problems = s.w.findings().problems;
    assert!(problems.iter().any(|text| text.contains("should have 0")), "{problems:?}");
    s.w.repair();
    s.w.check();
    let dir = s.w.lookup(&root(), lost.ino, &format!("#{}", s.dir)).unwrap();
    assert_eq!(s.w.lookup(&root(), dir.ino, "second").unwrap().ino, s.file);
    assert_eq!(s.w.lookup(&root(), dir.ino, "..").unwrap().ino, lost.ino);
}

#[test]
fn inodes_of_which_only_bytes_or_entries_are_left() {
    let s = sample();
    let bytes = s.w.bytes(s.file);
    s.w.put_raw(keys::inode(InodeNo(s.file)), None);
    s.w.put_raw(keys::inode(InodeNo(s.dir)), None);
    s.w.repair();
    s.w.check();
    let file = s.w.lookup(&root(), ROOT, "file").unwrap();
    assert_eq!((file.ino, file.nlink, file.mode, file.uid), (s.file, 2, 0o600, 0));
    assert_eq!(s.w.bytes(s.file), bytes);
    assert_eq!(s.w.get_xattr(&root(), s.file, "user.colour").unwrap(), b"blue");
    assert_eq!(s.w.lookup(&root(), s.dir, "copy").unwrap().ino, s.copy);
    s.w.put_raw(keys::inode(InodeNo::ROOT), None);
    s.w.repair();
    s.w.check();
    assert_eq!(s.w.lookup(&root(), ROOT, "file").unwrap().ino, s.file);
}

#[test]
fn extents_and_their_users() {
    let s = sample();
    let (before, sealed) = ((s.w.bytes(s.file), s.w.bytes(s.copy)), ChunkId(s.sealed));
    let extent = keys::extent(sealed, ByteOffset(0));
    let users = of_table(&rows(&s.w.kv), tag::USER);
    assert_eq!(users.len(), 2, "a clone, and the second half of what was cut");
    for user in users.keys() {
        s.w.put_raw(user.clone(), None);
    }
    s.w.change::<ExtentRow>(extent.clone(), |row| row.others = 0);
    s.w.heals("is not one user", &["is a user of its extent"; 2]);
    s.w.change::<ExtentRow>(extent.clone(), |row| row.others = 40);
    s.w.heals("counts 40 further users of 2", &["counts 3 users"]);
    s.w.change::<ExtentRow>(extent.clone(), |row| row.first_ino = 4711);
    s.w.repair();
    s.w.check();
    s.w.put_raw(keys::user(sealed, ByteOffset(0), InodeNo(4711), ByteOffset(0)), Some(vec![]));
    s.w.heals("is not used by inode 4711", &["counts 3 users"]);
    s.w.put_raw(keys::user(sealed, ByteOffset(777), InodeNo(4711), ByteOffset(0)), Some(vec![]));
    s.w.heals("has users but does not exist", &["are forgotten"]);
    // The row is gone: what its slices name comes back, and counts.
    s.w.put_raw(extent.clone(), None);
    s.w.repair();
    s.w.check();
    // Too short; and one that nothing uses.
    s.w.change::<ExtentRow>(extent, |row| row.length = 10);
    s.w.repair();
    s.w.check();
    let row = ExtentRow { length: 5, has_first: true, first_ino: s.file, first_offset: 0, others: 0 };
    s.w.put_raw(keys::extent(ChunkId(s.idle), ByteOffset(3)), Some(row.encode_to_vec()));
    s.w.repair();
    s.w.check();
    assert_eq!((s.w.bytes(s.file), s.w.bytes(s.copy)), before);
    assert_eq!(chunk_state(&s.w.kv, sealed).unwrap().unwrap().live, 150);
}

#[test]
fn what_cannot_be_mended_is_told_and_left_alone() {
    let s = sample();
    s.w.put_raw(keys::chunk(ChunkId(s.sealed)), None);
    let lost = rows(&s.w.kv);
    s.w.repair();
    let problems = s.w.findings().problems;
    assert!(problems.iter().all(|text| text.contains("beyond the committed length")), "{problems:?}");
    assert!(!problems.is_empty());
    for table in [tag::SLICE, tag::EXTENT, tag::INODE] {
        assert_eq!(of_table(&lost, table), of_table(&rows(&s.w.kv), table));
    }
}

#[derive(Debug, Clone)]
enum Damage {
    Delete(u8, prop::sample::Index),
    Attr(prop::sample::Index, u8),
    Extent(prop::sample::Index, u64),
    Live(prop::sample::Index, u64),
    Orphan(prop::sample::Index),
    User(prop::sample::Index, u64),
    Replica(u64, prop::sample::Index),
    Counter(u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let any = any::<prop::sample::Index>;
    let tables = prop::sample::select(vec![
        tag::INODE,
        tag::DENTRY,
        tag::SLICE,
        tag::EXTENT,
        tag::USER,
        tag::UNSEALED,
        tag::ORPHAN,
        tag::IDLE,
        tag::REPLICA,
        tag::SESSION,
    ]);
    prop_oneof![
        6 => (tables, any()).prop_map(|(table, at)| Damage::Delete(table, at)),
        2 => (any(), 0_u8..5).prop_map(|(at, what)| Damage::Attr(at, what)),
        2 => (any(), 0_u64..40).prop_map(|(at, value)| Damage::Extent(at, value)),
        1 => (any(), 0_u64..200).prop_map(|(at, live)| Damage::Live(at, live)),
        1 => any().prop_map(Damage::Orphan),
        1 => (any(), 0_u64..9).prop_map(|(at, ino)| Damage::User(at, ino)),
        1 => (1_u64..4, any()).prop_map(|(node, at)| Damage::Replica(node, at)),
        1 => (0_u8..5).prop_map(Damage::Counter),
    ]
}

fn inflict(w: &World, damage: &Damage) {
    let pick = |table, at: &prop::sample::Index| {
        let rows: Vec<_> = of_table(&rows(&w.kv), table).into_keys().collect();
        (!rows.is_empty()).then(|| rows[at.index(rows.len())].clone())
    };
    let chosen = match damage {
        Damage::Delete(table, at) => pick(*table, at),
        Damage::Attr(at, _) | Damage::Orphan(at) => pick(tag::INODE, at),
        Damage::Extent(at, _) | Damage::User(at, _) => pick(tag::EXTENT, at),
        Damage::Live(at, _) | Damage::Replica(_, at) => pick(tag::CHUNK, at),
        Damage::Counter(_) => Some(keys::cluster()),
    };
    let Some(key) = chosen else { return };
    let at = |index| keys::number(&key, index).unwrap();
    match damage {
        Damage::Delete(..) => w.put_raw(key, None),
        Damage::Attr(_, what) => w.change::<InodeRow>(key, |row| {
            let attr = row.attr.as_mut().unwrap();
            match what {
                0 => attr.nlink += 1,
                1 => attr.nlink = 0,
                2 => attr.size += 1,
                3 => attr.parent = 4711,
                _ => row.mapped_bytes += 5,
            }
        }),
        Damage::Extent(_, value) => w.change::<ExtentRow>(key, |row| match value % 4 {
            0 => row.others += 1,
            1 => row.has_first = false,
            2 => row.first_offset += 1,
            _ => row.length -= row.length.min(*value),
        }),
        Damage::Live(_, live) => w.change::<ChunkState>(key, |row| row.live = *live),
        Damage::Orphan(_) => w.put_raw(keys::orphan(InodeNo(at(0))), Some(vec![0])),
        Damage::User(_, ino) => {
            let user = keys::user(ChunkId(at(0)), ByteOffset(at(1)), InodeNo(*ino), ByteOffset(0));
            w.put_raw(user, Some(vec![]));
        }
        Damage::Replica(node, _) => w.put_raw(keys::replica(NodeId(*node), ChunkId(at(0))), Some(vec![])),
        Damage::Counter(what) => w.change::<v1::ClusterRow>(key, |row| match what {
            0 => row.files = 0,
            1 => row.live_bytes = 1,
            2 => row.chunks += 3,
            3 => row.next_ino = 2,
            _ => row.next_chunk = 1,
        }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// However much is damaged of all that is written twice: a state that is right comes of it, without any byte being
    /// taken from a file or any inode being removed.
    #[test]
    fn damage_of_all_kinds_at_once_is_mended(damages in prop::collection::vec(damage(), 1..12)) {
        let s = sample();
        damages.iter().for_each(|damage| inflict(&s.w, damage));
        let damaged = rows(&s.w.kv);
        s.w.repair();
        s.w.check();
        let after = rows(&s.w.kv);
        prop_assert_eq!(of_table(&damaged, tag::SLICE), of_table(&after, tag::SLICE));
        for key in of_table(&damaged, tag::INODE).keys() {
            prop_assert!(after.contains_key(key));
        }
        prop_assert!(s.w.findings().faults.is_empty());
    }
}

#[test]
fn a_file_without_a_name_that_never_had_one_stays_what_it_is() {
    let s = sample();
    let op = v1::Create { anonymous: true, name: "".into(), ..new(ROOT, "", Kind::File, 0o600) };
    let ino = InodeNo(s.w.create(&root(), op).unwrap().ino);
    s.w.change_attr(ino.get(), |attr| attr.blocks = 9);
    s.w.heals("has 9 blocks", &["nlink 0"]);
    assert_eq!(s.w.kv.get(&keys::orphan(ino)).unwrap(), Some(vec![1]), "{:?}", Orphan::Anonymous);
}
