//! What a range is made of, and how it is written or zeroed.
//!
//! A block that is added lies in space that reads as zeros, so it is the image's from the beginning, and what is written
//! goes straight to its place: it reads as zeros until then, as it did before. Over a parent a block that was not there
//! is there in part: a sector is the image's when it has been written, and such writes are allocations, whose bits are set
//! when they are down. When a block has all its bits, it is there as a whole.

use super::Vhdx;
use super::bat::{self, Entry};
use crate::metadata::{Ask, Growing, Halt, STEPS_MAX};
use crate::{Extent, ExtentKind, FileId, Need, Plan, ZeroMode, ZeroPlan};
use block::{Error, GuestOffset, HostOffset, Result};
use std::sync::atomic::Ordering;

/// A place in the disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) block: u64,
    /// Bytes from the block's beginning.
    pub(super) within: u64,
    /// Bytes asked for in this block.
    pub(super) len: u64,
}

/// What an entry says of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// The parent's, or zeros where there is none.
    Absent,
    /// Zeros, whatever a parent has.
    Zero,
    /// At this offset of the file.
    Present(u64),
    /// There too, but only what its sector bitmap says.
    Partial(u64),
}

impl Vhdx {
    #[inline]
    pub(super) fn place(&self, at: u64, len: u64) -> Place {
        let block_bytes = 1 << self.block_bits;
        let within = at & (block_bytes - 1);
        Place {
            block: at >> self.block_bits,
            within,
            len: len.min(block_bytes - within),
        }
    }

    /// What is known of a block.
    #[inline]
    pub(super) fn block(&self, block: u64) -> Result<Block> {
        let entry = self.bat.get(self.bat.index(block));
        match entry.state() {
            Some(bat::PRESENT) => Ok(Block::Present(entry.offset())),
            Some(bat::PARTIAL) if self.parent.is_some() => Ok(Block::Partial(entry.offset())),
            Some(bat::NOT_PRESENT) => Ok(Block::Absent),
            Some(bat::ZERO | bat::UNDEFINED | bat::UNMAPPED | bat::UNMAPPED_095) => Ok(Block::Zero),
            _ => Err(self.unsound(block, entry)),
        }
    }

    #[cold]
    fn unsound(&self, block: u64, entry: Entry) -> Error {
        let at = self.layout.regions.bat.start + self.bat.index(block) * 8;
        let what = match entry.state() {
            Some(state) => format!("has state {state}, which a block of such an image cannot have"),
            None => "sets reserved bits, or leads further than a file is long".to_owned(),
        };
        Error::corrupt(format!(
            "{}: block {block}: its entry at byte {at:#x} {what}",
            self.name
        ))
    }

    pub(super) fn map_at(&self, at: GuestOffset, len: u64) -> Ask<Extent> {
        let mut run = Growing::new(at.0, len);
        for _ in 0..STEPS_MAX {
            let place = self.place(run.next(), run.left());
            let kind = match self.block(place.block) {
                Ok(Block::Partial(offset)) => {
                    let bits = match self.bits_in_memory(&place) {
                        Some(bits) => bits,
                        None if run.len() == 0 => self.bits(&place)?,
                        // Whoever asks for a page must have it loaded.
                        None => break,
                    };
                    let kind = match bits.present {
                        true => ExtentKind::Data {
                            file: FileId::IMAGE,
                            offset: HostOffset(offset + place.within),
                        },
                        false => ExtentKind::Unallocated,
                    };
                    if !run.feed(kind, bits.bytes) || run.left() == 0 {
                        break;
                    }
                    continue;
                }
                Ok(Block::Absent) => ExtentKind::Unallocated,
                Ok(Block::Zero) => ExtentKind::Zero { host: None },
                Ok(Block::Present(offset)) => ExtentKind::Data {
                    file: FileId::IMAGE,
                    offset: HostOffset(offset + place.within),
                },
                Err(error) if run.len() == 0 => return Err(error.into()),
                Err(_) => break,
            };
            if !run.feed(kind, place.len) || run.left() == 0 {
                break;
            }
        }
        Ok(run.extent())
    }

    /// Sees to it that the headers say that the file changes.
    fn announce(&self) -> Ask<()> {
        if self.announced.load(Ordering::Acquire) {
            return Ok(());
        }
        self.lock().wants_announcing = true;
        Err(Halt::Need(Need::Commit))
    }

    pub(super) fn plan_at(&self, at: GuestOffset, len: u64) -> Ask<Plan> {
        self.announce()?;
        let place = self.place(at.0, len);
        let in_place = |offset: u64, len| {
            Ok(Plan::InPlace {
                file: FileId::IMAGE,
                offset: HostOffset(offset + place.within),
                len,
            })
        };
        match self.block(place.block)? {
            Block::Present(offset) => return in_place(offset, place.len),
            Block::Partial(offset) => {
                let bits = self.bits(&place)?;
                if bits.present {
                    return in_place(offset, bits.bytes);
                }
            }
            Block::Absent | Block::Zero => {}
        }
        let st = &mut *self.lock();
        match self.block(place.block)? {
            Block::Present(offset) => in_place(offset, place.len),
            Block::Partial(offset) => self.allocate(st, &place, offset),
            Block::Absent if self.parent.is_some() => {
                self.clear_bits(st, place.block)?;
                let offset = self.bear(st, place.block, bat::PARTIAL)?;
                self.allocate(st, &place, offset)
            }
            Block::Absent | Block::Zero => {
                in_place(self.bear(st, place.block, bat::PRESENT)?, place.len)
            }
        }
    }

    pub(super) fn zero_at(&self, at: GuestOffset, len: u64, mode: ZeroMode) -> Ask<ZeroPlan> {
        // What a parent has must not come back; and must be hidden where zeros are wanted.
        let hide = self.parent.is_some() && mode != ZeroMode::Discard;
        let place = self.place(at.0, len);
        let host = |offset: u64, len| {
            self.announce()?;
            Ok(ZeroPlan::Host {
                file: FileId::IMAGE,
                offset: HostOffset(offset + place.within),
                len,
            })
        };
        match self.block(place.block)? {
            Block::Present(offset) => host(offset, place.len),
            Block::Partial(offset) => {
                let bits = self.bits(&place)?;
                match (bits.present, hide) {
                    (true, _) => host(offset, bits.bytes),
                    (false, true) => Ok(ZeroPlan::Write { len: bits.bytes }),
                    (false, false) => Ok(ZeroPlan::Skip { len: bits.bytes }),
                }
            }
            Block::Absent if hide => {
                let all = self.size.saturating_sub(place.block << self.block_bits);
                if place.len < all.min(1 << self.block_bits) {
                    return Ok(ZeroPlan::Write { len: place.len });
                }
                self.announce()?;
                let st = &mut *self.lock();
                if self.block(place.block)? == Block::Absent {
                    st.admit()?;
                    let index = self.bat.index(place.block);
                    self.put_entry_at(st, index, Entry::new(bat::ZERO, 0));
                    return Ok(ZeroPlan::Done { len: place.len });
                }
                Ok(ZeroPlan::Write { len: place.len })
            }
            Block::Zero if hide => Ok(ZeroPlan::Skip { len: place.len }),
            Block::Absent | Block::Zero => Ok(ZeroPlan::Skip {
                len: self.absent(at, len),
            }),
        }
    }

    /// How many of `len` bytes from `at` on are in blocks that are not there.
    fn absent(&self, at: GuestOffset, len: u64) -> u64 {
        let mut done = 0;
        for _ in 0..STEPS_MAX {
            let next = self.place(at.0 + done, len - done);
            if next.len == 0 || !matches!(self.block(next.block), Ok(Block::Absent | Block::Zero)) {
                break;
            }
            done += next.len;
        }
        done
    }
}
