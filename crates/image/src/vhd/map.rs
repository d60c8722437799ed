//! What a range is made of, and how it is written or zeroed.
//!
//! A block that is added to a dynamic image lies in space that reads as zeros, so all its sectors are the image's from
//! the beginning, and what is written goes straight to its place: it reads as zeros until then, as it did before. So
//! it is in images that QEMU makes. In a differencing image, and in blocks of which a bitmap says otherwise, a sector is the
//! image's when it has been written: such writes are allocations, and their bits are set when they are down.

use super::Vhd;
use super::footer::DiskType;
use super::state::{Pending, State};
use crate::metadata::bitmaps::Run;
use crate::metadata::{Ask, Halt, key_of};
use crate::{Allocation, Extent, ExtentKind, FileId, Fill, Plan, ZeroMode, ZeroPlan};
use block::{Error, GuestOffset, HostOffset, Result};

/// Blocks that one answer is about, at most.
const BLOCKS_AT_ONCE: u64 = 4096;

/// Bytes of the largest allocation.
const ALLOCATION_BYTES_MAX: u64 = 2 << 20;

/// A place in the disk.
#[derive(Clone, Copy, Debug)]
struct Place {
    block: u64,
    /// Bytes from the block's beginning.
    within: u64,
    /// Bytes asked for in this block.
    len: u64,
}

impl Place {
    /// The first sector in the block, and the one behind the last.
    fn sectors(&self) -> (u64, u64) {
        (self.within / 512, (self.within + self.len).div_ceil(512))
    }

    /// How many of the bytes asked for are in the first `sectors` of them.
    fn bytes(&self, sectors: u64) -> u64 {
        (sectors * 512 - self.within % 512).min(self.len)
    }
}

impl Vhd {
    fn place(&self, at: GuestOffset, len: u64) -> Place {
        let within = at.0 & (self.block_bytes - 1);
        Place {
            block: at.0 >> self.block_bits,
            within,
            len: len.min(self.block_bytes - within),
        }
    }

    /// Sectors of the disk in a block: fewer in the last.
    pub(super) fn sectors_of(&self, block: u64) -> u64 {
        let start = block << self.block_bits;
        self.size.saturating_sub(start).min(self.block_bytes) / 512
    }

    /// Where a block's bitmap is, whose data are behind it.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] where the block lies on something else, or outside the file.
    pub(super) fn bitmap_offset(&self, block: u64) -> Result<u64> {
        let entry = self.tables.entry(block).unwrap_or(0);
        let at = u64::from(entry) * 512;
        let end = at + self.bitmap_bytes + self.block_bytes;
        if at == 0
            || self
                .taken
                .iter()
                .any(|taken| at < taken.end && taken.start < end)
        {
            return Err(Error::corrupt(format!(
                "{}: block {block}: its entry at byte {:#x} is {entry}: there are the image's tables",
                self.name,
                self.table_offset + block * 4
            )));
        }
        Ok(at)
    }

    fn data_at(&self, place: &Place) -> Result<HostOffset> {
        let at = self.bitmap_offset(place.block)?;
        Ok(HostOffset(at + self.bitmap_bytes + place.within))
    }

    /// How many of `len` bytes from `at` on are in blocks that are not there.
    fn absent(&self, at: GuestOffset, len: u64) -> u64 {
        let mut done = self.place(at, len).len;
        for _ in 0..BLOCKS_AT_ONCE {
            let next = self.place(at.plus(done), len - done);
            if next.len == 0 || self.tables.entry(next.block).is_some() {
                break;
            }
            done += next.len;
        }
        done
    }

    /// What the image has of a block that is there. Asks memory first, then under the lock.
    fn run(&self, st: Option<&mut State>, place: &Place) -> Ask<Run> {
        let (first, end) = place.sectors();
        if let Some(run) = self.tables.run(place.block, first, end) {
            return Ok(run);
        }
        // The frame is the bitmap's only as long as the lock is held.
        let mut guard;
        let st = match st {
            Some(st) => st,
            None => {
                guard = self.lock();
                &mut *guard
            }
        };
        let frame = self.frame_of(st, place.block)?;
        if self.tables.is_whole(place.block) {
            let sectors = end - first;
            return Ok(Run {
                present: true,
                sectors,
            });
        }
        let frame = self.tables.bitmaps.frame(frame);
        Ok(frame.map_or(
            Run {
                present: false,
                sectors: end - first,
            },
            |f| f.run(first, end),
        ))
    }

    pub(super) fn map_at(&self, at: GuestOffset, len: u64) -> Ask<Extent> {
        if self.disk_type == DiskType::Fixed {
            let kind = ExtentKind::Data {
                file: FileId::IMAGE,
                offset: HostOffset(at.0),
            };
            return Ok(Extent { len, kind });
        }
        let place = self.place(at, len);
        if self.tables.entry(place.block).is_none() {
            let len = self.absent(at, len);
            return Ok(Extent {
                len,
                kind: ExtentKind::Unallocated,
            });
        }
        let offset = self.data_at(&place)?;
        let run = self.run(None, &place)?;
        Ok(Extent {
            len: place.bytes(run.sectors),
            kind: match run.present {
                true => ExtentKind::Data {
                    file: FileId::IMAGE,
                    offset,
                },
                false => ExtentKind::Unallocated,
            },
        })
    }

    /// The plan of a write that needs no lock: where the image has the sectors.
    fn plan_here(&self, place: &Place) -> Result<Option<Plan>> {
        if self.tables.entry(place.block).is_none() {
            return Ok(None);
        }
        let (first, end) = place.sectors();
        let Some(run) = self
            .tables
            .run(place.block, first, end)
            .filter(|run| run.present)
        else {
            return Ok(None);
        };
        Ok(Some(Plan::InPlace {
            file: FileId::IMAGE,
            offset: self.data_at(place)?,
            len: place.bytes(run.sectors),
        }))
    }

    pub(super) fn plan_at(&self, at: GuestOffset, len: u64) -> Ask<Plan> {
        if self.disk_type == DiskType::Fixed {
            let offset = HostOffset(at.0);
            return Ok(Plan::InPlace {
                file: FileId::IMAGE,
                offset,
                len,
            });
        }
        let place = self.place(at, len);
        if let Some(plan) = self.plan_here(&place)? {
            return Ok(plan);
        }
        let st = &mut *self.lock();
        if self.tables.entry(place.block).is_none() {
            let whole = self.disk_type == DiskType::Dynamic;
            self.bear(st, place.block, whole)?;
        }
        let run = self.run(Some(st), &place)?;
        let offset = self.data_at(&place)?;
        if run.present {
            let len = place.bytes(run.sectors);
            return Ok(Plan::InPlace {
                file: FileId::IMAGE,
                offset,
                len,
            });
        }
        self.allocate(st, &place, run.sectors)
    }

    /// Plans to write into sectors that the image does not have yet: up to `sectors` of them.
    fn allocate(&self, st: &mut State, place: &Place, sectors: u64) -> Ask<Plan> {
        let frame = self.frame_of(st, place.block)?;
        let base = place.block << (self.block_bits - 9);
        let (first, _) = place.sectors();
        if let Some(key) = st.tickets.busy(base + first) {
            return Err(Halt::Wait(key));
        }
        if st.tickets.is_full() {
            return Err(st.tickets.any_key().map_or(
                Halt::Fail(Error::corrupt("no room for an allocation")),
                Halt::Wait,
            ));
        }
        let all = self.block_bytes / 512;
        let (start, count, fill) = if self.must_be_zeroed(st, place.block, frame) {
            (0, all, Fill::Zero)
        } else {
            let free = st.tickets.next_start(base + first) - base - first;
            let most = ALLOCATION_BYTES_MAX / 512;
            (first, sectors.min(free).min(most), Fill::Existing)
        };
        let pending = Pending {
            start: base + start,
            count,
            frame,
        };
        let Some(ticket) = st.tickets.add(pending) else {
            return Err(Halt::Fail(Error::corrupt("no room for an allocation")));
        };
        st.uses.pin(frame, true);
        let host = self.bitmap_offset(place.block)? + self.bitmap_bytes + start * 512;
        Ok(Plan::Allocate(Allocation {
            ticket,
            key: key_of(ticket),
            file: FileId::IMAGE,
            host: HostOffset(host),
            start: GuestOffset((base + start) * 512),
            len: count * 512,
            write_len: place.bytes(count - (first - start)),
            zeroed: false,
            fill,
        }))
    }

    /// Whether nothing of a dynamic image's block is the image's, and what the file has there is not known to be
    /// zeros: QEMU takes all of a block for data, whatever the bitmap says.
    fn must_be_zeroed(&self, st: &State, block: u64, frame: u32) -> bool {
        let sectors = self.sectors_of(block);
        let run = self.tables.bitmaps.frame(frame).map(|f| f.run(0, sectors));
        let base = block << (self.block_bits - 9);
        self.disk_type == DiskType::Dynamic
            && self.block_bytes <= ALLOCATION_BYTES_MAX
            && run.is_some_and(|run| !run.present && run.sectors == sectors)
            && st.tickets.busy_within(base, base + sectors).is_none()
    }

    pub(super) fn end_ticket(&self, st: &mut State, ticket: crate::Ticket, written: bool) {
        let Some(pending) = st.tickets.remove(ticket) else {
            debug_assert!(false, "a ticket that is not in flight");
            return;
        };
        st.uses.pin(pending.frame, false);
        if !written {
            return;
        }
        let block = pending.start >> (self.block_bits - 9);
        let first = pending.start - (block << (self.block_bits - 9));
        if let Some(frame) = self.tables.bitmaps.frame(pending.frame) {
            frame.set(first, first + pending.count);
        }
        st.uses.mark(pending.frame);
        self.see_whole(block, pending.frame);
    }

    pub(super) fn zero_at(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Ask<ZeroPlan> {
        let host = |offset, len| ZeroPlan::Host {
            file: FileId::IMAGE,
            offset,
            len,
        };
        if self.disk_type == DiskType::Fixed {
            return Ok(host(HostOffset(at.0), len));
        }
        // What a parent has must not come back; and must be hidden where zeros are wanted.
        let hide = self.disk_type == DiskType::Differencing && mode != ZeroMode::Discard;
        let place = self.place(at, len);
        if self.tables.entry(place.block).is_none() {
            if !hide {
                return Ok(ZeroPlan::Skip {
                    len: self.absent(at, len),
                });
            }
            let all = place.len == self.sectors_of(place.block) * 512;
            if !all {
                return Ok(ZeroPlan::Write { len: place.len });
            }
            let st = &mut *self.lock();
            if self.tables.entry(place.block).is_none() && self.bear(st, place.block, true)? {
                return Ok(ZeroPlan::Done { len: place.len });
            }
            return Ok(ZeroPlan::Write { len: place.len });
        }
        let offset = self.data_at(&place)?;
        let run = self.run(None, &place)?;
        let len = place.bytes(run.sectors);
        Ok(match (run.present, hide) {
            (true, _) => host(offset, len),
            (false, true) => ZeroPlan::Write { len },
            (false, false) => ZeroPlan::Skip { len },
        })
    }
}
