//! What processes have used so far. Unsafe code: the clocks of other processes.

use super::{Report, Spec, syscalls::Syscalls};
use block::{Context, Error, Result};
use std::{collections::BTreeMap, path::Path, time::Duration};
use trace::{Totals, control::Client};

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

/// Memory of a process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Resident.
    pub resident: u64,
    /// The most that was resident at a time.
    pub peak: u64,
    /// Resident and nobody's but its own: no guest's memory, which is shared, and no program's text, which is a file's.
    pub anonymous: u64,
}

impl Memory {
    /// # Errors
    ///
    /// There is no such process.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text = std::fs::read_to_string(&path).context(|| path)?;
        Ok(Self::parse(&text))
    }

    fn parse(status: &str) -> Self {
        let of = |field| bytes_in(status, field).unwrap_or_default();
        Self {
            resident: of("VmRSS:"),
            peak: of("VmHWM:"),
            anonymous: of("RssAnon:"),
        }
    }
}

fn bytes_in(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// What `/proc/PID/stat` counts. CPU time there is in the kernel's ticks of 1/100 s: how it divides, not how much it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ticks {
    pub user: u64,
    pub system: u64,
    /// Page faults, and those of them that had to wait for a device.
    pub faults: u64,
    pub major_faults: u64,
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
            faults: self.faults.saturating_sub(before.faults),
            major_faults: self.major_faults.saturating_sub(before.major_faults),
        }
    }

    fn add(&mut self, other: Self) {
        self.user += other.user;
        self.system += other.system;
        self.faults += other.faults;
        self.major_faults += other.major_faults;
    }

    /// PID (NAME) STATE …; the name may hold anything. Minor and major faults are fields 10 and 12, each followed by those of
    /// children, user and system time fields 14 and 15.
    fn parse(stat: &str) -> Option<Self> {
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        // The state is field 3.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let major_faults = field(12)?;
        Some(Self {
            user: field(14)?,
            system: field(15)?,
            faults: field(10)?.saturating_add(major_faults),
            major_faults,
        })
    }
}

/// Those whose use is looked at: the servers, and this process.
#[derive(Debug)]
pub(crate) struct Watched<'a> {
    pids: &'a [u32],
    syscalls: Option<Syscalls>,
    control: Option<&'a Path>,
}

impl<'a> Watched<'a> {
    /// What `pids` use, and what the diskplane at `control` says of its stages.
    pub(crate) fn pids(pids: &'a [u32], control: Option<&'a Path>) -> Self {
        Self {
            pids,
            syscalls: None,
            control,
        }
    }

    /// # Errors
    ///
    /// System calls are to be counted and cannot be.
    pub(crate) fn of(spec: &'a Spec) -> Result<Self> {
        Ok(Self {
            pids: &spec.server_pids,
            syscalls: match spec.count_syscalls {
                true => Some(Syscalls::of(&spec.server_pids)?),
                false => None,
            },
            control: spec.control.as_deref(),
        })
    }

    /// What was used until now, where a measurement begins. The server's answer about its stages is not part of that: it is asked
    /// for first.
    ///
    /// # Errors
    ///
    /// A process is gone, or the control socket is none of a diskplane that is there.
    pub(crate) fn begin(&mut self) -> Result<Usage> {
        let stages = self.stages()?;
        Ok(Usage {
            stages,
            ..self.used()?
        })
    }

    /// What was used until now, where a measurement ends: the server's answer costs it nothing here, either.
    ///
    /// # Errors
    ///
    /// As above.
    pub(crate) fn end(&mut self) -> Result<Usage> {
        let used = self.used()?;
        Ok(Usage {
            stages: self.stages()?,
            ..used
        })
    }

    /// What requests have spent in the server's stages.
    fn stages(&self) -> Result<BTreeMap<String, Totals>> {
        let Some(control) = self.control else {
            return Ok(BTreeMap::new());
        };
        // Anew each time: a server does not wait for long between two questions.
        let totals = Client::connect(control)?.totals()?.into_iter();
        Ok(totals.map(|(o, t)| (o.name().to_owned(), t)).collect())
    }

    fn used(&mut self) -> Result<Usage> {
        let mut usage = Usage {
            client_cpu: own_cpu(),
            client_ticks: Ticks::of(std::process::id()),
            syscalls: self.syscalls.as_mut().map(Syscalls::count),
            ..Usage::default()
        };
        for pid in self.pids {
            usage.server_cpu += cpu(*pid)?;
            usage.server_switches += switches(*pid)?;
            usage.server_ticks.add(Ticks::of(*pid));
        }
        Ok(usage)
    }
}

/// What the servers have used so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Usage {
    pub server_cpu: Duration,
    pub server_ticks: Ticks,
    pub client_ticks: Ticks,
    pub server_switches: u64,
    pub client_cpu: Duration,
    /// System calls of the servers; `None` where they are not counted.
    pub syscalls: Option<u64>,
    /// What requests of the server's disks spent in its stages, by operation.
    pub stages: BTreeMap<String, Totals>,
}

impl Usage {
    /// What was used between `before` and this.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let earlier = |operation: &String| before.stages.get(operation).copied();
        let stages = self.stages.iter().map(|(operation, totals)| {
            let since = totals.since(&earlier(operation).unwrap_or_default());
            (operation.clone(), since)
        });
        Self {
            stages: stages.filter(|(_, totals)| totals.count > 0).collect(),
            syscalls: self
                .syscalls
                .zip(before.syscalls)
                .map(|(now, before)| now.saturating_sub(before)),
            server_cpu: self.server_cpu.saturating_sub(before.server_cpu),
            server_switches: self.server_switches.saturating_sub(before.server_switches),
            client_cpu: self.client_cpu.saturating_sub(before.client_cpu),
            server_ticks: self.server_ticks.since(before.server_ticks),
            client_ticks: self.client_ticks.since(before.client_ticks),
        }
    }

    /// Says in a report what was used for `ios` reads and writes, `requests` with flushes, and what memory `pids` have now.
    ///
    /// # Errors
    ///
    /// A process is gone.
    pub(crate) fn tell(
        self,
        pids: &[u32],
        ios: f64,
        requests: f64,
        report: &mut Report,
    ) -> Result<()> {
        let cpu = |time: Duration| time.as_secs_f64() * 1e6 / ios;
        let per_request = |count: u64| count as f64 / requests;
        report.client_cpu_us_per_io = cpu(self.client_cpu);
        report.client_user_us_per_io = self.client_ticks.user_part() * cpu(self.client_cpu);
        report.server_syscalls_per_io = self.syscalls.map(per_request);
        report.stages = self.stages;
        if pids.is_empty() {
            return Ok(());
        }
        let mut memory = Memory::default();
        for pid in pids {
            let of = Memory::of(*pid)?;
            memory.resident += of.resident;
            memory.peak += of.peak;
            memory.anonymous += of.anonymous;
        }
        let (server, ticks) = (cpu(self.server_cpu), self.server_ticks);
        report.server_cpu_us_per_io = Some(server);
        report.server_user_us_per_io = Some(ticks.user_part() * server);
        report.server_switches_per_io = Some(per_request(self.server_switches));
        report.server_faults_per_io = Some(per_request(ticks.faults));
        report.server_major_faults_per_io = Some(per_request(ticks.major_faults));
        report.server_rss_bytes = Some(memory.resident);
        report.server_peak_bytes = Some(memory.peak);
        report.server_anonymous_bytes = Some(memory.anonymous);
        Ok(())
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.server_cpu += other.server_cpu;
        self.server_switches += other.server_switches;
        self.client_cpu += other.client_cpu;
        self.server_ticks.add(other.server_ticks);
        self.client_ticks.add(other.client_ticks);
        if let Some(more) = other.syscalls {
            *self.syscalls.get_or_insert(0) += more;
        }
        for (operation, totals) in &other.stages {
            let mine = self.stages.entry(operation.clone()).or_default();
            mine.add(totals);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trace::control::{End, Hello, Line, VERSION};

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
        let memory = Memory::of(own).unwrap();
        assert!(memory.resident > 100_000 && memory.anonymous > 10_000);
        assert!(memory.peak >= memory.anonymous);
        assert!(Ticks::of(own).faults > 0);
        assert!(switches(own).unwrap() > 0);
        for none in [0, u32::MAX, i32::MAX as u32] {
            let error = cpu(none).unwrap_err().to_string();
            assert!(error.contains("no such process"), "{error}");
        }
    }

    /// A control socket that is served by this process, whose answer takes CPU time: none of it is the measurement's.
    #[test]
    fn what_the_question_costs_is_not_counted() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("control");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let burnt = Duration::from_millis(50);
        let own = [std::process::id()];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..2 {
                    let (mut stream, _) = listener.accept().unwrap();
                    let hello = Line::Hello(Hello {
                        control: VERSION,
                        diskplane: String::new(),
                        pid: own[0],
                    });
                    let end = Line::End(End::default());
                    let [hello, end] =
                        [hello, end].map(|line| serde_json::to_string(&line).unwrap() + "\n");
                    std::io::Write::write_all(&mut stream, hello.as_bytes()).unwrap();
                    let mut line = String::new();
                    let mut lines = std::io::BufReader::new(stream.try_clone().unwrap());
                    std::io::BufRead::read_line(&mut lines, &mut line).unwrap();
                    let until = own_cpu() + burnt;
                    while own_cpu() < until {
                        std::hint::spin_loop();
                    }
                    std::io::Write::write_all(&mut stream, end.as_bytes()).unwrap();
                }
            });
            let mut watched = Watched::pids(&own, Some(&socket));
            let before = watched.begin().unwrap();
            let used = watched.end().unwrap().since(&before);
            assert!(used.server_cpu < burnt, "{:?}", used.server_cpu);
        });
    }

    #[test]
    fn figures_are_found() {
        let status = "Name:\tx\nVmHWM:\t 2000 kB\nVmRSS:\t    1234 kB\nRssAnon:\t 34 kB\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t12\n";
        assert_eq!(switches_in(status), 162);
        let memory = Memory {
            resident: 1234 << 10,
            peak: 2000 << 10,
            anonymous: 34 << 10,
        };
        assert_eq!(Memory::parse(status), memory);
        assert_eq!(Memory::parse(""), Memory::default());
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 7 5 9 250 31 0 0 20 0 1 0";
        let ticks = Ticks {
            user: 250,
            system: 31,
            faults: 105,
            major_faults: 5,
        };
        assert_eq!(Ticks::parse(stat), Some(ticks));
        assert_eq!(Ticks::parse("7 (x) S 1"), None);
    }
}
