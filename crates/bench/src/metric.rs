//! The figures that a sample may say, by name.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What one sample said.
pub type Metrics = BTreeMap<Metric, f64>;

/// What a sample says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Reads and writes per second.
    Iops,
    /// Pairs of a read and a write per second: half of [`Metric::Iops`].
    Pairs,
    /// Server CPU, microseconds per read or write.
    CpuUs,
    /// Median latency, microseconds.
    P50Us,
    /// 99th percentile of the latency, microseconds.
    P99Us,
    /// `fdatasync` calls per flush that was acknowledged (diskplane only).
    BarriersPerFlush,
    /// Anonymous memory of the server process, MiB: no guest memory, no program text.
    MemoryMib,
    /// Server CPU while clients rest, percent of a core.
    IdlePercent,
    /// Requests that the block device below had at a time, on average: [`Metric::Iops`] times the time that it took for
    /// each (Little's law). Less than the load's depth by those that were on their way.
    InDevice,
    /// CPU that neither the server nor the load used, percent of a core: other processes, and the hypervisor's other guests.
    OthersPercent,
    /// How often a command could run in a second, one after the other: 1 / [`Metric::ElapsedS`].
    Runs,
    /// Seconds from a command's start to its end.
    ElapsedS,
    /// CPU that a command used, seconds of user and system time.
    CpuS,
    /// Most memory that a command, or a server since it was started, had resident at a time (`VmHWM`), MiB.
    PeakMib,
    /// 10^6 bytes read and written per second.
    MbS,
    /// Mean latency, microseconds.
    MeanUs,
    /// 90th percentile of the latency, microseconds.
    P90Us,
    /// 99.9th percentile.
    P999Us,
    /// 99.99th percentile.
    P9999Us,
    /// The slowest request, microseconds.
    MaxUs,
    /// [`Metric::CpuUs`] in user mode.
    CpuUserUs,
    /// [`Metric::CpuUs`] in the kernel.
    CpuSystemUs,
    /// CPU of the load's generator, microseconds per read or write.
    ClientCpuUs,
    /// [`Metric::ClientCpuUs`] in user mode.
    ClientUserUs,
    /// [`Metric::ClientCpuUs`] in the kernel.
    ClientSystemUs,
    /// Server CPU in percent of a core, for each MB/s.
    CpuPercentPerMb,
    /// Server CPU in percent of a core.
    CpuPercent,
    /// CPU of the whole machine, whoever used it, percent of all its cores: the load's and the server's part too.
    HostPercent,
    /// Context switches of the server per request.
    Switches,
    /// System calls of the server per request, counted in a short load of its own after the one that is timed; absent where
    /// the kernel does not let them be counted.
    Syscalls,
    /// Page faults of the server per request.
    PageFaults,
    /// Those of them that waited for a device.
    MajorFaults,
    /// KiB of a read at the block device, on average.
    DeviceReadKib,
    /// KiB of a write at the block device, on average.
    DeviceWriteKib,
    /// Of the requests to the block device, percent that it merged into others.
    DeviceMergedPercent,
    /// Percent of the time that the block device had something to do.
    DeviceBusyPercent,
    /// Interrupts of the machine per read or write of the load.
    Interrupts,
    /// Pages per second that came from another node than wished (`numa_miss`); absent where there is one node.
    NumaMisses,
    /// Pages per second that other nodes got here for want of their own (`numa_foreign`); likewise.
    NumaForeign,
    /// Pages per second that a process got on a node on which it does not run (`numa_other`); likewise.
    NumaOther,
    /// Pages per second that the kernel moved from node to node (`numa_pages_migrated`); likewise.
    NumaMigrated,
    /// CPU that a guest's kernel says it used, of all its cores, percent of one.
    GuestPercent,
    /// [`Metric::GuestPercent`] in user mode.
    GuestUserPercent,
    /// [`Metric::GuestPercent`] in the kernel, interrupts too.
    GuestSystemPercent,
    /// [`Metric::GuestPercent`] for each MB/s: the storage-stack study's "%vcpu per MB/sec".
    GuestPercentPerMb,
    /// CPU of the guest's QEMU, percent of a core: the guest's own work too.
    EmulatorPercent,
    /// Interrupts in the guest per read or write of its load.
    GuestInterrupts,
    /// CPU that the hypervisor gave to others, percent of a core.
    StealPercent,
    /// Processes that ran or waited to, when the sample began (`/proc/loadavg`, the last minute).
    LoadAverage,
}

impl Metric {
    /// For the head of a table.
    pub fn title(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::Pairs => "read+write pairs/s",
            Self::CpuUs => "CPU µs/IO",
            Self::P50Us => "p50 µs",
            Self::P99Us => "p99 µs",
            Self::BarriersPerFlush => "barriers/flush",
            Self::MemoryMib => "memory MiB",
            Self::IdlePercent => "idle CPU %",
            Self::InDevice => "in device",
            Self::OthersPercent => "others' CPU %",
            Self::Runs => "runs/s",
            Self::ElapsedS => "elapsed s",
            Self::CpuS => "CPU s",
            Self::PeakMib => "peak MiB",
            Self::MbS => "MB/s",
            Self::MeanUs => "mean µs",
            Self::P90Us => "p90 µs",
            Self::P999Us => "p99.9 µs",
            Self::P9999Us => "p99.99 µs",
            Self::MaxUs => "slowest µs",
            Self::CpuUserUs => "CPU user µs/IO",
            Self::CpuSystemUs => "CPU system µs/IO",
            Self::ClientCpuUs => "client CPU µs/IO",
            Self::ClientUserUs => "client user µs/IO",
            Self::ClientSystemUs => "client system µs/IO",
            Self::CpuPercentPerMb => "CPU % per MB/s",
            Self::CpuPercent => "CPU %",
            Self::HostPercent => "host CPU %",
            Self::Switches => "context switches/IO",
            Self::Syscalls => "system calls/IO",
            Self::PageFaults => "page faults/IO",
            Self::MajorFaults => "major faults/IO",
            Self::DeviceReadKib => "device read KiB",
            Self::DeviceWriteKib => "device write KiB",
            Self::DeviceMergedPercent => "device merged %",
            Self::DeviceBusyPercent => "device busy %",
            Self::Interrupts => "interrupts/IO",
            Self::NumaMisses => "NUMA misses/s",
            Self::NumaForeign => "NUMA foreign/s",
            Self::NumaOther => "NUMA other/s",
            Self::NumaMigrated => "NUMA migrated/s",
            Self::GuestPercent => "guest CPU %",
            Self::GuestUserPercent => "guest user %",
            Self::GuestSystemPercent => "guest system %",
            Self::GuestPercentPerMb => "guest CPU % per MB/s",
            Self::EmulatorPercent => "QEMU CPU %",
            Self::GuestInterrupts => "guest interrupts/IO",
            Self::StealPercent => "stolen CPU %",
            Self::LoadAverage => "load average",
        }
    }

    /// Its name in records: `iops`, `cpu-us` …
    pub fn name(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|name| name.as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    /// Whether it says how well a side does, rather than what the machine did meanwhile or how the figure came about.
    pub fn judges(self) -> bool {
        !matches!(
            self,
            Self::OthersPercent
                | Self::InDevice
                | Self::DeviceReadKib
                | Self::DeviceWriteKib
                | Self::DeviceMergedPercent
                | Self::DeviceBusyPercent
                | Self::GuestPercent
                | Self::GuestUserPercent
                | Self::GuestSystemPercent
                | Self::GuestPercentPerMb
                | Self::EmulatorPercent
                | Self::GuestInterrupts
                | Self::StealPercent
                | Self::LoadAverage
                | Self::NumaMisses
                | Self::NumaForeign
                | Self::NumaOther
                | Self::NumaMigrated
                | Self::Interrupts
                | Self::CpuPercent
                | Self::HostPercent
        )
    }

    /// Whether more is better.
    pub fn more_is_better(self) -> bool {
        matches!(
            self,
            Self::Iops | Self::Pairs | Self::InDevice | Self::Runs | Self::MbS
        )
    }

    /// Which way is better, for the head of a chart.
    pub fn better(self) -> &'static str {
        match self.more_is_better() {
            true => "more is better",
            false => "less is better",
        }
    }
}

/// A figure in three digits.
pub fn number(metric: Metric, value: f64) -> String {
    match metric {
        Metric::Iops | Metric::Pairs if value >= 1e6 => format!("{:.2} M", value / 1e6),
        Metric::Iops | Metric::Pairs if value >= 1e4 => format!("{:.1} k", value / 1e3),
        Metric::Iops | Metric::Pairs => format!("{value:.0}"),
        _ if value.abs() >= 100.0 => format!("{value:.0}"),
        _ if value.abs() >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        for (metric, value, expected) in [
            (Metric::Iops, 1_060_000.0, "1.06 M"),
            (Metric::Iops, 55_140.0, "55.1 k"),
            (Metric::Iops, 812.3, "812"),
            (Metric::CpuUs, 5.125, "5.12"),
            (Metric::P50Us, 88.42, "88.4"),
            (Metric::P50Us, 512.7, "513"),
        ] {
            assert_eq!(number(metric, value), expected);
        }
    }

    #[test]
    fn names_are_those_of_records() {
        for (metric, name) in [
            (Metric::CpuUs, "cpu-us"),
            (Metric::P9999Us, "p9999-us"),
            (Metric::CpuPercentPerMb, "cpu-percent-per-mb"),
        ] {
            assert_eq!(metric.name(), name);
            let read: Metric = serde_json::from_str(&format!("\"{name}\"")).unwrap();
            assert_eq!(read, metric);
        }
        assert!(Metric::MbS.more_is_better() && !Metric::MeanUs.more_is_better());
    }
}
