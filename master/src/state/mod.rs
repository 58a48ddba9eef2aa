//! The state machine: what a Raft entry does to the store, and what the store answers. No clock, no randomness, no I/O.
//!
//! [`apply`] reads a [`Kv`] and answers with the writes that the caller applies as one batch; [`query`] only reads. Time,
//! numbers of daemons and random keys arrive inside the commands, so every replica computes the same bytes (I7).

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod access;
mod acl;
mod dedup;
mod ended;
mod invariants;
pub mod keys;
pub mod kv;
mod ops;
mod query;
pub mod read;
pub mod restored;
mod rows;
#[cfg(test)]
mod tests;
mod touched;

use dfs_proto::v1::{self, ErrorCode, Timestamp, answer, command, mutation, system, system_answer};
use dfs_proto::{FsError, SessionId};
pub use invariants::{Check, Findings, check_invariants};
pub use kv::{Kv, MemKv, WriteSet};
pub use ops::wish::of as wish;
use ops::{
    Caller, State, attr, chunk, create, data, mend, node, orphan, relocate, remove, rename, session, wish,
    xattr,
};
pub use query::{access_of_holder, check_open, layout, query};
pub use read::*;
use rows::{OpResult, answered, corrupt, refused};
use std::io;
pub use touched::{mended_inodes, names_of, shown_as_committed, touched};

/// The version of the log's batches, and the first one in which chunks follow what files want of replicas. Entries of earlier
/// versions do what they did when they were written: another master may have applied them then.
pub const BATCH_VERSION: u32 = 2;
const WISHES_SINCE: u32 = 2;

/// What one command answered.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "nearly all of them are answers")]
pub enum Applied {
    Answer(v1::Answer),
    System(v1::SystemAnswer),
}

/// Applies one log entry: the writes it makes and one result for each command, in order.
///
/// Pure: reads `kv`, writes nothing. A command that fails writes nothing but its recorded answer; one whose OpId was
/// applied before gets the answer of then.
///
/// # Errors
/// When the store cannot be read or holds what cannot be, or the batch is of another version: nothing may be applied.
pub fn apply(kv: &dyn Kv, batch: &v1::Batch) -> io::Result<(WriteSet, Vec<Applied>)> {
    if !(1..=BATCH_VERSION).contains(&batch.version) {
        let text = format!("a batch of version {}, this master knows 1 to {BATCH_VERSION}", batch.version);
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    let mut state: Option<State<'_>> = None;
    let mut results = Vec::with_capacity(batch.commands.len());
    for command in &batch.commands {
        if state.is_none() {
            state = begin(kv, command, batch.version >= WISHES_SINCE)?;
        }
        results.push(match state.as_mut() {
            Some(state) => apply_one(state, command)?,
            None => fail(command, uninitialised(command)),
        });
    }
    let Some(mut state) = state else { return Ok((WriteSet::new(), results)) };
    state.tx.put_row(keys::cluster(), &state.cluster);
    Ok((state.tx.into_writes(), results))
}

/// The state as the batch finds it. Of a store without a cluster the first Init makes one; other commands find None.
fn begin<'k>(kv: &'k dyn Kv, command: &v1::Command, keeps_wishes: bool) -> io::Result<Option<State<'k>>> {
    let tx = kv::Tx::new(kv);
    let key = keys::cluster();
    let (cluster, fresh) = match (tx.row::<v1::ClusterRow>(&key)?, init_of(command)) {
        (Some(cluster), _) => (cluster, false),
        (None, Some(init)) => {
            let now = command.now.unwrap_or_default();
            let Ok(cluster) = session::first_cluster_row(init, now) else { return Ok(None) };
            (v1::ClusterRow { wishes_hold: keeps_wishes, ..cluster }, true)
        }
        (None, None) => return Ok(None),
    };
    if cluster.format != keys::FORMAT {
        return Err(corrupt(
            &key,
            format!("keyspace format {}, this master knows {}", cluster.format, keys::FORMAT),
        ));
    }
    let hash_key =
        cluster.hash_key.as_ref().try_into().map_err(|_| corrupt(&key, "a hash key of the wrong length"))?;
    let now = cluster.now.unwrap_or_default();
    let mut state = State { tx, cluster, now, hash_key, keeps_wishes };
    if fresh {
        session::init(&mut state);
        state.tx.keep();
    }
    Ok(Some(state))
}

fn init_of(command: &v1::Command) -> Option<&v1::Init> {
    match &command.body {
        Some(command::Body::System(v1::System { op: Some(system::Op::Init(init)) })) => Some(init),
        _ => None,
    }
}

fn uninitialised(command: &v1::Command) -> FsError {
    match init_of(command).map(|init| session::first_cluster_row(init, Timestamp::default())) {
        Some(Err(error)) => error,
        _ => FsError::new(ErrorCode::ErrorUnavailable, "the cluster has not been initialised yet"),
    }
}

fn fail(command: &v1::Command, error: FsError) -> Applied {
    match &command.body {
        Some(command::Body::System(_)) => {
            Applied::System(v1::SystemAnswer { body: Some(system_answer::Body::Failure(error.into())) })
        }
        Some(command::Body::Mutation(_)) | None => {
            Applied::Answer(v1::Answer { body: Some(answer::Body::Failure(error.into())) })
        }
    }
}

/// Applies one command. Whatever it refuses it leaves without a trace, but for the answer that dedup records.
fn apply_one(state: &mut State<'_>, command: &v1::Command) -> io::Result<Applied> {
    advance_time(state, command.now);
    match &command.body {
        Some(command::Body::System(op)) => {
            let body = match attempt(state, |state| apply_system(state, op))? {
                Ok(body) => body,
                Err(error) => system_answer::Body::Failure(error.into()),
            };
            Ok(Applied::System(v1::SystemAnswer { body: Some(body) }))
        }
        Some(command::Body::Mutation(op)) => {
            // Without a credential it is nobody's, never root's.
            let cred = command.cred.clone().unwrap_or_else(v1::Cred::nobody);
            let by = Caller { cred: &cred, session: SessionId(command.session) };
            let answer = dedup::once(state, command, |state| {
                let body = match attempt(state, |state| apply_mutation(state, &by, op))? {
                    Ok(body) => body,
                    Err(error) => answer::Body::Failure(error.into()),
                };
                Ok(v1::Answer { body: Some(body) })
            })?;
            Ok(Applied::Answer(answer))
        }
        None => Ok(fail(command, FsError::new(ErrorCode::ErrorNotSupported, "an empty command"))),
    }
}

fn advance_time(state: &mut State<'_>, now: Option<Timestamp>) {
    if let Some(now) = now
        && now.key() > state.now.key()
    {
        state.now = now;
        state.cluster.now = Some(now);
    }
}

/// Runs an operation; when it is refused, takes back all that it wrote.
fn attempt<T>(
    state: &mut State<'_>,
    operation: impl FnOnce(&mut State<'_>) -> OpResult<T>,
) -> io::Result<Result<T, FsError>> {
    let cluster = state.cluster.clone();
    let result = answered(operation(state))?;
    if result.is_err() {
        state.tx.rollback();
        state.cluster = cluster;
    } else {
        state.tx.keep();
    }
    Ok(result)
}

fn apply_mutation(s: &mut State<'_>, by: &Caller<'_>, op: &v1::Mutation) -> OpResult<answer::Body> {
    match op.op.as_ref() {
        Some(mutation::Op::Create(op)) => create::create(s, by, op),
        Some(mutation::Op::Unlink(op)) => remove::unlink(s, by, op),
        Some(mutation::Op::Rename(op)) => rename::rename(s, by, op),
        Some(mutation::Op::Link(op)) => create::link(s, by, op),
        Some(mutation::Op::SetAttr(op)) => attr::set_attr(s, by, op),
        Some(mutation::Op::SetXattr(op)) => xattr::set(s, by, op),
        Some(mutation::Op::RemoveXattr(op)) => xattr::remove(s, by, op),
        Some(mutation::Op::Commit(op)) => data::commit(s, by, op),
        Some(mutation::Op::Fallocate(op)) => data::fallocate(s, by, op),
        Some(mutation::Op::CopyRange(op)) => data::copy_range(s, by, op),
        Some(mutation::Op::AllocChunks(op)) => chunk::alloc(s, by, op),
        Some(mutation::Op::Touch(op)) => orphan::touch(s, op),
        None => refused(ErrorCode::ErrorNotSupported, "a change this master does not know"),
    }
}

fn apply_system(s: &mut State<'_>, op: &v1::System) -> OpResult<system_answer::Body> {
    match op.op.as_ref() {
        // The one that counted made the state itself.
        Some(system::Op::Init(_)) => Ok(system_answer::Body::Empty(v1::Empty {})),
        Some(system::Op::OpenSession(op)) => Ok(session::open(s, op)),
        Some(system::Op::CloseSession(op)) => session::close(s, op),
        Some(system::Op::RegisterNode(op)) => node::register(s, op),
        Some(system::Op::FenceChunk(op)) => chunk::fence(s, op),
        Some(system::Op::SealedChunk(op)) => chunk::sealed(s, op),
        Some(system::Op::Reap(op)) => orphan::reap(s, op),
        Some(system::Op::AddReplica(op)) => chunk::add_replica(s, op),
        Some(system::Op::DropChunks(op)) => chunk::drop_chunks(s, op),
        Some(system::Op::NoteLeases(op)) => session::note_leases(s, op),
        Some(system::Op::DropReplica(op)) => chunk::drop_replica(s, op),
        Some(system::Op::DrainNode(op)) => node::drain(s, op),
        Some(system::Op::RemoveNode(op)) => node::remove(s, op),
        Some(system::Op::ForgetNewer(_)) => {
            s.cluster.newer.clear();
            Ok(system_answer::Body::Empty(v1::Empty {}))
        }
        Some(system::Op::Mend(op)) => mend::mend(s, op),
        Some(system::Op::ReserveChunk(_)) => Ok(relocate::reserve(s)),
        Some(system::Op::ReleaseChunks(op)) => relocate::release(s, op),
        Some(system::Op::SetWishes(op)) => wish::set(s, op),
        Some(system::Op::Reviewed(op)) => wish::reviewed(s, op),
        Some(system::Op::Relocate(op)) => relocate::relocate(s, op),
        None => refused(ErrorCode::ErrorNotSupported, "a command this master does not know"),
    }
}
