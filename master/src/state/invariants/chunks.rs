//! The data: slices lie in extents, extents in committed bytes of chunks, users match both ways, live bytes add up.

use super::faults::Subject;
use super::{Found, Violations, replica_row, unsealed_row};
use crate::state::keys;
use crate::state::ops::wish;
use crate::state::rows::Inode;
use dfs_proto::limits::{FILE_SIZE_MAX, REPLICAS_MAX};
use dfs_proto::v1::chunk_state::Phase;
use dfs_proto::v1::{ChunkState, ClusterRow};
use dfs_proto::{ChunkId, InodeNo};
use std::collections::{BTreeMap, BTreeSet};

/// What the slices say.
#[derive(Default)]
pub struct Mapped {
    /// Bytes of each inode that are mapped, and where its last slice ends.
    pub bytes: BTreeMap<u64, u64>,
    pub ends: BTreeMap<u64, u64>,
    /// The extents that slices name, by chunk and offset.
    pub extents: BTreeSet<(u64, u64)>,
}

pub fn check(found: &Found, violations: &mut Violations) -> Mapped {
    let mapped = check_slices(found, violations);
    check_extents(found, violations);
    for (chunk, state) in &found.chunks {
        check_chunk(*chunk, state, found, violations);
    }
    for row @ (session, chunk) in &found.unsealed {
        let known = found.chunks.get(chunk).is_some_and(|state| state.session == *session);
        violations.unless(known, unsealed_row(*row), || {
            format!("session {session} is said to append to chunk {chunk}")
        });
    }
    for row @ (node, chunk) in &found.replicas {
        let known = found.chunks.get(chunk).is_some_and(|state| state.nodes.contains(node));
        violations.unless(known, replica_row(*row), || format!("node {node} is said to hold chunk {chunk}"));
    }
    for chunk in &found.reserved {
        let row = Subject::Row(keys::reserved(ChunkId(*chunk)));
        violations.unless(!found.chunks.contains_key(chunk), row, || {
            format!("the number of chunk {chunk}, which exists, is reserved")
        });
    }
    for chunk in &found.idle {
        let row = Subject::Row(keys::idle(ChunkId(*chunk)));
        violations
            .unless(found.chunks.contains_key(chunk), row, || format!("idle chunk {chunk} does not exist"));
    }
    mapped
}

/// No chunk is to have fewer replicas than a file wants that uses it, unless that file is noted.
pub fn check_wishes(found: &Found, cluster: &ClusterRow, violations: &mut Violations) {
    for ino in &found.reviews {
        let file = found.inodes.get(ino).is_some_and(Inode::is_file);
        violations.unless(file, Subject::Row(keys::review(InodeNo(*ino))), || {
            format!("inode {ino}, which is no file, is noted for its replicas")
        });
    }
    if !cluster.wishes_hold {
        return;
    }
    for (chunk, state) in &found.chunks {
        let in_range = (1..=REPLICAS_MAX).contains(&state.wanted_replicas);
        violations.unless(in_range, Subject::Chunk(*chunk), || {
            format!("chunk {chunk} is to have {} replicas", state.wanted_replicas)
        });
    }
    let mut told = BTreeSet::new();
    for ((ino, _), slice) in &found.slices {
        let (Some(inode), Some(chunk)) = (found.inodes.get(ino), found.chunks.get(&slice.chunk)) else {
            continue;
        };
        let (wish, wanted) = (wish::of(cluster, &inode.attr), chunk.wanted_replicas);
        if wish > wanted
            && inode.is_file()
            && !found.reviews.contains(ino)
            && told.insert((*ino, slice.chunk))
        {
            violations.push(
                Subject::Wish(*ino),
                format!(
                    "chunk {} is to have {wanted} replicas, inode {ino}, which uses it, wants {wish}",
                    slice.chunk
                ),
            );
        }
    }
}

fn check_slices(found: &Found, violations: &mut Violations) -> Mapped {
    let mut mapped = Mapped::default();
    let mut before = (0, 0);
    for ((ino, at), slice) in &found.slices {
        let shown = || format!("slice at {at} of inode {ino}");
        let subject = || Subject::Slice(*ino, *at);
        let end = at.saturating_add(slice.length);
        violations.unless(slice.length > 0 && end <= FILE_SIZE_MAX, Subject::Nothing, || {
            format!("{} has a wrong length", shown())
        });
        violations.unless(before.0 != *ino || before.1 <= *at, Subject::Nothing, || {
            format!("{} overlaps the one before", shown())
        });
        before = (*ino, end);
        *mapped.bytes.entry(*ino).or_default() += slice.length;
        mapped.ends.insert(*ino, end);
        mapped.extents.insert((slice.chunk, slice.extent));
        match found.inodes.get(ino) {
            None => violations.push(Subject::Missing(*ino), format!("{}, which does not exist", shown())),
            Some(inode) => {
                violations.unless(inode.is_file(), Subject::Nothing, || format!("{}, no file", shown()));
                violations.unless(end <= inode.attr.size, Subject::Inode(*ino), || {
                    format!("{} lies beyond the size {}", shown(), inode.attr.size)
                });
            }
        }
        match found.extents.get(&(slice.chunk, slice.extent)) {
            None => violations.push(subject(), format!("{} has no extent", shown())),
            Some(extent) => {
                let inside = slice.chunk_offset >= slice.extent
                    && slice.chunk_offset + slice.length <= slice.extent + extent.length;
                violations.unless(inside, subject(), || format!("{} lies outside of its extent", shown()));
                let first = extent.has_first && (extent.first_ino, extent.first_offset) == (*ino, *at);
                let other = found.users.contains(&(slice.chunk, slice.extent, *ino, *at));
                violations.unless(first != other, subject(), || {
                    format!("{} is not one user of its extent", shown())
                });
            }
        }
    }
    for (ino, inode) in &found.inodes {
        let there = mapped.bytes.get(ino).copied().unwrap_or(0);
        let counted = inode.mapped.get();
        violations.unless(counted == there, Subject::Inode(*ino), || {
            format!("inode {ino} counts {counted} mapped bytes of {there}")
        });
    }
    mapped
}

fn check_extents(found: &Found, violations: &mut Violations) {
    let mut others: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    for (chunk, extent, ino, at) in &found.users {
        *others.entry((*chunk, *extent)).or_default() += 1;
        check_user(found, (*chunk, *extent), (*ino, *at), violations);
    }
    let mut before = (0, 0);
    for (key @ (chunk, at), extent) in &found.extents {
        let shown = || format!("extent at {at} of chunk {chunk}");
        let subject = || Subject::Extent(*chunk, *at);
        let (end, counted) = (at + extent.length, others.remove(key).unwrap_or(0));
        violations.unless(counted == extent.others, subject(), || {
            format!("{} counts {} further users of {counted}", shown(), extent.others)
        });
        violations
            .unless(extent.has_first || extent.others > 0, subject(), || format!("{} has no user", shown()));
        if extent.has_first {
            check_user(found, *key, (extent.first_ino, extent.first_offset), violations);
        }
        violations.unless(before.0 != *chunk || before.1 <= *at, Subject::Nothing, || {
            format!("{} overlaps the one before", shown())
        });
        before = (*chunk, end);
        let committed = found.chunks.get(chunk).map(|state| state.committed);
        violations.unless(committed.is_some_and(|committed| end <= committed), Subject::Nothing, || {
            format!("{} lies beyond the committed length", shown())
        });
    }
    for (chunk, extent) in others.keys() {
        violations.push(
            Subject::Extent(*chunk, *extent),
            format!("extent {extent} of chunk {chunk} has users but does not exist"),
        );
    }
}

/// The user of an extent is a slice that says the same.
fn check_user(found: &Found, extent: (u64, u64), user: (u64, u64), violations: &mut Violations) {
    let matches = found.slices.get(&user).is_some_and(|slice| (slice.chunk, slice.extent) == extent);
    violations.unless(matches, Subject::Extent(extent.0, extent.1), || {
        format!("extent at {} of chunk {} is not used by inode {} at {}", extent.1, extent.0, user.0, user.1)
    });
}

fn check_chunk(chunk: u64, state: &ChunkState, found: &Found, violations: &mut Violations) {
    let live = found.live(chunk);
    let subject = || Subject::Chunk(chunk);
    violations
        .unless(state.chunk == chunk, subject(), || format!("chunk {chunk} calls itself {}", state.chunk));
    violations.unless(state.live == live, subject(), || {
        format!("chunk {chunk} counts {} live bytes of {live}", state.live)
    });
    violations.unless(live <= state.committed && state.committed <= state.capacity, Subject::Nothing, || {
        format!("chunk {chunk}: live {live}, committed {}, capacity {}", state.committed, state.capacity)
    });
    violations.unless(state.epoch > u32::from(state.phase() != Phase::Open), Subject::Nothing, || {
        format!("chunk {chunk} has epoch {}", state.epoch)
    });
    let sealed = state.phase() == Phase::Sealed;
    let row = if sealed { unsealed_row((state.session, chunk)) } else { subject() };
    violations.unless(found.unsealed.contains(&(state.session, chunk)) != sealed, row, || {
        format!("chunk {chunk}: is it sealed or not?")
    });
    let idle = sealed && live == 0;
    let row = if idle { subject() } else { Subject::Row(keys::idle(ChunkId(chunk))) };
    violations
        .unless(found.idle.contains(&chunk) == idle, row, || format!("chunk {chunk}: is it idle or not?"));
    let different: BTreeSet<&u64> = state.nodes.iter().collect();
    violations.unless(!state.nodes.is_empty(), Subject::Nothing, || format!("chunk {chunk} has no replicas"));
    violations.unless(different.len() == state.nodes.len(), subject(), || {
        format!("chunk {chunk} has the replicas {:?}", state.nodes)
    });
    for node in different {
        violations.unless(found.nodes.contains_key(node), Subject::Nothing, || {
            format!("chunk {chunk} has a replica on node {node}, which does not exist")
        });
        violations.unless(found.replicas.contains(&(*node, chunk)), subject(), || {
            format!("chunk {chunk} has a replica on node {node}, which does not know")
        });
    }
}
