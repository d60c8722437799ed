//! Blocks that are there in part ([MS-VHDX] 2.4): which of their sectors the image has.
//!
//! ```text
//!   sector bitmap block of a chunk, 1 MiB   │ page │ page │ …   of 4 KiB: 2^15 sectors each, the lowest bit of a byte first
//! ```
//!
//! Bits of blocks that are not there in part do not count, whatever they are: they are cleared before one becomes
//! such a block.

use super::Vhdx;
use super::bat::{self, Entry};
use super::log::SECTOR;
use super::map::Place;
use super::state::{PAGE_SECTORS, Pending, State};
use crate::metadata::{Ask, Halt, key_of};
use crate::{Allocation, FileId, Fill, Load, Plan, Ticket};
use block::{Error, GuestOffset, HostOffset, Result};

/// Bytes of the largest allocation.
const ALLOCATION_BYTES_MAX: u64 = 2 << 20;

/// Bytes from a place on that are all in the image, or all not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bits {
    pub(super) present: bool,
    pub(super) bytes: u64,
}

impl Vhdx {
    /// Bytes of a logical sector.
    fn sector_bytes(&self) -> u64 {
        1 << self.sector_bits
    }

    /// The first sector of the disk that a place is in, and the one behind its last.
    fn sectors(&self, place: &Place) -> (u64, u64) {
        let at = (place.block << self.block_bits) + place.within;
        let end = (at + place.len).div_ceil(self.sector_bytes());
        (at >> self.sector_bits, end)
    }

    /// The sectors of the disk that a block has: fewer in the last.
    fn sectors_of(&self, block: u64) -> (u64, u64) {
        let start = block << self.block_bits;
        let end = (start + (1 << self.block_bits)).min(self.size);
        (start >> self.sector_bits, end.div_ceil(self.sector_bytes()))
    }

    /// Where in the file a page is; `None` where its chunk has no sector bitmap.
    pub(super) fn page_offset(&self, page: u64) -> Option<u64> {
        // A chunk has 2^23 sectors, and so 256 pages.
        let entry = self.bat.get(self.bat.bitmap_index(page >> 8));
        let there = entry.state() == Some(bat::PRESENT);
        there.then(|| entry.offset() + (page & 255) * SECTOR as u64)
    }

    /// The frame with a page.
    fn page(&self, st: &mut State, page: u64) -> Ask<u32> {
        let busy = st.busy();
        st.uses.frame_of(&self.bitmaps, page, busy, || {
            let offset = self.page_offset(page).ok_or_else(|| {
                Error::corrupt(format!(
                    "{}: chunk {} has blocks that are there in part, and no sector bitmap",
                    self.name,
                    page >> 8
                ))
            })?;
            Ok((offset, SECTOR as u32))
        })
    }

    /// Which page a place is in, and which of its bits: the first, and the one behind the last.
    fn in_page(&self, place: &Place) -> (u64, u64, u64) {
        let (first, end) = self.sectors(place);
        let page = first / PAGE_SECTORS;
        let to = (end - page * PAGE_SECTORS).min(PAGE_SECTORS);
        (page, first % PAGE_SECTORS, to)
    }

    /// What the image has of a place whose block is there in part; `None` where that is not in memory. Takes no lock.
    pub(super) fn bits_in_memory(&self, place: &Place) -> Option<Bits> {
        let (page, from, to) = self.in_page(place);
        let run = self.bitmaps.run(page, from, to)?;
        Some(Bits {
            present: run.present,
            bytes: self.bytes(place, run.sectors),
        })
    }

    /// The same, with what is lacking to answer.
    pub(super) fn bits(&self, place: &Place) -> Ask<Bits> {
        if let Some(bits) = self.bits_in_memory(place) {
            return Ok(bits);
        }
        let (page, from, to) = self.in_page(place);
        let frame = self.page(&mut self.lock(), page)?;
        let run = self.bitmaps.frame(frame).map(|frame| frame.run(from, to));
        Ok(Bits {
            present: run.is_some_and(|run| run.present),
            bytes: self.bytes(place, run.map_or(to - from, |run| run.sectors)),
        })
    }

    /// How many of a place's bytes are in the first `sectors` of its sectors.
    fn bytes(&self, place: &Place, sectors: u64) -> u64 {
        let skip = place.within & (self.sector_bytes() - 1);
        ((sectors << self.sector_bits) - skip).min(place.len)
    }

    /// Sees to it that no bit of a block is set that is not there.
    pub(super) fn clear_bits(&self, st: &mut State, block: u64) -> Ask<()> {
        let (first, end) = (
            block << (self.block_bits - self.sector_bits),
            (block + 1) << (self.block_bits - self.sector_bits),
        );
        let mut at = first;
        while at < end {
            let page = at / PAGE_SECTORS;
            let to = end.min((page + 1) * PAGE_SECTORS);
            // A sector bitmap that is not there will be zeros.
            if self.page_offset(page).is_some()
                && (page * PAGE_SECTORS) << self.sector_bits < self.size
            {
                st.admit()?;
                let frame = self.page(st, page)?;
                let (from, to) = (at - page * PAGE_SECTORS, to - page * PAGE_SECTORS);
                if let Some(bits) = self.bitmaps.frame(frame) {
                    let run = bits.run(from, to);
                    if run.present || run.sectors < to - from {
                        bits.clear(from, to);
                        st.uses.mark(frame);
                    }
                }
            }
            at = to;
        }
        Ok(())
    }

    /// Plans to write into sectors that the image does not have yet, of a block that is at `offset` of the file.
    pub(super) fn allocate(&self, st: &mut State, place: &Place, offset: u64) -> Ask<Plan> {
        let (page, from, to) = self.in_page(place);
        let first = page * PAGE_SECTORS + from;
        let frame = self.page(st, page)?;
        let run = self.bitmaps.frame(frame).map(|bits| bits.run(from, to));
        let sectors = run.map_or(to - from, |run| run.sectors);
        if run.is_some_and(|run| run.present) {
            return Ok(Plan::InPlace {
                file: FileId::IMAGE,
                offset: HostOffset(offset + place.within),
                len: self.bytes(place, sectors),
            });
        }
        if let Some(key) = st.tickets.busy(first) {
            return Err(Halt::Wait(key));
        }
        if st.tickets.is_full() {
            return Err(st.tickets.any_key().map_or(
                Halt::Fail(Error::corrupt("no room for an allocation")),
                Halt::Wait,
            ));
        }
        st.admit()?;
        let free = st.tickets.next_start(first) - first;
        let most = ALLOCATION_BYTES_MAX >> self.sector_bits;
        let count = sectors.min(free).min(most);
        let pending = Pending {
            start: first,
            count,
            frame,
        };
        let Some(ticket) = st.tickets.add(pending) else {
            return Err(Halt::Fail(Error::corrupt("no room for an allocation")));
        };
        st.in_flight += 1;
        st.uses.pin(frame, true);
        let skip = place.within & (self.sector_bytes() - 1);
        Ok(Plan::Allocate(Allocation {
            ticket,
            key: key_of(ticket),
            file: FileId::IMAGE,
            host: HostOffset(offset + place.within - skip),
            start: GuestOffset(first << self.sector_bits),
            len: count << self.sector_bits,
            write_len: self.bytes(place, count),
            zeroed: false,
            fill: Fill::Existing,
        }))
    }

    pub(super) fn end_ticket(&self, st: &mut State, ticket: Ticket, written: bool) {
        let Some(pending) = st.tickets.remove(ticket) else {
            debug_assert!(false, "a ticket that is not in flight");
            return;
        };
        st.in_flight = st.in_flight.saturating_sub(1);
        st.uses.pin(pending.frame, false);
        if !written {
            return;
        }
        let from = pending.start % PAGE_SECTORS;
        if let Some(bits) = self.bitmaps.frame(pending.frame) {
            bits.set(from, from + pending.count);
        }
        st.uses.mark(pending.frame);
        self.see_whole(st, pending.start >> (self.block_bits - self.sector_bits));
    }

    /// Makes a block that has all its bits one that is there as a whole. Where some are not in memory it stays as it is.
    fn see_whole(&self, st: &mut State, block: u64) {
        let (mut at, end) = self.sectors_of(block);
        while at < end {
            let page = at / PAGE_SECTORS;
            let to = end.min((page + 1) * PAGE_SECTORS);
            let (from, sectors) = (at - page * PAGE_SECTORS, to - at);
            let run = self.bitmaps.run(page, from, from + sectors);
            if run.is_none_or(|run| !run.present || run.sectors < sectors) {
                return;
            }
            at = to;
        }
        let index = self.bat.index(block);
        let entry = self.bat.get(index);
        if entry.state() == Some(bat::PARTIAL) {
            self.put_entry_at(st, index, Entry::new(bat::PRESENT, entry.offset()));
        }
    }

    /// Takes a page in.
    pub(super) fn end_load(&self, st: &mut State, load: &Load, bytes: &[u8]) -> Result<()> {
        let mut page = [0; SECTOR];
        let there = page.len().min(bytes.len());
        page[..there].copy_from_slice(&bytes[..there]);
        self.layout.patch(load.offset.0, &mut page);
        match st.uses.loaded(&self.bitmaps, load, Some(&page)) {
            Some(_) => Ok(()),
            None => Err(Error::invalid(format!(
                "{}: a load nobody asked for",
                self.name
            ))),
        }
    }
}
