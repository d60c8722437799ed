//! A guest with several queues.

use crate::client::{Client, Kind, Request};
use crate::record::SECTOR;
use bench::driver::{self, BUFFERS, Machine, Piece, RAM, Setup, segment};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::path::Path;

/// Bytes of memory of a slot: a page for header and status, and the data.
const SLOT_BYTES: u64 = 4096 + (128 << 9);

pub struct Vhost {
    machine: Machine,
    /// Heads and what they are for, by queue.
    in_flight: Vec<Vec<(u16, usize, u32)>>,
    turn: usize,
}

impl Vhost {
    pub fn connect(socket: &Path, queues: usize, depth: usize) -> Self {
        let setup = Setup {
            queues: queues as u32,
            ram_bytes: BUFFERS - RAM + SLOT_BYTES * depth as u64,
            ..Setup::default()
        };
        Self {
            machine: Machine::start(socket, setup).unwrap(),
            in_flight: vec![Vec::new(); queues],
            turn: 0,
        }
    }

    fn take(&mut self, data: &mut Vec<u8>) -> Option<(usize, bool)> {
        for (queue, in_flight) in self.machine.queues.iter_mut().zip(&mut self.in_flight) {
            if let Some((head, _)) = queue.pop() {
                let at = in_flight.iter().position(|(h, ..)| *h == head);
                let (_, slot, reads) = in_flight.swap_remove(at.expect("a chain in flight"));
                let memory = BUFFERS + SLOT_BYTES * slot as u64;
                *data = self.machine.ram.read(memory + 4096, reads as usize);
                return Some((slot, self.machine.ram.read(memory + 64, 1)[0] == 0));
            }
        }
        None
    }
}

impl Client for Vhost {
    fn submit(&mut self, slot: usize, request: &Request, data: &[u8]) {
        let memory = BUFFERS + SLOT_BYTES * slot as u64;
        let sectors = request.sectors as u32;
        let (kind, sector, out, reads) = match request.kind {
            Kind::Read => (
                driver::IN,
                request.first,
                Vec::new(),
                sectors * SECTOR as u32,
            ),
            Kind::Write => (driver::OUT, request.first, data.to_vec(), 0),
            Kind::Flush => (driver::FLUSH, 0, Vec::new(), 0),
            // Flag 1 is "may be unmapped".
            Kind::Zero => (
                driver::WRITE_ZEROES,
                0,
                segment(request.first, sectors, request.number & 1),
                0,
            ),
            Kind::Discard => (driver::DISCARD, 0, segment(request.first, sectors, 0), 0),
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.machine.ram.write(memory, &header);
        self.machine.ram.write(memory + 64, &[0xff]);
        self.machine.ram.write(memory + 4096, &out);
        let mut pieces = vec![Piece::read(memory, 16)];
        if !out.is_empty() {
            pieces.push(Piece::read(memory + 4096, out.len() as u32));
        }
        if reads > 0 {
            pieces.push(Piece::write(memory + 4096, reads));
        }
        pieces.push(Piece::write(memory + 64, 1));
        self.turn = (self.turn + 1) % self.in_flight.len();
        let head = self.machine.queues[self.turn].add(&pieces);
        let head = head.expect("a free descriptor");
        self.in_flight[self.turn].push((head, slot, reads));
    }

    fn send(&mut self) {
        for queue in &mut self.machine.queues {
            queue.kick();
        }
    }

    fn next(&mut self, wait: bool, data: &mut Vec<u8>) -> Option<(usize, bool)> {
        loop {
            let taken = self.take(data);
            if taken.is_some() || !wait {
                return taken;
            }
            let queues = &mut self.machine.queues;
            if !queues.iter_mut().all(|queue| queue.enable_call()) {
                continue;
            }
            let fds = queues.iter().map(|queue| queue.call_fd());
            let mut fds: Vec<_> = fds
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            let limit = Timespec {
                tv_sec: 20,
                tv_nsec: 0,
            };
            assert_ne!(
                poll(&mut fds, Some(&limit)),
                Ok(0),
                "no call from the device"
            );
            let called = fds.iter().map(|fd| !fd.revents().is_empty());
            for (at, called) in called.collect::<Vec<_>>().into_iter().enumerate() {
                if called {
                    queues[at].wait_call().unwrap();
                }
            }
        }
    }
}
