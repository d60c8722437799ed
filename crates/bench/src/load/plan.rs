//! Which request comes next: offsets, the mix of reads and writes, flushes.

use super::{Against, Flushes, Pattern, Random, Spec, Target, psync, walk::Walk};
use block::{Error, Result, size};
use std::time::Duration;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub kind: Kind,
    /// Bytes from the start of the disk; of a flush somewhere in the file that is flushed, where there are several.
    pub offset: u64,
    /// [`Spec::block_bytes`] at most; 0 of a flush.
    pub bytes: u64,
}

impl Request {
    /// Flushes the file that has this offset.
    pub(crate) fn flush(offset: u64) -> Self {
        Self {
            kind: Kind::Flush,
            offset,
            bytes: 0,
        }
    }
}

/// What a target is and can do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Bytes of the disk.
    pub capacity: u64,
    pub read_only: bool,
    pub flushes: bool,
    /// Requests must be multiples of it.
    pub block_bytes: u64,
}

impl Spec {
    /// Whether there are any writes.
    pub(crate) fn writes(&self) -> bool {
        self.pattern.writes(self.read_percent)
    }

    /// Whether there are any reads.
    pub(crate) fn has_reads(&self) -> bool {
        self.pattern.reads(self.read_percent)
    }

    /// Whether requests have several sizes.
    pub(crate) fn sizes_differ(&self) -> bool {
        self.shape.reads.is_some() || self.shape.writes.is_some()
    }

    /// Whether there are any of these.
    pub(super) fn has(&self, kind: Kind) -> bool {
        match kind {
            Kind::Read => self.has_reads(),
            Kind::Write => self.writes(),
            Kind::Flush => self.flushes != Flushes::Never,
        }
    }

    /// What can be said before the target is known.
    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::invalid(text));
        if self.block_bytes == 0 || !self.block_bytes.is_multiple_of(512) {
            return wrong(format!(
                "--bs {}: it must be a multiple of 512",
                self.block_bytes
            ));
        }
        if self.block_bytes > super::BLOCK_BYTES_MAX {
            let (given, max) = (
                size::human(self.block_bytes),
                size::human(super::BLOCK_BYTES_MAX),
            );
            return wrong(format!("--bs {given}: it may be {max} at most"));
        }
        let stride = self.stride_bytes.unwrap_or(self.block_bytes);
        if stride == 0 || !stride.is_multiple_of(512) || !self.start_bytes.is_multiple_of(512) {
            return wrong(
                "--stride and --start must be multiples of 512, and a stride not 0".into(),
            );
        }
        if self.read_percent > 100 {
            return wrong(format!(
                "--read-percent {}: it is 0 to 100",
                self.read_percent
            ));
        }
        if self.depth == 0 || self.depth > super::DEPTH_MAX {
            return wrong(format!(
                "--depth {}: it is 1 to {}",
                self.depth,
                super::DEPTH_MAX
            ));
        }
        if self.queues == 0 || self.queues > super::QUEUES_MAX {
            return wrong(format!(
                "--queues {}: it is 1 to {}",
                self.queues,
                super::QUEUES_MAX
            ));
        }
        if matches!(&self.target, Target::File { engine, .. } if engine == psync::NAME)
            && self.depth > 1
        {
            return wrong(format!(
                "--engine psync makes one request at a time, not {}: give --depth 1, and --queues for more of them",
                self.depth
            ));
        }
        let bytes = self.block_bytes * u64::from(self.depth) * u64::from(self.queues);
        if bytes > super::BUFFER_BYTES_MAX {
            return wrong(format!(
                "--bs, --depth and --queues together need {} of memory, {} are allowed: lower one of them",
                size::human(bytes),
                size::human(super::BUFFER_BYTES_MAX)
            ));
        }
        let of_guest = matches!(self.target, Target::VhostUser(_));
        if self.misalign_bytes >= 4096 || self.misalign_bytes > 0 && !of_guest {
            return wrong(format!(
                "--misalign {}: it is less than 4096, and of --vhost-user",
                self.misalign_bytes
            ));
        }
        if self.flushes == Flushes::Every(0) {
            return wrong("--flush 0: give never, each, or after how many writes".into());
        }
        if self.flushes != Flushes::Never && !self.writes() {
            return wrong(
                "--flush is about writes, and this load has none: choose another --rw".into(),
            );
        }
        if let Some(rate) = self.rate {
            if !(0.001..=1e8).contains(&rate) {
                return wrong(format!("--rate {rate}: it is 0.001 to 100000000"));
            }
            if !self.poll || self.flushes != Flushes::Never {
                return wrong(
                    "--rate: a thread that sleeps until something ends is late for the next request: give --poll, and no --flush".into(),
                );
            }
        }
        if !self.think.is_zero() {
            if self.rate.is_some() {
                return wrong(
                    "--think waits for answers, and --rate does not: give one of them".into(),
                );
            }
            if self.depth > 1 && !self.poll {
                return wrong(
                    "--think: a thread that sleeps until something ends is late for the places that have thought: give --poll, or --depth 1".into(),
                );
            }
        }
        if self.verify.is_some() && stride < self.block_bytes {
            return wrong(
                "--verify: blocks would lie on each other: give no --stride below --bs".into(),
            );
        }
        if let Some(theta) = self.zipf {
            if !(0.01..=10.0).contains(&theta) {
                return wrong(format!("--zipf {theta}: it is 0.01 to 10"));
            }
            if !self.pattern.is_random() {
                return wrong("--zipf is about random requests: choose another --rw".into());
            }
        }
        let ends = self.ios_max.is_some() || self.shape.bytes_max.is_some();
        if self.ios_max == Some(0) || (self.duration.is_zero() && !ends) {
            return wrong("nothing is asked for: give --seconds or --ios".into());
        }
        self.shape.check(self)
    }
}

/// The places that requests may start at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    start: u64,
    stride: u64,
    count: u64,
    /// Bytes from the start on that requests may be for.
    range: u64,
    /// The disk takes flushes.
    flushes: bool,
}

impl Places {
    /// Checks the load against its target.
    pub(crate) fn new(spec: &Spec, disk: &Geometry) -> Result<Self> {
        let human = size::human;
        let room = disk.capacity.saturating_sub(spec.start_bytes);
        let range = spec.range_bytes.unwrap_or(room);
        if range > room {
            return Err(Error::invalid(format!(
                "the range {} + {} ends behind the disk, which has {}: lower --start or --range",
                human(spec.start_bytes),
                human(range),
                human(disk.capacity)
            )));
        }
        let Some(last) = range.checked_sub(spec.block_bytes) else {
            return Err(Error::invalid(format!(
                "a request of {} does not fit the range of {} (the disk has {}): lower --bs or --start, or raise --range",
                human(spec.block_bytes),
                human(range),
                human(disk.capacity)
            )));
        };
        let stride = spec.stride_bytes.unwrap_or(spec.block_bytes);
        let own = [
            ("--bs", spec.block_bytes),
            ("--stride", stride),
            ("--start", spec.start_bytes),
        ];
        for (name, value) in own.into_iter().chain(spec.shape.units(spec)) {
            if !value.is_multiple_of(disk.block_bytes.max(1)) {
                return Err(Error::invalid(format!(
                    "{name} {value}: the disk takes multiples of {}",
                    disk.block_bytes
                )));
            }
        }
        if disk.read_only && spec.writes() {
            return Err(Error::invalid(
                "the disk is read-only: choose --rw read or randread, or serve it writable",
            ));
        }
        if !disk.flushes && spec.flushes != Flushes::Never {
            return Err(Error::invalid(
                "the server takes no flushes: use --flush never",
            ));
        }
        Ok(Self {
            start: spec.start_bytes,
            stride,
            count: last / stride + 1,
            range,
            flushes: disk.flushes,
        })
    }

    /// `count` of them from `start` on.
    #[cfg(test)]
    pub(crate) fn of(start: u64, stride: u64, count: u64) -> Self {
        Self {
            start,
            stride,
            count,
            range: count * stride,
            flushes: true,
        }
    }

    /// How many.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Whether the disk takes flushes.
    pub(crate) fn flushes(&self) -> bool {
        self.flushes
    }

    /// Bytes between the starts of two.
    pub(super) fn stride(&self) -> u64 {
        self.stride
    }

    /// Bytes in which all of them lie.
    pub(super) fn range(&self) -> u64 {
        self.range
    }

    /// Where the next of several files begins, in the space of all.
    pub(super) fn span(&self) -> u64 {
        self.start + self.range
    }

    /// Which one begins at `offset`.
    pub(crate) fn index_of(&self, offset: u64) -> u64 {
        offset.saturating_sub(self.start) / self.stride
    }

    /// Where one begins.
    pub(crate) fn at(&self, index: u64) -> u64 {
        self.start + index * self.stride
    }
}

/// The part of `all` requests that one of so many queues makes.
pub(crate) fn share(all: u64, queues: u64, queue: u32) -> u64 {
    all / queues + u64::from(u64::from(queue) < all % queues)
}

/// What one queue asks, request by request. The same seed asks the same.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    places: Places,
    walk: Walk,
    block_bytes: u64,
    read_percent: u64,
    /// Writes between two flushes; `u32::MAX`: no flushes.
    writes_per_flush: u32,
    random: Random,
    /// How many places of the list were asked for.
    listed: usize,
    /// The places to ask for, instead of all.
    list: Option<&'a [u64]>,
    think: Duration,
    /// Writes since the last flush: of each slot, or of all.
    unflushed: Vec<u32>,
    /// Where the last write was.
    written: u64,
    flush_at_end: bool,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(spec: &Spec, places: Places, queue: u32, against: Against<'a>) -> Self {
        let read_percent = match spec.pattern {
            Pattern::Read | Pattern::RandRead => 100,
            Pattern::Write | Pattern::RandWrite => 0,
            Pattern::Rw | Pattern::RandRw => spec.read_percent,
        };
        let queues = u64::from(spec.queues.max(1));
        // Where the queue before it ends.
        let listed: u64 = against.list.map_or(0, |list| {
            (0..queue)
                .map(|q| share(list.len() as u64, queues, q))
                .sum()
        });
        let first = (u128::from(places.count) * u128::from(queue) / u128::from(queues)) as u64;
        let mut random =
            Random::new(spec.seed ^ u64::from(queue).wrapping_mul(0xa076_1d64_78bd_642f));
        let counters = match spec.shape.flush_by_queue {
            true => 1,
            false => spec.depth as usize,
        };
        Self {
            places,
            walk: Walk::new(spec, places, first, &mut random),
            block_bytes: spec.block_bytes,
            read_percent: read_percent.into(),
            writes_per_flush: match spec.flushes {
                Flushes::Never => u32::MAX,
                Flushes::AfterEachWrite => 1,
                Flushes::Every(writes) => writes,
            },
            random,
            listed: listed as usize,
            list: against.list,
            think: spec.think,
            unflushed: vec![0; counters],
            written: 0,
            flush_at_end: spec.shape.flush_at_end,
        }
    }

    /// Whether the disk takes flushes.
    pub(crate) fn can_flush(&self) -> bool {
        self.places.flushes()
    }

    /// The flushes at the end of a queue that has written, one of each file.
    pub(crate) fn last_flushes(&self) -> Vec<Request> {
        let asked = self.flush_at_end && self.can_flush();
        self.walk
            .starts()
            .filter(|_| asked)
            .map(Request::flush)
            .collect()
    }

    /// How long a place waits after an answer.
    pub(crate) fn think(&self) -> Duration {
        self.think
    }

    /// The writes that count for the flushes of `slot`.
    fn counter(&self, slot: usize) -> usize {
        slot.min(self.unflushed.len() - 1)
    }

    /// Whether `slot` sends a flush next.
    pub(crate) fn is_flush_due(&self, slot: usize) -> bool {
        self.unflushed[self.counter(slot)] >= self.writes_per_flush
    }

    /// The flush that `slot` sends next, if it is due.
    pub(crate) fn flush(&mut self, slot: usize) -> Option<Request> {
        if !self.is_flush_due(slot) {
            return None;
        }
        let counter = self.counter(slot);
        self.unflushed[counter] = 0;
        Some(Request::flush(self.written))
    }

    /// The next read or write of `slot`; of a kind, where that is said.
    pub(crate) fn next(&mut self, slot: usize, kind: Option<Kind>) -> Request {
        let kind = kind.unwrap_or_else(|| {
            let read = match self.read_percent {
                0 => false,
                100 => true,
                percent => self.random.below(100) < percent,
            };
            if read { Kind::Read } else { Kind::Write }
        });
        let (offset, bytes) = match self.list {
            Some(list) => {
                let index = list.get(self.listed).copied().unwrap_or_default();
                self.listed += 1;
                (self.places.at(index), self.block_bytes)
            }
            None => self.walk.next(kind, &mut self.random),
        };
        if kind == Kind::Write {
            self.written = offset;
            if self.writes_per_flush != u32::MAX {
                let counter = self.counter(slot);
                self.unflushed[counter] += 1;
            }
        }
        Request {
            kind,
            offset,
            bytes,
        }
    }
}

/// A disk for tests of what loads do with one.
#[cfg(test)]
pub(super) const DISK: Geometry = Geometry {
    capacity: 1 << 20,
    read_only: false,
    flushes: true,
    block_bytes: 512,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Target;

    fn spec(pattern: Pattern) -> Spec {
        Spec {
            pattern,
            ..Spec::new(Target::VhostUser("s".into()))
        }
    }

    fn plan(spec: &Spec, queue: u32) -> Plan<'static> {
        spec.check().unwrap();
        Plan::new(
            spec,
            Places::new(spec, &DISK).unwrap(),
            queue,
            Against::default(),
        )
    }

    #[test]
    fn a_sequence_walks_its_range_and_begins_again() {
        let spec = Spec {
            stride_bytes: Some(16384),
            start_bytes: 8192,
            range_bytes: Some(40960),
            queues: 2,
            ..spec(Pattern::Write)
        };
        let walk = |queue| {
            let mut plan = plan(&spec, queue);
            let mut next = || plan.next(0, None).offset;
            [next(), next(), next(), next()]
        };
        // The third place starts at 40,960 and ends at 45,056 of 49,152; a fourth would end behind.
        assert_eq!(walk(0), [8192, 24576, 40960, 8192]);
        assert_eq!(walk(1), [24576, 40960, 8192, 24576]);
    }

    #[test]
    fn chance_stays_in_the_range_and_reaches_its_ends() {
        let spec = Spec {
            start_bytes: 4096,
            range_bytes: Some(8 * 4096),
            read_percent: 30,
            ..spec(Pattern::RandRw)
        };
        let mut plan = plan(&spec, 0);
        let mut seen = [0; 8];
        let mut reads = 0;
        for _ in 0..8000 {
            let request = plan.next(0, None);
            seen[(request.offset / 4096) as usize - 1] += 1;
            reads += u32::from(request.kind == Kind::Read);
        }
        assert!(seen.iter().all(|n| (800..1200).contains(n)), "{seen:?}");
        assert!((2200..2600).contains(&reads), "{reads}");
    }

    #[test]
    fn hot_places_are_asked_for_more_often() {
        let spec = Spec {
            zipf: Some(1.0),
            ..spec(Pattern::RandRead)
        };
        let mut plan = plan(&spec, 0);
        let mut hits = vec![0_u32; 256];
        for _ in 0..10_000 {
            hits[(plan.next(0, None).offset / 4096) as usize] += 1;
        }
        // One in 6.1 (the 256th harmonic number) is for the most wanted.
        assert!((1400..1900).contains(&hits[0]), "{}", hits[0]);
        assert!(hits.iter().filter(|n| **n > 0).count() > 200);
    }

    #[test]
    fn queues_and_seeds_differ_and_repeat() {
        let offsets = |seed, queue| {
            let spec = Spec {
                seed,
                ..spec(Pattern::RandRead)
            };
            let mut plan = plan(&spec, queue);
            (0..20)
                .map(|_| plan.next(0, None).offset)
                .collect::<Vec<_>>()
        };
        assert_eq!(offsets(1, 0), offsets(1, 0));
        assert_ne!(offsets(1, 0), offsets(1, 1));
        assert_ne!(offsets(1, 0), offsets(2, 0));
    }

    #[test]
    fn queues_share_a_list() {
        let spec = Spec {
            queues: 2,
            ..spec(Pattern::Read)
        };
        let list = [7, 1, 9, 4, 3];
        let against = Against {
            list: Some(&list),
            ledger: None,
        };
        let mut asked = Vec::new();
        for queue in 0..2 {
            let mut plan = Plan::new(&spec, Places::new(&spec, &DISK).unwrap(), queue, against);
            asked.extend((0..share(5, 2, queue)).map(|_| plan.next(0, None).offset / 4096));
        }
        assert_eq!(asked, list);
    }

    #[test]
    fn each_slot_flushes_after_its_own_writes() {
        let spec = Spec {
            flushes: Flushes::Every(2),
            ..spec(Pattern::RandWrite)
        };
        let mut plan = plan(&spec, 0);
        plan.next(0, None);
        plan.next(1, None);
        assert!(plan.flush(0).is_none() && plan.flush(1).is_none());
        plan.next(0, None);
        assert_eq!(plan.flush(0).unwrap().kind, Kind::Flush);
        assert!(plan.flush(0).is_none() && plan.flush(1).is_none());
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_to_do() {
        let base = spec(Pattern::RandWrite);
        type Change = fn(&mut Spec);
        let cases: [(Change, &str); 21] = [
            (
                |s| s.think = Duration::from_millis(1),
                "give --poll, or --depth 1",
            ),
            (
                |s| {
                    s.think = Duration::from_millis(1);
                    s.rate = Some(100.0);
                    s.poll = true;
                },
                "give one of them",
            ),
            (
                |s| {
                    s.verify = Some(crate::load::Verify::default());
                    s.stride_bytes = Some(512);
                },
                "no --stride below --bs",
            ),
            (|s| s.rate = Some(0.0), "--rate 0"),
            (|s| s.rate = Some(100.0), "give --poll"),
            (|s| s.zipf = Some(f64::NAN), "--zipf NaN"),
            (
                |s| {
                    s.zipf = Some(1.0);
                    s.pattern = Pattern::Write;
                },
                "choose another --rw",
            ),
            (|s| s.block_bytes = 100, "--bs 100"),
            (|s| s.block_bytes = 1 << 40, "--bs 1 TiB"),
            (|s| s.depth = 0, "--depth 0"),
            (|s| s.depth = 1 << 20, "--depth 1048576"),
            (|s| s.queues = 0, "--queues 0"),
            (|s| s.read_percent = 101, "--read-percent 101"),
            (|s| s.stride_bytes = Some(0), "--stride"),
            (|s| s.flushes = Flushes::Every(0), "--flush 0"),
            (
                |s| {
                    s.flushes = Flushes::AfterEachWrite;
                    s.pattern = Pattern::Read;
                },
                "--flush",
            ),
            (|s| s.ios_max = Some(0), "--ios"),
            (|s| s.duration = std::time::Duration::ZERO, "--seconds"),
            (
                |s| s.range_bytes = Some(2 << 20),
                "lower --start or --range",
            ),
            (|s| s.start_bytes = 2 << 20, "raise --range"),
            (|s| s.block_bytes = 2 << 20, "lower --bs"),
        ];
        for (change, names) in cases {
            let mut spec = base.clone();
            change(&mut spec);
            let made = spec.check().and_then(|()| Places::new(&spec, &DISK));
            let error = made.unwrap_err().to_string();
            assert!(error.contains(names), "{error}");
        }
        let lacks = [
            Geometry {
                read_only: true,
                ..DISK
            },
            Geometry {
                flushes: false,
                ..DISK
            },
            Geometry {
                block_bytes: 8192,
                ..DISK
            },
        ];
        let spec = Spec {
            flushes: Flushes::AfterEachWrite,
            ..base
        };
        for (lack, names) in lacks
            .iter()
            .zip(["read-only", "no flushes", "multiples of 8192"])
        {
            let error = Places::new(&spec, lack).unwrap_err().to_string();
            assert!(error.contains(names), "{error}");
        }
    }
}
