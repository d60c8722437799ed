//! CRC-32C (Castagnoli), the checksum of all VHDX structures.
//!
//! By tables, eight bytes at a time: checksums are of a few KiB for each flush that has metadata to write.

/// The polynomial, with its bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut level = 1;
    while level < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[level - 1][byte];
            tables[level][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        level += 1;
    }
    tables
}

/// A checksum that grows piece by piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crc(u32);

impl Crc {
    /// Of nothing yet.
    pub(super) fn new() -> Self {
        Self(u32::MAX)
    }

    /// Goes on with `bytes`.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut crc = self.0;
        for word in words {
            let [a, b, c, d, e, f, g, h] =
                (u64::from_le_bytes(*word) ^ u64::from(crc)).to_le_bytes();
            crc = TABLES[7][usize::from(a)]
                ^ TABLES[6][usize::from(b)]
                ^ TABLES[5][usize::from(c)]
                ^ TABLES[4][usize::from(d)]
                ^ TABLES[3][usize::from(e)]
                ^ TABLES[2][usize::from(f)]
                ^ TABLES[1][usize::from(g)]
                ^ TABLES[0][usize::from(h)];
        }
        for byte in rest {
            let [low, ..] = crc.to_le_bytes();
            crc = (crc >> 8) ^ TABLES[0][usize::from(low ^ byte)];
        }
        self.0 = crc;
    }

    /// The checksum.
    pub(super) fn value(self) -> u32 {
        !self.0
    }
}

/// The checksum of a structure whose own checksum, at byte 4, counts as zeros.
pub(super) fn of_structure(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.add(bytes.get(..4).unwrap_or_default());
    crc.add(&[0; 4]);
    crc.add(bytes.get(8..).unwrap_or_default());
    crc.value()
}

/// Puts the checksum into a structure.
pub(super) fn seal(bytes: &mut [u8]) {
    let sum = of_structure(bytes);
    if let Some(field) = bytes.get_mut(4..8) {
        field.copy_from_slice(&sum.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_standard() {
        // RFC 3720, B.4.
        let ascending: Vec<u8> = (0..32).collect();
        for (bytes, sum) in [
            (&b"123456789"[..], 0xe306_9283),
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
        ] {
            for split in 0..bytes.len() {
                let mut crc = Crc::new();
                crc.add(&bytes[..split]);
                crc.add(&bytes[split..]);
                assert_eq!(crc.value(), sum, "{bytes:?} in two at {split}");
            }
        }
    }
}
