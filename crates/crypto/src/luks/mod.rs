//! LUKS1 (source: "LUKS1 On-Disk Format Specification" 1.2.3; in qcow2 as QEMU's
//! `docs/interop/qcow2.rst`, "Full disk encryption header pointer").
//!
//! ```text
//!   0        header, 592 bytes: names, digest of the master key, eight slots of 48 bytes
//!   4096     material of slot 0: the master key split into 4000 stripes, encrypted by the slot's key
//!   …        materials of slots 1 to 7, each at a multiple of 4096
//!   payload  the disk's sectors; in qcow2 they are in clusters of their own
//! ```
//!
//! All offsets here are bytes from where the header begins, all numbers big-endian.

mod create;
mod header;
mod keys;
mod slot;
mod split;
#[cfg(test)]
mod tests;

pub use create::{FormatOptions, Volume};
pub use header::{Header, Slot};
pub use keys::Erase;

/// Bytes of the header.
pub const HEADER_LEN: usize = 592;
/// Key slots.
pub const SLOTS: usize = 8;
/// Parts that a master key is split into.
pub const STRIPES: u32 = 4000;
/// Where the first material may begin, and what materials are aligned to.
pub const ALIGN: u64 = 4096;
/// Bytes of a salt.
pub const SALT_LEN: usize = 32;
/// Bytes of the master key's digest.
pub const DIGEST_LEN: usize = 20;
/// Most iterations of PBKDF2 that all key slots together may ask for: some minutes of computing, many
/// times what a header with eight slots of 10 s has.
pub const ITERATIONS_MAX: u64 = 1 << 29;
/// Fewest iterations that a new slot or digest gets (QEMU's number).
pub const ITERATIONS_MIN: u32 = 1000;
/// Milliseconds that unlocking takes on the machine that made the slot, when nothing is said (QEMU's number).
pub const ITER_TIME_MS_DEFAULT: u32 = 2000;
