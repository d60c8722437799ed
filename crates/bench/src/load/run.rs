//! The run as a whole: a thread per queue, ramp, measurement, sum.

use super::{
    By, Report, Spec,
    drive::{self, Client, Course, MEASURE, Outcome, Patience, RAMP, REST, Rest, STOP},
    pace::{Pace, Rests},
    plan::{self, Places, Plan},
    turns::Turns,
    usage::{Usage, Watched},
    verify::Verifier,
};
use block::{Error, Result};
use std::{
    sync::{
        atomic::{AtomicBool, AtomicU8, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

/// How long what is in flight at the end of a turn may take, of all queues together, without being counted.
const DRAIN: Duration = Duration::from_millis(20);

enum Message {
    /// A queue is connected.
    Ready,
    /// A queue has nothing in flight, and waits for its next turn.
    Rests,
    /// A queue is done, or failed.
    Ended(Result<Box<Outcome>>),
}

/// Drives one queue for each of `openers`; each opens its client on the queue's own thread. With `turns` the load
/// runs when it is told to, and [`Spec::duration`], [`Spec::ramp`] and [`Spec::ios_max`] mean nothing.
pub(crate) fn run_queues<C, O>(
    spec: &Spec,
    places: Places,
    openers: Vec<O>,
    by: By<'_>,
) -> Result<Report>
where
    C: Client,
    O: FnOnce() -> Result<C> + Send,
{
    let phase = AtomicU8::new(if spec.ramp.is_zero() { MEASURE } else { RAMP });
    // Of the turn that is over: decided before the queues are told to go on, or to end.
    let tail_counts = AtomicBool::new(false);
    let queues = openers.len() as u64;
    let By { turns, against, .. } = by;
    if let Some(ledger) = against.ledger {
        ledger.prepare(&places, queues * u64::from(spec.depth))?;
    }
    thread::scope(|scope| {
        let (tell, hear) = mpsc::channel();
        let mut gates = Vec::new();
        for (queue, open) in (0u32..).zip(openers) {
            let (gate, pass) = mpsc::channel();
            gates.push(gate);
            let (tell, phase, tail_counts) = (tell.clone(), &phase, &tail_counts);
            let report = tell.clone();
            let is_counted = turns.is_none();
            let share = move |all: Option<u64>| {
                let all = all.filter(|_| is_counted);
                all.map(|max| plan::share(max, queues, queue))
            };
            let body = move || {
                let mut client = open()?;
                let _ = tell.send(Message::Ready);
                // Nobody opens the gate when another queue failed.
                if pass.recv().is_err() {
                    return Ok(Box::default());
                }
                let rest = || Rest {
                    goes_on: tell.send(Message::Rests).is_ok() && pass.recv().is_ok(),
                    // Read behind what the gate said.
                    tail_counts: tail_counts.load(Ordering::Acquire),
                };
                let depth = spec.depth as usize;
                let block = spec.block_bytes as usize;
                let mut verifier = against.ledger.map(|l| Verifier::new(l, block, depth));
                let course = Course {
                    plan: Plan::new(spec, places, queue, against),
                    depth,
                    pace: Pace::new(spec, queue),
                    rests: Rests::new(spec),
                    ios_max: share(spec.ios_max),
                    bytes_max: share(spec.shape.bytes_max),
                    verifier: verifier.as_mut(),
                    patience: Patience::of(spec),
                };
                drive::drive(&mut client, course, phase, rest).map(Box::new)
            };
            thread::Builder::new()
                .name(format!("load-{queue}"))
                .spawn_scoped(scope, move || {
                    let _ = report.send(Message::Ended(body()));
                })
                .map_err(|e| Error::os("starting a thread", e))?;
        }
        drop(tell);
        let stage = Stage {
            phase: &phase,
            tail_counts: &tail_counts,
        };
        conduct(spec, &stage, gates, &hear, turns)
    })
}

/// What the conductor shows to all queues.
struct Stage<'a> {
    phase: &'a AtomicU8,
    /// What ended behind the last turn counts as the turn's.
    tail_counts: &'a AtomicBool,
}

/// The thread that measures: lets the queues go, and takes what they bring.
fn conduct(
    spec: &Spec,
    stage: &Stage<'_>,
    gates: Vec<Sender<()>>,
    hear: &Receiver<Message>,
    turns: Option<&Turns>,
) -> Result<Report> {
    let mut hall = Hall {
        hear,
        running: gates.len(),
        total: Outcome::default(),
        failure: None,
    };
    let mut waiting = gates.len();
    while waiting > 0 && hall.failure.is_none() {
        match hear.recv() {
            Ok(Message::Ready) => waiting -= 1,
            Ok(Message::Rests) => {}
            Ok(Message::Ended(outcome)) => hall.ended(outcome),
            Err(_) => break,
        }
    }
    if let Some(error) = hall.failure.take() {
        drop(gates);
        return Err(error);
    }
    let mut watched = Watched::of(spec)?;
    if let Some(turns) = turns {
        let (seconds, used) = in_turns(&mut watched, stage, gates, &mut hall, turns)?;
        return report(spec, &hall.total, seconds, used);
    }
    let phase = stage.phase;
    let mut before = watched.begin()?;
    let mut began = Instant::now();
    for gate in gates {
        let _ = gate.send(());
    }
    if !spec.ramp.is_zero() {
        hall.wait(Some(began + spec.ramp));
        before = watched.begin().unwrap_or(before);
        began = Instant::now();
        phase.store(MEASURE, Ordering::Relaxed);
    }
    let limit = (!spec.duration.is_zero()).then(|| began.checked_add(spec.duration));
    hall.wait(limit.flatten());
    let done = hall.running == 0;
    phase.store(STOP, Ordering::Relaxed);
    hall.wait_all();
    if let Some(error) = hall.failure {
        return Err(error);
    }
    let after = watched.end()?;
    // Who ended by itself took as long as its last request; who was stopped was there to the end, and perhaps idle.
    let seconds = match hall.total.last {
        None => began.elapsed(),
        Some(last) if done => last - began,
        Some(last) => (last - began).max(spec.duration),
    };
    report(spec, &hall.total, seconds, after.since(&before))
}

/// Runs when `turns` says so, until there are no more; what was measured, and used meanwhile.
fn in_turns(
    watched: &mut Watched<'_>,
    stage: &Stage<'_>,
    gates: Vec<Sender<()>>,
    hall: &mut Hall<'_>,
    turns: &Turns,
) -> Result<(Duration, Usage)> {
    let phase = stage.phase;
    let mut measured = Duration::ZERO;
    let mut used = Usage::default();
    while let Some(turn) = turns.next() {
        phase.store(RAMP, Ordering::Relaxed);
        for gate in &gates {
            let _ = gate.send(());
        }
        hall.wait(Some(Instant::now() + turn.ramp));
        if !turn.measure.is_zero() {
            // Without an answer the queues would go on as they do in a ramp, and nobody ever say when they are to stop.
            let stop = |_: &Error| phase.store(STOP, Ordering::Relaxed);
            let before = watched.begin().inspect_err(stop)?;
            let began = Instant::now();
            phase.store(MEASURE, Ordering::Relaxed);
            hall.wait(Some(began + turn.measure));
            phase.store(REST, Ordering::Relaxed);
            let window = began.elapsed();
            let mut after = watched.end()?;
            hall.wait_for_rest();
            let drain = began.elapsed() - window;
            measured += window;
            // For the time and for what ended in it.
            let counts = drain > DRAIN;
            stage.tail_counts.store(counts, Ordering::Release);
            if counts {
                measured += drain;
                after = watched.end()?;
            }
            used.add(&after.since(&before));
        } else {
            phase.store(REST, Ordering::Relaxed);
            hall.wait_for_rest();
        }
        if let Some(error) = hall.failure.take() {
            return Err(error);
        }
        turns.over();
    }
    drop(gates);
    hall.wait_all();
    hall.failure.take().map_or(Ok((measured, used)), Err)
}

struct Hall<'a> {
    hear: &'a Receiver<Message>,
    running: usize,
    total: Outcome,
    failure: Option<Error>,
}

impl Hall<'_> {
    fn ended(&mut self, outcome: Result<Box<Outcome>>) {
        self.running -= 1;
        match outcome {
            Ok(outcome) => self.total.merge(&outcome),
            Err(error) => self.failure = self.failure.take().or(Some(error)),
        }
    }

    /// Until `until`, or until all queues are done or one has failed.
    fn wait(&mut self, until: Option<Instant>) {
        while self.running > 0 && self.failure.is_none() {
            let heard = match until {
                Some(until) => self
                    .hear
                    .recv_timeout(until.saturating_duration_since(Instant::now())),
                None => self.hear.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match heard {
                Ok(Message::Ended(outcome)) => self.ended(outcome),
                Ok(Message::Ready | Message::Rests) => {}
                Err(_) => return,
            }
        }
    }

    /// Until all queues rest, or one has failed.
    fn wait_for_rest(&mut self) {
        let mut resting = 0;
        while resting < self.running && self.failure.is_none() {
            match self.hear.recv() {
                Ok(Message::Rests) => resting += 1,
                Ok(Message::Ended(outcome)) => self.ended(outcome),
                Ok(Message::Ready) => {}
                Err(_) => return,
            }
        }
    }

    fn wait_all(&mut self) {
        while self.running > 0 {
            match self.hear.recv() {
                Ok(Message::Ended(outcome)) => self.ended(outcome),
                Ok(Message::Ready | Message::Rests) => {}
                // A thread that panicked; the scope passes that on.
                Err(_) => return,
            }
        }
    }
}

fn report(spec: &Spec, total: &Outcome, seconds: Duration, used: Usage) -> Result<Report> {
    let seconds = seconds.as_secs_f64().max(1e-9);
    let transfers = total.reads + total.writes;
    let requests = (transfers + total.flushes).max(1) as f64;
    let ios = if transfers > 0 {
        transfers
    } else {
        total.flushes.max(1)
    } as f64;
    let bytes = total.bytes;
    let mut report = Report {
        flushes: total.flushes,
        errors: total.errors,
        errors_besides: total.errors_besides,
        unsent: total.unsent,
        flush_latency: total.flush_latency.percentiles(),
        kicks_per_io: total.kicks as f64 / requests,
        calls_per_io: total.calls as f64 / requests,
        timeline: total.timeline.store(),
        ..Report::counted(
            seconds,
            bytes,
            (total.reads, &total.read_latency),
            (total.writes, &total.write_latency),
        )
    };
    report.kinds[2] = total.flush_latency.histogram();
    used.tell(&spec.server_pids, ios, requests, &mut report)?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use crate::load::{Report, Spec, Target, run};
    use std::time::Duration;

    /// Reads of a file.
    fn reads(change: impl FnOnce(&mut Spec)) -> Report {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut spec = Spec::new(Target::File {
            path: file.path().to_owned(),
            engine: "threads".to_owned(),
            direct: false,
        });
        change(&mut spec);
        run(&spec).unwrap()
    }

    #[test]
    fn what_never_had_its_turn_is_in_the_latencies() {
        // More than any file takes.
        let report = reads(|spec| {
            (spec.rate, spec.poll) = (Some(1e8), true);
            (spec.depth, spec.duration) = (2, Duration::from_millis(200));
        });
        let latency = report.read_latency;
        assert!(report.unsent > report.reads, "{report:?}");
        assert_eq!(latency.count, report.reads + report.unsent);
        // All of them wait until the end, and half of them for half of the time at least.
        assert!(latency.p50_us >= 90_000.0, "{latency:?}");
        let report = reads(|spec| {
            (spec.rate, spec.poll) = (Some(100.0), true);
            (spec.depth, spec.duration) = (32, Duration::from_millis(200));
        });
        assert_eq!((report.unsent, report.latency.count), (0, report.reads));
    }

    #[test]
    fn a_load_that_idles_to_its_end_took_until_then() {
        let duration = Duration::from_millis(300);
        let report = reads(|spec| {
            (spec.rate, spec.poll) = (Some(5.0), true);
            spec.duration = duration;
        });
        assert!(report.seconds >= duration.as_secs_f64(), "{report:?}");
        // The first at once, the second after a fifth of a second.
        assert!((1..=2).contains(&report.reads), "{report:?}");
        let report = reads(|spec| {
            spec.think = Duration::from_secs(1);
            (spec.depth, spec.duration) = (1, duration);
        });
        assert!(report.seconds >= duration.as_secs_f64(), "{report:?}");
    }

    #[test]
    fn a_load_of_so_many_requests_took_until_the_last() {
        let report = reads(|spec| {
            spec.ios_max = Some(100);
            spec.duration = Duration::from_secs(3600);
        });
        assert_eq!(report.reads, 100);
        assert!(report.seconds < 3600.0);
    }
}
