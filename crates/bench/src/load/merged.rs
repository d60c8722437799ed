//! Reports of loads that ran at the same time as one.

use super::{Percentiles, Report};
use trace::Buckets;

impl Percentiles {
    /// Of all requests of several loads, whose merged histogram is `all`: percentiles to its buckets' width (1/32).
    pub(crate) fn merged<'a>(each: impl Iterator<Item = &'a Self> + Clone, all: &Buckets) -> Self {
        let count: u64 = each.clone().map(|p| p.count).sum();
        let max_us = each.clone().map(|p| p.max_us).fold(0.0, f64::max);
        let some = each.clone().filter(|p| p.count > 0);
        let sum: f64 = each.map(|p| p.mean_us * p.count as f64).sum();
        let at = |part: f64| all.quantile_ns(part).unwrap_or(0) as f64 / 1000.0;
        let of = |part: f64| at(part).min(max_us);
        Self {
            count,
            min_us: some.map(|p| p.min_us).fold(max_us, f64::min),
            mean_us: sum / count.max(1) as f64,
            p50_us: of(0.5),
            p90_us: of(0.9),
            p99_us: of(0.99),
            p99_9_us: of(0.999),
            p99_99_us: of(0.9999),
            max_us,
        }
    }
}

impl Report {
    /// What loads of one process did together: at the same time, or `in_turn`, one after the other. What was verified, and the
    /// server's stages, are left to their own reports.
    pub fn merged(reports: &[Self], in_turn: bool) -> Self {
        let sum = |of: fn(&Self) -> u64| reports.iter().map(of).sum();
        let all = |of: fn(&Self) -> f64| reports.iter().map(of).sum::<f64>();
        let requests = |r: &Self| (r.reads + r.writes + r.flushes) as f64;
        let asked = reports.iter().map(requests).sum::<f64>().max(1.0);
        let longest = reports.iter().map(|r| r.seconds).fold(0.0, f64::max);
        let seconds = if in_turn { all(|r| r.seconds) } else { longest };
        // What each did in a second of its own time; in turn, of the time of all.
        let rate = |of: fn(&Self) -> f64| match in_turn {
            false => all(of),
            true if seconds > 0.0 => {
                let done = reports.iter().map(|r| of(r) * r.seconds);
                done.sum::<f64>() / seconds
            }
            true => 0.0,
        };
        let iops = rate(|r| r.iops);
        let per_request = |of: fn(&Self) -> f64| {
            let calls: f64 = reports.iter().map(|r| of(r) * requests(r)).sum();
            calls / asked
        };
        // Each divides the whole process's time by its own requests: at the same time it is the same time.
        let per_io = |of: fn(&Self) -> f64| {
            let share = |r: &Self| match in_turn {
                true => r.seconds / seconds.max(f64::MIN_POSITIVE),
                false => 1.0 / reports.len() as f64,
            };
            let rates = reports.iter().map(|r| of(r) * r.iops * share(r));
            let rate = rates.sum::<f64>();
            if iops > 0.0 { rate / iops } else { 0.0 }
        };
        let buckets = |of: fn(&Self) -> &Buckets| {
            let mut merged = Buckets::default();
            reports.iter().for_each(|r| merged.merge(of(r)));
            merged
        };
        let histograms = [0, 1, 2].map(|kind| {
            let mut merged = Buckets::default();
            reports.iter().for_each(|r| merged.merge(&r.kinds[kind]));
            merged
        });
        let histogram = buckets(|r| &r.histogram);
        let latency = |of: fn(&Self) -> &Percentiles, all: &Buckets| {
            Percentiles::merged(reports.iter().map(of), all)
        };
        let mut timeline = super::timeline::Stored::default();
        reports.iter().for_each(|r| timeline.merge(&r.timeline));
        Self {
            seconds,
            reads: sum(|r| r.reads),
            writes: sum(|r| r.writes),
            flushes: sum(|r| r.flushes),
            errors: sum(|r| r.errors),
            errors_besides: sum(|r| r.errors_besides),
            unsent: sum(|r| r.unsent),
            bytes: sum(|r| r.bytes),
            iops,
            mb_s: rate(|r| r.mb_s),
            read_latency: latency(|r| &r.read_latency, &histograms[0]),
            write_latency: latency(|r| &r.write_latency, &histograms[1]),
            flush_latency: latency(|r| &r.flush_latency, &histograms[2]),
            latency: latency(|r| &r.latency, &histogram),
            kicks_per_io: per_request(|r| r.kicks_per_io),
            calls_per_io: per_request(|r| r.calls_per_io),
            client_cpu_us_per_io: per_io(|r| r.client_cpu_us_per_io),
            client_user_us_per_io: per_io(|r| r.client_user_us_per_io),
            kinds: histograms,
            histogram,
            timeline,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Latencies;
    use std::time::Duration;

    fn report(reads: u64, us: u64) -> Report {
        let mut latencies = Latencies::default();
        latencies.add_many(Duration::from_micros(us), reads);
        Report {
            kicks_per_io: 0.5,
            client_cpu_us_per_io: 1e6 / reads as f64,
            ..Report::counted(
                1.0,
                reads * 4096,
                (reads, &latencies),
                (0, &Latencies::default()),
            )
        }
    }

    #[test]
    fn loads_at_the_same_time_are_one() {
        let merged = Report::merged(&[report(100, 10), report(300, 1000)], false);
        assert_eq!(
            (merged.reads, merged.bytes, merged.seconds),
            (400, 400 * 4096, 1.0)
        );
        assert_eq!((merged.iops, merged.kicks_per_io), (400.0, 0.5));
        // The process used all of a second, once.
        assert!((merged.client_cpu_us_per_io - 2500.0).abs() < 1e-6);
        let latency = merged.read_latency;
        assert_eq!((latency.count, merged.latency), (400, latency));
        assert!((latency.min_us - 10.0).abs() < 0.1 && (latency.mean_us - 752.5).abs() < 1.0);
        assert!((950.0..1050.0).contains(&latency.p50_us), "{latency:?}");
        assert_eq!(merged.write_latency.count, 0);
        for in_turn in [false, true] {
            let nothing = Report::merged(&[], in_turn);
            assert_eq!((nothing.reads, nothing.iops), (0, 0.0));
        }
    }

    #[test]
    fn loads_one_after_the_other_take_longer() {
        let merged = Report::merged(&[report(100, 10), report(300, 1000)], true);
        assert_eq!((merged.reads, merged.seconds), (400, 2.0));
        assert_eq!(merged.iops, 200.0);
        assert!((merged.mb_s * 1e6 - 200.0 * 4096.0).abs() < 1e-3);
        // Of each second all: two for 400 requests.
        assert!((merged.client_cpu_us_per_io - 5000.0).abs() < 1e-6);
    }
}
