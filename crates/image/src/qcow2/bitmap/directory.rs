//! The bitmap directory: which bitmaps an image has.

use crate::qcow2::Header;
use crate::qcow2::check::{
    BITMAP_AUTO, BITMAP_DIRECTORY_BYTES_MAX, BITMAP_DIRTY_TRACKING, BITMAP_EXTRA_COMPATIBLE,
    BITMAP_IN_USE, BITMAPS_MAX, Bitmap, BitmapDirectory, DIRECTORY_ENTRY_BYTES, Layout,
};
use crate::qcow2::extensions::{self, Extension};
use crate::qcow2::{features, read_u32};
use block::{Context, Error, Result, Storage};
use std::collections::HashSet;

/// A bitmap, as the directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Bytes, most likely UTF-8.
    pub(super) name: Vec<u8>,
    pub(super) granularity_bits: u8,
    pub(super) flags: u32,
    /// Nobody knows what it says.
    pub(super) extra: Vec<u8>,
    /// Where its table is.
    pub(super) table: u64,
    /// Entries of that.
    pub(super) entries: u32,
}

impl Entry {
    /// Its name, for people and for JSON: what is no UTF-8, or could steer a terminal, is replaced.
    pub fn name(&self) -> String {
        shown(&self.name)
    }

    /// Its name, as it is.
    pub fn raw_name(&self) -> &[u8] {
        &self.name
    }

    /// Bytes of the disk that a bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// It was not saved after its last use: nobody knows what its bits mean.
    pub fn in_use(&self) -> bool {
        self.flags & BITMAP_IN_USE != 0
    }

    /// It is enabled: every change of the disk is to be noted in it.
    pub fn auto(&self) -> bool {
        self.flags & BITMAP_AUTO != 0
    }

    /// It has data of a kind that this code does not know, and without which it must not be used.
    pub fn incompatible(&self) -> bool {
        !self.extra.is_empty() && self.flags & BITMAP_EXTRA_COMPATIBLE == 0
    }

    /// Fails where its bits must not be used, saying why.
    pub(super) fn check_usable(&self) -> Result<()> {
        let name = self.name();
        if self.incompatible() {
            return Err(Error::unsupported(format!(
                "bitmap '{name}' has extra data that diskplane does not know: it can only be removed"
            )));
        }
        if self.in_use() {
            return Err(Error::corrupt(format!(
                "bitmap '{name}' is inconsistent, since it was not saved after its last use: it \
                 can only be removed"
            )));
        }
        Ok(())
    }

    /// Bytes of its entry in the directory.
    pub(super) fn len(&self) -> u64 {
        let len = DIRECTORY_ENTRY_BYTES + self.extra.len() + self.name.len();
        (len as u64).next_multiple_of(8)
    }

    fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let too_long = |what| Error::invalid(format!("bitmap '{}': {what}", self.name()));
        let name = u16::try_from(self.name.len()).map_err(|_| too_long("too long a name"))?;
        let extra = u32::try_from(self.extra.len()).map_err(|_| too_long("4 GiB of extra data"))?;
        out.extend(self.table.to_be_bytes());
        out.extend(self.entries.to_be_bytes());
        out.extend(self.flags.to_be_bytes());
        out.extend([BITMAP_DIRTY_TRACKING, self.granularity_bits]);
        out.extend(name.to_be_bytes());
        out.extend(extra.to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        Ok(())
    }
}

/// `name` for a terminal.
pub(super) fn shown(name: &[u8]) -> String {
    block::plain(&String::from_utf8_lossy(name))
}

/// The bitmaps of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Directory {
    /// In their order on disk.
    pub(super) entries: Vec<Entry>,
    /// Where it is; 0 for nowhere.
    pub(super) offset: u64,
    /// Its bytes there.
    pub(super) len: u64,
}

impl Directory {
    /// Reads the directory of the image in `storage`, whose header is `header`. Without the autoclear bit it
    /// is stale, and as good as none. Memory: at most 66 MiB, and no more than twice the file's bytes.
    ///
    /// # Errors
    ///
    /// `Corrupt` for one that breaks a rule of the specification or a limit of QEMU, saying which.
    pub fn read(storage: &dyn Storage, header: &Header) -> Result<Self> {
        let layout = Layout::of(header);
        let place = match BitmapDirectory::of(header, &layout) {
            None => return Ok(Self::default()),
            Some(Err(what)) => {
                return Err(Error::corrupt(format!(
                    "header: the bitmaps extension {what}"
                )));
            }
            Some(Ok(place)) => place,
        };
        let at = place.offset;
        if at
            .checked_add(place.len)
            .is_none_or(|end| end > storage.len().unwrap_or(0))
        {
            return Err(Error::corrupt(format!(
                "bitmap directory at {at:#x} of {} bytes ends behind the file's end",
                place.len
            )));
        }
        // At most 66 MiB, which the file has.
        let mut bytes = vec![0; place.len as usize];
        storage
            .read_at(at, &mut bytes)
            .context(|| "bitmap directory")?;
        let entries = Self::parse(&bytes, place.count, &layout, header.size)?;
        Ok(Self {
            entries,
            offset: at,
            len: place.len,
        })
    }

    fn parse(bytes: &[u8], count: u32, layout: &Layout, size: u64) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut names = HashSet::new();
        let mut at = 0;
        for nth in 0..count {
            let wrong = |what: &str| {
                Error::corrupt(format!("bitmap directory: entry {nth} at byte {at} {what}"))
            };
            let rest = bytes.get(at..).unwrap_or_default();
            let judged = Bitmap::parse_any(rest, layout, size).map_err(&wrong)?;
            let short = || wrong("ends behind the directory");
            let len = usize::try_from(judged.len).map_err(|_| short())?;
            let entry = rest.get(..len).ok_or_else(short)?;
            let [granularity_bits, n0, n1] = [17, 18, 19].map(|at| entry.get(at).copied());
            let name_len = u16::from_be_bytes([n0.unwrap_or(0), n1.unwrap_or(0)]);
            let extra_len = read_u32(entry, 20).ok_or_else(short)? as usize;
            let tail = entry.get(DIRECTORY_ENTRY_BYTES..).ok_or_else(short)?;
            let extra = tail.get(..extra_len).ok_or_else(short)?;
            let name = tail
                .get(extra_len..)
                .and_then(|tail| tail.get(..usize::from(name_len)))
                .ok_or_else(short)?;
            if !names.insert(name) {
                return Err(wrong(&format!(
                    "has the name of another one, '{}'",
                    shown(name)
                )));
            }
            entries.push(Entry {
                name: name.to_vec(),
                granularity_bits: granularity_bits.unwrap_or(0),
                flags: read_u32(entry, 12).ok_or_else(short)?,
                extra: extra.to_vec(),
                table: judged.table,
                entries: judged.entries,
            });
            at += len;
        }
        if at != bytes.len() {
            return Err(Error::corrupt(format!(
                "bitmap directory: its {count} entries have {at} bytes, not {}",
                bytes.len()
            )));
        }
        Ok(entries)
    }

    /// The bitmaps, in their order on disk.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The number of the bitmap called `name`.
    pub(super) fn position(&self, name: &[u8]) -> Result<usize> {
        self.entries
            .iter()
            .position(|entry| entry.name == name)
            .ok_or_else(|| {
                Error::new(
                    block::ErrorKind::NotFound,
                    format!("the image has no bitmap '{}'", shown(name)),
                )
            })
    }

    /// The bitmap called `name`.
    pub(super) fn entry(&self, name: &[u8]) -> Result<&Entry> {
        let nth = self.position(name)?;
        let entry = self.entries.get(nth);
        entry.ok_or_else(|| Error::invalid("no such bitmap"))
    }

    /// The directory's bytes.
    pub(super) fn encode(&self) -> Result<Vec<u8>> {
        if self.entries.len() > BITMAPS_MAX as usize {
            return Err(Error::invalid(format!(
                "an image has at most {BITMAPS_MAX} bitmaps"
            )));
        }
        let len: u64 = self.entries.iter().map(Entry::len).sum();
        if len > BITMAP_DIRECTORY_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a bitmap directory of {len} bytes, the limit is {BITMAP_DIRECTORY_BYTES_MAX}"
            )));
        }
        let mut out = Vec::with_capacity(len as usize);
        for entry in &self.entries {
            entry.encode(&mut out)?;
        }
        Ok(out)
    }

    /// Says in `header` where this directory is; nothing where it is empty.
    pub(super) fn announce(&self, header: &mut Header) {
        let at = header
            .extensions
            .iter()
            .position(|e| e.kind == extensions::BITMAPS);
        let found = at.map(|at| header.extensions.remove(at));
        header.autoclear &= !features::BITMAPS;
        if self.entries.is_empty() {
            return;
        }
        let mut data = Vec::with_capacity(24);
        // At most 65535.
        data.extend((self.entries.len() as u32).to_be_bytes());
        data.extend([0; 4]);
        data.extend(self.len.to_be_bytes());
        data.extend(self.offset.to_be_bytes());
        let extension = Extension {
            kind: extensions::BITMAPS,
            data,
        };
        // Where it was, or the new one last.
        let at = at.filter(|_| found.is_some());
        header
            .extensions
            .insert(at.unwrap_or(header.extensions.len()), extension);
        header.autoclear |= features::BITMAPS;
    }
}
