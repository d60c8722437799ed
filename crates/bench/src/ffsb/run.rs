//! A load from its files to its report.

use super::{
    Outcome, Spec,
    set::Set,
    work::{MEASURE, RAMP, STOP, Shared, Tally, Worker},
};
use crate::{
    load::{
        Report,
        usage::{Usage, Watched},
    },
    machine::process::{self, Folder},
};
use block::{Context, Error, ErrorKind, Result};
use std::{
    path::Path,
    sync::{
        atomic::{AtomicU8, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

/// Makes the files that are not there, runs the load, and removes what it created beside them.
///
/// # Errors
///
/// What is asked for does not go together; the file system is too small, or fails: with the file, and where in it.
pub fn run(spec: &Spec) -> Result<Outcome> {
    prepare(spec)?.run()
}

/// Removes all files of loads in a directory.
///
/// # Errors
///
/// There are none, they are not ours, or what the file system said.
pub fn clean(dir: &Path) -> Result<()> {
    let root = dir.join("ffsb");
    process::is_left_over(&root)?;
    process::remove_folder(&root).context(|| root.display().to_string())
}

/// A load whose files are there.
#[derive(Debug)]
pub struct Prepared<'a> {
    shared: Shared<'a>,
    /// Of what is created, which goes with it.
    _new: Folder,
}

/// Makes the files that are not there.
///
/// # Errors
///
/// As [`run()`].
pub fn prepare(spec: &Spec) -> Result<Prepared<'_>> {
    spec.check()?;
    let set = Set::ready(spec)?;
    Ok(Prepared {
        _new: set.new_files()?,
        shared: Shared {
            spec,
            set,
            phase: AtomicU8::new(if spec.ramp.is_zero() { MEASURE } else { RAMP }),
            left: AtomicU64::new(spec.ios_max.unwrap_or(u64::MAX)),
            space: AtomicU64::new(0),
        },
    })
}

impl Prepared<'_> {
    /// Runs the load, and removes what it created beside its files.
    ///
    /// # Errors
    ///
    /// As [`run()`].
    pub fn run(self) -> Result<Outcome> {
        drive(&self.shared).inspect_err(|_| process::goes_on())
    }
}

fn drive(shared: &Shared<'_>) -> Result<Outcome> {
    let spec = shared.spec;
    thread::scope(|scope| {
        let (tell, heard) = mpsc::channel();
        let mut threads = Vec::new();
        for n in 0..spec.threads {
            let tell = tell.clone();
            let body = move || {
                let mut worker = Worker::new(shared, n);
                let done = worker.run();
                // Who fails ends all.
                if done.is_err() {
                    shared.phase.store(STOP, Ordering::Relaxed);
                }
                let _ = tell.send(());
                done.map(|()| worker.tally)
            };
            let thread = thread::Builder::new().name(format!("ffsb-{n}"));
            let thread = thread.spawn_scoped(scope, body).map_err(|error| {
                shared.phase.store(STOP, Ordering::Relaxed);
                Error::os("starting a thread", error)
            })?;
            threads.push(thread);
        }
        drop(tell);
        // Until that time is over, or all have ended.
        let mut running = spec.threads;
        let mut wait = |time: Option<Duration>| {
            let until = time.map(|time| Instant::now() + time);
            while running > 0 {
                let ended = match until {
                    None => heard.recv().is_ok(),
                    Some(until) => {
                        let left = until.saturating_duration_since(Instant::now());
                        heard.recv_timeout(left).is_ok()
                    }
                };
                if !ended {
                    return;
                }
                running -= 1;
            }
        };
        if !spec.ramp.is_zero() {
            wait(Some(spec.ramp));
        }
        let mut watched = Watched::pids(&spec.server_pids, spec.control.as_deref());
        let before = watched.begin();
        let began = Instant::now();
        // It may have been stopped.
        let _ = shared
            .phase
            .compare_exchange(RAMP, MEASURE, Ordering::Relaxed, Ordering::Relaxed);
        wait((!spec.duration.is_zero()).then_some(spec.duration));
        let window = began.elapsed();
        shared.phase.store(STOP, Ordering::Relaxed);
        let mut all = Tally::default();
        let mut failed = None;
        for thread in threads {
            match thread.join() {
                Ok(Ok(tally)) => all.merge(&tally),
                Ok(Err(error)) => failed = failed.or(Some(error)),
                Err(_) => failed = failed.or(Some(Error::new(ErrorKind::Io, "a thread panicked"))),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => {
                // Until the last of what was at work then had ended.
                let last = all.last.map_or(window, |last| last - began);
                let used = watched.end()?.since(&before?);
                report(spec, &all, window.max(last).as_secs_f64(), used)
            }
        }
    })
}

impl Tally {
    fn merge(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.bytes += other.bytes;
        self.counts.opened += other.counts.opened;
        self.counts.created += other.counts.created;
        self.counts.deleted += other.counts.deleted;
        self.counts.missed += other.counts.missed;
        self.read_latency.merge(&other.read_latency);
        self.write_latency.merge(&other.write_latency);
        self.fsync_latency.merge(&other.fsync_latency);
        self.timeline.merge(&other.timeline);
        self.last = self.last.max(other.last);
    }
}

fn report(spec: &Spec, all: &Tally, seconds: f64, used: Usage) -> Result<Outcome> {
    let seconds = seconds.max(1e-9);
    let blocks = all.reads + all.writes;
    let flush_latency = all.fsync_latency.percentiles();
    let mut report = Report {
        flushes: flush_latency.count,
        flush_latency,
        timeline: all.timeline.store(),
        ..Report::counted(
            seconds,
            all.bytes,
            (all.reads, &all.read_latency),
            (all.writes, &all.write_latency),
        )
    };
    let ios = blocks.max(1) as f64;
    used.tell(&spec.server_pids, ios, ios, &mut report)?;
    Ok(Outcome {
        report,
        counts: all.counts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffsb::{Counts, Scenario};
    use std::{collections::BTreeMap, fs};

    fn spec(dir: &Path, scenario: Scenario, threads: usize) -> Spec {
        Spec {
            files: if scenario == Scenario::MailServer {
                40
            } else {
                3
            },
            file_bytes: 1 << 20,
            directories: 4,
            direct: false,
            fsync: true,
            duration: Duration::ZERO,
            ios_max: Some(600),
            ..Spec::new(dir.to_owned(), scenario, threads, 4 << 20)
        }
    }

    /// Files below a folder, and their sizes.
    fn files(dir: &Path) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let (path, meta) = (entry.path(), entry.metadata().unwrap());
            match meta.is_dir() {
                true => all.extend(files(&path)),
                false => drop(all.insert(path.display().to_string(), meta.len())),
            }
        }
        all
    }

    #[test]
    fn every_scenario_does_what_it_says() {
        let dir = tempfile::tempdir().unwrap();
        for scenario in Scenario::ALL {
            for threads in [1, 4] {
                let spec = spec(dir.path(), scenario, threads);
                let Outcome { report, counts } = run(&spec).unwrap();
                let named = format!("{scenario:?}, {threads}: {report:?} {counts:?}");
                assert_eq!(report.reads + report.writes, 600, "{named}");
                assert_eq!(report.histogram.count(), 600, "{named}");
                assert_eq!(report.reads == 600, scenario.only_reads(), "{named}");
                let largest = 600 * spec.block_bytes;
                assert!(report.bytes > 0 && report.bytes <= largest, "{named}");
                assert!(counts.opened > 0, "{named}");
                match scenario {
                    Scenario::LargeCreates256k => {
                        // Four blocks each; not more than fit.
                        assert!((150..=155).contains(&counts.created), "{named}");
                        assert!(counts.deleted >= counts.created - 6, "{named}");
                    }
                    Scenario::LargeCreates8k => assert!(counts.created >= 5, "{named}"),
                    Scenario::Mixed => {
                        assert!((360..480).contains(&report.reads), "{named}");
                        assert!(report.flushes > 0, "{named}");
                    }
                    Scenario::RandomWrites => assert!(report.writes == 600, "{named}"),
                    Scenario::MailServer => {
                        assert!(report.reads > report.writes, "{named}");
                        assert!(counts.created > 0 && counts.deleted > 0, "{named}");
                    }
                    _ => {
                        let only = Counts {
                            opened: counts.opened,
                            ..Counts::default()
                        };
                        assert_eq!(counts, only, "{named}");
                    }
                }
                // What was created besides the set is gone.
                assert!(!dir.path().join("ffsb/new").exists(), "{named}");
            }
        }
        let data = files(&dir.path().join("ffsb/data"));
        assert!(data.len() == 3 && data.values().all(|bytes| *bytes == 1 << 20));
        fs::remove_dir_all(dir.path().join("ffsb")).unwrap();
        let mail = spec(dir.path(), Scenario::MailServer, 1);
        let again: Vec<_> = (0..2)
            .map(|_| {
                run(&mail).unwrap();
                files(&dir.path().join("ffsb/mail"))
            })
            .collect();
        // A seed is one sequence.
        assert_eq!(again[0], again[1]);
        let sizes = || again[0].values();
        assert!(sizes().all(|bytes| (1024..=1 << 20).contains(bytes)));
    }

    #[test]
    fn what_is_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("ffsb");
        let theirs = [root.join("new/thesis"), root.join("data/thesis")];
        for path in &theirs {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        let load = spec(dir.path(), Scenario::SequentialReads8k, 1);
        for error in [run(&load).unwrap_err(), clean(dir.path()).unwrap_err()] {
            assert!(error.to_string().contains("move it away"), "{error}");
        }
        assert!(theirs.iter().all(|path| path.is_file()));
        // What a load left that made no mark yet has its note.
        fs::remove_dir_all(&root).unwrap();
        run(&load).unwrap();
        fs::remove_file(root.join(process::MARK)).unwrap();
        assert!(clean(dir.path()).is_err());
        run(&load).unwrap();
        clean(dir.path()).unwrap();
        assert!(!root.exists());
        // Nobody's, and so ours.
        fs::create_dir(&root).unwrap();
        run(&load).unwrap();
        // So is what a load left that was killed, also one that made no mark there.
        fs::create_dir(root.join("new")).unwrap();
        fs::write(root.join("new/0-0"), "x").unwrap();
        run(&load).unwrap();
        assert!(!root.join("new").exists());
    }

    #[test]
    fn what_does_not_go_together_is_named_and_a_set_is_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let good = spec(dir.path(), Scenario::SequentialReads8k, 1);
        fs::write(dir.path().join("file"), "").unwrap();
        run(&good).unwrap();
        let first = dir.path().join("ffsb/data/f0");
        let made = fs::metadata(&first).unwrap().modified().unwrap();
        run(&good).unwrap();
        assert_eq!(fs::metadata(&first).unwrap().modified().unwrap(), made);
        let cases = [
            (
                Spec {
                    threads: 0,
                    ..good.clone()
                },
                "0 threads",
            ),
            (
                Spec {
                    direct: true,
                    block_bytes: 1000,
                    ..good.clone()
                },
                "a multiple of 4 KiB",
            ),
            (
                Spec {
                    file_bytes: 100,
                    ..good.clone()
                },
                "files of",
            ),
            (
                Spec {
                    ios_max: None,
                    ..good.clone()
                },
                "never end",
            ),
            (
                Spec {
                    file_bytes: 1 << 50,
                    ..good.clone()
                },
                "do not fit",
            ),
            (
                Spec {
                    dir: dir.path().join("file"),
                    ..good
                },
                "file",
            ),
        ];
        for (spec, says) in cases {
            let error = run(&spec).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
