//! The data: slices lie in extents, extents in committed bytes of chunks, users match both ways, live bytes add up.

use super::{Found, Violations};
use dfs_proto::limits::FILE_SIZE_MAX;
use dfs_proto::v1::ChunkState;
use dfs_proto::v1::chunk_state::Phase;
use std::collections::{BTreeMap, BTreeSet};

pub fn check(found: &Found, violations: &mut Violations) {
    check_slices(found, violations);
    check_extents(found, violations);
    for (chunk, state) in &found.chunks {
        check_chunk(*chunk, state, found, violations);
    }
    for (session, chunk) in &found.unsealed {
        let known = found.chunks.get(chunk).is_some_and(|state| state.session == *session);
        violations.unless(known, || format!("session {session} is said to append to chunk {chunk}"));
    }
    for (node, chunk) in &found.replicas {
        let known = found.chunks.get(chunk).is_some_and(|state| state.nodes.contains(node));
        violations.unless(known, || format!("node {node} is said to hold chunk {chunk}"));
    }
    for chunk in &found.reserved {
        violations.unless(!found.chunks.contains_key(chunk), || {
            format!("the number of chunk {chunk}, which exists, is reserved")
        });
    }
    for chunk in &found.idle {
        violations.unless(found.chunks.contains_key(chunk), || format!("idle chunk {chunk} does not exist"));
    }
}

fn check_slices(found: &Found, violations: &mut Violations) {
    let mut mapped: BTreeMap<u64, u64> = BTreeMap::new();
    let mut before = (0, 0);
    for ((ino, at), slice) in &found.slices {
        let shown = || format!("slice at {at} of inode {ino}");
        let end = at.saturating_add(slice.length);
        violations
            .unless(slice.length > 0 && end <= FILE_SIZE_MAX, || format!("{} has a wrong length", shown()));
        violations
            .unless(before.0 != *ino || before.1 <= *at, || format!("{} overlaps the one before", shown()));
        before = (*ino, end);
        *mapped.entry(*ino).or_default() += slice.length;
        match found.inodes.get(ino) {
            None => violations.push(format!("{}, which does not exist", shown())),
            Some(inode) => violations.unless(inode.is_file() && end <= inode.attr.size, || {
                format!("{} lies beyond the size {}", shown(), inode.attr.size)
            }),
        }
        match found.extents.get(&(slice.chunk, slice.extent)) {
            None => violations.push(format!("{} has no extent", shown())),
            Some(extent) => {
                let inside = slice.chunk_offset >= slice.extent
                    && slice.chunk_offset + slice.length <= slice.extent + extent.length;
                violations.unless(inside, || format!("{} lies outside of its extent", shown()));
                let first = extent.has_first && (extent.first_ino, extent.first_offset) == (*ino, *at);
                let other = found.users.contains(&(slice.chunk, slice.extent, *ino, *at));
                violations.unless(first != other, || format!("{} is not one user of its extent", shown()));
            }
        }
    }
    for (ino, inode) in &found.inodes {
        let there = mapped.get(ino).copied().unwrap_or(0);
        let counted = inode.mapped.get();
        violations
            .unless(counted == there, || format!("inode {ino} counts {counted} mapped bytes of {there}"));
    }
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
        let (end, counted) = (at + extent.length, others.remove(key).unwrap_or(0));
        violations.unless(counted == extent.others, || {
            format!("{} counts {} further users of {counted}", shown(), extent.others)
        });
        violations.unless(extent.has_first || extent.others > 0, || format!("{} has no user", shown()));
        if extent.has_first {
            check_user(found, *key, (extent.first_ino, extent.first_offset), violations);
        }
        violations
            .unless(before.0 != *chunk || before.1 <= *at, || format!("{} overlaps the one before", shown()));
        before = (*chunk, end);
        let committed = found.chunks.get(chunk).map(|state| state.committed);
        violations.unless(committed.is_some_and(|committed| end <= committed), || {
            format!("{} lies beyond the committed length", shown())
        });
    }
    for (chunk, extent) in others.keys() {
        violations.push(format!("extent {extent} of chunk {chunk} has users but does not exist"));
    }
}

/// The user of an extent is a slice that says the same.
fn check_user(found: &Found, extent: (u64, u64), user: (u64, u64), violations: &mut Violations) {
    let matches = found.slices.get(&user).is_some_and(|slice| (slice.chunk, slice.extent) == extent);
    violations.unless(matches, || {
        format!("extent at {} of chunk {} is not used by inode {} at {}", extent.1, extent.0, user.0, user.1)
    });
}

fn check_chunk(chunk: u64, state: &ChunkState, found: &Found, violations: &mut Violations) {
    let live: u64 =
        found.extents.range((chunk, 0)..=(chunk, u64::MAX)).map(|(_, extent)| extent.length).sum();
    violations.unless(state.chunk == chunk, || format!("chunk {chunk} calls itself {}", state.chunk));
    violations
        .unless(state.live == live, || format!("chunk {chunk} counts {} live bytes of {live}", state.live));
    violations.unless(state.live <= state.committed && state.committed <= state.capacity, || {
        format!(
            "chunk {chunk}: live {}, committed {}, capacity {}",
            state.live, state.committed, state.capacity
        )
    });
    violations.unless(state.epoch > u32::from(state.phase() != Phase::Open), || {
        format!("chunk {chunk} has epoch {}", state.epoch)
    });
    let sealed = state.phase() == Phase::Sealed;
    violations.unless(found.unsealed.contains(&(state.session, chunk)) != sealed, || {
        format!("chunk {chunk}: is it sealed or not?")
    });
    violations.unless(found.idle.contains(&chunk) == (sealed && state.live == 0), || {
        format!("chunk {chunk}: is it idle or not?")
    });
    let different: BTreeSet<&u64> = state.nodes.iter().collect();
    violations.unless(!state.nodes.is_empty() && different.len() == state.nodes.len(), || {
        format!("chunk {chunk} has the replicas {:?}", state.nodes)
    });
    for node in different {
        violations.unless(found.nodes.contains_key(node) && found.replicas.contains(&(*node, chunk)), || {
            format!("chunk {chunk} has a replica on node {node}, which does not know")
        });
    }
}
