//! CRC-32C (Castagnoli), the checksum of all VHDX structures.

/// A checksum that grows piece by piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crc(u32);

impl Crc {
    /// Of nothing yet.
    pub(super) fn new() -> Self {
        Self(0)
    }

    /// Goes on with `bytes`.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0 = crc32c::crc32c_append(self.0, bytes);
    }

    /// The checksum.
    pub(super) fn value(self) -> u32 {
        self.0
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
