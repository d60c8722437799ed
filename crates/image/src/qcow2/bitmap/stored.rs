//! The bits of a bitmap that are on disk: read a piece after the other, so that however many there are takes little memory.

use super::bits::{Bits, PIECE, bytes_needed};
use super::directory::Entry;
use super::table::{ONES, entries_needed, read_table};
use crate::qcow2::check::{Layout, bitmap_data};
use block::{Context, Error, Result, Storage};

/// What says which bits of a bitmap are to be set.
pub trait Source {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Sets the bits in `piece` of all that is set here. Pieces are asked for in the order of the disk.
    ///
    /// # Errors
    ///
    /// What reading fails with.
    fn mark_in(&mut self, piece: &Bits) -> Result<()>;
}

impl Source for &Bits {
    fn size(&self) -> u64 {
        self.range().end
    }

    fn mark_in(&mut self, piece: &Bits) -> Result<()> {
        piece.merge(self);
        Ok(())
    }
}

/// A bitmap on disk. Memory: its table, 8 MiB at most, and a piece of its bits, 4 MiB.
#[derive(Debug)]
pub struct Stored<'a> {
    storage: &'a dyn Storage,
    layout: Layout,
    /// Bytes of the disk.
    size: u64,
    granularity_bits: u32,
    name: String,
    table: Vec<u64>,
    /// The piece that was read last, and its number.
    last: Option<(u64, Bits)>,
}

impl<'a> Stored<'a> {
    /// The bitmap of `entry`, of a disk of `size` bytes. Its table is looked through.
    pub(super) fn open(
        storage: &'a dyn Storage,
        layout: Layout,
        size: u64,
        entry: &Entry,
    ) -> Result<Self> {
        entry.check_usable()?;
        let table = || {
            let needed = entries_needed(&layout, size, entry.granularity_bits);
            if needed != u64::from(entry.entries) {
                return Err(Error::corrupt(format!(
                    "its table has {} entries, the disk's size needs {needed}",
                    entry.entries
                )));
            }
            let table = read_table(storage, &layout, entry)?;
            let wrong = (0..)
                .zip(&table)
                .find(|(_, raw)| bitmap_data(&layout, **raw).is_none());
            match wrong {
                None => Ok(table),
                Some((index, raw)) => Err(Error::corrupt(format!(
                    "its table entry {index} at {:#x} is {raw:#x}",
                    entry.table + index * 8
                ))),
            }
        };
        Ok(Self {
            storage,
            layout,
            size,
            granularity_bits: u32::from(entry.granularity_bits),
            table: table().context(|| format!("bitmap '{}'", entry.name()))?,
            name: entry.name(),
            last: None,
        })
    }

    /// All of its bits. Memory: at most 512 MiB more.
    ///
    /// # Errors
    ///
    /// What reading fails with.
    pub fn load(mut self) -> Result<Bits> {
        let bits = Bits::new(self.size, self.granularity_bits)?;
        self.mark_in(&bits)?;
        Ok(bits)
    }

    /// Bytes of the disk whose bits are set.
    ///
    /// # Errors
    ///
    /// What reading fails with.
    pub fn dirty_bytes(&mut self) -> Result<u64> {
        let mut dirty = 0;
        for nth in 0..self.pieces() {
            dirty += self.piece(nth)?.dirty_bytes();
        }
        Ok(dirty)
    }

    fn pieces(&self) -> u64 {
        (bytes_needed(self.size, self.granularity_bits) * 8).div_ceil(PIECE)
    }

    fn piece(&mut self, nth: u64) -> Result<&Bits> {
        let bits = match self.last.take() {
            Some((last, bits)) if last == nth => bits,
            _ => self
                .read(nth)
                .context(|| format!("bitmap '{}'", self.name))
                .context(|| self.storage.name())?,
        };
        Ok(&self.last.insert((nth, bits)).1)
    }

    fn read(&self, nth: u64) -> Result<Bits> {
        let bits = Bits::piece(nth, self.size, self.granularity_bits);
        let cluster = self.layout.cluster();
        let of_piece = PIECE / 8 / cluster;
        let entries = self.table.iter().skip((nth * of_piece) as usize);
        for (index, raw) in (0..of_piece).zip(entries) {
            match bitmap_data(&self.layout, *raw).unwrap_or(0) {
                0 if raw & ONES != 0 => bits.fill(index, cluster),
                0 => {}
                data => {
                    // What is missing is not clean.
                    let mut bytes = vec![0; cluster as usize];
                    self.storage
                        .read_at(data, &mut bytes)
                        .context(|| format!("its data at {data:#x}"))?;
                    bits.take_in(index, &bytes);
                }
            }
        }
        Ok(bits)
    }
}

impl Source for &mut Stored<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn mark_in(&mut self, piece: &Bits) -> Result<()> {
        Stored::mark_in(self, piece)
    }
}

impl Stored<'_> {
    fn mark_in(&mut self, piece: &Bits) -> Result<()> {
        let bytes = PIECE << self.granularity_bits;
        let range = piece.range();
        let end = range.end.min(self.size).div_ceil(bytes);
        for nth in range.start / bytes..end {
            piece.merge(self.piece(nth)?);
        }
        Ok(())
    }
}
