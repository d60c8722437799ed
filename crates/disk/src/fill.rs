//! Writes into new clusters: copy-on-write of what no guest's request overwrites, and one
//! vectored write of everything.
//!
//! ```text
//!        gap         one request    another       gap
//!   ├── copied or ─┼──────────────┼───────────┼─ copied or ─┤   one write, then commit
//!         zeros                                    zeros
//! ```
//!
//! An allocation stays open while the requests of its turn are taken, and while its gaps are being read:
//! requests for the same clusters join it meanwhile, so that neighbours that
//! arrive together are one write, and nothing is read that they overwrite together.
//! In a long turn of requests that have nothing to do with each other, this would only keep the device waiting: where nobody
//! joined the last allocations (`PATIENCE`), each few are carried out (`EARLY`) while the rest of the turn is taken.
//!
//! The gaps are read through the chain by inner requests, two at most (`Cover::reads`): small writes
//! between them are read over, since that costs a device less than a request more. Where such a read fails
//! each gap is read alone, so that a guest can overwrite what cannot be read.
//!
//! What reads as zeros at either end of clusters that are zeros already is not written.

use crate::{
    cover::{Cover, Given},
    memory::{self, Pieces},
    queue::DiskQueue,
    request::{Owner, Task},
    sub::{Place, Purpose},
};
use block::{GuestError, GuestOffset, Op, is_zero};
use image::{Allocation, Fill, Key, Ticket};
use io::{Engine, IoOp, memory::AlignedBuf};
use std::ops::Range;

/// Bytes of allocations under way above which no further one is begun: bounds the memory of
/// copy-on-write. One alone may be of 2 MiB.
pub(crate) const FILL_BYTES_MAX: u64 = 16 << 20;

/// `IOV_MAX` of Linux: pieces of one operation.
const PIECES_MAX: usize = 1024;

/// Guests' bytes between two gaps up to which both are read at once.
const READ_THROUGH_MAX: u64 = 32 << 10;

/// A guest's bytes that are copied into the buffer that surrounds them, rather than written from where they
/// are: a piece less costs more than so many bytes.
const COPY_MAX: u64 = 8 << 10;

/// Allocations of one turn that are carried out before its end, when nobody joins any.
const EARLY: usize = 8;

/// After a request has joined an allocation, or has come too late to, so many are left open to the end of
/// their turn: more than the interleaved sequential writers of a guest begin in one.
const PATIENCE: u32 = 64;

/// What is left out at the ends of a write is a multiple of this, so that `O_DIRECT` takes the rest.
const TRIM: u64 = 4096;

/// How far an allocation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Requests may join; nothing has been read.
    Open,
    /// Requests may join; gaps are being read.
    Reading,
    /// What is written is settled.
    Writing,
}

/// A range that is read at once.
#[derive(Debug, Default)]
struct Part {
    range: Range<u64>,
    /// Its bytes.
    buffer: Option<AlignedBuf>,
    /// They are zeros; the buffer holds anything.
    zero: bool,
}

/// An allocation under way.
#[derive(Debug)]
pub(crate) struct FillOp {
    phase: Phase,
    ticket: Ticket,
    key: Key,
    file: image::FileId,
    host: u64,
    start: GuestOffset,
    zeroed: bool,
    fill: Fill,
    cover: Cover,
    parts: [Part; 2],
    /// Inner requests under way.
    reads: u32,
    /// After a failure: the gap that is read alone, within the first part.
    alone: Option<Range<u64>>,
    error: Option<GuestError>,
}

impl FillOp {
    pub fn new() -> Self {
        Self {
            phase: Phase::Writing,
            ticket: Ticket(0),
            key: Key(0),
            file: image::FileId::IMAGE,
            host: 0,
            start: GuestOffset(0),
            zeroed: false,
            fill: Fill::Nothing,
            cover: Cover::default(),
            parts: Default::default(),
            reads: 0,
            alone: None,
            error: None,
        }
    }

    /// How many of `len` bytes from `at` on may join, were they somebody's.
    fn room(&self, at: GuestOffset, len: u64) -> u64 {
        if self.phase == Phase::Writing || at < self.start {
            return 0;
        }
        let from = at.since(self.start);
        if from >= self.cover.len() {
            return 0;
        }
        let len = len.min(self.cover.room(from));
        // What is not filled is left out of the write: it must not have a hole.
        let filled = self.fill == Fill::Existing || !self.zeroed;
        match filled || self.cover.touches(&(from..from + len)) {
            true => len,
            false => 0,
        }
    }

    /// Where the write begins and ends: all, less what the cluster holds already.
    fn extent(&self) -> Range<u64> {
        let (span, len) = (self.cover.span(), self.cover.len());
        if !self.zeroed {
            return 0..len;
        }
        match self.fill {
            Fill::Existing => {}
            Fill::Zero | Fill::Nothing => return span,
        }
        let (mut first, mut last) = (span.start, span.end);
        if let Some((bytes, _)) = self.bytes(0..span.start) {
            let zeros = bytes.chunks(TRIM as usize).take_while(|c| is_zero(c));
            first = (zeros.count() as u64 * TRIM).min(span.start);
        }
        if let Some((bytes, _)) = self.bytes(span.end..len) {
            // Blocks are counted from the allocation's beginning, so the last may be short.
            let short = (bytes.len() as u64 % TRIM) as usize;
            let (head, blocks) = bytes.split_at(short);
            let zeros = blocks.rchunks(TRIM as usize).take_while(|c| is_zero(c));
            let left = blocks.len() as u64 - zeros.count() as u64 * TRIM;
            let head = if left > 0 || !is_zero(head) { short } else { 0 };
            last = span.end + left + head as u64;
        }
        first..last
    }

    /// The bytes of a gap as they were read, and its part. `None` for zeros and for nothing.
    fn bytes(&self, gap: Range<u64>) -> Option<(&[u8], usize)> {
        let (part, at) = self.part_of(&gap)?;
        let buffer = self.parts[part].buffer.as_ref()?;
        let end = at + (gap.end - gap.start) as usize;
        Some((&buffer[at..end], part))
    }

    /// The part that has all of a range in its buffer, and where there.
    fn part_of(&self, range: &Range<u64>) -> Option<(usize, usize)> {
        let holds = |p: &Part| {
            !p.zero && p.range.start <= range.start && range.end <= p.range.end && !range.is_empty()
        };
        let part = self.parts.iter().position(holds)?;
        Some((part, (range.start - self.parts[part].range.start) as usize))
    }
}

impl DiskQueue {
    /// Joins the request's next bytes to an allocation of this queue that was begun for the same clusters; how many.
    /// Looks at the last one only when `all` is not set.
    pub(crate) fn join_fill(&mut self, index: u32, len: u64, all: bool) -> u64 {
        let slot = &self.slots[index as usize];
        let (pos, at) = (slot.pos, slot.at.plus(slot.pos));
        let looked_at = if all { usize::MAX } else { 1 };
        let found = self.fills_open.iter().rev().take(looked_at);
        let mut found = found.map(|fill| (*fill, self.fills[*fill as usize].room(at, len)));
        let Some((fill, len)) = found.find(|(_, room)| *room > 0) else {
            return 0;
        };
        self.disk.layers[0].image.joined(at, len);
        let fill = &mut self.fills[fill as usize];
        fill.cover.give(Given {
            slot: index,
            pos,
            from: at.since(fill.start),
            len,
        });
        self.slots[index as usize].pending += 1;
        self.stats.join();
        self.patience = PATIENCE;
        len
    }

    /// A request waits for `key`: had an allocation of this queue been open, it would have joined.
    pub(crate) fn came_late(&mut self, key: Key) {
        if self.fills.iter().any(|fill| fill.key == key) {
            self.patience = PATIENCE;
        }
    }

    /// In the middle of a turn: carries out allocations that nobody will join, by the look of it.
    pub(crate) fn start_early(&mut self, engine: &mut dyn Engine) {
        if self.fills_new.len() >= EARLY && self.patience == 0 {
            self.advance_fills(engine);
            engine.push();
        }
    }

    /// Begins an allocation for the request's bytes from its `pos` on; it is carried out in the next `advance`.
    /// The caller saw to it that a fill is free and an operation beyond those set aside.
    pub(crate) fn begin_fill(&mut self, index: u32, a: &Allocation) {
        let slot = &mut self.slots[index as usize];
        let at = slot.at.plus(slot.pos);
        let given = Given {
            slot: index,
            pos: slot.pos,
            from: at.since(a.start),
            len: a.write_len.min(slot.len - slot.pos),
        };
        slot.pending += 1;
        let Some(fill_index) = self.fills_free.pop() else {
            // Not reached: step_write asks only with a fill at hand. Nothing was written.
            debug_assert!(false, "an allocation without a fill");
            self.disk.layers[0].image.abort(a.ticket);
            self.disk.waits.wake(0, a.key);
            return self.part_ended(index, Some(GuestError::Io));
        };
        self.fills_in_use += 1;
        self.patience = self.patience.saturating_sub(1);
        self.fill_bytes += a.len;
        let fill = &mut self.fills[fill_index as usize];
        fill.phase = Phase::Open;
        fill.ticket = a.ticket;
        fill.key = a.key;
        fill.file = a.file;
        fill.host = a.host.0;
        fill.start = a.start;
        fill.zeroed = a.zeroed;
        fill.fill = a.fill;
        fill.cover.reset(a.len);
        fill.cover.give(given);
        fill.alone = None;
        fill.error = None;
        self.fills_open.push(fill_index);
        self.fills_new.push(fill_index);
    }

    /// Carries out what was begun since the last call, and writes what has been read.
    pub(crate) fn advance_fills(&mut self, engine: &mut dyn Engine) {
        // An inner read may end at once, but begins no fill.
        for at in 0..self.fills_new.len() {
            self.start_fill(engine, self.fills_new[at]);
        }
        self.fills_new.clear();
        self.write_fills(engine);
    }

    /// Whether `advance_fills` has something to do.
    pub(crate) fn fills_wait(&self) -> bool {
        !self.fills_new.is_empty() || !self.fills_read.is_empty()
    }

    /// Writes the fills whose gaps have been read.
    pub(crate) fn write_fills(&mut self, engine: &mut dyn Engine) {
        while let Some(fill_index) = self.fills_read.pop_front() {
            self.write_fill(engine, fill_index);
        }
    }

    fn start_fill(&mut self, engine: &mut dyn Engine, fill_index: u32) {
        let fill = &mut self.fills[fill_index as usize];
        let reads = match fill.fill {
            Fill::Existing => fill.cover.reads(READ_THROUGH_MAX),
            Fill::Zero | Fill::Nothing => Default::default(),
        };
        if reads[0].is_empty() {
            return self.write_fill(engine, fill_index);
        }
        self.stats.copy();
        fill.phase = Phase::Reading;
        for (part, range) in fill.parts.iter_mut().zip(&reads) {
            part.range = range.clone();
        }
        // One extra, so that reads that end at once do not finish the fill before all are begun.
        fill.reads = 1;
        for (part, range) in reads.into_iter().enumerate() {
            if !range.is_empty() {
                let len = (range.end - range.start) as usize;
                let buffer = self.buffers.take(len);
                self.fills[fill_index as usize].parts[part].buffer = Some(buffer);
                self.begin_read(engine, fill_index, part, range);
            }
        }
        self.read_ended(fill_index);
    }

    /// Starts the inner request that reads what a range of a part holds now.
    fn begin_read(
        &mut self,
        engine: &mut dyn Engine,
        fill_index: u32,
        part: usize,
        range: Range<u64>,
    ) {
        let size = self.disk.size();
        let fill = &mut self.fills[fill_index as usize];
        let at = fill.start.plus(range.start);
        let len = (range.end - range.start) as usize;
        let this = &mut fill.parts[part];
        let skip = (range.start - this.range.start) as usize;
        let Some(buffer) = &mut this.buffer else {
            debug_assert!(false, "a part has a buffer before it is read");
            return;
        };
        // Behind the end of the disk there are zeros, for whom it may concern.
        let inside = size.saturating_sub(at.0).min(len as u64) as usize;
        buffer[skip + inside..skip + len].fill(0);
        let piece = buffer.piece(skip, inside);
        fill.reads += 1;
        let Some(index) = self.inner_free.pop() else {
            debug_assert!(false, "two inner slots for each fill");
            return self.fill_read(fill_index, part, false, Some(GuestError::Io));
        };
        let owner = Owner::Fill {
            fill: fill_index,
            part,
        };
        self.begin(index, owner, Task::Op(Op::Read), at, inside as u64);
        let slot = &mut self.slots[index as usize];
        slot.own_iov = piece;
        slot.iov = Pieces::new(&raw const slot.own_iov, 1);
        self.drive(engine, index);
    }

    /// An inner read ended. Called from `finish`; the write follows in `write_fills`.
    pub(crate) fn fill_read(
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
        let this = &mut fill.parts[part];
        match &fill.alone {
            None => this.zero = all_zero,
            // The buffer of all gaps has the others' bytes.
            Some(gap) if all_zero => {
                let first = (gap.start - this.range.start) as usize;
                let len = (gap.end - gap.start) as usize;
                if let Some(buffer) = &mut this.buffer {
                    buffer[first..first + len].fill(0);
                }
            }
            Some(_) => {}
        }
        self.read_ended(fill_index);
    }

    fn read_ended(&mut self, fill_index: u32) {
        let fill = &mut self.fills[fill_index as usize];
        fill.reads -= 1;
        if fill.reads == 0 {
            self.fills_read.push_back(fill_index);
        }
    }

    /// After the reads failed: begins to read each gap alone, or goes on with that. `false` when there
    /// is no gap left, or when that would be what was done already.
    fn read_alone(&mut self, engine: &mut dyn Engine, fill_index: u32) -> bool {
        let fill = &mut self.fills[fill_index as usize];
        let next = match &fill.alone {
            Some(_) if fill.error.is_some() => return false,
            Some(gap) => fill.cover.gap(gap.end),
            None if fill.error.is_none() || fill.phase != Phase::Reading => return false,
            None => {
                let exact = |p: &Part| {
                    p.range.is_empty() || fill.cover.gap(p.range.start) == Some(p.range.clone())
                };
                if fill.parts.iter().all(exact) {
                    return false;
                }
                fill.error = None;
                let all = 0..fill.cover.len();
                self.give_buffers(fill_index);
                let buffer = self.buffers.take(all.end as usize);
                let fill = &mut self.fills[fill_index as usize];
                fill.parts[0].range = all;
                fill.parts[0].buffer = Some(buffer);
                fill.cover.gap(0)
            }
        };
        let fill = &mut self.fills[fill_index as usize];
        // Those who joined meanwhile may have left nothing to read.
        let Some(gap) = next else {
            return false;
        };
        fill.alone = Some(gap.clone());
        self.begin_read(engine, fill_index, 0, gap);
        true
    }

    fn write_fill(&mut self, engine: &mut dyn Engine, fill_index: u32) {
        if self.read_alone(engine, fill_index) {
            return;
        }
        self.fills_open.retain(|f| *f != fill_index);
        let fill = &mut self.fills[fill_index as usize];
        fill.phase = Phase::Writing;
        if fill.error.is_some() {
            let error = fill.error;
            return self.fill_written(fill_index, error);
        }
        let Some(sub) = self.take_sub() else {
            debug_assert!(false, "each fill has an operation set aside");
            return self.fill_written(fill_index, Some(GuestError::Io));
        };
        let fill = &self.fills[fill_index as usize];
        let extent = fill.extent();
        let place = Place {
            file: self.file(0, fill.file),
            offset: fill.host + extent.start,
            len: extent.end - extent.start,
        };
        let mut at = extent.start;
        for given in 0..fill.cover.given().len() {
            let given = self.fills[fill_index as usize].cover.given()[given];
            self.put_gap(fill_index, at..given.from, sub);
            self.put_given(fill_index, &given, sub);
            at = given.end();
        }
        self.put_gap(fill_index, at..extent.end, sub);
        if self.is_encrypted(0) {
            let fill = &self.fills[fill_index as usize];
            let guest = fill.start.plus(extent.start);
            if !self.seal(sub, 0, guest, place.offset, place.len) {
                self.free_sub(sub);
                return self.fill_written(fill_index, Some(GuestError::Io));
            }
        } else if self.subs[sub as usize].iov.len() > PIECES_MAX {
            self.gather(sub, place.len);
        }
        let purpose = Purpose::Fill { fill: fill_index };
        self.issue(engine, sub, purpose, IoOp::Write, place, None);
    }

    /// Appends what belongs into a gap to an operation's pieces.
    fn put_gap(&mut self, fill_index: u32, gap: Range<u64>, sub: u32) {
        if gap.is_empty() {
            return;
        }
        let len = gap.end - gap.start;
        let fill = &self.fills[fill_index as usize];
        let out = &mut self.subs[sub as usize].iov;
        let Some((part, at)) = fill.part_of(&gap) else {
            debug_assert!(
                fill.fill != Fill::Existing || fill.parts.iter().any(|p| p.zero),
                "a gap is not read"
            );
            return memory::push_zeros(len, out);
        };
        if let Some(buffer) = &fill.parts[part].buffer {
            memory::push(buffer.piece(at, len as usize), out);
        }
    }

    /// Appends a request's bytes to an operation's pieces: few bytes as a part of the buffer around them.
    fn put_given(&mut self, fill_index: u32, given: &Given, sub: u32) {
        let fill = &mut self.fills[fill_index as usize];
        let slot = &self.slots[given.slot as usize];
        let has_data = slot.op().is_some_and(|op| op.has_data());
        let within = fill.part_of(&(given.from..given.end()));
        let Some((part, at)) = within.filter(|_| has_data && given.len <= COPY_MAX) else {
            return self.put_data(given.slot, given.pos, given.len, sub);
        };
        if let Some(buffer) = &mut fill.parts[part].buffer {
            let len = given.len as usize;
            memory::gather(slot.iov.get(), given.pos, &mut buffer[at..at + len]);
            let out = &mut self.subs[sub as usize].iov;
            memory::push(buffer.piece(at, len), out);
        }
    }

    /// Copies an operation's many pieces into one buffer of its own.
    pub(crate) fn gather(&mut self, sub: u32, len: u64) {
        let mut buffer = self.buffers.take(len as usize);
        let sub = &mut self.subs[sub as usize];
        memory::gather(&sub.iov, 0, &mut buffer[..len as usize]);
        sub.iov.clear();
        sub.iov.push(buffer.piece(0, len as usize));
        sub.buffer = Some(buffer);
    }

    fn give_buffers(&mut self, fill_index: u32) {
        for part in &mut self.fills[fill_index as usize].parts {
            part.range = 0..0;
            part.zero = false;
            if let Some(buffer) = part.buffer.take() {
                self.buffers.give(buffer);
            }
        }
    }

    /// The allocation's write ended (or was not begun, for `error`): it becomes the guests', or is given back.
    pub(crate) fn fill_written(&mut self, fill_index: u32, error: Option<GuestError>) {
        self.give_buffers(fill_index);
        let fill = &mut self.fills[fill_index as usize];
        let (key, len) = (fill.key, fill.cover.len());
        let image = &self.disk.layers[0].image;
        match error {
            None => image.commit(fill.ticket),
            Some(_) => image.abort(fill.ticket),
        }
        self.disk.waits.wake(0, key);
        for given in 0..self.fills[fill_index as usize].cover.given().len() {
            let slot = self.fills[fill_index as usize].cover.given()[given].slot;
            self.part_ended(slot, error);
        }
        self.fill_bytes -= len;
        self.fills_free.push(fill_index);
        self.fills_in_use -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 64 << 10;

    /// A copied cluster with one request's bytes in it, which reads as zeros but for the bytes at `ones`.
    fn copied(from: u64, len: u64, ones: &[u64]) -> FillOp {
        let mut fill = FillOp::new();
        fill.zeroed = true;
        fill.fill = Fill::Existing;
        fill.phase = Phase::Reading;
        fill.cover.reset(CLUSTER);
        fill.cover.give(Given {
            slot: 0,
            pos: 0,
            from,
            len,
        });
        for (part, range) in fill
            .parts
            .iter_mut()
            .zip(fill.cover.reads(READ_THROUGH_MAX))
        {
            let len = (range.end - range.start) as usize;
            let mut buffer = AlignedBuf::new(len, 4096);
            for one in ones.iter().filter(|one| range.contains(one)) {
                buffer[(one - range.start) as usize] = 1;
            }
            part.range = range;
            part.buffer = Some(buffer);
        }
        fill
    }

    #[test]
    fn zeros_at_the_ends_are_not_written() {
        for (from, len, ones, want) in [
            (8192, 4096, vec![], 8192..12288),
            (8192, 4096, vec![0], 0..12288),
            (8192, 4096, vec![4095], 0..12288),
            (8192, 4096, vec![4096], 4096..12288),
            (8192, 4096, vec![12288], 8192..16384),
            (8192, 4096, vec![CLUSTER - 1], 8192..CLUSTER),
            (8192, 512, vec![8704], 8192..12288),
            (8192, 512, vec![12287], 8192..12288),
            (8192, 512, vec![12288], 8192..16384),
            (8192 + 512, 512, vec![8192], 8192..9216),
            // Read in two parts.
            (4096, 40960, vec![1, 45056], 0..49152),
            (4096, 40960, vec![], 4096..45056),
            (0, CLUSTER, vec![], 0..CLUSTER),
        ] {
            let mut fill = copied(from, len, &ones);
            assert_eq!(fill.extent(), want, "{from}+{len} {ones:?}");
            fill.zeroed = false;
            assert_eq!(fill.extent(), 0..CLUSTER, "the cluster holds anything");
        }
    }

    #[test]
    fn requests_join_where_nobody_writes_yet() {
        let mut fill = copied(8192, 4096, &[]);
        for (at, len, room) in [
            (0, 4096, 4096),
            (4096, 8192, 4096),
            (8192, 4096, 0),
            (12288, 4096, 4096),
            (60 << 10, 8192, 4096),
            (CLUSTER, 4096, 0),
        ] {
            assert_eq!(fill.room(GuestOffset(at), len), room, "{at}+{len}");
        }
        // What is not filled must stay one run.
        fill.fill = Fill::Zero;
        assert_eq!(fill.room(GuestOffset(0), 4096), 0);
        assert_eq!(fill.room(GuestOffset(4096), 4096), 4096);
        fill.zeroed = false;
        assert_eq!(fill.room(GuestOffset(0), 4096), 4096);
        fill.phase = Phase::Writing;
        assert_eq!(fill.room(GuestOffset(0), 4096), 0);
    }
}
