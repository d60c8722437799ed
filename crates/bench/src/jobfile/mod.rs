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
    collections::BTreeSet,
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
    /// It begins when all jobs before it that have this name are over (`wait_for`).
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
    let at_once = jobs
        .chunk_by(|a, b| a.group == b.group)
        .any(|group| group.len() > 1);
    if at_once && matches!(target, Some(Target::VhostUser(_))) {
        notes.insert(
            "a vhost-user-blk server has one driver: jobs that are to run at the same time run one after the other".to_owned(),
        );
    }
    Ok(Jobs {
        jobs,
        notes: notes.into_iter().collect(),
    })
}

/// A report, and the jobs that it is of.
#[derive(Clone, Debug)]
pub struct Told<'a> {
    /// One, or all of a group that are reported together.
    pub jobs: &'a [Job],
    /// What they did.
    pub report: Report,
}

impl Job {
    fn is_of_guest(&self) -> bool {
        matches!(self.spec.target, Target::VhostUser(_))
    }
}

impl Jobs {
    /// Reports as they are shown: those of jobs of a group with `group_reporting` as one, by the first one's name. What was
    /// verified stays with its job.
    pub fn told(&self, reports: &[Report]) -> Vec<Told<'_>> {
        let is_together = |a: &Job, b: &Job| {
            let verify = a.spec.verify.is_some() || b.spec.verify.is_some();
            a.group == b.group && a.together && b.together && !verify
        };
        let mut rest = reports;
        let groups = self.jobs.chunk_by(is_together);
        let told = groups.map(|jobs| {
            let (own, later) = rest.split_at(jobs.len().min(rest.len()));
            rest = later;
            let report = match own {
                [one] => one.clone(),
                // A server of vhost-user-blk has one driver at a time.
                several => Report::merged(several, jobs[0].is_of_guest()),
            };
            Told { jobs, report }
        });
        told.collect()
    }

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
            // Jobs of one file are not to lock each other out.
            let specs: Vec<&Spec> = group.iter().map(|job| &job.spec).collect();
            let _locked = match load::file::lock(&specs) {
                Ok(locked) => locked,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            };
            let others = Others::of(group);
            let run = |place: usize| {
                let report = others.run(place);
                report.map_err(|e| e.within(group[place].name.clone()))
            };
            let all = std::thread::scope(|scope| {
                let run = &run;
                let jobs = (0..group.len()).map(|place| scope.spawn(move || run(place)));
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

/// Which jobs of a group are over.
struct Others<'a> {
    group: &'a [Job],
    over: Mutex<Vec<bool>>,
    changed: Condvar,
    /// Who drives a vhost-user-blk server.
    driver: Mutex<()>,
}

impl<'a> Others<'a> {
    fn of(group: &'a [Job]) -> Self {
        Self {
            group,
            over: Mutex::new(vec![false; group.len()]),
            changed: Condvar::new(),
            driver: Mutex::new(()),
        }
    }

    /// Runs the job at a place of the group when it is its time.
    fn run(&self, place: usize) -> Result<Report> {
        let job = &self.group[place];
        if let Some(name) = &job.waits_for {
            // Those before it: one behind it that has the same name may wait for this one.
            let before = self.group[..place].iter().enumerate();
            let before = before.filter(|(_, other)| other.name == *name);
            let places: Vec<usize> = before.map(|(place, _)| place).collect();
            let over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
            let waits = |over: &mut Vec<bool>| places.iter().any(|place| !over[*place]);
            // Poisoned: a job panicked, which is passed on when all have ended.
            drop(self.changed.wait_while(over, waits));
        }
        let _over = Over(self, place);
        std::thread::sleep(job.delay);
        // A server of vhost-user-blk has one driver at a time.
        let _alone = job
            .is_of_guest()
            .then(|| self.driver.lock().unwrap_or_else(PoisonError::into_inner));
        load::run_locked(&job.spec)
    }
}

/// Tells the others that a job is over, however it ends.
struct Over<'a, 'b>(&'a Others<'b>, usize);

impl Drop for Over<'_, '_> {
    fn drop(&mut self) {
        let Self(others, place) = self;
        others.over.lock().unwrap_or_else(PoisonError::into_inner)[*place] = true;
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
    fn engines_are_what_they_are_in_fio() {
        let text = "[global]\nfilename=/x\nsize=1m\niodepth=8\npercentile_list=50:99\nregisterfiles\nsoftrandommap=1\n[plain]\n[pv]\nioengine=pvsync2\n[aio]\nioengine=libaio\ndirect=1\n\
                    [cached]\nioengine=libaio\n[pool]\nioengine=posixaio\n[ring]\nioengine=io_uring\n";
        let jobs = jobs(text).unwrap();
        let engines = jobs.jobs.iter().map(|job| match &job.spec.target {
            Target::File { engine, .. } => (engine.as_str(), job.spec.depth),
            _ => panic!("{job:?}"),
        });
        // Who calls the kernel for each request has one at a time, and so has Linux AIO without O_DIRECT, which waits in io_submit.
        let expected = [
            ("psync", 1),
            ("psync", 1),
            ("native", 8),
            ("psync", 1),
            ("threads", 8),
            ("io_uring", 8),
        ];
        assert_eq!(engines.collect::<Vec<_>>(), expected);
        let said = jobs
            .notes
            .iter()
            .filter(|note| note.contains("libaio without direct=1"));
        assert_eq!(said.count(), 1, "{:?}", jobs.notes);
    }

    #[test]
    fn jobs_have_shapes() {
        let text = "[global]\ndirectory=/d\nsize=3m\n\
                    [a]\nnrfiles=3\nfile_service_type=random:2\nrw=randrw\nbssplit=4k/70:64k/30,512-512\n\
                    bssplit=4k/70:64k/30,8k/100\nrate=1m,2m\nrate_process=poisson\nend_fsync=1\nunlink=1\n\
                    [b]\nfilename=x:y\nwait_for=a\nstartdelay=2\nrw=read:-8k\nloops=2\nnumjobs=2\noffset_increment=1m\n\
                    [c]\nioengine=libaio\ndirect=1\niodepth=8\nrw=randwrite:4\nrw_sequencer=identical\nthinktime=9\nthinktime_spin=4\n\
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
            for (place, job) in jobs.jobs.iter().enumerate().rev() {
                let (over, others) = (&over, &others);
                scope.spawn(move || {
                    job.layout.prepare(1).unwrap();
                    others.run(place).unwrap();
                    over.lock().unwrap().push(job.name.clone());
                });
            }
        });
        assert_eq!(*others.over.lock().unwrap(), [true; 3]);
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

    /// A job file that is run, with its reports.
    fn ran(text: &str) -> (Jobs, Vec<Report>) {
        let jobs = jobs(text).unwrap();
        let reports = jobs.run(|_| {}).unwrap();
        (jobs, reports)
    }

    #[test]
    fn jobs_of_one_file_run_at_the_same_time_and_are_told_as_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("shared");
        // The same file by another name.
        let other = dir.path().join("other");
        std::os::unix::fs::symlink(&file, &other).unwrap();
        let text = format!(
            "[global]\nfilename={}\nsize=1m\nnorandommap\nnumber_ios=64\n[reads]\nrw=randread\nnumjobs=2\ngroup_reporting\n\
             [writes]\nfilename={}\nrw=randwrite\ngroup_reporting\n[apart]\nrw=randwrite\nverify=md5\nsize=512k\ngroup_reporting\n\
             [later]\nstonewall\nrw=read\n",
            file.display(),
            other.display()
        );
        let (jobs, reports) = ran(&text);
        let counts = reports.iter().map(|r| (r.reads, r.writes, r.errors));
        assert_eq!(
            counts.collect::<Vec<_>>(),
            [(64, 0, 0), (64, 0, 0), (0, 64, 0), (0, 64, 0), (64, 0, 0)]
        );
        let told = jobs.told(&reports);
        let told: Vec<_> = told
            .iter()
            .map(|told| {
                (
                    &told.jobs[0].name[..],
                    told.jobs.len(),
                    told.report.reads,
                    told.report.writes,
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                ("reads", 3, 128, 64),
                ("apart", 1, 0, 64),
                ("later", 1, 64, 0)
            ]
        );
    }

    #[test]
    fn who_waits_for_a_name_waits_for_those_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        // The second `a` waits for `b`, which waits for the first.
        let text = format!(
            "[global]\nfilename={}\nsize=64k\nnumber_ios=4\n[a]\nrw=write\n[b]\nwait_for=a\nrw=read\n[a]\nwait_for=b\nrw=write\n",
            file.display()
        );
        let (_, reports) = ran(&text);
        let counts = reports.iter().map(|r| (r.reads, r.writes));
        assert_eq!(counts.collect::<Vec<_>>(), [(0, 4), (4, 0), (0, 4)]);
        let error = jobs("[a]\nfilename=x\nsize=4k\nwait_for=a\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("no job before it"), "{error}");
    }

    #[test]
    fn sizes_in_percent_are_of_each_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: u64| {
            let path = dir.path().join(name);
            fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            path.display().to_string()
        };
        let (a, b) = (file("a", 4 << 20), file("b", 2 << 20));
        let range = |files: &str| {
            let text = format!("[x]\nfilename={files}\nsize=50%\nrw=write\n");
            let job = jobs(&text).unwrap().jobs.remove(0);
            (job.spec.range_bytes, job.spec.ios_max)
        };
        assert_eq!(range(&a), (Some(2 << 20), Some(512)));
        // Of the smaller one what each has room for.
        assert_eq!(range(&format!("{a}:{b}")), (Some(1 << 20), Some(512)));
    }
}
