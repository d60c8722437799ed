//! One queue's loop: keep requests in flight, count what ends.

use super::{
    Latencies, Spec, Target, Timeline,
    pace::{Pace, Rests},
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
/// Between two turns: no more requests for now. Those in flight end; their latencies are noted, and where that takes long they and
/// the time count as the turn's ([`Rest`]), so that no turn's end hides a server that stalls.
pub(crate) const REST: u8 = 3;

/// What a queue is told that has nothing in flight after a turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rest {
    /// There is another turn, which begins now.
    pub goes_on: bool,
    /// What ended since the turn was over counts as the turn's: of all queues together that took long.
    pub tail_counts: bool,
}

/// How long a server may leave all requests unanswered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    limit: Duration,
    hint: &'static str,
}

impl Patience {
    pub(crate) fn of(spec: &Spec) -> Self {
        Self {
            limit: spec.answer_max,
            hint: match spec.target {
                Target::Nbd(_) => ": a longer wait is allowed by --nbd-timeout",
                Target::VhostUser(_) | Target::File { .. } => "",
            },
        }
    }

    /// Whether nothing since `began` is too long.
    fn is_over(self, began: Instant) -> bool {
        !self.limit.is_zero() && began.elapsed() > self.limit
    }

    fn over(self, what: &str) -> Error {
        let Self { limit, hint } = self;
        Error::new(
            ErrorKind::Io,
            format!("{what} answered for {} s{hint}", limit.as_secs_f64()),
        )
    }
}

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
    /// Requests that failed while nothing counted.
    pub errors_besides: u64,
    /// Requests that were due and never sent: every place was taken to the end. They are in no count but the latencies'.
    pub unsent: u64,
    /// Of reads and writes that did not fail.
    pub bytes: u64,
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
    fn count(&mut self, request: &Request, latency: Duration, ok: bool) {
        let (count, latencies) = match request.kind {
            Kind::Read => (&mut self.reads, &mut self.read_latency),
            Kind::Write => (&mut self.writes, &mut self.write_latency),
            Kind::Flush => (&mut self.flushes, &mut self.flush_latency),
        };
        *count += 1;
        latencies.add(latency);
        match ok {
            true => self.bytes += request.bytes,
            false => self.errors += 1,
        }
    }

    /// Notes what ended after a turn, of which it counts or not.
    fn drained(&mut self, tail: &Self, counts: bool) {
        if counts {
            self.merge(tail);
            return;
        }
        self.errors_besides += tail.errors;
        self.read_latency.merge(&tail.read_latency);
        self.write_latency.merge(&tail.write_latency);
        self.flush_latency.merge(&tail.flush_latency);
    }

    /// Notes `count` requests that were due and never sent: they have waited so long, and nobody knows how much longer they would have.
    fn missed(&mut self, kind: Kind, waited: Duration, count: u64) {
        self.unsent += count;
        match kind {
            Kind::Read => self.read_latency.add_many(waited, count),
            Kind::Write => self.write_latency.add_many(waited, count),
            Kind::Flush => {}
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
        self.errors_besides += other.errors_besides;
        self.unsent += other.unsent;
        self.bytes += other.bytes;
        self.read_latency.merge(&other.read_latency);
        self.write_latency.merge(&other.write_latency);
        self.flush_latency.merge(&other.flush_latency);
        self.timeline.merge(&other.timeline);
        self.kicks += other.kicks;
        self.calls += other.calls;
        self.last = self.last.max(other.last);
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

/// What a queue does, and how long.
pub(crate) struct Course<'a, 'v> {
    pub plan: Plan<'a>,
    /// Requests at a time.
    pub depth: usize,
    /// Where requests have a time at which they are due.
    pub pace: Option<Pace>,
    /// Where the queue rests.
    pub rests: Option<Rests>,
    /// Ends after so many reads and writes that count…
    pub ios_max: Option<u64>,
    /// … or so many bytes.
    pub bytes_max: Option<u64>,
    /// Says what blocks are.
    pub verifier: Option<&'a mut Verifier<'v>>,
    /// How long the target may be silent.
    pub patience: Patience,
}

/// Keeps [`Course::depth`] requests in flight until `phase` says [`STOP`] or as many were counted as are to be,
/// and until all of them have ended. When it says [`REST`] and none is in flight, `rest` is called, which returns at
/// the next turn, or when there is none. Where there is a pace, requests begin when they are due instead, as far
/// as the depth allows, and their latency counts from then, also of those for which no place became free before the end; where the plan has a time to think, each slot rests for that long after an
/// answer. With a verifier blocks are what that says, and a queue that has written flushes at its end.
pub(crate) fn drive(
    client: &mut impl Client,
    course: Course<'_, '_>,
    phase: &AtomicU8,
    mut rest: impl FnMut() -> Rest,
) -> Result<Outcome> {
    let Course {
        mut plan,
        depth,
        mut pace,
        mut rests,
        ios_max,
        bytes_max,
        mut verifier,
        patience,
    } = course;
    let mut outcome = Outcome::default();
    let mut began = Instant::now();
    let mut origin = began;
    // What was measured in turns before this one.
    let mut earlier = Duration::ZERO;
    let mut slots = vec![(Request::flush(0), began); depth];
    let mut ended = Vec::with_capacity(depth);
    let mut in_flight = 0;
    let mut measuring = false;
    // What has ended since the turn was over.
    let mut tail: Option<Outcome> = None;
    let mut before = (0, 0);
    // Reads and writes that may still be asked for, and their bytes.
    let mut left = (u64::MAX, u64::MAX);
    let mut ready: VecDeque<usize> = (0..depth).collect();
    let think = plan.think();
    // Slots that think, and until when.
    let mut resting: VecDeque<(Instant, usize)> = VecDeque::new();
    let mut written = false;
    // When the end was seen: what was due before is sent still, as far as places are free, and is missed otherwise.
    let mut stopped: Option<Instant> = None;
    if let Some(pace) = &mut pace {
        pace.restart(began);
    }
    loop {
        let state = phase.load(Ordering::Relaxed);
        if measuring && matches!(state, RAMP | REST) {
            measuring = false;
            earlier += origin.elapsed();
            tail = (state == REST).then(Outcome::default);
            outcome.notified(before, client.notifications());
        } else if !measuring && matches!(state, MEASURE | STOP) {
            measuring = true;
            origin = Instant::now();
            before = client.notifications();
            let free = |slot: &usize| ready.contains(slot) || resting.iter().any(|r| r.1 == *slot);
            let busy = slots.iter().enumerate().filter(|(i, _)| !free(i));
            let busy = busy.map(|(_, (request, _))| request);
            let flying = busy.filter(|request| request.kind != Kind::Flush);
            let (count, bytes) = flying.fold((0, 0), |(n, all), r| (n + 1, all + r.bytes));
            left = (
                ios_max.map_or(u64::MAX, |max| max.saturating_sub(count)),
                bytes_max.map_or(u64::MAX, |max| max.saturating_sub(bytes)),
            );
        }
        let goes_on = matches!(state, RAMP | MEASURE) && left.0 > 0 && left.1 > 0;
        // Taken before the first is submitted: a server that polls may answer before the last is.
        let now = Instant::now();
        let last_round = state == STOP && stopped.is_none();
        if last_round {
            stopped = Some(now);
        }
        while let Some((_, slot)) = resting.pop_front_if(|(until, _)| *until <= now) {
            ready.push_back(slot);
        }
        for _ in 0..ready.len() {
            let is_time = pace.as_ref().is_none_or(|pace| pace.due() <= now);
            let holds = rests.as_ref().is_some_and(Rests::holds);
            if state == REST || state != STOP && (!is_time || holds) {
                break;
            }
            let is_late = last_round && pace.is_some() && is_time && !holds;
            let Some(slot) = ready.pop_front() else {
                break;
            };
            let mut since = now;
            let request = match plan.flush(slot) {
                Some(flush) if state != STOP => flush,
                None if (state != STOP || is_late) && left.0 > 0 && left.1 > 0 => {
                    let request = plan.next(slot, pace.as_ref().and_then(Pace::kind));
                    left.0 -= 1;
                    left.1 = left.1.saturating_sub(request.bytes);
                    if let Some(pace) = &mut pace {
                        since = pace.due();
                        pace.sent(request.bytes);
                    }
                    if let Some(rests) = &mut rests {
                        rests.sent();
                    }
                    request
                }
                _ => continue,
            };
            let request = match &mut verifier {
                Some(verifier) => verifier.begin(client, slot, request)?,
                None => request,
            };
            written |= request.kind == Kind::Write;
            client.submit(slot, request)?;
            slots[slot] = (request, since);
            in_flight += 1;
        }
        if in_flight == 0 {
            if state == REST {
                let rest = rest();
                if let Some(tail) = tail.take() {
                    outcome.drained(&tail, rest.tail_counts);
                }
                if rest.goes_on {
                    began = Instant::now();
                    if let Some(pace) = &mut pace {
                        pace.restart(began);
                    }
                    continue;
                }
            }
            let held = rests.as_mut().filter(|rests| rests.holds() && goes_on);
            if let Some(rests) = held {
                if let Some((until, awake)) = rests.until(now)
                    && !awake
                {
                    wait_until(until);
                }
                began = Instant::now();
                continue;
            }
            let next = match (&pace, resting.front()) {
                (Some(pace), _) => Some(pace.due()),
                (None, front) => front.map(|(until, _)| *until),
            };
            if let Some(next) = next.filter(|_| goes_on) {
                wait_until(next);
                began = Instant::now();
                continue;
            }
            break;
        }
        client.send()?;
        client.reap(&mut ended)?;
        let now = Instant::now();
        if ended.is_empty() {
            if patience.is_over(began) {
                return Err(patience.over(&format!("none of {in_flight} requests was")));
            }
            continue;
        }
        began = now;
        in_flight -= ended.len();
        for Ended { slot, ok } in ended.drain(..) {
            let (request, since) = slots[slot];
            if let Some(verifier) = &mut verifier {
                verifier.end(client, slot, ok);
            }
            match &mut tail {
                Some(tail) => tail.count(&request, now.saturating_duration_since(since), ok),
                None if !measuring && !ok => outcome.errors_besides += 1,
                None => {}
            }
            if measuring {
                outcome.count(&request, now.saturating_duration_since(since), ok);
                if request.kind != Kind::Flush {
                    let at = earlier + now.saturating_duration_since(origin);
                    outcome
                        .timeline
                        .add(at, now.saturating_duration_since(since));
                }
            }
            if let Some(rests) = rests.as_mut().filter(|_| request.kind != Kind::Flush) {
                rests.ended();
            }
            match think.is_zero() || plan.is_flush_due(slot) {
                true => ready.push_back(slot),
                false => resting.push_back((now + think, slot)),
            }
        }
        if measuring {
            outcome.last = Some(now);
        }
    }
    if measuring {
        outcome.notified(before, client.notifications());
        let paced = pace.filter(|_| left.0 > 0 && left.1 > 0);
        if let Some((pace, stopped)) = paced.zip(stopped) {
            let now = Instant::now();
            for late in pace.overdue(stopped) {
                let kind = late.kind.unwrap_or_else(|| plan.next(0, None).kind);
                outcome.missed(kind, now.saturating_duration_since(late.due), late.count);
            }
        }
    }
    if written {
        match verifier {
            Some(verifier) if plan.can_flush() => {
                flush(client, Some(verifier), Request::flush(0), patience)?
            }
            Some(_) => {}
            None => {
                for last in plan.last_flushes() {
                    flush(client, None, last, patience)?;
                }
            }
        }
    }
    Ok(outcome)
}

/// Sends a flush that counts for nothing but what is known of the disk, and waits for it.
fn flush(
    client: &mut impl Client,
    mut verifier: Option<&mut Verifier<'_>>,
    request: Request,
    patience: Patience,
) -> Result<()> {
    let began = Instant::now();
    let request = match &mut verifier {
        Some(verifier) => verifier.begin(client, 0, request)?,
        None => request,
    };
    client.submit(0, request)?;
    let mut ended = Vec::new();
    while ended.is_empty() {
        if patience.is_over(began) {
            return Err(patience.over("the last flush was not"));
        }
        client.send()?;
        client.reap(&mut ended)?;
    }
    let ok = ended.iter().all(|ended| ended.ok);
    if let Some(verifier) = verifier {
        verifier.end(client, 0, ok);
    }
    match ok {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Io, "the last flush failed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{
        Against,
        plan::{DISK, Places},
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

    /// What the first queue of a load does with the disk.
    fn course<'v>(spec: &Spec, ios_max: Option<u64>) -> Course<'_, 'v> {
        let places = Places::new(spec, &DISK).unwrap();
        Course {
            plan: Plan::new(spec, places, 0, Against::default()),
            depth: spec.depth as usize,
            pace: Pace::new(spec, 0),
            rests: Rests::new(spec),
            ios_max,
            bytes_max: None,
            verifier: None,
            patience: Patience::of(spec),
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
        let phase = AtomicU8::new(MEASURE);
        let mut client = Stalling::default();
        let outcome = drive(&mut client, course(&spec, Some(100)), &phase, Rest::default).unwrap();
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
    }

    /// A server whose answers somebody meddles with.
    struct Meddled<F> {
        inner: Stalling,
        reap: F,
    }

    impl<F: FnMut(&mut Stalling, &mut Vec<Ended>) -> Result<()>> Client for Meddled<F> {
        fn submit(&mut self, slot: usize, request: Request) -> Result<()> {
            self.inner.submit(slot, request)
        }

        fn send(&mut self) -> Result<()> {
            Ok(())
        }

        fn reap(&mut self, ended: &mut Vec<Ended>) -> Result<()> {
            (self.reap)(&mut self.inner, ended)
        }

        fn put(&mut self, _: usize, _: &[u8]) {}

        fn get(&mut self, _: usize, _: &mut [u8]) {}

        fn notifications(&self) -> (u64, u64) {
            (0, 0)
        }
    }

    #[test]
    fn a_stall_at_the_end_of_a_turn_is_not_lost() {
        let late = |late: Duration| {
            let spec = Spec {
                depth: 1,
                ..Spec::new(Target::VhostUser("none".into()))
            };
            let phase = AtomicU8::new(MEASURE);
            // Answers at once until its third answer, which comes after the end of the turn and `late`.
            let reap = |inner: &mut Stalling, ended: &mut Vec<Ended>| {
                if inner.answered == 2 {
                    phase.store(REST, Ordering::Relaxed);
                }
                // The load sees the turn's end before the answer.
                if inner.answered == 3 {
                    std::thread::sleep(late);
                }
                match inner.answered {
                    2 => inner.answered = 3,
                    _ => inner.reap(ended)?,
                }
                Ok(())
            };
            let mut client = Meddled {
                inner: Stalling::default(),
                reap,
            };
            let over = || Rest {
                goes_on: false,
                tail_counts: !late.is_zero(),
            };
            let outcome = drive(&mut client, course(&spec, None), &phase, over).unwrap();
            let longest = outcome.read_latency.percentiles().max_us;
            (
                outcome.reads,
                outcome.read_latency.percentiles().count,
                longest,
            )
        };
        // It is seen in any case, and the turn's where that is said.
        let (reads, seen, _) = late(Duration::ZERO);
        assert_eq!((reads, seen), (2, 3));
        let (reads, seen, longest) = late(Duration::from_millis(40));
        assert_eq!((reads, seen), (3, 3));
        assert!(longest >= 40_000.0, "{longest}");
    }

    #[test]
    fn what_fails_before_anything_counts_is_known() {
        let spec = Spec {
            depth: 3,
            ..Spec::new(Target::VhostUser("none".into()))
        };
        let phase = AtomicU8::new(RAMP);
        // Its second answer fails, and the ramp is over then.
        let reap = |inner: &mut Stalling, ended: &mut Vec<Ended>| {
            inner.reap(ended)?;
            if inner.answered == 2 {
                ended.iter_mut().for_each(|ended| ended.ok = false);
                phase.store(MEASURE, Ordering::Relaxed);
            }
            Ok(())
        };
        let mut client = Meddled {
            inner: Stalling::default(),
            reap,
        };
        let outcome = drive(&mut client, course(&spec, Some(9)), &phase, Rest::default).unwrap();
        assert_eq!(
            (outcome.reads, outcome.errors, outcome.errors_besides),
            (9, 0, 3)
        );
    }

    #[test]
    fn the_usual_rest_of_a_turn_is_noted_and_does_not_count() {
        let spec = Spec::new(Target::VhostUser("none".into()));
        let request = course(&spec, None).plan.next(0, None);
        let mut tail = Outcome::default();
        tail.count(&request, Duration::from_millis(20), true);
        tail.count(&request, Duration::from_millis(20), false);
        for (counts, reads, errors) in [(false, 0, (0, 1)), (true, 1, (1, 0))] {
            let mut outcome = Outcome::default();
            outcome.drained(&tail, counts);
            assert_eq!((outcome.reads, outcome.bytes), (2 * reads, reads * 4096));
            assert_eq!((outcome.errors, outcome.errors_besides), errors);
            assert_eq!(outcome.read_latency.percentiles().count, 2);
        }
    }

    /// Answers at once, and notes when requests came, of which slot, and how many others were in flight then.
    #[derive(Default)]
    struct Noting {
        waiting: Vec<usize>,
        came: Vec<(Instant, usize, usize)>,
        answered: Vec<Option<Instant>>,
        /// How long after its answer the slot asked again, at least.
        rest_least: Option<Duration>,
    }

    impl Client for Noting {
        fn submit(&mut self, slot: usize, _: Request) -> Result<()> {
            let now = Instant::now();
            self.answered.resize(8, None);
            if let Some(answered) = self.answered[slot] {
                let rest = now - answered;
                self.rest_least = Some(self.rest_least.map_or(rest, |least| least.min(rest)));
            }
            self.came.push((now, slot, self.waiting.len()));
            self.waiting.push(slot);
            Ok(())
        }

        fn send(&mut self) -> Result<()> {
            Ok(())
        }

        fn reap(&mut self, ended: &mut Vec<Ended>) -> Result<()> {
            let slot = self.waiting.remove(0);
            self.answered[slot] = Some(Instant::now());
            ended.push(Ended { slot, ok: true });
            Ok(())
        }

        fn put(&mut self, _: usize, _: &[u8]) {}

        fn get(&mut self, _: usize, _: &mut [u8]) {}

        fn notifications(&self) -> (u64, u64) {
            (0, 0)
        }
    }

    fn noted(depth: u32, change: impl FnOnce(&mut Spec)) -> Noting {
        let mut spec = Spec {
            depth,
            poll: true,
            ..Spec::new(Target::VhostUser("none".into()))
        };
        change(&mut spec);
        spec.check().unwrap();
        let mut client = Noting::default();
        let phase = AtomicU8::new(MEASURE);
        let outcome = drive(&mut client, course(&spec, Some(24)), &phase, Rest::default).unwrap();
        assert_eq!((outcome.reads, client.came.len()), (24, 24));
        client
    }

    #[test]
    fn a_place_thinks_before_it_asks_again() {
        let think = Duration::from_millis(2);
        let client = noted(4, |spec| spec.think = think);
        assert!(client.rest_least.unwrap() >= think);
        let client = noted(4, |_| ());
        assert!(client.rest_least.unwrap() < think);
    }

    #[test]
    fn a_queue_rests_when_all_are_answered() {
        let time = Duration::from_millis(2);
        let pause = super::super::shape::Pause {
            time,
            spin: Duration::from_millis(1),
            requests: 6,
            when_sent: true,
        };
        let client = noted(4, |spec| spec.shape.pause = Some(pause));
        for (n, six) in client.came.chunks(6).enumerate() {
            // Whoever comes first behind a rest finds nothing in flight.
            assert_eq!(six[0].2, 0, "{n}");
            if n > 0 {
                assert!(six[0].0 - client.came[6 * n - 1].0 >= time, "{n}");
            }
        }
    }
}
