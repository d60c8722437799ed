//! Changes to the metadata of an image that nobody has open: snapshots, bitmaps, keys, sizes.
//!
//! ```text
//!   header ──▶ refcount table ──▶ refcount blocks        as the file has them: not touched
//!     │ one sector
//!     └──────▶ new refcount table ──▶ old blocks, and new ones where a refcount changes
//!              new L1 table, snapshot table, bitmap directory … : what the caller wrote
//! ```
//!
//! An edit writes only to clusters that are free, and changes refcounts in copies of their blocks. Until
//! [`Editor::commit`] nothing refers to any of it; then, with everything durable, one write of the header's
//! first sector puts all of it in force at once. A crash leaves the image as it was or as it shall be, and at
//! most a longer file. What the edit freed is not used again before that.
//!
//! So a caller writes a new version of each structure that it changes ([`Editor::allocate`],
//! [`Editor::write`]), frees the old one ([`Editor::free`]), lets the header point at the new one
//! ([`Editor::set_header`]), and commits. There is no order to keep.
//!
//! # Memory
//!
//! Refcount table, its successor and where its blocks are: at most 8 MiB each. Refcount blocks: 32 MiB.
//! Freed ranges to give back to the host: 1 MiB. The first cluster: at most 2 MiB.

mod blocks;
mod commit;
mod space;
mod switch;
#[cfg(test)]
mod tests;

use super::check::Layout;
use super::close::read_short;
use super::features;
use super::header::Header;
use super::open::words_of;
use block::{Context, Error, ErrorKind, Result, Storage};
use blocks::Blocks;
use space::Space;

/// Ranges of freed clusters that are given back to the host; more are only free in the image.
const FREED_MAX: usize = 1 << 16;

/// An image under change. See the module; dropped without a commit, nothing has changed.
#[derive(Debug)]
pub struct Editor<'a> {
    storage: &'a dyn Storage,
    name: String,
    layout: Layout,
    /// As it shall be.
    header: Header,
    /// As it is.
    current: Header,
    /// The first cluster as it is (or as much of it as the file has).
    first: Vec<u8>,
    blocks: Blocks,
    space: Space,
    /// Byte ranges whose refcounts became 0.
    freed: Vec<(u64, u64)>,
    state: Progress,
}

/// How far an edit got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Nothing in the file has changed.
    Open,
    /// Something failed: what is in memory is not to be written.
    Failed,
    /// The header was being written when something failed: the file has the old state or the new one.
    Unknown,
}

impl<'a> Editor<'a> {
    /// Opens the image in `storage`, which nobody else may use meanwhile, for changes of its metadata.
    /// `name` is what messages call it.
    ///
    /// # Errors
    ///
    /// `Corrupt` for a header or a refcount table that cannot be trusted, and for an image that is marked
    /// corrupt or dirty (`diskplane check --repair all` first); `Unsupported` for features nobody knows.
    pub fn open(storage: &'a dyn Storage, name: &str) -> Result<Self> {
        Self::load(storage, name).context(|| name)
    }

    fn load(storage: &'a dyn Storage, name: &str) -> Result<Self> {
        let header = Header::read_unnamed(storage)?;
        header.check_known()?;
        for (bit, what) in [
            (features::CORRUPT, "is marked corrupt"),
            (
                features::DIRTY,
                "was not closed cleanly (its dirty bit is set)",
            ),
        ] {
            if header.incompatible & bit != 0 {
                return Err(Error::corrupt(format!(
                    "{what}: run diskplane check --repair all"
                )));
            }
        }
        let layout = Layout::of(&header);
        let file_len = storage.len()?;
        // At most 2 MiB.
        let first = read_short(storage, 0, file_len.min(layout.cluster()) as usize)?;
        let mut blocks = Blocks::load(storage, &header, layout)?;
        let space = Space::survey(storage, &header, layout, &mut blocks)?;
        Ok(Self {
            storage,
            name: name.to_owned(),
            layout,
            current: header.clone(),
            header,
            first,
            blocks,
            space,
            freed: Vec::new(),
            state: Progress::Open,
        })
    }

    /// The header as it will be after a commit.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The constants of the image's tables.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What messages call the image.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file itself: to read it, or to overwrite in place what may be torn.
    pub fn storage(&self) -> &'a dyn Storage {
        self.storage
    }

    /// Reads `len` bytes at `offset`; what lies behind the end of the file is zeros.
    ///
    /// # Errors
    ///
    /// What reading fails with.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        read_short(self.storage, offset, len)
            .context(|| format!("read {len} bytes at {offset:#x}"))
            .context(|| &self.name)
    }

    /// The `entries` words of the L1 table at `offset`: at most 32 MiB, which who parsed the number has seen to.
    ///
    /// # Errors
    ///
    /// `Corrupt` for a table that ends behind the file's end: what one claims costs no more memory than the file
    /// has bytes. What reading fails with.
    pub fn read_l1(&self, offset: u64, entries: u32) -> Result<Vec<u64>> {
        let len = u64::from(entries) * 8;
        let file_len = self.storage.len()?;
        if entries > 0 && offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(Error::corrupt(format!(
                "{}: L1 table at {offset:#x} with {entries} entries ends behind the file's end \
                 ({file_len:#x}): run diskplane check",
                self.name
            )));
        }
        Ok(words_of(&self.read(offset, len as usize)?))
    }

    /// Where the last cluster ends that has a refcount, in bytes; at least behind the header.
    ///
    /// # Errors
    ///
    /// What reading a refcount block fails with.
    pub fn used_end(&mut self) -> Result<u64> {
        let end = Space::end_of(self.storage, &mut self.blocks).context(|| &self.name)?;
        Ok(end << self.layout.cluster_bits)
    }

    /// Whether the header, the active L1 table, the refcount structures or the snapshot table begin or go on in the
    /// cluster at `offset` (any byte of it).
    #[must_use]
    pub fn is_fixed(&self, offset: u64) -> bool {
        self.space.is_fixed(offset >> self.layout.cluster_bits)
    }

    /// What the refcount of the cluster at `offset` (any byte of it) will be after a commit.
    ///
    /// # Errors
    ///
    /// What reading its refcount block fails with.
    pub fn refcount(&mut self, offset: u64) -> Result<u64> {
        self.blocks
            .get(self.storage, offset >> self.layout.cluster_bits)
            .context(|| &self.name)
    }

    /// Takes `clusters` free clusters in one piece, with refcount 1, and returns the first one's offset.
    /// They hold what they held before: write all of them.
    ///
    /// # Errors
    ///
    /// `NoSpace` where the host or the format has no room. After an error the edit cannot be committed.
    pub fn allocate(&mut self, clusters: u64) -> Result<u64> {
        self.attempt(|editor| {
            let first = editor.find(clusters)?;
            editor.count(first, clusters, 1)?;
            editor.house()?;
            Ok(first << editor.layout.cluster_bits)
        })
    }

    /// Changes the refcounts of `clusters` clusters from the one at `offset` on by `delta`.
    ///
    /// # Errors
    ///
    /// `Unsupported` where a refcount would not fit its `refcount_bits`, `Corrupt` where it would pass below 0
    /// or the offset is no cluster's. After an error the edit cannot be committed.
    pub fn adjust(&mut self, offset: u64, clusters: u64, delta: i64) -> Result<()> {
        self.attempt(|editor| {
            if editor.layout.within(offset) != 0 {
                return Err(Error::corrupt(format!(
                    "host offset {offset:#x} is between two clusters: run diskplane check"
                )));
            }
            editor.count(offset >> editor.layout.cluster_bits, clusters, delta)?;
            editor.house()
        })
    }

    /// Gives back one reference to each of `clusters` clusters from the one at `offset` on.
    ///
    /// # Errors
    ///
    /// As [`Editor::adjust`].
    pub fn free(&mut self, offset: u64, clusters: u64) -> Result<()> {
        self.adjust(offset, clusters, -1)
    }

    /// Writes `bytes` at `offset`, into clusters that this edit allocated: what the image refers to now is not
    /// overwritten.
    ///
    /// # Errors
    ///
    /// `Invalid` for a cluster that is in use, or what writing fails with. After an error the edit
    /// cannot be committed.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.attempt(|editor| {
            let bits = editor.layout.cluster_bits;
            let last = offset.saturating_add(bytes.len() as u64).saturating_sub(1);
            for cluster in offset >> bits..=last >> bits {
                if editor.blocks.get_old(editor.storage, cluster)? != 0
                    || editor.space.is_fixed(cluster)
                {
                    return Err(Error::invalid(format!(
                        "an edit would overwrite the cluster at {:#x}, which is in use",
                        cluster << bits
                    )));
                }
            }
            editor
                .storage
                .write_at(offset, bytes)
                .context(|| format!("write {} bytes at {offset:#x}", bytes.len()))
        })
    }

    /// Sets what the header will be: fields, extensions, backing file's name. Where the refcount table is, is
    /// the editor's to say: those fields are ignored.
    ///
    /// # Errors
    ///
    /// `Corrupt` for a header that could not be opened again, `Invalid` for one that does not fit its
    /// cluster or would change how the refcounts are read.
    pub fn set_header(&mut self, header: Header) -> Result<()> {
        self.attempt(|editor| {
            if (header.cluster_bits, header.refcount_order)
                != (editor.header.cluster_bits, editor.header.refcount_order)
            {
                return Err(Error::invalid(
                    "cluster size and refcount width of an image cannot change in an edit",
                ));
            }
            let mut header = header;
            header.refcount_table_offset = editor.header.refcount_table_offset;
            header.refcount_table_clusters = editor.header.refcount_table_clusters;
            header.validate()?;
            editor.check_fits(&header)?;
            editor.header = header;
            Ok(())
        })
    }

    /// Does one step of the edit; a failed one makes it impossible to commit.
    fn attempt<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.state != Progress::Open {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{}: an edit that failed goes on", self.name),
            ));
        }
        step(self).map_err(|error| {
            if self.state == Progress::Open {
                self.state = Progress::Failed;
            }
            error.within(&self.name)
        })
    }
}

impl Drop for Editor<'_> {
    fn drop(&mut self) {
        if self.state != Progress::Unknown {
            // Nothing refers to what was appended. A longer file is no harm, so failing is none.
            let _ = self.space.cut(self.storage);
        }
    }
}
