//! Latencies of many requests.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use trace::Buckets;

/// A histogram of latencies from 1 ns to one hour, three significant digits.
#[derive(Clone, Debug)]
pub struct Latencies(hdrhistogram::Histogram<u64>);

const LONGEST_NS: u64 = 3_600_000_000_000;

/// Stored buckets of an octave, as a power of two.
const BITS: u32 = 5;

/// The upper edge of the stored bucket that `ns` falls into.
fn upper(ns: u64) -> u64 {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(BITS + 1);
    ns | ((1 << shift) - 1)
}

impl Default for Latencies {
    fn default() -> Self {
        // The bounds are constants that the library accepts.
        Self(hdrhistogram::Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("valid bounds"))
    }
}

impl Latencies {
    /// Counts one request.
    pub fn add(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.0.saturating_record(ns.clamp(1, LONGEST_NS));
    }

    /// Counts `count` requests that took as long.
    pub fn add_many(&mut self, latency: Duration, count: u64) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.0.saturating_record_n(ns.clamp(1, LONGEST_NS), count);
    }

    /// Counts all of `other`'s requests too.
    pub fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("equal bounds");
    }

    /// In the form that is stored: buckets at most 1/32 wide. Figures that need to be exact to a thousandth are
    /// [`Percentiles`], which are taken from here.
    pub fn histogram(&self) -> Buckets {
        let values = self.0.iter_recorded();
        values
            .map(|value| (upper(value.value_iterated_to()), value.count_at_value()))
            .collect()
    }

    /// The figures of a report.
    pub fn percentiles(&self) -> Percentiles {
        let us = |ns: u64| ns as f64 / 1000.0;
        let at = |quantile: f64| us(self.0.value_at_quantile(quantile));
        if self.0.is_empty() {
            return Percentiles::default();
        }
        Percentiles {
            count: self.0.len(),
            min_us: us(self.0.min()),
            mean_us: self.0.mean() / 1000.0,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p99_9_us: at(0.999),
            p99_99_us: at(0.9999),
            max_us: us(self.0.max()),
        }
    }
}

/// Latency in microseconds; all zero if nothing was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Percentiles {
    pub count: u64,
    pub min_us: f64,
    pub mean_us: f64,
    pub p50_us: f64,
    pub p90_us: f64,
    pub p99_us: f64,
    pub p99_9_us: f64,
    pub p99_99_us: f64,
    pub max_us: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_buckets_are_a_thirty_second_wide() {
        for ns in [1, 31, 63, 64, 65, 1000, 123_456, 1 << 40, u64::MAX] {
            let edge = upper(ns);
            assert!(edge >= ns && edge - ns <= ns / 32, "{ns} {edge}");
            assert_eq!(upper(edge), edge);
        }
    }

    #[test]
    fn percentiles_are_within_a_thousandth() {
        let mut one = Latencies::default();
        let mut other = Latencies::default();
        for us in 1..=1000 {
            let which = if us % 2 == 0 { &mut one } else { &mut other };
            which.add(Duration::from_micros(us));
        }
        one.merge(&other);
        let p = one.percentiles();
        assert_eq!(p.count, 1000);
        assert!((p.p50_us - 500.0).abs() < 1.0, "{p:?}");
        assert!((p.p99_us - 990.0).abs() < 2.0, "{p:?}");
        assert!((p.mean_us - 500.5).abs() < 1.0, "{p:?}");
        let stored = one.histogram();
        assert_eq!(stored.count(), 1000);
        let median = stored.quantile_ns(0.5).unwrap();
        assert!((500_000..517_000).contains(&median), "{median}");
        assert_eq!(Latencies::default().percentiles(), Percentiles::default());
    }
}
