//! What each sector of a block carries in verify mode: whose it is, where it belongs, and when it was written.
//!
//! ```text
//!    0  "dpverify"
//!    8  run          of the load that wrote it, u64
//!   16  offset       of the sector on the disk, u64
//!   24  generation   how many times the load wrote there, from 1, u32
//!   28  checksum     CRC32C of the sector, with zeros here, u32
//!   32  480 bytes that follow from the above
//! ```
//!
//! All numbers are little-endian. A sector of its own each, since that is what a device writes as a whole.

use crc32c::{crc32c, crc32c_append};

/// Bytes of a sector.
pub(super) const SECTOR: usize = 512;
const MAGIC: &[u8; 8] = b"dpverify";
const CHECKSUM: usize = 28;
const HEAD: usize = 32;

/// Whose a sector is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub run: u64,
    pub offset: u64,
    pub generation: u32,
}

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Stamp(Stamp),
    /// As on a disk that nobody wrote to.
    Zeros,
    /// A stamp whose checksum is another: some of its bytes changed.
    Broken,
    /// What no load wrote.
    Other,
}

impl Stamp {
    /// Fills a sector.
    pub(super) fn put(self, sector: &mut [u8]) {
        let (head, rest) = sector.split_at_mut(HEAD);
        head[..8].copy_from_slice(MAGIC);
        head[8..16].copy_from_slice(&self.run.to_le_bytes());
        head[16..24].copy_from_slice(&self.offset.to_le_bytes());
        head[24..28].copy_from_slice(&self.generation.to_le_bytes());
        head[CHECKSUM..].fill(0);
        let mut word = (self.run ^ self.offset.rotate_left(23) ^ u64::from(self.generation) << 40)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            | 1;
        for bytes in rest.chunks_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
        }
        let checksum = checksum(sector).to_le_bytes();
        sector[CHECKSUM..HEAD].copy_from_slice(&checksum);
    }
}

/// The checksum of a whole sector.
fn checksum(sector: &[u8]) -> u32 {
    let sum = crc32c(&sector[..CHECKSUM]);
    let sum = crc32c_append(sum, &[0; 4]);
    crc32c_append(sum, &sector[HEAD..])
}

/// Reads a sector of [`SECTOR`] bytes.
pub(super) fn read(sector: &[u8]) -> Found {
    if sector.iter().all(|byte| *byte == 0) {
        return Found::Zeros;
    }
    let word = |at: usize| {
        let bytes = sector.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    if !sector.starts_with(MAGIC) || sector.len() != SECTOR {
        return Found::Other;
    }
    let last = word(24);
    if checksum(sector) != (last >> 32) as u32 {
        return Found::Broken;
    }
    Found::Stamp(Stamp {
        run: word(8),
        offset: word(16),
        generation: last as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_says_whose_it_is_and_any_change_shows() {
        let stamp = Stamp {
            run: 77,
            offset: 1 << 40,
            generation: 3,
        };
        let mut sector = [0; SECTOR];
        assert_eq!(read(&sector), Found::Zeros);
        stamp.put(&mut sector);
        assert_eq!(read(&sector), Found::Stamp(stamp));
        for at in 0..SECTOR {
            let mut changed = sector;
            changed[at] ^= 0x10;
            let expected = if at < 8 { Found::Other } else { Found::Broken };
            assert_eq!(read(&changed), expected, "{at}");
        }
        let mut other = [0; SECTOR];
        let later = Stamp {
            generation: 4,
            ..stamp
        };
        later.put(&mut other);
        assert_ne!(sector[HEAD..], other[HEAD..]);
        assert_eq!(read(&[1; SECTOR]), Found::Other);
    }
}
