//! Bitmaps that say which sectors of its disk an image has (VHD's of a block; VHDX's, by pages): in frames, read without a
//! lock.
//!
//! ```text
//!   bitmap ─▶ slot ─▶ frame with its bits
//! ```
//!
//! Bits change from none to some only, and after what they stand for is there. A frame that changes its owner has an
//! odd version meanwhile, and another one afterwards: who read it looks again.
//!
//! VDI's map is kept so by pages too, whose bits are entries of 32 ([`Bitmaps::entry`], [`Frame::set_entry`]): what is said of
//! a bit holds for an entry. So are cloop's offsets ([`Bitmaps::word`]).

use super::{Ask, Halt};
use crate::{FileId, Key, Load, Need};
use block::{HostOffset, Result};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

/// A slot of a bitmap without a frame.
const NONE: u32 = u32::MAX;

const KEY_LOAD: u64 = 1 << 60;

/// A run of sectors that are all in the image, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) present: bool,
    pub(crate) sectors: u64,
}

/// Which bit of a byte on disk the first sector has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// The highest.
    HighFirst,
    /// The lowest.
    LowFirst,
}

impl Order {
    /// A word as frames have it, from bytes on disk, and back: the first sector's bit is the highest.
    fn turn(self, word: u64) -> u64 {
        match self {
            Order::HighFirst => word,
            // The bytes keep their order, the bits in each are turned.
            Order::LowFirst => word.reverse_bits().swap_bytes(),
        }
    }
}

/// A bitmap in memory. Sector 0 is the highest bit of the first word.
#[derive(Debug, Default)]
pub(crate) struct Frame {
    version: AtomicU64,
    bitmap: AtomicU32,
    /// Somebody looked at it since the clock's hand passed.
    recent: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

impl Frame {
    fn words(&self) -> &[AtomicU64] {
        self.words.get().map_or(&[], |words| words)
    }

    /// Whether somebody looked at it since this was asked last.
    fn was_used(&self) -> bool {
        self.recent.swap(false, Ordering::Relaxed)
    }

    /// The run of sectors from `first` on, up to `end`, which is behind it.
    pub(crate) fn run(&self, first: u64, end: u64) -> Run {
        run_in(self.words(), first, end)
    }

    /// Nobody may read it until it is filled. One thread at a time.
    fn close(&self) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version | 1, Ordering::Relaxed);
        fence(Ordering::Release);
    }

    /// Makes it bitmap `bitmap`, whose bytes are `bytes`. One thread at a time.
    fn fill(&self, bitmap: u32, bytes: &[u8], words: usize, order: Order) {
        self.close();
        let all = self
            .words
            .get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect());
        let chunks = bytes.as_chunks::<8>().0;
        let values = chunks
            .iter()
            .map(|chunk| order.turn(u64::from_be_bytes(*chunk)));
        for (word, value) in all.iter().zip(values.chain(std::iter::repeat(0))) {
            word.store(value, Ordering::Relaxed);
        }
        self.bitmap.store(bitmap, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Notes that the image has sectors `first` to before `end`. Their data are down.
    pub(crate) fn set(&self, first: u64, end: u64) {
        let mut at = first;
        while at < end {
            let last = end.min((at / 64 + 1) * 64);
            let mask = (u64::MAX >> (at % 64)) & (u64::MAX << (63 - (last - 1) % 64));
            if let Some(word) = self.words().get((at / 64) as usize) {
                word.fetch_or(mask, Ordering::Release);
            }
            at = last;
        }
    }

    /// The little-endian 32-bit entry `index`.
    fn entry(&self, index: usize) -> Option<u32> {
        let word = self.words().get(index / 2)?.load(Ordering::Acquire);
        // The half that comes first on disk is the high one.
        let bytes = word.to_be_bytes();
        bytes
            .as_chunks::<4>()
            .0
            .get(index % 2)
            .map(|half| u32::from_le_bytes(*half))
    }

    /// The big-endian 64-bit number `index`, of those that have the highest bit first.
    fn word(&self, index: usize) -> Option<u64> {
        self.words()
            .get(index)
            .map(|word| word.load(Ordering::Acquire))
    }

    /// Changes the little-endian 32-bit entry `index`. What it leads to is down. One thread at a time.
    pub(crate) fn set_entry(&self, index: usize, entry: u32) {
        let Some(word) = self.words().get(index / 2) else {
            return;
        };
        let mut bytes = word.load(Ordering::Relaxed).to_be_bytes();
        if let Some(half) = bytes.as_chunks_mut::<4>().0.get_mut(index % 2) {
            *half = entry.to_le_bytes();
        }
        word.store(u64::from_be_bytes(bytes), Ordering::Release);
    }

    /// Forgets sectors `first` to before `end`: nobody looks at them.
    pub(crate) fn clear(&self, first: u64, end: u64) {
        for at in first..end {
            if let Some(word) = self.words().get((at / 64) as usize) {
                word.fetch_and(!(1 << (63 - at % 64)), Ordering::Release);
            }
        }
    }
}

/// The run of sectors from `first` on, up to `end`, in a bitmap.
fn run_in(words: &[AtomicU64], first: u64, end: u64) -> Run {
    let word = |index: u64| {
        words
            .get(index as usize)
            .map_or(0, |w| w.load(Ordering::Acquire))
    };
    let present = word(first / 64) << (first % 64) >> 63 == 1;
    let mut at = first;
    while at < end {
        let skip = at % 64;
        let bits = word(at / 64);
        // Equal bits as zeros.
        let bits = (if present { !bits } else { bits }) << skip;
        let same = u64::from(bits.leading_zeros()).min(64 - skip);
        at += same;
        if same < 64 - skip {
            break;
        }
    }
    Run {
        present,
        sectors: at.min(end) - first,
    }
}

/// The bitmaps of an image.
#[derive(Debug)]
pub(crate) struct Bitmaps {
    slots: Vec<AtomicU32>,
    frames: Vec<Frame>,
    /// 64-bit words of each.
    words: usize,
    order: Order,
}

impl Bitmaps {
    /// So many bitmaps, each of up to `bits`, and room for `frames` of them.
    pub(crate) fn new(count: u64, frames: usize, bits: u64, order: Order) -> Self {
        Self {
            slots: (0..count).map(|_| AtomicU32::new(NONE)).collect(),
            frames: (0..frames).map(|_| Frame::default()).collect(),
            words: bits.div_ceil(64) as usize,
            order,
        }
    }

    pub(crate) fn slot(&self, bitmap: u64) -> Option<u32> {
        let slot = self.slots.get(bitmap as usize)?.load(Ordering::Acquire);
        (slot != NONE).then_some(slot)
    }

    fn set_slot(&self, bitmap: u64, slot: u32) {
        if let Some(cell) = self.slots.get(bitmap as usize) {
            cell.store(slot, Ordering::Release);
        }
    }

    pub(crate) fn frame(&self, frame: u32) -> Option<&Frame> {
        self.frames.get(frame as usize)
    }

    /// What the image has from sector `first` of a bitmap on and up to `end`. `None` when it is not in memory.
    #[inline]
    pub(crate) fn run(&self, bitmap: u64, first: u64, end: u64) -> Option<Run> {
        self.look(bitmap, |frame| frame.run(first, end))
    }

    /// The 32-bit entry `index` of a page. `None` when it is not in memory.
    #[inline]
    pub(crate) fn entry(&self, page: u64, index: usize) -> Option<u32> {
        self.look(page, |frame| frame.entry(index))?
    }

    /// The 64-bit number `index` of a page. `None` when it is not in memory.
    #[inline]
    pub(crate) fn word(&self, page: u64, index: usize) -> Option<u64> {
        self.look(page, |frame| frame.word(index))?
    }

    /// What a frame says while it is that of `bitmap`; `None` when none is.
    #[inline]
    fn look<T>(&self, bitmap: u64, ask: impl FnOnce(&Frame) -> T) -> Option<T> {
        let frame = self.frames.get(self.slot(bitmap)? as usize)?;
        let version = frame.version.load(Ordering::Acquire);
        if version % 2 == 1 || u64::from(frame.bitmap.load(Ordering::Relaxed)) != bitmap {
            return None;
        }
        let answer = ask(frame);
        if !frame.recent.load(Ordering::Relaxed) {
            frame.recent.store(true, Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        (frame.version.load(Ordering::Relaxed) == version).then_some(answer)
    }

    /// The bitmap in a frame as it is on disk, of 4 KiB.
    pub(crate) fn page(&self, frame: u32) -> [u8; 4096] {
        let mut bytes = [0; 4096];
        let words = self.frame(frame).map_or(&[][..], |frame| frame.words());
        for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = self.order.turn(word.load(Ordering::Acquire)).to_be_bytes();
        }
        bytes
    }

    /// Appends the bitmap in a frame as it is on disk: `len` bytes.
    pub(crate) fn put(&self, frame: u32, len: usize, out: &mut Vec<u8>) {
        let end = out.len() + len;
        let words = self.frame(frame).map_or(&[][..], |frame| frame.words());
        for word in words {
            let word = self.order.turn(word.load(Ordering::Acquire));
            out.extend_from_slice(&word.to_be_bytes());
        }
        out.resize(end, 0);
    }
}

/// What a frame is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Use {
    /// Which bitmap it is.
    bitmap: Option<u64>,
    /// That is being read.
    loading: bool,
    /// Allocations in flight that will set bits.
    pins: u32,
    /// It never was in the file: no flush has written what makes it the image's.
    born: bool,
    /// It has bits that no flush has written.
    dirty: bool,
    /// A flush under way writes it.
    flushing: bool,
    /// It was written to a log, and is not in its place yet.
    kept: bool,
}

/// What keeps a frame from being free besides bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Busy {
    /// A flush would write something.
    pub(crate) dirty: bool,
    /// Some allocation in flight.
    pub(crate) ticket: Option<Key>,
}

/// What frames are used for. Behind a lock.
#[derive(Debug)]
pub(crate) struct Uses {
    uses: Vec<Use>,
    hand: usize,
    /// Frames to write, in no order.
    dirty: Vec<u32>,
    flushing: Vec<u32>,
    kept: Vec<u32>,
}

impl Uses {
    pub(crate) fn new(frames: usize) -> Self {
        Self {
            uses: vec![Use::default(); frames],
            hand: 0,
            dirty: Vec::new(),
            flushing: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// Frames that have bits to write.
    pub(crate) fn dirty(&self) -> &[u32] {
        &self.dirty
    }

    /// Which bitmap a frame is, and whether it was born and not written yet.
    pub(crate) fn holds(&self, frame: u32) -> Option<(u64, bool)> {
        let used = self.uses.get(frame as usize)?;
        Some((used.bitmap?, used.born))
    }

    /// Notes that a frame has bits to write.
    pub(crate) fn mark(&mut self, frame: u32) {
        let Some(used) = self.uses.get_mut(frame as usize) else {
            return;
        };
        if !used.dirty {
            used.dirty = true;
            self.dirty.push(frame);
        }
    }

    /// An allocation will set bits of it (`pin`), or has ended.
    pub(crate) fn pin(&mut self, frame: u32, pin: bool) {
        if let Some(used) = self.uses.get_mut(frame as usize) {
            used.pins = match pin {
                true => used.pins + 1,
                false => used.pins.saturating_sub(1),
            };
        }
    }

    /// The frame with a bitmap that is at the place in the file, with the length, that `place` says.
    pub(crate) fn frame_of(
        &mut self,
        bitmaps: &Bitmaps,
        bitmap: u64,
        busy: Busy,
        place: impl FnOnce() -> Result<(u64, u32)>,
    ) -> Ask<u32> {
        if let Some(frame) = bitmaps.slot(bitmap)
            && let Some(used) = self.uses.get(frame as usize)
        {
            return match used.loading {
                true => Err(Halt::Wait(Key(KEY_LOAD | bitmap))),
                false => Ok(frame),
            };
        }
        let (offset, len) = place()?;
        self.take(bitmaps, bitmap, true, busy)?;
        Err(Halt::Need(Need::Load(Load {
            key: Key(KEY_LOAD | bitmap),
            file: FileId::IMAGE,
            offset: HostOffset(offset),
            len,
        })))
    }

    /// A frame for a bitmap that the file has not yet, with no bits set: to be written.
    pub(crate) fn bear(&mut self, bitmaps: &Bitmaps, bitmap: u64, busy: Busy) -> Ask<u32> {
        let frame = self.take(bitmaps, bitmap, false, busy)?;
        if let Some(used) = self.uses.get_mut(frame as usize) {
            used.born = true;
        }
        self.mark(frame);
        Ok(frame)
    }

    fn take(&mut self, bitmaps: &Bitmaps, bitmap: u64, loading: bool, busy: Busy) -> Ask<u32> {
        let frames = self.uses.len();
        // Twice round: the first one takes the marks away.
        for _ in 0..frames * 2 {
            let index = self.hand;
            self.hand = (self.hand + 1) % frames;
            let Some(used) = self.uses.get_mut(index) else {
                continue;
            };
            if used.loading || used.pins > 0 || used.dirty || used.flushing || used.kept {
                continue;
            }
            let Some(frame) = bitmaps.frames.get(index) else {
                continue;
            };
            if used.bitmap.is_some() && frame.was_used() {
                continue;
            }
            if let Some(old) = used.bitmap.take() {
                bitmaps.set_slot(old, NONE);
            }
            *used = Use {
                bitmap: Some(bitmap),
                loading,
                ..Use::default()
            };
            match loading {
                true => frame.close(),
                // Bitmaps are fewer than 2^32.
                false => frame.fill(bitmap as u32, &[], bitmaps.words, bitmaps.order),
            }
            bitmaps.set_slot(bitmap, index as u32);
            return Ok(index as u32);
        }
        // All have bits that are not written or will be set.
        match (busy.dirty, busy.ticket) {
            (true, _) => Err(Halt::Need(Need::Commit)),
            (false, Some(key)) => Err(Halt::Wait(key)),
            (false, None) => match self
                .uses
                .iter()
                .find_map(|u| u.bitmap.filter(|_| u.loading))
            {
                Some(bitmap) => Err(Halt::Wait(Key(KEY_LOAD | bitmap))),
                // A flush under way writes them.
                None => Err(Halt::Need(Need::Commit)),
            },
        }
    }

    /// Takes a bitmap in, or gives it up. Which it is, and its frame; `None` for one that nobody asked for.
    pub(crate) fn loaded(
        &mut self,
        bitmaps: &Bitmaps,
        load: &Load,
        bytes: Option<&[u8]>,
    ) -> Option<(u64, u32)> {
        let bitmap = load.key.0 & !(15 << 60);
        let slot = bitmaps.slot(bitmap).filter(|_| load.key.0 >> 60 == 1)?;
        let used = self
            .uses
            .get_mut(slot as usize)
            .filter(|used| used.loading)?;
        match bytes {
            None => {
                *used = Use::default();
                bitmaps.set_slot(bitmap, NONE);
            }
            Some(bytes) => {
                used.loading = false;
                if let Some(frame) = bitmaps.frames.get(slot as usize) {
                    frame.fill(bitmap as u32, bytes, bitmaps.words, bitmaps.order);
                }
            }
        }
        Some((bitmap, slot))
    }

    /// What is dirty is being written.
    pub(crate) fn begin_flush(&mut self) {
        std::mem::swap(&mut self.dirty, &mut self.flushing);
        for frame in &self.flushing {
            if let Some(used) = self.uses.get_mut(*frame as usize) {
                (used.dirty, used.flushing) = (false, true);
            }
        }
    }

    /// It was written to a log, and what was before is in its place: those frames may go, these must stay. Or it is
    /// dirty again.
    pub(crate) fn end_logging(&mut self, ok: bool) {
        if ok {
            for (frames, kept) in [(&self.kept, false), (&self.flushing, true)] {
                for frame in frames {
                    if let Some(used) = self.uses.get_mut(*frame as usize) {
                        used.kept = kept;
                    }
                }
            }
            self.kept.clear();
            self.kept.extend_from_slice(&self.flushing);
        }
        self.end_flush(ok);
    }

    /// It was written, or is dirty again.
    pub(crate) fn end_flush(&mut self, ok: bool) {
        let frames = std::mem::take(&mut self.flushing);
        for frame in &frames {
            if let Some(used) = self.uses.get_mut(*frame as usize) {
                used.flushing = false;
                // Blocks that were born since the run began have other frames.
                used.born &= !ok;
            }
            if !ok {
                self.mark(*frame);
            }
        }
        // Its memory is kept.
        self.flushing = frames;
        self.flushing.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(uses: &mut Uses, bitmaps: &Bitmaps, bitmap: u64, bytes: &[u8]) -> u32 {
        let busy = Busy {
            dirty: false,
            ticket: None,
        };
        let Err(Halt::Need(Need::Load(load))) = uses.frame_of(bitmaps, bitmap, busy, || Ok((0, 8)))
        else {
            panic!("no load");
        };
        assert_eq!(bitmaps.run(bitmap, 0, 1), None, "while it is loaded");
        uses.loaded(bitmaps, &load, Some(bytes)).unwrap().1
    }

    #[test]
    fn a_bitmap_is_read_only_when_it_is_there() {
        let bitmaps = Bitmaps::new(2, 1, 64, Order::HighFirst);
        let mut uses = Uses::new(1);
        loaded(&mut uses, &bitmaps, 0, &[0xff; 8]);
        let present = |bitmap| bitmaps.run(bitmap, 0, 64).map(|run| run.present);
        assert_eq!(present(0), Some(true));
        // Its frame is to be that of bitmap 1.
        loaded(&mut uses, &bitmaps, 1, &[0; 8]);
        assert_eq!((present(0), present(1)), (None, Some(false)));
        // Whoever still holds the old slot sees that it is another's.
        bitmaps.set_slot(0, 0);
        assert_eq!(present(0), None);
    }

    #[test]
    fn entries_are_those_of_the_file() {
        let bitmaps = Bitmaps::new(2, 1, 4 * 32, Order::HighFirst);
        let mut uses = Uses::new(1);
        let mut bytes: Vec<u8> = [7u32, 0xffff_fffe, 0x0102_0304, 9]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        let at = loaded(&mut uses, &bitmaps, 1, &bytes);
        let entries = |page| {
            (0..5)
                .map(|index| bitmaps.entry(page, index))
                .collect::<Vec<_>>()
        };
        let there = [Some(7), Some(0xffff_fffe), Some(0x0102_0304), Some(9), None];
        assert_eq!(entries(1), there);
        assert_eq!(entries(0), [None; 5], "not in memory");
        let frame = bitmaps.frame(at).unwrap();
        frame.set_entry(1, 0x1112_1314);
        frame.set_entry(2, 5);
        bytes[4..12].copy_from_slice(&[0x14, 0x13, 0x12, 0x11, 5, 0, 0, 0]);
        let mut out = Vec::new();
        bitmaps.put(at, 16, &mut out);
        assert_eq!(out, bytes);
    }

    #[test]
    fn bits_are_set_and_found_in_runs() {
        for (order, on_disk) in [
            (Order::HighFirst, [4, 0, 0x0f, 0xfc]),
            (Order::LowFirst, [0x20, 0, 0xf0, 0x3f]),
        ] {
            let bitmaps = Bitmaps::new(1, 1, 256, order);
            let mut uses = Uses::new(1);
            let at = loaded(&mut uses, &bitmaps, 0, &[]);
            let frame = bitmaps.frame(at).unwrap();
            for (first, end) in [(5, 6), (60, 70), (128, 201)] {
                frame.set(first, end);
            }
            frame.clear(200, 201);
            let mut runs = Vec::new();
            let mut next = 0;
            while next < 256 {
                let run = frame.run(next, 256);
                runs.push((run.present, run.sectors));
                next += run.sectors;
            }
            let want = [
                (false, 5),
                (true, 1),
                (false, 54),
                (true, 10),
                (false, 58),
                (true, 72),
                (false, 56),
            ];
            assert_eq!(runs, want);
            let mut bytes = Vec::new();
            bitmaps.put(at, 512, &mut bytes);
            let found = [bytes[0], bytes[1], bytes[7], bytes[8]];
            assert_eq!((bytes.len(), found), (512, on_disk));
            let again = Bitmaps::new(1, 1, 256, order);
            loaded(&mut Uses::new(1), &again, 0, &bytes);
            assert_eq!(again.run(0, 60, 256), bitmaps.run(0, 60, 256));
        }
    }
}
