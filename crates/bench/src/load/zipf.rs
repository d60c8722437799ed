//! Hot spots: places that are asked for by Zipf's law, the k-th most wanted one in proportion to 1 / k^theta.
//!
//! Drawn by rejection-inversion (W. Hörmann, G. Derflinger: Rejection-inversion to generate variates from monotone discrete
//! distributions, 1996): no table, some logarithms each.

/// Draws ranks, and says where they lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Zipf {
    theta: f64,
    count: u64,
    first: f64,
    last: f64,
    squeeze: f64,
    /// Ranks lie this far apart, so that what is hot is not in one place.
    step: u64,
}

impl Zipf {
    /// Of `count` places, at least one; `theta` above 0.
    pub(super) fn new(count: u64, theta: f64) -> Self {
        let count = count.max(1);
        let area = |x| area(x, theta);
        // The golden section spreads neighbours best; coprime to the number of places each has one rank.
        let mut step = ((count as f64 * 0.618_033_988_749_895) as u64).max(1);
        while greatest_divisor(step, count) != 1 {
            step += 1;
        }
        Self {
            theta,
            count,
            first: area(1.5) - 1.0,
            last: area(count as f64 + 0.5),
            squeeze: 2.0 - place(area(2.5) - height(2.0, theta), theta),
            step,
        }
    }

    /// A place, from 0; `random` gives numbers from 0 to 1, without 1.
    pub(super) fn draw(&self, mut random: impl FnMut() -> f64) -> u64 {
        loop {
            let u = self.last + random() * (self.first - self.last);
            let x = place(u, self.theta);
            let rank = ((x + 0.5) as u64).clamp(1, self.count);
            let k = rank as f64;
            if k - x <= self.squeeze || u >= area(k + 0.5, self.theta) - height(k, self.theta) {
                let at = u128::from(rank - 1) * u128::from(self.step) % u128::from(self.count);
                // Below the number of places.
                return at as u64;
            }
        }
    }
}

/// 1 / x^theta.
fn height(x: f64, theta: f64) -> f64 {
    (-theta * x.ln()).exp()
}

/// Its integral.
fn area(x: f64, theta: f64) -> f64 {
    let log = x.ln();
    let t = (1.0 - theta) * log;
    log * if t.abs() > 1e-8 {
        t.exp_m1() / t
    } else {
        1.0 + t / 2.0
    }
}

/// Where the integral has this value.
fn place(area: f64, theta: f64) -> f64 {
    let t = (area * (1.0 - theta)).max(-1.0);
    let part = if t.abs() > 1e-8 {
        t.ln_1p() / t
    } else {
        1.0 - t / 2.0
    };
    (part * area).exp()
}

fn greatest_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_wanted_by_their_rank() {
        for (count, theta) in [(1000_u64, 1.0), (1000, 0.5), (64, 1.2), (1, 1.0), (2, 3.0)] {
            let zipf = Zipf::new(count, theta);
            let mut random = 1_u64;
            let mut hits = vec![0_u32; count as usize];
            for _ in 0..100_000 {
                let place = zipf.draw(|| {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    (random >> 11) as f64 / (1_u64 << 53) as f64
                });
                hits[place as usize] += 1;
            }
            let sum: f64 = (1..=count).map(|k| height(k as f64, theta)).sum();
            for rank in [1, 2, 3, 10].into_iter().filter(|rank| *rank <= count) {
                let expected = 100_000.0 * height(rank as f64, theta) / sum;
                let at = ((rank - 1) * zipf.step % count) as usize;
                let off = (f64::from(hits[at]) - expected).abs();
                // Six times the standard deviation.
                assert!(
                    off <= 6.0 * expected.sqrt() + 1.0,
                    "{count} {theta} {rank}: {} {expected}",
                    hits[at]
                );
            }
        }
    }

    #[test]
    fn each_place_has_one_rank() {
        for count in [1, 2, 3, 64, 1000, 65536] {
            let zipf = Zipf::new(count, 1.0);
            let places: std::collections::BTreeSet<u64> =
                (0..count).map(|rank| rank * zipf.step % count).collect();
            assert_eq!(places.len() as u64, count);
        }
    }
}
