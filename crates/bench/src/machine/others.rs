//! Whether the machine was ours while a sample was taken, and what its kernel did.

use super::interrupts::Sources;
use crate::{
    load::usage,
    metric::{Metric, Metrics},
};
use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

/// Ticks of `/proc/stat` per second (`USER_HZ`, the same on all machines).
const TICKS: f64 = 100.0;

/// Counters of the machine, at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Kernel {
    /// Cores that are there.
    cores: usize,
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
    fn since(self, before: Self) -> Self {
        Self {
            miss: self.miss.saturating_sub(before.miss),
            foreign: self.foreign.saturating_sub(before.foreign),
            other: self.other.saturating_sub(before.other),
            migrated: self.migrated.saturating_sub(before.migrated),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            miss: self.miss + other.miss,
            foreign: self.foreign + other.foreign,
            other: self.other + other.other,
            migrated: self.migrated + other.migrated,
        }
    }

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
    sources: Sources,
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
            sources: Sources::parse(&read("/proc/interrupts")),
            load: load_average(&read("/proc/loadavg")),
            own: usage::own_cpu(),
            servers: servers.to_vec(),
            servers_used: servers
                .iter()
                .map(|pid| usage::cpu(*pid).unwrap_or_default())
                .sum(),
        }
    }

    /// What the machine did since.
    pub(crate) fn since(&self) -> Activity {
        let now = Self::begin(&self.servers);
        let ours =
            now.own.saturating_sub(self.own) + now.servers_used.saturating_sub(self.servers_used);
        let busy_s = now.kernel.busy_s - self.kernel.busy_s;
        let stolen_s = (now.kernel.stolen_s - self.kernel.stolen_s).max(0.0);
        Activity {
            seconds: self.began.elapsed().as_secs_f64(),
            core_s: (busy_s - stolen_s).max(0.0) / now.kernel.cores.max(1) as f64,
            others_s: busy_s - ours.as_secs_f64(),
            stolen_s,
            interrupts: now.kernel.interrupts.saturating_sub(self.kernel.interrupts),
            sources: now.sources.since(&self.sources),
            numa: now
                .kernel
                .numa
                .zip(self.kernel.numa)
                .map(|(now, before)| now.since(before)),
            load: self.load,
        }
    }
}

/// What the machine did in one stretch of time, or in several.
#[derive(Clone, Debug, Default)]
pub(crate) struct Activity {
    seconds: f64,
    /// CPU time that all used here, of a core on average.
    core_s: f64,
    /// CPU time that neither we nor the servers used: other processes, the kernel's own threads, and what the hypervisor gave
    /// to others. Of a short stretch it may be less than nothing: the kernel counts all in ticks of 10 ms, and what we used finer. Over
    /// several stretches that evens out.
    others_s: f64,
    stolen_s: f64,
    interrupts: u64,
    sources: Sources,
    numa: Option<Numa>,
    /// When the first stretch began.
    load: f64,
}

impl Activity {
    /// With another stretch.
    pub(crate) fn add(&mut self, other: &Self) {
        if self.seconds == 0.0 {
            self.load = other.load;
        }
        self.seconds += other.seconds;
        self.core_s += other.core_s;
        self.others_s += other.others_s;
        self.stolen_s += other.stolen_s;
        self.interrupts += other.interrupts;
        self.sources.add(&other.sources);
        self.numa = match (self.numa, other.numa) {
            (Some(own), Some(other)) => Some(own.plus(other)),
            (own, other) => own.or(other),
        };
    }

    /// CPU time of others, in percent of one core.
    pub(crate) fn others_percent(&self) -> f64 {
        (self.others_s / self.seconds.max(1e-3) * 100.0).max(0.0)
    }

    /// Interrupts a second, by their source.
    pub(crate) fn interrupts(&self) -> BTreeMap<String, f64> {
        self.sources.rates(self.seconds.max(1e-3))
    }

    /// Adds it to the figures of a load.
    pub(crate) fn add_to(&self, metrics: &mut Metrics) {
        let seconds = self.seconds.max(1e-3);
        metrics.insert(Metric::OthersPercent, self.others_percent());
        metrics.insert(Metric::HostPercent, self.core_s / seconds * 100.0);
        metrics.insert(Metric::LoadAverage, self.load);
        metrics.insert(Metric::StealPercent, self.stolen_s / seconds * 100.0);
        let rate = |count: u64| count as f64 / seconds;
        if let Some(iops) = metrics.get(&Metric::Iops).filter(|iops| **iops > 0.0) {
            metrics.insert(Metric::Interrupts, rate(self.interrupts) / iops);
        }
        if let Some(numa) = self.numa {
            metrics.extend([
                (Metric::NumaMisses, rate(numa.miss)),
                (Metric::NumaForeign, rate(numa.foreign)),
                (Metric::NumaOther, rate(numa.other)),
                (Metric::NumaMigrated, rate(numa.migrated)),
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
        let ticks = ticks(stat);
        let busy = ticks.iter().enumerate();
        let busy: f64 = busy
            .filter(|(n, _)| !matches!(n, 3 | 4))
            .map(|(_, t)| t)
            .sum();
        let first = |text: &str| text.split_whitespace().next()?.parse().ok();
        let core = |line: &&str| {
            let rest = line.strip_prefix("cpu");
            rest.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        };
        Self {
            cores: stat.lines().filter(core).count(),
            busy_s: busy / TICKS,
            stolen_s: ticks.get(7).copied().unwrap_or_default() / TICKS,
            interrupts: line("intr").and_then(first).unwrap_or_default(),
            numa: vmstat.as_deref().map(Numa::parse),
        }
    }
}

/// Ticks of all cores, from a `/proc/stat`: user nice system IDLE IOWAIT irq softirq STEAL; guests are part of user.
fn ticks(stat: &str) -> Vec<f64> {
    let own = stat.lines().find_map(|line| line.strip_prefix("cpu "));
    let ticks = own.unwrap_or_default().split_whitespace().take(8);
    ticks.filter_map(|ticks| ticks.parse().ok()).collect()
}

/// Seconds of all cores in user mode, and in the kernel (interrupts too), from a `/proc/stat`.
pub(crate) fn modes_s(stat: &str) -> (f64, f64) {
    let ticks = ticks(stat);
    let sum = |which: &[usize]| -> f64 {
        let own = which.iter().filter_map(|n| ticks.get(*n));
        own.sum::<f64>() / TICKS
    };
    (sum(&[0, 1]), sum(&[2, 5, 6]))
}

/// Seconds of all cores that were not idle, from a `/proc/stat`.
pub(crate) fn busy_s(stat: &str) -> f64 {
    Kernel::parse(stat, &None).busy_s
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
            cores: 1,
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
        assert_eq!((modes_s(stat), modes_s("")), ((1.1, 0.23), (0.0, 0.0)));
        assert_eq!(load_average("1.25 0.9 0.8 2/300 12\n"), 1.25);
    }

    #[test]
    fn what_the_machine_did_is_told() {
        let activity = Watch::begin(&[]).since();
        let mut metrics = Metrics::from([(Metric::Iops, 10.0)]);
        activity.add_to(&mut metrics);
        for metric in [
            Metric::HostPercent,
            Metric::OthersPercent,
            Metric::LoadAverage,
            Metric::StealPercent,
            Metric::Interrupts,
        ] {
            assert!(metrics[&metric] >= 0.0, "{metrics:?}");
        }
    }

    #[test]
    fn stretches_add_up() {
        let one = |seconds, others_s, interrupts, miss| Activity {
            seconds,
            core_s: seconds / 2.0,
            others_s,
            interrupts,
            stolen_s: 0.25 * seconds,
            sources: Sources::parse(&format!("CPU0\n 1: {interrupts} chip disk\n")),
            numa: Some(Numa {
                miss,
                ..Numa::default()
            }),
            load: seconds,
        };
        let mut all = Activity::default();
        all.add(&one(1.0, 0.5, 30, 6));
        all.add(&one(2.0, 0.1, 60, 3));
        let mut metrics = Metrics::from([(Metric::Iops, 10.0)]);
        all.add_to(&mut metrics);
        for (metric, expected) in [
            (Metric::HostPercent, 50.0),
            (Metric::OthersPercent, 20.0),
            (Metric::StealPercent, 25.0),
            (Metric::Interrupts, 3.0),
            (Metric::NumaMisses, 3.0),
            (Metric::LoadAverage, 1.0),
        ] {
            assert!((metrics[&metric] - expected).abs() < 1e-9, "{metrics:?}");
        }
        assert_eq!(all.interrupts(), [("disk".to_owned(), 30.0)].into());
        // Less than nothing in one stretch (of coarser ticks) evens out; of all there is never less.
        all.add(&one(1.0, -0.2, 0, 0));
        assert!((all.others_percent() - 10.0).abs() < 1e-9);
        all.add(&one(1.0, -9.0, 0, 0));
        assert_eq!(all.others_percent(), 0.0);
    }
}
