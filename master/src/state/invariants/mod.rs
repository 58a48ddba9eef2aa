//! What must be true of every state, checked by reading all of it: the state machine's part of `dfs fsck` and the oracle of
//! its tests (I10, and that every row has the rows it needs).

mod chunks;
mod faults;
mod names;

use super::ended::second_of;
use super::keys::{self, tag};
use super::kv::Kv;
use super::ops::orphan::Orphan;
use super::read::version_of_review;
use super::rows::{Inode, corrupt, decode, number};
use dfs_proto::v1::{self, ChunkState, DentryRow, ExtentRow, NodeRow, SessionRow, SliceRow};
use dfs_proto::{ChunkId, InodeNo, NodeId, SessionId};
use faults::Subject;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::ControlFlow;

/// Every violation found, in words; empty when all is well.
pub fn check_invariants(kv: &dyn Kv) -> Vec<String> {
    let mut check = Check::default();
    let (from, to) = keys::everything();
    let scanned = kv.scan(&from, &to, &mut |key, value| {
        check.row(key, value);
        ControlFlow::Continue(())
    });
    match scanned {
        Ok(()) => check.violations(),
        Err(error) => vec![format!("the store cannot be read: {error}")],
    }
}

/// A check of a state that is read row by row. It keeps about what the rows take.
#[derive(Default)]
pub struct Check {
    found: Found,
    violations: Violations,
}

impl Check {
    /// The next row. The Raft layer's own rows are none of the state.
    pub fn row(&mut self, key: &[u8], value: &[u8]) {
        if let Err(error) = self.found.note(key, value) {
            self.violations.push(Subject::Nothing, error.to_string());
        }
    }

    /// How many inodes and chunks there were.
    pub fn seen(&self) -> (u64, u64) {
        (self.found.inodes.len() as u64, self.found.chunks.len() as u64)
    }

    /// Every violation found, in words; empty when all is well.
    pub fn violations(self) -> Vec<String> {
        self.findings().problems
    }

    /// Every violation found, and the faults that can be mended, in the order in which they are to be.
    pub fn findings(self) -> Findings {
        let Self { found, mut violations } = self;
        let Some(cluster) = &found.cluster else {
            if found.rows > 0 {
                violations.push(Subject::Nothing, "there are rows but no cluster row");
            }
            return Findings { problems: violations.texts, ..Findings::default() };
        };
        check_counters(&found, cluster, &mut violations);
        let counts = names::check(&found, cluster, &mut violations);
        let mapped = chunks::check(&found, &mut violations);
        chunks::check_wishes(&found, cluster, &mut violations);
        check_sessions(&found, &mut violations);
        let faults = faults::of(&found, cluster, &counts, &mapped, violations.subjects);
        Findings { problems: violations.texts, faults, mended: cluster.mended }
    }
}

/// What a check has found.
#[derive(Default, Debug)]
pub struct Findings {
    /// In words.
    pub problems: Vec<String>,
    /// What can be mended, each once; of those that several things are wrong with, all of them.
    pub faults: Vec<v1::Fault>,
    /// How many Mend commands the state had seen.
    pub mended: u64,
}

#[derive(Default)]
struct Violations {
    texts: Vec<String>,
    subjects: BTreeSet<Subject>,
}

impl Violations {
    fn push(&mut self, subject: Subject, what: impl Into<String>) {
        self.texts.push(what.into());
        self.subjects.insert(subject);
    }

    fn unless(&mut self, holds: bool, subject: Subject, what: impl FnOnce() -> String) {
        if !holds {
            self.push(subject, what());
        }
    }
}

/// The whole state, by table.
#[derive(Default)]
struct Found {
    rows: u64,
    cluster: Option<v1::ClusterRow>,
    inodes: BTreeMap<u64, Inode>,
    /// By parent, hash and name.
    dentries: BTreeMap<(u64, u64, Vec<u8>), DentryRow>,
    /// By inode and file offset.
    slices: BTreeMap<(u64, u64), SliceRow>,
    /// By chunk and chunk offset.
    extents: BTreeMap<(u64, u64), ExtentRow>,
    /// By chunk, extent, inode and file offset.
    users: BTreeSet<(u64, u64, u64, u64)>,
    /// By inode, name and part.
    xattrs: BTreeMap<(u64, Vec<u8>, u8), usize>,
    chunks: BTreeMap<u64, ChunkState>,
    /// By session and chunk.
    unsealed: BTreeSet<(u64, u64)>,
    sessions: BTreeMap<u64, SessionRow>,
    ended: BTreeMap<u64, v1::EndedRow>,
    /// By seconds and session.
    ended_at: BTreeSet<(u64, u64)>,
    /// By session and sequence.
    answers: BTreeSet<(u64, u64)>,
    nodes: BTreeMap<u64, NodeRow>,
    orphans: BTreeMap<u64, Orphan>,
    idle: BTreeSet<u64>,
    /// By node and chunk.
    replicas: BTreeSet<(u64, u64)>,
    /// Where sessions may hold leases: session, kind and bucket.
    leased: BTreeSet<(u64, u64, u64)>,
    /// Numbers of chunks that are being made.
    reserved: BTreeSet<u64>,
    /// Files whose chunks are to get what they want.
    reviews: BTreeSet<u64>,
}

impl Found {
    fn note(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.rows += 1;
        let at = |index| number(key, index);
        match key.first().copied() {
            Some(tag::CLUSTER) => self.cluster = Some(decode(key, value)?),
            Some(tag::INODE) => {
                self.inodes.insert(at(0)?, Inode::from_row(key, decode(key, value)?)?);
            }
            Some(tag::DENTRY) => {
                let name = keys::tail(key, 2).ok_or_else(|| corrupt(key, "a dentry without a name"))?;
                self.dentries.insert((at(0)?, at(1)?, name.to_vec()), decode(key, value)?);
            }
            Some(tag::SLICE) => {
                self.slices.insert((at(0)?, at(1)?), decode(key, value)?);
            }
            Some(tag::EXTENT) => {
                self.extents.insert((at(0)?, at(1)?), decode(key, value)?);
            }
            Some(tag::USER) => {
                self.users.insert((at(0)?, at(1)?, at(2)?, at(3)?));
            }
            Some(tag::XATTR) => {
                let (name, part) =
                    keys::xattr_name(key).ok_or_else(|| corrupt(key, "an attribute without a part"))?;
                self.xattrs.insert((at(0)?, name.to_vec(), part), value.len());
            }
            Some(tag::CHUNK) => {
                self.chunks.insert(at(0)?, decode(key, value)?);
            }
            Some(tag::UNSEALED) => {
                self.unsealed.insert((at(0)?, at(1)?));
            }
            Some(tag::SESSION) => {
                self.sessions.insert(at(0)?, decode(key, value)?);
            }
            Some(tag::ANSWER) => {
                decode::<v1::Answer>(key, value)?;
                self.answers.insert((at(0)?, at(1)?));
            }
            Some(tag::NODE) => {
                self.nodes.insert(at(0)?, decode(key, value)?);
            }
            Some(tag::ORPHAN) => {
                self.orphans.insert(at(0)?, Orphan::from_value(key, value)?);
            }
            Some(tag::IDLE) => {
                decode::<v1::Timestamp>(key, value)?;
                self.idle.insert(at(0)?);
            }
            Some(tag::REPLICA) => {
                self.replicas.insert((at(0)?, at(1)?));
            }
            Some(tag::LEASED) => {
                self.leased.insert((at(0)?, at(1)?, at(2)?));
            }
            Some(tag::ENDED) => {
                self.ended.insert(at(0)?, decode(key, value)?);
            }
            Some(tag::ENDED_AT) => {
                self.ended_at.insert((at(0)?, at(1)?));
            }
            Some(tag::REVIEW) => {
                version_of_review(key, value)?;
                self.reviews.insert(at(0)?);
            }
            Some(tag::RESERVED) => {
                self.reserved.insert(at(0)?);
            }
            _ => return Err(corrupt(key, "a row of no table")),
        }
        Ok(())
    }

    /// The live bytes of a chunk.
    fn live(&self, chunk: u64) -> u64 {
        self.extents.range((chunk, 0)..=(chunk, u64::MAX)).map(|(_, extent)| extent.length).sum()
    }

    /// How many files, chunks and live bytes there are.
    fn counters(&self) -> (u64, u64, u64) {
        let live = self.chunks.keys().map(|chunk| self.live(*chunk)).sum();
        (self.inodes.len() as u64, self.chunks.len() as u64, live)
    }
}

fn check_counters(found: &Found, cluster: &v1::ClusterRow, violations: &mut Violations) {
    let there = found.counters();
    let counters = [
        ("files", cluster.files, there.0),
        ("chunks", cluster.chunks, there.1),
        ("live bytes", cluster.live_bytes, there.2),
    ];
    for (what, counted, there) in counters {
        violations.unless(counted == there, Subject::Counters, || {
            format!("the cluster counts {counted} {what}, there are {there}")
        });
    }
    let numbers = [
        ("inode", cluster.next_ino, found.inodes.last_key_value().map(|(number, _)| *number)),
        ("chunk", cluster.next_chunk, found.chunks.last_key_value().map(|(number, _)| *number)),
        ("reserved chunk", cluster.next_chunk, found.reserved.last().copied()),
        ("session", cluster.next_session, found.sessions.last_key_value().map(|(number, _)| *number)),
        ("ended session", cluster.next_session, found.ended.last_key_value().map(|(number, _)| *number)),
    ];
    for (what, next, greatest) in numbers {
        violations.unless(greatest.is_none_or(|greatest| greatest < next), Subject::Numbers, || {
            format!("the next {what} would be {next}, which is taken")
        });
    }
}

fn check_sessions(found: &Found, violations: &mut Violations) {
    for (session, kind, bucket) in found.leased.iter().filter(|row| !found.sessions.contains_key(&row.0)) {
        let subject = match u32::try_from(*bucket) {
            Ok(bucket) => Subject::Row(keys::leased(SessionId(*session), *kind, bucket)),
            Err(_) => Subject::Nothing,
        };
        violations.push(subject, format!("leases of session {session}, which does not exist"));
    }
    for (seconds, session) in &found.ended_at {
        let row = Subject::Row(keys::ended_at(*seconds, SessionId(*session)));
        let right = found.ended.get(session).is_some_and(|row| second_of(row) == *seconds);
        violations.unless(right, row, || {
            format!("session {session}, which did not end at {seconds}, is to be forgotten")
        });
    }
    for (session, ended) in &found.ended {
        let row = Subject::Row(keys::ended(SessionId(*session)));
        let right =
            found.ended_at.contains(&(second_of(ended), *session)) && !found.sessions.contains_key(session);
        violations.unless(right, row, || {
            format!("session {session} has ended and is not to be forgotten, or has not ended")
        });
    }
    for (session, seq) in &found.answers {
        let row = Subject::Row(keys::answer(SessionId(*session), *seq));
        let running = found.sessions.get(session).map(|row| row.lowest_unanswered);
        match running.or_else(|| found.ended.get(session).map(|row| row.lowest_unanswered)) {
            None => violations.push(row, format!("answer {seq} of session {session}, which does not exist")),
            Some(lowest_unanswered) => violations.unless(*seq >= lowest_unanswered, row, || {
                format!("answer {seq} of session {session} was to be forgotten")
            }),
        }
    }
}

fn unsealed_row((session, chunk): (u64, u64)) -> Subject {
    Subject::Row(keys::unsealed(SessionId(session), ChunkId(chunk)))
}

fn replica_row((node, chunk): (u64, u64)) -> Subject {
    Subject::Row(keys::replica(NodeId(node), ChunkId(chunk)))
}

fn orphan_row(ino: u64) -> Subject {
    Subject::Row(keys::orphan(InodeNo(ino)))
}
