//! Access tokens: what a client shows a chunk daemon to prove that the master let it read or append.
//!
//! A token is 26 bytes and a MAC: `version u8, rights u8, session u64, chunk u64, expiry_ms u64` (little endian), then
//! the first 16 bytes of HMAC-SHA-256 under the cluster key (RFC 2104). Whoever merely reaches a daemon's port has no key.

use crate::ids::{ChunkId, SessionId};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

const VERSION: u8 = 1;
const BODY: usize = 26;
const MAC: usize = 16;

/// The secret that masters and chunk daemons of one cluster share. Clients never have it.
#[derive(Clone)]
pub struct ClusterKey(Vec<u8>);

/// What the holder of a token may do; rights add up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rights(pub u8);

impl Rights {
    pub const READ: Self = Self(1);
    pub const APPEND: Self = Self(2);

    /// Whether these rights include all of `other`.
    #[must_use]
    pub const fn include(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These rights and the others.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Why a token was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    #[error("no access token")]
    Missing,
    #[error("the access token is malformed or was not issued by this cluster")]
    Forged,
    #[error("the access token is for another chunk")]
    WrongChunk,
    #[error("the access token does not give this right")]
    Rights,
    #[error("the access token has expired")]
    Expired,
}

impl ClusterKey {
    /// A key from the cluster key file's bytes, white space at the ends left out.
    ///
    /// # Errors
    /// When fewer than 16 bytes remain.
    pub fn new(secret: &[u8]) -> Result<Self, &'static str> {
        let secret = secret.trim_ascii();
        if secret.len() < 16 {
            return Err("the cluster key must have at least 16 bytes");
        }
        Ok(Self(secret.to_vec()))
    }

    /// The cluster's name to itself: 16 hex digits that tell one key's cluster from another's and give nothing away.
    #[must_use]
    pub fn cluster_id(&self) -> String {
        let digest = Sha256::digest([b"dfs cluster id\0".as_slice(), &self.0].concat());
        digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The MAC of a message under this key, 16 bytes. `purpose` keeps uses apart.
    #[must_use]
    pub fn mac(&self, purpose: &str, message: &[u8]) -> [u8; MAC] {
        self.keyed(purpose, message).finalize().into_bytes()[..MAC].try_into().expect("SHA-256 has 32 bytes")
    }

    /// Whether `mac` is this key's MAC of the message; takes the same time whatever differs.
    #[must_use]
    pub fn verify(&self, purpose: &str, message: &[u8], mac: &[u8]) -> bool {
        mac.len() == MAC && self.keyed(purpose, message).verify_truncated_left(mac).is_ok()
    }

    /// The proof that whoever orders something has the key, at this time (milliseconds since 1970). `what` names the order, `number`
    /// what it is about, `challenge` the term of the leader that is to obey, once.
    #[must_use]
    pub fn proof(&self, what: &str, number: u64, now_ms: u64, challenge: u64) -> [u8; MAC] {
        self.mac(what, &order_message(number, now_ms, challenge))
    }

    /// Whether such a proof is right; see [`ClusterKey::proof`].
    #[must_use]
    pub fn verify_proof(&self, what: &str, number: u64, now_ms: u64, challenge: u64, proof: &[u8]) -> bool {
        self.verify(what, &order_message(number, now_ms, challenge), proof)
    }

    fn keyed(&self, purpose: &str, message: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(purpose.as_bytes());
        mac.update(&[0]);
        mac.update(message);
        mac
    }

    /// A token for one session and one chunk, good until `expiry_ms` (milliseconds since 1970).
    #[must_use]
    pub fn issue(&self, session: SessionId, chunk: ChunkId, rights: Rights, expiry_ms: u64) -> Vec<u8> {
        let mut token = Vec::with_capacity(BODY + MAC);
        token.extend([VERSION, rights.0]);
        token.extend(session.get().to_le_bytes());
        token.extend(chunk.get().to_le_bytes());
        token.extend(expiry_ms.to_le_bytes());
        let mac = self.mac("token", &token);
        token.extend(mac);
        token
    }

    /// Checks a token and answers whose it is.
    ///
    /// # Errors
    /// See [`TokenError`]: missing, forged, for another chunk, without the right, or expired at `now_ms`.
    pub fn check(
        &self,
        token: &[u8],
        chunk: ChunkId,
        right: Rights,
        now_ms: u64,
    ) -> Result<SessionId, TokenError> {
        if token.is_empty() {
            return Err(TokenError::Missing);
        }
        if token.len() != BODY + MAC
            || token[0] != VERSION
            || !self.verify("token", &token[..BODY], &token[BODY..])
        {
            return Err(TokenError::Forged);
        }
        let number = |at: usize| u64::from_le_bytes(token[at..at + 8].try_into().expect("eight bytes"));
        if number(10) != chunk.get() {
            return Err(TokenError::WrongChunk);
        }
        if !Rights(token[1]).include(right) {
            return Err(TokenError::Rights);
        }
        if number(18) < now_ms {
            return Err(TokenError::Expired);
        }
        Ok(SessionId(number(2)))
    }
}

fn order_message(number: u64, now_ms: u64, challenge: u64) -> Vec<u8> {
    [number.to_le_bytes(), now_ms.to_le_bytes(), challenge.to_le_bytes()].concat()
}

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ClusterKey(cluster {})", self.cluster_id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> ClusterKey {
        ClusterKey::new(b"0123456789abcdef\n").expect("long enough")
    }

    #[test]
    fn a_token_opens_its_chunk_only_and_only_in_time() {
        let token = key().issue(SessionId(7), ChunkId(9), Rights::READ, 1000);
        assert_eq!(key().check(&token, ChunkId(9), Rights::READ, 1000), Ok(SessionId(7)));
        assert_eq!(key().check(&token, ChunkId(8), Rights::READ, 0), Err(TokenError::WrongChunk));
        assert_eq!(key().check(&token, ChunkId(9), Rights::APPEND, 0), Err(TokenError::Rights));
        assert_eq!(key().check(&token, ChunkId(9), Rights::READ, 1001), Err(TokenError::Expired));
        assert_eq!(key().check(&[], ChunkId(9), Rights::READ, 0), Err(TokenError::Missing));
        let other = ClusterKey::new(b"fedcba9876543210").expect("long enough");
        assert_eq!(other.check(&token, ChunkId(9), Rights::READ, 0), Err(TokenError::Forged));
        assert_ne!(other.cluster_id(), key().cluster_id());
    }

    #[test]
    fn a_proof_is_for_one_order_at_one_time_in_one_term() {
        let proof = key().proof("evict", 7, 1000, 5);
        assert!(key().verify_proof("evict", 7, 1000, 5, &proof));
        assert!(!key().verify_proof("drain node", 7, 1000, 5, &proof));
        assert!(!key().verify_proof("evict", 8, 1000, 5, &proof));
        assert!(!key().verify_proof("evict", 7, 1001, 5, &proof));
        assert!(!key().verify_proof("evict", 7, 1000, 6, &proof));
        assert!(!key().verify_proof("evict", 7, 1000, 5, &[]));
    }

    proptest! {
        #[test]
        fn no_changed_bit_is_accepted(bit in 0_usize..(BODY + MAC) * 8) {
            let mut token = key().issue(SessionId(7), ChunkId(9), Rights::READ.and(Rights::APPEND), u64::MAX);
            token[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(key().check(&token, ChunkId(9), Rights::READ, 0), Err(TokenError::Forged));
        }
    }
}
