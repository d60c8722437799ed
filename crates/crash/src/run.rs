//! A workload carried out.

use crate::injection::Injection;
use crate::judge::stamps;
use crate::model::{Model, SECTOR, Value, When, Write};
use crate::mutant::Mutant;
use crate::queues::{Ended, Queues};
use crate::random::Random;
use crate::script::{Ask, Request, Step, Storm};
use crate::spec::Spec;
use crate::states::{Bounds, Moment};
use crate::whole::{self, Ground};
use crate::world::World;
use block::{ErrorKind, Result};
use disk::blocking::Driver;
use disk::{Disk, DiskOptions};
use io::{Change, SimDisk};
use std::collections::HashMap;

/// What operations say of something that a crash may have kept or lost.
const GONE: [&str; 4] = [
    "is inconsistent, since it was not saved",
    "cannot become compat=0.10: it has refcount_bits",
    "already",
    "opens no key slot",
];

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
    pub fault: Option<Injection>,
}

/// From the beginning, or a crash, to the next or to the end.
#[derive(Debug)]
pub struct Era {
    /// The disks with their logs.
    pub world: World,
    /// What the guest may find.
    pub model: Model,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// One after the other.
    pub eras: Vec<Era>,
    /// Errors that were reported: to requests, to whole-image operations, by opening and closing.
    pub errors: Vec<String>,
}

impl Outcome {
    /// Whether the fault has hit an operation.
    pub fn faulted(&self) -> bool {
        let mut disks = self.eras.iter().flat_map(|era| &era.world.disks);
        disks.any(|disk| disk.faulted())
    }
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
    /// What a guest has read that it may not find.
    wrong: Option<String>,
    eras: Vec<Era>,
    /// When the step before began.
    before: u64,
    /// Power was lost: what later steps ask for may not be there.
    crashed: bool,
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
    let model = world.model().map_err(|e| format!("create: {e}"))?;
    if let Some(Injection { disk, fault }) = &plan.fault {
        let disk = world.disks.get(*disk);
        let disk = disk.ok_or("there is no such disk to inject an error into")?;
        disk.inject(fault.clone());
    }
    let mut run = Run {
        before: world.clock.now(),
        model,
        random: Random::new(plan.seed, 1),
        plan: plan.clone(),
        world,
        drive: None,
        errors: Vec::new(),
        wrong: None,
        eras: Vec::new(),
        crashed: false,
        flying: HashMap::new(),
    };
    run.open()?;
    for (nth, step) in plan.steps.iter().enumerate() {
        if run.is_absent() {
            break;
        }
        if !matches!(step, Step::One(_) | Step::Storm(_) | Step::Pairs(_)) && run.lost() {
            // Who opens the image next finds in the page cache what is on no disk, and cannot know.
            break;
        }
        let begun = run.world.clock.now();
        let done = run.step(step);
        let done = done.and_then(|()| run.wrong.take().map_or(Ok(()), Err));
        done.map_err(|what| format!("step {nth} {step:?}: {what}"))?;
        run.before = begun;
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
            Step::Pairs(storm) => self.pairs(storm),
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
            Step::Crash => {
                self.drain().map_err(|e| e.to_string())?;
                if let Some(Drive::Queues(queues)) = self.drive.take() {
                    queues.detach();
                }
                self.crash()?;
                return self.open();
            }
            Step::Whole(words) => {
                self.close();
                let mut ground = Ground::new(&self.world, &mut self.model);
                match whole::run(&mut ground, words) {
                    // What an operation made that lost power may not be there, or be there already.
                    Err(error)
                        if self.crashed
                            && (error.kind() == ErrorKind::NotFound
                                || GONE.iter().any(|what| error.to_string().contains(what))) => {}
                    Err(error) => self.errors.push(format!("{}: {error}", words.join(" "))),
                    Ok(()) => {}
                }
                if self.is_absent() {
                    return Ok(());
                }
                return self.open();
            }
        };
        done.map_err(|e| e.to_string())
    }

    /// Loses power at some moment of the step before, and goes on with what one of the states that the disks may
    /// be in then.
    fn crash(&mut self) -> std::result::Result<(), String> {
        let now = self.world.clock.tick();
        let at = match self.random.below(3) {
            0 => now,
            _ => self.before + 1 + self.random.below(now - self.before),
        };
        // Where there may be no image the guest has not crashed, but whoever made it.
        let at = if self.model.is_absent(at) { now } else { at };
        let moment = Moment::new(&self.world.disks, at);
        let mut states = moment.states(&Bounds::FAST, &mut self.random);
        let state = states.swap_remove(self.random.below(states.len() as u64) as usize);
        let disks = moment.disks(&state);
        let world = self.world.on(disks);
        let world = std::mem::replace(&mut self.world, world);
        let model = self.model.clone();
        self.eras.push(Era { world, model });
        let content = self.world.content().map_err(|e| e.to_string())?;
        let allowed = self.model.allowed(When::Crash(at));
        self.model.judge(&allowed, &content)?;
        let now = self.world.clock.tick();
        self.model.crashed(at, now, &stamps(&content));
        self.crashed = true;
        if self.model.is_damaged(now + 1) {
            // It is known to be: whoever repairs it may lose power once more.
            let mut ground = Ground::new(&self.world, &mut self.model);
            let repair = ["check".to_owned(), "repair".to_owned()];
            whole::run(&mut ground, &repair).map_err(|e| e.to_string())?;
            self.model.mended(self.world.clock.tick());
        }
        Ok(())
    }

    /// Whether making the image anew has failed.
    fn is_absent(&self) -> bool {
        self.model.is_absent(self.world.clock.now() + 1)
    }

    /// Whether a sync failed: what it did not cover may be lost for good.
    fn lost(&self) -> bool {
        let log = self.world.disks.iter().flat_map(|disk| disk.log());
        log.into_iter().any(|e| e.change == Change::FailedSync)
    }

    /// Opens the image; a fault may hit that as often as it can.
    fn open(&mut self) -> std::result::Result<(), String> {
        let mut tries = self.plan.fault.as_ref().map_or(0, |i| i.fault.count);
        loop {
            match self.try_open() {
                Ok(drive) => {
                    self.drive = Some(drive);
                    return Ok(());
                }
                Err(error) => {
                    let error = format!("open: {error}");
                    if tries == 0 {
                        return Err(error);
                    }
                    tries -= 1;
                    self.errors.push(error);
                }
            }
        }
    }

    fn try_open(&self) -> Result<Drive> {
        let chain = self.world.open(false, self.plan.mutant)?;
        Ok(match self.plan.queues {
            0 => Drive::Blocking(chain.driver()?),
            queues => {
                let disk = Disk::new(chain, DiskOptions::default())?;
                // As on a file system where it pays.
                disk.layers()[0].image.prewrite(true);
                Drive::Queues(Queues::new(disk, queues)?)
            }
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
            // What only the image's memory knew has gone with it.
            self.model.killed(self.world.clock.tick());
        }
    }

    /// What a reader finds while the image is open.
    fn served(&mut self) -> std::result::Result<(), String> {
        self.drain().map_err(|e| e.to_string())?;
        if let Some(Drive::Blocking(driver)) = &mut self.drive {
            let mut bytes = vec![0; driver.size() as usize];
            match driver.read(0, &mut bytes) {
                Ok(()) => {}
                Err(error) if self.plan.fault.is_some() => {
                    self.errors.push(format!("read: {error}"));
                    return Ok(());
                }
                Err(error) => return Err(format!("read: {error}")),
            }
            let allowed = self.model.allowed(When::Served);
            self.model.judge(&allowed, &bytes)?;
        }
        Ok(())
    }

    fn finish(self) -> std::result::Result<Outcome, String> {
        for disk in &self.world.disks {
            disk.heal();
        }
        if !self.is_absent() {
            let bytes = self.world.content().map_err(|e| e.to_string())?;
            // A close is a flush: what was closed well is all there. Otherwise the page cache is, as after the end of a
            // process: all but what only the image's memory knew, and no flush had covered.
            let allowed = self.model.allowed(When::Crash(u64::MAX));
            self.model.judge(&allowed, &bytes)?;
        }
        if self.plan.fault.is_none() && !self.errors.is_empty() {
            return Err(self.errors.join("; "));
        }
        let mut eras = self.eras;
        eras.push(Era {
            world: self.world,
            model: self.model,
        });
        Ok(Outcome {
            eras,
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

    /// Requests that are waited for, most with a flush after them that is waited for too. What else the queues are at by
    /// then goes on.
    fn pairs(&mut self, storm: &Storm) -> Result<()> {
        let flush = Request {
            ask: Ask::Flush,
            at: 0,
            len: 0,
        };
        for _ in 0..storm.count {
            let request = storm.draw(&mut self.random, self.model.size());
            self.waited(request)?;
            if self.random.below(12) > 0 {
                self.waited(flush)?;
            }
        }
        Ok(())
    }

    fn waited(&mut self, request: Request) -> Result<()> {
        if self.plan.queues == 0 {
            self.serial(request);
            return Ok(());
        }
        if let Some(Drive::Queues(queues)) = &mut self.drive {
            queues.favourite = (self.random.below(12) > 0).then_some(0);
        }
        self.queued(request)?;
        while !self.flying.is_empty() {
            self.turn()?;
        }
        Ok(())
    }

    /// Notes the beginning of a request; returns the bytes to write.
    fn begin(&mut self, request: Request) -> (u64, Option<usize>, Vec<u8>) {
        let begun = self.world.clock.tick();
        let (first, count) = (request.at / SECTOR, request.len / SECTOR);
        let (value, durable) = match request.ask {
            Ask::Write { fua } => (Value::Stamps, fua),
            Ask::Zero { .. } | Ask::Discard => (Value::Zeros, false),
            Ask::Flush => return (begun, None, Vec::new()),
            Ask::Read => return (begun, None, vec![0xee; request.len as usize]),
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

    fn end(&mut self, request: Request, begun: u64, id: Option<usize>, ok: bool, bytes: &[u8]) {
        let now = self.world.clock.tick();
        match id {
            None if ok && request.ask == Ask::Read => {
                let allowed = self.model.allowed(When::Read(begun));
                let judged = self.model.judge_part(&allowed, request.at / SECTOR, bytes);
                if let Err(what) = judged {
                    let what = format!("{request:?} that began at event {begun}: {what}");
                    self.wrong.get_or_insert(what);
                }
            }
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
        let (begun, id, mut bytes) = self.begin(request);
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
            Ask::Read => driver.read(at, &mut bytes),
        };
        if let Err(error) = &done {
            self.errors.push(error.to_string());
        }
        self.end(request, begun, id, done.is_ok(), &bytes);
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

    fn ended(&mut self, ended: Vec<Ended>) {
        for Ended { tag, ok, bytes } in ended {
            let (request, begun, id) = self.flying.remove(&tag).expect("ends once");
            self.end(request, begun, id, ok, &bytes);
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
