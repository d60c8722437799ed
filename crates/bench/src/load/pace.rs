//! When requests are due: rates of all, or of reads and of writes each, and rests of the whole queue.

use super::{
    Kind, Random, Spec,
    shape::{Pause, Rate, Shape},
};
use std::time::{Duration, Instant};

/// As good as never.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Requests that were due and not sent are told one by one up to so many of a lane, and of more some together.
const OVERDUE_MAX: u64 = 100_000;

/// Requests that were due and not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overdue {
    /// What they are, where that is said by when they are due.
    pub kind: Option<Kind>,
    /// When they were due, in the mean.
    pub due: Instant,
    /// How many.
    pub count: u64,
}

/// Requests that are due at their time, whatever has ended until then.
#[derive(Debug)]
pub(super) struct Pace {
    lanes: Vec<Lane>,
    /// [`Spec::block_bytes`].
    block_bytes: u64,
    poisson: Option<Random>,
}

#[derive(Debug)]
struct Lane {
    /// What it is of; of all where not said.
    kind: Option<Kind>,
    rate: Rate,
    due: Instant,
    /// How long after the beginning its first request is due: queues take turns, and do not all send at a time.
    behind: Duration,
}

impl Pace {
    /// Where the load has a rate: that of one of its queues.
    pub(super) fn new(spec: &Spec, queue: u32) -> Option<Self> {
        let queues = f64::from(spec.queues);
        let share = |rate| match rate {
            Rate::Requests(rate) => Rate::Requests(rate / queues),
            Rate::Bytes(rate) => Rate::Bytes(rate / queues),
        };
        let Shape { rates, .. } = &spec.shape;
        let all = [
            (None, spec.rate.map(Rate::Requests)),
            (Some(Kind::Read), rates.reads),
            (Some(Kind::Write), rates.writes),
        ];
        let due = Instant::now();
        let lanes = all.into_iter().filter_map(|(kind, rate)| {
            let rate = share(rate?);
            let behind = match rates.poisson {
                true => Duration::ZERO,
                false => rate
                    .time(spec.block_bytes)
                    .min(FAR)
                    .mul_f64(f64::from(queue) / queues),
            };
            Some(Lane {
                kind,
                rate,
                due: due + behind,
                behind,
            })
        });
        let mut lanes: Vec<Lane> = lanes.collect();
        // Of a load of one kind the other's rate means nothing.
        lanes.retain(|lane| lane.kind.is_none_or(|kind| spec.has(kind)));
        (!lanes.is_empty()).then(|| Self {
            lanes,
            block_bytes: spec.block_bytes,
            poisson: rates
                .poisson
                .then(|| Random::new(spec.seed ^ 0x9015_5011 ^ u64::from(queue))),
        })
    }

    /// Begins anew.
    pub(super) fn restart(&mut self, now: Instant) {
        self.lanes
            .iter_mut()
            .for_each(|lane| lane.due = now + lane.behind);
    }

    /// When the next request is due.
    pub(super) fn due(&self) -> Instant {
        let dues = self.lanes.iter().map(|lane| lane.due);
        dues.min().unwrap_or_else(Instant::now)
    }

    /// What the next request is, where that is said by when it is due.
    pub(super) fn kind(&self) -> Option<Kind> {
        self.lanes.iter().min_by_key(|lane| lane.due)?.kind
    }

    /// What was due before `end` and was not sent, as if all were of the largest size and at even distances.
    pub(super) fn overdue(&self, end: Instant) -> impl Iterator<Item = Overdue> + '_ {
        self.lanes.iter().flat_map(move |lane| {
            let late = end.saturating_duration_since(lane.due);
            let time = lane.rate.time(self.block_bytes).min(FAR).as_secs_f64();
            let all = match late.is_zero() {
                true => 0,
                // A time of zero is of a rate that nothing keeps.
                false => (late.as_secs_f64() / time.max(1e-9)).ceil() as u64,
            };
            let parts = all.min(OVERDUE_MAX);
            let edge =
                move |part: u64| (u128::from(all) * u128::from(part) / u128::from(parts)) as u64;
            (0..parts).map(move |part| {
                let (first, next) = (edge(part), edge(part + 1));
                let middle = (first + next - 1) as f64 / 2.0;
                Overdue {
                    kind: lane.kind,
                    due: lane.due + Duration::try_from_secs_f64(time * middle).unwrap_or(late),
                    count: next - first,
                }
            })
        })
    }

    /// The request that was due first is sent, with so many bytes.
    pub(super) fn sent(&mut self, bytes: u64) {
        let Some(lane) = self.lanes.iter_mut().min_by_key(|lane| lane.due) else {
            return;
        };
        let mut time = lane.rate.time(bytes);
        if let Some(random) = &mut self.poisson {
            time = time.mul_f64(-(1.0 - random.part()).ln());
        }
        lane.due += time.min(FAR);
    }
}

/// Rests of the queue.
#[derive(Debug)]
pub(super) struct Rests {
    pause: Pause,
    counted: u64,
    /// When a rest ends, from when nothing was in flight any more.
    until: Option<Instant>,
}

impl Rests {
    pub(super) fn new(spec: &Spec) -> Option<Self> {
        spec.shape.pause.map(|pause| Self {
            pause,
            counted: 0,
            until: None,
        })
    }

    pub(super) fn sent(&mut self) {
        self.counted += u64::from(self.pause.when_sent);
    }

    pub(super) fn ended(&mut self) {
        self.counted += u64::from(!self.pause.when_sent);
    }

    /// No request may be sent.
    pub(super) fn holds(&self) -> bool {
        self.counted >= self.pause.requests
    }

    /// With nothing in flight: when it may go on, and until when to be awake; it may once `now` is there.
    pub(super) fn until(&mut self, now: Instant) -> Option<(Instant, bool)> {
        let until = *self.until.get_or_insert(now + self.pause.time);
        if now >= until {
            self.counted = 0;
            self.until = None;
            return None;
        }
        let awake = now + self.pause.time < until + self.pause.spin;
        Some((until, awake))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Pattern, Target, shape::Rates};

    #[test]
    fn reads_and_writes_are_due_each_at_its_rate() {
        let rates = Rates {
            reads: Some(Rate::Requests(1000.0)),
            writes: Some(Rate::Bytes(4_096_000.0)),
            poisson: false,
        };
        let mut spec = Spec {
            pattern: Pattern::RandRw,
            poll: true,
            ..Spec::new(Target::Nbd("x".into()))
        };
        spec.shape.rates = rates;
        spec.check().unwrap();
        let mut pace = Pace::new(&spec, 0).unwrap();
        let now = Instant::now();
        pace.restart(now);
        let mut counts = [0, 0];
        while pace.due() < now + Duration::from_millis(100) {
            let kind = pace.kind().unwrap();
            counts[usize::from(kind == Kind::Write)] += 1;
            pace.sent(8192);
        }
        // Of 8 KiB there are half as many.
        assert_eq!(counts, [100, 50]);
        spec.pattern = Pattern::RandRead;
        assert_eq!(Pace::new(&spec, 0).unwrap().lanes.len(), 1);
        spec.shape.rates.poisson = true;
        let mut pace = Pace::new(&spec, 0).unwrap();
        pace.restart(now);
        (0..1000).for_each(|_| pace.sent(4096));
        let seconds = (pace.due() - now).as_secs_f64();
        assert!((0.85..1.15).contains(&seconds), "{seconds}");
    }

    #[test]
    fn what_was_due_and_not_sent_is_known() {
        let spec = |rate| Spec {
            rate: Some(rate),
            poll: true,
            ..Spec::new(Target::Nbd("x".into()))
        };
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(&spec(10.0), 0).unwrap();
        pace.restart(now);
        (0..4).for_each(|_| pace.sent(4096));
        // Of the second's ten four were sent; that of its end is not due yet.
        let left: Vec<_> = pace.overdue(now + second).collect();
        let dues: Vec<_> = left
            .iter()
            .map(|late| (late.due - now).as_millis())
            .collect();
        assert_eq!(dues, [400, 500, 600, 700, 800, 900]);
        assert!(
            left.iter()
                .all(|late| late.count == 1 && late.kind.is_none())
        );
        assert_eq!(pace.overdue(now).count(), 0);
        // Very many are told together, and none is forgotten.
        let mut pace = Pace::new(&spec(1e8), 0).unwrap();
        pace.restart(now);
        let left: Vec<_> = pace.overdue(now + second).collect();
        assert_eq!(left.len() as u64, OVERDUE_MAX);
        let all: u64 = left.iter().map(|late| late.count).sum();
        assert!((99_999_999..=100_000_001).contains(&all), "{all}");
        assert!(
            left.is_sorted_by_key(|late| late.due)
                && left.iter().all(|late| late.due < now + second)
        );
    }

    #[test]
    fn queues_of_a_rate_take_turns() {
        let spec = Spec {
            rate: Some(1000.0),
            queues: 4,
            poll: true,
            ..Spec::new(Target::Nbd("x".into()))
        };
        let now = Instant::now();
        let mut dues = Vec::new();
        for queue in 0..4 {
            let mut pace = Pace::new(&spec, queue).unwrap();
            pace.restart(now);
            for _ in 0..3 {
                dues.push(pace.due() - now);
                pace.sent(4096);
            }
        }
        dues.sort_unstable();
        let even: Vec<Duration> = (0..12).map(Duration::from_millis).collect();
        assert_eq!(dues, even);
    }

    #[test]
    fn a_queue_rests_after_so_many() {
        let ms = Duration::from_millis;
        let pause = Pause {
            time: ms(10),
            spin: ms(4),
            requests: 2,
            when_sent: true,
        };
        let mut spec = Spec::new(Target::Nbd("x".into()));
        spec.shape.pause = Some(pause);
        let mut rests = Rests::new(&spec).unwrap();
        rests.sent();
        rests.ended();
        assert!(!rests.holds());
        rests.sent();
        assert!(rests.holds());
        let now = Instant::now();
        assert_eq!(rests.until(now), Some((now + ms(10), true)));
        assert_eq!(rests.until(now + ms(3)), Some((now + ms(10), true)));
        assert_eq!(rests.until(now + ms(4)), Some((now + ms(10), false)));
        assert_eq!(rests.until(now + ms(10)), None);
        assert!(!rests.holds());
    }
}
