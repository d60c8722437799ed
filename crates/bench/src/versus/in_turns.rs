//! A round in which all sides are up at the same time, and have turns of a tenth of a second: A B C C B A A B C ….
//!
//! A device's rate drifts by a fifth within a second, and between neighbouring tenths of a second by a tenth; the
//! ratio of two sides is several times surer so than from samples one behind the other. Between its turns
//! a server has nothing in flight and sleeps, and fio is stopped.

use super::{
    cell::{Cell, Image, Load, Server, Side},
    device::{Device, Work},
    fio,
    image::Images,
    others::Watch,
    sample::{self, Times},
    sides,
};
use crate::{
    load::{
        self, Report,
        turns::{Caller, Turn, turns},
    },
    metric::{Metric, Metrics},
    peer::{self, Programs, Running, Seen},
    record::Sample,
    sampling,
};
use block::{Context, Result};
use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

/// How long a turn is counted, and how long it runs before.
const TURN: Duration = Duration::from_millis(100);
const RAMP: Duration = Duration::from_millis(20);

/// Whether the sides of `cell` can be up at the same time: servers that sleep when they have nothing to do, and files
/// that are there and that all may write.
pub(super) fn possible(cell: &Cell) -> bool {
    let mut ours = BTreeSet::new();
    let alike = |side: &Side| {
        let load = side.load.unwrap_or(cell.load);
        let sleeps = !load.poll && !load.idle && load.warm == 0.0;
        let image = side.image;
        let there = image != Image::Null && !image.fresh() && side.job.is_none();
        sleeps
            && there
            && match side.server {
                // It takes locks.
                Server::Diskplane | Server::DiskplaneUntraced | Server::DiskplaneNbd => {
                    ours.insert(image)
                }
                // Two writers of one table would not do.
                Server::Qsd | Server::QemuNbd => image.format() == "raw",
                Server::Fio => true,
                Server::Spdk | Server::Tool | Server::QemuImg => false,
            }
    };
    cell.sides.len() > 1 && cell.sides.iter().all(alike)
}

/// One who takes part: a side, and its engine.
pub(super) type Entrant<'a> = (&'a Side, &'a str);

/// Has a sample taken of each of `entrants`; what failed is an error in its place.
pub(super) fn round(
    programs: &Programs,
    images: &Images,
    cell: &Cell,
    entrants: &[Entrant<'_>],
    times: Times,
    seed: u64,
) -> Result<Vec<Result<Sample>>> {
    images.settle()?;
    let loads: Vec<Load> = entrants
        .iter()
        .map(|(side, _)| side.load.unwrap_or(cell.load))
        .collect();
    let device = Device::below(images.work());
    Ok(thread::scope(|scope| {
        let begin = |(n, (entrant, load)): (usize, (&Entrant<'_>, &Load))| {
            let (side, engine) = *entrant;
            let folder = images.work().join(format!("turns{n}"));
            fs::create_dir_all(&folder).context(|| folder.display().to_string())?;
            let place = Place {
                programs,
                images,
                side,
                engine,
                folder,
            };
            place.begin(scope, load, times, seed)
        };
        let begun = entrants.iter().zip(&loads).enumerate().map(begin);
        let mut all: Vec<Result<One<'_>>> = begun.collect();
        let ramp = Turn {
            ramp: times.ramp,
            measure: Duration::ZERO,
        };
        let turn = Turn {
            ramp: RAMP,
            measure: TURN.min(times.duration),
        };
        each(&mut all, false, ramp, &device);
        let count = times.duration.as_secs_f64() / turn.measure.as_secs_f64();
        for n in 0..count.ceil() as u32 {
            each(&mut all, n % 2 == 1, turn, &device);
        }
        all.into_iter().map(|one| one.and_then(One::end)).collect()
    }))
}

/// A turn for each that has not failed.
fn each(all: &mut [Result<One<'_>>], reversed: bool, turn: Turn, device: &Device) {
    let count = all.len();
    for n in 0..count {
        let n = if reversed { count - 1 - n } else { n };
        if let Ok(one) = &mut all[n]
            && let Err(error) = one.turn(turn, device)
        {
            // Its load knows better.
            let failed = std::mem::replace(&mut all[n], Err(error));
            if let Ok(one) = failed
                && let Err(error) = one.end()
            {
                all[n] = Err(error);
            }
        }
    }
}

struct Place<'a> {
    programs: &'a Programs,
    images: &'a Images,
    side: &'a Side,
    engine: &'a str,
    folder: PathBuf,
}

impl Place<'_> {
    fn begin<'scope>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        load: &Load,
        times: Times,
        seed: u64,
    ) -> Result<One<'scope>> {
        let (programs, images, side) = (self.programs, self.images, self.side);
        let files = images.files(side.image)?;
        let work = (Work::default(), Duration::ZERO);
        if side.server == Server::Fio {
            let job = sample::fio_job(programs, images, side, load, &files)?;
            let fio = fio::InTurns::start(&job, &self.folder)?;
            return Ok(One::Fio(Box::new(fio), work));
        }
        let setup = sides::setup(programs, images, side, self.engine, &files, true);
        let running = peer::start(programs, &self.folder, &setup)?;
        let seen = running.seen(&files, side.queues)?;
        let specs = sample::specs(load, side, images, &running, times, seed);
        let (callers, loads) = specs
            .into_iter()
            .map(|spec| {
                let (caller, turns) = turns();
                let body = move || load::run_by(&spec, Some(&turns));
                (caller, scope.spawn(body))
            })
            .unzip();
        Ok(One::Server(Box::new(Served {
            running,
            seen,
            callers,
            loads,
            others: (0.0, 0),
            work,
        })))
    }
}

/// What the device did in turns that were measured, and how long these were.
type Done = (Work, Duration);

/// Adds what the device did to the figures of a load.
fn add_work(metrics: &mut Metrics, (work, time): Done) {
    let iops = metrics.get(&Metric::Iops).copied();
    metrics.extend(work.figures(time, iops));
}

/// One who takes part, at work.
enum One<'scope> {
    Fio(Box<fio::InTurns>, Done),
    Server(Box<Served<'scope>>),
}

struct Served<'scope> {
    running: Running,
    seen: Seen,
    callers: Vec<Caller>,
    loads: Vec<ScopedJoinHandle<'scope, Result<Report>>>,
    /// Percent of a core that others used, summed over this many turns.
    others: (f64, u32),
    work: Done,
}

impl One<'_> {
    fn turn(&mut self, turn: Turn, device: &Device) -> Result<()> {
        let (began, before) = (Instant::now(), device.work());
        let (work, time) = match self {
            Self::Fio(fio, work) => {
                fio.turn(turn)?;
                work
            }
            Self::Server(served) => {
                served.turn(turn)?;
                &mut served.work
            }
        };
        if !turn.measure.is_zero() {
            work.add(device.work().since(before));
            *time += began.elapsed();
        }
        Ok(())
    }

    fn end(self) -> Result<Sample> {
        match self {
            Self::Fio(fio, work) => {
                let (mut metrics, detail) = fio.end()?;
                add_work(&mut metrics, work);
                Ok(Sample {
                    metrics,
                    detail,
                    ..Sample::default()
                })
            }
            Self::Server(served) => served.end(),
        }
    }
}

impl Served<'_> {
    fn turn(&mut self, turn: Turn) -> Result<()> {
        let watch = Watch::begin(&[self.running.pid()]);
        for caller in &self.callers {
            caller.go(turn)?;
        }
        for caller in &self.callers {
            caller.wait()?;
        }
        if !turn.measure.is_zero() {
            self.others.0 += watch.others_percent();
            self.others.1 += 1;
        }
        Ok(())
    }

    fn end(self) -> Result<Sample> {
        // That ends the loads.
        drop(self.callers);
        let mut measured = sampling::join(self.loads)
            .and_then(|reports| sampling::figures(&reports, &[self.running.pid()]));
        if let Ok(measured) = &mut measured {
            let others = self.others.0 / f64::from(self.others.1.max(1));
            measured.metrics.insert(Metric::OthersPercent, others);
            add_work(&mut measured.metrics, self.work);
        }
        sampling::finish(self.running, self.seen, measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::versus::table::all;

    #[test]
    fn what_grows_spins_rests_or_shares_a_table_has_samples_of_its_own() {
        let those = all().filter(|cell| possible(cell)).map(|cell| cell.name);
        assert_eq!(
            those.collect::<Vec<_>>(),
            [
                "raw-randread",
                "raw-randwrite",
                "latency-sleeping",
                "latency-adaptive",
                "seq-read",
                "seq-write",
                "nbd-randread-1",
                "nbd-randread-4",
                "nbd-randwrite-1",
                "nbd-randwrite-4",
                "nbd-seq-read",
                "nbd-seq-write",
                "qcow2-randread",
                "qcow2-randwrite",
                "disks-16",
            ]
        );
    }
}
