//! Space for a disk before it is written to.

use block::{Error, Result, Storage};
use std::str::FromStr;

/// Bytes of zeros written at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// What a new disk, or a new part of one, gets at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: space is taken as it is written to.
    #[default]
    Off,
    /// Its place in the file, which stays sparse.
    Metadata,
    /// Besides, the file system reserves the space.
    Falloc,
    /// Besides, zeros are written to it.
    Full,
}

impl Preallocation {
    /// The names, as messages list them.
    pub const NAMES: &'static str = "off, metadata, falloc or full";

    /// The name, as after `preallocation=`.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }
}

impl FromStr for Preallocation {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Off, Self::Metadata, Self::Falloc, Self::Full]
            .into_iter()
            .find(|mode| mode.name() == text)
            .ok_or_else(|| {
                Error::invalid(format!(
                    "'{}' is no preallocation: {}",
                    text.escape_default(),
                    Self::NAMES
                ))
            })
    }
}

/// Does to `len` bytes of `file` from `at` on, which read as zeros, what `mode` wants of the host.
///
/// # Errors
///
/// What the host fails with.
pub fn fill_host(mode: Preallocation, file: &dyn Storage, at: u64, len: u64) -> Result<()> {
    match mode {
        _ if len == 0 => Ok(()),
        Preallocation::Off => Ok(()),
        // A growing image reserves space ahead for itself: this was not asked for.
        Preallocation::Metadata => file.write_zeroes(at, len, true),
        Preallocation::Falloc => file.allocate(at, len).map(drop),
        Preallocation::Full => {
            // At most 1 MiB.
            let zeros = vec![0; PIECE_BYTES.min(len) as usize];
            let mut done = 0;
            while done < len {
                let part = (len - done).min(PIECE_BYTES) as usize;
                file.write_at(at + done, zeros.get(..part).unwrap_or(&zeros))?;
                done += part as u64;
            }
            Ok(())
        }
    }
}
