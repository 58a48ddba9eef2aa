//! I10: live bytes of a chunk = the sum of its extents that have users; nlink = the number of dentries.

use crate::workload::Violation;
use dfs_master::raft::SimStorage;
use std::sync::Arc;

/// Proves it over each master's state.
pub fn check(masters: &[Arc<SimStorage>]) -> Result<(), Violation> {
    for (index, storage) in masters.iter().enumerate() {
        let violations = dfs_master::state::check_invariants(storage.kv());
        if let Some(first) = violations.first() {
            return Err(format!("I10: master {}: {first} ({} in all)", index + 1, violations.len()));
        }
    }
    Ok(())
}
