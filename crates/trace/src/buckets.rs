//! Counts of latencies as they are stored and shown.

use serde::{Deserialize, Serialize};

/// How many requests took how long.
///
/// Pairs of nanoseconds and requests, ascending, none of them empty: the upper edge of a bucket, and how many it holds. Whoever
/// counts chooses the buckets; those of one counter fit each other. Stored as a list of pairs, `[[NANOSECONDS, REQUESTS], …]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Buckets(Vec<(u64, u64)>);

impl Buckets {
    /// Upper edges in nanoseconds and counts, ascending.
    pub fn as_slice(&self) -> &[(u64, u64)] {
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
        *self = self.combined(other, u64::saturating_add);
    }

    /// What came since `earlier`, of the same counter.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        self.combined(earlier, u64::saturating_sub)
    }

    fn combined(&self, other: &Self, how: fn(u64, u64) -> u64) -> Self {
        let (mut a, mut b) = (self.0.iter().peekable(), other.0.iter().peekable());
        std::iter::from_fn(|| {
            let edge = match (a.peek(), b.peek()) {
                (Some(a), Some(b)) => a.0.min(b.0),
                (Some(one), None) | (None, Some(one)) => one.0,
                (None, None) => return None,
            };
            let of_a = a.next_if(|(at, _)| *at == edge).map_or(0, |a| a.1);
            let of_b = b.next_if(|(at, _)| *at == edge).map_or(0, |b| b.1);
            Some((edge, how(of_a, of_b)))
        })
        .collect()
    }

    /// The nanoseconds that this part of the requests (0 to 1) did not exceed: the upper edge of a bucket. `None` without
    /// requests.
    pub fn quantile_ns(&self, part: f64) -> Option<u64> {
        // Counts are far below 2^53.
        let rank = (self.count() as f64 * part.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0_u64;
        for (edge, count) in &self.0 {
            seen = seen.saturating_add(*count);
            if seen >= rank {
                return Some(*edge);
            }
        }
        None
    }
}

/// Of ascending edges; those that are the same count as one, empty ones are left out.
impl FromIterator<(u64, u64)> for Buckets {
    fn from_iter<I: IntoIterator<Item = (u64, u64)>>(values: I) -> Self {
        let mut buckets: Vec<(u64, u64)> = Vec::new();
        for (edge, count) in values.into_iter().filter(|(_, count)| *count > 0) {
            match buckets.last_mut() {
                Some((last, held)) if *last == edge => *held = held.saturating_add(count),
                _ => buckets.push((edge, count)),
            }
        }
        Self(buckets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_differences_and_quantiles() {
        let first: Buckets = [(1007, 3), (1007, 2), (2000, 0), (900_100, 5)]
            .into_iter()
            .collect();
        assert_eq!(first.as_slice(), [(1007, 5), (900_100, 5)]);
        let other: Buckets = [(900_100, 10), (7_000_000, 1)].into_iter().collect();
        let mut both = first.clone();
        both.merge(&other);
        assert_eq!(both.as_slice(), [(1007, 5), (900_100, 15), (7_000_000, 1)]);
        assert_eq!(both.count(), 21);
        assert_eq!(both.since(&other), first);
        assert_eq!(both.since(&both), Buckets::default());
        assert_eq!(both.quantile_ns(0.0), Some(1007));
        assert_eq!(both.quantile_ns(0.5), Some(900_100));
        assert_eq!(both.quantile_ns(1.0), Some(7_000_000));
        assert_eq!(Buckets::default().quantile_ns(0.5), None);
        let text = serde_json::to_string(&both).unwrap();
        assert_eq!(text, "[[1007,5],[900100,15],[7000000,1]]");
        assert_eq!(serde_json::from_str::<Buckets>(&text).unwrap(), both);
    }
}
