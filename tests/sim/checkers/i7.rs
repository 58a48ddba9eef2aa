//! I7: every replica of the state machine is byte-identical at the same index.

use crate::workload::Violation;
use dfs_master::raft::SimStorage;
use dfs_master::state::keys;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

fn rows(storage: &SimStorage) -> Result<Rows, Violation> {
    let mut rows = Rows::new();
    let end = [0xff; 64];
    storage
        .kv()
        .scan(&[], &end, &mut |key, value| {
            rows.insert(key.to_vec(), value.to_vec());
            ControlFlow::Continue(())
        })
        .map_err(|error| format!("I7: cannot read a state: {error}"))?;
    Ok(rows)
}

/// The digests of the state at every index that a master has applied.
#[derive(Default)]
pub struct States {
    seen: BTreeMap<u64, (usize, u64)>,
    /// How often two were compared.
    pub compared: u64,
}

impl States {
    /// Compares what the masters have applied since the last call.
    pub fn observe(&mut self, masters: &[Arc<SimStorage>]) -> Result<(), Violation> {
        for (master, storage) in (1..).zip(masters) {
            for (index, digest) in storage.take_digests() {
                let Some((other, known)) = self.seen.insert(index, (master, digest)) else { continue };
                self.compared += 1;
                if known != digest {
                    return Err(format!("I7: masters {other} and {master} differ after entry {index}"));
                }
            }
        }
        Ok(())
    }

    /// Whether some master has applied all that any has ever applied.
    pub fn is_known(&self, masters: &[Arc<SimStorage>]) -> Result<bool, Violation> {
        let last = self.seen.last_key_value().map_or(0, |(index, _)| *index);
        for storage in masters {
            let applied = storage.applied().map_err(|error| format!("I7: cannot read a state: {error}"))?;
            if applied.unwrap_or(0) >= last {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether all masters have applied the same entries: their states say how far they are.
pub fn alike(masters: &[Arc<SimStorage>]) -> Result<bool, Violation> {
    let mut applied = Vec::new();
    for storage in masters {
        let at = storage
            .kv()
            .get(&[keys::tag::RAFT])
            .map_err(|error| format!("I7: cannot read a state: {error}"))?;
        applied.push(at);
    }
    Ok(applied.windows(2).all(|pair| pair[0] == pair[1]))
}

/// Compares the masters' whole states. They have come to rest, so all have applied the same index.
pub fn check(masters: &[Arc<SimStorage>]) -> Result<(), Violation> {
    let states = masters.iter().map(|storage| rows(storage)).collect::<Result<Vec<_>, _>>()?;
    for (index, state) in states.iter().enumerate().skip(1) {
        let other = states[0].iter().find(|(key, value)| state.get(*key) != Some(value));
        let extra = state.iter().find(|(key, _)| !states[0].contains_key(*key));
        if let Some((key, _)) = other.or(extra) {
            return Err(format!("I7: masters 1 and {} differ at key {key:02x?}", index + 1));
        }
    }
    if states[0].len() < 10 {
        Err("I7: the states are all but empty: nothing was compared".to_owned())
    } else {
        Ok(())
    }
}
