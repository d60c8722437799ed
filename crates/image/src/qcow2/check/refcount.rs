//! Refcount table and blocks as a check sees them.

use super::Layout;
use crate::qcow2::entry::{HOST_END_MAX, SECTOR, refcount_at};
use crate::qcow2::read_u64;

/// What an entry of the refcount table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// No block: all its clusters have refcount 0.
    None,
    /// The block at this offset. [`BlockFault::Reserved`] may still be wrong with the entry.
    At(u64),
    /// No refcount can be had: the entry does not point at a cluster.
    Lost,
}

/// What is wrong with an entry of the refcount table. Each counts as one corruption, and the
/// refcounts have to be rebuilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockFault {
    /// Reserved bits are set.
    Reserved,
    /// It points between clusters.
    Misaligned,
}

impl BlockFault {
    /// What is wrong, to follow "the entry".
    pub fn text(self) -> &'static str {
        match self {
            BlockFault::Reserved => "has reserved bits set",
            BlockFault::Misaligned => "points between clusters",
        }
    }
}

/// Judges an entry of the refcount table.
pub fn block_at(layout: &Layout, raw: u64) -> (Block, Option<BlockFault>) {
    // Bits 56–63 belong to the offset here.
    let offset = raw & !(SECTOR - 1);
    let fault = if raw != offset {
        Some(BlockFault::Reserved)
    } else if layout.within(offset) != 0 {
        Some(BlockFault::Misaligned)
    } else {
        None
    };
    let block = if offset == 0 {
        Block::None
    } else if layout.within(offset) != 0 || offset > HOST_END_MAX - layout.cluster() {
        Block::Lost
    } else {
        Block::At(offset)
    };
    (block, fault)
}

/// Calls `each` with index and value of the refcounts in `block` that are not 0, in order, for the
/// first `count` of them.
pub fn each_refcount(order: u32, block: &[u8], count: u64, mut each: impl FnMut(u64, u64)) {
    let per_word_bits = 6 - order.min(6);
    let per_word = 1u64 << per_word_bits;
    for (nth, bytes) in block.chunks_exact(8).enumerate() {
        let first = (nth as u64) << per_word_bits;
        if first >= count {
            break;
        }
        let Some(word) = read_u64(bytes, 0).filter(|word| *word != 0) else {
            continue;
        };
        for index in first..(first + per_word).min(count) {
            let (_, shift, mask) = refcount_at(index, order);
            let value = word >> shift & mask;
            if value != 0 {
                each(index, value);
            }
        }
    }
}

/// Sets refcount `index` of `block`; larger values than fit are cut to the largest. Returns the byte that
/// the word with it starts at, `None` where the block ends before.
pub fn set_refcount(layout: &Layout, block: &mut [u8], index: u64, value: u64) -> Option<usize> {
    let (word_at, shift, mask) = refcount_at(index, layout.refcount_order);
    let at = word_at.checked_mul(8)?;
    let word = read_u64(block, at)?;
    let word = word & !(mask << shift) | value.min(mask) << shift;
    block
        .get_mut(at..at + 8)?
        .copy_from_slice(&word.to_be_bytes());
    Some(at)
}

#[cfg(test)]
mod tests {
    use super::super::layout;
    use super::*;

    #[test]
    fn table_entries_are_judged() {
        let l = layout(16, 4);
        for (raw, want) in [
            (0, (Block::None, None)),
            (0x5_0000, (Block::At(0x5_0000), None)),
            (0x5_0001, (Block::At(0x5_0000), Some(BlockFault::Reserved))),
            (0x5_0200, (Block::Lost, Some(BlockFault::Misaligned))),
            (1, (Block::None, Some(BlockFault::Reserved))),
            (!0xffff, (Block::Lost, None)),
        ] {
            assert_eq!(block_at(&l, raw), want, "{raw:#x}");
        }
    }

    #[test]
    fn what_is_set_is_found_in_every_width() {
        for order in 0..=6 {
            let l = layout(9, order);
            let mut block = vec![0; 512];
            let count = 1u64 << l.block_bits();
            let want: Vec<(u64, u64)> = (0..count)
                .filter(|i| i % 3 == 0)
                .map(|i| (i, (i * 37 + 1).min(l.refcount_max())))
                .collect();
            for (index, value) in &want {
                assert!(set_refcount(&l, &mut block, *index, *value).is_some());
            }
            let mut found = Vec::new();
            each_refcount(order, &block, count, |i, v| found.push((i, v)));
            assert_eq!(found, want, "order {order}");
            found.clear();
            each_refcount(order, &block, 7, |i, v| found.push((i, v)));
            assert_eq!(found, want[..3], "order {order}, cut short");
            assert_eq!(set_refcount(&l, &mut block, count, 1), None);
        }
        assert_eq!(layout(9, 6).refcount_max(), u64::MAX);
        assert_eq!(layout(9, 0).refcount_max(), 1);
    }
}
