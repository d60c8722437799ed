//! Opening: the descriptor first, which names the files; then these.

use super::descriptor::{Access, DESCRIPTOR_BYTES_MAX, Descriptor, ExtentLine, ExtentType};
use super::header::{
    self, COWD_MAGIC, Cowd, F_MARKERS, F_REDUNDANT, F_ZEROED_GRAIN, Header, MAGIC, SECTOR, Se,
};
use super::{Cid, Extent, Kind, Vmdk};
use crate::FileId;
use crate::appended::{Appended, Around, Form, Places, Setup, words_of};
use crate::metadata::{CACHE_BYTES_DEFAULT, Layout, TICKETS_MAX, read_short};
use block::{Context, Error, Result, Storage, align_up, limits};
use std::ops::Range;

/// Most bytes of a file with grains: an entry has a sector's number in 32 bits.
const SPARSE_FILE_BYTES_MAX: u64 = SECTOR << 32;
/// Allocations in flight of all extents together, at least 64 of each.
const TICKETS_ALL: usize = 4 * TICKETS_MAX;

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Never write to it.
    pub read_only: bool,
    /// Upper bound of the metadata caches of all extents together in bytes; 64 MiB when not given.
    pub cache_bytes: Option<u64>,
    /// The CID stays although the disk is written: what lies above, and is committed into it, must go on to know it.
    pub keeps_id: bool,
}

/// What the file by which an image is known says of it: the descriptor, and the files that it names.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The descriptor.
    pub descriptor: Descriptor,
    /// The header of the sparse extent that the descriptor is embedded in, where it describes this extent alone.
    pub header: Option<Header>,
    /// Where the descriptor's text is.
    pub text: Range<u64>,
    /// Names of the extents' files, each once, in the order of the disk.
    pub files: Vec<String>,
}

impl Parts {
    /// Reads the descriptor of the image in `file`.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] and `Unsupported`, naming file, line or field.
    pub fn read(file: &dyn Storage) -> Result<Self> {
        Self::read_unnamed(file).context(|| file.name())
    }

    fn read_unnamed(file: &dyn Storage) -> Result<Self> {
        let len = file.len()?;
        let start = header::sector(file, 0)?;
        let (text, header) = if start.starts_with(&MAGIC) {
            let head = Header::parse(&start).ok_or_else(|| Error::corrupt("no header"))?;
            if head.descriptor == 0 {
                return Err(Error::unsupported(
                    "it has no descriptor, so that it is a part of an image only: open the file that names it",
                ));
            }
            let at = head.descriptor.checked_mul(SECTOR);
            let most = DESCRIPTOR_BYTES_MAX / SECTOR;
            let at = at.filter(|at| *at < len && (1..=most).contains(&head.descriptor_len));
            let Some(at) = at else {
                return Err(Error::corrupt(format!(
                    "header: the descriptor, at sector {} (byte 28), has {} sectors (byte 36): it has 1 to {most}, \
                     within the file",
                    head.descriptor, head.descriptor_len
                )));
            };
            let header = match head.capacity {
                // Only there for the descriptor in it (as QEMU has it).
                0 => None,
                _ => {
                    // Its numbers are reckoned with before anybody opens the extent.
                    let header = Header::read(file)?;
                    header.validate(len)?;
                    Some(header)
                }
            };
            (at..at + head.descriptor_len * SECTOR, header)
        } else if start.starts_with(&COWD_MAGIC) {
            return Err(Error::unsupported(
                "it is an extent of an ESX image: open the descriptor that names it",
            ));
        } else if len > DESCRIPTOR_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "it begins with neither KDMV nor COWD, and a descriptor has at most {DESCRIPTOR_BYTES_MAX} bytes, not \
                 {len}"
            )));
        } else {
            (0..len, None)
        };
        // At most 1 MiB.
        let bytes = read_short(file, text.start, (text.end - text.start) as usize)?;
        let descriptor = Descriptor::parse(&bytes)?;
        let mut files: Vec<String> = Vec::new();
        if header.is_none() {
            if descriptor.create_type.is_empty() {
                return Err(Error::corrupt("the descriptor has no createType"));
            }
            if descriptor.extents.is_empty() {
                return Err(Error::corrupt("the descriptor has no extents"));
            }
            for line in descriptor.extents.iter().filter(|l| !l.file.is_empty()) {
                let flat = matches!(line.kind, ExtentType::Flat | ExtentType::Vmfs);
                match files.contains(&line.file) {
                    false => files.push(line.file.clone()),
                    true if flat => {}
                    true => {
                        return Err(Error::corrupt(format!(
                            "descriptor: '{}' is the file of two extents",
                            line.file.escape_default()
                        )));
                    }
                }
            }
        }
        Ok(Self {
            descriptor,
            header,
            text,
            files,
        })
    }

    /// The extents as the descriptor, or the header that it is embedded in, has them, and the file of each.
    pub fn extents(&self) -> Vec<(ExtentLine, FileId)> {
        if let Some(header) = &self.header {
            let own = self.descriptor.extents.first();
            let line = ExtentLine {
                access: own.map_or(Access::Rw, |line| line.access),
                sectors: header.capacity,
                kind: ExtentType::Sparse,
                file: String::new(),
                offset: 0,
            };
            return vec![(line, FileId::IMAGE)];
        }
        let lines = self.descriptor.extents.iter().map(|line| {
            let nth = self.files.iter().position(|name| *name == line.file);
            // At most 1024.
            let nth = nth.and_then(|nth| u16::try_from(nth + 1).ok());
            (line.clone(), nth.map_or(FileId::IMAGE, FileId))
        });
        lines.collect()
    }
}

impl Vmdk {
    /// Opens the image of `parts`. `files` by [`FileId`]: the one that `parts` was read from, then those that it names.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] and `Unsupported`, naming file and field. An image that can be read but must not be
    /// written opens; its description says why, and writes to it fail with `ReadOnly`.
    pub fn open(parts: Parts, files: &[&dyn Storage], options: &OpenOptions) -> Result<Self> {
        let name = files.first().map_or_else(String::new, |file| file.name());
        Self::of(parts, files, options, &name).map_err(|error| match files.len() {
            1 => error.within(&name),
            _ => error,
        })
    }

    fn of(parts: Parts, files: &[&dyn Storage], options: &OpenOptions, name: &str) -> Result<Self> {
        let lines = parts.extents();
        let mut opener = Opener {
            read_only: options.read_only,
            has_backing: parts.descriptor.has_parent(),
            cache_bytes: options.cache_bytes.unwrap_or(CACHE_BYTES_DEFAULT) / lines.len() as u64,
            tickets: (TICKETS_ALL / lines.len()).clamp(64, TICKETS_MAX),
            embedded: parts.header.as_ref(),
            lacks: None,
        };
        let mut extents = Vec::with_capacity(lines.len());
        let mut start = 0u64;
        let mut directories = 0;
        for (line, id) in lines {
            let file = files.get(usize::from(id.0));
            let file: &dyn Storage = match file {
                Some(file) => *file,
                None => {
                    return Err(Error::invalid(format!(
                        "{name}: opened without all of its files"
                    )));
                }
            };
            let (bytes, kind) = opener.extent(&line, id, file).context(|| match id {
                FileId::IMAGE => String::new(),
                _ => file.name(),
            })?;
            if let Kind::Sparse(core) | Kind::Compressed(core) = &kind {
                directories += core.layout().l2_slices() >> core.layout().slices_per_table_bits();
            }
            let end = start.checked_add(bytes);
            let Some(end) = end.filter(|end| *end <= limits::DISK_BYTES_MAX) else {
                return Err(Error::corrupt(
                    "its extents together are larger than a disk can be",
                ));
            };
            if directories > header::DIRECTORY_ENTRIES_MAX {
                return Err(Error::unsupported(format!(
                    "its extents have more than {} grain tables together",
                    header::DIRECTORY_ENTRIES_MAX
                )));
            }
            extents.push(Extent {
                start,
                bytes,
                file: id,
                line,
                kind,
            });
            start = end;
        }
        if !options.read_only {
            check_flat_overlaps(&extents, files)?;
        }
        let compressed = extents
            .iter()
            .any(|e| matches!(e.kind, Kind::Compressed(_)));
        if compressed {
            opener.lack("its grains are compressed (streamOptimized): they are written once, in order, by convert");
        }
        let markers = parts
            .header
            .as_ref()
            .is_some_and(|h| h.flags & F_MARKERS != 0);
        let lacks = opener.lacks;
        let read_only = options.read_only || lacks.is_some();
        let cid = match read_only {
            true => None,
            false if options.keeps_id => Some(Cid::kept()),
            false => Some(Cid::new(&parts, files)?),
        };
        Ok(Self {
            name: name.to_owned(),
            size: start,
            create_type: match (&parts.header, compressed) {
                // As QEMU calls them, whatever the descriptor says.
                (Some(_), true) => "streamOptimized".to_owned(),
                (Some(_), false) => "monolithicSparse".to_owned(),
                (None, _) => parts.descriptor.create_type.clone(),
            },
            descriptor: parts.descriptor,
            markers,
            extents,
            read_only,
            lacks,
            cid,
            recent: Default::default(),
        })
    }
}

/// What the extents of an image have in common.
struct Opener<'a> {
    read_only: bool,
    has_backing: bool,
    cache_bytes: u64,
    tickets: usize,
    embedded: Option<&'a Header>,
    /// Why the image must not be written.
    lacks: Option<String>,
}

impl Opener<'_> {
    fn lack(&mut self, why: impl Into<String>) {
        self.lacks.get_or_insert_with(|| why.into());
    }

    /// Bytes of an extent of the disk, and how to find them.
    fn extent(&mut self, line: &ExtentLine, id: FileId, file: &dyn Storage) -> Result<(u64, Kind)> {
        match line.access {
            Access::Rw => {}
            Access::RdOnly => self.lack("the descriptor has extents that are RDONLY"),
            Access::NoAccess => {
                return Err(Error::unsupported(
                    "an extent that the descriptor has as NOACCESS",
                ));
            }
        }
        let bytes = line.sectors * SECTOR;
        match line.kind {
            ExtentType::Zero => {
                self.lack("the descriptor has ZERO extents, which have no place for data");
                Ok((bytes, Kind::Zero))
            }
            ExtentType::Flat | ExtentType::Vmfs => {
                let at = line.offset * SECTOR;
                let len = file.len()?;
                if at.checked_add(bytes).is_none_or(|end| end > len) {
                    return Err(Error::corrupt(format!(
                        "it ends at byte {len:#x}, but the descriptor has an extent of {bytes} bytes at {at:#x} in it"
                    )));
                }
                Ok((bytes, Kind::Flat(at)))
            }
            ExtentType::SeSparse => self.se(id, file),
            ExtentType::Sparse | ExtentType::VmfsSparse => match is_cowd(file)? {
                true => self.cowd(id, file),
                false => self.hosted(id, file),
            },
        }
    }

    /// The state of an extent whose grain directory was read.
    fn core(&self, id: FileId, file: &dyn Storage, tables: Tables) -> Result<Appended> {
        let layout = Layout::new(
            tables.capacity * SECTOR,
            (tables.grain * SECTOR).trailing_zeros(),
            (tables.table_entries * 8).trailing_zeros(),
            false,
        );
        let len = file.len()?;
        let cluster = layout.cluster();
        let writable = !self.read_only && self.lacks.is_none() && !tables.compressed;
        let end = match writable {
            true => align_up(len, cluster),
            // The last grain may be cut off, and behind the end there are zeros.
            false => align_up(len.max(SECTOR), SECTOR) - SECTOR + cluster,
        };
        Ok(Appended::new(Setup {
            name: file.name(),
            file: id,
            form: tables.form,
            layout,
            l1: tables.l1,
            l1_offset: tables.directory * SECTOR,
            l1_around: Around::default(),
            copies: tables.copies,
            table_clusters: 1,
            places: Places::default(),
            head_end: tables.head_end,
            tables_from: SECTOR,
            end,
            cut_off: false,
            free_from: align_up(len.max(tables.head_end), cluster) >> layout.cluster_bits,
            file_bytes_max: SPARSE_FILE_BYTES_MAX,
            has_backing: self.has_backing,
            read_only: (!writable).then(|| self.lacks.clone().unwrap_or_default()),
            cache_bytes: Some(self.cache_bytes),
            tickets: self.tickets,
        }))
    }

    fn hosted(&mut self, id: FileId, file: &dyn Storage) -> Result<(u64, Kind)> {
        let header = match self.embedded {
            Some(header) => header.clone(),
            None => Header::read(file)?,
        };
        let tables = Tables::hosted(&header, file)?;
        if tables.compressed {
            if self.embedded.is_none() {
                return Err(Error::unsupported(
                    "its grains are compressed, which only an image of a single file has",
                ));
            }
            let core = Box::new(self.core(id, file, tables)?);
            return Ok((header.capacity * SECTOR, Kind::Compressed(core)));
        }
        if !self.read_only
            && let Err(why) = may_write(&header, &tables)
        {
            self.lack(format!("{}: {why}", file.name()));
        }
        let core = Box::new(self.core(id, file, tables)?);
        Ok((header.capacity * SECTOR, Kind::Sparse(core)))
    }

    fn cowd(&mut self, id: FileId, file: &dyn Storage) -> Result<(u64, Kind)> {
        self.lack("it has extents of ESX's redo logs (COWD), which are read only");
        let tables = Tables::cowd(file)?;
        let bytes = tables.capacity * SECTOR;
        Ok((bytes, Kind::Sparse(Box::new(self.core(id, file, tables)?))))
    }

    fn se(&mut self, id: FileId, file: &dyn Storage) -> Result<(u64, Kind)> {
        self.lack("it has extents of ESX's space-efficient disks (SESPARSE), which are read only");
        let tables = Tables::se(file)?;
        let bytes = tables.capacity * SECTOR;
        Ok((bytes, Kind::Sparse(Box::new(self.core(id, file, tables)?))))
    }
}

/// The tables of an extent with grains. Sectors where nothing else is said.
#[derive(Clone, Debug)]
pub struct Tables {
    form: Form,
    /// Of the disk.
    pub capacity: u64,
    /// Of a grain.
    pub grain: u64,
    /// Entries of a grain table.
    pub table_entries: u64,
    directory: u64,
    /// Offsets of the grain tables, in bytes; 0 where there is none.
    pub l1: Vec<u64>,
    /// Offsets of the redundant grain tables, in bytes; empty where there are none.
    pub copies: Vec<u64>,
    /// No grain begins before this byte.
    pub head_end: u64,
    /// What of header, descriptor, directories and tables lies on another of them, if anything; not told of ESX's extents.
    pub overlap: Option<String>,
    /// Where the last of these ends; not told of ESX's extents and compressed ones.
    meta_end: u64,
    /// Whether grains are compressed.
    pub compressed: bool,
    /// Whether each grain has a marker before it.
    pub markers: bool,
}

impl Tables {
    /// Those of an extent of that line, whose file is `file`; `None` for one without. `embedded`: as [`Parts::header`].
    ///
    /// # Errors
    ///
    /// As [`Vmdk::open`].
    pub fn read(
        line: &ExtentLine,
        embedded: Option<&Header>,
        file: &dyn Storage,
    ) -> Result<Option<Self>> {
        let tables = match (line.kind, embedded) {
            (_, Some(header)) => Self::hosted(header, file)?,
            (ExtentType::SeSparse, None) => Self::se(file)?,
            (ExtentType::Sparse | ExtentType::VmfsSparse, None) => match is_cowd(file)? {
                true => Self::cowd(file)?,
                false => Self::hosted(&Header::read(file)?, file)?,
            },
            _ => return Ok(None),
        };
        Ok(Some(tables))
    }

    fn hosted(header: &Header, file: &dyn Storage) -> Result<Self> {
        let len = file.len()?;
        header.validate(len)?;
        let copies = match header.flags & F_REDUNDANT {
            0 => Vec::new(),
            _ => read_directory(file, header.redundant, header.directory_entries())?,
        };
        let head_end =
            (header.descriptor.saturating_add(header.descriptor_len)).saturating_mul(SECTOR);
        let l1 = read_directory(file, header.directory, header.directory_entries())?;
        let (meta_end, overlap) = places(header, &l1, &copies);
        // Compressed extents may have their tables behind their grains.
        let meta_end = if header.is_compressed() { 0 } else { meta_end };
        let head_end = match &overlap {
            // Behind the tables, not where the header has the first grain: QEMU minds only where the file ends.
            None if meta_end <= header.overhead.saturating_mul(SECTOR) => head_end.max(meta_end),
            _ => head_end,
        };
        Ok(Self {
            form: Form::Sectors {
                zeros: header.flags & F_ZEROED_GRAIN != 0,
            },
            capacity: header.capacity,
            grain: header.grain,
            table_entries: u64::from(header.table_entries),
            directory: header.directory,
            l1,
            overlap,
            meta_end,
            copies,
            head_end: head_end.clamp(2 * SECTOR, align_up(len, SECTOR).max(2 * SECTOR)),
            compressed: header.is_compressed(),
            markers: header.flags & F_MARKERS != 0,
        })
    }

    fn cowd(file: &dyn Storage) -> Result<Self> {
        let cowd = Cowd::read(file)?;
        let entries = cowd
            .capacity
            .div_ceil(cowd.grain)
            .div_ceil(Cowd::TABLE_ENTRIES);
        Ok(Self {
            form: Form::Sectors { zeros: false },
            capacity: cowd.capacity,
            grain: cowd.grain,
            table_entries: Cowd::TABLE_ENTRIES,
            directory: cowd.directory,
            l1: read_directory(file, cowd.directory, entries)?,
            copies: Vec::new(),
            overlap: None,
            meta_end: 0,
            head_end: 2 * SECTOR,
            compressed: false,
            markers: false,
        })
    }

    fn se(file: &dyn Storage) -> Result<Self> {
        let se = Se::read(file)?;
        let entries = se.capacity.div_ceil(Se::GRAIN).div_ceil(Se::TABLE_ENTRIES);
        // At most 32 MiB.
        let bytes = read_short(file, se.directory * SECTOR, (entries * 8) as usize)?;
        Ok(Self {
            form: Form::Se {
                grains: se.grains * SECTOR,
            },
            capacity: se.capacity,
            grain: Se::GRAIN,
            table_entries: Se::TABLE_ENTRIES,
            directory: se.directory,
            l1: words_of(&bytes).map(|raw| se.table(raw)).collect(),
            copies: Vec::new(),
            overlap: None,
            meta_end: 0,
            head_end: SECTOR,
            compressed: false,
            markers: false,
        })
    }

    /// Whether the extent is of a kind that may be written: its grains must be in the file, but for zeros at its end.
    pub fn is_plain(&self) -> bool {
        matches!(self.form, Form::Sectors { .. }) && self.meta_end > 0
    }

    /// Bytes of a grain table in the file.
    pub fn table_bytes(&self) -> u64 {
        (self.table_entries * 8) >> self.form.shift()
    }

    /// What the entries in `bytes`, a grain table, say: 0 for no grain, 1 for zeros, else where the grain begins, in bytes.
    /// What is no entry is no multiple of 512.
    pub fn entries(&self, bytes: &[u8], out: &mut Vec<u64>) {
        out.clear();
        self.form.decode(bytes, out);
    }
}

fn is_cowd(file: &dyn Storage) -> Result<bool> {
    Ok(header::sector(file, 0)?.starts_with(&COWD_MAGIC))
}

/// Offsets of grain tables in bytes, of a directory of `count` entries at sector `at`.
pub(super) fn read_directory(file: &dyn Storage, at: u64, count: u64) -> Result<Vec<u64>> {
    // At most 32 MiB.
    let bytes = read_short(file, at * SECTOR, (count * 4) as usize)?;
    let entries = bytes.as_chunks::<4>().0.iter();
    Ok(entries
        .map(|e| u64::from(u32::from_le_bytes(*e)) * SECTOR)
        .collect())
}

/// The tables of an extent of that line, all of which may be emptied, and where its file ends then. `embedded`: as
/// [`Parts::header`].
pub(super) fn hosted_to_write(
    line: &ExtentLine,
    embedded: Option<&Header>,
    file: &dyn Storage,
) -> Result<(Tables, u64)> {
    let has_grains = matches!(line.kind, ExtentType::Sparse | ExtentType::VmfsSparse);
    if !has_grains || line.access != Access::Rw || is_cowd(file)? {
        return Err(Error::unsupported(format!(
            "a {} extent cannot be emptied: only those with grains that can be written can",
            line.kind
        )));
    }
    let header = embedded.map_or_else(|| Header::read(file), |header| Ok(header.clone()))?;
    let tables = Tables::hosted(&header, file)?;
    if tables.compressed {
        return Err(Error::unsupported(
            "its grains are compressed: it cannot be emptied",
        ));
    }
    may_write(&header, &tables).map_err(Error::unsupported)?;
    let end = header.overhead.saturating_mul(SECTOR).max(tables.head_end);
    Ok((tables, end))
}

/// Why an extent must not be written, if so: all that is not grains must lie before these, each in its own place.
fn may_write(header: &Header, tables: &Tables) -> Result<(), String> {
    if header.version == 3 {
        return Err(
            "is of version 3, whose records of changed blocks nobody would keep".to_owned(),
        );
    }
    if header.overhead == 0 {
        return Err("its header does not say where grains begin".to_owned());
    }
    if header.directory == 0 || tables.l1.iter().chain(&tables.copies).any(|at| *at == 0) {
        return Err("it lacks grain tables: convert it".to_owned());
    }
    if let Some(overlap) = &tables.overlap {
        return Err(format!("{overlap}: run diskplane check"));
    }
    let (end, head) = (tables.meta_end, header.overhead.saturating_mul(SECTOR));
    match end > head {
        true => Err(format!(
            "its tables end at byte {end:#x}, behind the beginning of the grains, {head:#x}: convert it"
        )),
        false => Ok(()),
    }
}

/// What of an extent is not grains: where the last of it ends, in bytes, and what lies on another, if anything.
fn places(header: &Header, directory: &[u64], copies: &[u64]) -> (u64, Option<String>) {
    let table = u64::from(header.table_entries) * 4;
    let directory_bytes = header.directory_entries() * 4;
    let (descriptor, descriptor_len) = (header.descriptor, header.descriptor_len);
    let parts = [
        ("header", SECTOR),
        ("grain directory", directory_bytes),
        ("descriptor", descriptor_len.saturating_mul(SECTOR)),
        ("redundant grain directory", directory_bytes),
        ("grain table", table),
        ("redundant grain table", table),
    ];
    // Where a part begins, and below the sector's bits which of them it is: there are millions of tables.
    let place = |at: u64, part: u64| at & !(SECTOR - 1) | part;
    let there = |tables: &[u64]| tables.iter().filter(|at| **at != 0).count();
    let mut places = Vec::with_capacity(4 + there(directory) + there(copies));
    places.extend([0, place(header.directory.saturating_mul(SECTOR), 1)]);
    if descriptor != 0 {
        places.push(place(descriptor.saturating_mul(SECTOR), 2));
    }
    if !copies.is_empty() {
        places.push(place(header.redundant.saturating_mul(SECTOR), 3));
    }
    for (tables, part) in [(directory, 4), (copies, 5)] {
        let there = tables.iter().filter(|at| **at != 0);
        places.extend(there.map(|at| place(*at, part)));
    }
    places.sort_unstable();
    let mut end = 0;
    let mut overlap = None;
    for place in places {
        let at = place & !(SECTOR - 1);
        let (what, len) = parts
            .get((place - at) as usize)
            .copied()
            .unwrap_or_default();
        if at < end && overlap.is_none() {
            overlap = Some(format!(
                "its {what} at byte {at:#x} overlaps what lies before"
            ));
        }
        end = at.saturating_add(len).max(end);
    }
    (end, overlap)
}

/// Two extents must not have the same bytes of a file.
fn check_flat_overlaps(extents: &[Extent], files: &[&dyn Storage]) -> Result<()> {
    let mut flat: Vec<(FileId, u64, u64)> = extents
        .iter()
        .filter_map(|e| match e.kind {
            Kind::Flat(at) => Some((e.file, at, at + e.bytes)),
            _ => None,
        })
        .collect();
    flat.sort_unstable_by_key(|(file, at, _)| (file.0, *at));
    let clash = flat
        .windows(2)
        .find(|pair| matches!(pair, [a, b] if a.0 == b.0 && b.1 < a.2));
    let Some([(file, at, _), ..]) = clash else {
        return Ok(());
    };
    let name = files
        .get(usize::from(file.0))
        .map_or_else(String::new, |f| f.name());
    Err(Error::corrupt(format!(
        "{name}: two extents of the descriptor overlap behind byte {at:#x}"
    )))
}
