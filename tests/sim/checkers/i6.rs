//! I6: every mutation is applied exactly once, whatever is retried. Each change of a directory's names advances the
//! directory's version by one; each was acknowledged once, and nobody but its client changes it.

use crate::workload::Violation;
use dfs_master::raft::SimStorage;
use dfs_proto::InodeNo;
use dfs_proto::v1::{Cred, GetAttr, Query, answer, query};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Compares directories' versions with how many changes of their names were acknowledged.
pub fn check(masters: &[Arc<SimStorage>], acknowledged: &BTreeMap<InodeNo, u64>) -> Result<(), Violation> {
    for (dir, changes) in acknowledged {
        for (index, storage) in masters.iter().enumerate() {
            let op = query::Op::GetAttr(GetAttr { ino: dir.get(), generation: 0 });
            let answer = dfs_master::state::query(storage.kv(), &Cred::default(), &Query { op: Some(op) })
                .map_err(|error| format!("I6: cannot read a state: {error}"))?;
            let Some(answer::Body::Entry(entry)) = answer.body else {
                return Err(format!("I6: directory {dir} is gone: {answer:?}"));
            };
            // Its own making is version 1.
            let applied = entry.attr.unwrap_or_default().version.saturating_sub(1);
            if applied != *changes {
                return Err(format!(
                    "I6: master {} applied {applied} changes of directory {dir}, {changes} were acknowledged",
                    index + 1
                ));
            }
        }
    }
    if acknowledged.values().all(|changes| *changes < 10) {
        return Err("I6: next to nothing was changed".to_owned());
    }
    Ok(())
}
