//! Space for a disk before it is written to.

use crate::work::Stop;
use block::{Error, Result, Storage};
use std::str::FromStr;

/// Bytes of zeros written between two looks at the wish to stop.
const PIECE_BYTES: u64 = 1 << 20;
/// Bytes that are reserved between two looks: a file system may have to write them.
const ALLOCATE_BYTES: u64 = 1 << 30;
/// Bytes that become a hole between two looks.
const METADATA_BYTES: u64 = 64 << 30;

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

/// Does to `len` bytes of `file` from `at` on, which read as zeros, what `mode` wants of the host, until `stop` asks for
/// the end.
///
/// # Errors
///
/// What the host fails with, and [`block::ErrorKind::Interrupted`]: some of the space may be taken then.
pub fn fill_host(
    mode: Preallocation,
    file: &dyn Storage,
    at: u64,
    len: u64,
    stop: &Stop,
) -> Result<()> {
    let most = match mode {
        Preallocation::Off => return Ok(()),
        Preallocation::Metadata => METADATA_BYTES,
        Preallocation::Falloc => ALLOCATE_BYTES,
        Preallocation::Full => PIECE_BYTES,
    };
    let zeros = match mode {
        // At most 1 MiB.
        Preallocation::Full => vec![0; most.min(len) as usize],
        _ => Vec::new(),
    };
    let mut done = 0;
    while done < len {
        stop.check()?;
        let (at, part) = (at + done, (len - done).min(most));
        match mode {
            Preallocation::Off => {}
            // A growing image reserves space ahead for itself: this was not asked for.
            Preallocation::Metadata => file.write_zeroes(at, part, true)?,
            Preallocation::Falloc => file.allocate(at, part).map(drop)?,
            Preallocation::Full => {
                file.write_at(at, zeros.get(..part as usize).unwrap_or(&zeros))?;
            }
        }
        done += part;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::ErrorKind;
    use io::{SimDisk, SimOptions};

    #[test]
    fn space_is_taken_until_the_end_is_asked_for() {
        let len = 3 * PIECE_BYTES + 512;
        for mode in [
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ] {
            let file = SimDisk::new(SimOptions::default());
            // Zeros make no file longer.
            let begin = if mode == Preallocation::Metadata {
                len
            } else {
                0
            };
            file.set_len(512 + begin).unwrap();
            let before = file.log_len();
            let stop = Stop::default();
            fill_host(mode, &*file, 512, len, &stop).unwrap();
            assert!(file.log_len() > before, "{mode:?}");
            assert_eq!(file.len().unwrap(), 512 + len, "{mode:?}");
            let before = file.log_len();
            stop.request();
            let error = fill_host(mode, &*file, 512, len, &stop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Interrupted, "{mode:?}");
            assert_eq!(file.log_len(), before, "{mode:?}");
        }
        let file = SimDisk::new(SimOptions::default());
        fill_host(Preallocation::Off, &*file, 0, len, &Stop::default()).unwrap();
        assert_eq!(file.log_len(), 0);
    }
}
