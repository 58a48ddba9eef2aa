//! The store under the state machine: a narrow trait, its twin in memory, and a transaction over either.

use std::collections::BTreeMap;
use std::io;
use std::ops::{Bound, ControlFlow};
use std::sync::{PoisonError, RwLock};

/// What a batch changes: the new value of each key, or None where it is deleted.
pub type WriteSet = BTreeMap<Vec<u8>, Write>;

/// A key's new value, or None where it is deleted.
pub type Write = Option<Vec<u8>>;

/// What a scan calls for each key and value.
pub type Each<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// An ordered map of bytes to bytes, with atomic batches.
pub trait Kv: Send + Sync + 'static {
    /// The key's value.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>>;

    /// Calls `each` for the keys in `[from, to)`, in order, until it breaks. `each` must not call the store.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn scan(&self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()>;

    /// The greatest key in `[from, to)`, with its value.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn last(&self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>>;

    /// Makes all of the writes visible at once, or none of them.
    ///
    /// # Errors
    /// When the store cannot be written; then nothing has changed.
    fn apply(&self, writes: &WriteSet) -> io::Result<()>;

    /// Puts what was applied on disk, as far as the store can.
    ///
    /// # Errors
    /// When the store cannot be written.
    fn flush(&self) -> io::Result<()>;
}

/// The store in memory: for simulation and tests.
#[derive(Default)]
pub struct MemKv {
    rows: RwLock<BTreeMap<Vec<u8>, Vec<u8>>>,
}

type Bounds<'k> = (Bound<&'k [u8]>, Bound<&'k [u8]>);

fn range<'k>(from: &'k [u8], to: &'k [u8]) -> Option<Bounds<'k>> {
    // BTreeMap panics on a range that ends before it begins; to us it is merely empty.
    (from < to).then_some((Bound::Included(from), Bound::Excluded(to)))
}

impl MemKv {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl Kv for MemKv {
    fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Ok(self.rows.read().unwrap_or_else(PoisonError::into_inner).get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(range) = range(from, to) {
            for (key, value) in rows.range::<[u8], _>(range) {
                if each(key, value).is_break() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn last(&self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        let rows = self.rows.read().unwrap_or_else(PoisonError::into_inner);
        let last = range(from, to).and_then(|range| rows.range::<[u8], _>(range).next_back());
        Ok(last.map(|(key, value)| (key.clone(), value.clone())))
    }

    fn apply(&self, writes: &WriteSet) -> io::Result<()> {
        let mut rows = self.rows.write().unwrap_or_else(PoisonError::into_inner);
        for (key, value) in writes {
            match value {
                Some(value) => rows.insert(key.clone(), value.clone()),
                None => rows.remove(key),
            };
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A transaction: sees the store through the writes made so far, and can take back those of the command under way.
pub struct Tx<'k> {
    base: &'k dyn Kv,
    writes: WriteSet,
    /// What `writes` held before each write of this command, oldest first.
    undo: Vec<(Vec<u8>, Option<Write>)>,
}

impl<'k> Tx<'k> {
    /// A transaction without writes.
    pub fn new(base: &'k dyn Kv) -> Self {
        Self { base, writes: WriteSet::new(), undo: Vec::new() }
    }

    /// The key's value, as this transaction sees it.
    pub fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        Over { layers: &[&self.writes], base: self.base }.get(key)
    }

    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.write(key, Some(value));
    }

    pub fn delete(&mut self, key: Vec<u8>) {
        self.write(key, None);
    }

    fn write(&mut self, key: Vec<u8>, value: Write) {
        let before = self.writes.insert(key.clone(), value);
        self.undo.push((key, before));
    }

    /// Keeps the writes made so far: a later [`Tx::rollback`] stops here.
    pub fn keep(&mut self) {
        self.undo.clear();
    }

    /// Takes back the writes since the last [`Tx::keep`].
    pub fn rollback(&mut self) {
        while let Some((key, before)) = self.undo.pop() {
            match before {
                Some(value) => self.writes.insert(key, value),
                None => self.writes.remove(&key),
            };
        }
    }

    /// Ends the transaction: what it wrote.
    pub fn into_writes(self) -> WriteSet {
        self.writes
    }

    /// As [`Kv::scan`], writes of this transaction included.
    pub fn scan(&self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        Over { layers: &[&self.writes], base: self.base }.scan(from, to, each)
    }

    /// As [`Kv::last`], writes of this transaction included.
    pub fn last(&self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        Over { layers: &[&self.writes], base: self.base }.last(from, to)
    }
}

/// A store as it looks once writes are applied that it does not have yet.
#[derive(Clone, Copy)]
pub struct Over<'a> {
    /// The newest first.
    pub layers: &'a [&'a WriteSet],
    pub base: &'a dyn Kv,
}

impl<'a> Over<'a> {
    /// The newest layer, and all that is below it.
    fn split(self) -> Option<(&'a WriteSet, Self)> {
        let (newest, layers) = self.layers.split_first()?;
        Some((newest, Self { layers, ..self }))
    }

    /// As [`Kv::get`].
    pub fn get(self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        match self.layers.iter().find_map(|writes| writes.get(key)) {
            Some(value) => Ok(value.clone()),
            None => self.base.get(key),
        }
    }

    /// As [`Kv::scan`].
    pub fn scan(self, from: &[u8], to: &[u8], each: &mut Each<'_>) -> io::Result<()> {
        let Some((writes, below)) = self.split() else { return self.base.scan(from, to, each) };
        let Some(range) = range(from, to) else { return Ok(()) };
        let mut ours = writes.range::<[u8], _>(range).peekable();
        let mut stopped = false;
        below.scan(from, to, &mut |key, value| {
            while let Some((our_key, our_value)) = ours.next_if(|(our_key, _)| our_key.as_slice() <= key) {
                if let Some(our_value) = our_value
                    && each(our_key, our_value).is_break()
                {
                    stopped = true;
                    return ControlFlow::Break(());
                }
                if our_key == key {
                    return ControlFlow::Continue(());
                }
            }
            let flow = each(key, value);
            stopped = flow.is_break();
            flow
        })?;
        if !stopped {
            for (key, value) in ours {
                if let Some(value) = value
                    && each(key, value).is_break()
                {
                    break;
                }
            }
        }
        Ok(())
    }

    /// As [`Kv::last`].
    pub fn last(self, from: &[u8], to: &[u8]) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        let Some((writes, below)) = self.split() else { return self.base.last(from, to) };
        let Some(bounds) = range(from, to) else { return Ok(None) };
        let ours =
            writes.range::<[u8], _>(bounds).rev().find_map(|(key, value)| Some((key, value.as_ref()?)));
        let mut end = to.to_vec();
        loop {
            let theirs = below.last(from, &end)?;
            return Ok(match (ours, theirs) {
                (Some((key, value)), Some((their_key, _))) if *key >= their_key => {
                    Some((key.clone(), value.clone()))
                }
                (_, Some((their_key, their_value))) => match writes.get(&their_key) {
                    // Deleted here (what is overwritten here was found in `ours`): look below it.
                    Some(_) => {
                        end = their_key;
                        continue;
                    }
                    None => Some((their_key, their_value)),
                },
                (Some((key, value)), None) => Some((key.clone(), value.clone())),
                (None, None) => None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Put(u8, u8),
        Delete(u8),
        Keep,
        Rollback,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0_u8..16, any::<u8>()).prop_map(|(key, value)| Step::Put(key, value)),
            3 => (0_u8..16).prop_map(Step::Delete),
            1 => Just(Step::Keep),
            1 => Just(Step::Rollback),
        ]
    }

    proptest! {
        #[test]
        fn a_transaction_reads_as_if_its_writes_were_applied(
            base in prop::collection::btree_map(0_u8..16, any::<u8>(), 0..10),
            steps in prop::collection::vec(step(), 0..40),
            from in 0_u8..17, to in 0_u8..17, take in 1_usize..20,
        ) {
            let kv = MemKv::new();
            kv.apply(&base.iter().map(|(k, v)| (vec![*k], Some(vec![*v]))).collect()).unwrap();
            let mut tx = Tx::new(&kv);
            let mut model: BTreeMap<u8, u8> = base;
            let mut kept = model.clone();
            for step in steps {
                match step {
                    Step::Put(k, v) => { tx.put(vec![k], vec![v]); model.insert(k, v); }
                    Step::Delete(k) => { tx.delete(vec![k]); model.remove(&k); }
                    Step::Keep => { tx.keep(); kept = model.clone(); }
                    Step::Rollback => { tx.rollback(); model = kept.clone(); }
                }
            }
            let mut seen = Vec::new();
            tx.scan(&[from], &[to], &mut |key, value| {
                seen.push((key[0], value[0]));
                if seen.len() == take { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            }).unwrap();
            let inside: Vec<(u8, u8)> = model.iter().map(|(k, v)| (*k, *v)).filter(|(k, _)| from <= *k && *k < to).collect();
            prop_assert_eq!(seen, inside.iter().copied().take(take).collect::<Vec<_>>());
            let last = tx.last(&[from], &[to]).unwrap().map(|(k, v)| (k[0], v[0]));
            prop_assert_eq!(last, inside.last().copied());
            for key in 0..16 {
                prop_assert_eq!(tx.get(&[key]).unwrap(), model.get(&key).map(|value| vec![*value]));
            }
            kv.apply(&tx.into_writes()).unwrap();
            for key in 0..16 {
                prop_assert_eq!(kv.get(&[key]).unwrap(), model.get(&key).map(|value| vec![*value]));
            }
        }
    }
}
