//! RAID0: the disk lies in chunks over its devices in turn.
//!
//! ```text
//!   disk      | 0 | 1 | 2 | 3 | 4 | 5 | …      chunks
//!   device 0  | 0 | 3 | …
//!   device 1  | 1 | 4 | …
//!   device 2  | 2 | 5 | …
//! ```

use super::{Device, Done, Nanos, Op, Request};
use std::collections::HashMap;

/// Devices, and requests in pieces.
#[derive(Debug)]
pub struct Array {
    devices: Vec<Device>,
    chunk: u64,
    /// Requests by id: pieces that have not ended, and when the last of those did that have.
    open: HashMap<u64, (usize, Nanos)>,
    ended: Vec<Done>,
}

/// A part of a request on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The device.
    pub device: usize,
    /// First byte on it.
    pub offset: u64,
    /// How many.
    pub bytes: u64,
}

/// The parts of a range, chunk by chunk.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    chunk: u64,
    devices: u64,
    at: u64,
    end: u64,
}

impl Pieces {
    /// Of `bytes` from `offset` on, over so many devices with chunks of that many bytes.
    pub fn new(chunk: u64, devices: usize, offset: u64, bytes: u64) -> Self {
        Self {
            chunk: chunk.max(1),
            devices: devices.max(1) as u64,
            at: offset,
            end: offset.saturating_add(bytes),
        }
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.at >= self.end {
            return None;
        }
        let (chunk, within) = (self.at / self.chunk, self.at % self.chunk);
        // One device: nothing is cut.
        let most = match self.devices {
            1 => self.end - self.at,
            _ => self.chunk - within,
        };
        let bytes = most.min(self.end - self.at);
        self.at += bytes;
        Some(Piece {
            device: usize::try_from(chunk % self.devices).unwrap_or(0),
            offset: chunk / self.devices * self.chunk + within,
            bytes,
        })
    }
}

impl Array {
    /// Over these devices.
    pub fn new(devices: Vec<Device>, chunk: u64) -> Self {
        Self {
            devices,
            chunk,
            open: HashMap::new(),
            ended: Vec::new(),
        }
    }

    /// As [`Device::submit`]; ids are in flight once at a time.
    pub fn submit(&mut self, now: Nanos, request: Request) {
        let count = self.devices.len();
        // What lies one behind the other on a device is one request there.
        let mut own: Vec<Piece> = Vec::with_capacity(count);
        if request.op == Op::Flush {
            own.extend((0..count).map(|device| Piece {
                device,
                offset: 0,
                bytes: 0,
            }));
        }
        for piece in Pieces::new(self.chunk, count, request.offset, request.bytes) {
            let before = own.iter_mut().rev().find(|p| p.device == piece.device);
            match before {
                Some(p) if p.offset + p.bytes == piece.offset => p.bytes += piece.bytes,
                _ => own.push(piece),
            }
        }
        if own.is_empty() {
            self.ended.push(Done {
                at: now,
                id: request.id,
            });
            return;
        }
        self.open.insert(request.id, (own.len(), now));
        for piece in own {
            self.devices[piece.device].submit(
                now,
                Request {
                    offset: piece.offset,
                    bytes: piece.bytes,
                    ..request
                },
            );
        }
    }

    /// As [`Device::next`].
    pub fn next(&self) -> Option<Nanos> {
        let devices = self.devices.iter().filter_map(Device::next);
        devices.chain(self.ended.iter().map(|done| done.at)).min()
    }

    /// As [`Device::advance`].
    pub fn advance(&mut self, now: Nanos, done: &mut Vec<Done>) {
        let mut pieces = Vec::new();
        for device in &mut self.devices {
            device.advance(now, &mut pieces);
        }
        let from = done.len();
        done.append(&mut self.ended);
        for piece in pieces {
            let Some((left, last)) = self.open.get_mut(&piece.id) else {
                continue;
            };
            *last = (*last).max(piece.at);
            *left -= 1;
            if *left == 0 {
                let at = *last;
                self.open.remove(&piece.id);
                done.push(Done { at, id: piece.id });
            }
        }
        done[from..].sort_unstable();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulated::Flash;
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        /// Each byte of a range is on one device once, where the picture says.
        #[test]
        fn pieces_are_the_range(
            chunk in 1_u64..40, devices in 1_usize..6, offset in 0_u64..500, bytes in 0_u64..300,
        ) {
            let mut expected: Vec<(usize, u64)> = (offset..offset + bytes)
                .map(|byte| match devices {
                    1 => (0, byte),
                    _ => {
                        let (row, within) = (byte / chunk, byte % chunk);
                        let device = row as usize % devices;
                        (device, row / devices as u64 * chunk + within)
                    }
                })
                .collect();
            expected.sort_unstable();
            let pieces = Pieces::new(chunk, devices, offset, bytes);
            let mut seen: Vec<(usize, u64)> = pieces
                .flat_map(|p| (p.offset..p.offset + p.bytes).map(move |byte| (p.device, byte)))
                .collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn a_request_ends_with_its_last_piece() {
        let us = Duration::from_micros;
        let slow = Flash::new(us(900), us(900), 1).unwrap();
        let fast = Flash::new(us(100), us(100), 1).unwrap();
        let mut array = Array::new(vec![Device::Flash(fast), Device::Flash(slow)], 4096);
        let mut submit = |id, op, offset, bytes| {
            let request = Request {
                id,
                op,
                offset,
                bytes,
            };
            array.submit(0, request);
        };
        // Both, with two chunks of each as one request there; the fast one alone; nothing.
        submit(1, Op::Write, 0, 16384);
        submit(2, Op::Read, 8192, 4096);
        submit(3, Op::Read, 0, 0);
        submit(4, Op::Flush, 0, 0);
        let mut done = Vec::new();
        array.advance(10_000_000, &mut done);
        let ends: Vec<_> = done.iter().map(|d| (d.id, d.at / 1000)).collect();
        // 8 µs for the second 4 KiB on each.
        assert_eq!(ends, [(3, 0), (2, 208), (1, 908), (4, 908)]);
        assert_eq!(array.next(), None);
    }
}
