//! What a range is made of, and how it is written or zeroed.
//!
//! A block that is added lies in space that reads as zeros, so it is the image's from the beginning, and what is written
//! goes straight to its place: it reads as zeros until then, as it did before.

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
        let mut block = self.block(place.block)?;
        if !matches!(block, Block::Present(_)) {
            let st = &mut *self.lock();
            block = self.block(place.block)?;
            if !matches!(block, Block::Present(_)) {
                block = Block::Present(self.bear(st, place.block)?);
            }
        }
        let Block::Present(offset) = block else {
            return Err(Error::corrupt("a block that is nowhere").into());
        };
        Ok(Plan::InPlace {
            file: FileId::IMAGE,
            offset: HostOffset(offset + place.within),
            len: place.len,
        })
    }

    pub(super) fn zero_at(&self, at: GuestOffset, len: u64, _: ZeroMode) -> Ask<ZeroPlan> {
        let place = self.place(at.0, len);
        Ok(match self.block(place.block)? {
            Block::Present(offset) => {
                self.announce()?;
                ZeroPlan::Host {
                    file: FileId::IMAGE,
                    offset: HostOffset(offset + place.within),
                    len: place.len,
                }
            }
            Block::Absent | Block::Zero => ZeroPlan::Skip {
                len: self.absent(at, len),
            },
        })
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
