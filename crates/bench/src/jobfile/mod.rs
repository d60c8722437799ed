//! fio's job files as loads: `[global]` and job sections, of the options of ordinary block jobs.
//!
//! What an option means is said in fio's HOWTO. Two things are done otherwise: where sizes of requests differ (and in a few other
//! cases, which a note names) random places are drawn anew each time, as with `norandommap`; and a `verify` compares what our own
//! blocks carry ([`crate::load::Verify`]), whatever checksum it names.
//!
//! `lines` has the text, `options` what each line says, `make` what they mean together, `files` what is there before a job begins.

mod files;
mod lines;
mod make;
mod numbers;
mod options;

use crate::{
    load::{self, Report, Spec, Target},
    sampling,
};
use block::{Error, Result};
pub use files::Layout;
use lines::Given;
use make::{Setting, Wrong};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

/// Jobs at most, with all their copies.
const JOBS_MAX: usize = 256;

/// A job, or one of its copies (`numjobs`).
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Its section.
    pub name: String,
    /// Jobs of a group run at the same time, groups one after the other (`stonewall`).
    pub group: usize,
    /// One figure for all copies (`group_reporting`).
    pub together: bool,
    /// It begins so much later (`startdelay`).
    pub delay: Duration,
    /// It begins when all jobs of this name are over (`wait_for`).
    pub waits_for: Option<String>,
    /// Its files.
    pub layout: Layout,
    /// What is asked.
    pub spec: Spec,
}

/// A job file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Jobs {
    /// In their order.
    pub jobs: Vec<Job>,
    /// What is done otherwise than fio does it, and what was left out.
    pub notes: Vec<String>,
}

/// Reads a job file. Where `target` is given, all jobs go there instead of to their `filename`.
///
/// # Errors
///
/// It is none; an option is not supported (unless `ignore_unknown`), or its value cannot be: with file and line.
pub fn read(path: &Path, target: Option<&Target>, ignore_unknown: bool) -> Result<Jobs> {
    let mut global: Vec<Given> = Vec::new();
    let (mut jobs, mut group) = (Vec::<Job>::new(), 0);
    let mut notes = BTreeSet::new();
    let setting = Setting {
        target,
        ignore_unknown,
    };
    for section in lines::read(path)? {
        if section.name == "global" {
            global.extend(section.options);
            continue;
        }
        let given = global.iter().chain(&section.options);
        let of_section = |why: String| section.at.wrong(format!("[{}]: {why}", section.name));
        let made = make::jobs(&section.name, given, &setting, &mut notes);
        let (copies, waits) = made.map_err(|wrong| match wrong {
            Wrong::At(error) => error,
            Wrong::Job(why) => of_section(why),
        })?;
        if waits && !jobs.is_empty() {
            group += 1;
        }
        if jobs.len() + copies.len() > JOBS_MAX {
            return Err(of_section(format!(
                "more than {JOBS_MAX} jobs, with numjobs"
            )));
        }
        for copy in copies {
            // As in fio: what is to be waited for comes before who waits.
            if let Some(name) = &copy.waits_for
                && (*name == copy.name || !jobs.iter().any(|job| job.name == *name))
            {
                return Err(of_section(format!(
                    "wait_for={name}: no job before it has this name"
                )));
            }
            jobs.push(Job { group, ..copy });
        }
    }
    if jobs.is_empty() {
        return Err(Error::invalid(format!(
            "{}: there is no job in it",
            path.display()
        )));
    }
    Ok(Jobs {
        jobs,
        notes: notes.into_iter().collect(),
    })
}

impl Jobs {
    /// Makes what is missing of their files, and runs all jobs, group by group; their reports, in their order. `watch` is told
    /// what comes next.
    ///
    /// # Errors
    ///
    /// Those of a load and of making files, with the job's name.
    pub fn run(&self, mut watch: impl FnMut(&[Job])) -> Result<Vec<Report>> {
        for job in &self.jobs {
            let prepared = job.layout.prepare(job.spec.seed);
            prepared.map_err(|e| e.within(job.name.clone()))?;
        }
        let mut reports = Vec::new();
        let mut failed = None;
        for group in self.jobs.chunk_by(|a, b| a.group == b.group) {
            watch(group);
            let others = Others::of(group);
            let run = |job: &Job| {
                let report = others.run(job);
                report.map_err(|e| e.within(job.name.clone()))
            };
            let all = std::thread::scope(|scope| {
                let run = &run;
                let jobs = group.iter().map(|job| scope.spawn(move || run(job)));
                sampling::join(jobs.collect())
            });
            match all {
                Ok(all) => reports.extend(all),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        for job in &self.jobs {
            let ended = job.layout.end();
            failed = failed.or(ended.map_err(|e| e.within(job.name.clone())).err());
        }
        failed.map_or(Ok(reports), Err)
    }
}

/// How many jobs of each name of a group are not over.
struct Others {
    running: Mutex<BTreeMap<String, usize>>,
    changed: Condvar,
}

impl Others {
    fn of(group: &[Job]) -> Self {
        let mut running = BTreeMap::new();
        for job in group {
            *running.entry(job.name.clone()).or_default() += 1;
        }
        Self {
            running: Mutex::new(running),
            changed: Condvar::new(),
        }
    }

    /// Runs a job when it is its time.
    fn run(&self, job: &Job) -> Result<Report> {
        if let Some(name) = &job.waits_for {
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            let waits = |running: &mut BTreeMap<String, usize>| {
                running.get(name).is_some_and(|count| *count > 0)
            };
            // Poisoned: a job panicked, which is passed on when all have ended.
            drop(self.changed.wait_while(running, waits));
        }
        let _over = Over(self, &job.name);
        std::thread::sleep(job.delay);
        load::run(&job.spec)
    }
}

/// Tells the others that a job is over, however it ends.
struct Over<'a>(&'a Others, &'a str);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        let Self(others, name) = self;
        let mut running = others
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = running.get_mut(*name) {
            *count -= 1;
        }
        others.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{
        Flushes, Pattern,
        shape::{Pause, Rate, Runs, Service, Sizes},
    };
    use std::{fs, path::PathBuf};

    fn jobs(text: &str) -> Result<Jobs> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jobs.fio");
        fs::write(&path, text).unwrap();
        read(&path, None, false)
    }

    #[test]
    fn options_become_loads() {
        let text = "[global]\nfilename=/x\\:y\ndirect=1\nbs=8k\nsize=1m\nioengine=libaio\n\
                    [fill]\nrw=write\niodepth=4\nnumjobs=2\ngroup_reporting\nfsync=32\n\
                    [mix]\nstonewall\nrw=randrw\nrwmixwrite=20\nruntime=1500ms\ntime_based\nramp_time=2\n\
                    random_distribution=zipf:1.1\nrandseed=9\noffset=0x1000\n\
                    [sync]\nioengine=psync\niodepth=64\nthinktime=250\nnumber_ios=7\nverify=md5\nrw=randwrite\n";
        let jobs = jobs(text).unwrap();
        let names: Vec<_> = jobs
            .jobs
            .iter()
            .map(|j| (j.name.as_str(), j.group))
            .collect();
        assert_eq!(names, [("fill", 0), ("fill", 0), ("mix", 1), ("sync", 1)]);
        let [fill, second, mix, sync] = &jobs.jobs[..] else {
            panic!()
        };
        assert!(fill.together && !mix.together);
        assert_eq!(second.spec.seed, fill.spec.seed + 1);
        let file = Target::File {
            path: "/x:y".into(),
            engine: "native".into(),
            direct: true,
        };
        assert_eq!(fill.spec.target, file);
        assert_eq!(
            (fill.spec.pattern, fill.spec.depth, fill.spec.flushes),
            (Pattern::Write, 4, Flushes::Every(32))
        );
        assert_eq!(
            (fill.spec.ios_max, fill.spec.duration),
            (Some(128), Duration::ZERO)
        );
        assert_eq!(
            (mix.spec.pattern, mix.spec.read_percent),
            (Pattern::RandRw, 80)
        );
        assert_eq!(mix.spec.duration, Duration::from_millis(1500));
        assert_eq!(
            (mix.spec.ios_max, mix.spec.ramp),
            (None, Duration::from_secs(2))
        );
        assert_eq!(
            (mix.spec.zipf, mix.spec.seed, mix.spec.start_bytes),
            (Some(1.1), 9, 4096)
        );
        assert_eq!(mix.spec.range_bytes, Some(1 << 20));
        assert_eq!((sync.spec.depth, sync.spec.ios_max), (1, Some(7)));
        let pause = sync.spec.shape.pause.unwrap();
        assert_eq!(
            (pause.time, pause.requests),
            (Duration::from_micros(250), 1)
        );
        assert!(sync.spec.verify.is_some());
        assert!(
            jobs.notes.iter().any(|n| n.contains("norandommap")),
            "{:?}",
            jobs.notes
        );
    }

    #[test]
    fn jobs_have_shapes() {
        let text = "[global]\ndirectory=/d\nsize=3m\n\
                    [a]\nnrfiles=3\nfile_service_type=random:2\nrw=randrw\nbssplit=4k/70:64k/30,512-512\n\
                    bssplit=4k/70:64k/30,8k/100\nrate=1m,2m\nrate_process=poisson\nend_fsync=1\nunlink=1\n\
                    [b]\nfilename=x:y\nwait_for=a\nstartdelay=2\nrw=read:-8k\nloops=2\nnumjobs=2\noffset_increment=1m\n\
                    [c]\nioengine=libaio\niodepth=8\nrw=randwrite:4\nrw_sequencer=identical\nthinktime=9\nthinktime_spin=4\n\
                    thinktime_blocks=3\nthinktime_blocks_type=issue\nio_size=1m\nfsync=7\nblockalign=1k\n\
                    [d]\nrw=randread\nbs=8k\n[e]\nrw=randread\npercentage_random=20\nbsrange=4k-16k\n";
        let text = text.replace("bssplit=4k/70:64k/30,512-512\n", "");
        let jobs = jobs(&text).unwrap().jobs;
        let [a, b, b1, c, d, e] = &jobs[..] else {
            panic!("{jobs:#?}")
        };
        let shape = &a.spec.shape;
        let split = |parts: &[(u64, u8)]| Some(Sizes::Split(parts.to_vec()));
        assert_eq!(shape.reads, split(&[(4096, 70), (65536, 30)]));
        assert_eq!(shape.writes, split(&[(8192, 100)]));
        assert_eq!(
            shape.more_files,
            ["/d/a.0.1", "/d/a.0.2"].map(PathBuf::from)
        );
        assert_eq!(
            (a.spec.block_bytes, shape.bytes_max),
            (65536, Some(3 << 20))
        );
        assert_eq!(
            (a.spec.range_bytes, a.layout.bytes),
            (Some(1 << 20), Some(1 << 20))
        );
        assert_eq!(shape.service, Service::Random(2));
        let bytes = |mib: f64| Some(Rate::Bytes(mib * 1048576.0));
        assert_eq!(
            (shape.rates.reads, shape.rates.writes),
            (bytes(1.0), bytes(2.0))
        );
        assert!(shape.rates.poisson && shape.flush_at_end && a.layout.unlink && a.spec.poll);
        assert_eq!(
            (b.waits_for.as_deref(), b.delay),
            (Some("a"), Duration::from_secs(2))
        );
        assert_eq!(b.spec.shape.skip_bytes, -8192);
        // Two files of 1.5 MiB, twice.
        assert_eq!(
            (b.spec.ios_max, b.spec.range_bytes),
            (Some(2 * 768), Some(3 << 19))
        );
        assert_eq!((b.spec.start_bytes, b1.spec.start_bytes), (0, 1 << 20));
        assert_eq!(
            (b1.layout.bytes, &b1.layout.paths),
            (Some(5 << 19), &b.layout.paths)
        );
        assert_eq!(c.spec.shape.runs, Some(Runs::Identical(4)));
        let us = Duration::from_micros;
        let pause = Pause {
            time: us(9),
            spin: us(4),
            requests: 3,
            when_sent: true,
        };
        assert_eq!((c.spec.shape.pause, c.spec.depth), (Some(pause), 8));
        assert_eq!(
            (c.spec.ios_max, c.spec.flushes),
            (Some(256), Flushes::Every(7))
        );
        assert!(c.spec.shape.flush_by_queue && c.spec.shape.align_bytes == Some(1024));
        assert!(d.spec.shape.once && d.layout.written && !c.layout.written);
        assert_eq!(d.layout.paths, [PathBuf::from("/d/d.0.0")]);
        assert_eq!(e.spec.shape.random_percent, Some(20));
        assert_eq!(e.spec.shape.reads, Some(Sizes::Range(4096, 16384)));
        assert!(!e.spec.shape.once);
    }

    #[test]
    fn who_waits_for_another_begins_when_it_is_over() {
        let dir = tempfile::tempdir().unwrap();
        // What the first writes the second must find; verify would see another run's blocks as wrong.
        let text = format!(
            "[global]\ndirectory={}\nfilename=f\nsize=64k\nrw=write\n[a]\nnumjobs=2\nstartdelay=50ms\n[b]\nwait_for=a\nunlink=1\n",
            dir.path().display()
        );
        let jobs = jobs(&text).unwrap();
        let over = Mutex::new(Vec::new());
        let others = Others::of(&jobs.jobs);
        std::thread::scope(|scope| {
            for job in jobs.jobs.iter().rev() {
                let (over, others) = (&over, &others);
                scope.spawn(move || {
                    job.layout.prepare(1).unwrap();
                    others.run(job).unwrap();
                    over.lock().unwrap().push(job.name.clone());
                });
            }
        });
        assert_eq!(others.running.lock().unwrap().values().sum::<usize>(), 0);
        assert_eq!(over.lock().unwrap().last().map(String::as_str), Some("b"));
        jobs.run(|_| {}).unwrap();
        assert!(!dir.path().join("f").exists());
    }

    #[test]
    fn what_is_not_supported_is_named_with_its_line() {
        for (text, says) in [
            (
                "[a]\nfilename=x\nzonesize=4k\n",
                "jobs.fio, line 3: option 'zonesize' is not supported",
            ),
            ("[a]\nfilename=x\nrw=trim\n", "line 3: rw=trim"),
            ("[a]\nfilename=x\nrw=read:8x\n", "line 3: rw=read:8x"),
            ("[a]\nfilename=x\nrw=randread:4k\n", "a number of requests"),
            ("[a]\nfilename=x\nbssplit=4k/50\n", "line 3: bssplit=4k/50"),
            (
                "[a]\nfilename=x\nbssplit=4k/50:100/50\nsize=1m\n",
                "[a]: a request of 100 bytes",
            ),
            ("[a]\nfilename=x\nexitall\n", "option 'exitall'"),
            (
                "[a]\nfilename=x\nfile_service_type=pareto\n",
                "there are roundrobin",
            ),
            ("[a]\nfilename=x\nsize=1m\nwait_for=b\n", "no job before it"),
            (
                "[a]\nfilename=x\nsize=1m\nstartdelay=5-1\n",
                "startdelay=5-1",
            ),
            (
                "[a]\nfilename=x\nioengine=rados\n",
                "line 3: ioengine=rados",
            ),
            ("[a]\nfilename=x\nbs=4x\n", "line 3: bs=4x"),
            (
                "[a]\nfilename=x\nrw=randrw\nrate_iops=,5\nsize=1m\n",
                "[a]: reads or writes have a rate",
            ),
            (
                "[a]\nfilename=x\nrate_iops=5\nrate=5k\nsize=1m\n",
                "rate and rate_iops",
            ),
            (
                "[a]\nfilename=:\nsize=1m\n",
                "line 1: [a]: its filename names no file",
            ),
            (
                "[a]\nfilename=x:y\nverify=md5\nrw=write\nsize=1m\n",
                "in one file",
            ),
            ("[global]\nrw=read\n", "there is no job"),
        ] {
            let error = jobs(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jobs.fio");
        fs::write(&path, "[a]\nfilename=x\nsize=1m\nzonesize=4k\n").unwrap();
        let jobs = read(&path, None, true).unwrap();
        assert!(
            jobs.notes[0].contains("line 4: option 'zonesize'"),
            "{:?}",
            jobs.notes
        );
    }
}
