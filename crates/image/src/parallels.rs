//! Parallels' expandable images, for reading (source: QEMU's `docs/interop/parallels.rst`, called *specification* here).
//!
//! ```text
//!   header, 64 bytes │ BAT: an entry for each cluster │ clusters, and extensions of the format
//!
//!    0  "WithoutFreeSpace", entries are of sectors,     36  sectors of the disk, 64 bits (old: 32)
//!       or "WithouFreSpacExt", entries are of clusters  44  in use: 0x746f6e59, closed: 0x312e3276
//!   16  version: 2                                      48  sector where the data begin, 0: behind the BAT
//!   20  geometry of the guest's disk                    52  flags
//!   28  sectors of a cluster                            56  sector of the format extension, 0: none
//!   32  entries of the BAT
//! ```
//!
//! All numbers are little-endian; a cluster need not have a power of two of bytes. An entry of 0 is a cluster of zeros. What
//! format extensions hold (dirty bitmaps) changes nothing of what the disk reads as, so they are not looked at.
//!
//! The BAT is kept in memory. An entry that leads to no cluster of the file is found when it is asked for.

use crate::contract::{
    Description, Extent, ExtentKind, FileId, Image, Plan, Step, ZeroMode, ZeroPlan, reading_only,
    why_reading_only,
};
use crate::metadata::{Growing, STEPS_MAX};
use crate::words::{read_u32_le, read_u64_le};
use block::{Error, GuestOffset, HostOffset, Result, Storage, limits, size};

/// The beginning of images whose entries are of sectors.
pub const MAGIC_OLD: [u8; 16] = *b"WithoutFreeSpace";
/// The beginning of images whose entries are of clusters.
pub const MAGIC_EXT: [u8; 16] = *b"WithouFreSpacExt";

/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;

/// Most entries of a BAT: it is kept in memory, at 4 bytes each.
pub const ENTRIES_MAX: u32 = 32 << 20;

/// Largest cluster: what QEMU takes.
const CLUSTER_SECTORS_MAX: u32 = i32::MAX as u32 / 513;

/// Bytes of the BAT that are read at a time.
const CHUNK: usize = 64 << 10;

const SECTOR: u64 = 512;
const IN_USE: u32 = 0x746f_6e59;

/// A header, and where it says that things are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Entries are numbers of clusters, not of sectors.
    pub extended: bool,
    /// Bytes of a cluster.
    pub cluster_bytes: u64,
    /// Entries of the BAT.
    pub entries: u32,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Somebody writes to it, or was killed.
    pub in_use: bool,
    /// Where the data begin as the header says, in bytes; 0 where it says nothing.
    pub data_offset: u64,
    /// Where the cluster with extensions of the format is, in bytes; 0 where there is none.
    pub extension_offset: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

/// A new image, of nothing but zeros, for others to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
    /// Bytes of a cluster, a multiple of 512.
    pub cluster_bytes: u64,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_bytes: 1 << 20,
        }
    }
}

/// Heads, and sectors of a cylinder, that new images tell of. Nobody looks.
const GEOMETRY: (u32, u64) = (16, 32);

impl CreateOptions {
    /// Whether such an image can be.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Invalid`], with the reason.
    pub fn check(&self) -> Result<()> {
        self.layout().map(drop)
    }

    /// Sectors of a cluster, entries of the BAT, and the byte at which the data begin and its sector.
    fn layout(&self) -> Result<(u32, u32, u64, u32)> {
        let CreateOptions {
            size,
            cluster_bytes,
        } = *self;
        if cluster_bytes == 0 || !cluster_bytes.is_multiple_of(SECTOR) {
            return Err(Error::invalid(
                "cluster_size must be a multiple of 512 bytes",
            ));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::invalid("the size must be a multiple of 512 bytes"));
        }
        let tracks = u32::try_from(cluster_bytes / SECTOR).ok();
        let tracks = tracks.filter(|tracks| *tracks <= CLUSTER_SECTORS_MAX);
        let tracks = tracks.ok_or_else(|| Error::invalid("cluster_size is too large"))?;
        let entries = u32::try_from(size.div_ceil(cluster_bytes)).ok();
        let entries = entries.filter(|entries| *entries <= ENTRIES_MAX);
        let entries = entries.ok_or_else(|| {
            Error::invalid(format!(
                "the size is too large for this cluster_size: at most {ENTRIES_MAX} clusters"
            ))
        })?;
        let data = (HEADER_BYTES as u64 + u64::from(entries) * 4).next_multiple_of(cluster_bytes);
        let data_sectors = u32::try_from(data / SECTOR)
            .map_err(|_| Error::invalid("the table of clusters is too large"))?;
        Ok((tracks, entries, data, data_sectors))
    }
}

/// Writes an empty image to `storage`, an empty file: a header, and a BAT that fills clusters.
///
/// # Errors
///
/// [`block::ErrorKind::Invalid`] for what cannot be (nothing is written then), or what the host refused.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let (tracks, entries, data, data_sectors) = options.layout()?;
    let CreateOptions { size, .. } = *options;
    let (heads, cylinder) = GEOMETRY;
    let cylinders = size / SECTOR / u64::from(heads) / cylinder;
    let mut header = [0; SECTOR as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = header.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(0, &MAGIC_EXT);
    put(16, &2u32.to_le_bytes());
    put(20, &heads.to_le_bytes());
    put(
        24,
        &u32::try_from(cylinders).unwrap_or(u32::MAX).to_le_bytes(),
    );
    put(28, &tracks.to_le_bytes());
    put(32, &entries.to_le_bytes());
    put(36, &(size / SECTOR).to_le_bytes());
    put(48, &data_sectors.to_le_bytes());
    storage.set_len(data)?;
    storage.write_at(0, &header)?;
    storage.sync()
}

/// Where the data of a cluster are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: it reads as zeros.
    Zero,
    /// At this byte of the file.
    At(u64),
    /// Where no cluster can be: why.
    Nowhere(&'static str),
}

impl Header {
    /// Reads the header of the image in `file`.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for what cannot be, [`block::ErrorKind::Unsupported`] for what is too large; the field is named.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        let file_bytes = file.len()?;
        let read = || -> Result<Self> {
            if file_bytes < HEADER_BYTES as u64 {
                return Err(Error::corrupt(format!(
                    "of {file_bytes} bytes: too short for a Parallels image"
                )));
            }
            let mut raw = [0; HEADER_BYTES];
            file.read_at(0, &mut raw)?;
            Self::parse(&raw, file_bytes)
        };
        read().map_err(|error| error.within(file.name()))
    }

    /// Parses the header of a file of `file_bytes` bytes.
    ///
    /// # Errors
    ///
    /// As [`Header::read`].
    pub fn parse(raw: &[u8; HEADER_BYTES], file_bytes: u64) -> Result<Self> {
        let word = |at| read_u32_le(raw, at).unwrap_or(0);
        let extended = raw.starts_with(&MAGIC_EXT);
        if !extended && !raw.starts_with(&MAGIC_OLD) {
            return Err(Error::corrupt(
                "magic at byte 0 is that of no Parallels image: WithoutFreeSpace or WithouFreSpacExt",
            ));
        }
        if word(16) != 2 {
            return Err(Error::unsupported(format!(
                "version at byte 16 is {}: only 2 is known",
                word(16)
            )));
        }
        let tracks = word(28);
        if tracks == 0 || tracks > CLUSTER_SECTORS_MAX {
            return Err(Error::corrupt(format!(
                "sectors of a cluster at byte 28 are {tracks}: they must be 1 to {CLUSTER_SECTORS_MAX}"
            )));
        }
        let entries = word(32);
        if entries > ENTRIES_MAX {
            return Err(Error::unsupported(format!(
                "entries of the BAT at byte 32 are {entries}: at most {ENTRIES_MAX} are supported, which take 128 MiB of \
                 memory"
            )));
        }
        let sectors = match extended {
            true => read_u64_le(raw, 36).unwrap_or(0),
            // The upper half was no part of the field once.
            false => u64::from(word(36)),
        };
        let disk_bytes = sectors
            .checked_mul(SECTOR)
            .filter(|bytes| *bytes <= limits::DISK_BYTES_MAX)
            .ok_or_else(|| {
                Error::corrupt(format!(
                    "sectors of the disk at byte 36 are {sectors}: the most is {}",
                    limits::DISK_BYTES_MAX / SECTOR
                ))
            })?;
        let header = Self {
            extended,
            cluster_bytes: u64::from(tracks) * SECTOR,
            entries,
            disk_bytes,
            in_use: word(44) == IN_USE,
            data_offset: u64::from(word(48)) * SECTOR,
            extension_offset: read_u64_le(raw, 56).unwrap_or(0).saturating_mul(SECTOR),
            file_bytes,
        };
        if header.bat_end() > file_bytes {
            return Err(Error::corrupt(format!(
                "the BAT of {entries} entries ends at byte {:#x}, but the file at byte {file_bytes:#x}: it is cut off",
                header.bat_end()
            )));
        }
        Ok(header)
    }

    /// Where the BAT ends.
    pub fn bat_end(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.entries) * 4
    }

    /// Where the data may begin at the earliest: behind the BAT.
    pub fn data_min(&self) -> u64 {
        self.bat_end().next_multiple_of(SECTOR)
    }

    /// Where the data begin.
    pub fn data_begin(&self) -> u64 {
        match self.data_offset {
            0 => self.data_min(),
            at => at,
        }
    }

    /// Whether what the header says of where the data begin can be.
    pub fn data_offset_is_sound(&self) -> bool {
        match (self.data_offset, self.extended) {
            (0, _) => true,
            (at, false) => at >= self.data_min(),
            (at, true) => at >= self.data_min() && at.is_multiple_of(self.cluster_bytes),
        }
    }

    /// Where the data of the cluster with that number and entry are. Of the last one of the disk only what the disk has
    /// must be in the file.
    #[inline]
    pub fn place(&self, cluster: u64, entry: u32) -> Place {
        if entry == 0 {
            return Place::Zero;
        }
        let unit = if self.extended {
            self.cluster_bytes
        } else {
            SECTOR
        };
        // A cluster has less than 2^31 bytes, so it fits.
        let at = u64::from(entry) * unit;
        let start = cluster.saturating_mul(self.cluster_bytes);
        let len = self
            .disk_bytes
            .saturating_sub(start)
            .min(self.cluster_bytes);
        if at < self.data_min() {
            return Place::Nowhere("the header and the BAT are there");
        }
        match at + len > self.file_bytes {
            true => Place::Nowhere("it ends behind the file"),
            false => Place::At(at),
        }
    }

    /// Hands all entries of the BAT out in order.
    ///
    /// # Errors
    ///
    /// What reading the file fails with.
    pub fn each_entry(&self, file: &dyn Storage, mut each: impl FnMut(u32, u32)) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let (mut at, mut index) = (HEADER_BYTES as u64, 0);
        while at < self.bat_end() {
            let len = (self.bat_end() - at).min(CHUNK as u64) as usize;
            let part = buffer.get_mut(..len).unwrap_or_default();
            file.read_at(at, part)?;
            for entry in part.as_chunks::<4>().0 {
                each(index, u32::from_le_bytes(*entry));
                index += 1;
            }
            at += len as u64;
        }
        Ok(())
    }
}

/// An open image.
#[derive(Debug)]
pub struct Parallels {
    name: String,
    header: Header,
    bat: Vec<u32>,
}

impl Parallels {
    /// Opens the image in `file`, for reading.
    ///
    /// # Errors
    ///
    /// As [`Header::read`].
    pub fn open(file: &dyn Storage) -> Result<Self> {
        let header = Header::read(file)?;
        let mut bat = Vec::with_capacity(header.entries as usize);
        let read = header.each_entry(file, |_, entry| bat.push(entry));
        read.map_err(|error| error.within(file.name()))?;
        Ok(Self {
            name: file.name(),
            header,
            bat,
        })
    }

    fn map_at(&self, at: GuestOffset, len: u64) -> Result<Extent> {
        let cluster_bytes = self.header.cluster_bytes;
        let mut run = Growing::new(at.0, len);
        for _ in 0..STEPS_MAX {
            let cluster = run.next() / cluster_bytes;
            let within = run.next() % cluster_bytes;
            // What has no entry is zeros, however large the disk.
            let entry = usize::try_from(cluster).ok();
            let entry = entry.and_then(|index| self.bat.get(index).copied());
            let room = match entry {
                Some(_) => (cluster_bytes - within).min(run.left()),
                None => run.left(),
            };
            let kind = match self.header.place(cluster, entry.unwrap_or(0)) {
                // Not `Zero`: QEMU shows it as what a backing file would have.
                Place::Zero => ExtentKind::Unallocated,
                Place::At(host) => ExtentKind::Data {
                    file: FileId::IMAGE,
                    offset: HostOffset(host + within),
                },
                Place::Nowhere(_) if run.len() > 0 => break,
                Place::Nowhere(why) => {
                    return Err(Error::corrupt(format!(
                        "{}: cluster {cluster}: its entry at byte {:#x} is {}: {why}",
                        self.name,
                        HEADER_BYTES as u64 + cluster * 4,
                        entry.unwrap_or(0)
                    )));
                }
            };
            if !run.feed(kind, room) || run.left() == 0 {
                break;
            }
        }
        Ok(run.extent())
    }
}

impl Image for Parallels {
    fn describe(&self) -> Description {
        let header = &self.header;
        let used = self.bat.iter().filter(|entry| **entry != 0).count();
        let kind = match header.extended {
            true => "WithouFreSpacExt (entries of clusters)",
            false => "WithoutFreeSpace (entries of sectors)",
        };
        let mut facts = vec![
            ("type", kind.to_owned()),
            (
                "clusters",
                format!(
                    "{used} of {} are there, of {} each",
                    header.entries,
                    size::human(header.cluster_bytes)
                ),
            ),
        ];
        if header.in_use {
            facts.push(("in use", "it was not closed cleanly, or is open".to_owned()));
        }
        Description {
            read_only_because: Some(why_reading_only("parallels")),
            facts,
            ..Description::new("parallels", header.disk_bytes, header.cluster_bytes)
        }
    }

    fn size(&self) -> u64 {
        self.header.disk_bytes
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        Ok(Step::Done(self.map_at(at, len)?))
    }

    fn plan_write(&self, _: GuestOffset, _: u64) -> Result<Step<Plan>> {
        Err(reading_only(&self.name, "parallels"))
    }

    fn plan_zero(&self, _: GuestOffset, _: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        Err(reading_only(&self.name, "parallels"))
    }
}
