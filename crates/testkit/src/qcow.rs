//! Looks at all tables of a qcow image of version 1, from QEMU's `block/qcow.c` and not from our code: QEMU has no check of
//! such images, and neither have we.

use std::collections::BTreeSet;

/// What is wrong with an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Entries that lead to no place where their table or cluster can be.
    pub wrong: u64,
    /// Tables and clusters that share sectors with others, or with what the header leads to.
    pub twice: u64,
}

/// Judges the image in `bytes`; `None` where its header is not one.
pub fn check(bytes: &[u8]) -> Option<Found> {
    let word = |at: u64| {
        let at = usize::try_from(at).ok()?;
        let bytes = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_be_bytes(bytes.try_into().ok()?))
    };
    let len = bytes.len() as u64;
    let (name, size, l1) = (word(8)?, word(24)?, word(40)?);
    let (cluster_bits, l2_bits) = (u32::from(*bytes.get(32)?), u32::from(*bytes.get(33)?));
    let is_qcow = bytes.starts_with(b"QFI\xfb\0\0\0\x01");
    if !is_qcow || !(9..=16).contains(&cluster_bits) || !(6..=13).contains(&l2_bits) {
        return None;
    }
    let (cluster, table) = (1 << cluster_bits, 8 << l2_bits);
    let entries = size.div_ceil(1 << (cluster_bits + l2_bits));
    let fits = |at: u64, bytes: u64| at.checked_add(bytes).is_some_and(|end| end <= len);
    let name_len = word(16)? >> 32 & 1023;
    if entries > len / 8 || !fits(l1, entries * 8) || !fits(name, name_len) {
        return None;
    }
    let mut found = Found::default();
    let mut taken = BTreeSet::new();
    // Compressed bytes share sectors with what lies beside them.
    let mut take = |from: u64, len: u64| {
        let all = from / 512..(from + len).div_ceil(512);
        let new = all.clone().filter(|sector| taken.insert(*sector)).count();
        u64::from(all.end - all.start != new as u64)
    };
    take(0, 48);
    take(name, name_len);
    take(l1, entries * 8);
    let mut tables = Vec::new();
    for at in (0..entries).map(|index| l1 + index * 8) {
        match word(at)? {
            0 => {}
            at if at % 512 != 0 || !fits(at, table) => found.wrong += 1,
            at => {
                found.twice += take(at, table);
                tables.push(at);
            }
        }
    }
    for at in tables.iter().flat_map(|at| (*at..at + table).step_by(8)) {
        match word(at)? {
            0 => {}
            entry if entry >> 63 != 0 => {
                let shift = 63 - cluster_bits;
                let (at, bytes) = (entry & ((1 << shift) - 1), (entry << 1 >> 1) >> shift);
                found.wrong += u64::from(bytes == 0 || at < 48 || at + bytes > len);
            }
            at if at % 512 != 0 || !fits(at, cluster) => found.wrong += 1,
            at => found.twice += take(at, cluster),
        }
    }
    Some(found)
}
