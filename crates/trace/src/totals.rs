//! Where the time of many requests went, without how it was spread.

use crate::{Snapshot, Stage, Times};
use serde::{Deserialize, Serialize};

/// Requests, and the time of all of them in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Requests.
    pub count: u64,
    /// Nanoseconds of all of them together.
    pub sum_ns: Times,
}

impl Totals {
    /// Microseconds of a stage in a request, on average.
    pub fn mean_us(&self, stage: Stage) -> f64 {
        self.sum_ns[stage] as f64 / 1000.0 / self.count.max(1) as f64
    }

    /// Microseconds of a request in all stages, on average.
    pub fn total_us(&self) -> f64 {
        self.sum_ns.total() as f64 / 1000.0 / self.count.max(1) as f64
    }

    /// Takes in what was counted of a stage, as [`Histograms`](crate::Histograms) say it: all stages of an operation count the
    /// same requests.
    pub fn note(&mut self, stage: Stage, counted: &Snapshot) {
        self.count = self.count.max(counted.count);
        self.sum_ns[stage] = self.sum_ns[stage].wrapping_add(counted.sum_ns);
    }

    /// Counts all of `other` too.
    pub fn add(&mut self, other: &Self) {
        self.count = self.count.saturating_add(other.count);
        for stage in Stage::ALL {
            self.sum_ns[stage] = self.sum_ns[stage].saturating_add(other.sum_ns[stage]);
        }
    }

    /// What came since `earlier`, totals of the same.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut since = Self {
            count: self.count.saturating_sub(earlier.count),
            ..Self::default()
        };
        for stage in Stage::ALL {
            since.sum_ns[stage] = self.sum_ns[stage].saturating_sub(earlier.sum_ns[stage]);
        }
        since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_add_up_and_have_means() {
        let mut all = Totals::default();
        let of = |count, sum_ns| Snapshot {
            count,
            sum_ns,
            ..Snapshot::default()
        };
        all.note(Stage::Map, &of(4, 8000));
        all.note(Stage::Device, &of(4, 72_000));
        assert_eq!(
            (all.count, all.mean_us(Stage::Device), all.total_us()),
            (4, 18.0, 20.0)
        );
        let mut twice = all;
        twice.add(&all);
        assert_eq!((twice.count, twice.total_us()), (8, 20.0));
        assert_eq!(twice.since(&all), all);
        assert_eq!(all.since(&twice), Totals::default());
        assert_eq!(Totals::default().total_us(), 0.0);
    }
}
