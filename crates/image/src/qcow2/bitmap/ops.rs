//! What can be done with the bitmaps of an image that nobody has open.

use super::bits::{Bits, bytes_needed, check_bytes};
use super::directory::{Directory, Entry, shown};
use super::stored::{Source, Stored};
use super::table;
use crate::qcow2::Header;
use crate::qcow2::check::{
    BITMAP_AUTO, BITMAP_GRANULARITY_BITS, BITMAP_IN_USE, BITMAP_NAME_BYTES_MAX, Layout,
};
use crate::qcow2::edit::Editor;
use block::{Context, Error, Result, Storage};

/// The bitmaps of the image in `storage`.
///
/// # Errors
///
/// `Corrupt` for a header or directory that breaks the specification, or what reading fails with.
pub fn list(storage: &dyn Storage) -> Result<Vec<Entry>> {
    let read = || Directory::read(storage, &Header::read_unnamed(storage)?);
    Ok(read().context(|| storage.name())?.entries)
}

/// The bitmap called `name` of the image in `storage`, to be read.
///
/// # Errors
///
/// `NotFound`; `Corrupt` for an inconsistent or damaged bitmap; `Unsupported` for one with extra data that nobody
/// knows; what reading fails with.
pub fn open<'a>(storage: &'a dyn Storage, name: &[u8]) -> Result<Stored<'a>> {
    let read = || {
        let header = Header::read_unnamed(storage)?;
        let directory = Directory::read(storage, &header)?;
        let entry = directory.entry(name)?;
        Stored::open(storage, Layout::of(&header), header.size, entry)
    };
    read().context(|| storage.name())
}

/// All bits of the bitmap called `name` of the image in `storage`. Memory: at most 512 MiB.
///
/// # Errors
///
/// As [`open`].
pub fn load(storage: &dyn Storage, name: &[u8]) -> Result<Bits> {
    open(storage, name)?.load()
}

/// QEMU's choice: the cluster size, but at least 4 KiB and at most 64 KiB.
pub fn granularity_default(cluster_size: u64) -> u64 {
    cluster_size.clamp(4096, 65536)
}

/// Changes of an image's bitmaps, put in force by [`Bitmaps::commit`] all at once or not at all.
#[derive(Debug)]
pub struct Bitmaps<'a> {
    editor: Editor<'a>,
    directory: Directory,
    changed: bool,
}

impl<'a> Bitmaps<'a> {
    /// Opens the image in `storage`, which nobody else may use meanwhile.
    ///
    /// # Errors
    ///
    /// As [`Editor::open`], and for a directory that breaks the specification.
    pub fn open(storage: &'a dyn Storage) -> Result<Self> {
        let name = storage.name();
        let editor = Editor::open(storage, &name)?;
        let directory = Directory::read(storage, editor.header()).context(|| name)?;
        Ok(Self {
            editor,
            directory,
            changed: false,
        })
    }

    /// The bitmaps as they will be.
    pub fn entries(&self) -> &[Entry] {
        self.directory.entries()
    }

    fn named<T>(&self, result: Result<T>) -> Result<T> {
        result.context(|| self.editor.name().to_owned())
    }

    fn size(&self) -> u64 {
        self.editor.header().size
    }

    /// Adds a bitmap without bits set, enabled. `granularity` is in bytes; [`granularity_default`] where not given.
    ///
    /// # Errors
    ///
    /// `Invalid` for a name that is taken, for a name, a granularity or a number of bitmaps that cannot be, and
    /// for version 2, which has no bitmaps.
    pub fn add(&mut self, name: &[u8], granularity: Option<u64>) -> Result<()> {
        let entry = self.new_entry(name, granularity);
        let mut entry = self.named(entry)?;
        let size = self.size();
        table::store(&mut self.editor, &mut entry, size, &mut [])?;
        self.directory.entries.push(entry);
        self.changed = true;
        let fits = self.directory.encode().map(drop);
        self.named(fits)
    }

    fn new_entry(&self, name: &[u8], granularity: Option<u64>) -> Result<Entry> {
        let header = self.editor.header();
        if header.version < 3 {
            return Err(Error::invalid(
                "a qcow2 image of version 2 has no bitmaps: upgrade it first (diskplane amend -o \
                 compat=1.1)",
            ));
        }
        if name.is_empty() || name.len() > usize::from(BITMAP_NAME_BYTES_MAX) || name.contains(&0) {
            return Err(Error::invalid(format!(
                "the name of a bitmap has 1 to {BITMAP_NAME_BYTES_MAX} bytes, none of them 0"
            )));
        }
        if self.directory.position(name).is_ok() {
            return Err(Error::invalid(format!(
                "the image has a bitmap '{}' already",
                shown(name)
            )));
        }
        if header.size == 0 {
            return Err(Error::invalid("a disk of 0 bytes has nothing to track"));
        }
        let granularity = granularity.unwrap_or(granularity_default(header.cluster_size()));
        let bits = u8::try_from(granularity.trailing_zeros()).unwrap_or(0);
        if !granularity.is_power_of_two() || !BITMAP_GRANULARITY_BITS.contains(&bits) {
            return Err(Error::invalid(format!(
                "a granularity of {granularity} bytes: it is a power of two from 512 bytes to 2 GiB"
            )));
        }
        check_bytes(bytes_needed(header.size, u32::from(bits)))?;
        Ok(Entry {
            name: name.to_vec(),
            granularity_bits: bits,
            flags: BITMAP_AUTO,
            extra: Vec::new(),
            table: 0,
            entries: 0,
        })
    }

    /// Removes a bitmap, an inconsistent one as well.
    ///
    /// # Errors
    ///
    /// `NotFound`, or what reading the refcounts fails with.
    pub fn remove(&mut self, name: &[u8]) -> Result<()> {
        let nth = self.directory.position(name);
        let nth = self.named(nth)?;
        let entry = self.directory.entries.remove(nth);
        self.changed = true;
        table::free(&mut self.editor, &entry)
    }

    /// The bitmap called `name`, which must be usable.
    fn usable(&mut self, name: &[u8]) -> Result<Entry> {
        let found = self.directory.entry(name).and_then(|entry| {
            entry.check_usable()?;
            Ok(entry.clone())
        });
        self.named(found)
    }

    fn put_back(&mut self, entry: Entry) {
        let place = self.directory.entries.iter_mut();
        if let Some(place) = place.into_iter().find(|place| place.name == entry.name) {
            self.changed |= *place != entry;
            *place = entry;
        }
    }

    /// Clears all bits of a bitmap.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Corrupt` for an inconsistent bitmap, `Unsupported` for one with unknown extra data.
    pub fn clear(&mut self, name: &[u8]) -> Result<()> {
        let mut entry = self.usable(name)?;
        let size = self.size();
        table::store(&mut self.editor, &mut entry, size, &mut [])?;
        self.put_back(entry);
        Ok(())
    }

    /// Enables a bitmap (from its next use on, the disk's changes are noted in it), or disables it.
    ///
    /// # Errors
    ///
    /// As [`Bitmaps::clear`].
    pub fn set_enabled(&mut self, name: &[u8], enabled: bool) -> Result<()> {
        let mut entry = self.usable(name)?;
        entry.flags &= !BITMAP_AUTO;
        if enabled {
            entry.flags |= BITMAP_AUTO;
        }
        self.put_back(entry);
        Ok(())
    }

    /// One of these bitmaps, to be read.
    ///
    /// # Errors
    ///
    /// As [`open`].
    pub fn stored(&mut self, name: &[u8]) -> Result<Stored<'a>> {
        let entry = self.usable(name)?;
        let layout = self.editor.layout();
        let stored = Stored::open(self.editor.storage(), layout, self.size(), &entry);
        self.named(stored)
    }

    /// Sets the bits of all that `source` has set. Memory: a piece of both, and their tables.
    ///
    /// # Errors
    ///
    /// As [`Bitmaps::clear`], and `Invalid` where `source` is of a disk of another size.
    pub fn merge(&mut self, name: &[u8], mut source: impl Source) -> Result<()> {
        let mut entry = self.usable(name)?;
        let size = self.size();
        if source.size() != size {
            return self.named(Err(Error::invalid(format!(
                "bitmaps of disks of {size} and of {} bytes cannot be merged",
                source.size()
            ))));
        }
        let mut stored = self.stored(name)?;
        let sources: &mut [&mut dyn Source] = &mut [&mut &mut stored, &mut source];
        table::store(&mut self.editor, &mut entry, size, sources)?;
        self.put_back(entry);
        Ok(())
    }

    /// Makes the changes durable and puts them in force: all of them, or none if the system crashes.
    ///
    /// # Errors
    ///
    /// As [`Editor::commit`].
    pub fn commit(mut self) -> Result<()> {
        match self.changed {
            true => write(&mut self.editor, &mut self.directory),
            false => Ok(()),
        }
    }

    /// For the bitmaps that an image in use noted changes of in memory: to those numbered so these are added now.
    pub(super) fn save<'b>(
        &mut self,
        mut changes: impl Iterator<Item = (usize, &'b Bits)>,
    ) -> Result<()> {
        changes.try_for_each(|(nth, mut bits)| {
            let (storage, layout, size) =
                (self.editor.storage(), self.editor.layout(), self.size());
            let Some(entry) = self.directory.entries.get_mut(nth) else {
                return Ok(());
            };
            entry.flags &= !BITMAP_IN_USE;
            let mut stored = Stored::open(storage, layout, size, entry)?;
            let sources: &mut [&mut dyn Source] = &mut [&mut &mut stored, &mut bits];
            table::store(&mut self.editor, entry, size, sources)?;
            self.changed = true;
            Ok(())
        })
    }
}

/// Puts the directory in force.
fn write(editor: &mut Editor<'_>, directory: &mut Directory) -> Result<()> {
    let mut header = editor.header().clone();
    place(editor, directory, &mut header)?;
    editor.set_header(header)?;
    editor.commit()
}

/// Writes the directory to a new place, and says in `header` where that is.
fn place(editor: &mut Editor<'_>, directory: &mut Directory, header: &mut Header) -> Result<()> {
    let cluster = editor.layout().cluster();
    if directory.offset != 0 {
        editor.free(directory.offset, directory.len.div_ceil(cluster))?;
    }
    directory.offset = 0;
    let mut bytes = directory.encode()?;
    directory.len = bytes.len() as u64;
    if directory.len > 0 {
        bytes.resize(bytes.len().next_multiple_of(cluster as usize), 0);
        directory.offset = editor.allocate(bytes.len() as u64 / cluster)?;
        editor.write(directory.offset, &bytes)?;
    }
    directory.announce(header);
    Ok(())
}

/// Fits the bitmaps to a disk that gets `new` bytes by the same edit: `header` is what the caller goes on to set. As
/// QEMU has it, what the disk grows by counts as unchanged. Inconsistent bitmaps stay as they are. Memory: a piece of a
/// bitmap before and after, and its tables.
///
/// # Errors
///
/// `Corrupt` for bitmaps that cannot be read; `Unsupported` where one has extra data that nobody knows; `Invalid`
/// where a bitmap of the new size would pass 512 MiB, or have nothing to track.
pub fn resize(editor: &mut Editor<'_>, header: &mut Header, new: u64) -> Result<()> {
    let directory = Directory::read(editor.storage(), editor.header());
    let mut directory = directory.context(|| editor.name().to_owned())?;
    if directory.entries.is_empty() || new == editor.header().size {
        return Ok(());
    }
    if new == 0 {
        let error = Error::invalid("a disk of 0 bytes cannot have bitmaps: remove them first");
        return Err(error.within(editor.name()));
    }
    let (layout, old) = (editor.layout(), editor.header().size);
    for entry in directory.entries.iter_mut().filter(|entry| !entry.in_use()) {
        let needed = bytes_needed(new, u32::from(entry.granularity_bits));
        let stored =
            check_bytes(needed).and_then(|()| Stored::open(editor.storage(), layout, old, entry));
        let mut stored = stored.context(|| editor.name().to_owned())?;
        table::store(editor, entry, new, &mut [&mut &mut stored])?;
    }
    place(editor, &mut directory, header)
}
