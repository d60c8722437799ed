//! What the lock guards: bitmaps in memory, space, allocations in flight, and what a flush must write.

use super::Vhd;
use super::tables::NONE;
use crate::metadata::bitmaps::{Busy, Uses};
use crate::metadata::{Ask, Halt, Sectors, Space, Span, Strides, Tickets};
use crate::{Foreseen, Key, Load, Need, Reserve};
use block::{Result, Zeroed};
use std::sync::atomic::Ordering;

/// Bytes of bitmaps of new blocks that may wait for a flush: what a run's memory is bounded by.
const WAITING_BYTES_MAX: u64 = 4 << 20;

/// What blocks are aligned to, so that `O_DIRECT` takes their data; as XenServer's tools do.
const ALIGN: u64 = 4096;

/// Bytes behind the last reserved block: so that what a crash leaves at the end of the file is no guest's.
const TAIL: u64 = 4096;

/// Blocks of up to so many bytes get their space when they are reserved. Larger ones are holes until they are written, as
/// QEMU leaves them.
const WHOLE_BYTES_MAX: u64 = 64 << 10;

const KEY_RESERVE: u64 = 4 << 60;

/// Sectors of the disk that are being written for the first time.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) start: u64,
    pub(super) count: u64,
    /// The frame with their bits, pinned.
    pub(super) frame: u32,
}

impl Span for Pending {
    fn units(&self) -> (u64, u64) {
        (self.start, self.count)
    }
}

/// What the lock guards.
#[derive(Debug)]
pub(super) struct State {
    pub(super) uses: Uses,
    pub(super) tickets: Tickets<Pending>,
    pub(super) space: Space,
    /// New blocks, whose bitmaps and entries no flush has written.
    pub(super) births: Vec<u64>,
    /// Those that a flush under way writes.
    pub(super) births_flushing: Vec<u64>,
    /// Sectors of the table that differ from the file.
    pub(super) table: Sectors,
    /// Blocks were added since the image was opened.
    pub(super) grown: bool,
}

impl State {
    pub(super) fn new(frames: usize, blocks: u64, space: Space) -> Self {
        Self {
            uses: Uses::new(frames),
            tickets: Tickets::new(),
            space,
            births: Vec::new(),
            births_flushing: Vec::new(),
            table: Sectors::new(blocks.div_ceil(128) as usize),
            grown: false,
        }
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.births.is_empty() || self.table.any() || !self.uses.dirty().is_empty()
    }

    /// What keeps frames of bitmaps busy.
    fn busy(&self) -> Busy {
        Busy {
            dirty: self.is_dirty(),
            ticket: self.tickets.any_key(),
        }
    }

    /// Notes that the entry of `block` is to be written.
    pub(super) fn mark_table(&mut self, block: u64) {
        // Entries are of 32 bits, two to a word.
        self.table.mark_entry((block / 2) as usize);
    }
}

impl Vhd {
    /// The frame with the bitmap of a block that is there, which is not whole.
    pub(super) fn frame_of(&self, st: &mut State, block: u64) -> Ask<u32> {
        let busy = st.busy();
        st.uses.frame_of(&self.tables.bitmaps, block, busy, || {
            // Bitmaps are of at most 512 KiB.
            Ok((self.bitmap_offset(block)?, self.bitmap_bytes as u32))
        })
    }

    /// Takes a bitmap in.
    pub(super) fn end_load(&self, st: &mut State, load: &Load, bytes: Option<&[u8]>) -> Result<()> {
        let Some((block, frame)) = st.uses.loaded(&self.tables.bitmaps, load, bytes) else {
            return Err(block::Error::invalid(format!(
                "{}: a load nobody asked for",
                self.name
            )));
        };
        if bytes.is_some() {
            self.see_whole(block, frame);
        }
        Ok(())
    }

    /// Notes whether the image has all sectors of a block now.
    pub(super) fn see_whole(&self, block: u64, frame: u32) {
        let sectors = self.sectors_of(block);
        let frame = self.tables.bitmaps.frame(frame);
        let run = frame.map(|f| f.run(0, sectors));
        if run.is_some_and(|run| run.present && run.sectors == sectors) {
            self.tables.set_whole(block);
        }
    }

    /// Makes `block` a block of the image. With `whole` all its sectors are, and read as zeros until they are written;
    /// otherwise none is yet. Whether its data read as zeros.
    pub(super) fn bear(&self, st: &mut State, block: u64, whole: bool) -> Ask<bool> {
        let waiting = (st.births.len() as u64 + 1) * self.bitmap_bytes;
        if waiting > WAITING_BYTES_MAX.max(self.bitmap_bytes) {
            return Err(Halt::Need(Need::Commit));
        }
        let at = self.place_at(st.space.next);
        let end = at + self.bitmap_bytes + self.block_bytes;
        if end > st.space.end {
            return Err(match st.space.reserving {
                true => Halt::Wait(Key(KEY_RESERVE)),
                false => Halt::Need(Need::Reserve(self.reserve(st, at)?)),
            });
        }
        let entry = self.entry_of(at)?;
        let zeros = at + self.bitmap_bytes >= st.space.zeros_from;
        if whole && zeros {
            self.tables.set_whole(block);
        } else {
            let busy = st.busy();
            st.uses.bear(&self.tables.bitmaps, block, busy)?;
        }
        st.space.next = end;
        st.space.blocks += 1;
        st.grown = true;
        st.births.push(block);
        st.mark_table(block);
        self.tables.set_entry(block, entry);
        if st.space.is_short(&self.strides()) {
            self.ahead.store(true, Ordering::Relaxed);
        }
        Ok(zeros)
    }

    fn strides(&self) -> Strides {
        let span = self.block_bytes + self.bitmap_bytes;
        Strides {
            holes: self.block_bytes > WHOLE_BYTES_MAX,
            key: Key(KEY_RESERVE),
            block: self.block_bytes,
            span,
            stride: span + ALIGN,
            tail: TAIL,
        }
    }

    /// Where a block begins whose bitmap may begin at `next`: so that its data are aligned.
    fn place_at(&self, next: u64) -> u64 {
        let align = ALIGN.min(self.block_bytes);
        block::align_up(next + self.bitmap_bytes, align) - self.bitmap_bytes
    }

    fn entry_of(&self, at: u64) -> Result<u32> {
        let entry = u32::try_from(at / 512).ok().filter(|entry| *entry != NONE);
        entry.ok_or_else(|| {
            block::Error::new(
                block::ErrorKind::NoSpace,
                format!(
                    "{}: the file is full: a block at byte {at:#x} has no number in the table",
                    self.name
                ),
            )
        })
    }

    /// Space for the next blocks, of which the first begins at `at`.
    fn reserve(&self, st: &mut State, at: u64) -> Result<Reserve> {
        self.entry_of(at)?;
        let left = self.tables.blocks().saturating_sub(st.space.blocks).max(1);
        Ok(st.space.reserve(&self.strides(), at, left))
    }

    /// What will be lacking soon.
    pub(super) fn reserve_ahead(&self, st: &mut State) -> Option<Foreseen> {
        let at = st.space.end.max(self.place_at(st.space.next));
        self.entry_of(at).ok()?;
        let left = self.tables.blocks().saturating_sub(st.space.blocks);
        st.space.ahead(&self.strides(), at, left)
    }

    /// A reservation ended; `None` when the space could not be had.
    pub(super) fn end_reserve(&self, st: &mut State, reserve: &Reserve, zeroed: Option<Zeroed>) {
        st.space.ended(&self.strides(), reserve, zeroed);
    }
}
