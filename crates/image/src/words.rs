//! Numbers in bytes from a file: big-endian ones, and little-endian ones where the name says so; and what bitmaps
//! do not have.

use block::Result;
use std::ops::Range;

/// The big-endian number at byte `at`; `None` when the bytes end before.
pub(crate) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(field.try_into().ok()?))
}

/// The big-endian number at byte `at`; `None` when the bytes end before.
pub(crate) fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(field.try_into().ok()?))
}

/// The little-endian number at byte `at`; `None` when the bytes end before.
pub(crate) fn read_u16_le(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_le_bytes(field.try_into().ok()?))
}

/// The little-endian number at byte `at`; `None` when the bytes end before.
pub(crate) fn read_u32_le(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

/// The little-endian number at byte `at`; `None` when the bytes end before.
pub(crate) fn read_u64_le(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

/// Calls `gap` with each run of the first `count` units that a bitmap, which `has` looks into, does not have.
///
/// # Errors
///
/// The first of `gap`.
pub(crate) fn each_gap(
    count: u64,
    has: impl Fn(u64) -> bool,
    mut gap: impl FnMut(Range<u64>) -> Result<()>,
) -> Result<()> {
    let mut at = 0;
    while at < count {
        let end = (at..count).find(|unit| has(*unit)).unwrap_or(count);
        if end > at {
            gap(at..end)?;
        }
        at = end + 1;
    }
    Ok(())
}
