//! What the lock guards: bitmaps in memory, space, allocations in flight, and what a flush must write.

use super::Vhd;
use super::tables::NONE;
use crate::metadata::{Ask, Halt, Sectors, Space, Span, Strides, Tickets};
use crate::{FileId, Key, Load, Need, Reserve};
use block::{HostOffset, Result, Zeroed};
use std::sync::atomic::Ordering;

/// Bytes of bitmaps of new blocks that may wait for a flush: what a run's memory is bounded by.
const WAITING_BYTES_MAX: u64 = 4 << 20;

/// What blocks are aligned to, so that `O_DIRECT` takes their data; as XenServer's tools do.
const ALIGN: u64 = 4096;

/// Bytes behind the last reserved block: so that what a crash leaves at the end of the file is no guest's.
const TAIL: u64 = 4096;

const KEY_LOAD: u64 = 1 << 60;
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

/// What a frame is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Use {
    /// Whose bitmap it is.
    pub(super) block: Option<u64>,
    /// Its bitmap is being read.
    pub(super) loading: bool,
    /// Allocations in flight that will set bits.
    pub(super) pins: u32,
    /// Its block is new: no flush has written the entry.
    pub(super) born: bool,
    /// It has bits that no flush has written.
    pub(super) dirty: bool,
    /// A flush under way writes it.
    pub(super) flushing: bool,
}

/// What the lock guards.
#[derive(Debug)]
pub(super) struct State {
    pub(super) uses: Vec<Use>,
    hand: usize,
    pub(super) tickets: Tickets<Pending>,
    pub(super) space: Space,
    /// New blocks, whose bitmaps and entries no flush has written.
    pub(super) births: Vec<u64>,
    /// Those that a flush under way writes.
    pub(super) births_flushing: Vec<u64>,
    /// Sectors of the table that differ from the file.
    pub(super) table: Sectors,
    /// Frames to write, in no order.
    pub(super) frames_dirty: Vec<u32>,
    pub(super) frames_flushing: Vec<u32>,
    /// Blocks were added since the image was opened.
    pub(super) grown: bool,
}

impl State {
    pub(super) fn new(frames: usize, blocks: u64, space: Space) -> Self {
        Self {
            uses: vec![Use::default(); frames],
            hand: 0,
            tickets: Tickets::new(),
            space,
            births: Vec::new(),
            births_flushing: Vec::new(),
            table: Sectors::new(blocks.div_ceil(128) as usize),
            frames_dirty: Vec::new(),
            frames_flushing: Vec::new(),
            grown: false,
        }
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.births.is_empty() || self.table.any() || !self.frames_dirty.is_empty()
    }

    /// Notes that a frame has bits to write.
    pub(super) fn mark_frame(&mut self, frame: u32) {
        let Some(used) = self.uses.get_mut(frame as usize) else {
            return;
        };
        if !used.dirty {
            used.dirty = true;
            self.frames_dirty.push(frame);
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
        if let Some(frame) = self.tables.slot(block)
            && let Some(used) = st.uses.get(frame as usize)
        {
            return match used.loading {
                true => Err(Halt::Wait(Key(KEY_LOAD | block))),
                false => Ok(frame),
            };
        }
        let offset = self.bitmap_offset(block)?;
        self.take_frame(st, block, true)?;
        Err(Halt::Need(Need::Load(Load {
            key: Key(KEY_LOAD | block),
            file: FileId::IMAGE,
            offset: HostOffset(offset),
            // Bitmaps are of at most 512 KiB.
            len: self.bitmap_bytes as u32,
        })))
    }

    /// A frame for the bitmap of `block`, with no bits set.
    fn take_frame(&self, st: &mut State, block: u64, loading: bool) -> Ask<u32> {
        let frames = st.uses.len();
        // Twice round: the first one takes the marks away.
        for _ in 0..frames * 2 {
            let index = st.hand;
            st.hand = (st.hand + 1) % frames;
            let Some(used) = st.uses.get_mut(index) else {
                continue;
            };
            if used.loading || used.pins > 0 || used.dirty || used.flushing {
                continue;
            }
            let Some(frame) = self.tables.frames.get(index) else {
                continue;
            };
            if used.block.is_some() && frame.was_used() {
                continue;
            }
            if let Some(old) = used.block.take() {
                self.tables.set_slot(old, NONE);
            }
            *used = Use {
                block: Some(block),
                loading,
                ..Use::default()
            };
            match loading {
                true => frame.close(),
                false => frame.fill(block as u32, &[], self.bitmap_words),
            }
            self.tables.set_slot(block, index as u32);
            return Ok(index as u32);
        }
        // All have bits that are not written or will be set.
        match st.is_dirty() {
            true => Err(Halt::Need(Need::Commit)),
            false => match st.tickets.any_key() {
                Some(key) => Err(Halt::Wait(key)),
                None => match st.uses.iter().find_map(|u| u.block.filter(|_| u.loading)) {
                    Some(block) => Err(Halt::Wait(Key(KEY_LOAD | block))),
                    // A flush under way writes them.
                    None => Err(Halt::Need(Need::Commit)),
                },
            },
        }
    }

    /// Takes a bitmap in.
    pub(super) fn end_load(&self, st: &mut State, load: &Load, bytes: Option<&[u8]>) -> Result<()> {
        let block = load.key.0 & !(15 << 60);
        let slot = self.tables.slot(block).filter(|_| load.key.0 >> 60 == 1);
        let used = slot.and_then(|slot| Some((slot, st.uses.get_mut(slot as usize)?)));
        let Some((slot, used)) = used.filter(|(_, used)| used.loading) else {
            return Err(block::Error::invalid(format!(
                "{}: a load nobody asked for",
                self.name
            )));
        };
        let Some(bytes) = bytes else {
            *used = Use::default();
            self.tables.set_slot(block, NONE);
            return Ok(());
        };
        used.loading = false;
        if let Some(frame) = self.tables.frames.get(slot as usize) {
            frame.fill(block as u32, bytes, self.bitmap_words);
            self.see_whole(block, slot);
        }
        Ok(())
    }

    /// Notes whether the image has all sectors of a block now.
    pub(super) fn see_whole(&self, block: u64, frame: u32) {
        let sectors = self.sectors_of(block);
        let run = self
            .tables
            .frames
            .get(frame as usize)
            .map(|f| f.run(0, sectors));
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
            let frame = self.take_frame(st, block, false)?;
            if let Some(used) = st.uses.get_mut(frame as usize) {
                used.born = true;
            }
            st.mark_frame(frame);
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
    pub(super) fn reserve_ahead(&self, st: &mut State) -> Option<Need> {
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
