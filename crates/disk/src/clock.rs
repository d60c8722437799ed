//! The clock of request timestamps.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// Nanoseconds of the monotonic clock (read through the vDSO: no system call).
pub fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// `ns` for people: `12.3µs`.
pub(crate) fn human(ns: u64) -> String {
    format!("{:.1?}", Duration::from_nanos(ns))
}
