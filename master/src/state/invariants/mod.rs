//! What must be true of every state, checked by reading all of it: the state machine's part of `dfs fsck` and the oracle of
//! its tests (I10, and that every row has the rows it needs).

mod chunks;
mod names;

use super::keys::{self, tag};
use super::kv::Kv;
use super::ops::orphan::Orphan;
use super::rows::{Inode, corrupt, decode, number};
use dfs_proto::v1::{self, ChunkState, DentryRow, ExtentRow, NodeRow, SessionRow, SliceRow};
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
            self.violations.push(error.to_string());
        }
    }

    /// How many inodes and chunks there were.
    pub fn seen(&self) -> (u64, u64) {
        (self.found.inodes.len() as u64, self.found.chunks.len() as u64)
    }

    /// Every violation found, in words; empty when all is well.
    pub fn violations(self) -> Vec<String> {
        let Self { found, mut violations } = self;
        match &found.cluster {
            None if found.rows == 0 => {}
            None => violations.push("there are rows but no cluster row"),
            Some(cluster) => {
                check_counters(&found, cluster, &mut violations);
                names::check(&found, cluster, &mut violations);
                chunks::check(&found, &mut violations);
                check_sessions(&found, &mut violations);
            }
        }
        violations.0
    }
}

#[derive(Default)]
struct Violations(Vec<String>);

impl Violations {
    fn push(&mut self, what: impl Into<String>) {
        self.0.push(what.into());
    }

    fn unless(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.0.push(what());
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
    /// Sessions that may hold leases.
    leased: BTreeSet<u64>,
    /// Numbers of chunks that are being made.
    reserved: BTreeSet<u64>,
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
                self.leased.insert(at(0)?);
            }
            Some(tag::ENDED) => {
                self.ended.insert(at(0)?, decode(key, value)?);
            }
            Some(tag::ENDED_AT) => {
                self.ended_at.insert((at(0)?, at(1)?));
            }
            Some(tag::RESERVED) => {
                self.reserved.insert(at(0)?);
            }
            _ => return Err(corrupt(key, "a row of no table")),
        }
        Ok(())
    }
}

fn check_counters(found: &Found, cluster: &v1::ClusterRow, violations: &mut Violations) {
    let live: u64 = found.chunks.values().map(|chunk| chunk.live).sum();
    let counters = [
        ("files", cluster.files, found.inodes.len() as u64),
        ("chunks", cluster.chunks, found.chunks.len() as u64),
        ("live bytes", cluster.live_bytes, live),
    ];
    for (what, counted, there) in counters {
        violations
            .unless(counted == there, || format!("the cluster counts {counted} {what}, there are {there}"));
    }
    let numbers = [
        ("inode", cluster.next_ino, found.inodes.last_key_value().map(|(number, _)| *number)),
        ("chunk", cluster.next_chunk, found.chunks.last_key_value().map(|(number, _)| *number)),
        ("reserved chunk", cluster.next_chunk, found.reserved.last().copied()),
        ("session", cluster.next_session, found.sessions.last_key_value().map(|(number, _)| *number)),
    ];
    for (what, next, greatest) in numbers {
        violations.unless(greatest.is_none_or(|greatest| greatest < next), || {
            format!("the next {what} would be {next}, which is taken")
        });
    }
}

fn check_sessions(found: &Found, violations: &mut Violations) {
    for session in found.leased.iter().filter(|session| !found.sessions.contains_key(session)) {
        violations.push(format!("leases of session {session}, which does not exist"));
    }
    let listed: BTreeMap<u64, u64> =
        found.ended_at.iter().map(|(seconds, session)| (*session, *seconds)).collect();
    violations.unless(listed.len() == found.ended_at.len() && listed.keys().eq(found.ended.keys()), || {
        format!("{} sessions that have ended, {} by their time", found.ended.len(), found.ended_at.len())
    });
    for session in found.ended.keys().filter(|session| found.sessions.contains_key(session)) {
        violations.push(format!("session {session} has ended and has not"));
    }
    for (session, seq) in &found.answers {
        let running = found.sessions.get(session).map(|row| row.lowest_unanswered);
        match running.or_else(|| found.ended.get(session).map(|row| row.lowest_unanswered)) {
            None => violations.push(format!("answer {seq} of session {session}, which does not exist")),
            Some(lowest_unanswered) => violations.unless(*seq >= lowest_unanswered, || {
                format!("answer {seq} of session {session} was to be forgotten")
            }),
        }
    }
}
