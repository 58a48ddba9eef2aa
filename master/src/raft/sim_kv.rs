//! The simulated state store: keeps what was flushed apart from what was applied, and takes the digest of the whole state
//! after every entry, so that replicas can be compared at each index (I7).

use super::codec::AppliedRow;
use crate::state::kv::Each;
use crate::state::{Kv, MemKv, WriteSet, keys};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

/// The store of one simulated master.
#[derive(Default)]
pub struct SimKv {
    rows: MemKv,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// The sum of the rows' hashes.
    digest: u64,
    /// Of each entry applied since they were asked for last: its index, and the digest after it.
    digests: Vec<(u64, u64)>,
    flushed: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What a crash leaves of the state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Left {
    All,
    /// What was flushed last.
    Flushed,
    Nothing,
}

fn hash(key: &[u8], value: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, value).hash(&mut hasher);
    hasher.finish()
}

impl SimKv {
    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The digest of the state after each entry that was applied since the last call.
    pub fn take_digests(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.seen().digests)
    }

    fn all(&self) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
        let mut rows = BTreeMap::new();
        self.rows.scan(&[], &keys::everything().1, &mut |key, value| {
            rows.insert(key.to_vec(), value.to_vec());
            ControlFlow::Continue(())
        })?;
        Ok(rows)
    }

    /// The machine stopped: this much of the state is there when it starts again.
    ///
    /// # Errors
    /// When the rows cannot be read.
    pub fn crash(&self, left: Left) -> io::Result<()> {
        let kept = match left {
            Left::All => return Ok(()),
            Left::Flushed => self.seen().flushed.clone(),
            Left::Nothing => BTreeMap::new(),
        };
        let mut writes: WriteSet = self.all()?.into_keys().map(|key| (key, None)).collect();
        writes.extend(kept.into_iter().map(|(key, value)| (key, Some(value))));
        self.change(&writes)
    }

    fn change(&self, writes: &WriteSet) -> io::Result<()> {
        let mut seen = self.seen();
        for (key, value) in writes.iter().filter(|(key, _)| key.first() != Some(&keys::tag::RAFT)) {
            if let Some(before) = self.rows.get(key)? {
                seen.digest = seen.digest.wrapping_sub(hash(key, &before));
            }
            if let Some(value) = value {
                seen.digest = seen.digest.wrapping_add(hash(key, value));
            }
        }
        self.rows.apply(writes)
    }
}

impl Kv for SimKv {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.rows.get(key)
    }
    fn scan(&self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        self.rows.scan(from, to, each)
    }
    fn last(&self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        self.rows.last(from, to)
    }
    fn apply(&self, writes: &WriteSet) -> io::Result<()> {
        self.change(writes)?;
        let applied = writes.get([keys::tag::RAFT].as_slice()).and_then(Option::as_ref);
        if let Some(last) = applied.map(|row| AppliedRow::read(row)).transpose()?.and_then(|row| row.last()) {
            let mut seen = self.seen();
            let digest = seen.digest;
            seen.digests.push((last.index, digest));
        }
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        let rows = self.all()?;
        self.seen().flushed = rows;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(kv: &SimKv, key: &[u8], value: Option<&[u8]>) {
        kv.apply(&WriteSet::from([(key.to_vec(), value.map(<[u8]>::to_vec))])).unwrap();
    }

    #[test]
    fn a_digest_depends_on_the_rows_and_not_on_the_way_to_them() {
        let (one, other) = (SimKv::default(), SimKv::default());
        put(&one, b"\x02a", Some(b"1"));
        put(&one, b"\x02b", Some(b"2"));
        put(&one, b"\x02a", None);
        put(&other, b"\x02b", Some(b"2"));
        assert_eq!(one.seen().digest, other.seen().digest);
        put(&other, b"\x02b", Some(b"3"));
        assert_ne!(one.seen().digest, other.seen().digest);
    }

    #[test]
    fn a_crash_leaves_what_was_flushed_or_nothing() {
        let kv = SimKv::default();
        put(&kv, b"\x02a", Some(b"1"));
        kv.flush().unwrap();
        put(&kv, b"\x02b", Some(b"2"));
        kv.crash(Left::All).unwrap();
        assert!(kv.get(b"\x02b").unwrap().is_some());
        kv.crash(Left::Flushed).unwrap();
        assert_eq!((kv.get(b"\x02a").unwrap(), kv.get(b"\x02b").unwrap()), (Some(b"1".to_vec()), None));
        kv.crash(Left::Nothing).unwrap();
        assert_eq!(kv.get(b"\x02a").unwrap(), None);
    }
}
