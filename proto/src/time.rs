//! Time stamps as files carry them: nanoseconds, before 1970 and after 2038.

use crate::v1::Timestamp;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

impl Timestamp {
    /// The time stamp of a system time, rounded to the nanosecond below.
    #[must_use]
    pub fn from_system(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(after) => Self { seconds: after.as_secs().cast_signed(), nanos: after.subsec_nanos() },
            Err(before) => {
                let before = before.duration();
                let (seconds, nanos) = (before.as_secs().cast_signed(), before.subsec_nanos());
                if nanos == 0 {
                    Self { seconds: -seconds, nanos: 0 }
                } else {
                    Self { seconds: -seconds - 1, nanos: 1_000_000_000 - nanos }
                }
            }
        }
    }

    /// The system time of a time stamp.
    #[must_use]
    pub fn to_system(self) -> SystemTime {
        let seconds = Duration::from_secs(self.seconds.unsigned_abs());
        let whole = if self.seconds < 0 { UNIX_EPOCH - seconds } else { UNIX_EPOCH + seconds };
        whole + Duration::from_nanos(u64::from(self.nanos))
    }

    /// A key that sorts as time does.
    #[must_use]
    pub const fn key(&self) -> (i64, u32) {
        (self.seconds, self.nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_time_stamp_survives_the_way_through_system_time(seconds in -62_135_596_800_i64..253_402_300_800, nanos in 0_u32..1_000_000_000) {
            let stamp = Timestamp { seconds, nanos };
            prop_assert_eq!(Timestamp::from_system(stamp.to_system()), stamp);
        }
    }
}
