//! What can be done with the bitmaps of an image that nobody has open.

use super::bits::{Bits, bytes_needed, check_bytes};
use super::directory::{Directory, Entry, shown};
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

/// Reads the bits of the bitmap called `name` of the image in `storage`. Memory: at most 512 MiB.
///
/// # Errors
///
/// `NotFound`; `Corrupt` for an inconsistent or damaged bitmap; `Unsupported` for one with extra data that nobody
/// knows; what reading fails with.
pub fn load(storage: &dyn Storage, name: &[u8]) -> Result<Bits> {
    let read = || {
        let header = Header::read_unnamed(storage)?;
        let directory = Directory::read(storage, &header)?;
        let nth = directory.position(name)?;
        match directory.entries.get(nth) {
            Some(entry) => table::load(storage, &Layout::of(&header), header.size, entry),
            None => Bits::new(0, 16),
        }
    };
    read().context(|| storage.name())
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
        table::store(&mut self.editor, &mut entry, None)?;
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
        let found = self.directory.position(name).and_then(|nth| {
            let entry = self.directory.entries.get(nth);
            let entry = entry.ok_or_else(|| Error::invalid("no such bitmap"))?;
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
        table::store(&mut self.editor, &mut entry, None)?;
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

    /// Reads the bits of one of these bitmaps.
    ///
    /// # Errors
    ///
    /// As [`load`].
    pub fn bits(&mut self, name: &[u8]) -> Result<Bits> {
        let entry = self.usable(name)?;
        let layout = self.editor.layout();
        let bits = table::load(self.editor.storage(), &layout, self.size(), &entry);
        self.named(bits)
    }

    /// Sets the bits of all that `source` has set. Memory: both, each at most 512 MiB.
    ///
    /// # Errors
    ///
    /// As [`Bitmaps::clear`], and `Invalid` where `source` is of a disk of another size.
    pub fn merge(&mut self, name: &[u8], source: &Bits) -> Result<()> {
        let mut entry = self.usable(name)?;
        let bits = self.bits(name)?;
        self.named(bits.merge(source))?;
        table::store(&mut self.editor, &mut entry, Some(&bits))?;
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

    /// For the bitmaps that an image in use kept in memory: those numbered `saved` are saved now.
    pub(super) fn save<'b>(
        &mut self,
        mut saved: impl Iterator<Item = (usize, &'b Bits)>,
    ) -> Result<()> {
        saved.try_for_each(|(nth, bits)| {
            let Some(entry) = self.directory.entries.get_mut(nth) else {
                return Ok(());
            };
            table::store(&mut self.editor, entry, Some(bits))?;
            entry.flags &= !BITMAP_IN_USE;
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
/// QEMU has it, what the disk grows by counts as unchanged. Inconsistent bitmaps stay as they are. Memory: a bitmap
/// before and after, each at most 512 MiB.
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
        let fitted = || -> Result<Bits> {
            let before = table::load(editor.storage(), &layout, old, entry)?;
            let after = Bits::new(new, before.granularity_bits())?;
            let mut at = 0;
            while let Some((start, end)) = before.next_dirty(at) {
                after.mark(start, end - start);
                at = end;
            }
            Ok(after)
        };
        let after = fitted().context(|| editor.name().to_owned())?;
        table::store(editor, entry, Some(&after))?;
    }
    place(editor, &mut directory, header)
}
