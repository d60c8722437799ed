//! What processes have used so far. Unsafe code: the clocks of other processes.

use block::{Context, Error, Result};
use std::time::Duration;

/// CPU time of a process so far, user and system, of threads that have ended too.
///
/// # Errors
///
/// There is no such process.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    let mut clock: libc::clockid_t = 0;
    // The kernel would take 0 for this process, and cut larger numbers than `PID_MAX_LIMIT`.
    let id = i32::try_from(pid)
        .ok()
        .filter(|id| (1..=1 << 22).contains(id));
    let gone = || Error::invalid(format!("--pid {pid}: there is no such process"));
    // SAFETY: writes to the variable only.
    if unsafe { libc::clock_getcpuclockid(id.ok_or_else(gone)?, &mut clock) } != 0 {
        return Err(gone());
    }
    read(clock).map_err(|_| gone())
}

/// CPU time of this process so far.
pub(crate) fn own_cpu() -> Duration {
    read(libc::CLOCK_PROCESS_CPUTIME_ID).unwrap_or_default()
}

fn read(clock: libc::clockid_t) -> std::io::Result<Duration> {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes to the variable only.
    if unsafe { libc::clock_gettime(clock, &mut now) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(Duration::new(now.tv_sec as u64, now.tv_nsec as u32))
}

/// Voluntary and involuntary context switches so far of the threads that there are.
pub(crate) fn switches(pid: u32) -> Result<u64> {
    let tasks = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(&tasks).context(|| tasks)?;
    let texts = tasks
        .flatten()
        // A thread may end meanwhile.
        .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
    Ok(texts.map(|text| switches_in(&text)).sum())
}

fn switches_in(status: &str) -> u64 {
    let values = status.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.ends_with("voluntary_ctxt_switches")
            .then(|| value.trim().parse::<u64>().ok())?
    });
    values.sum()
}

/// Resident memory in bytes.
pub(crate) fn rss(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).context(|| path)?;
    Ok(rss_in(&text).unwrap_or(0))
}

fn rss_in(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// CPU time in the kernel's ticks of 1/100 s: how it divides, not how much it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ticks {
    pub user: u64,
    pub system: u64,
}

impl Ticks {
    /// Of a process, with threads that have ended.
    fn of(pid: u32) -> Self {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        Self::parse(&stat).unwrap_or_default()
    }

    /// The part in user mode.
    pub(crate) fn user_part(self) -> f64 {
        match self.user + self.system {
            0 => 0.0,
            all => self.user as f64 / all as f64,
        }
    }

    fn since(self, before: Self) -> Self {
        Self {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
        }
    }

    fn add(&mut self, other: Self) {
        self.user += other.user;
        self.system += other.system;
    }

    /// PID (NAME) STATE …; the name may hold anything, user and system time are fields 14 and 15.
    fn parse(stat: &str) -> Option<Self> {
        let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
        let mut next = || fields.next()?.parse().ok();
        Some(Self {
            user: next()?,
            system: next()?,
        })
    }
}

/// What the servers have used so far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub server_cpu: Duration,
    pub server_ticks: Ticks,
    pub client_ticks: Ticks,
    pub server_switches: u64,
    pub client_cpu: Duration,
}

impl Usage {
    /// # Errors
    ///
    /// A process is gone.
    pub(crate) fn now(pids: &[u32]) -> Result<Self> {
        let mut usage = Self {
            client_cpu: own_cpu(),
            client_ticks: Ticks::of(std::process::id()),
            ..Self::default()
        };
        for pid in pids {
            usage.server_cpu += cpu(*pid)?;
            usage.server_switches += switches(*pid)?;
            usage.server_ticks.add(Ticks::of(*pid));
        }
        Ok(usage)
    }

    /// What was used between `before` and this.
    pub(crate) fn since(&self, before: &Self) -> Self {
        Self {
            server_cpu: self.server_cpu.saturating_sub(before.server_cpu),
            server_switches: self.server_switches.saturating_sub(before.server_switches),
            client_cpu: self.client_cpu.saturating_sub(before.client_cpu),
            server_ticks: self.server_ticks.since(before.server_ticks),
            client_ticks: self.client_ticks.since(before.client_ticks),
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.server_cpu += other.server_cpu;
        self.server_switches += other.server_switches;
        self.client_cpu += other.client_cpu;
        self.server_ticks.add(other.server_ticks);
        self.client_ticks.add(other.client_ticks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_processes_is_seen_with_that_of_ended_threads() {
        let own = std::process::id();
        let before = cpu(own).unwrap();
        let burn = || {
            let until = own_cpu() + Duration::from_millis(20);
            while own_cpu() < until {
                std::hint::spin_loop();
            }
        };
        std::thread::spawn(burn).join().unwrap();
        assert!(cpu(own).unwrap() - before >= Duration::from_millis(20));
        assert!(rss(own).unwrap() > 100_000);
        assert!(switches(own).unwrap() > 0);
        for none in [0, u32::MAX, i32::MAX as u32] {
            let error = cpu(none).unwrap_err().to_string();
            assert!(error.contains("no such process"), "{error}");
        }
    }

    #[test]
    fn figures_are_found() {
        let status = "Name:\tx\nVmRSS:\t    1234 kB\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t12\n";
        assert_eq!(switches_in(status), 162);
        assert_eq!(rss_in(status), Some(1234 << 10));
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 31 0 0 20 0 1 0";
        let ticks = Ticks {
            user: 250,
            system: 31,
        };
        assert_eq!(Ticks::parse(stat), Some(ticks));
        assert_eq!(Ticks::parse("7 (x) S 1"), None);
    }
}
