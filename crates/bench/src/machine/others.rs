//! Whether the machine was ours while a sample was taken, and what its kernel did.

use crate::{
    load::usage,
    metric::{Metric, Metrics},
};
use std::{
    fs,
    time::{Duration, Instant},
};

/// Ticks of `/proc/stat` per second (`USER_HZ`, the same on all machines).
const TICKS: f64 = 100.0;

/// Counters of the machine, at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Kernel {
    /// Seconds of all cores that were not idle.
    busy_s: f64,
    /// Of these, those that the hypervisor gave to others.
    stolen_s: f64,
    interrupts: u64,
    /// Pages between nodes; `None` where there is one node.
    numa: Option<Numa>,
}

/// What `/proc/vmstat` counts of pages between nodes (the kernel's Documentation/admin-guide/numastat.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Numa {
    miss: u64,
    foreign: u64,
    other: u64,
    migrated: u64,
}

impl Numa {
    fn parse(vmstat: &str) -> Self {
        let of = |name: &str| {
            let mut lines = vmstat.lines().filter_map(|line| line.split_once(' '));
            let found = lines.find(|(field, _)| *field == name);
            found.and_then(|(_, value)| value.trim().parse().ok())
        };
        Self {
            miss: of("numa_miss").unwrap_or_default(),
            foreign: of("numa_foreign").unwrap_or_default(),
            other: of("numa_other").unwrap_or_default(),
            migrated: of("numa_pages_migrated").unwrap_or_default(),
        }
    }
}

/// CPU time of the machine and of those who take part, at a moment.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    began: Instant,
    kernel: Kernel,
    load: f64,
    own: Duration,
    servers: Vec<u32>,
    servers_used: Duration,
}

impl Watch {
    /// From now on; `servers` are the processes that take part besides this one.
    pub(crate) fn begin(servers: &[u32]) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let stat = read("/proc/stat");
        let several = std::path::Path::new("/sys/devices/system/node/node1").exists();
        Self {
            began: Instant::now(),
            kernel: Kernel::parse(&stat, &several.then(|| read("/proc/vmstat"))),
            load: load_average(&read("/proc/loadavg")),
            own: usage::own_cpu(),
            servers: servers.to_vec(),
            servers_used: servers
                .iter()
                .map(|pid| usage::cpu(*pid).unwrap_or_default())
                .sum(),
        }
    }

    /// CPU time that neither we nor the server used since, in percent of one core: other processes, the kernel's own
    /// threads, and what the hypervisor gave to others.
    pub(crate) fn others_percent(&self) -> f64 {
        self.others(&Self::begin(&self.servers))
    }

    fn others(&self, now: &Self) -> f64 {
        let ours =
            now.own.saturating_sub(self.own) + now.servers_used.saturating_sub(self.servers_used);
        let others = (now.kernel.busy_s - self.kernel.busy_s - ours.as_secs_f64()).max(0.0);
        others / self.seconds() * 100.0
    }

    fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64().max(1e-3)
    }

    /// Adds what the machine did since to the figures of a load.
    pub(crate) fn add_to(&self, metrics: &mut Metrics) {
        let now = Self::begin(&self.servers);
        let seconds = self.seconds();
        metrics.insert(Metric::OthersPercent, self.others(&now));
        metrics.insert(Metric::LoadAverage, self.load);
        let stolen = (now.kernel.stolen_s - self.kernel.stolen_s).max(0.0);
        metrics.insert(Metric::StealPercent, stolen / seconds * 100.0);
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let interrupts = rate(now.kernel.interrupts, self.kernel.interrupts);
        if let Some(iops) = metrics.get(&Metric::Iops).filter(|iops| **iops > 0.0) {
            metrics.insert(Metric::Interrupts, interrupts / iops);
        }
        if let (Some(now), Some(before)) = (now.kernel.numa, self.kernel.numa) {
            metrics.extend([
                (Metric::NumaMisses, rate(now.miss, before.miss)),
                (Metric::NumaForeign, rate(now.foreign, before.foreign)),
                (Metric::NumaOther, rate(now.other, before.other)),
                (Metric::NumaMigrated, rate(now.migrated, before.migrated)),
            ]);
        }
    }
}

impl Kernel {
    /// From `/proc/stat` and, where there are several nodes, `/proc/vmstat`.
    fn parse(stat: &str, vmstat: &Option<String>) -> Self {
        let line = |name: &str| {
            let mut lines = stat.lines();
            lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        };
        // user nice system IDLE IOWAIT irq softirq STEAL; guests are part of user.
        let ticks: Vec<f64> = line("cpu")
            .unwrap_or_default()
            .split_whitespace()
            .take(8)
            .filter_map(|ticks| ticks.parse().ok())
            .collect();
        let busy = ticks.iter().enumerate();
        let busy: f64 = busy
            .filter(|(n, _)| !matches!(n, 3 | 4))
            .map(|(_, t)| t)
            .sum();
        let first = |text: &str| text.split_whitespace().next()?.parse().ok();
        Self {
            busy_s: busy / TICKS,
            stolen_s: ticks.get(7).copied().unwrap_or_default() / TICKS,
            interrupts: line("intr").and_then(first).unwrap_or_default(),
            numa: vmstat.as_deref().map(Numa::parse),
        }
    }
}

fn load_average(text: &str) -> f64 {
    let first = text.split_whitespace().next();
    first.and_then(|load| load.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_busy() {
        let stat =
            "cpu  100 10 20 9999 999 1 2 67 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\nintr 4321 0 9 0\n";
        let vmstat = "numa_hit 5\nnuma_miss 17\nnuma_foreign 3\nnuma_pages_migrated 9\n";
        let kernel = Kernel::parse(stat, &Some(vmstat.to_owned()));
        let expected = Kernel {
            busy_s: 2.0,
            stolen_s: 0.67,
            interrupts: 4321,
            numa: Some(Numa {
                miss: 17,
                foreign: 3,
                other: 0,
                migrated: 9,
            }),
        };
        assert_eq!(kernel, expected);
        assert_eq!(Kernel::parse("", &None), Kernel::default());
        assert_eq!(load_average("1.25 0.9 0.8 2/300 12\n"), 1.25);
    }

    #[test]
    fn what_the_machine_did_is_told() {
        let watch = Watch::begin(&[]);
        let mut metrics = Metrics::from([(Metric::Iops, 10.0)]);
        watch.add_to(&mut metrics);
        for metric in [
            Metric::OthersPercent,
            Metric::LoadAverage,
            Metric::StealPercent,
            Metric::Interrupts,
        ] {
            assert!(metrics[&metric] >= 0.0, "{metrics:?}");
        }
    }
}
