//! System calls of processes, counted by the kernel's tracepoint `raw_syscalls:sys_enter`.

use block::{Error, ErrorKind, Result};
use perf_event::{Builder, Counter, events::Tracepoint};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// How often the threads of a process are listed until no new one is found.
const LOOKS_MAX: usize = 10;

/// Counts what some processes ask of the kernel, from when it is made.
#[derive(Debug)]
pub(crate) struct Syscalls {
    /// Of each thread, and of those that it starts.
    counters: BTreeMap<i32, Counter>,
}

impl Syscalls {
    /// Of the threads that `pids` have, and those that they will have.
    ///
    /// # Errors
    ///
    /// The kernel has no such tracepoint or shows it to nobody here, or does not let this user count.
    pub(crate) fn of(pids: &[u32]) -> Result<Self> {
        let id = tracepoint().ok_or_else(|| {
            Error::unsupported(
                "system calls cannot be counted: no tracefs that can be read is mounted \
                 (mount -t tracefs none /sys/kernel/tracing), or the kernel has no raw_syscalls:sys_enter",
            )
        })?;
        let mut counters = BTreeMap::new();
        for pid in pids {
            // A thread that is started while the others are listed has its parent's counter, or is seen the next time.
            for _ in 0..LOOKS_MAX {
                let before = counters.len();
                for thread in threads(*pid) {
                    if counters.contains_key(&thread) {
                        continue;
                    }
                    match open(id, thread) {
                        Ok(counter) => counters.insert(thread, counter),
                        // It has ended.
                        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => None,
                        Err(error) => {
                            return Err(Error::new(
                                ErrorKind::Unsupported,
                                format!(
                                    "system calls cannot be counted (perf_event_open: {error}): be root, have \
                                     CAP_PERFMON, or lower /proc/sys/kernel/perf_event_paranoid"
                                ),
                            ));
                        }
                    };
                }
                if counters.len() == before {
                    break;
                }
            }
        }
        Ok(Self { counters })
    }

    /// How many there were until now.
    pub(crate) fn count(&mut self) -> u64 {
        let counters = self.counters.values_mut();
        counters.filter_map(|counter| counter.read().ok()).sum()
    }
}

fn open(id: u64, thread: i32) -> std::io::Result<Counter> {
    let mut builder = Builder::new(Tracepoint::with_id(id));
    // The tracepoint is in the kernel.
    builder
        .observe_pid(thread)
        .any_cpu()
        .exclude_kernel(false)
        .exclude_hv(false)
        .inherit(true);
    let mut counter = builder.build()?;
    counter.enable()?;
    Ok(counter)
}

fn threads(pid: u32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    tasks
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .collect()
}

/// The tracepoint's number.
fn tracepoint() -> Option<u64> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let roots = [
        PathBuf::from("/sys/kernel/tracing"),
        PathBuf::from("/sys/kernel/debug/tracing"),
    ];
    let elsewhere = mounts.lines().filter_map(|line| {
        // ID PARENT MAJOR:MINOR ROOT POINT … - TYPE …
        let (left, right) = line.split_once(" - ")?;
        let is_tracefs = right.starts_with("tracefs ");
        is_tracefs.then(|| left.split(' ').nth(4).map(PathBuf::from))?
    });
    roots
        .into_iter()
        .chain(elsewhere)
        .find_map(|root| id(&root))
}

fn id(root: &Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("events/raw_syscalls/sys_enter/id")).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thousand() {
        for _ in 0..1000 {
            let _ = rustix::process::getppid();
        }
    }

    #[test]
    fn calls_of_all_threads_are_counted() {
        let own = std::process::id();
        let (ask, asked) = std::sync::mpsc::channel::<()>();
        // One that is there before, and one that comes later.
        let there = std::thread::spawn(move || {
            let _ = asked.recv();
            thousand();
        });
        let mut syscalls = match Syscalls::of(&[own]) {
            Ok(syscalls) => syscalls,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
                assert!(error.to_string().contains("cannot be counted"), "{error}");
                eprintln!("not tested: {error}");
                drop(ask);
                there.join().unwrap();
                return;
            }
        };
        let before = syscalls.count();
        drop(ask);
        there.join().unwrap();
        let later = std::thread::spawn(thousand);
        later.join().unwrap();
        assert!(syscalls.count() - before >= 2000);
    }
}
