//! A split virtqueue from the driver's side (virtio 1.2 §2.7.13, §2.7.14).

use super::Ram;
use io::EventFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Descriptors of one indirect table.
const TABLE_MAX: usize = 64;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub at: u64,
    pub len: u32,
    pub device_writes: bool,
}

impl Piece {
    /// The device reads it.
    pub fn read(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            device_writes: false,
        }
    }

    /// The device writes it.
    pub fn write(at: u64, len: u32) -> Self {
        Self {
            at,
            len,
            device_writes: true,
        }
    }
}

pub struct DriverQueue {
    ram: Arc<Ram>,
    index: u32,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    tables: u64,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    /// `avail.idx` when the device was last kicked or found not to need it.
    kicked: u16,
    last_used: u16,
    free: Vec<u16>,
    /// Descriptors of the chain at each head.
    chain: Vec<Vec<u16>>,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    /// Kicks written.
    pub kicks: u64,
    /// Calls waited for and received.
    pub calls: u64,
}

impl DriverQueue {
    /// A queue whose rings lie at guest address `at`, in 256 KiB.
    pub fn new(
        ram: Arc<Ram>,
        at: u64,
        index: u32,
        size: u16,
        event_idx: bool,
        indirect: bool,
    ) -> std::io::Result<Self> {
        let fd = || EventFd::new().map_err(|e| std::io::Error::other(e.to_string()));
        let queue = Self {
            ram,
            index,
            size,
            descriptors: at,
            available: at + 0x8000,
            used: at + 0xa000,
            tables: at + 0x10000,
            event_idx,
            indirect: indirect && u64::from(size) * 16 * TABLE_MAX as u64 <= 0x30000,
            next_avail: 0,
            kicked: 0,
            last_used: 0,
            free: (0..size).rev().collect(),
            chain: (0..size).map(|_| Vec::with_capacity(8)).collect(),
            kick: fd()?,
            call: fd()?,
            err: fd()?,
            kicks: 0,
            calls: 0,
        };
        queue.ram.write(at, &[0; 0x10000]);
        Ok(queue)
    }

    pub fn index(&self) -> u32 {
        self.index
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// Entry of the available ring that comes next.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Descriptor table, available ring and used ring, as this process addresses them.
    pub fn user_addresses(&self) -> (u64, u64, u64) {
        (
            self.ram.user(self.descriptors),
            self.ram.user(self.available),
            self.ram.user(self.used),
        )
    }

    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    pub fn err_fd(&self) -> BorrowedFd<'_> {
        self.err.as_fd()
    }

    /// Whether the device signalled an error, waiting for it a while.
    pub fn wait_err(&self) -> bool {
        wait_readable(self.err.as_fd()) && matches!(self.err.read(), Ok(Some(_)))
    }

    pub fn write_descriptor(&self, at: u64, piece: Piece, flags: u16, next: u16) {
        let write = if piece.device_writes { WRITE } else { 0 };
        let word = u128::from(piece.at)
            | u128::from(piece.len) << 64
            | u128::from(flags | write) << 96
            | u128::from(next) << 112;
        self.ram.write(at, &word.to_le_bytes());
    }

    pub fn descriptor_at(&self, index: u16) -> u64 {
        self.descriptors + 16 * u64::from(index)
    }

    /// Puts a chain in the available ring, without telling; `None` when there is no room.
    pub fn add(&mut self, pieces: &[Piece]) -> Option<u16> {
        let head = if self.indirect && pieces.len() <= TABLE_MAX {
            let head = self.free.pop()?;
            let table = self.tables + u64::from(head) * 16 * TABLE_MAX as u64;
            for (i, piece) in pieces.iter().enumerate() {
                let next = if i + 1 < pieces.len() { NEXT } else { 0 };
                self.write_descriptor(table + 16 * i as u64, *piece, next, i as u16 + 1);
            }
            let piece = Piece::read(table, 16 * pieces.len() as u32);
            self.write_descriptor(self.descriptor_at(head), piece, INDIRECT, 0);
            head
        } else {
            if self.free.len() < pieces.len() {
                return None;
            }
            let first = self.free.len() - pieces.len();
            let head = self.free[first];
            for (i, piece) in pieces.iter().enumerate() {
                let own = self.free[first + i];
                let last = i + 1 == pieces.len();
                let (flags, next) = if last {
                    (0, 0)
                } else {
                    (NEXT, self.free[first + i + 1])
                };
                self.write_descriptor(self.descriptor_at(own), *piece, flags, next);
            }
            let chain = &mut self.chain[usize::from(head)];
            chain.extend_from_slice(&self.free[first..]);
            self.free.truncate(first);
            head
        };
        if self.chain[usize::from(head)].is_empty() {
            self.chain[usize::from(head)].push(head);
        }
        self.make_available(head);
        Some(head)
    }

    /// Puts any number in the available ring.
    pub fn make_available(&mut self, head: u16) {
        let entry = self.available + 4 + 2 * u64::from(self.next_avail % self.size);
        self.ram.store(entry, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.ram
            .store(self.available + 2, self.next_avail, Ordering::Release);
    }

    /// Sets the available index to any value.
    pub fn set_available_index(&mut self, idx: u16) {
        self.ram.store(self.available + 2, idx, Ordering::Release);
    }

    /// Kicks, if the device wants it.
    pub fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked, self.next_avail);
        self.kicked = new;
        let wanted = if self.event_idx {
            let at = self.used + 4 + 8 * u64::from(self.size);
            let event = self.ram.load(at, Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.ram.load(self.used, Ordering::Relaxed) & 1 == 0
        };
        if wanted {
            self.kick_always();
        }
    }

    pub fn kick_always(&mut self) {
        self.kicks += 1;
        self.kick.write().expect("kick");
    }

    /// Does what a device does at the end of a chain: for a device that died afterwards.
    pub fn push_used(&mut self, head: u16) {
        let idx = self.ram.load(self.used + 2, Ordering::Relaxed);
        let entry = self.used + 4 + 8 * u64::from(idx % self.size);
        self.ram.write(entry, &u32::from(head).to_le_bytes());
        self.ram
            .store(self.used + 2, idx.wrapping_add(1), Ordering::Release);
    }

    /// The next chain that the device is done with, and the bytes it wrote.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if self.ram.load(self.used + 2, Ordering::Acquire) == self.last_used {
            return None;
        }
        let mut entry = [0; 8];
        let at = self.used + 4 + 8 * u64::from(self.last_used % self.size);
        self.ram.read_into(at, &mut entry);
        self.last_used = self.last_used.wrapping_add(1);
        let head = u16::from_le_bytes([entry[0], entry[1]]);
        let written = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let chain = &mut self.chain[usize::from(head)];
        assert!(!chain.is_empty(), "used entry {head} was not in flight");
        self.free.extend(chain.drain(..).rev());
        Some((head, written))
    }

    /// Asks for a call when the next chain is done; `false` when one is done already.
    pub fn enable_call(&mut self) -> bool {
        if self.event_idx {
            let at = self.available + 4 + 2 * u64::from(self.size);
            self.ram.store(at, self.last_used, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.ram.load(self.used + 2, Ordering::Relaxed) == self.last_used
    }

    /// The next chain that is done, sleeping until the device calls.
    pub fn wait(&mut self) -> (u16, u32) {
        loop {
            if let Some(done) = self.pop() {
                return done;
            }
            if self.enable_call() {
                assert!(wait_readable(self.call.as_fd()), "no call from the device");
                if matches!(self.call.read(), Ok(Some(_))) {
                    self.calls += 1;
                }
            }
        }
    }
}

/// Whether `fd` becomes readable within a time that only a failure needs.
pub fn wait_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    loop {
        match poll(&mut fds, Some(&limit)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => panic!("poll: {e}"),
        }
    }
}
