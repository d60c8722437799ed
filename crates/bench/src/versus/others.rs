//! Whether the machine was ours while a sample was taken.

use crate::load::usage;
use std::{
    fs,
    time::{Duration, Instant},
};

/// Ticks of `/proc/stat` per second (`USER_HZ`, the same on all machines).
const TICKS: u32 = 100;

/// CPU time of the machine and of those who take part, at a moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watch {
    began: Instant,
    machine: Duration,
    own: Duration,
    server: u32,
    server_used: Duration,
}

impl Watch {
    /// From now on; `server` is the process that is measured.
    pub(super) fn begin(server: u32) -> Self {
        Self {
            began: Instant::now(),
            machine: machine(),
            own: usage::own_cpu(),
            server,
            server_used: usage::cpu(server).unwrap_or_default(),
        }
    }

    /// CPU time that neither we nor the server used since, in percent of one core: other processes, the kernel's own
    /// threads, and what the hypervisor gave to others.
    pub(super) fn others_percent(&self) -> f64 {
        let now = Self::begin(self.server);
        let ours =
            now.own.saturating_sub(self.own) + now.server_used.saturating_sub(self.server_used);
        let others = now
            .machine
            .saturating_sub(self.machine)
            .saturating_sub(ours);
        others.as_secs_f64() / self.began.elapsed().as_secs_f64().max(1e-3) * 100.0
    }
}

fn machine() -> Duration {
    busy(&fs::read_to_string("/proc/stat").unwrap_or_default())
}

/// The time of all cores in `/proc/stat` that was not idle.
fn busy(stat: &str) -> Duration {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "));
    let fields = line.unwrap_or_default().split_whitespace();
    // user nice system IDLE IOWAIT irq softirq steal; guests are part of user.
    let ticks: u32 = fields
        .take(8)
        .enumerate()
        .filter(|(n, _)| !matches!(n, 3 | 4))
        .filter_map(|(_, ticks)| ticks.parse::<u32>().ok())
        .fold(0, u32::wrapping_add);
    Duration::from_secs(1) * ticks / TICKS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_busy() {
        let stat = "cpu  100 10 20 9999 999 1 2 67 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(busy(stat), Duration::from_secs(2));
        assert_eq!(busy(""), Duration::ZERO);
    }
}
