//! Directories of which every name is known, because this client made them and every name in them: what is not among
//! the names is not there, without a question. Filling a new directory asks before each name whether it is free.
//!
//! A directory's version tells whether that still holds. The answer to the making of a name says the directory's version
//! after it; one more than the version known before means that nobody else changed anything in between.

use crate::leases::Term;
use bytes::Bytes;
use dfs_proto::InodeNo;
use dfs_proto::limits::NAME_MAX;
use lru::LruCache;
use std::collections::HashSet;
use std::num::NonZeroUsize;

/// Directories known as a whole at the same time, the least recently used go first.
const DIRS_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();
/// Names of one of them; beyond, it is one like any other.
const NAMES_MAX: usize = 4096;

struct Whole {
    version: u64,
    names: HashSet<Bytes>,
    term: Term,
}

/// The directories that are known as a whole.
pub struct WholeDirs(LruCache<InodeNo, Whole>);

impl WholeDirs {
    #[must_use]
    pub fn new() -> Self {
        Self(LruCache::new(DIRS_MAX))
    }

    /// This client made a directory, which has this version and is empty.
    pub fn made(&mut self, dir: InodeNo, version: u64, term: Term) {
        self.0.put(dir, Whole { version, names: HashSet::new(), term });
    }

    /// This client made a name in a directory, which has this version now.
    pub fn added(&mut self, dir: InodeNo, name: &Bytes, version: u64) {
        let Some(whole) = self.0.get_mut(&dir) else { return };
        if version != whole.version + 1 || whole.names.len() >= NAMES_MAX {
            self.0.pop(&dir);
            return;
        }
        whole.version = version;
        whole.names.insert(name.clone());
    }

    /// Something else happened to a directory.
    pub fn forget(&mut self, dir: InodeNo) {
        self.0.pop(&dir);
    }

    /// In which term it may be believed that a directory has no such name, if that is known. A name that no directory can have
    /// is the master's to refuse.
    #[must_use]
    pub fn lacks(&mut self, dir: InodeNo, name: &[u8]) -> Option<Term> {
        if name.len() > NAME_MAX {
            return None;
        }
        let whole = self.0.get(&dir)?;
        (!whole.names.contains(name)).then_some(whole.term)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leases::Kind;
    use crate::leases::testing::{SEEN, leases};

    #[test]
    fn a_directory_is_known_as_a_whole_until_somebody_else_changes_it() {
        let (dir, (leases, _)) = (InodeNo(7), leases());
        leases.granted(dir, Kind::Read, 1, SEEN);
        let term = leases.term(dir).expect("held");
        let mut dirs = WholeDirs::new();
        let name = |name: &'static str| Bytes::from_static(name.as_bytes());
        // Nothing is known of a directory that was there before.
        dirs.added(dir, &name("a"), 2);
        assert_eq!(dirs.lacks(dir, b"b"), None);
        dirs.made(dir, 1, term);
        dirs.added(dir, &name("a"), 2);
        assert_eq!((dirs.lacks(dir, b"a"), dirs.lacks(dir, b"b")), (None, Some(term)));
        assert_eq!(
            (dirs.lacks(dir, &[b'n'; NAME_MAX]), dirs.lacks(dir, &[b'n'; NAME_MAX + 1])),
            (Some(term), None)
        );
        // Version 3 was somebody else's doing.
        dirs.added(dir, &name("b"), 4);
        assert_eq!(dirs.lacks(dir, b"c"), None);
        dirs.made(dir, 1, term);
        dirs.forget(dir);
        assert_eq!(dirs.lacks(dir, b"c"), None);
        dirs.made(dir, 0, term);
        for count in 1..=NAMES_MAX as u64 + 1 {
            dirs.added(dir, &Bytes::from(count.to_string()), count);
        }
        assert_eq!(dirs.lacks(dir, b"c"), None);
    }
}
