//! The region table ([MS-VHDX] 2.2.3), of which there are two copies.
//!
//! ```text
//!   192 K, 256 K   64 KiB each:  0 "regi"  4 checksum  8 entries │ 16 entries of 32 bytes:
//!                                0 GUID  16 offset  24 length  28 required
//! ```

use super::guid::Guid;
use super::header::HEAD_BYTES;
use super::log::View;
use super::{KIB, MIB, crc};
use crate::words::{read_u32_le, read_u64_le};
use block::{Error, Result};
use std::ops::Range;

/// Where the copies are.
pub const TABLES_AT: [u64; 2] = [192 * KIB, 256 * KIB];

/// Bytes of a copy.
pub const TABLE_BYTES: usize = 64 << 10;

/// Entries of a table, at most.
const ENTRIES_MAX: u32 = 2047;

/// The block allocation table.
const BAT: Guid = Guid::new(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
/// The metadata.
const METADATA: Guid = Guid::new(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);

/// The regions of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regions {
    /// The block allocation table.
    pub bat: Range<u64>,
    /// The metadata.
    pub metadata: Range<u64>,
    /// Those that nobody here knows, and need not.
    pub others: Vec<Range<u64>>,
    /// What is wrong with the copy that does not count, and where that is.
    pub damaged: Option<(u64, String)>,
}

impl Regions {
    /// Reads the first copy that is sound; `log` is where the log is.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] where neither is sound, or regions lie where they cannot, and
    /// [`block::ErrorKind::Unsupported`] for a required one that is not known.
    pub(super) fn read(view: &View<'_>, log: &Range<u64>) -> Result<Self> {
        let mut copies = Vec::with_capacity(2);
        for at in TABLES_AT {
            let mut bytes = vec![0; TABLE_BYTES];
            view.read(at, &mut bytes)?;
            let sound = sound(&bytes).map(|()| bytes);
            copies.push(sound.map_err(|why| format!("region table at byte {at:#x}: {why}")));
        }
        let second = copies.pop();
        let (bytes, damaged) = match (copies.pop(), second) {
            (Some(Ok(first)), Some(Ok(second))) if first == second => (first, None),
            (Some(Ok(first)), Some(Ok(_))) => {
                let why = "the region table's copies differ: the first counts".to_owned();
                (first, Some((TABLES_AT[1], why)))
            }
            (Some(Ok(first)), Some(Err(why))) => (first, Some((TABLES_AT[1], why))),
            (Some(Err(why)), Some(Ok(second))) => (second, Some((TABLES_AT[0], why))),
            (Some(Err(first)), Some(Err(second))) => {
                return Err(Error::corrupt(format!("{first}; {second}")));
            }
            _ => return Err(Error::corrupt("no region table")),
        };
        Self::parse(&bytes, damaged, log, view.end())
    }

    fn parse(
        bytes: &[u8],
        damaged: Option<(u64, String)>,
        log: &Range<u64>,
        file_bytes: u64,
    ) -> Result<Self> {
        let count = read_u32_le(bytes, 8).unwrap_or(0);
        let (mut bat, mut metadata) = (None, None);
        let mut others = Vec::new();
        let mut taken = vec![log.clone()];
        for index in 0..count as usize {
            let at = 16 + index * 32;
            let entry = bytes.get(at..at + 32).unwrap_or_default();
            let id = Guid::at(entry, 0);
            let offset = read_u64_le(entry, 16).unwrap_or(0);
            let len = u64::from(read_u32_le(entry, 24).unwrap_or(0));
            let required = read_u32_le(entry, 28).unwrap_or(0) & 1 != 0;
            let place = || format!("region {index} ({id}) at byte {offset:#x} with {len} bytes");
            let end = offset.checked_add(len).filter(|end| *end <= file_bytes);
            let end = match end {
                Some(end)
                    if offset >= HEAD_BYTES
                        && offset.is_multiple_of(MIB)
                        && len.is_multiple_of(MIB)
                        && len > 0 =>
                {
                    end
                }
                _ => {
                    return Err(Error::corrupt(format!(
                        "{}: both must be multiples of 1 MiB, behind the first and within the file of {file_bytes} \
                         bytes",
                        place()
                    )));
                }
            };
            if taken.iter().any(|t| offset < t.end && t.start < end) {
                return Err(Error::corrupt(format!(
                    "{}: lies on the log or another region",
                    place()
                )));
            }
            taken.push(offset..end);
            let slot = match id {
                BAT => &mut bat,
                METADATA => &mut metadata,
                _ if required => {
                    return Err(Error::unsupported(format!(
                        "{}: is required, and not known here",
                        place()
                    )));
                }
                _ => {
                    others.push(offset..end);
                    continue;
                }
            };
            if slot.replace(offset..end).is_some() {
                return Err(Error::corrupt(format!("{}: is there twice", place())));
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Self {
                bat,
                metadata,
                others,
                damaged,
            }),
            (None, _) => Err(Error::corrupt("the region table has no block table")),
            (_, None) => Err(Error::corrupt("the region table has no metadata")),
        }
    }
}

/// Whether a copy counts, or why not.
fn sound(bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(b"regi") {
        return Err("it does not begin with \"regi\"".to_owned());
    }
    let found = read_u32_le(bytes, 4).unwrap_or(0);
    let right = crc::of_structure(bytes);
    if found != right {
        return Err(format!(
            "checksum at byte 4 is {found:#010x}, its bytes give {right:#010x}"
        ));
    }
    match read_u32_le(bytes, 8) {
        Some(0..=ENTRIES_MAX) => Ok(()),
        count => Err(format!(
            "entries at byte 8 are {}: the most is {ENTRIES_MAX}",
            count.unwrap_or(0)
        )),
    }
}

/// The bytes of a table with these two regions.
pub(super) fn table_bytes(bat: &Range<u64>, metadata: &Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; TABLE_BYTES];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"regi");
    put(8, &2u32.to_le_bytes());
    for (at, id, range) in [(16, BAT, bat), (48, METADATA, metadata)] {
        put(at, &id.0);
        put(at + 16, &range.start.to_le_bytes());
        // Regions are smaller than 4 GiB.
        put(at + 24, &((range.end - range.start) as u32).to_le_bytes());
        // Required. (QEMU forgets to say so.)
        put(at + 28, &1u32.to_le_bytes());
    }
    crc::seal(&mut bytes);
    bytes
}

/// Makes the table in `bytes` say that the block table is at `bat`.
pub(super) fn moved_bat(bytes: &mut [u8], bat: &Range<u64>) {
    let places = bytes
        .get_mut(16..)
        .unwrap_or_default()
        .as_chunks_mut::<32>()
        .0;
    if let Some(place) = places.iter_mut().find(|place| Guid::at(*place, 0) == BAT) {
        place[16..24].copy_from_slice(&bat.start.to_le_bytes());
        // Regions are smaller than 4 GiB.
        place[24..28].copy_from_slice(&((bat.end - bat.start) as u32).to_le_bytes());
    }
    crc::seal(bytes);
}
