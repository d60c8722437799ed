//! Entries of tables as the file has them, and as they are in memory.

/// How a file's tables are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// QED: 64-bit offsets in bytes, in units of clusters; 1 for zeros.
    Qed,
    /// VMDK: 32-bit numbers of sectors; `zeros`: 1 stands for zeros.
    Sectors {
        /// Whether 1 does.
        zeros: bool,
    },
    /// VMDK's SESPARSE, for reading: 64-bit numbers of 4 KiB grains in bits that are in disorder, counted from the byte
    /// `grains` on.
    Se {
        /// Where the first grain is.
        grains: u64,
    },
    /// qcow version 1: 64-bit big-endian offsets in bytes, or with bit 63 set the place and length of compressed bytes.
    Qcow,
}

/// What no form has: an entry that is not understood. Below every cluster, and no multiple of 512.
const UNKNOWN: u64 = 2;

impl Form {
    /// log2 of the bytes of memory for each byte of an L2 table in the file.
    pub(crate) fn shift(self) -> u32 {
        match self {
            Form::Qed | Form::Se { .. } | Form::Qcow => 0,
            Form::Sectors { .. } => 1,
        }
    }

    /// What offsets of clusters are multiples of.
    pub(crate) fn align(self, cluster: u64) -> u64 {
        match self {
            Form::Qed => cluster,
            Form::Sectors { .. } | Form::Se { .. } | Form::Qcow => 512,
        }
    }

    /// What offsets of tables are multiples of.
    pub(crate) fn table_align(self, cluster: u64) -> u64 {
        self.align(cluster)
    }

    /// Whether an entry can say that a cluster reads as zeros.
    pub(crate) fn has_zeros(self) -> bool {
        !matches!(self, Form::Sectors { zeros: false } | Form::Qcow)
    }

    /// Whether an entry with bit 63 is that of a compressed cluster.
    #[inline]
    pub(crate) fn has_compressed(self) -> bool {
        self == Form::Qcow
    }

    /// Appends the entries in `bytes`.
    pub(crate) fn decode(self, bytes: &[u8], words: &mut Vec<u64>) {
        match self {
            Form::Qed => words.extend(words_of(bytes)),
            Form::Sectors { zeros } => {
                let entries = bytes.as_chunks::<4>().0.iter();
                words.extend(entries.map(|e| match u32::from_le_bytes(*e) {
                    1 if zeros => 1,
                    sector => u64::from(sector) << 9,
                }));
            }
            Form::Se { grains } => words.extend(words_of(bytes).map(|raw| se_grain(raw, grains))),
            Form::Qcow => words.extend(words_of(bytes).map(|raw| match raw.swap_bytes() {
                // What stands for zeros in other formats points between clusters here.
                1 => UNKNOWN,
                raw => raw,
            })),
        }
    }

    /// Appends an entry as the file has it.
    pub(crate) fn encode(self, word: u64, bytes: &mut Vec<u8>) {
        match self {
            Form::Sectors { .. } => {
                let sector = if word == 1 { 1 } else { word >> 9 };
                // Clusters lie below 2^32 sectors.
                bytes.extend_from_slice(&u32::try_from(sector).unwrap_or(u32::MAX).to_le_bytes());
            }
            Form::Qed | Form::Se { .. } => bytes.extend_from_slice(&word.to_le_bytes()),
            Form::Qcow => bytes.extend_from_slice(&word.to_be_bytes()),
        }
    }

    /// The names of L1 and L2 entries in errors.
    pub(crate) fn names(self) -> (&'static str, &'static str) {
        match self {
            Form::Qed | Form::Qcow => ("L1 entry", "L2 entry"),
            _ => ("grain directory entry", "grain table entry"),
        }
    }

    /// What to do with a damaged image.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Form::Qed => "run diskplane check --repair all",
            Form::Qcow => "convert what can be read of it",
            _ => "run diskplane check, and convert what can be read of it",
        }
    }
}

/// A grain table entry of SESPARSE (QEMU's `block/vmdk.c` is the only description): the upper four bits say what it is, and
/// of a grain's number the low 12 bits are the 12 below them.
fn se_grain(raw: u64, grains: u64) -> u64 {
    match raw >> 60 {
        0 if raw == 0 => 0,
        // Unmapped by the guest, or zeros.
        1 | 2 => 1,
        3 => {
            let number = (raw & 0x0fff_0000_0000_0000) >> 48 | (raw & 0x0000_ffff_ffff_ffff) << 12;
            let offset = number.checked_mul(4096);
            offset
                .and_then(|offset| offset.checked_add(grains))
                .unwrap_or(UNKNOWN)
        }
        _ => UNKNOWN,
    }
}

/// 64-bit little-endian words.
pub(crate) fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|w| u64::from_le_bytes(*w))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_what_the_file_says() {
        for (form, bytes, want) in [
            (Form::Qed, &[0, 0, 1, 0, 0, 0, 0, 0][..], &[0x10000][..]),
            (
                Form::Sectors { zeros: true },
                &[1, 0, 0, 0, 0x80, 0, 0, 0],
                &[1, 0x10000],
            ),
            (Form::Sectors { zeros: false }, &[1, 0, 0, 0], &[512]),
            (
                Form::Se { grains: 1 << 20 },
                // Grain 0x2001: low 12 bits 1, the rest 2.
                &[2, 0, 0, 0, 0, 0, 0x01, 0x30],
                &[(1 << 20) + 0x2001 * 4096],
            ),
            (Form::Se { grains: 0 }, &[0, 0, 0, 0, 0, 0, 0, 0x20], &[1]),
            (Form::Se { grains: 0 }, &[0, 0, 0, 0, 0, 0, 0, 0x40], &[2]),
            (Form::Se { grains: 0 }, &[0xff; 8], &[2]),
            (Form::Qcow, &[0, 0, 0, 0, 0, 1, 0, 0], &[0x10000]),
            (
                Form::Qcow,
                &[0x80, 0x10, 0, 0, 0, 0, 0, 7],
                &[(1 << 63) + (1 << 52) + 7],
            ),
            (Form::Qcow, &[0, 0, 0, 0, 0, 0, 0, 1], &[2]),
        ] {
            let mut words = Vec::new();
            form.decode(bytes, &mut words);
            assert_eq!(words, want, "{form:?}");
            if matches!(form, Form::Se { .. }) || want == [UNKNOWN] {
                continue;
            }
            let mut back = Vec::new();
            for word in &words {
                form.encode(*word, &mut back);
            }
            assert_eq!(back, bytes, "{form:?}");
        }
    }
}
