//! Entries of the snapshot table.
//!
//! ```text
//!    0 l1_table_offset     12 id length      24 VM clock      36 length of the extra data
//!    8 l1_size             14 name length    32 VM state      40 … extra data, id, name, padding to 8
//!   extra data:  0 VM state size, 64 bits    8 disk size    16 … unknown, kept
//! ```

use crate::qcow2::{read_u32, read_u64};

/// Bytes of an entry before its extra data.
pub const SNAPSHOT_BYTES: usize = 40;
/// Extra data that an entry of a version 3 image must have.
pub const SNAPSHOT_EXTRA_BYTES: u32 = 16;
/// Bytes of extra data that are known, and that QEMU writes: size of the VM state, of the disk, count of instructions.
pub const SNAPSHOT_EXTRA_BYTES_KNOWN: u32 = 24;
/// In place of the count of instructions: they were not counted.
pub const NO_ICOUNT: u64 = u64::MAX;
/// Most extra data that QEMU opens an image with; more is cut off by a repair.
pub const SNAPSHOT_EXTRA_BYTES_MAX: u32 = 1024;
/// Largest snapshot table (QEMU's limit); a repair drops the snapshots behind.
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 1024 * 65536;

/// The fixed part of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// Entries of that.
    pub l1_size: u32,
    /// Bytes of its id.
    pub id_len: u16,
    /// Bytes of its name.
    pub name_len: u16,
    /// Bytes of its extra data.
    pub extra_len: u32,
}

impl Snapshot {
    /// Reads the fixed part; `None` where `bytes` are fewer than [`SNAPSHOT_BYTES`].
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let lengths = read_u32(bytes, 12)?;
        let [a, b, c, d] = lengths.to_be_bytes();
        Some(Self {
            l1_offset: read_u64(bytes, 0)?,
            l1_size: read_u32(bytes, 8)?,
            id_len: u16::from_be_bytes([a, b]),
            name_len: u16::from_be_bytes([c, d]),
            extra_len: read_u32(bytes, 36)?,
        })
    }

    /// Bytes of the whole entry without the padding.
    pub fn len(&self) -> u64 {
        SNAPSHOT_BYTES as u64
            + u64::from(self.extra_len)
            + u64::from(self.id_len)
            + u64::from(self.name_len)
    }

    /// Never: an entry has its fixed part.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The extra data's length once repaired: all that QEMU writes, and what it accepts.
    pub fn sound_extra_len(&self) -> u32 {
        self.extra_len
            .clamp(SNAPSHOT_EXTRA_BYTES_KNOWN, SNAPSHOT_EXTRA_BYTES_MAX)
    }

    /// The entry with sound extra data, as it is written: `bytes` is the whole entry (or what the
    /// file has of it), `disk_size` the image's, for an entry that does not have its own.
    pub fn rewrite(&self, bytes: &[u8], disk_size: u64, out: &mut Vec<u8>) {
        let extra_len = self.sound_extra_len();
        let fixed_at = out.len();
        let mut part = |from: u64, len: u64| {
            let range = usize::try_from(from)
                .ok()
                .zip(usize::try_from(from.saturating_add(len)).ok());
            // What the file lacks is zeros.
            let there = range.and_then(|(from, to)| bytes.get(from..to.min(bytes.len())));
            let start = out.len();
            out.extend_from_slice(there.unwrap_or_default());
            out.resize(start + usize::try_from(len).unwrap_or(0), 0);
        };
        let fixed = SNAPSHOT_BYTES as u64;
        part(0, fixed);
        let kept = self.extra_len.min(extra_len);
        part(fixed, u64::from(kept));
        let strings = fixed + u64::from(self.extra_len);
        if kept < 8 {
            // Below 64 bits it counts for nothing: the 32-bit size is the one.
            let state = u64::from(read_u32(bytes, 32).unwrap_or(0));
            out.truncate(fixed_at + SNAPSHOT_BYTES);
            out.extend_from_slice(&state.to_be_bytes());
        }
        // What is there of a field that is not whole counts for nothing.
        for (at, value) in [(8, disk_size), (16, NO_ICOUNT)] {
            if kept < at + 8 {
                out.truncate(fixed_at + SNAPSHOT_BYTES + at as usize);
                out.extend_from_slice(&value.to_be_bytes());
            }
        }
        let mut part = |from: u64, len: usize| {
            let from = usize::try_from(from).unwrap_or(usize::MAX);
            let there = bytes.get(from..).unwrap_or_default();
            let there = there.get(..len.min(there.len())).unwrap_or_default();
            let start = out.len();
            out.extend_from_slice(there);
            out.resize(start + len, 0);
        };
        part(
            strings,
            usize::from(self.id_len) + usize::from(self.name_len),
        );
        out.resize(fixed_at + (out.len() - fixed_at).next_multiple_of(8), 0);
        if let Some(field) = out.get_mut(fixed_at + 36..fixed_at + 40) {
            field.copy_from_slice(&extra_len.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(extra: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; SNAPSHOT_BYTES];
        bytes[0..8].copy_from_slice(&0x5_0000u64.to_be_bytes());
        bytes[8..12].copy_from_slice(&3u32.to_be_bytes());
        bytes[12..16].copy_from_slice(&[0, 1, 0, 4]);
        bytes[32..36].copy_from_slice(&77u32.to_be_bytes());
        bytes[36..40].copy_from_slice(&(extra.len() as u32).to_be_bytes());
        bytes.extend_from_slice(extra);
        bytes.extend_from_slice(b"1name");
        bytes
    }

    #[test]
    fn extra_data_are_made_sound() {
        let long = [9; 1500];
        let state_and_disk = [77u64.to_be_bytes(), 4096u64.to_be_bytes(), [0xff; 8]].concat();
        let own_state = [[1; 8], 4096u64.to_be_bytes(), [0xff; 8]].concat();
        for (extra, want) in [
            (&[][..], &state_and_disk[..]),
            (&[5; 3], &state_and_disk),
            (&[1; 8], &own_state),
            (&[1; 12], &own_state),
            (&[2; 16], &[[2; 16].to_vec(), vec![0xff; 8]].concat()),
            (&[2; 23], &[[2; 16].to_vec(), vec![0xff; 8]].concat()),
            (&[2; 24], &[2; 24]),
            (&long, &long[..1024]),
        ] {
            let bytes = entry(extra);
            let snapshot = Snapshot::parse(&bytes).expect("an entry");
            assert_eq!(snapshot.len(), bytes.len() as u64);
            let mut out = vec![0xee; 8];
            snapshot.rewrite(&bytes, 4096, &mut out);
            let again = Snapshot::parse(&out[8..]).expect("an entry");
            let at = 8 + SNAPSHOT_BYTES;
            assert_eq!(again.extra_len as usize, want.len());
            assert_eq!(&out[at..at + want.len()], want);
            assert_eq!(&out[at + want.len()..][..5], b"1name");
            assert_eq!(out.len() % 8, 0);
            assert_eq!(
                Snapshot {
                    extra_len: snapshot.extra_len,
                    ..again
                },
                snapshot
            );
        }
        assert_eq!(Snapshot::parse(&entry(&[])[..39]), None);
    }
}
