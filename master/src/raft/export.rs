//! A consistent view of the state for a snapshot, read piece by piece while the state goes on changing.
//!
//! An export walks the keys in order; its cursor is the first key not read yet. Before a batch changes a key at or above
//! the cursor, the value from the time the export began (the pre-image) is put aside; reading a piece takes what was put
//! aside in place of what the store says. A key is put aside once, as only its first change hides its old value.

use crate::state::{Kv, WriteSet, keys};
use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Rows in key order.
pub type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// The exports that are under way, and the gate that every change of the store goes through.
#[derive(Default)]
pub struct Exports {
    /// By number. Taken before anything is read from or written to the store.
    active: Mutex<BTreeMap<u64, Export>>,
}

struct Export {
    cursor: Vec<u8>,
    /// Pre-images of keys at or above the cursor; None: there was no such key.
    kept: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

/// What reading an export gives.
pub enum Piece {
    Rows(Rows),
    End,
    /// A new state took its place.
    Cancelled,
}

impl Exports {
    fn active(&self) -> MutexGuard<'_, BTreeMap<u64, Export>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins an export of the state as it is now, under a number of its own.
    pub fn begin(&self, number: u64) {
        self.active().insert(number, Export { cursor: keys::everything().0, kept: BTreeMap::new() });
    }

    /// The same, with a row that is not exported as it is at that moment.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn begin_with(&self, kv: &dyn Kv, number: u64, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        // Nothing is applied while it is locked.
        let mut active = self.active();
        let row = kv.get(key)?;
        active.insert(number, Export { cursor: keys::everything().0, kept: BTreeMap::new() });
        Ok(row)
    }

    /// Ends the export, if it is still under way.
    pub fn end(&self, number: u64) {
        self.active().remove(&number);
    }

    /// Ends whatever exports are under way: the state is about to be replaced.
    pub fn cancel(&self) {
        self.active().clear();
    }

    /// Changes the store.
    ///
    /// # Errors
    /// When the store cannot be read or written.
    pub fn apply(&self, kv: &dyn Kv, writes: &WriteSet) -> io::Result<()> {
        let mut active = self.active();
        for export in active.values_mut() {
            for key in writes.range(export.cursor.clone()..).map(|(key, _)| key) {
                if !export.kept.contains_key(key) {
                    export.kept.insert(key.clone(), kv.get(key)?);
                }
            }
        }
        kv.apply(writes)
    }

    /// The next rows of the export, about `max_bytes` of them.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn next(&self, kv: &dyn Kv, number: u64, max_bytes: usize) -> io::Result<Piece> {
        let mut active = self.active();
        let Some(export) = active.get_mut(&number) else {
            return Ok(Piece::Cancelled);
        };
        let end = keys::everything().1;
        let (mut rows, mut bytes, mut full) = (BTreeMap::new(), 0, false);
        kv.scan(&export.cursor, &end, &mut |key, value| {
            bytes += key.len() + value.len();
            rows.insert(key.to_vec(), value.to_vec());
            full = bytes >= max_bytes;
            if full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        // The least key that this piece says nothing about.
        let next = match rows.last_key_value() {
            Some((last, _)) if full => [last.as_slice(), &[0]].concat(),
            _ => end,
        };
        let later = export.kept.split_off(&next);
        for (key, value) in std::mem::replace(&mut export.kept, later) {
            match value {
                Some(value) => rows.insert(key, value),
                None => rows.remove(&key),
            };
        }
        let ended = export.cursor >= next;
        export.cursor = next;
        // A piece may be empty although more follows: everything in it was new since the export began.
        Ok(if ended { Piece::End } else { Piece::Rows(rows.into_iter().collect()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::MemKv;
    use proptest::prelude::*;

    fn writes() -> impl Strategy<Value = WriteSet> {
        prop::collection::btree_map(
            (1_u8..4, 0_u8..20).prop_map(|(tag, key)| vec![tag, key]),
            prop::option::of(prop::collection::vec(any::<u8>(), 0..4)),
            0..8,
        )
    }

    fn rows(kv: &MemKv) -> Rows {
        let (from, to) = keys::everything();
        let mut rows = Rows::new();
        kv.scan(&from, &to, &mut |key, value| {
            rows.push((key.to_vec(), value.to_vec()));
            ControlFlow::Continue(())
        })
        .unwrap();
        rows
    }

    proptest! {
        #[test]
        fn an_export_shows_the_state_at_its_beginning_whatever_is_written_meanwhile(
            before in prop::collection::vec(writes(), 0..8),
            meanwhile in prop::collection::vec((writes(), any::<bool>()), 0..40),
            piece in 1_usize..40,
        ) {
            let (kv, exports) = (MemKv::new(), Exports::default());
            for writes in &before {
                exports.apply(&kv, writes).unwrap();
            }
            let expected = rows(&kv);
            exports.begin(7);
            let mut seen = Rows::new();
            let mut steps = meanwhile.into_iter();
            loop {
                if let Some((writes, pause)) = steps.next() {
                    exports.apply(&kv, &writes).unwrap();
                    if pause {
                        continue;
                    }
                }
                match exports.next(&kv, 7, piece).unwrap() {
                    Piece::Rows(rows) => seen.extend(rows),
                    Piece::End => break,
                    Piece::Cancelled => panic!("nobody cancelled it"),
                }
            }
            prop_assert_eq!(seen, expected);
            exports.end(7);
            prop_assert!(exports.active().is_empty());
        }
    }

    #[test]
    fn exports_side_by_side_show_each_its_own_beginning() {
        let (kv, exports) = (MemKv::new(), Exports::default());
        let write = |value: u8| WriteSet::from([(vec![1, 1], Some(vec![value]))]);
        exports.apply(&kv, &write(1)).unwrap();
        exports.begin(1);
        exports.apply(&kv, &write(2)).unwrap();
        exports.begin(2);
        exports.apply(&kv, &write(3)).unwrap();
        let shown = |number| match exports.next(&kv, number, 9).unwrap() {
            Piece::Rows(rows) => rows[0].1[0],
            Piece::End | Piece::Cancelled => panic!("it has a row"),
        };
        assert_eq!((shown(2), shown(1)), (2, 1));
        exports.end(1);
        assert!(matches!(exports.next(&kv, 1, 9).unwrap(), Piece::Cancelled));
        assert!(matches!(exports.next(&kv, 2, 9).unwrap(), Piece::End));
        exports.cancel();
        assert!(matches!(exports.next(&kv, 2, 9).unwrap(), Piece::Cancelled));
    }
}
