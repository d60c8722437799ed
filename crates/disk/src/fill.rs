//! Writes into new clusters: copy-on-write of what the guest does not overwrite,
//! and one vectored write of everything.
//!
//! ```text
//!          head            guest's data           tail
//!   ├── copied or zero ──┼────────────────┼── copied or zero ──┤   one write, then commit
//! ```
//!
//! Head and tail are read through the chain by two inner requests. What turns out to be zeros
//! in a cluster that reads as zeros is neither copied nor written.

use crate::{
    memory::{self, Pieces},
    queue::DiskQueue,
    request::{Owner, Task},
    sub::{Place, Purpose},
};
use block::{GuestError, GuestOffset, Op};
use image::{Allocation, Fill, Key, Ticket};
use io::{Engine, IoOp, memory::AlignedBuf};

/// Bytes of buffers above which no further fill is begun: bounds the memory of
/// copy-on-write. One fill alone may need two clusters (4 MiB).
pub(crate) const FILL_BYTES_MAX: usize = 16 << 20;

/// `IOV_MAX` of Linux: pieces of one operation.
const PIECES_MAX: usize = 1024;

/// One side of the guest's data.
#[derive(Debug, Default)]
struct Part {
    at: GuestOffset,
    len: u64,
    /// Its bytes, where they are copied.
    buffer: Option<AlignedBuf>,
    /// Left out of the write: the cluster already holds the right bytes there.
    skip: bool,
}

/// An allocation under way.
#[derive(Debug)]
pub(crate) struct FillOp {
    slot: u32,
    ticket: Ticket,
    key: Key,
    file: image::FileId,
    host: u64,
    /// Where in the request the data begins, and its length.
    pos: u64,
    data_len: u64,
    zeroed: bool,
    /// Head and tail.
    parts: [Part; 2],
    reads: u32,
    error: Option<GuestError>,
}

impl FillOp {
    pub fn new() -> Self {
        Self {
            slot: 0,
            ticket: Ticket(0),
            key: Key(0),
            file: image::FileId::IMAGE,
            host: 0,
            pos: 0,
            data_len: 0,
            zeroed: false,
            parts: Default::default(),
            reads: 0,
            error: None,
        }
    }
}

impl DiskQueue {
    /// Carries out an allocation for the request's bytes from its `pos` on. The caller saw to it
    /// that a fill is free and an operation beyond those set aside.
    pub(crate) fn begin_fill(&mut self, engine: &mut dyn Engine, index: u32, a: Allocation) {
        let slot = &mut self.slots[index as usize];
        let at = slot.at.plus(slot.pos);
        let pos = slot.pos;
        let data_len = a.write_len.min(slot.len - pos);
        slot.pending += 1;
        let Some(fill_index) = self.fills_free.pop() else {
            // Not reached: step_write asks only with a fill at hand. Nothing was written.
            debug_assert!(false, "an allocation without a fill");
            self.disk.layers[0].image.abort(a.ticket);
            self.disk.waits.wake(0, a.key);
            return self.part_ended(index, Some(GuestError::Io));
        };
        self.fills_in_use += 1;
        let tail_at = at.plus(data_len);
        let fill = &mut self.fills[fill_index as usize];
        fill.slot = index;
        fill.ticket = a.ticket;
        fill.key = a.key;
        fill.file = a.file;
        fill.host = a.host.0;
        fill.pos = pos;
        fill.data_len = data_len;
        fill.zeroed = a.zeroed;
        fill.error = None;
        fill.parts[0].at = a.start;
        fill.parts[0].len = at.since(a.start);
        fill.parts[1].at = tail_at;
        fill.parts[1].len = a.start.plus(a.len).since(tail_at);
        for part in &mut fill.parts {
            part.buffer = None;
            part.skip = part.len == 0
                || match a.fill {
                    Fill::Nothing => true,
                    Fill::Zero => a.zeroed,
                    Fill::Existing => false,
                };
        }
        // One extra, so that reads that end at once do not finish the fill before all are begun.
        fill.reads = 1;
        if a.fill == Fill::Existing {
            self.stats.copy();
            for part in 0..2 {
                self.begin_read(engine, fill_index, part);
            }
        }
        self.fills[fill_index as usize].reads -= 1;
        if self.fills[fill_index as usize].reads == 0 {
            self.write_fill(engine, fill_index);
        }
    }

    /// Starts the inner request that reads what a part of the cluster holds now.
    fn begin_read(&mut self, engine: &mut dyn Engine, fill_index: u32, part: usize) {
        let size = self.disk.size();
        let this = &self.fills[fill_index as usize].parts[part];
        let (at, len) = (this.at, this.len);
        if len == 0 {
            return;
        }
        // Behind the end of the disk there are zeros, for whom it may concern.
        let inside = len.min(size.saturating_sub(at.0));
        let mut buffer = self.buffers.take(len as usize);
        buffer[inside as usize..len as usize].fill(0);
        let piece = buffer.piece(0, inside as usize);
        self.fills[fill_index as usize].parts[part].buffer = Some(buffer);
        if inside == 0 {
            return self.note_read(fill_index, part, true, None);
        }
        let Some(index) = self.inner_free.pop() else {
            debug_assert!(false, "two inner slots for each fill");
            return self.note_read(fill_index, part, false, Some(GuestError::Io));
        };
        self.fills[fill_index as usize].reads += 1;
        let owner = Owner::Fill {
            fill: fill_index,
            part,
        };
        self.begin(index, owner, Task::Op(Op::Read), at, inside);
        let slot = &mut self.slots[index as usize];
        slot.own_iov = piece;
        slot.iov = Pieces::new(&raw const slot.own_iov, 1);
        self.drive(engine, index);
    }

    /// An inner read ended. Called from `finish`; the write follows in `advance_fills`.
    pub(crate) fn fill_read(
        &mut self,
        fill_index: u32,
        part: usize,
        all_zero: bool,
        error: Option<GuestError>,
    ) {
        self.note_read(fill_index, part, all_zero, error);
        let fill = &mut self.fills[fill_index as usize];
        fill.reads -= 1;
        if fill.reads == 0 {
            self.fills_read.push_back(fill_index);
        }
    }

    fn note_read(
        &mut self,
        fill_index: u32,
        part: usize,
        all_zero: bool,
        error: Option<GuestError>,
    ) {
        let fill = &mut self.fills[fill_index as usize];
        if let Some(error) = error {
            fill.error.get_or_insert(error);
        }
        fill.parts[part].skip |= all_zero && fill.zeroed;
    }

    /// Writes the fills whose parts have been read.
    pub(crate) fn advance_fills(&mut self, engine: &mut dyn Engine) {
        while let Some(fill_index) = self.fills_read.pop_front() {
            self.write_fill(engine, fill_index);
        }
    }

    fn write_fill(&mut self, engine: &mut dyn Engine, fill_index: u32) {
        let fill = &self.fills[fill_index as usize];
        if fill.error.is_some() {
            let error = fill.error;
            return self.fill_written(fill_index, error);
        }
        let Some(sub) = self.take_sub() else {
            debug_assert!(false, "each fill has an operation set aside");
            return self.fill_written(fill_index, Some(GuestError::Io));
        };
        let fill = &self.fills[fill_index as usize];
        let mut offset = fill.host;
        let mut len = fill.data_len;
        let (index, pos, data_len) = (fill.slot, fill.pos, fill.data_len);
        self.put_part(fill_index, 0, sub);
        self.put_data(index, pos, data_len, sub);
        self.put_part(fill_index, 1, sub);
        let fill = &self.fills[fill_index as usize];
        if fill.parts[0].skip {
            offset += fill.parts[0].len;
        } else {
            len += fill.parts[0].len;
        }
        if !fill.parts[1].skip {
            len += fill.parts[1].len;
        }
        let file = self.file(0, fill.file);
        if self.subs[sub as usize].iov.len() > PIECES_MAX {
            self.gather(sub, len);
        }
        let purpose = Purpose::Fill { fill: fill_index };
        let place = Place { file, offset, len };
        self.issue(engine, sub, purpose, IoOp::Write, place, None);
    }

    fn put_part(&mut self, fill_index: u32, part: usize, sub: u32) {
        let this = &self.fills[fill_index as usize].parts[part];
        if this.skip {
            return;
        }
        let out = &mut self.subs[sub as usize].iov;
        match &this.buffer {
            Some(buffer) => out.push(buffer.piece(0, this.len as usize)),
            None => memory::push_zeros(this.len, out),
        }
    }

    /// Copies an operation's many pieces into one buffer of its own.
    fn gather(&mut self, sub: u32, len: u64) {
        let mut buffer = self.buffers.take(len as usize);
        let sub = &mut self.subs[sub as usize];
        memory::gather(&sub.iov, &mut buffer[..len as usize]);
        sub.iov.clear();
        sub.iov.push(buffer.piece(0, len as usize));
        sub.buffer = Some(buffer);
    }

    /// The allocation's write ended (or was not begun, for `error`): it becomes the guest's, or is given back.
    pub(crate) fn fill_written(&mut self, fill_index: u32, error: Option<GuestError>) {
        let fill = &mut self.fills[fill_index as usize];
        let (slot, key) = (fill.slot, fill.key);
        for part in &mut fill.parts {
            if let Some(buffer) = part.buffer.take() {
                self.buffers.give(buffer);
            }
        }
        let image = &self.disk.layers[0].image;
        match error {
            None => image.commit(fill.ticket),
            Some(_) => image.abort(fill.ticket),
        }
        self.disk.waits.wake(0, key);
        self.fills_free.push(fill_index);
        self.fills_in_use -= 1;
        self.part_ended(slot, error);
    }
}
