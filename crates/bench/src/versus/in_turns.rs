//! A round of a cell whose sides are up at the same time ([`crate::turns`]).

use super::{
    cell::{Cell, Image, Load, Side},
    device::Device,
    fio,
    image::Images,
    sample::{self, Times},
    sides,
};
use crate::{
    peer::{self, Programs},
    record::Sample,
    sampling::Subject,
    turns::{self, Company, Entrant, What},
};
use block::Result;
use std::path::PathBuf;

/// Whether the sides of `cell` can be up at the same time: servers that sleep when they have nothing to do, and files
/// that are there and that all may write.
pub(super) fn possible(cell: &Cell) -> bool {
    let mut company = Company::new();
    let alike = |side: &Side| {
        let load = side.load.unwrap_or(cell.load);
        let sleeps = !load.poll && !load.idle && load.warm == 0.0;
        let image = side.image;
        let there = image != Image::Null && !image.fresh() && side.job.is_none();
        sleeps && there && company.takes(side.server, image, image.format(), true)
    };
    cell.sides.len() > 1 && cell.sides.iter().all(alike)
}

/// One who takes part: a side, and its engine.
pub(super) type Player<'a> = (&'a Side, &'a str);

/// Has a sample taken of each of `players`; what failed is an error in its place.
pub(super) fn round(
    programs: &Programs,
    images: &Images,
    cell: &Cell,
    players: &[Player<'_>],
    times: Times,
    seed: u64,
) -> Result<Vec<Result<Sample>>> {
    images.settle()?;
    let begin = |(side, engine): &Player<'_>, folder| {
        let load = side.load.unwrap_or(cell.load);
        let place = Place {
            programs,
            images,
            side,
            engine,
            folder,
        };
        Ok(Entrant {
            what: place.begin(&load, times, turns::own_seed(seed, side.name))?,
            device: Device::below(images.work()),
        })
    };
    let entrants = turns::entrants(images.work(), players.iter(), begin);
    let ended = turns::round(entrants, times.ramp, times.duration).into_iter();
    let samples = ended.map(|ended| turns::sample(ended, Subject::finish));
    Ok(samples.collect())
}

struct Place<'a> {
    programs: &'a Programs,
    images: &'a Images,
    side: &'a Side,
    engine: &'a str,
    folder: PathBuf,
}

impl Place<'_> {
    fn begin(&self, load: &Load, times: Times, seed: u64) -> Result<What> {
        let (programs, images, side) = (self.programs, self.images, self.side);
        let files = images.files(side.image)?;
        if side.server == super::cell::Server::Fio {
            let job = sample::fio_job(programs, images, side, load, &files)?;
            let fio = fio::InTurns::start(&job, &self.folder)?;
            return Ok(What::Fio(Box::new(fio)));
        }
        let setup = sides::setup(programs, images, side, self.engine, &files, true);
        let running = peer::start(programs, &self.folder, &setup)?;
        let seen = running.seen(&files, side.queues)?;
        Ok(What::Subject(Subject {
            specs: sample::specs(load, side, images, &running, times, seed),
            servers: vec![(running, seen)],
        }))
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
