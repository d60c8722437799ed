//! A histogram that can be stored: how many requests took how long.

use serde::{Deserialize, Serialize};

/// Buckets of an octave, as a power of two: a bucket is at most 1/32 of its value wide.
const BITS: u32 = 5;

/// Latencies of many requests, log-linear: 32 buckets for each power of two.
///
/// Stored as a list of pairs, `[[NANOSECONDS, REQUESTS], …]` in rising order: the upper edge of each bucket that is not
/// empty, and how many requests it holds. Figures that need to be exact to a thousandth come from [`super::Percentiles`],
/// which are taken before requests are put into these buckets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram(Vec<(u64, u64)>);

impl Histogram {
    /// Of pairs of nanoseconds and requests, in rising order.
    pub(crate) fn of(values: impl Iterator<Item = (u64, u64)>) -> Self {
        let mut buckets: Vec<(u64, u64)> = Vec::new();
        for (ns, count) in values.filter(|(_, count)| *count > 0) {
            let edge = upper(ns);
            match buckets.last_mut() {
                Some((last, held)) if *last == edge => *held += count,
                _ => buckets.push((edge, count)),
            }
        }
        Self(buckets)
    }

    /// Upper edges in nanoseconds and counts, in rising order.
    pub fn buckets(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// Requests in all.
    pub fn count(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    /// Counts all of `other`'s requests too.
    pub fn merge(&mut self, other: &Self) {
        let mut all: Vec<(u64, u64)> = [&self.0[..], &other.0[..]].concat();
        all.sort_unstable();
        all.dedup_by(|(edge, count), (before, held)| {
            let same = edge == before;
            if same {
                *held = held.saturating_add(*count);
            }
            same
        });
        self.0 = all;
    }

    /// The latency in microseconds that this part of the requests (0 to 1) did not exceed; `None` without requests.
    pub fn quantile_us(&self, part: f64) -> Option<f64> {
        let rank = (self.count() as f64 * part.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0_u64;
        for (edge, count) in &self.0 {
            seen = seen.saturating_add(*count);
            if seen >= rank {
                return Some(*edge as f64 / 1000.0);
            }
        }
        None
    }
}

/// The upper edge of the bucket that `ns` falls into.
pub(crate) fn upper(ns: u64) -> u64 {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(BITS + 1);
    ns | ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_a_thirty_second_wide() {
        for ns in [1, 31, 63, 64, 65, 1000, 123_456, 1 << 40, u64::MAX] {
            let edge = upper(ns);
            assert!(edge >= ns && edge - ns <= ns / 32, "{ns} {edge}");
            assert_eq!(upper(edge), edge);
        }
    }

    #[test]
    fn sums_and_quantiles() {
        let mut one = Histogram::of([(1000, 3), (1001, 2), (2000, 0), (900_000, 5)].into_iter());
        assert_eq!(one.buckets().len(), 2);
        let other = Histogram::of([(900_001, 10), (7_000_000, 1)].into_iter());
        one.merge(&other);
        assert_eq!((one.count(), one.buckets().len()), (21, 3));
        assert!(one.buckets().is_sorted());
        assert_eq!(one.quantile_us(0.0), Some(1.007));
        let median = one.quantile_us(0.5).unwrap();
        assert!((900.0..930.0).contains(&median), "{median}");
        assert!(one.quantile_us(1.0).unwrap() >= 7000.0);
        assert_eq!(Histogram::default().quantile_us(0.5), None);
        let text = serde_json::to_string(&one).unwrap();
        assert!(text.starts_with("[[1007,5],["), "{text}");
        assert_eq!(serde_json::from_str::<Histogram>(&text).unwrap(), one);
    }
}
