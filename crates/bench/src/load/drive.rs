//! One queue's loop: keep requests in flight, count what ends.

use super::{
    Latencies, Timeline,
    plan::{Kind, Plan, Request},
    verify::Verifier,
};
use block::{Error, ErrorKind, Result};
use std::{
    collections::VecDeque,
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

    /// Puts a block in the place of a slot that is free: what its next write carries, or what its next read begins with.
    fn put(&mut self, slot: usize, block: &[u8]);

    /// The block that a slot's read has brought.
    fn get(&mut self, slot: usize, block: &mut [u8]);

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

/// How many requests are due now, the next one of them since `due`.
fn are_due(now: Instant, due: Instant, interval: Duration) -> usize {
    match now.checked_duration_since(due) {
        Some(late) => {
            let more = late.as_nanos() / interval.as_nanos().max(1);
            usize::try_from(more)
                .unwrap_or(usize::MAX)
                .saturating_add(1)
        }
        None => 0,
    }
}

/// Waits until `due`, or for a while: the end of the load is looked for in between. A sleep ends late, so the last part of it
/// is spent awake.
fn wait_until(due: Instant) {
    const AWAKE: Duration = Duration::from_micros(200);
    const LONGEST: Duration = Duration::from_millis(10);
    let left = due.saturating_duration_since(Instant::now());
    match left.checked_sub(AWAKE) {
        Some(sleep) => std::thread::sleep(sleep.min(LONGEST)),
        None => std::hint::spin_loop(),
    }
}

/// Keeps `depth` requests in flight until `phase` says [`STOP`] or `ios_max` reads and writes were counted,
/// and until all of them have ended. When it says [`REST`] and none is in flight, `rest` is called, which returns at
/// the next turn; with `false` where there is none. Where the plan has a rate, requests begin when they are due instead, as far
/// as `depth` allows, and their latency counts from then; where it has a time to think, each slot rests for that long after an
/// answer. With a `verifier` blocks are what that says, and a queue that has written flushes at its end.
pub(crate) fn drive(
    client: &mut impl Client,
    plan: &mut Plan,
    depth: usize,
    ios_max: Option<u64>,
    phase: &AtomicU8,
    mut rest: impl FnMut() -> bool,
    mut verifier: Option<&mut Verifier<'_>>,
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
    let (pace, think) = (plan.interval(), plan.think());
    // Slots that think, and until when.
    let mut resting: VecDeque<(Instant, usize)> = VecDeque::new();
    let mut written = false;
    // When the next request is due, where they do not wait for each other.
    let mut due = began;
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
            let free = |slot: &usize| ready.contains(slot) || resting.iter().any(|r| r.1 == *slot);
            let busy = slots.iter().enumerate().filter(|(i, _)| !free(i));
            let transfers: u64 = busy.map(|(_, (kind, _))| flying(kind)).sum();
            left = ios_max.map_or(u64::MAX, |max| max.saturating_sub(transfers));
        }
        // Taken before the first is submitted: a server that polls may answer before the last is.
        let now = Instant::now();
        while let Some((_, slot)) = resting.pop_front_if(|(until, _)| *until <= now) {
            ready.push(slot);
        }
        let usable = match (state, pace) {
            (REST, _) => 0,
            (RAMP | MEASURE, Some(interval)) => are_due(now, due, interval).min(ready.len()),
            _ => ready.len(),
        };
        for slot in ready.drain(..usable) {
            let request = match plan.flush(slot) {
                Some(flush) if state != STOP => flush,
                None if state != STOP && left > 0 => {
                    left -= 1;
                    plan.next(slot)
                }
                _ => continue,
            };
            let request = match &mut verifier {
                Some(verifier) => verifier.begin(client, slot, request)?,
                None => request,
            };
            written |= request.kind == Kind::Write;
            client.submit(slot, request)?;
            slots[slot] = (request.kind, pace.map_or(now, |_| due));
            due += pace.unwrap_or_default();
            in_flight += 1;
        }
        if in_flight == 0 {
            if state == REST && rest() {
                began = Instant::now();
                due = began;
                continue;
            }
            if pace.is_some() && left > 0 && matches!(state, RAMP | MEASURE) {
                wait_until(due);
                began = Instant::now();
                continue;
            }
            if let Some((until, _)) = resting.front()
                && left > 0
                && matches!(state, RAMP | MEASURE)
            {
                wait_until(*until);
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
            if let Some(verifier) = &mut verifier {
                verifier.end(client, slot, ok);
            }
            if measuring {
                outcome.count(kind, now - since, ok);
                if kind != Kind::Flush {
                    let at = earlier + now.saturating_duration_since(origin);
                    outcome.timeline.add(at, now - since);
                }
            }
            match think.is_zero() || plan.is_flush_due(slot) {
                true => ready.push(slot),
                false => resting.push_back((now + think, slot)),
            }
        }
        if measuring {
            outcome.last = Some(now);
        }
    }
    if measuring {
        outcome.notified(before, client.notifications());
    }
    if let Some(verifier) = verifier
        && written
        && plan.can_flush()
    {
        flush(client, verifier)?;
    }
    Ok(outcome)
}

/// Sends a flush that counts for nothing but what is known of the disk, and waits for it.
fn flush(client: &mut impl Client, verifier: &mut Verifier<'_>) -> Result<()> {
    let request = Request {
        kind: Kind::Flush,
        offset: 0,
    };
    let began = Instant::now();
    let request = verifier.begin(client, 0, request)?;
    client.submit(0, request)?;
    let mut ended = Vec::new();
    while ended.is_empty() {
        if began.elapsed() > ANSWER_MAX {
            let text = format!(
                "the last flush was not answered for {} s",
                ANSWER_MAX.as_secs()
            );
            return Err(Error::new(ErrorKind::Io, text));
        }
        client.send()?;
        client.reap(&mut ended)?;
    }
    let ok = ended.iter().all(|ended| ended.ok);
    verifier.end(client, 0, ok);
    match ok {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Io, "the last flush failed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{
        Against, Spec, Target,
        plan::{Geometry, Places},
    };

    /// Answers at once, but for one time when it takes long.
    #[derive(Default)]
    struct Stalling {
        waiting: Vec<usize>,
        answered: u32,
    }

    impl Client for Stalling {
        fn submit(&mut self, slot: usize, _: Request) -> Result<()> {
            self.waiting.push(slot);
            Ok(())
        }

        fn send(&mut self) -> Result<()> {
            Ok(())
        }

        fn reap(&mut self, ended: &mut Vec<Ended>) -> Result<()> {
            self.answered += 1;
            if self.answered == 10 {
                std::thread::sleep(Duration::from_millis(40));
            }
            let slots = self.waiting.drain(..);
            ended.extend(slots.map(|slot| Ended { slot, ok: true }));
            Ok(())
        }

        fn put(&mut self, _: usize, _: &[u8]) {}

        fn get(&mut self, _: usize, _: &mut [u8]) {}

        fn notifications(&self) -> (u64, u64) {
            (0, 0)
        }
    }

    /// Requests of a hundred that took more than 5 ms, where the server stalled for 40 ms once.
    fn slow(rate: Option<f64>) -> u64 {
        let spec = Spec {
            rate,
            poll: true,
            depth: 1,
            ..Spec::new(Target::VhostUser("none".into()))
        };
        spec.check().unwrap();
        let disk = Geometry {
            capacity: 1 << 20,
            read_only: false,
            flushes: true,
            block_bytes: 512,
        };
        let mut plan = Plan::new(
            &spec,
            Places::new(&spec, &disk).unwrap(),
            0,
            Against::default(),
        );
        let phase = AtomicU8::new(MEASURE);
        let mut client = Stalling::default();
        let outcome = drive(&mut client, &mut plan, 1, Some(100), &phase, || false, None).unwrap();
        assert_eq!(outcome.reads, 100);
        let histogram = outcome.read_latency.histogram();
        let slow = histogram
            .as_slice()
            .iter()
            .filter(|(ns, _)| *ns > 5_000_000);
        slow.map(|(_, count)| count).sum()
    }

    #[test]
    fn a_stall_is_felt_by_all_requests_that_were_due_meanwhile() {
        // Who waits for the answer before asking again sees one slow request; a machine that is busy makes it more.
        assert!(slow(None) >= 1);
        // At one a millisecond some 35 are more than 5 ms late.
        assert!(slow(Some(1000.0)) >= 30);
        let (now, ms) = (Instant::now(), Duration::from_millis);
        assert_eq!(are_due(now, now + ms(1), ms(1)), 0);
        assert_eq!(are_due(now, now, ms(1)), 1);
        assert_eq!(are_due(now + ms(5), now, ms(2)), 3);
        assert_eq!(are_due(now + ms(5), now, Duration::ZERO), 5_000_001);
    }
}
