//! What a restored state must differ in from the one that was backed up.
//!
//! The cluster went on after the backup, and is now put back to it. Chunk daemons, clients and kernels remember what they saw
//! meanwhile. So every number that may have been given meanwhile is skipped: it is never given a second meaning.
//!
//! * Inode, chunk and session numbers, and the versions of inodes, go on above all that the lost history can have reached. It
//!   began below the [`Base`] of its own beginning, which is counted in seconds, and gave less than [`PER_SECOND`] of each
//!   in a second; so does the next history after the next restore.
//! * Sessions are gone, with their answers and leases: a client of the lost history must not go on as if nothing was.
//! * Chunks that were open are fenced at an epoch above any that the lost history gave them. Sealing finds out what became of
//!   them ([`crate::seal`]).
//! * Chunks with numbers that the lost history gave are not deleted as dropped ones are, unless that is asked for.

use super::keys::{self, tag};
use super::rows::{corrupt, decode};
use dfs_proto::v1::{ChunkRange, ChunkState, ClusterRow, InodeRow, chunk_state::Phase};
use prost::Message;
use std::io;

/// More than a cluster gives of any kind of number in a second.
const PER_SECOND: u64 = 1 << 20;
/// More fences than a chunk sees in its life.
const EPOCHS: u32 = 1024;

/// Numbers that nobody has been given up to a moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Base(u64);

impl Base {
    /// As of a time, in seconds since 1970.
    #[must_use]
    pub const fn of_second(seconds: u64) -> Self {
        Self(seconds.saturating_mul(PER_SECOND))
    }

    /// The least number that is surely above all that were given up to then, and `number`.
    pub fn lift(self, number: u64) -> u64 {
        self.0.max(number.saturating_add(PER_SECOND))
    }
}

/// Goes through the rows of a backup.
pub struct Restoring {
    base: Base,
    /// Replicas of chunks made after the backup are deleted.
    discard_newer: bool,
}

impl Restoring {
    #[must_use]
    pub const fn new(base: Base, discard_newer: bool) -> Self {
        Self { base, discard_newer }
    }

    /// A row as it is to be restored; None: not at all.
    ///
    /// # Errors
    /// When the row cannot be read, or is of a format that this program does not know.
    pub fn row(&self, key: &[u8], value: Vec<u8>) -> io::Result<Option<Vec<u8>>> {
        match key.first().copied() {
            Some(tag::CLUSTER) => self.cluster(key, &value).map(Some),
            Some(tag::INODE) => {
                let mut row: InodeRow = decode(key, &value)?;
                let attr = row.attr.as_mut().ok_or_else(|| corrupt(key, "an inode without attributes"))?;
                attr.version = self.base.lift(attr.version);
                Ok(Some(row.encode_to_vec()))
            }
            Some(tag::CHUNK) => {
                let mut row: ChunkState = decode(key, &value)?;
                if row.phase() == Phase::Sealed {
                    return Ok(Some(value));
                }
                row.set_phase(Phase::Fenced);
                row.epoch = row.epoch.saturating_add(EPOCHS);
                Ok(Some(row.encode_to_vec()))
            }
            Some(tag::SESSION | tag::ANSWER | tag::LEASED | tag::ENDED | tag::ENDED_AT) => Ok(None),
            _ => Ok(Some(value)),
        }
    }

    fn cluster(&self, key: &[u8], value: &[u8]) -> io::Result<Vec<u8>> {
        let mut row: ClusterRow = decode(key, value)?;
        if row.format != keys::FORMAT {
            let text = format!("keyspace format {}, this program knows {}", row.format, keys::FORMAT);
            return Err(corrupt(key, text));
        }
        let first_unknown = row.next_chunk;
        row.next_ino = self.base.lift(row.next_ino);
        row.next_chunk = self.base.lift(row.next_chunk);
        row.next_session = self.base.lift(row.next_session);
        if self.discard_newer {
            row.newer.clear();
        } else {
            row.newer.push(ChunkRange { from: first_unknown, to: row.next_chunk });
        }
        Ok(row.encode_to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{self, Kv, MemKv, WriteSet};
    use dfs_proto::ChunkId;
    use dfs_proto::v1::{Attr, SessionRow};
    use std::ops::ControlFlow;

    /// A state that was restored at a time.
    pub fn restored(kv: &dyn Kv, restoring: &Restoring) -> MemKv {
        let (mut rows, (from, to)) = (WriteSet::new(), keys::everything());
        kv.scan(&from, &to, &mut |key, value| {
            if let Some(value) = restoring.row(key, value.to_vec()).unwrap() {
                rows.insert(key.to_vec(), Some(value));
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        let restored = MemKv::new();
        restored.apply(&rows).unwrap();
        restored
    }

    fn state() -> MemKv {
        let cluster = ClusterRow {
            format: keys::FORMAT,
            next_ino: 10,
            next_chunk: 20,
            next_session: 30,
            ..ClusterRow::default()
        };
        let attr = Attr { ino: 5, version: 7, ..Attr::default() };
        let chunk = |chunk, phase: Phase| ChunkState {
            chunk,
            epoch: 1,
            phase: phase.into(),
            committed: 9,
            ..ChunkState::default()
        };
        let rows = [
            (keys::cluster(), cluster.encode_to_vec()),
            (
                keys::inode(dfs_proto::InodeNo(5)),
                InodeRow { attr: Some(attr), ..InodeRow::default() }.encode_to_vec(),
            ),
            (keys::chunk(ChunkId(3)), chunk(3, Phase::Open).encode_to_vec()),
            (keys::chunk(ChunkId(4)), chunk(4, Phase::Sealed).encode_to_vec()),
            (keys::session(dfs_proto::SessionId(8)), SessionRow::default().encode_to_vec()),
            (keys::answer(dfs_proto::SessionId(8), 1), Vec::new()),
            (keys::leased(dfs_proto::SessionId(8), 1, 2), Vec::new()),
            (keys::ended(dfs_proto::SessionId(7)), Vec::new()),
            (keys::ended_at(5, dfs_proto::SessionId(7)), Vec::new()),
        ];
        let kv = MemKv::new();
        kv.apply(&rows.into_iter().map(|(key, value)| (key, Some(value))).collect()).unwrap();
        kv
    }

    #[test]
    fn no_number_of_the_lost_history_is_given_again() {
        let now = Base::of_second(1_800_000_000);
        let kv = restored(&state(), &Restoring::new(now, false));
        let cluster = state::cluster_row(&kv).unwrap().unwrap();
        for next in [cluster.next_ino, cluster.next_chunk, cluster.next_session] {
            assert_eq!(next, 1_800_000_000 << 20);
        }
        assert_eq!(state::attr(&kv, dfs_proto::InodeNo(5)).unwrap().unwrap().version, now.0);
        let open = state::chunk_state(&kv, ChunkId(3)).unwrap().unwrap();
        assert_eq!((open.phase(), open.epoch, open.committed), (Phase::Fenced, 1 + EPOCHS, 9));
        let sealed = state::chunk_state(&kv, ChunkId(4)).unwrap().unwrap();
        assert_eq!((sealed.phase(), sealed.epoch), (Phase::Sealed, 1));
        assert!(state::sessions(&kv).unwrap().is_empty() && state::leased(&kv).unwrap().is_empty());
        assert!(!state::is_answered(&kv, [dfs_proto::SessionId(8)], 1).unwrap());
        assert!(
            kv.get(&keys::ended(dfs_proto::SessionId(7))).unwrap().is_none(),
            "nobody of the lost history is answered"
        );
        // Restored again a second later: numbers go on above those of the second history, and of a clock that went back.
        let again = restored(&kv, &Restoring::new(Base::of_second(1_700_000_000), false));
        assert_eq!(state::cluster_row(&again).unwrap().unwrap().next_chunk, cluster.next_chunk + PER_SECOND);
    }

    #[test]
    fn chunks_that_the_backup_does_not_know_are_kept_unless_that_is_not_wanted() {
        let (kv, now) = (state(), Base::of_second(1_800_000_000));
        let cluster = |kv: &MemKv| state::cluster_row(kv).unwrap().unwrap();
        let kept = cluster(&restored(&kv, &Restoring::new(now, false)));
        assert!(state::was_given(&kept, ChunkId(19)), "it was dropped before the backup");
        for newer in [20, 21, now.0 - 1] {
            assert!(!state::was_given(&kept, ChunkId(newer)), "{newer}");
        }
        assert!(!state::was_given(&kept, ChunkId(now.0)), "nobody has it yet");
        let discarded = cluster(&restored(&kv, &Restoring::new(now, true)));
        assert!(
            state::was_given(&discarded, ChunkId(20)) && state::was_given(&discarded, ChunkId(now.0 - 1))
        );
    }

    #[test]
    fn a_backup_of_another_format_is_refused() {
        let row = ClusterRow { format: keys::FORMAT + 1, ..ClusterRow::default() };
        let restoring = Restoring::new(Base::of_second(1), false);
        let error = restoring.row(&keys::cluster(), row.encode_to_vec()).unwrap_err();
        assert!(error.to_string().contains("keyspace format"), "{error}");
    }
}
