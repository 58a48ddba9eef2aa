//! Which proofs of orders are still good: each is good once.
//!
//! A proof is made for the challenge of one term of one leader, so what an earlier one obeyed, or this one before it was started
//! again, is worth nothing. Within its term the leader remembers what it has obeyed, for as long as a proof is not too old; and as
//! many as it can, the newest: what is no newer than one that was forgotten is refused, as if it had been used.

use bytes::Bytes;
use dfs_proto::limits::{PROOF_MS, PROOFS_MAX};
use std::collections::BTreeSet;

/// The proofs that were used in a term.
#[derive(Default)]
pub struct Proofs {
    /// By the time that they name.
    used: BTreeSet<(u64, Bytes)>,
    /// Of this time and before, none is good.
    floor_ms: u64,
}

/// Why a proof that is right is not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// It is older, or of a later time, than clocks differ.
    OtherTime,
    /// It was used, or cannot be told from one that was.
    Used,
}

impl Proofs {
    /// Uses a proof of the time `at_ms`, up at the leader's time `now_ms`; both in milliseconds since 1970.
    ///
    /// # Errors
    /// It is not good (any more).
    pub fn take(&mut self, now_ms: u64, at_ms: u64, proof: Bytes) -> Result<(), Bad> {
        if now_ms.abs_diff(at_ms) > PROOF_MS {
            return Err(Bad::OtherTime);
        }
        // Also when the clock is set back: what was forgotten never gets good again.
        while let Some((oldest, _)) = self.used.first()
            && (oldest.saturating_add(PROOF_MS) < now_ms || self.used.len() >= PROOFS_MAX)
        {
            self.floor_ms = self.floor_ms.max(*oldest);
            self.used.pop_first();
        }
        if at_ms <= self.floor_ms || !self.used.insert((at_ms, proof)) {
            return Err(Bad::Used);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000_000;

    fn proof(number: usize) -> Bytes {
        Bytes::from(number.to_le_bytes().to_vec())
    }

    #[test]
    fn a_proof_is_good_once_and_only_about_now() {
        let mut proofs = Proofs::default();
        assert_eq!(proofs.take(NOW, NOW, proof(1)), Ok(()));
        assert_eq!(proofs.take(NOW, NOW, proof(1)), Err(Bad::Used));
        assert_eq!(proofs.take(NOW + 5, NOW, proof(2)), Ok(()), "another order in the same moment");
        for at in [NOW - PROOF_MS - 1, NOW + PROOF_MS + 1, 0, u64::MAX] {
            assert_eq!(proofs.take(NOW, at, proof(3)), Err(Bad::OtherTime));
        }
        assert_eq!(proofs.take(NOW, NOW - PROOF_MS, proof(4)), Ok(()));
        assert_eq!(proofs.take(NOW, NOW + PROOF_MS, proof(5)), Ok(()));
    }

    #[test]
    fn what_is_forgotten_is_not_good_again_even_if_the_clock_is_set_back() {
        let mut proofs = Proofs::default();
        assert_eq!(proofs.take(NOW, NOW, proof(1)), Ok(()));
        let later = NOW + PROOF_MS + 1;
        assert_eq!(proofs.take(later, later, proof(2)), Ok(()));
        assert_eq!(proofs.used.len(), 1, "the first is too old to be shown again");
        assert_eq!(proofs.take(NOW, NOW, proof(1)), Err(Bad::Used));
        assert_eq!(proofs.take(NOW, NOW + 1, proof(3)), Ok(()));
    }

    #[test]
    fn they_are_bounded_in_number_and_the_oldest_go_first() {
        let mut proofs = Proofs::default();
        for number in 0..PROOFS_MAX + 10 {
            assert_eq!(proofs.take(NOW, NOW + number as u64, proof(number)), Ok(()));
            assert!(proofs.used.len() <= PROOFS_MAX);
        }
        for number in 0..PROOFS_MAX + 10 {
            assert_eq!(proofs.take(NOW, NOW + number as u64, proof(number)), Err(Bad::Used), "{number}");
        }
    }
}
