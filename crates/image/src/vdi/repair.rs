//! Blocks that are moved within the file of an image that nobody uses.
//!
//! ```text
//!   data of the blocks in their new places · header, where it counts fewer · entries of the map
//! ```
//!
//! Each is durable before the next begins, and nothing is written where a block is: so a crash leaves each block in its
//! old place or in its new one, which hold the same.

use super::header::Header;
use super::open::{Blocks, Layout, is_there, settle_end};
use block::{Context, Result, Storage};

/// Blocks that are moved before their entries are.
const MOVES_AT_ONCE: usize = 4096;

/// Bytes that are copied at a time.
const COPY_BYTES: u64 = 1 << 20;

/// An image whose blocks are moved.
pub(super) struct Mover<'a> {
    pub(super) file: &'a dyn Storage,
    /// As it is in the file.
    pub(super) header: Header,
    /// The map as it is in the file, in whole sectors.
    pub(super) entries: Vec<u32>,
}

impl Mover<'_> {
    /// Gives each guest block of `moves` the number that stands beside it, which no block has.
    pub(super) fn carry(&mut self, moves: &[(u32, u32)]) -> Result<()> {
        for batch in moves.chunks(MOVES_AT_ONCE) {
            let highest = batch.iter().map(|(_, to)| *to).max().unwrap_or(0);
            let end = self.header.block_offset(u64::from(highest) + 1);
            if self.file.len()? < end {
                self.file.set_len(end)?;
            }
            for (block, to) in batch {
                self.copy(*block, *to)?;
            }
            self.file.sync()?;
            if self.header.allocated <= highest {
                self.header.allocated = highest + 1;
                self.file.write_at(0, &self.header.to_bytes())?;
                self.file.sync()?;
            }
            let mut sectors: Vec<u32> = batch.iter().map(|(block, _)| block / 128).collect();
            for (block, to) in batch {
                if let Some(entry) = self.entries.get_mut(*block as usize) {
                    *entry = *to;
                }
            }
            sectors.sort_unstable();
            sectors.dedup();
            for sector in sectors {
                let first = sector as usize * 128;
                let part = self.entries.get(first..first + 128).unwrap_or_default();
                let bytes: Vec<u8> = part.iter().flat_map(|entry| entry.to_le_bytes()).collect();
                let at = u64::from(self.header.map_offset) + first as u64 * 4;
                self.file.write_at(at, &bytes)?;
            }
            self.file.sync()?;
        }
        Ok(())
    }

    fn copy(&self, block: u32, to: u32) -> Result<()> {
        let entry = self.entries.get(block as usize).copied().unwrap_or(0);
        let from = self.header.block_offset(u64::from(entry));
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

fn move_together(file: &dyn Storage, layout: &Layout) -> Result<()> {
    let blocks = Blocks::read(file, layout)?;
    blocks.check_within(layout)?;
    let count = blocks.present;
    let mut used = vec![0u64; count.div_ceil(64) as usize];
    let mut homeless = Vec::new();
    for (block, entry) in (0..).zip(blocks.of_disk(&layout.header)) {
        if !is_there(*entry) {
            continue;
        }
        match used.get_mut((entry / 64) as usize) {
            Some(word) if *entry < count && *word >> (entry % 64) & 1 == 0 => {
                *word |= 1 << (entry % 64);
            }
            _ => homeless.push(block),
        }
    }
    let taken = |number: &u32| {
        let word = used.get((number / 64) as usize).copied().unwrap_or(0);
        word >> (number % 64) & 1 == 1
    };
    let free = (0..count).filter(|number| !taken(number));
    // There are as many numbers as blocks, so the two are equally many.
    let moves: Vec<(u32, u32)> = homeless.into_iter().zip(free).collect();
    let mut mover = Mover {
        file,
        header: layout.header.clone(),
        entries: blocks.entries,
    };
    mover.carry(&moves)?;
    let layout = Layout {
        header: mover.header,
        file_bytes: file.len()?,
    };
    settle_end(file, &layout, count).map(drop)
}
