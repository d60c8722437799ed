//! Memory that is lent to the disk while a request runs: the one place of the
//! NBD server with unsafe code.

use super::memory::Buffer;
use block::{GuestOffset, IoVec, Op};
use disk::{DiskQueue, Done, Request, StatusExtent};
use io::Engine;

/// The part of a disk's queue that a connection uses; tests put a disk of their own behind it.
pub(crate) trait Backend {
    /// Starts a request; gives it back when the queue's table is full.
    ///
    /// # Safety
    ///
    /// The pieces of memory and their array must stay where they are, and for reads must not be
    /// looked at, until the request's [`Done`] was taken or the backend was dropped.
    unsafe fn submit(&mut self, request: Request) -> Result<(), Request>;

    /// Starts a query that ends in a [`Done`] of `tag`; `false` when the table is full.
    fn block_status(&mut self, at: GuestOffset, len: u64, extents_max: usize, tag: u64) -> bool;

    /// The next request that ended.
    fn done(&mut self) -> Option<Done>;

    /// The answer to the query `tag`, which ended well.
    fn take_status(&mut self, tag: u64) -> Vec<StatusExtent>;

    /// Lets the device have what was started, before the worker's turn would.
    fn push(&mut self);
}

/// A disk queue and the engine that it works with, for one step.
pub(crate) struct AtDisk<'a> {
    pub queue: &'a mut DiskQueue,
    pub engine: &'a mut dyn Engine,
}

impl Backend for AtDisk<'_> {
    unsafe fn submit(&mut self, request: Request) -> Result<(), Request> {
        // SAFETY: the caller vouches for the memory as `DiskQueue::submit` asks.
        unsafe { self.queue.submit(self.engine, request) }
    }

    fn block_status(&mut self, at: GuestOffset, len: u64, extents_max: usize, tag: u64) -> bool {
        self.queue
            .block_status(self.engine, at, len, extents_max, tag)
            .is_ok()
    }

    fn done(&mut self) -> Option<Done> {
        self.queue.done()
    }

    fn take_status(&mut self, tag: u64) -> Vec<StatusExtent> {
        self.queue.take_status(tag)
    }

    fn push(&mut self) {
        self.engine.push();
    }
}

/// When a request came; nanoseconds of [`disk::now_ns`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    /// Its socket was reported as readable; where it was looked at without that, the turn in which its header was received began.
    pub arrived_ns: u64,
    /// Its header was taken.
    pub taken_ns: u64,
}

/// One slot's memory.
#[derive(Debug, Default)]
enum Memory {
    #[default]
    None,
    Ours(Buffer),
    /// The disk reads or writes it.
    Lent(Buffer),
}

/// The memory of all slots of a connection.
#[derive(Debug)]
pub(crate) struct Loans {
    memory: Box<[Memory]>,
    /// The piece that a slot's request points to.
    pieces: Box<[IoVec]>,
}

impl Loans {
    pub(crate) fn new(slots: usize) -> Self {
        Self {
            memory: (0..slots).map(|_| Memory::None).collect(),
            pieces: vec![IoVec::new(std::ptr::null_mut(), 0); slots].into(),
        }
    }

    /// Gives a slot, which has none, its memory.
    pub(crate) fn put(&mut self, slot: usize, buffer: Buffer) {
        debug_assert!(matches!(self.memory[slot], Memory::None));
        self.memory[slot] = Memory::Ours(buffer);
    }

    /// Takes a slot's memory; `None` when it has none or lent it.
    pub(crate) fn take(&mut self, slot: usize) -> Option<Buffer> {
        match std::mem::take(&mut self.memory[slot]) {
            Memory::Ours(buffer) => Some(buffer),
            other => {
                self.memory[slot] = other;
                None
            }
        }
    }

    /// A slot's memory; empty when it has none or lent it.
    pub(crate) fn bytes(&self, slot: usize) -> &[u8] {
        match &self.memory[slot] {
            Memory::Ours(buffer) => buffer,
            _ => &[],
        }
    }

    /// A slot's memory to write to; empty when it has none or lent it.
    pub(crate) fn bytes_mut(&mut self, slot: usize) -> &mut [u8] {
        match &mut self.memory[slot] {
            Memory::Ours(buffer) => buffer,
            _ => &mut [],
        }
    }

    /// Gives a request of `slot` to the disk, and for reads and writes the first `len` bytes of
    /// the slot's memory until [`Loans::settle`]. The request's tag is the slot.
    /// `false` when the table is full.
    pub(crate) fn submit(
        &mut self,
        slot: usize,
        backend: &mut impl Backend,
        op: Op,
        at: u64,
        len: u64,
        seen: Seen,
    ) -> bool {
        let (iov, iov_len) = if op.has_data() {
            let bytes = self.bytes_mut(slot);
            // Requests were given memory for all of their length, at most 32 MiB.
            assert!(bytes.len() as u64 >= len, "slot {slot} lacks memory");
            let piece = IoVec::new(bytes.as_mut_ptr(), len as usize);
            self.pieces[slot] = piece;
            (self.pieces.as_ptr().wrapping_add(slot), 1)
        } else {
            (std::ptr::null(), 0)
        };
        let request = Request {
            op,
            at: GuestOffset(at),
            len,
            iov,
            iov_len,
            tag: slot as u64,
            arrived_ns: seen.arrived_ns,
            seen_ns: seen.taken_ns,
            parsed_ns: disk::now_ns(),
        };
        // SAFETY: the piece lies in a boxed array that is never resized, and its memory in a `Buffer`
        // that is marked as lent below: nobody gets at it, and `Drop` does not free
        // it, before `settle` is called for the request's `Done`.
        let taken = unsafe { backend.submit(request) }.is_ok();
        if taken
            && op.has_data()
            && let Memory::Ours(buffer) = std::mem::take(&mut self.memory[slot])
        {
            self.memory[slot] = Memory::Lent(buffer);
        }
        taken
    }

    /// The slot's request ended: its memory is ours again.
    pub(crate) fn settle(&mut self, slot: usize) {
        self.memory[slot] = match std::mem::take(&mut self.memory[slot]) {
            Memory::Lent(buffer) => Memory::Ours(buffer),
            other => other,
        };
    }
}

impl Drop for Loans {
    fn drop(&mut self) {
        let mut lent = false;
        for memory in &mut self.memory {
            if let Memory::Lent(buffer) = std::mem::take(memory) {
                // The disk may still use it: better lost than written to after it was freed.
                std::mem::forget(buffer);
                lent = true;
            }
        }
        if lent {
            std::mem::forget(std::mem::take(&mut self.pieces));
        }
    }
}
