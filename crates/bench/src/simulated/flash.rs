//! A flash drive: so many requests at a time, each of which takes a known time, and longer where it is large.

use super::{Done, Nanos, Op, Request, nanos};
use block::{Error, Result};
use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

/// Requests at a time at most.
const CHANNELS_MAX: usize = 1024;

/// Bytes of a request that its time covers; the rest comes at [`RATE`].
const SMALL: u64 = 4 << 10;
/// Bytes per second of a channel beyond that.
const RATE: u64 = 500_000_000;

/// See the module.
#[derive(Debug)]
pub struct Flash {
    read: Nanos,
    write: Nanos,
    /// When each channel is free.
    channels: Vec<Nanos>,
    ends: BinaryHeap<Reverse<Done>>,
}

impl Flash {
    /// One that does `channels` requests at a time.
    ///
    /// # Errors
    ///
    /// None, or more than a thousand.
    pub fn new(read: Duration, write: Duration, channels: usize) -> Result<Self> {
        if !(1..=CHANNELS_MAX).contains(&channels) {
            return Err(Error::invalid(format!(
                "{channels} channels: it must be 1 to {CHANNELS_MAX}"
            )));
        }
        Ok(Self {
            read: nanos(read),
            write: nanos(write),
            channels: vec![0; channels],
            ends: BinaryHeap::new(),
        })
    }

    pub(super) fn submit(&mut self, now: Nanos, request: Request) {
        let at = match request.op {
            // What is acknowledged is in the flash: only what is under way is waited for.
            Op::Flush => self.channels.iter().copied().fold(now, Nanos::max),
            op => {
                let first = if op == Op::Read {
                    self.read
                } else {
                    self.write
                };
                let rest = request.bytes.saturating_sub(SMALL).saturating_mul(1000);
                let takes = first.saturating_add(rest / (RATE / 1_000_000));
                let free = self.channels.iter_mut().min();
                free.map_or(now, |free| {
                    *free = (*free).max(now).saturating_add(takes);
                    *free
                })
            }
        };
        self.ends.push(Reverse(Done { at, id: request.id }));
    }

    pub(super) fn next(&self) -> Option<Nanos> {
        self.ends.peek().map(|Reverse(done)| done.at)
    }

    pub(super) fn advance(&mut self, now: Nanos, done: &mut Vec<Done>) {
        while let Some(Reverse(first)) = self.ends.peek().copied()
            && first.at <= now
        {
            self.ends.pop();
            done.push(first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_work_at_the_same_time_and_a_flush_waits_for_them() {
        let us = Duration::from_micros;
        let mut flash = Flash::new(us(100), us(300), 2).unwrap();
        let request = |id, op| Request {
            id,
            op,
            offset: 0,
            bytes: 4096,
        };
        for (id, op) in [(1, Op::Read), (2, Op::Write), (3, Op::Read), (4, Op::Flush)] {
            flash.submit(1000, request(id, op));
        }
        assert_eq!(flash.next(), Some(101_000));
        let mut done = Vec::new();
        flash.advance(200_999, &mut done);
        assert_eq!(done, [Done { at: 101_000, id: 1 }]);
        flash.advance(301_000, &mut done);
        let ids: Vec<u64> = done.iter().map(|d| d.id).collect();
        assert_eq!(ids, [1, 3, 2, 4]);
        assert_eq!((done[1].at, done[3].at), (201_000, 301_000));
        // 4 KiB in 100 µs, 496 KiB at 500 MB/s.
        let large = Request {
            bytes: 500 << 10,
            ..request(5, Op::Read)
        };
        flash.submit(1_000_000, large);
        assert_eq!(flash.next(), Some(1_100_000 + 496 * 1024 * 2));
        assert!(Flash::new(us(1), us(1), 0).is_err());
    }
}
