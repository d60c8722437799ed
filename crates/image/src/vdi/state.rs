//! What the lock guards: space, allocations in flight, and what a flush must write.

use super::Vdi;
use super::header::Header;
use super::holes::Holes;
use crate::metadata::bitmaps::{Busy, Uses};
use crate::metadata::{Ask, Halt, Space, Span, Strides, Tickets, key_of};
use crate::{Allocation, FileId, Fill, Foreseen, Key, Need, Plan, Reserve, Ticket};
use block::{Error, ErrorKind, GuestOffset, HostOffset, Zeroed};
use std::sync::atomic::Ordering;

const KEY_RESERVE: u64 = 4 << 60;

/// A block that is being written for the first time, where the file does not read as zeros.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) block: u64,
    pub(super) entry: u32,
    /// The frame with its entry, pinned.
    pub(super) frame: u32,
}

impl Span for Pending {
    fn units(&self) -> (u64, u64) {
        (self.block, 1)
    }
}

/// What the lock guards.
#[derive(Debug)]
pub(super) struct State {
    pub(super) tickets: Tickets<Pending>,
    pub(super) space: Space,
    /// Numbers of blocks that nothing refers to, below the highest in use.
    pub(super) holes: Holes,
    /// What the frames with pages of the map are used for.
    pub(super) uses: Uses,
    /// The header, with the blocks that it is to count.
    pub(super) header: Header,
    /// It counts others in the file.
    pub(super) count_dirty: bool,
    /// A flush under way writes it.
    pub(super) count_flushing: bool,
    /// Blocks were added behind the last one since the image was opened.
    pub(super) grown: bool,
}

impl State {
    /// Of an image with numbers below `end` in use, and so many frames.
    pub(super) fn new(
        header: &Header,
        end: u32,
        holes: Holes,
        space: Space,
        frames: usize,
    ) -> Self {
        let counted = header.allocated;
        Self {
            tickets: Tickets::new(),
            space,
            holes,
            uses: Uses::new(frames),
            header: Header {
                allocated: counted.max(end),
                ..header.clone()
            },
            // Others would put their next block on one that is there.
            count_dirty: counted < end,
            count_flushing: false,
            grown: false,
        }
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.count_dirty || !self.uses.dirty().is_empty()
    }

    /// What keeps frames busy.
    pub(super) fn busy(&self) -> Busy {
        Busy {
            dirty: self.is_dirty(),
            ticket: self.tickets.any_key(),
        }
    }
}

impl Vdi {
    fn strides(&self) -> Strides {
        let block = self.block_bytes();
        Strides {
            holes: false,
            key: Key(KEY_RESERVE),
            block,
            span: block,
            stride: block,
            tail: 0,
        }
    }

    /// Adds `block` to the image, in which it is not. It is the guest's at once where the file reads as zeros, otherwise
    /// when the allocation is committed.
    pub(super) fn bear(&self, st: &mut State, block: u64, within: u64, len: u64) -> Ask<Plan> {
        if let Some(key) = st.tickets.busy(block) {
            return Err(Halt::Wait(key));
        }
        let frame = self.page_of(st, block)?;
        if let Some(entry) = st.holes.lowest() {
            let pending = Pending {
                block,
                entry,
                frame,
            };
            let plan = self.allocate(st, pending, within, len)?;
            st.holes.remove(entry);
            return Ok(plan);
        }
        let at = st.space.next;
        let end = at + self.block_bytes();
        let entry = self.entry_of(at)?;
        if end > st.space.end {
            return Err(match st.space.reserving {
                true => Halt::Wait(Key(KEY_RESERVE)),
                false => Halt::Need(Need::Reserve(self.reserve(st, at))),
            });
        }
        let plan = match at >= st.space.zeros_from {
            true => {
                self.admit(st, block, entry, frame);
                Plan::InPlace {
                    file: FileId::IMAGE,
                    offset: HostOffset(at + within),
                    len,
                }
            }
            false => {
                let pending = Pending {
                    block,
                    entry,
                    frame,
                };
                self.allocate(st, pending, within, len)?
            }
        };
        st.space.next = end;
        st.space.blocks += 1;
        st.grown = true;
        if st.space.is_short(&self.strides()) {
            self.ahead.store(true, Ordering::Relaxed);
        }
        Ok(plan)
    }

    /// The number of a block that begins at `at`, which is behind all others.
    fn entry_of(&self, at: u64) -> Ask<u32> {
        let index = (at - self.data_offset) >> self.block_bits;
        let entry = u32::try_from(index).ok();
        let entry = entry.filter(|entry| *entry < self.header.blocks);
        entry.ok_or_else(|| {
            // There are as many numbers as blocks: holes that are too large to be filled have the others.
            let text = format!(
                "{}: the file is full of blocks that nothing refers to: run diskplane check --repair leaks",
                self.name
            );
            Halt::Fail(Error::new(ErrorKind::NoSpace, text))
        })
    }

    /// The whole of a block, as an allocation.
    fn allocate(&self, st: &mut State, pending: Pending, within: u64, len: u64) -> Ask<Plan> {
        let Pending {
            block,
            entry,
            frame,
        } = pending;
        let block_bytes = self.block_bytes();
        if st.tickets.is_full() {
            let none = || Halt::Fail(Error::corrupt("no room for an allocation"));
            return Err(st.tickets.any_key().map_or_else(none, Halt::Wait));
        }
        let Some(ticket) = st.tickets.add(pending) else {
            return Err(Halt::Fail(Error::corrupt("no room for an allocation")));
        };
        st.uses.pin(frame, true);
        Ok(Plan::Allocate(Allocation {
            ticket,
            key: key_of(ticket),
            file: FileId::IMAGE,
            host: HostOffset(self.data_offset + u64::from(entry) * block_bytes),
            start: GuestOffset(block << self.block_bits),
            len: block_bytes,
            write_len: len.min(block_bytes - within),
            zeroed: false,
            fill: Fill::Zero,
        }))
    }

    /// The block is the guest's.
    fn admit(&self, st: &mut State, block: u64, entry: u32, frame: u32) {
        if entry >= st.header.allocated {
            st.header.allocated = entry + 1;
            st.count_dirty = true;
        }
        self.set_entry(st, frame, block, entry);
    }

    pub(super) fn end_ticket(&self, st: &mut State, ticket: Ticket, written: bool) {
        let Some(pending) = st.tickets.remove(ticket) else {
            debug_assert!(false, "a ticket that is not in flight");
            return;
        };
        st.uses.pin(pending.frame, false);
        match written {
            true => self.admit(st, pending.block, pending.entry, pending.frame),
            false => st.holes.insert(pending.entry),
        }
    }

    /// Space for the next blocks, of which the first begins at `at`.
    fn reserve(&self, st: &mut State, at: u64) -> Reserve {
        let left = self.lacking(st).max(1);
        st.space.reserve(&self.strides(), at, left)
    }

    /// Blocks of the disk that are not there.
    fn lacking(&self, st: &State) -> u64 {
        u64::from(self.header.blocks).saturating_sub(st.space.blocks)
    }

    /// What will be lacking soon.
    pub(super) fn reserve_ahead(&self, st: &mut State) -> Option<Foreseen> {
        let at = st.space.end.max(st.space.next);
        self.entry_of(at).ok()?;
        let left = self.lacking(st);
        st.space.ahead(&self.strides(), at, left)
    }

    /// A reservation ended; `None` when the space could not be had.
    pub(super) fn end_reserve(&self, st: &mut State, reserve: &Reserve, zeroed: Option<Zeroed>) {
        st.space.ended(&self.strides(), reserve, zeroed);
    }
}
