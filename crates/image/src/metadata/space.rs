//! Space for new blocks behind the last one of a file, for formats that never give a block back.

use crate::{FileId, Foreseen, Key, Reserve};
use block::{HostOffset, Zeroed};

/// Bytes that are reserved at the end of the file at once, at most: an eighth of what the image has.
const RESERVE_BYTES_MAX: u64 = 64 << 20;

/// How blocks lie behind each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strides {
    /// Woken when a reservation has ended.
    pub(crate) key: Key,
    /// Bytes of the disk in a block.
    pub(crate) block: u64,
    /// Bytes of a block in the file.
    pub(crate) span: u64,
    /// Bytes from block to block, at most.
    pub(crate) stride: u64,
    /// Bytes to reserve behind the last block.
    pub(crate) tail: u64,
    /// Blocks are holes until they are written: of what is reserved only the tail gets its space, which makes the file as
    /// long. A disk that is written here and there takes no more space than its data then.
    pub(crate) holes: bool,
}

/// Space behind the last block.
#[derive(Debug)]
pub(crate) struct Space {
    /// Where the next block may begin.
    pub(crate) next: u64,
    /// End of what is reserved.
    pub(crate) end: u64,
    /// What is reserved reads as zeros from here on.
    pub(crate) zeros_from: u64,
    /// A reservation is under way.
    pub(crate) reserving: bool,
    /// Blocks of the image.
    pub(crate) blocks: u64,
    /// Blocks to reserve at once, fewer after a failure.
    most: u64,
}

impl Space {
    /// Behind `used_end`, where nothing is reserved. The file has `file_bytes`, the image so many blocks.
    pub(crate) fn new(used_end: u64, file_bytes: u64, blocks: u64) -> Self {
        Self {
            next: used_end,
            end: used_end,
            zeros_from: file_bytes,
            reserving: false,
            blocks,
            most: u64::MAX,
        }
    }

    /// Whether what is reserved comes to its end.
    pub(crate) fn is_short(&self, strides: &Strides) -> bool {
        self.end.saturating_sub(self.next) < strides.stride * 2
    }

    /// Space for the next blocks, of which the first begins at `at` and the disk lacks `left`.
    pub(crate) fn reserve(&mut self, strides: &Strides, at: u64, left: u64) -> Reserve {
        let many = (RESERVE_BYTES_MAX / strides.block).min(self.blocks / 8);
        let count = many.min(left).min(self.most).max(1);
        let end = at + (count - 1) * strides.stride + strides.span + strides.tail;
        let offset = match strides.holes {
            true => end - strides.tail,
            false => self.end.min(at),
        };
        self.reserving = true;
        Reserve {
            key: strides.key,
            file: FileId::IMAGE,
            offset: HostOffset(offset),
            len: end - offset,
        }
    }

    /// A reservation before it is lacking, of which the first block begins at `at`. `left` blocks are lacking of the disk.
    pub(crate) fn ahead(&mut self, strides: &Strides, at: u64, left: u64) -> Option<Foreseen> {
        // An image that is only begun is no reason to take more.
        let begun = self.blocks < 8 || self.most == 1;
        if self.reserving || !self.is_short(strides) || left <= 1 || begun {
            return None;
        }
        Some(Foreseen::Reserve(self.reserve(strides, at, left)))
    }

    /// A reservation ended; `None` when the space could not be had.
    pub(crate) fn ended(&mut self, strides: &Strides, reserve: &Reserve, zeroed: Option<Zeroed>) {
        self.reserving = false;
        let Some(zeroed) = zeroed else {
            self.most = 1;
            return;
        };
        self.most = u64::MAX;
        let end = reserve.offset.0 + reserve.len;
        if zeroed == Zeroed::No {
            self.zeros_from = self.zeros_from.max(end);
        }
        self.end = self.end.max(end.saturating_sub(strides.tail));
    }
}
