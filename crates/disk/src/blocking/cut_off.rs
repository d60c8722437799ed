//! Files that end before the bytes that their images' tables point to.
//!
//! A copy that was not completed, or a file system that lost its end, leaves such a file. What is missing is lost. QEMU reads
//! zeros there, without a word, and so does a guest that is served here (as it would there). Whoever copies or compares disks must
//! not take that for their contents.
//!
//! Only bytes of the disk count: the last cluster of a file need not be whole where the disk ends within it, nor the last
//! sector of a raw one.

use crate::crypt::SECTOR;
use block::{Error, GuestOffset, HostOffset, Storage, align_up};
use image::{Compressed, Format, Image};

/// What becomes of bytes of the disk that a file should have, and is too short for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CutOff {
    /// They cannot be read.
    #[default]
    Refused,
    /// They read as zeros, as in QEMU.
    Zeros,
}

/// What helps, behind each message.
fn help(image: &dyn Image) -> &'static str {
    let format = image.describe().format.parse();
    match format.is_ok_and(Format::has_check) {
        true => {
            "'diskplane check' says what else is wrong, 'diskplane convert --salvage' copies what is left"
        }
        false => "'diskplane convert --salvage' copies what is left",
    }
}

/// How many of `len` bytes at `offset` a file has that ends at byte `end`: a sector that it ends in counts as a whole.
pub(crate) fn there(end: u64, offset: HostOffset, len: u64) -> u64 {
    align_up(end, SECTOR).saturating_sub(offset.0).min(len)
}

/// Bytes of the disk from `guest` on are missing, which belong at `at` of `file`.
#[cold]
pub(super) fn data(
    image: &dyn Image,
    file: &dyn Storage,
    guest: GuestOffset,
    at: HostOffset,
    end: u64,
) -> Error {
    Error::corrupt(format!(
        "the bytes of guest offset {:#x} are at {:#x}, but the file ends at {end:#x}: it is cut off; {}",
        guest.0,
        at.0,
        help(image)
    ))
    .within(file.name())
}

/// A packed cluster is missing, or its end, which is why it cannot be unpacked.
#[cold]
pub(super) fn packed(
    image: &dyn Image,
    file: &dyn Storage,
    packed: &Compressed,
    error: Error,
) -> Error {
    Error::corrupt(format!(
        "the compressed cluster at {:#x} has up to {:#x} bytes, but the file ends before: it is cut off ({error}); {}",
        packed.offset.0,
        packed.len,
        help(image)
    ))
    .within(file.name())
}

/// A table of the image is missing, or some of its `len` bytes, of which the first `there` are in the file.
#[cold]
pub(super) fn table(
    image: &dyn Image,
    file: &dyn Storage,
    at: HostOffset,
    (there, len): (usize, usize),
) -> Error {
    Error::corrupt(format!(
        "{len} bytes of a table of the image are at {:#x}, of which the file has {there}: it is cut off; {}",
        at.0,
        help(image)
    ))
    .within(file.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_named_where_there_is_one() {
        let raw = image::Raw::with_size(1 << 20).expect("an image");
        assert!(!help(&raw).contains("check"));
        assert!(Format::Qcow2.has_check() && !Format::Qcow.has_check());
    }

    #[test]
    fn a_sector_that_the_file_ends_in_is_there() {
        for (end, offset, len, want) in [
            (1024, 0, 1024, 1024),
            (1000, 512, 512, 512),
            (1000, 512, 513, 512),
            (1000, 1024, 1, 0),
            (1024, 4096, 512, 0),
        ] {
            let found = there(end, HostOffset(offset), len);
            assert_eq!(found, want, "{end} {offset} {len}");
        }
    }
}
