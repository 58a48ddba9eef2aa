//! Wall clock and boot clock.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Tells the time.
pub trait Clock: Send + Sync + 'static {
    /// The wall clock.
    fn system(&self) -> SystemTime;

    /// Time since boot, suspended time included (CLOCK_BOOTTIME): what leases and tokens are measured with.
    fn boot(&self) -> Duration;

    /// The wall clock in milliseconds since 1970; 0 before.
    fn system_ms(&self) -> u64 {
        self.system()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

/// The clocks of this machine.
pub struct SystemClock;

impl Clock for SystemClock {
    fn system(&self) -> SystemTime {
        SystemTime::now()
    }

    fn boot(&self) -> Duration {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec that outlives the call.
        let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
        assert_eq!(result, 0, "CLOCK_BOOTTIME exists since Linux 2.6.39");
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("below a second"))
    }
}
