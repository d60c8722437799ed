//! qcow2, versions 2 and 3.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`.

mod create;
pub mod extensions;
pub mod features;
mod header;

pub use create::{CreateOptions, create};
pub use header::{
    Compression, HOST_OFFSET_END, Header, L1_BYTES_MAX, MAGIC, REFCOUNT_TABLE_BYTES_MAX,
    SNAPSHOTS_MAX, V2_LEN, V3_LEN,
};

/// The big-endian number at byte `at`; `None` when the bytes end before.
fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(field.try_into().ok()?))
}

/// The big-endian number at byte `at`; `None` when the bytes end before.
fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(field.try_into().ok()?))
}
