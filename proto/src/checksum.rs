//! CRC-32C (RFC 3720, Castagnoli polynomial) over units of [`CHECKSUM_UNIT`] bytes, counted from a record's beginning.

use crate::limits::CHECKSUM_UNIT;

/// The checksum of one run of bytes.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// The checksum of bytes that follow bytes whose checksum is `crc`.
#[must_use]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    // A fuzzer guesses no checksums: what it makes up shall be looked at.
    if cfg!(fuzzing) { 0 } else { crc32c::crc32c_append(crc, bytes) }
}

/// The checksums of a record's payload, one for each unit; the last unit may be short. Empty for an empty payload.
#[must_use]
pub fn unit_checksums(payload: &[u8]) -> Vec<u32> {
    payload.chunks(CHECKSUM_UNIT).map(crc32c).collect()
}

/// Whether a payload matches its units' checksums, in number too.
#[must_use]
pub fn units_match(payload: &[u8], checksums: &[u32]) -> bool {
    payload.len().div_ceil(CHECKSUM_UNIT) == checksums.len()
        && payload.chunks(CHECKSUM_UNIT).zip(checksums).all(|(unit, sum)| crc32c(unit) == *sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_rfc_3720_test_vectors() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn a_missing_or_wrong_unit_does_not_match() {
        let payload = vec![7; CHECKSUM_UNIT + 1];
        let mut sums = unit_checksums(&payload);
        assert!(units_match(&payload, &sums));
        assert!(!units_match(&payload, &sums[..1]));
        sums[1] ^= 1;
        assert!(!units_match(&payload, &sums));
    }
}
