//! A workload carried out.

use crate::model::{Model, SECTOR, Value, When, Write};
use crate::mutant::Mutant;
use crate::queues::Queues;
use crate::random::Random;
use crate::script::{Ask, Request, Step};
use crate::spec::Spec;
use crate::whole::{self, Ground};
use crate::world::World;
use block::Result;
use disk::blocking::Driver;
use disk::{Disk, DiskOptions};
use io::{Change, Fault, SimDisk};
use std::collections::HashMap;

/// How to carry it out.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image.
    pub spec: Spec,
    /// The workload.
    pub steps: Vec<Step>,
    /// Queues to drive it with; 0 for the blocking driver.
    pub queues: usize,
    /// Decides on all that is random.
    pub seed: u64,
    /// A rule to break.
    pub mutant: Option<Mutant>,
    /// An error to inject.
    pub fault: Option<Fault>,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// The disks with their logs.
    pub world: World,
    /// What the guest may find.
    pub model: Model,
    /// Errors that were reported: to requests, to whole-image operations, by opening and closing.
    pub errors: Vec<String>,
}

enum Drive {
    Blocking(Driver),
    Queues(Queues),
}

struct Run {
    plan: Plan,
    world: World,
    model: Model,
    random: Random,
    drive: Option<Drive>,
    errors: Vec<String>,
    /// Requests in flight by tag: what they are, when they began, and the number of a write.
    flying: HashMap<u64, (Request, u64, Option<usize>)>,
}

/// Carries the workload out, closes the image at the end, and compares what is read with what was written.
///
/// # Errors
///
/// What the guest could see wrong without any crash; with no fault in the plan, any error.
pub fn run(plan: &Plan) -> std::result::Result<Outcome, String> {
    let world = World::new(&plan.spec, plan.seed).map_err(|e| format!("create: {e}"))?;
    if let Some(fault) = &plan.fault {
        world.image().inject(fault.clone());
    }
    let mut run = Run {
        model: Model::new(plan.spec.create.size, plan.spec.backed),
        random: Random::new(plan.seed, 1),
        plan: plan.clone(),
        world,
        drive: None,
        errors: Vec::new(),
        flying: HashMap::new(),
    };
    run.open()?;
    for (nth, step) in plan.steps.iter().enumerate() {
        if !matches!(step, Step::One(_) | Step::Storm(_)) && run.lost() {
            // Who opens the image next finds in the page cache what is on no disk, and cannot know.
            break;
        }
        run.step(step)
            .map_err(|what| format!("step {nth} {step:?}: {what}"))?;
    }
    run.served()?;
    run.close();
    run.finish()
}

impl Run {
    fn step(&mut self, step: &Step) -> std::result::Result<(), String> {
        let done = match step {
            Step::One(request) => self.storm(1, |_, _| *request),
            Step::Storm(storm) => self.storm(storm.count, |random, size| storm.draw(random, size)),
            Step::Close => {
                self.close();
                return self.open();
            }
            Step::Kill => {
                self.drain().map_err(|e| e.to_string())?;
                if let Some(Drive::Queues(queues)) = self.drive.take() {
                    queues.detach();
                }
                self.model.killed(self.world.clock.tick());
                return self.open();
            }
            Step::Whole(words) => {
                self.close();
                let mut ground = Ground::new(&self.world, &mut self.model);
                if let Err(error) = whole::run(&mut ground, words) {
                    self.errors.push(format!("{}: {error}", words.join(" ")));
                }
                return self.open();
            }
        };
        done.map_err(|e| e.to_string())
    }

    /// Whether a sync failed: what it did not cover may be lost for good.
    fn lost(&self) -> bool {
        let log = self.world.disks.iter().flat_map(|disk| disk.log());
        log.into_iter().any(|e| e.change == Change::FailedSync)
    }

    /// Opens the image; a fault may hit that once.
    fn open(&mut self) -> std::result::Result<(), String> {
        let opened = self.try_open().or_else(|error| {
            self.errors.push(format!("open: {error}"));
            self.try_open()
        });
        self.drive = Some(opened.map_err(|e| format!("open: {e}"))?);
        Ok(())
    }

    fn try_open(&self) -> Result<Drive> {
        let chain = self.world.open(false, self.plan.mutant)?;
        Ok(match self.plan.queues {
            0 => Drive::Blocking(chain.driver()?),
            queues => Drive::Queues(Queues::new(
                Disk::new(chain, DiskOptions::default())?,
                queues,
            )?),
        })
    }

    fn close(&mut self) {
        let closed = self.drain().and_then(|()| {
            let begun = self.world.clock.tick();
            match self.drive.take() {
                None => return Ok(()),
                Some(Drive::Blocking(driver)) => driver.close()?,
                Some(Drive::Queues(queues)) => queues.detach().close()?,
            }
            self.model.flushed(begun, self.world.clock.tick());
            Ok(())
        });
        if let Err(error) = closed {
            self.errors.push(format!("close: {error}"));
        }
    }

    /// What a reader finds while the image is open.
    fn served(&mut self) -> std::result::Result<(), String> {
        self.drain().map_err(|e| e.to_string())?;
        if let Some(Drive::Blocking(driver)) = &mut self.drive {
            let mut bytes = vec![0; driver.size() as usize];
            let read = driver.read(0, &mut bytes);
            read.map_err(|e| format!("read: {e}"))?;
            let allowed = self.model.allowed(When::Served);
            self.model.judge(&allowed, &bytes)?;
        }
        Ok(())
    }

    fn finish(self) -> std::result::Result<Outcome, String> {
        self.world.image().heal();
        let bytes = self.world.content().map_err(|e| e.to_string())?;
        // A close is a flush: what was closed well is all there. Otherwise the page cache is, as after the end of a
        // process: all but what only the image's memory knew, and no flush had covered.
        let allowed = self.model.allowed(When::Crash(u64::MAX));
        self.model.judge(&allowed, &bytes)?;
        if self.plan.fault.is_none() && !self.errors.is_empty() {
            return Err(self.errors.join("; "));
        }
        Ok(Outcome {
            world: self.world,
            model: self.model,
            errors: self.errors,
        })
    }

    fn storm(&mut self, count: u64, draw: impl Fn(&mut Random, u64) -> Request) -> Result<()> {
        for _ in 0..count {
            let request = draw(&mut self.random, self.model.size());
            if self.plan.queues == 0 {
                self.serial(request);
                continue;
            }
            self.queued(request)?;
            // Sometimes many are in flight, sometimes few.
            while self.random.below(3) > 0 && !self.flying.is_empty() {
                self.turn()?;
            }
        }
        match count {
            1 => self.drain(),
            _ => Ok(()),
        }
    }

    /// Notes the beginning of a request; returns the bytes to write.
    fn begin(&mut self, request: Request) -> (u64, Option<usize>, Vec<u8>) {
        let begun = self.world.clock.tick();
        let (first, count) = (request.at / SECTOR, request.len / SECTOR);
        let (value, durable) = match request.ask {
            Ask::Write { fua } => (Value::Stamps, fua),
            Ask::Zero { .. } | Ask::Discard => (Value::Zeros, false),
            Ask::Flush => return (begun, None, Vec::new()),
        };
        let id = self.model.begin(Write {
            first,
            count,
            value,
            begun,
            ended: None,
            sure: false,
            durable,
        });
        let bytes = match request.ask {
            Ask::Write { .. } => Model::bytes(id, first, count),
            _ => Vec::new(),
        };
        (begun, Some(id), bytes)
    }

    fn end(&mut self, request: Request, begun: u64, id: Option<usize>, ok: bool) {
        let now = self.world.clock.tick();
        match id {
            Some(id) => self.model.end(id, now, ok && request.ask != Ask::Discard),
            None if ok => self.model.flushed(begun, now),
            None => {}
        }
        if !ok {
            self.errors
                .push(format!("{request:?} that began at event {begun}"));
        }
    }

    /// One request with blocking calls.
    fn serial(&mut self, request: Request) {
        let (begun, id, bytes) = self.begin(request);
        let Some(Drive::Blocking(driver)) = &mut self.drive else {
            return;
        };
        let Request { at, len, .. } = request;
        let done = match request.ask {
            Ask::Write { fua } => {
                let written = driver.write(at, &bytes);
                written.and_then(|()| if fua { driver.flush() } else { Ok(()) })
            }
            Ask::Zero { unmap } => driver.write_zeroes(at, len, unmap),
            Ask::Discard => driver.discard(at, len),
            Ask::Flush => driver.flush(),
        };
        if let Err(error) = &done {
            self.errors.push(error.to_string());
        }
        self.end(request, begun, id, done.is_ok());
    }

    fn queued(&mut self, request: Request) -> Result<()> {
        let (begun, id, bytes) = self.begin(request);
        loop {
            let Some(Drive::Queues(queues)) = &mut self.drive else {
                return Ok(());
            };
            if let Some(tag) = queues.submit(&mut self.random, request, bytes.clone()) {
                self.flying.insert(tag, (request, begun, id));
                return Ok(());
            }
            self.turn()?;
        }
    }

    fn turn(&mut self) -> Result<()> {
        let Some(Drive::Queues(queues)) = &mut self.drive else {
            return Ok(());
        };
        let ended = queues.some(&mut self.random)?;
        self.ended(ended);
        Ok(())
    }

    fn ended(&mut self, ended: Vec<(u64, bool)>) {
        for (tag, ok) in ended {
            let (request, begun, id) = self.flying.remove(&tag).expect("ends once");
            self.end(request, begun, id, ok);
        }
    }

    fn drain(&mut self) -> Result<()> {
        if let Some(Drive::Queues(queues)) = &mut self.drive {
            let ended = queues.drain(&mut self.random)?;
            assert_eq!(queues.in_flight(), 0, "requests that never end");
            self.ended(ended);
        }
        Ok(())
    }
}

/// The logs of all disks, for comparing runs.
pub fn log_of(disks: &[std::sync::Arc<SimDisk>]) -> Vec<io::LogEntry> {
    disks.iter().flat_map(|disk| disk.log()).collect()
}
