//! What the lock guards: space, what a flush must write, and how far the log is.

use super::bat::{self, Entry};
use super::guid::Guid;
use super::header::{Header, Headers};
use super::log::{SECTOR, SECTORS_MAX};
use super::{FILE_BYTES_MAX, MIB, Vhdx};
use crate::metadata::bitmaps::{Busy, Uses};
use crate::metadata::{Ask, Halt, Span, Tickets};
use crate::{FileId, Foreseen, Key, Need, Reserve};
use block::{Error, ErrorKind, HostOffset, Zeroed};
use std::sync::atomic::Ordering;

/// Bytes that are reserved at the end of the file at once, at most: an eighth of what the image has.
const RESERVE_BYTES_MAX: u64 = 64 << 20;

/// Blocks of up to so many bytes get their space when they are reserved, so that a guest that is given one never lacks
/// it. Larger ones are holes until they are written, or an image would take many times the space of its data.
const WHOLE_BYTES_MAX: u64 = 2 * MIB;

/// Bytes at the end of the last of several such blocks that are allocated, to make the file as long.
const TAIL: u64 = 4096;

const KEY_RESERVE: u64 = 4 << 60;

/// Space behind the last block.
#[derive(Debug)]
pub(super) struct Space {
    /// Where the next block begins.
    pub(super) next: u64,
    /// End of what is reserved.
    pub(super) end: u64,
    /// How long the file is, at least.
    pub(super) file_bytes: u64,
    /// A reservation is under way.
    reserving: bool,
    /// Blocks to reserve at once, fewer after a failure.
    most: u64,
    /// The last one was of space that may hold anything.
    unclean: bool,
    /// Payload blocks of the image.
    pub(super) blocks: u64,
}

impl Space {
    /// Behind what is in use, and behind the file's end: what is there may hold anything.
    pub(super) fn new(used_end: u64, file_bytes: u64, blocks: u64) -> Self {
        let next = used_end.max(file_bytes).next_multiple_of(MIB);
        Self {
            next,
            end: next,
            file_bytes,
            reserving: false,
            most: u64::MAX,
            unclean: false,
            blocks,
        }
    }
}

/// Sectors that one answer changes at most: a page of each of a block's 16, and two of the table.
const ADMITTED: usize = 20;

/// Sectors of the disk that a page of 4 KiB of its bitmap has.
pub(super) const PAGE_SECTORS: u64 = 4096 * 8;

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

/// Numbers of things that changed, each once.
#[derive(Debug, Default)]
pub(super) struct Marks {
    bits: Vec<u64>,
    list: Vec<u32>,
}

impl Marks {
    pub(super) fn new(count: u64) -> Self {
        Self {
            bits: vec![0; count.div_ceil(64) as usize],
            list: Vec::new(),
        }
    }

    pub(super) fn mark(&mut self, number: u64) {
        let Some(word) = self.bits.get_mut((number / 64) as usize) else {
            return;
        };
        if *word >> (number % 64) & 1 == 0 {
            *word |= 1 << (number % 64);
            // Tables have fewer sectors than 2^32.
            self.list.push(number as u32);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Takes all of them out, in order.
    fn take(&mut self, into: &mut Vec<u32>) {
        into.clear();
        std::mem::swap(into, &mut self.list);
        into.sort_unstable();
        for number in into.iter() {
            if let Some(word) = self.bits.get_mut(*number as usize / 64) {
                *word &= !(1 << (number % 64));
            }
        }
    }
}

/// What a flush under way writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Running {
    /// Nothing.
    Barrier,
    /// A header that says that the file changes.
    Announcement,
    /// An entry of the log.
    Entry,
}

/// What the lock guards.
#[derive(Debug)]
pub(super) struct State {
    pub(super) space: Space,
    pub(super) headers: Headers,
    /// The header that counted when the flush under way began, and which it was.
    pub(super) header_before: (Header, usize),
    /// The other header says something else.
    pub(super) header_lags: bool,
    /// Somebody waits for the headers to say that the file changes.
    pub(super) wants_announcing: bool,
    pub(super) running: Running,
    /// New GUIDs of this opening: for the file, for the data, for the log.
    pub(super) guids: [Guid; 3],
    /// Sequence number of the next entry.
    pub(super) sequence: u64,
    /// In which half of the log the next entry goes: the other has the one that counts.
    pub(super) half: u32,
    /// Sectors of the table that changed since they were last logged.
    pub(super) dirty: Marks,
    /// Those of the flush under way.
    pub(super) flushing: Vec<u32>,
    /// Frames of the sector bitmaps.
    pub(super) uses: Uses,
    /// Writes into sectors that the image does not have yet.
    pub(super) tickets: Tickets<Pending>,
    /// How many.
    pub(super) in_flight: usize,
    /// What the log's entry that counts says: is not yet in its place.
    pub(super) logged: Vec<(u64, [u8; SECTOR])>,
    /// What the entry of the flush under way says.
    pub(super) logging: Vec<(u64, [u8; SECTOR])>,
}

impl State {
    pub(super) fn new(
        headers: Headers,
        guids: [Guid; 3],
        sectors: u64,
        space: Space,
        frames: usize,
    ) -> Self {
        Self {
            space,
            uses: Uses::new(frames),
            tickets: Tickets::new(),
            in_flight: 0,
            header_before: (headers.current.clone(), headers.index),
            headers,
            header_lags: false,
            wants_announcing: false,
            running: Running::Barrier,
            guids,
            sequence: 1,
            half: 0,
            dirty: Marks::new(sectors),
            flushing: Vec::new(),
            logged: Vec::new(),
            logging: Vec::new(),
        }
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.len() + self.uses.dirty().len() > 0
    }

    /// Sectors that the next entry of the log may have: those that changed, and what writes under way may change, a page
    /// and the sector with the block's entry for each.
    fn to_log(&self) -> usize {
        self.dirty.len() + self.uses.dirty().len() + 2 * self.in_flight
    }

    /// What keeps frames of bitmaps busy.
    pub(super) fn busy(&self) -> Busy {
        Busy {
            dirty: self.is_dirty(),
            ticket: self.tickets.any_key(),
        }
    }

    /// Halts where the next entry of the log would become too long.
    pub(super) fn admit(&self) -> Ask<()> {
        if self.to_log() + ADMITTED <= SECTORS_MAX {
            return Ok(());
        }
        match (self.is_dirty(), self.tickets.any_key()) {
            (false, Some(key)) => Err(Halt::Wait(key)),
            _ => Err(Halt::Need(Need::Commit)),
        }
    }

    /// Takes what a flush is to write.
    pub(super) fn take_dirty(&mut self) {
        let mut flushing = std::mem::take(&mut self.flushing);
        self.dirty.take(&mut flushing);
        self.flushing = flushing;
        self.uses.begin_flush();
    }

    /// The flush ended: what it was to write is dirty again where it failed.
    pub(super) fn end_dirty(&mut self, ok: bool) {
        self.uses.end_logging(ok);
        let mut flushing = std::mem::take(&mut self.flushing);
        if !ok {
            for sector in &flushing {
                self.dirty.mark(u64::from(*sector));
            }
        }
        flushing.clear();
        self.flushing = flushing;
    }
}

impl Vhdx {
    fn block_bytes(&self) -> u64 {
        1 << self.block_bits
    }

    /// Makes `block` a block of the image, there in part or whole: where it is in the file, which reads as zeros there.
    pub(super) fn bear(&self, st: &mut State, block: u64, state: u32) -> Ask<u64> {
        st.admit()?;
        let chunk = self
            .bat
            .bitmap_index(block >> self.layout.metadata.chunk_bits());
        let lacks_bits = state == bat::PARTIAL && self.bat.get(chunk).state() != Some(bat::PRESENT);
        let bits = if lacks_bits { MIB } else { 0 };
        let at = st.space.next + bits;
        let end = at + self.block_bytes();
        if end > st.space.end {
            return Err(match st.space.reserving {
                true => Halt::Wait(Key(KEY_RESERVE)),
                false => Halt::Need(Need::Reserve(self.reserve(st, at)?)),
            });
        }
        if lacks_bits {
            self.put_entry_at(st, chunk, Entry::new(bat::PRESENT, at - MIB));
        }
        st.space.next = end;
        st.space.blocks += 1;
        self.put_entry_at(st, self.bat.index(block), Entry::new(state, at));
        if st.space.end - end < self.block_bytes() * 2 || st.to_log() > SECTORS_MAX / 2 {
            self.ahead.store(true, Ordering::Relaxed);
        }
        Ok(at)
    }

    /// Changes an entry of the table, which the next flush logs.
    pub(super) fn put_entry_at(&self, st: &mut State, index: u64, entry: Entry) {
        st.dirty.mark(index / bat::SECTOR_ENTRIES);
        self.bat.set(index, entry);
    }

    /// Space for the next blocks, of which the first begins at `at`.
    fn reserve(&self, st: &mut State, at: u64) -> Ask<Reserve> {
        let block_bytes = self.block_bytes();
        let full = |why: &str| {
            Halt::Fail(Error::new(
                ErrorKind::NoSpace,
                format!("{}: no room for a block at byte {at:#x}: {why}", self.name),
            ))
        };
        if st.space.unclean {
            return Err(full("what is there is not known to be zeros"));
        }
        let left = self
            .layout
            .metadata
            .blocks()
            .saturating_sub(st.space.blocks)
            .max(1);
        let many = (RESERVE_BYTES_MAX / block_bytes).min(st.space.blocks / 8);
        let count = many.min(left).min(st.space.most).max(1);
        let end = at + count * block_bytes;
        if end > FILE_BYTES_MAX {
            return Err(full("the file would become too long"));
        }
        st.space.reserving = true;
        let offset = match block_bytes <= WHOLE_BYTES_MAX {
            true => st.space.end.min(at),
            false => end - TAIL,
        };
        Ok(Reserve {
            key: Key(KEY_RESERVE),
            file: FileId::IMAGE,
            offset: HostOffset(offset),
            len: end - offset,
        })
    }

    /// What will be lacking soon.
    pub(super) fn foresee_in(&self, st: &mut State) -> Option<Foreseen> {
        let space = &st.space;
        let soon = space.end - space.next.min(space.end) < self.block_bytes() * 2;
        let left = self.layout.metadata.blocks() > space.blocks + 1;
        // An image that is only begun is no reason to take more.
        if soon && left && !space.reserving && space.blocks >= 8 && space.most > 1 {
            let at = space.end;
            return self.reserve(st, at).ok().map(Foreseen::Reserve);
        }
        (st.running == Running::Barrier && st.is_dirty() && st.to_log() > SECTORS_MAX / 2)
            .then_some(Foreseen::Commit)
    }

    /// A reservation ended; `None` when the space could not be had.
    pub(super) fn end_reserve(&self, st: &mut State, reserve: &Reserve, zeroed: Option<Zeroed>) {
        let space = &mut st.space;
        space.reserving = false;
        match zeroed {
            None => space.most = 1,
            Some(Zeroed::No) => space.unclean = true,
            Some(Zeroed::Yes) => {
                space.most = u64::MAX;
                space.end = space.end.max(reserve.offset.0 + reserve.len);
                space.file_bytes = space.file_bytes.max(space.end);
            }
        }
    }
}
