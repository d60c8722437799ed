//! A rotating disk: one arm, one rotation, a queue from which the drive takes what its head reaches first.
//!
//! - **Seek** by the curve of a data sheet's three figures ([`Drive`]).
//! - **Rotation**: the platter turns with the time; a place passes the head once a turn. Tracks are a spiral: what is
//!   sequential goes on without a gap (data sheets' media rates have the skew between tracks in them).
//! - **Zones**: outer tracks hold more, so that the rate falls from the first byte to the last.
//! - **Queue**: 32 commands are with the drive (NCQ), from which the one with the shortest positioning time is next, unless one
//!   has waited for [`PATIENCE`]; the rest waits in the order in which it came.
//! - **Reading ahead**: after a read the head goes on reading into a buffer until it is needed elsewhere.
//! - **Write cache**: writes end when they are in it, and go to the platter when nothing is to be read, in the order that the
//!   head likes best; a flush waits for all that was there. Without it a write ends on the platter.

use super::{Done, Drive, Nanos, Op, Request, write_cache::WriteCache};
use block::{Error, Result};
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

/// From here on a command is served before nearer ones.
const PATIENCE: Nanos = 500_000_000;
/// What a command costs besides the mechanics: the interface and the drive's processor.
const OVERHEAD: Nanos = 100_000;
/// Bytes per second of the interface (6 Gbit/s SATA).
const INTERFACE: u64 = 550_000_000;
/// Bytes that are read ahead at most.
const AHEAD: u64 = 2 << 20;
/// Buffers of what was read ahead before.
const SEGMENTS: usize = 16;
/// Bytes that the write cache puts onto the platter in one go.
const GO: u64 = 512 << 10;
/// Zones of the platter.
const ZONES: u64 = 16;
/// By how much a place may have passed the head and still be met: rounding.
const SLIP: Nanos = 2_000;

/// Where bytes lie.
#[derive(Clone, Copy, Debug)]
struct Zone {
    /// First byte.
    start: u64,
    /// Bytes of a track.
    track: u64,
    /// Number of the first track.
    first: u64,
}

/// What the mechanics do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// A read.
    Read(Request),
    /// A write, without the cache.
    Write(Request),
    /// A part of the write cache, from here on.
    Cached(u64),
    /// Reading ahead until a request's bytes are there.
    Ride(Request),
}

/// Reading ahead: all from `start` on is in the buffer, up to `base` at the time `since` and more with each nanosecond,
/// but nothing from `limit` on.
#[derive(Clone, Copy, Debug)]
struct Ahead {
    start: u64,
    base: u64,
    since: Nanos,
    limit: u64,
}

/// A disk at work.
#[derive(Debug)]
pub struct Spindle {
    drive: Drive,
    turn: Nanos,
    bytes: u64,
    zones: Vec<Zone>,
    /// Tracks of the whole drive.
    tracks: f64,
    now: Nanos,
    /// Where the head is: the byte behind the last that it passed.
    head: u64,
    /// With the drive, with when they came.
    queue: VecDeque<(Nanos, Request)>,
    work: Option<(Nanos, Work)>,
    ahead: Option<Ahead>,
    segments: VecDeque<(u64, u64)>,
    cache: WriteCache,
    /// Flushes that wait, up to what epoch, and since when.
    flushes: Vec<(u64, u64, Nanos)>,
    interface_free: Nanos,
    ends: BinaryHeap<Reverse<Done>>,
}

impl Spindle {
    /// A disk of so many bytes.
    ///
    /// # Errors
    ///
    /// The data sheet says what no disk is.
    pub fn new(drive: Drive, bytes: u64) -> Result<Self> {
        drive.check()?;
        if bytes == 0 {
            return Err(Error::invalid("a disk without bytes"));
        }
        let turn = drive.turn();
        let zone_bytes = bytes.div_ceil(ZONES).next_multiple_of(4096);
        let mut zones = Vec::new();
        let mut first = 0;
        for zone in 0..ZONES {
            let start = zone * zone_bytes;
            if start >= bytes {
                break;
            }
            // The rate falls with the part of the drive that is used.
            let part = zone as f64 / ZONES as f64 * drive.stroke;
            let rate = drive.outer_mb_s + (drive.inner_mb_s - drive.outer_mb_s) * part;
            let track = (rate * 1e6 * turn as f64 / 1e9) as u64;
            let track = track.max(4096);
            zones.push(Zone {
                start,
                track,
                first,
            });
            first += zone_bytes.div_ceil(track);
        }
        Ok(Self {
            drive,
            turn,
            bytes,
            zones,
            tracks: first.max(1) as f64 / drive.stroke,
            now: 0,
            head: 0,
            queue: VecDeque::new(),
            work: None,
            ahead: None,
            segments: VecDeque::new(),
            cache: WriteCache::default(),
            flushes: Vec::new(),
            interface_free: 0,
            ends: BinaryHeap::new(),
        })
    }

    fn zone(&self, at: u64) -> Zone {
        let place = self.zones.partition_point(|zone| zone.start <= at);
        self.zones[place.saturating_sub(1)]
    }

    fn track(&self, at: u64) -> u64 {
        let zone = self.zone(at);
        zone.first + (at - zone.start) / zone.track
    }

    /// When in a turn a place passes the head.
    fn angle(&self, at: u64) -> Nanos {
        let zone = self.zone(at);
        let within = (at - zone.start) % zone.track;
        scaled(within, self.turn, zone.track)
    }

    /// How long bytes take to pass the head.
    fn transfer(&self, start: u64, end: u64) -> Nanos {
        let zone = self.zone(start);
        scaled(end.saturating_sub(start), self.turn, zone.track)
    }

    /// Until the head is over a place, from `now` on.
    fn positioning(&self, at: u64) -> Nanos {
        let head = self.ahead.map_or(self.head, |ahead| self.read_to(ahead));
        let distance = self.track(head).abs_diff(self.track(at));
        let seek = match distance {
            0 => 0,
            _ => self.drive.seek(distance as f64 / self.tracks),
        };
        let arrives = (self.now + seek) % self.turn;
        let wait = (self.angle(at) + self.turn - arrives) % self.turn;
        match wait >= self.turn - SLIP {
            true => seek,
            false => seek + wait,
        }
    }

    /// Up to where the head has read ahead.
    fn read_to(&self, ahead: Ahead) -> u64 {
        let zone = self.zone(ahead.base);
        let passed = scaled(self.now.saturating_sub(ahead.since), zone.track, self.turn);
        ahead.base.saturating_add(passed).min(ahead.limit)
    }

    /// Up to where the head reads ahead of a request that ends at `end`.
    fn limit(&self, end: u64) -> u64 {
        end.saturating_add(AHEAD).min(self.bytes)
    }

    /// A request took what was read ahead up to `end`: there is room for more.
    fn extend(&mut self, end: u64) {
        let Some(mut ahead) = self.ahead else { return };
        let limit = self.limit(end).max(ahead.limit);
        if self.read_to(ahead) == ahead.limit && limit > ahead.limit {
            // The buffer was full, and the place has passed by.
            ahead.base = ahead.limit;
            let wait = (self.angle(ahead.base) + self.turn - self.now % self.turn) % self.turn;
            ahead.since = self.now + wait;
        }
        ahead.limit = limit;
        self.ahead = Some(ahead);
    }

    /// When, after now, all up to `end` is in the buffer of what is read ahead; `None` where the head does not get there.
    fn rides(&self, start: u64, end: u64) -> Option<Nanos> {
        let ahead = self.ahead?;
        // A sector more: what is read ahead is known to a nanosecond.
        let reached = self.read_to(ahead) + 512;
        if start < ahead.start || start > reached || end > ahead.limit {
            return None;
        }
        let at = ahead.since + self.transfer(ahead.base, end);
        Some(at.saturating_sub(self.now))
    }

    /// Takes a request at `now`.
    pub(super) fn submit(&mut self, now: Nanos, request: Request) {
        self.pass(now);
        self.queue.push_back((now, request));
        self.go();
    }

    /// When something happens next.
    pub(super) fn next(&self) -> Option<Nanos> {
        let work = self.work.map(|(at, _)| at);
        let first = self.ends.peek().map(|Reverse(done)| done.at);
        work.into_iter().chain(first).min()
    }

    /// Lets the time become `now`.
    pub(super) fn advance(&mut self, now: Nanos, done: &mut Vec<Done>) {
        self.pass(now);
        while let Some(Reverse(first)) = self.ends.peek().copied()
            && first.at <= now
        {
            self.ends.pop();
            done.push(first);
        }
    }

    /// Works until `now`.
    fn pass(&mut self, now: Nanos) {
        while let Some((at, work)) = self.work.filter(|(at, _)| *at <= now) {
            self.now = at;
            self.work = None;
            self.finish(work);
            self.go();
        }
        self.now = self.now.max(now);
    }

    /// The mechanics are through with something.
    fn finish(&mut self, work: Work) {
        match work {
            Work::Read(request) => {
                let end = request.offset + request.bytes;
                self.head = end;
                self.ahead = Some(Ahead {
                    start: request.offset,
                    base: end,
                    since: self.now,
                    limit: self.limit(end),
                });
                self.tell(self.now, request);
            }
            Work::Ride(request) => {
                self.extend(request.offset + request.bytes);
                self.tell(self.now, request);
            }
            Work::Write(request) => {
                self.head = request.offset + request.bytes;
                self.tell(self.now, request);
            }
            Work::Cached(end) => {
                self.head = end;
                self.end_flushes();
            }
        }
    }

    fn end_flushes(&mut self) {
        let (cache, now) = (&self.cache, self.now);
        let ends = &mut self.ends;
        self.flushes.retain(|(id, epoch, _)| {
            let waits = !cache.is_flushed(*epoch);
            if !waits {
                ends.push(Reverse(Done { at: now, id: *id }));
            }
            waits
        });
    }

    fn tell(&mut self, at: Nanos, request: Request) {
        self.ends.push(Reverse(Done { at, id: request.id }));
    }

    /// A request whose bytes need only the interface.
    fn quick(&mut self, came: Nanos, request: Request) {
        let bus = scaled(request.bytes, 1_000_000_000, INTERFACE);
        let begins = self.interface_free.max(came + OVERHEAD).max(self.now);
        self.interface_free = begins + bus;
        self.tell(begins + bus, request);
    }

    /// Answers what needs no mechanics, and gives these something to do.
    fn go(&mut self) {
        self.settle();
        if self.work.is_some() {
            return;
        }
        let with_drive = self.queue.len().min(self.drive.queue);
        let oldest = self.queue.front().map(|(came, _)| *came);
        let long = |came: Nanos| self.now - came >= PATIENCE;
        let tired = oldest.is_some_and(long);
        let flush_tired = self.flushes.first().is_some_and(|(_, _, came)| long(*came));
        let candidates = match tired {
            true => with_drive.min(1),
            false => with_drive,
        };
        let best = (0..candidates)
            .filter(|n| {
                let request = self.queue[*n].1;
                request.op == Op::Read || self.drive.write_cache == 0
            })
            .map(|n| (self.cost(self.queue[n].0, self.queue[n].1), n))
            .min()
            .filter(|_| !flush_tired);
        // Reads first, unless somebody waits for the cache.
        let urgent = !self.flushes.is_empty() || self.queue.iter().any(|(_, r)| r.op == Op::Write);
        let cached = match best {
            Some(_) if tired || !urgent => None,
            _ => self.best_cached(),
        };
        match (best, cached) {
            (Some((cost, n)), cached) if cached.is_none_or(|(other, _)| cost <= other) => {
                if let Some((came, request)) = self.queue.remove(n) {
                    self.start(came, request);
                }
            }
            (_, Some((cost, start))) => {
                self.leave();
                let end = self.cache.take(start, GO);
                let at = self.now + cost + self.transfer(start, end);
                self.work = Some((at, Work::Cached(end)));
            }
            _ => {}
        }
    }

    /// Everything with the drive that its memory can answer.
    fn settle(&mut self) {
        let mut n = 0;
        while n < self.queue.len().min(self.drive.queue) {
            let (came, request) = self.queue[n];
            let end = request.offset.saturating_add(request.bytes);
            let answered = match request.op {
                Op::Read => {
                    let ready = self.rides(request.offset, end) == Some(0);
                    let kept = |(from, to): &(u64, u64)| *from <= request.offset && end <= *to;
                    ready
                        || self.segments.iter().any(kept)
                        || self.cache.covers(request.offset, end)
                }
                Op::Write if self.drive.write_cache > 0 => {
                    let fits = self.cache.bytes() + request.bytes <= self.drive.write_cache;
                    // One that is larger than the cache goes through it alone.
                    let fits = fits || self.cache.bytes() == 0;
                    if fits {
                        self.cache.add(request.offset, end);
                        self.forget(request.offset, end);
                    }
                    fits
                }
                Op::Write => false,
                Op::Flush => {
                    let epoch = self.cache.flush();
                    if !self.cache.is_flushed(epoch) || self.writes_cached() {
                        self.flushes.push((request.id, epoch, self.now));
                        self.queue.remove(n);
                        continue;
                    }
                    true
                }
            };
            if answered {
                self.queue.remove(n);
                if request.op == Op::Read && self.rides(request.offset, end).is_some() {
                    self.extend(end);
                }
                self.quick(came, request);
            } else {
                n += 1;
            }
        }
    }

    /// Whether a part of the cache is on its way to the platter.
    fn writes_cached(&self) -> bool {
        matches!(self.work, Some((_, Work::Cached(_))))
    }

    /// Until a request's first byte passes the head, or for one that reading ahead gets, until its last has.
    fn cost(&self, came: Nanos, request: Request) -> Nanos {
        let ready = (came + OVERHEAD).saturating_sub(self.now);
        let rides = match request.op {
            Op::Read => self.rides(request.offset, request.offset + request.bytes),
            _ => None,
        };
        let place = rides.unwrap_or_else(|| self.positioning(request.offset));
        // A command that has only just come is not understood yet: then the place may pass by.
        match place < ready && rides.is_none() {
            true => place + (ready - place).div_ceil(self.turn) * self.turn,
            false => place.max(ready),
        }
    }

    fn best_cached(&self) -> Option<(Nanos, u64)> {
        let epoch = self.flushes.iter().map(|(_, epoch, _)| *epoch).max();
        let near = self.cache.near(self.head, epoch);
        near.map(|start| (self.positioning(start), start)).min()
    }

    /// Sends the head to a request.
    fn start(&mut self, came: Nanos, request: Request) {
        let cost = self.cost(came, request);
        let end = request.offset + request.bytes;
        if request.op == Op::Read && self.rides(request.offset, end).is_some() {
            self.work = Some((self.now + cost, Work::Ride(request)));
            return;
        }
        self.leave();
        let at = self.now + cost + self.transfer(request.offset, end);
        let work = match request.op {
            Op::Read => Work::Read(request),
            _ => {
                self.forget(request.offset, end);
                Work::Write(request)
            }
        };
        self.work = Some((at, work));
    }

    /// The head goes elsewhere: reading ahead ends, and what it brought is kept.
    fn leave(&mut self) {
        if let Some(ahead) = self.ahead.take() {
            self.head = self.read_to(ahead);
            self.segments.push_front((ahead.start, self.head));
            self.segments.truncate(SEGMENTS);
        }
    }

    /// What is written is not what was read.
    fn forget(&mut self, start: u64, end: u64) {
        self.segments
            .retain(|(from, to)| end <= *from || *to <= start);
        let ahead = self.ahead;
        if ahead.is_some_and(|ahead| start < ahead.limit && end > ahead.start) {
            self.leave();
            self.segments.pop_front();
        }
    }
}

/// `value` · `by` / `of`, without an overflow in between.
fn scaled(value: u64, by: u64, of: u64) -> u64 {
    let scaled = u128::from(value) * u128::from(by) / u128::from(of.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulated::{
        Array, Device,
        tests::{fastrand, rate},
    };
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;
    const WHOLE: Drive = Drive {
        stroke: 1.0,
        ..Drive::USUAL
    };
    const NO_CACHE: Drive = Drive {
        write_cache: 0,
        ..Drive::USUAL
    };

    fn alone(drive: Drive) -> Array {
        let spindle = Spindle::new(drive, GIB).unwrap();
        Array::new(vec![Device::Spindle(Box::new(spindle))], 4096)
    }

    fn random(drive: Drive, depth: u64, op: Op) -> f64 {
        let (mut id, mut random) = (0, fastrand(42));
        rate(&mut alone(drive), depth, 30, move || {
            id += 1;
            Request {
                id,
                op,
                offset: random() % (GIB / 4096) * 4096,
                bytes: 4096,
            }
        })
    }

    /// MB/s.
    fn sequential(drive: Drive, depth: u64, op: Op, bytes: u64) -> f64 {
        let mut id = 0;
        let iops = rate(&mut alone(drive), depth, 6, move || {
            id += 1;
            Request {
                id,
                op,
                offset: (id - 1) * bytes % GIB,
                bytes,
            }
        });
        iops * bytes as f64 / 1e6
    }

    #[test]
    fn random_requests_are_as_slow_as_an_arm() {
        // Half a turn (4.17 ms) and a seek.
        let one = random(WHOLE, 1, Op::Read);
        let expected = 1000.0 / (WHOLE.seek_avg_ms + 4.17 + 0.03);
        assert!((one / expected - 1.0).abs() < 0.06, "{one} {expected}");
        let short = random(Drive::default(), 1, Op::Read);
        assert!((100.0..180.0).contains(&short), "{short}");
        // The queue helps, and only with NCQ.
        let deep = random(Drive::default(), 32, Op::Read);
        assert!(deep > short * 1.8 && deep < short * 6.0, "{short} {deep}");
        let fifo = Drive {
            queue: 1,
            ..Drive::default()
        };
        let fifo = random(fifo, 32, Op::Read);
        assert!((fifo / short - 1.0).abs() < 0.1, "{short} {fifo}");
        // Writes without a cache are as slow as reads; with one the drive has thousands to choose from.
        let written = random(NO_CACHE, 1, Op::Write);
        assert!((written / short - 1.0).abs() < 0.1, "{short} {written}");
        let cached = random(Drive::default(), 1, Op::Write);
        assert!(cached > deep, "{deep} {cached}");
    }

    #[test]
    fn sequences_reach_the_rate_of_the_media() {
        let media = Drive::USUAL.outer_mb_s;
        // What is in the write cache at the end, 16 MiB, came faster.
        let near = |mb_s: f64| (0.9..1.02).contains(&(mb_s / media));
        for (depth, op, bytes) in [
            (32, Op::Read, 4096),
            (2, Op::Read, 256 << 10),
            (1, Op::Read, 256 << 10),
            (32, Op::Write, 64 << 10),
        ] {
            let mb_s = sequential(Drive::default(), depth, op, bytes);
            assert!(near(mb_s), "{op:?} of {bytes} at {depth}: {mb_s}");
        }
        // One after the other without a cache: each waits for a turn.
        let turns = sequential(NO_CACHE, 1, Op::Write, 4096) / 4096e-6;
        assert!((115.0..121.0).contains(&turns), "{turns}");
        assert!(near(sequential(NO_CACHE, 8, Op::Write, 256 << 10)));
    }

    #[test]
    fn a_flush_waits_for_the_platter() {
        let mut disk = Spindle::new(Drive::default(), GIB).unwrap();
        let request = |id, op, offset| Request {
            id,
            op,
            offset,
            bytes: 4096,
        };
        for id in 0..10 {
            disk.submit(0, request(id, Op::Write, id * (GIB / 10)));
        }
        disk.submit(0, request(99, Op::Flush, 0));
        let mut done = Vec::new();
        while let Some(at) = disk.next() {
            disk.advance(at, &mut done);
        }
        assert_eq!(done.len(), 11);
        let flush = done.iter().find(|d| d.id == 99).unwrap();
        // The writes: the interface only. The flush: ten places of the platter.
        assert!(done[9].id != 99 && done[9].at < 2_000_000, "{done:?}");
        assert!((15_000_000..120_000_000).contains(&flush.at), "{flush:?}");
        // With nothing to write it is an answer.
        disk.submit(flush.at, request(100, Op::Flush, 0));
        assert_eq!(disk.next(), Some(flush.at + OVERHEAD + 7447));
    }

    fn requests() -> impl Strategy<Value = Vec<(u64, u8, u64, u64)>> {
        // Time until the next, what, where, how much.
        prop::collection::vec((0_u64..5_000_000, 0_u8..10, 0_u64..2000, 1_u64..64), 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever comes: every request ends once and not before it came, the head does one thing at a time, none of
        /// it faster than the platter turns, and nothing waits for ever.
        #[test]
        fn a_disk_has_one_head(all in requests(), cached in any::<bool>(), queue in 1_usize..40) {
            let drive = Drive {
                queue,
                write_cache: if cached { 256 << 10 } else { 0 },
                ..Drive::default()
            };
            let bytes = 64 << 20;
            let mut disk = Spindle::new(drive, bytes).unwrap();
            let (mut now, mut came, mut done) = (0, Vec::new(), Vec::new());
            let mut last: Option<(Nanos, Work)> = None;
            let mut look = |disk: &Spindle, from: Nanos| {
                if disk.work == last {
                    return Ok(());
                }
                if let (Some((before, _)), Some(_)) = (last, disk.work) {
                    prop_assert!(before <= from, "the head was busy until {before} at {from}");
                }
                if let Some((end, Work::Read(r) | Work::Write(r))) = disk.work {
                    let least = disk.transfer(r.offset, r.offset + r.bytes);
                    prop_assert!(end >= from + least);
                }
                last = disk.work;
                Ok(())
            };
            for (id, (gap, what, place, blocks)) in (0..).zip(all) {
                let until = now + gap;
                while let Some(at) = disk.next().filter(|at| *at <= until) {
                    disk.advance(at, &mut done);
                    look(&disk, at)?;
                }
                now = until;
                came.push(now);
                let op = match what {
                    0 => Op::Flush,
                    1..5 => Op::Write,
                    _ => Op::Read,
                };
                let offset = place * 4096 * 8;
                disk.submit(now, Request { id, op, offset, bytes: (blocks * 4096).min(bytes - offset) });
                look(&disk, now)?;
            }
            while let Some(at) = disk.next() {
                prop_assert!(at < 3_600_000_000_000);
                disk.advance(at, &mut done);
                look(&disk, at)?;
            }
            let mut ids: Vec<u64> = done.iter().map(|d| d.id).collect();
            ids.sort_unstable();
            prop_assert_eq!(ids, (0..came.len() as u64).collect::<Vec<_>>());
            for one in &done {
                prop_assert!(one.at >= came[one.id as usize]);
            }
        }
    }
}
