//! What the kernel has open: numbers for it, things for us.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// Open things by the number that the kernel got. Bounded by the kernel's own limits on open files.
pub struct Handles<T> {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<T>>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { next: AtomicU64::new(1), open: RwLock::default() }
    }
}

// A poisoned map is whole: every change is a single step.
impl<T> Handles<T> {
    pub fn insert(&self, thing: T) -> fuser::FileHandle {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::new(thing));
        fuser::FileHandle(number)
    }

    pub fn get(&self, handle: fuser::FileHandle) -> Option<Arc<T>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&handle.0).cloned()
    }

    /// The latest moment that any of them names.
    pub fn latest(&self, moment: impl Fn(&T) -> Option<std::time::Instant>) -> Option<std::time::Instant> {
        self.open
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .filter_map(|thing| moment(thing))
            .max()
    }

    pub fn any(&self, wanted: impl Fn(&T) -> bool) -> bool {
        self.open.read().unwrap_or_else(PoisonError::into_inner).values().any(|thing| wanted(thing))
    }

    pub fn remove(&self, handle: fuser::FileHandle) -> Option<Arc<T>> {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_never_used_again() {
        let handles = Handles::default();
        let first = handles.insert('a');
        assert_eq!(handles.remove(first).as_deref(), Some(&'a'));
        let second = handles.insert('b');
        assert_ne!(first, second);
        assert!(handles.get(first).is_none());
        assert_eq!(handles.get(second).as_deref(), Some(&'b'));
        assert!(handles.any(|thing| *thing == 'b') && !handles.any(|thing| *thing == 'a'));
    }
}
