//! New images.
//!
//! What QEMU makes with the same options, byte for byte but for the CID: programs know what to make of it. Of a sparse
//! extent all tables have their place from the beginning, and are zeros. Headers and descriptors come last, behind a
//! barrier: until then there is no image.

use super::descriptor::{EXTENTS_MAX, FIRST_LINE, NO_PARENT};
use super::header::{
    DEFLATE, DIRECTORY_ENTRIES_MAX, F_COMPRESSED, F_MARKERS, F_NEW_LINES, F_REDUNDANT,
    F_ZEROED_GRAIN, Header, NEW_LINES, SECTOR, TABLE_ENTRIES,
};
use block::{Context, Error, Result, Storage, align_up, limits, size};
use std::path::Path;

/// Bytes of an extent of a split image.
const SPLIT_BYTES: u64 = 2 << 30;
/// Sectors of a grain.
const GRAIN: u64 = 128;
/// Sectors of an embedded descriptor.
const DESCRIPTOR_SECTORS: u64 = 20;
/// Where an embedded descriptor is, in sectors.
const DESCRIPTOR_AT: u64 = 1;
/// The least CID of a new image: it has eight digits, as those that will take its place.
const CID_MIN: u32 = 0x1000_0000;

/// How an image keeps its disk: QEMU's `subformat`, VMware's `createType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Subformat {
    /// One sparse file.
    #[default]
    MonolithicSparse,
    /// A descriptor and one file that has the disk as it is.
    MonolithicFlat,
    /// A descriptor and sparse files of 2 GiB of the disk each.
    TwoGbMaxExtentSparse,
    /// A descriptor and files that have 2 GiB of the disk each, as it is.
    TwoGbMaxExtentFlat,
    /// One file with compressed grains, written once.
    StreamOptimized,
}

/// Subformats with their names.
const SUBFORMATS: [(Subformat, &str); 5] = [
    (Subformat::MonolithicSparse, "monolithicSparse"),
    (Subformat::MonolithicFlat, "monolithicFlat"),
    (Subformat::TwoGbMaxExtentSparse, "twoGbMaxExtentSparse"),
    (Subformat::TwoGbMaxExtentFlat, "twoGbMaxExtentFlat"),
    (Subformat::StreamOptimized, "streamOptimized"),
];

impl Subformat {
    /// The one of that name.
    pub fn of_name(name: &str) -> Option<Self> {
        let found = SUBFORMATS.iter().find(|(_, n)| *n == name);
        found.map(|(subformat, _)| *subformat)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        let found = SUBFORMATS.iter().find(|(s, _)| *s == self);
        found.map_or("", |(_, name)| name)
    }

    /// Whether files have the disk as it is.
    pub fn is_flat(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentFlat)
    }

    /// Whether the disk is cut into parts of 2 GiB.
    pub fn is_split(self) -> bool {
        matches!(self, Self::TwoGbMaxExtentSparse | Self::TwoGbMaxExtentFlat)
    }

    /// Whether grains are compressed.
    pub fn is_compressed(self) -> bool {
        self == Self::StreamOptimized
    }
}

/// The disk's controller in the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AdapterType {
    /// IDE.
    #[default]
    Ide,
    /// LSI Logic SCSI.
    LsiLogic,
    /// BusLogic SCSI.
    BusLogic,
    /// What ESX had before.
    LegacyEsx,
}

const ADAPTERS: [(AdapterType, &str); 4] = [
    (AdapterType::Ide, "ide"),
    (AdapterType::LsiLogic, "lsilogic"),
    (AdapterType::BusLogic, "buslogic"),
    (AdapterType::LegacyEsx, "legacyESX"),
];

impl AdapterType {
    /// The one of that name.
    pub fn of_name(name: &str) -> Option<Self> {
        let found = ADAPTERS.iter().find(|(_, n)| *n == name);
        found.map(|(adapter, _)| *adapter)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        let found = ADAPTERS.iter().find(|(a, _)| *a == self);
        found.map_or("", |(_, name)| name)
    }
}

/// What a new image is to be. The default is QEMU's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk, rounded up to whole sectors of 512.
    pub size: u64,
    /// How the disk is kept.
    pub subformat: Subformat,
    /// `ddb.adapterType`.
    pub adapter: AdapterType,
    /// `ddb.virtualHWVersion`; 4 when not said.
    pub hw_version: Option<String>,
    /// `ddb.toolsVersion`; 2147483647 when not said.
    pub tools_version: Option<String>,
    /// `ddb.virtualHWVersion` 6.
    pub compat6: bool,
    /// Grain table entries of 1 stand for zeros.
    pub zeroed_grain: bool,
    /// The name that the image's (first) file will have, without a directory.
    pub name: String,
    /// Name of the backing file as it is to be stored, and its CID.
    pub parent: Option<(String, u32)>,
}

/// A file beside the one by which an image is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Its name, in the image's directory.
    pub name: String,
    /// Bytes of the disk in it.
    pub bytes: u64,
    flat: bool,
    zeroed_grain: bool,
}

impl NewFile {
    /// Makes its contents in `file`, which is empty, and waits for them.
    ///
    /// # Errors
    ///
    /// What writing fails with.
    pub fn write(&self, file: &dyn Storage) -> Result<()> {
        match self.flat {
            true => file.set_len(self.bytes).and_then(|()| file.sync()),
            false => write_sparse(file, &header(self.bytes, self.zeroed_grain, false), &[]),
        }
        .context(|| format!("{}: create", file.name()))
    }

    /// Whether it has its part of the disk as it is.
    pub fn is_flat(&self) -> bool {
        self.flat
    }
}

impl CreateOptions {
    /// Bytes that the disk will have.
    pub fn disk_bytes(&self) -> u64 {
        align_up(self.size, SECTOR)
    }

    /// Whether an image can be made so. Errors say why not, with QEMU's words where it has some.
    pub fn validate(&self) -> Result<()> {
        let flat = self.subformat.is_flat();
        if self.compat6 && self.hw_version.is_some() {
            return Err(Error::invalid(
                "compat6 cannot be enabled with hwversion set",
            ));
        }
        if flat && self.parent.is_some() {
            return Err(Error::invalid("Flat image can't have backing file"));
        }
        if flat && self.zeroed_grain {
            return Err(Error::invalid("Flat image can't enable zeroed grain"));
        }
        if self.size == 0 || self.size > limits::DISK_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a disk of {} bytes: a vmdk image has 1 to {}",
                self.size,
                limits::DISK_BYTES_MAX
            )));
        }
        let parts = self.disk_bytes().div_ceil(SPLIT_BYTES);
        if self.subformat.is_split() && parts > EXTENTS_MAX as u64 {
            return Err(Error::invalid(format!(
                "a disk of {} would have {parts} files of 2 GiB: the most is {EXTENTS_MAX}",
                size::human(self.size)
            )));
        }
        let tables = header(self.disk_bytes(), false, false).directory_entries();
        if !flat && tables > DIRECTORY_ENTRIES_MAX {
            return Err(Error::invalid(format!(
                "a disk of {} would have {tables} grain tables: the most is {DIRECTORY_ENTRIES_MAX}; flat images have none",
                size::human(self.size)
            )));
        }
        let parent = self.parent.as_ref().map(|(name, _)| name);
        for (what, text) in [
            ("the name", Some(&self.name)),
            ("the backing file's name", parent),
            ("hwversion", self.hw_version.as_ref()),
            ("toolsversion", self.tools_version.as_ref()),
        ] {
            let Some(text) = text else { continue };
            let fits = block::name::fits(text, limits::FILE_NAME_BYTES_MAX);
            if !fits || text.contains(['"', '\n', '\r']) {
                return Err(Error::invalid(format!(
                    "{what} '{}': a descriptor has 1 to {} bytes for it, and no quotes, line ends and zeros in it",
                    block::name::shown(text).escape_default(),
                    limits::FILE_NAME_BYTES_MAX
                )));
            }
        }
        if !flat && !self.subformat.is_split() {
            let len = block::name::len(&self.text(u32::MAX)) as u64;
            let most = DESCRIPTOR_SECTORS * SECTOR;
            if len > most {
                return Err(Error::invalid(format!(
                    "its descriptor would have {len} bytes, in a sparse file there is room for {most}"
                )));
            }
        }
        Ok(())
    }

    /// The files beside the first, in the order of the disk, with QEMU's names.
    pub fn files(&self) -> Vec<NewFile> {
        let path = Path::new(&self.name);
        let lossy = |part: Option<&std::ffi::OsStr>| part.map(|p| p.to_string_lossy().into_owned());
        // As QEMU takes names apart: the last dot counts, even a first one.
        let (stem, extension) = match self.name.rfind('.') {
            Some(at) => (
                self.name.get(..at).unwrap_or_default().to_owned(),
                self.name.get(at..).unwrap_or_default().to_owned(),
            ),
            None => (lossy(path.file_name()).unwrap_or_default(), String::new()),
        };
        let new = |name: String, bytes: u64| NewFile {
            name,
            bytes,
            flat: self.subformat.is_flat(),
            zeroed_grain: self.zeroed_grain,
        };
        let bytes = self.disk_bytes();
        match self.subformat {
            Subformat::MonolithicSparse | Subformat::StreamOptimized => Vec::new(),
            Subformat::MonolithicFlat => vec![new(format!("{stem}-flat{extension}"), bytes)],
            Subformat::TwoGbMaxExtentFlat | Subformat::TwoGbMaxExtentSparse => {
                let kind = if self.subformat.is_flat() { 'f' } else { 's' };
                let parts = bytes.div_ceil(SPLIT_BYTES).min(EXTENTS_MAX as u64);
                let part = |nth: u64| {
                    let name = format!("{stem}-{kind}{:03}{extension}", nth + 1);
                    new(name, (bytes - nth * SPLIT_BYTES).min(SPLIT_BYTES))
                };
                (0..parts).map(part).collect()
            }
        }
    }

    /// Makes the file by which the image is known, in `file`, which is empty; the others are there already.
    ///
    /// # Errors
    ///
    /// As [`CreateOptions::validate`], and what writing fails with: the file holds no image then.
    pub fn write(&self, file: &dyn Storage) -> Result<()> {
        self.validate()?;
        let text = self.text(new_cid()?);
        let text = block::name::bytes(&text);
        let write = || match self.subformat.is_flat() || self.subformat.is_split() {
            true => file.write_at(0, &text).and_then(|()| file.sync()),
            false => write_sparse(file, &self.header(), &text),
        };
        write().context(|| format!("{}: create", file.name()))
    }

    /// The header of an image of one sparse file.
    pub(super) fn header(&self) -> Header {
        header(
            self.disk_bytes(),
            self.zeroed_grain,
            self.subformat.is_compressed(),
        )
    }

    /// The descriptor of a new image.
    pub(super) fn text(&self, cid: u32) -> String {
        let sectors = |bytes: u64| bytes / SECTOR;
        let extents: String = match self.files().as_slice() {
            [] => format!(
                "RW {} SPARSE \"{}\"\n",
                sectors(self.disk_bytes()),
                self.name
            ),
            files => files
                .iter()
                .map(|file| match file.flat {
                    true => format!("RW {} FLAT \"{}\" 0\n", sectors(file.bytes), file.name),
                    false => format!("RW {} SPARSE \"{}\"\n", sectors(file.bytes), file.name),
                })
                .collect(),
        };
        let (parent_cid, hint) = match &self.parent {
            Some((name, cid)) => (*cid, format!("parentFileNameHint=\"{name}\"")),
            None => (NO_PARENT, String::new()),
        };
        let heads: u64 = match self.adapter {
            AdapterType::Ide => 16,
            _ => 255,
        };
        let hw_version = match self.compat6 {
            true => "6",
            false => self.hw_version.as_deref().unwrap_or("4"),
        };
        format!(
            "{FIRST_LINE}\nversion=1\nCID={cid:x}\nparentCID={parent_cid:x}\ncreateType=\"{}\"\n{hint}\n\
             # Extent description\n{extents}\n# The Disk Data Base\n#DDB\n\n\
             ddb.virtualHWVersion = \"{hw_version}\"\nddb.geometry.cylinders = \"{}\"\n\
             ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n\
             ddb.toolsVersion = \"{}\"\n",
            self.subformat.name(),
            self.disk_bytes() / (63 * heads * SECTOR),
            self.adapter.name(),
            self.tools_version.as_deref().unwrap_or("2147483647"),
        )
    }
}

/// A CID for a new image.
pub(super) fn new_cid() -> Result<u32> {
    loop {
        let mut random = [0; 4];
        crypto::random(&mut random)?;
        let cid = u32::from_le_bytes(random);
        if (CID_MIN..NO_PARENT - 1).contains(&cid) {
            return Ok(cid);
        }
    }
}

/// The header of a sparse file for `bytes` of a disk: the redundant directory and its tables come first.
fn header(bytes: u64, zeroed_grain: bool, compressed: bool) -> Header {
    let mut header = Header {
        version: match (compressed, zeroed_grain) {
            (true, _) => 3,
            (false, true) => 2,
            (false, false) => 1,
        },
        flags: F_REDUNDANT | F_NEW_LINES,
        capacity: bytes / SECTOR,
        grain: GRAIN,
        descriptor: DESCRIPTOR_AT,
        descriptor_len: DESCRIPTOR_SECTORS,
        table_entries: TABLE_ENTRIES,
        redundant: DESCRIPTOR_AT + DESCRIPTOR_SECTORS,
        directory: 0,
        overhead: 0,
        unclean: false,
        compression: 0,
        new_lines: NEW_LINES,
    };
    if compressed {
        header.flags |= F_COMPRESSED | F_MARKERS;
        header.compression = DEFLATE;
    }
    if zeroed_grain {
        header.flags |= F_ZEROED_GRAIN;
    }
    let tables = header.directory_entries();
    let each = directory_sectors(tables) + tables * table_sectors();
    header.directory = header.redundant + each;
    header.overhead = align_up(header.directory + each, GRAIN);
    header
}

/// Sectors of a grain table.
fn table_sectors() -> u64 {
    u64::from(TABLE_ENTRIES) * 4 / SECTOR
}

/// Sectors of a directory of so many tables.
fn directory_sectors(tables: u64) -> u64 {
    (tables * 4).div_ceil(SECTOR)
}

/// Where the tables of the directory at sector `directory` are, as [`header`] has them.
pub(super) fn tables_of(header: &Header, directory: u64) -> u64 {
    directory + directory_sectors(header.directory_entries())
}

/// Writes all of a sparse file but its header: of the tables only the directories, which lead to zeros.
pub(super) fn write_body(file: &dyn Storage, header: &Header, text: &[u8]) -> Result<()> {
    // Nothing of an image that was there before may be taken for a part of this one.
    file.write_at(0, &[0; SECTOR as usize])?;
    let mut head = text.to_vec();
    head.resize((header.descriptor_len * SECTOR) as usize, 0);
    file.write_at(header.descriptor * SECTOR, &head)?;
    if file.len()? < header.overhead * SECTOR {
        file.set_len(header.overhead * SECTOR)?;
    }
    let tables = header.directory_entries();
    for directory in [header.redundant, header.directory] {
        let first = tables_of(header, directory);
        let entry = |nth: u64| {
            u32::try_from(first + nth * table_sectors()).map_err(|_| {
                Error::invalid("its tables would lie behind 2 TiB, which no entry can say")
            })
        };
        let mut bytes = Vec::with_capacity((tables * 4) as usize);
        for nth in 0..tables {
            bytes.extend_from_slice(&entry(nth)?.to_le_bytes());
        }
        bytes.resize((directory_sectors(tables) * SECTOR) as usize, 0);
        file.write_at(directory * SECTOR, &bytes)?;
    }
    Ok(())
}

fn write_sparse(file: &dyn Storage, header: &Header, text: &[u8]) -> Result<()> {
    write_body(file, header, text)?;
    file.sync()?;
    file.write_at(0, &header.to_bytes())?;
    file.sync()
}
