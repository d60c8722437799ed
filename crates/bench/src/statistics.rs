//! From samples to a figure that can be believed: medians, spreads, and intervals of ratios.
//!
//! The rate of a device drifts over minutes by more than the differences that are looked for, so the two sides
//! of a comparison are measured in turn and compared round by round: the figure is the median of the rounds'
//! ratios. Its interval is a bootstrap: the rounds are drawn again, with replacement, a few thousand times, and
//! the middle 95 % of the medians are what the figure may well have been. Of few rounds that is too narrow (of five, not even all
//! between the lowest and the highest is 95 % sure), so the interval is at least as wide as that of a median of normal samples: by
//! their standard deviation, or by their median distance where an outlier makes that the smaller one.

use serde::{Deserialize, Serialize};

/// Draws of the bootstrap.
const DRAWS: usize = 4000;

/// How many standard deviations, and how many median distances (`mad`), of its samples the median of 2 to 16 of them is from the true
/// one in 97.5 of 100 cases at most: Student's t for medians of a normal distribution, by simulation (400,000 draws each). Either
/// misses in 2.5 of 100 cases, so the smaller of the two in 5 at most. The first is the smaller one as a rule; an outlier widens the
/// first alone.
const ERRORS: [(f64, f64); 15] = [
    (18.03, 25.50),
    (3.62, 38.12),
    (2.13, 7.04),
    (1.66, 6.22),
    (1.36, 3.55),
    (1.24, 3.33),
    (1.10, 2.48),
    (1.04, 2.37),
    (0.94, 1.97),
    (0.92, 1.91),
    (0.85, 1.67),
    (0.83, 1.63),
    (0.77, 1.46),
    (0.76, 1.43),
    (0.72, 1.32),
];
/// The same of many, times the root of their number.
const ERROR_OF_MANY: (f64, f64) = (2.88, 5.28);

/// Medians, and how far the samples lie apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Samples.
    pub count: usize,
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The lowest.
    pub min: f64,
    /// The highest.
    pub max: f64,
    /// Median distance from the median.
    pub mad: f64,
    /// The mean.
    #[serde(default)]
    pub mean: f64,
    /// The standard deviation of the samples (divided by their number less one; 0 for a single one).
    #[serde(default)]
    pub deviation: f64,
}

impl Summary {
    /// Of some samples; `None` without any.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let median = median(samples)?;
        let count = samples.len() as f64;
        let mean = samples.iter().sum::<f64>() / count;
        let squares: f64 = samples.iter().map(|s| (s - mean).powi(2)).sum();
        let distances: Vec<f64> = samples.iter().map(|s| (s - median).abs()).collect();
        Some(Self {
            count: samples.len(),
            median,
            min: samples.iter().copied().fold(f64::INFINITY, f64::min),
            max: samples.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            mad: median_of(distances),
            mean,
            deviation: (squares / (count - 1.0).max(1.0)).sqrt(),
        })
    }

    /// Distance of the lowest and the highest, in parts of the median: what calls a machine noisy.
    pub fn spread(&self) -> f64 {
        if self.median == 0.0 {
            0.0
        } else {
            (self.max - self.min) / self.median
        }
    }
}

/// The median; `None` without samples.
pub fn median(samples: &[f64]) -> Option<f64> {
    (!samples.is_empty()).then(|| median_of(samples.to_vec()))
}

fn median_of(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    if samples.len() % 2 == 1 {
        samples[middle]
    } else {
        (samples[middle - 1] + samples[middle]) / 2.0
    }
}

/// A figure of several rounds, with the 95 % interval of its median.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Rounds that it comes from.
    pub rounds: usize,
    /// The median of the rounds.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// The lowest round.
    pub min: f64,
    /// The highest round.
    pub max: f64,
}

impl Figure {
    /// Of one value per round; `None` without any.
    pub fn of(rounds: &[f64]) -> Option<Self> {
        let summary = Summary::of(rounds)?;
        let (low, high) = interval(rounds);
        let error = error(&summary);
        // What is never negative (ratios, counts) may not well have been.
        let least = if summary.min < 0.0 {
            f64::NEG_INFINITY
        } else {
            0.0
        };
        let low = low.min(summary.median - error).max(least);
        let high = high.max(summary.median + error);
        Some(Self {
            rounds: rounds.len(),
            median: summary.median,
            low,
            high,
            min: summary.min,
            max: summary.max,
        })
    }
}

/// The rounds' ratios; a round whose divisor is zero has none.
pub fn ratios(of: &[f64], to: &[f64]) -> Vec<f64> {
    let pairs = of.iter().zip(to);
    pairs
        .filter(|(_, to)| **to > 0.0)
        .map(|(of, to)| of / to)
        .collect()
}

/// The ratio of the medians of two series that were not taken in turn, with its 95 % interval: both are drawn again,
/// independently. `None` where one of them has no samples or the divisor's median is zero.
pub fn ratio_of_medians(of: &[f64], to: &[f64]) -> Option<Figure> {
    let divided = |of: f64, to: f64| (to > 0.0).then_some(of / to);
    let middle = divided(median(of)?, median(to)?)?;
    let (of_ends, to_ends) = (Summary::of(of)?, Summary::of(to)?);
    let mut random = SEED;
    let mut draws: Vec<f64> = (0..DRAWS)
        .filter_map(|_| divided(redrawn(of, &mut random), redrawn(to, &mut random)))
        .collect();
    let (low, high) = middle_95(&mut draws)?;
    // Of each median's part; a dividend of 0 has an error all the same.
    let error = error(&of_ends).hypot(middle * error(&to_ends)) / to_ends.median;
    let (low, high) = (low.min(middle - error).max(0.0), high.max(middle + error));
    Some(Figure {
        rounds: of.len().min(to.len()),
        median: middle,
        low,
        high,
        min: divided(of_ends.min, to_ends.max)?,
        max: divided(of_ends.max, to_ends.min).unwrap_or(f64::MAX),
    })
}

/// How far the median of samples may be from the true one, either way; 0 of a single one, of which nothing is known.
fn error(summary: &Summary) -> f64 {
    let Some(index) = summary.count.checked_sub(2) else {
        return 0.0;
    };
    let root = (summary.count as f64).sqrt();
    let of_many = (ERROR_OF_MANY.0 / root, ERROR_OF_MANY.1 / root);
    let (deviations, distances) = *ERRORS.get(index).unwrap_or(&of_many);
    (deviations * summary.deviation).min(distances * summary.mad)
}

const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// The middle 95 % of the medians of redrawn rounds. The draws are the same for the same rounds.
fn interval(rounds: &[f64]) -> (f64, f64) {
    let mut random = SEED;
    let mut medians: Vec<f64> = (0..DRAWS).map(|_| redrawn(rounds, &mut random)).collect();
    // There are draws.
    middle_95(&mut medians).unwrap_or_default()
}

fn redrawn(rounds: &[f64], random: &mut u64) -> f64 {
    let drawn = rounds.iter().map(|_| {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        // The low bits of a xorshift are its weak ones.
        rounds[((*random >> 32) as usize) % rounds.len()]
    });
    median_of(drawn.collect())
}

fn middle_95(draws: &mut [f64]) -> Option<(f64, f64)> {
    draws.sort_by(f64::total_cmp);
    let cut = draws.len() / 40;
    Some((*draws.get(cut)?, *draws.get(draws.len() - 1 - cut)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        for (samples, expected, mad) in [
            (&[3.0][..], 3.0, 0.0),
            (&[1.0, 2.0], 1.5, 0.5),
            (&[9.0, 1.0, 2.0], 2.0, 1.0),
            (&[4.0, 1.0, 3.0, 2.0], 2.5, 1.0),
            (&[5.0, 5.0, 5.0, 100.0, 5.0], 5.0, 0.0),
        ] {
            let summary = Summary::of(samples).unwrap();
            assert_eq!(summary.median, expected, "{samples:?}");
            assert_eq!(summary.mad, mad, "{samples:?}");
            assert_eq!(summary.count, samples.len());
        }
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(median(&[]), None);
        let summary = Summary::of(&[8.0, 10.0, 13.0]).unwrap();
        assert_eq!((summary.min, summary.max), (8.0, 13.0));
        assert_eq!(summary.spread(), 0.5);
        let summary = Summary::of(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap();
        assert_eq!(summary.mean, 5.0);
        assert!((summary.deviation - (32.0_f64 / 7.0).sqrt()).abs() < 1e-12);
        assert_eq!(Summary::of(&[3.0]).unwrap().deviation, 0.0);
    }

    /// Samples as of a normal distribution with mean 10 and deviation 1: sums of uniform ones.
    fn normal(random: &mut u64, count: usize) -> Vec<f64> {
        let mut uniform = || {
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            (*random >> 11) as f64 / (1_u64 << 53) as f64
        };
        let mut one = || (0..12).map(|_| uniform()).sum::<f64>() + 4.0;
        (0..count).map(|_| one()).collect()
    }

    #[test]
    fn intervals_hold_what_they_say() {
        let mut random = SEED;
        for count in [2, 3, 4, 5, 6, 7, 10, 20] {
            let tries = 400;
            let held = (0..tries).filter(|_| {
                let figure = Figure::of(&normal(&mut random, count)).unwrap();
                (figure.low..=figure.high).contains(&10.0)
            });
            let held = held.count() * 100 / tries;
            assert!((92..=100).contains(&held), "of {count} rounds: {held} %");
            let held = (0..tries).filter(|_| {
                let (of, to) = (normal(&mut random, count), normal(&mut random, count));
                let figure = ratio_of_medians(&of, &to).unwrap();
                (figure.low..=figure.high).contains(&1.0)
            });
            let held = held.count() * 100 / tries;
            assert!(
                (92..=100).contains(&held),
                "of {count} and {count}: {held} %"
            );
        }
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        // Both drift by a factor of three; the ratio does not.
        let ours = [300.0, 200.0, 100.0];
        let theirs = [150.0, 100.0, 50.0];
        let figure = Figure::of(&ratios(&ours, &theirs)).unwrap();
        assert_eq!((figure.median, figure.low, figure.high), (2.0, 2.0, 2.0));
        assert_eq!(ratios(&ours, &[0.0, 100.0]), [2.0]);
        assert_eq!(Figure::of(&[]), None);
    }

    #[test]
    fn series_that_were_not_taken_in_turn_are_drawn_apart() {
        let figure = ratio_of_medians(&[20.0, 22.0, 18.0], &[10.0, 11.0, 9.0]).unwrap();
        assert_eq!((figure.median, figure.rounds), (2.0, 3));
        assert!(figure.low < 2.0 && figure.high > 2.0, "{figure:?}");
        assert_eq!((figure.min, figure.max), (18.0 / 11.0, 22.0 / 9.0));
        assert_eq!(ratio_of_medians(&[1.0], &[0.0]), None);
        // A dividend that is mostly 0 is 0, and not surely so.
        let zero = ratio_of_medians(&[0.0; 3], &[2.0; 3]).unwrap();
        assert_eq!((zero.median, zero.low, zero.high), (0.0, 0.0, 0.0));
        let some = ratio_of_medians(&[0.0, 4.0, 0.0, 4.0, 0.0], &[2.0; 5]).unwrap();
        assert_eq!((some.median, some.low), (0.0, 0.0));
        assert!(some.high >= 2.0 && some.high.is_finite(), "{some:?}");
        let wide = ratio_of_medians(&[-4.0, 0.0, 4.0], &[2.0; 3]).unwrap();
        assert_eq!((wide.median, wide.high), (0.0, ERRORS[1].0 * 4.0 / 2.0));
        assert_eq!(ratio_of_medians(&[], &[1.0]), None);
    }

    #[test]
    fn intervals_hold_the_median_and_shrink_with_rounds() {
        for rounds in [
            &[1.0, 1.1, 0.9, 1.05, 0.95][..],
            &[2.0],
            &[1.0, 5.0],
            &[1.0, 1.0, 1.0, 1.0, 7.0],
        ] {
            let figure = Figure::of(rounds).unwrap();
            assert!(
                0.0 <= figure.low && figure.low <= figure.median,
                "{figure:?}"
            );
            assert!(figure.median <= figure.high, "{figure:?}");
            assert_eq!(Figure::of(rounds), Some(figure));
        }
        let few = Figure::of(&[0.9, 1.0, 1.1]).unwrap();
        let many: Vec<f64> = (0..60).map(|i| 0.9 + 0.1 * f64::from(i % 3)).collect();
        let many = Figure::of(&many).unwrap();
        assert!(
            few.high - few.low > many.high - many.low,
            "{few:?} {many:?}"
        );
        // One outlier of five does not decide what the median may be on its own side alone.
        assert_eq!(Figure::of(&[1.0, 1.0, 1.0, 1.0, 7.0]).unwrap().low, 1.0);
    }
}
