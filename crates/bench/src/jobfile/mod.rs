//! fio's job files as loads: `[global]` and job sections, of the options of ordinary block jobs.
//!
//! What an option means is said in fio's HOWTO. Two things are done otherwise, and the notes of a file say so: random places
//! are drawn anew each time, as with `norandommap`; and a `verify` compares what our own blocks carry
//! ([`crate::load::Verify`]), whatever checksum it names.

mod lines;
mod options;

use crate::{
    load::{self, Report, Spec, Target},
    sampling,
};
use block::{Error, Result};
use lines::Given;
use std::{collections::BTreeSet, path::Path};

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
    let (mut jobs, mut group) = (Vec::new(), 0);
    let mut notes = BTreeSet::new();
    for section in lines::read(path)? {
        if section.name == "global" {
            global.extend(section.options);
            continue;
        }
        let given = global.iter().chain(&section.options);
        let made =
            options::job(given, target, ignore_unknown, &mut notes).map_err(
                |wrong| match wrong {
                    options::Wrong::At(error) => error,
                    options::Wrong::Job(why) => {
                        section.at.wrong(format!("[{}]: {why}", section.name))
                    }
                },
            )?;
        if made.waits && !jobs.is_empty() {
            group += 1;
        }
        if jobs.len() + made.copies > JOBS_MAX {
            return Err(section
                .at
                .wrong(format!("more than {JOBS_MAX} jobs, with numjobs")));
        }
        jobs.extend((0..made.copies as u64).map(|copy| Job {
            name: section.name.clone(),
            group,
            together: made.together,
            spec: Spec {
                seed: made.spec.seed.wrapping_add(copy),
                ..made.spec.clone()
            },
        }));
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
    /// Runs all jobs, group by group; their reports, in their order. `watch` is told what comes next.
    ///
    /// # Errors
    ///
    /// Those of a load, with the job's name.
    pub fn run(&self, mut watch: impl FnMut(&[Job])) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        for group in self.jobs.chunk_by(|a, b| a.group == b.group) {
            watch(group);
            let run = |job: &Job| load::run(&job.spec).map_err(|e| e.within(job.name.clone()));
            let all = std::thread::scope(|scope| {
                sampling::join(
                    group
                        .iter()
                        .map(|job| scope.spawn(move || run(job)))
                        .collect(),
                )
            });
            reports.extend(all?);
        }
        Ok(reports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Flushes, Pattern};
    use std::{fs, time::Duration};

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
        assert_eq!(sync.spec.think, Duration::from_micros(250));
        assert!(sync.spec.verify.is_some());
        assert!(
            jobs.notes.iter().any(|n| n.contains("norandommap")),
            "{:?}",
            jobs.notes
        );
    }

    #[test]
    fn what_is_not_supported_is_named_with_its_line() {
        for (text, says) in [
            (
                "[a]\nfilename=x\nbssplit=4k/50\n",
                "jobs.fio, line 3: option 'bssplit' is not supported",
            ),
            ("[a]\nfilename=x\nrw=trim\n", "line 3: rw=trim"),
            ("[a]\nfilename=x\nrw=read:8\n", "line 3: rw=read:8"),
            (
                "[a]\nfilename=x\nioengine=rados\n",
                "line 3: ioengine=rados",
            ),
            ("[a]\nfilename=x\nbs=4x\n", "line 3: bs=4x"),
            ("[a]\nfilename=x:y\nsize=1m\n", "line 2: filename=x:y"),
            (
                "[a]\nfilename=x\nioengine=libaio\niodepth=2\nthinktime=5\nsize=1m\n",
                "[a]: ",
            ),
            (
                "[a]\nfilename=x\nrw=randrw\nrate_iops=5\nsize=1m\n",
                "rate_iops",
            ),
            ("[a]\nrw=read\nsize=1m\n", "line 1: [a]: it has no filename"),
            ("[global]\nrw=read\n", "there is no job"),
        ] {
            let error = jobs(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jobs.fio");
        fs::write(&path, "[a]\nfilename=x\nsize=1m\nbssplit=4k/50\n").unwrap();
        let jobs = read(&path, None, true).unwrap();
        assert!(
            jobs.notes[0].contains("line 4: option 'bssplit'"),
            "{:?}",
            jobs.notes
        );
    }
}
