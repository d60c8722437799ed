//! Headers at the start of a file: read whole, written whole, and what is said of their fields.

use block::{Error, Result, Storage};
use std::fmt::Display;

/// A field that cannot be.
pub(crate) fn wrong(field: &str, byte: usize, what: impl Display) -> Error {
    Error::corrupt(format!("header: {field} at byte {byte} {what}"))
}

/// The header has more bytes than its file.
pub(crate) fn cut_off() -> Error {
    Error::corrupt("header: the file ends inside it")
}

/// The first `N` bytes of a file of `file_bytes`.
///
/// # Errors
///
/// The file is shorter, or what reading fails with.
pub(crate) fn read<const N: usize>(storage: &dyn Storage, file_bytes: u64) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    if file_bytes < N as u64 {
        return Err(cut_off());
    }
    storage.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// A header of these bytes, and zeros.
pub(crate) fn packed<const N: usize>(fields: impl IntoIterator<Item = u8>) -> [u8; N] {
    let mut bytes = [0; N];
    for (to, from) in bytes.iter_mut().zip(fields) {
        *to = from;
    }
    bytes
}
