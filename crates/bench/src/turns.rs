//! A round in which all sides are up at the same time, and have turns of a tenth of a second: A B C C B A A B C ….
//!
//! A device's rate drifts by a fifth within a second, and between neighbouring tenths of a second by a tenth; the
//! ratio of two sides is several times surer so than from samples one behind the other. Between its turns
//! a server has nothing in flight and sleeps, and fio is stopped.

use crate::{
    load::{
        self, Report,
        turns::{Caller, Turn, turns},
    },
    machine::{
        device::{Device, Work},
        others::{Activity, Watch},
    },
    metric::Metric,
    metric::Metrics,
    record::Sample,
    sampling::{self, Measured, Subject},
    versus::{cell::Server, fio},
};
use block::{Context, Result};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

/// How long a turn is counted, and how long it runs before.
const TURN: Duration = Duration::from_millis(100);
const RAMP: Duration = Duration::from_millis(20);

/// Servers that can be up at the same time on files that are there, `I` being what tells images apart.
#[derive(Debug)]
pub(crate) struct Company<I>(BTreeSet<I>);

impl<I: Ord> Company<I> {
    /// Nobody yet.
    pub(crate) fn new() -> Self {
        Self(BTreeSet::new())
    }

    /// Whether one more can be.
    pub(crate) fn takes(&mut self, server: Server, image: I, format: &str, writes: bool) -> bool {
        match server {
            // It takes locks.
            server if server.is_ours() => !writes || self.0.insert(image),
            // Two writers of one table would not do.
            Server::Qsd | Server::QemuNbd => !writes || format == "raw",
            // What it writes lies in the page cache, and goes to the device in others' turns.
            Server::Nbdkit => !writes && format == "raw",
            Server::Fio => true,
            _ => false,
        }
    }
}

/// The seed of a side's random places, made of its round's: each side has places of its own. With the same ones for all, who comes
/// second would read what the first has just read, and a cache that `O_DIRECT` does not bypass (the drive's, or the host's below a
/// virtual machine's disk) would answer: with the slower sides in favour, since they follow the faster ones. It depends on the
/// side's name alone, so that a run which goes on asks what the whole one would have.
pub(crate) fn own_seed(seed: u64, side: &str) -> u64 {
    // Loads of several disks count on from it, and rounds by a thousand.
    seed + (fnv(side.as_bytes()) >> 32) * 1_000_000
}

/// FNV-1a: the same on each machine and of each build.
pub(crate) fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// One who takes part.
#[derive(Debug)]
pub(crate) struct Entrant {
    pub what: What,
    /// Below its files.
    pub device: Device,
}

/// What is under load.
#[derive(Debug)]
pub(crate) enum What {
    /// A file, by fio.
    Fio(Box<fio::InTurns>),
    /// Servers or a file, by us.
    Subject(Subject),
}

/// What came of it.
#[derive(Debug)]
pub(crate) enum Ended {
    /// What fio says.
    Fio(Metrics, Value),
    /// What was measured of servers that are still up.
    Subject(Subject, Result<Measured>),
}

/// Begins one entrant for each of `players`, its sockets in a folder of its own below `work`.
pub(crate) fn entrants<P>(
    work: &Path,
    players: impl Iterator<Item = P>,
    mut begin: impl FnMut(P, PathBuf) -> Result<Entrant>,
) -> Vec<Result<Entrant>> {
    let begin = |(n, player)| {
        let folder = work.join(format!("turns{n}"));
        fs::create_dir_all(&folder).context(|| folder.display().to_string())?;
        begin(player, folder)
    };
    players.enumerate().map(begin).collect()
}

/// The sample of one who took part; servers are ended by `finish`.
pub(crate) fn sample(
    ended: Result<Ended>,
    finish: impl FnOnce(Subject, Result<Measured>) -> Result<Sample>,
) -> Result<Sample> {
    match ended? {
        Ended::Fio(metrics, detail) => Ok(Sample {
            metrics,
            detail,
            ..Sample::default()
        }),
        Ended::Subject(subject, measured) => finish(subject, measured),
    }
}

/// Has each take its turns, for `ramp` without being counted and then for `duration` in all; what failed is an error in its place.
pub(crate) fn round(
    entrants: Vec<Result<Entrant>>,
    ramp: Duration,
    duration: Duration,
) -> Vec<Result<Ended>> {
    thread::scope(|scope| {
        let begin = |entrant: Result<Entrant>| entrant.map(|entrant| One::begin(entrant, scope));
        let mut all: Vec<Result<One<'_>>> = entrants.into_iter().map(begin).collect();
        let ramp = Turn {
            ramp,
            measure: Duration::ZERO,
        };
        let turn = Turn {
            ramp: RAMP,
            measure: TURN.min(duration),
        };
        each(&mut all, false, ramp);
        let count = duration.as_secs_f64() / turn.measure.as_secs_f64();
        for n in 0..count.ceil() as u32 {
            each(&mut all, n % 2 == 1, turn);
        }
        all.into_iter().map(|one| one.and_then(One::end)).collect()
    })
}

/// A turn for each that has not failed.
fn each(all: &mut [Result<One<'_>>], reversed: bool, turn: Turn) {
    let count = all.len();
    for n in 0..count {
        let n = if reversed { count - 1 - n } else { n };
        if let Ok(one) = &mut all[n]
            && let Err(error) = one.turn(turn)
        {
            // Its load knows better.
            let failed = std::mem::replace(&mut all[n], Err(error));
            if let Ok(one) = failed
                && let Err(error) = one.failed()
            {
                all[n] = Err(error);
            }
        }
    }
}

/// One who takes part, at work.
struct One<'scope> {
    player: Player<'scope>,
    device: Device,
    /// What the device did in turns that were measured, and how long these were.
    work: (Work, Duration),
}

enum Player<'scope> {
    Fio(Box<fio::InTurns>),
    Subject(Box<Loaded<'scope>>),
}

struct Loaded<'scope> {
    subject: Subject,
    callers: Vec<Caller>,
    loads: Vec<ScopedJoinHandle<'scope, Result<Report>>>,
    activity: Activity,
}

impl<'scope> One<'scope> {
    fn begin(entrant: Entrant, scope: &'scope Scope<'scope, '_>) -> Self {
        let player = match entrant.what {
            What::Fio(fio) => Player::Fio(fio),
            What::Subject(subject) => {
                let load = |spec: &load::Spec| {
                    let (caller, turns) = turns();
                    let spec = spec.clone();
                    let body = move || load::run_by(&spec, Some(&turns));
                    (caller, scope.spawn(body))
                };
                let (callers, loads) = subject.specs.iter().map(load).unzip();
                Player::Subject(Box::new(Loaded {
                    subject,
                    callers,
                    loads,
                    activity: Activity::default(),
                }))
            }
        };
        Self {
            player,
            device: entrant.device,
            work: (Work::default(), Duration::ZERO),
        }
    }

    fn turn(&mut self, turn: Turn) -> Result<()> {
        let (began, before) = (Instant::now(), self.device.work());
        match &mut self.player {
            Player::Fio(fio) => fio.turn(turn)?,
            Player::Subject(loaded) => loaded.turn(turn)?,
        }
        if !turn.measure.is_zero() {
            self.work.0.add(self.device.work().since(before));
            self.work.1 += began.elapsed();
        }
        Ok(())
    }

    fn end(self) -> Result<Ended> {
        let (work, time) = self.work;
        let add_work = |metrics: &mut Metrics| {
            let iops = metrics.get(&Metric::Iops).copied();
            metrics.extend(work.figures(time, iops));
        };
        Ok(match self.player {
            Player::Fio(fio) => {
                let (mut metrics, detail) = fio.end()?;
                add_work(&mut metrics);
                Ended::Fio(metrics, detail)
            }
            Player::Subject(loaded) => {
                let (subject, mut measured) = loaded.end();
                if let Ok(measured) = &mut measured {
                    add_work(&mut measured.metrics);
                }
                Ended::Subject(subject, measured)
            }
        })
    }

    /// Why it failed.
    fn failed(self) -> Result<()> {
        match self.end()? {
            Ended::Subject(subject, measured) => subject.finish(measured).map(drop),
            Ended::Fio(..) => Ok(()),
        }
    }
}

impl Loaded<'_> {
    fn turn(&mut self, turn: Turn) -> Result<()> {
        let watch = Watch::begin(&self.subject.pids());
        for caller in &self.callers {
            caller.go(turn)?;
        }
        for caller in &self.callers {
            caller.wait()?;
        }
        if !turn.measure.is_zero() {
            self.activity.add(&watch.since());
        }
        Ok(())
    }

    fn end(self) -> (Subject, Result<Measured>) {
        // That ends the loads.
        drop(self.callers);
        let measured = sampling::join(self.loads)
            .and_then(|reports| sampling::figures(&reports, &self.subject.pids()));
        let measured = measured.map(|mut measured| {
            measured.meanwhile(&self.activity);
            measured
        });
        (self.subject, measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Spec, Target};

    fn entrant(path: &std::path::Path) -> Result<Entrant> {
        let target = Target::File {
            path: path.to_owned(),
            engine: "threads".to_owned(),
            direct: false,
        };
        let specs = vec![Spec {
            depth: 1,
            ..Spec::new(target)
        }];
        Ok(Entrant {
            what: What::Subject(Subject {
                specs,
                servers: Vec::new(),
            }),
            device: Device::below(std::path::Path::new("/proc")),
        })
    }

    #[test]
    fn each_has_its_turns_and_who_fails_says_why_in_its_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let gone = std::path::Path::new("/no/such/file");
        let entrants = vec![entrant(file.path()), entrant(gone), entrant(file.path())];
        let ended = round(entrants, Duration::ZERO, 2 * TURN);
        assert_eq!(ended.len(), 3);
        for (n, ended) in ended.into_iter().enumerate() {
            match sample(ended, Subject::finish) {
                Ok(sample) => {
                    assert_ne!(n, 1);
                    let report = &sample.detail["reports"][0];
                    assert!(report["seconds"].as_f64() >= Some(0.2), "{report}");
                    assert!(sample.metrics[&Metric::OthersPercent] >= 0.0);
                }
                Err(error) => assert!(
                    n == 1 && error.to_string().contains("/no/such/file"),
                    "{error}"
                ),
            }
        }
    }

    #[test]
    fn each_side_has_places_of_its_own() {
        assert_eq!(own_seed(1001, "a"), own_seed(1001, "a"));
        assert_eq!(own_seed(2001, "a"), own_seed(1001, "a") + 1000);
        assert_ne!(own_seed(1001, "qsd native"), own_seed(1001, "qsd threads"));
    }

    #[test]
    fn writers_of_one_image_are_no_company() {
        let mut all = Company::new();
        assert!(all.takes(Server::Diskplane, 1, "raw", true));
        assert!(!all.takes(Server::DiskplaneNbd, 1, "raw", true));
        assert!(all.takes(Server::Diskplane, 2, "qcow2", true));
        assert!(all.takes(Server::Diskplane, 1, "raw", false));
        assert!(all.takes(Server::Qsd, 1, "raw", true));
        assert!(!all.takes(Server::Qsd, 2, "qcow2", true));
        assert!(all.takes(Server::QemuNbd, 2, "qcow2", false));
        assert!(!all.takes(Server::Spdk, 2, "raw", false));
        assert!(all.takes(Server::Nbdkit, 1, "raw", false));
        assert!(!all.takes(Server::Nbdkit, 1, "raw", true));
    }
}
