//! One sample: server started, load run, figures taken, server stopped.
//!
//! The load runs in threads of this process, not in a child: nothing else runs here meanwhile, its CPU time is
//! accounted for by thread, and a child would only add its start to each of hundreds of short samples.

use super::{
    cell::{Cell, Image, Load, Server, Side},
    command,
    device::Device,
    fio,
    image::Images,
    sides,
};
use crate::{
    load::{Spec, Target},
    peer::{self, Programs, Running},
    record::Sample,
    sampling::Subject,
};
use block::{Error, Result};
use std::{path::PathBuf, time::Duration};

/// How long to run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub ramp: Duration,
    pub duration: Duration,
}

/// Takes one: what was measured, and not yet of which round.
pub(super) fn take(
    programs: &Programs,
    images: &Images,
    cell: &Cell,
    side: &Side,
    engine: &str,
    times: Times,
    seed: u64,
) -> Result<Sample> {
    let load = side.load.unwrap_or(cell.load);
    let files = images.files(side.image)?;
    if side.image != Image::Null {
        images.settle()?;
    }
    if let Some(job) = side.job {
        return command::take(programs, images, side, job, engine, &files);
    }
    let times = Times {
        ramp: times.ramp + Duration::from_secs_f64(load.warm),
        ..times
    };
    let device = Device::below(images.work()).watch();
    if side.server == Server::Fio {
        let job = fio_job(programs, images, side, &load, &files)?;
        let (mut metrics, detail) = fio::run(&job, times, images.work())?;
        device.add_to(&mut metrics);
        if side.image.fresh() {
            images.remove(side.image);
        }
        return Ok(Sample {
            metrics,
            detail,
            ..Sample::default()
        });
    }
    let setup = sides::setup(programs, images, side, engine, &files, false);
    let running = peer::start(programs, images.work(), &setup)?;
    let seen = running.seen(&files, side.queues)?;
    let rested = load
        .idle
        .then(|| super::idle::rest(&running, times.duration));
    let subject = Subject {
        specs: specs(&load, side, images, &running, times, seed),
        servers: vec![(running, seen)],
    };
    let mut measured = rested.unwrap_or_else(|| subject.measure());
    if let Ok(measured) = &mut measured {
        device.add_to(&mut measured.metrics);
    }
    let sample = subject.finish(measured);
    if side.image.fresh() {
        images.remove(side.image);
    }
    sample
}

/// What fio is to do as `side`.
pub(super) fn fio_job<'a>(
    programs: &Programs,
    images: &Images,
    side: &Side,
    load: &'a Load,
    files: &'a [PathBuf],
) -> Result<fio::Job<'a>> {
    let [file] = files else {
        return Err(Error::invalid("fio takes one file"));
    };
    Ok(fio::Job {
        load,
        file,
        direct: programs.direct,
        range: side.image.range(images.sizes()),
    })
}

/// The load on each disk of a server.
pub(super) fn specs(
    load: &Load,
    side: &Side,
    images: &Images,
    running: &Running,
    times: Times,
    seed: u64,
) -> Vec<Spec> {
    let (start, len) = side.image.range(images.sizes());
    let of_target = |(n, target): (u64, &Target)| Spec {
        start_bytes: start,
        range_bytes: len,
        duration: times.duration,
        ramp: times.ramp,
        ios_max: (load.grows > 0).then(|| images.sizes().growth / load.grows),
        seed: seed + n,
        server_pids: vec![running.pid()],
        control: running.control_of(n),
        ..load.spec(target.clone(), side.queues)
    };
    (0..).zip(&running.targets).map(of_target).collect()
}
