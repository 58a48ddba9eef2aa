//! What is left of removed directories, FIFOs, sockets and devices. The kernel opens these without asking, so nobody
//! else knows that a program still has one: its attributes live on here, for `fstat`, `fchmod` and the like of this
//! client's programs, and nothing else of it does.

use crate::write::attrs::AttrSet;
use dfs_proto::InodeNo;
use dfs_proto::v1::{Attr, Cred, Kind, SetAttr, Timestamp};
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The least recently used are forgotten; what asks for them then gets ESTALE.
const INODES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

pub struct Remains(Mutex<LruCache<InodeNo, Attr>>);

impl Default for Remains {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(INODES)))
    }
}

impl Remains {
    fn lock(&self) -> MutexGuard<'_, LruCache<InodeNo, Attr>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An inode may have lost its last name.
    pub fn keep(&self, attr: &Attr) {
        if attr.nlink == 0 && attr.kind != Kind::File as i32 {
            self.lock().put(InodeNo(attr.ino), *attr);
        }
    }

    pub fn attr(&self, ino: InodeNo) -> Option<Attr> {
        self.lock().get(&ino).copied()
    }

    /// Changes attributes of what is gone: the kernel has checked the right to.
    pub fn change(&self, cred: &Cred, change: &SetAttr, now: Timestamp) -> Option<Attr> {
        let mut inodes = self.lock();
        let attr = inodes.get_mut(&InodeNo(change.ino))?;
        let mut change = *change;
        change.atime = if std::mem::take(&mut change.atime_now) { Some(now) } else { change.atime };
        change.mtime = if std::mem::take(&mut change.mtime_now) { Some(now) } else { change.mtime };
        let chowned = std::mem::take(&mut change.kill_priv) || change.uid.is_some() || change.gid.is_some();
        let set = AttrSet::of(&change)?;
        if chowned && attr.kind != Kind::Dir as i32 {
            attr.mode = cred.end_privileges(attr.mode, attr.gid);
        }
        set.show(attr);
        attr.ctime = Some(now);
        Some(*attr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_directories_keep_their_attributes_for_those_who_have_them() {
        let (remains, root) = (Remains::default(), Cred::default());
        let now = Timestamp { seconds: 9, nanos: 0 };
        let dir = Attr { ino: 7, kind: Kind::Dir.into(), mode: 0o755, ..Attr::default() };
        remains.keep(&Attr { nlink: 1, ..dir });
        remains.keep(&Attr { kind: Kind::File.into(), ..dir });
        assert_eq!(remains.attr(InodeNo(7)), None);
        remains.keep(&dir);
        let change = SetAttr { ino: 7, mode: Some(0o700), mtime_now: true, ..SetAttr::default() };
        let changed = remains.change(&root, &change, now).expect("kept");
        assert_eq!((changed.mode, changed.mtime, changed.ctime), (0o700, Some(now), Some(now)));
        assert_eq!(remains.attr(InodeNo(7)), Some(changed));
        assert_eq!(remains.change(&root, &SetAttr { size: Some(1), ..change }, now), None);
        assert_eq!(remains.change(&root, &SetAttr { ino: 8, ..change }, now), None);
        // Whoever owns it now has not made it set-user-id.
        remains.keep(&Attr { ino: 9, kind: Kind::Fifo.into(), mode: 0o6755, ..Attr::default() });
        let chown = SetAttr { ino: 9, uid: Some(5), ..SetAttr::default() };
        assert_eq!(remains.change(&root, &chown, now).map(|attr| attr.mode), Some(0o755));
    }
}
