//! Blocks that are moved within the file of an image that nobody uses.
//!
//! ```text
//!   data of the blocks in their new places · header, where it counts fewer · entries of the map
//! ```
//!
//! Each is durable before the next begins, and nothing is written where a block is: so a crash leaves each block in its
//! old place or in its new one, which hold the same.

use super::header::Header;
use super::holes::Holes;
use super::open::{Blocks, Layout, is_there, settle_end};
use crate::metadata::read_short;
use block::{Context, Result, Storage};

/// Blocks that are moved before their entries are.
const MOVES_AT_ONCE: usize = 4096;

/// Bytes that are copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// A block that gets another number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Move {
    /// Which block of the disk.
    pub(super) block: u32,
    /// Its number.
    pub(super) from: u32,
    /// A number that no block has.
    pub(super) to: u32,
}

/// An image whose blocks are moved.
pub(super) struct Mover<'a> {
    file: &'a dyn Storage,
    /// As it is in the file.
    pub(super) header: Header,
    waiting: Vec<Move>,
}

impl<'a> Mover<'a> {
    pub(super) fn new(file: &'a dyn Storage, header: &Header) -> Self {
        Self {
            file,
            header: header.clone(),
            waiting: Vec::new(),
        }
    }

    /// Moves a block, now or with those that come. They come in the order of the disk.
    pub(super) fn add(&mut self, next: Move) -> Result<()> {
        self.waiting.push(next);
        match self.waiting.len() >= MOVES_AT_ONCE {
            true => self.carry(),
            false => Ok(()),
        }
    }

    /// Moves those that wait.
    pub(super) fn carry(&mut self) -> Result<()> {
        let moves = std::mem::take(&mut self.waiting);
        let Some(highest) = moves.iter().map(|next| next.to).max() else {
            return Ok(());
        };
        let end = self.header.block_offset(u64::from(highest) + 1);
        if self.file.len()? < end {
            self.file.set_len(end)?;
        }
        for next in &moves {
            self.copy(next.from, next.to)?;
        }
        self.file.sync()?;
        if self.header.allocated <= highest {
            self.header.allocated = highest + 1;
            self.file.write_at(0, &self.header.to_bytes())?;
            self.file.sync()?;
        }
        for sector in moves.chunk_by(|a, b| a.block / 128 == b.block / 128) {
            let Some(first) = sector.first().map(|next| next.block / 128 * 128) else {
                continue;
            };
            let at = self.header.entry_offset(u64::from(first));
            let mut bytes = read_short(self.file, at, 512)?;
            for next in sector {
                let entries = bytes.as_chunks_mut::<4>().0;
                if let Some(entry) = entries.get_mut((next.block - first) as usize) {
                    *entry = next.to.to_le_bytes();
                }
            }
            self.file.write_at(at, &bytes)?;
        }
        self.file.sync()
    }

    fn copy(&self, from: u32, to: u32) -> Result<()> {
        let from = self.header.block_offset(u64::from(from));
        let to = self.header.block_offset(u64::from(to));
        let block_bytes = u64::from(self.header.block_bytes);
        let mut buffer = vec![0; block_bytes.min(COPY_BYTES) as usize];
        let mut done = 0;
        while done < block_bytes {
            self.file.read_at(from + done, &mut buffer)?;
            match buffer.iter().all(|byte| *byte == 0) {
                true => self
                    .file
                    .write_zeroes(to + done, buffer.len() as u64, true)?,
                false => self.file.write_at(to + done, &buffer)?,
            }
            done += buffer.len() as u64;
        }
        Ok(())
    }
}

/// Brings the blocks of the image in `file`, which nobody uses, close together and counts them anew. Of blocks that share
/// one place in the file each but the first gets a place with the same bytes for itself.
///
/// # Errors
///
/// As [`Layout::read`], and [`block::ErrorKind::Corrupt`] for a block that is not within the file; what reading and
/// writing fails with. The image reads as before then too.
pub fn repair(file: &dyn Storage) -> Result<()> {
    let layout = Layout::read(file)?;
    move_together(file, &layout).context(|| file.name())
}

pub(super) fn move_together(file: &dyn Storage, layout: &Layout) -> Result<()> {
    let blocks = Blocks::read(file, layout)?;
    blocks.check_within(layout)?;
    let count = blocks.present;
    let mut taken = vec![0u64; count.div_ceil(64) as usize];
    layout.entries(file, |_, entry| {
        if entry < count
            && let Some(word) = taken.get_mut((entry / 64) as usize)
        {
            *word |= 1 << (entry % 64);
        }
    })?;
    // There are as many numbers as blocks, so those are as many as blocks that have none for themselves.
    let mut free = Holes::not_in(taken, count);
    let mut kept = vec![0u64; count.div_ceil(64) as usize];
    let mut mover = Mover::new(file, &layout.header);
    layout.each(file, |block, entry| {
        if !is_there(entry) {
            return Ok(());
        }
        if let Some(word) = kept.get_mut((entry / 64) as usize)
            && entry < count
            && *word >> (entry % 64) & 1 == 0
        {
            *word |= 1 << (entry % 64);
            return Ok(());
        }
        let Some(to) = free.lowest() else {
            return Ok(());
        };
        free.remove(to);
        mover.add(Move {
            block,
            from: entry,
            to,
        })
    })?;
    mover.carry()?;
    let layout = Layout {
        header: mover.header,
        file_bytes: file.len()?,
    };
    settle_end(file, &layout, count).map(drop)
}
