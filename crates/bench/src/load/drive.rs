//! One queue's loop: keep requests in flight, count what ends.

use super::{
    Latencies, Timeline,
    plan::{Kind, Plan, Request},
};
use block::{Error, ErrorKind, Result};
use std::{
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

/// Running, not counted yet.
pub(crate) const RAMP: u8 = 0;
/// Running and counted.
pub(crate) const MEASURE: u8 = 1;
/// No more requests; those in flight end and count.
pub(crate) const STOP: u8 = 2;
/// Between two turns: no more requests for now; those in flight end and do not count.
pub(crate) const REST: u8 = 3;

/// How long a server may leave all requests unanswered.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// How one queue reaches its target. Requests are known by their slot, 0 to the depth.
pub(crate) trait Client {
    /// Takes a request for the next `send`; the slot is free.
    fn submit(&mut self, slot: usize, request: Request) -> Result<()>;

    /// Lets the target know of what was submitted: at most one notification.
    fn send(&mut self) -> Result<()>;

    /// Adds what has ended to `ended`, waiting for the first. May return with nothing after a while, and does
    /// at least once a second.
    fn reap(&mut self, ended: &mut Vec<Ended>) -> Result<()>;

    /// Notifications to the target and from it so far.
    fn notifications(&self) -> (u64, u64);
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub slot: usize,
    pub ok: bool,
}

/// What a queue has counted.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub errors: u64,
    pub failed_transfers: u64,
    pub read_latency: Latencies,
    pub write_latency: Latencies,
    pub flush_latency: Latencies,
    /// Of reads and writes.
    pub timeline: Timeline,
    pub kicks: u64,
    pub calls: u64,
    /// When the last request ended.
    pub last: Option<Instant>,
}

impl Outcome {
    fn count(&mut self, kind: Kind, latency: Duration, ok: bool) {
        let (count, latencies) = match kind {
            Kind::Read => (&mut self.reads, &mut self.read_latency),
            Kind::Write => (&mut self.writes, &mut self.write_latency),
            Kind::Flush => (&mut self.flushes, &mut self.flush_latency),
        };
        *count += 1;
        latencies.add(latency);
        if !ok {
            self.errors += 1;
            self.failed_transfers += u64::from(kind != Kind::Flush);
        }
    }

    fn notified(&mut self, before: (u64, u64), now: (u64, u64)) {
        self.kicks += now.0 - before.0;
        self.calls += now.1 - before.1;
    }

    /// Counts all of `other` too.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.flushes += other.flushes;
        self.errors += other.errors;
        self.failed_transfers += other.failed_transfers;
        self.read_latency.merge(&other.read_latency);
        self.write_latency.merge(&other.write_latency);
        self.flush_latency.merge(&other.flush_latency);
        self.timeline.merge(&other.timeline);
        self.kicks += other.kicks;
        self.calls += other.calls;
        self.last = self.last.max(other.last);
    }
}

/// Keeps `depth` requests in flight until `phase` says [`STOP`] or `ios_max` reads and writes were counted,
/// and until all of them have ended. When it says [`REST`] and none is in flight, `rest` is called, which returns at
/// the next turn; with `false` where there is none.
pub(crate) fn drive(
    client: &mut impl Client,
    plan: &mut Plan,
    depth: usize,
    ios_max: Option<u64>,
    phase: &AtomicU8,
    mut rest: impl FnMut() -> bool,
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut began = Instant::now();
    let mut origin = began;
    // What was measured in turns before this one.
    let mut earlier = Duration::ZERO;
    let mut slots = vec![(Kind::Read, began); depth];
    let mut ended = Vec::with_capacity(depth);
    let mut in_flight = 0;
    let mut measuring = false;
    let mut before = (0, 0);
    // Reads and writes that may still be asked for.
    let mut left = u64::MAX;
    let mut ready: Vec<usize> = (0..depth).collect();
    loop {
        let state = phase.load(Ordering::Relaxed);
        if measuring && matches!(state, RAMP | REST) {
            measuring = false;
            earlier += origin.elapsed();
            outcome.notified(before, client.notifications());
        } else if !measuring && matches!(state, MEASURE | STOP) {
            measuring = true;
            origin = Instant::now();
            before = client.notifications();
            let flying = |kind: &Kind| u64::from(*kind != Kind::Flush);
            let busy = slots.iter().enumerate().filter(|(i, _)| !ready.contains(i));
            let transfers: u64 = busy.map(|(_, (kind, _))| flying(kind)).sum();
            left = ios_max.map_or(u64::MAX, |max| max.saturating_sub(transfers));
        }
        // Taken before the first is submitted: a server that polls may answer before the last is.
        let now = Instant::now();
        let usable = if state == REST { 0 } else { ready.len() };
        for slot in ready.drain(..usable) {
            let request = match plan.flush(slot) {
                Some(flush) if state != STOP => flush,
                None if state != STOP && left > 0 => {
                    left -= 1;
                    plan.next(slot)
                }
                _ => continue,
            };
            client.submit(slot, request)?;
            slots[slot] = (request.kind, now);
            in_flight += 1;
        }
        if in_flight == 0 {
            if state == REST && rest() {
                began = Instant::now();
                continue;
            }
            break;
        }
        client.send()?;
        client.reap(&mut ended)?;
        let now = Instant::now();
        if ended.is_empty() {
            if now - began > ANSWER_MAX {
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "none of {in_flight} requests was answered for {} s",
                        ANSWER_MAX.as_secs()
                    ),
                ));
            }
            continue;
        }
        began = now;
        in_flight -= ended.len();
        for Ended { slot, ok } in ended.drain(..) {
            let (kind, since) = slots[slot];
            if measuring {
                outcome.count(kind, now - since, ok);
                if kind != Kind::Flush {
                    let at = earlier + now.saturating_duration_since(origin);
                    outcome.timeline.add(at, now - since);
                }
            }
            ready.push(slot);
        }
        if measuring {
            outcome.last = Some(now);
        }
    }
    if measuring {
        outcome.notified(before, client.notifications());
    }
    Ok(outcome)
}
