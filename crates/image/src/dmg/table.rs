//! The trailer, and the tables of chunks that it leads to.
//!
//! | trailer | | table | |
//! |---|---|---|---|
//! | 0x18 | data fork | 0 | "mish" |
//! | 0x28, 0x30 | resource fork and its length | 8 | first sector |
//! | 0xd8, 0xe0 | property list and its length | 0x18 | where in the data fork |
//! | 0x1ec | sectors of the disk | 204 | chunks, of 40 bytes: kind, sector (8), sectors (16), place (24), length (32) |

use super::{CHUNK_BYTES_MAX, CHUNK_SECTORS_MAX, SECTOR};
use crate::words::{read_u32, read_u64};
use base64::engine::general_purpose::{GeneralPurpose, NO_PAD};
use base64::{Engine, alphabet};
use block::{Error, Result, Storage, limits};

/// Most bytes of a property list, as in QEMU, and of a resource fork.
pub const TABLES_BYTES_MAX: u64 = 16 << 20;

/// Bytes of the trailer.
const TRAILER_BYTES: usize = 512;
/// Where QEMU looks for it: it may begin so far before the end of the file, which is taken as whole sectors, …
const LOOK_BACK: u64 = 511 + 512;
/// … and within so many bytes from there.
const LOOK_BYTES: u64 = 515;
/// Bytes of a table before its chunks, and of a chunk.
const MISH_BYTES: usize = 204;
const CHUNK_BYTES: usize = 40;

/// What is around a table in a property list.
const DATA_BEGIN: &[u8] = b"<data>";
const DATA_END: &[u8] = b"</data>";
/// Base64 whose last digit may have bits that mean nothing.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    NO_PAD.with_decode_allow_trailing_bits(true),
);

/// How a chunk has its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Not at all: they are zeros.
    Zero,
    /// As they are.
    Raw,
    Zlib,
    Bzip2,
    /// In a way that nobody here unpacks.
    Unread(u32),
}

impl Kind {
    /// `None` for what is no chunk: a comment, and the end of the list.
    fn of(code: u32) -> Option<Self> {
        Some(match code {
            0 | 2 => Kind::Zero,
            1 => Kind::Raw,
            0x8000_0005 => Kind::Zlib,
            0x8000_0006 => Kind::Bzip2,
            0x7fff_fffe | 0xffff_ffff => return None,
            code => Kind::Unread(code),
        })
    }

    pub(super) fn name(self) -> String {
        match self {
            Kind::Zero => "zeros".to_owned(),
            Kind::Raw => "raw".to_owned(),
            Kind::Zlib => "zlib".to_owned(),
            Kind::Bzip2 => "bzip2".to_owned(),
            Kind::Unread(0x8000_0004) => "ADC".to_owned(),
            Kind::Unread(0x8000_0007) => "LZFSE".to_owned(),
            Kind::Unread(0x8000_0008) => "LZMA".to_owned(),
            Kind::Unread(code) => format!("{code:#010x}"),
        }
    }
}

/// Some sectors of the disk, and where they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) sector: u64,
    pub(super) count: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) kind: Kind,
}

/// What an image's tables say.
pub(super) struct Tables {
    pub(super) sectors: u64,
    pub(super) chunks: Vec<Chunk>,
}

/// Where the trailer of `file` begins; `None` where it has none.
///
/// # Errors
///
/// What reading fails with.
pub fn trailer(file: &dyn Storage) -> Result<Option<u64>> {
    let len = file.len()?;
    let whole = len.next_multiple_of(SECTOR);
    if len < SECTOR {
        return Ok(None);
    }
    let from = whole.saturating_sub(LOOK_BACK);
    // At most 515 bytes.
    let mut bytes = vec![0; (len - from).min(LOOK_BYTES) as usize];
    file.read_at(from, &mut bytes)?;
    let found = bytes.windows(4).position(|window| window == b"koly");
    Ok(found.map(|at| from + at as u64))
}

/// Reads trailer and tables.
pub(super) fn read(file: &dyn Storage) -> Result<Tables> {
    let Some(end) = trailer(file)? else {
        return Err(Error::corrupt(
            "no trailer (\"koly\") in its last two sectors: not an Apple disk image",
        ));
    };
    let mut bytes = [0; TRAILER_BYTES];
    // It may have become shorter since.
    let len = file.len()?.saturating_sub(end);
    let there = len.min(TRAILER_BYTES as u64) as usize;
    file.read_at(end, bytes.get_mut(..there).unwrap_or_default())?;
    let field = |at| read_u64(&bytes, at).unwrap_or(0);
    let wrong = |what: &str, at: usize| {
        Error::corrupt(format!(
            "trailer at byte {end:#x}: {what} at byte {at:#x} of it is {}: it must lie before the trailer",
            field(at)
        ))
    };
    let data_fork = field(0x18);
    if data_fork > end {
        return Err(wrong("data fork", 0x18));
    }
    let range = |what, at| {
        let (from, len) = (field(at), field(at + 8));
        match from < end && len <= end - from {
            true => Ok((from, len)),
            false => Err(wrong(what, at)),
        }
    };
    let resources = range("resource fork", 0x28)?;
    let list = range("property list", 0xd8)?;
    let sectors = field(0x1ec);
    if sectors > limits::DISK_BYTES_MAX / SECTOR {
        return Err(Error::corrupt(format!(
            "trailer at byte {end:#x}: sectors of the disk at byte 0x1ec of it are {sectors}: the most is {}",
            limits::DISK_BYTES_MAX / SECTOR
        )));
    }
    let mut chunks = Vec::new();
    match (resources, list) {
        ((_, 1..), _) => resource_fork(&bytes_of(file, resources)?, data_fork, &mut chunks)
            .map_err(|error| error.within(format!("resource fork at byte {:#x}", resources.0)))?,
        (_, (_, 1..)) => property_list(&bytes_of(file, list)?, data_fork, &mut chunks)
            .map_err(|error| error.within(format!("property list at byte {:#x}", list.0)))?,
        _ => {
            return Err(Error::corrupt(format!(
                "trailer at byte {end:#x}: it leads neither to a property list nor to a resource fork"
            )));
        }
    }
    chunks.sort_by_key(|chunk| chunk.sector);
    let twice = chunks
        .windows(2)
        .find(|pair| matches!(pair, [a, b] if b.sector - a.sector < a.count));
    match twice {
        Some([_, second]) => Err(Error::corrupt(format!(
            "sector {} is in two chunks",
            second.sector
        ))),
        _ => Ok(Tables { sectors, chunks }),
    }
}

fn bytes_of(file: &dyn Storage, (from, len): (u64, u64)) -> Result<Vec<u8>> {
    if len > TABLES_BYTES_MAX {
        return Err(Error::unsupported(format!(
            "the tables at byte {from:#x} have {len} bytes: the most is {TABLES_BYTES_MAX}"
        )));
    }
    let mut bytes = vec![0; len as usize];
    file.read_at(from, &mut bytes)?;
    Ok(bytes)
}

/// A fork has resources behind one another, each behind its length.
fn resource_fork(fork: &[u8], data_fork: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    let place = |at| read_u32(fork, at).map_or(0, |word| word as usize);
    let (from, len) = (place(0), place(8));
    let resources = fork.get(from..).and_then(|rest| rest.get(..len));
    let Some(mut rest) = resources.filter(|resources| !resources.is_empty()) else {
        return Err(Error::corrupt(format!(
            "{len} bytes of resources at byte {from:#x} of {} are not in it",
            fork.len()
        )));
    };
    while !rest.is_empty() {
        let len = read_u32(rest, 0).map_or(0, |word| word as usize);
        let resource = rest.get(4..).and_then(|rest| rest.get(..len));
        let Some(resource) = resource.filter(|resource| !resource.is_empty()) else {
            return Err(Error::corrupt(format!(
                "a resource has {len} bytes where {} are left",
                rest.len().saturating_sub(4)
            )));
        };
        mish(resource, data_fork, chunks)?;
        rest = rest.get(4 + len..).unwrap_or_default();
    }
    Ok(())
}

/// A list has each table as base64 between `<data>` and `</data>`. As in QEMU nothing else of it matters, nor whether it is
/// well-formed XML, nor what in the base64 is none: there are images whose lists are not what Apple's programs would write.
fn property_list(list: &[u8], data_fork: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    let find = |bytes: &[u8], marker: &[u8]| {
        let mut windows = bytes.windows(marker.len());
        windows.position(|window| window == marker)
    };
    // A byte 0 ends it.
    let mut rest = list.split(|byte| *byte == 0).next().unwrap_or_default();
    while let Some(at) = find(rest, DATA_BEGIN) {
        let text = rest.get(at + DATA_BEGIN.len()..).unwrap_or_default();
        let Some(end) = find(text, DATA_END) else {
            let at = list.len() - text.len();
            return Err(Error::corrupt(format!(
                "no property list: it ends within the table that begins at byte {at:#x} of it"
            )));
        };
        let (table, behind) = text.split_at(end);
        mish(&base64(table)?, data_fork, chunks)?;
        rest = behind;
    }
    Ok(())
}

/// The bytes of base64 with anything in between.
fn base64(text: &[u8]) -> Result<Vec<u8>> {
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/".contains(byte);
    let mut digits: Vec<u8> = text.iter().copied().filter(is_digit).collect();
    // One digit alone has no byte.
    if digits.len() % 4 == 1 {
        digits.pop();
    }
    let bytes = LENIENT.decode(digits);
    bytes.map_err(|error| Error::corrupt(format!("no property list: {error}")))
}

/// Takes the chunks of a table; what is none is left alone.
fn mish(table: &[u8], data_fork: u64, chunks: &mut Vec<Chunk>) -> Result<()> {
    if !table.starts_with(b"mish") || table.len() < MISH_BYTES + CHUNK_BYTES {
        return Ok(());
    }
    let field = |bytes: &[u8], at| read_u64(bytes, at).unwrap_or(0);
    let (first, place) = (field(table, 8), field(table, 0x18));
    let rest = table.get(MISH_BYTES..).unwrap_or_default();
    for (nth, bytes) in rest.as_chunks::<CHUNK_BYTES>().0.iter().enumerate() {
        let Some(kind) = Kind::of(read_u32(bytes, 0).unwrap_or(0)) else {
            continue;
        };
        let (count, len) = (field(bytes, 16), field(bytes, 32));
        let wrong = |what: String| Error::corrupt(format!("chunk {nth} of a table: {what}"));
        let packed = !matches!(kind, Kind::Zero | Kind::Unread(_));
        if packed && count > CHUNK_SECTORS_MAX {
            return Err(wrong(format!(
                "{count} sectors: the most is {CHUNK_SECTORS_MAX}"
            )));
        }
        if len > CHUNK_BYTES_MAX && !matches!(kind, Kind::Unread(_)) {
            return Err(wrong(format!("{len} bytes: the most is {CHUNK_BYTES_MAX}")));
        }
        let sector = first.checked_add(field(bytes, 8));
        let end = sector.and_then(|sector| sector.checked_add(count));
        let fits = end.is_some_and(|end| end <= limits::DISK_BYTES_MAX / SECTOR);
        let offset = data_fork
            .checked_add(place)
            .and_then(|place| place.checked_add(field(bytes, 24)))
            .filter(|offset| offset.checked_add(len).is_some());
        let (Some(sector), true, Some(offset)) = (sector, fits, offset) else {
            return Err(wrong(
                "it lies behind what a disk or a file can have".to_owned(),
            ));
        };
        if count > 0 {
            chunks.push(Chunk {
                sector,
                count,
                offset,
                len,
                kind,
            });
        }
    }
    Ok(())
}
