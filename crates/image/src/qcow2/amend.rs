//! Changing what an image was created with: version, lazy refcounts, refcount width, data file.
//!
//! Each change is one commit of an [`Editor`] (or a few, with leaks between them at worst), in an order that
//! lets options depend on each other: an upgrade comes first, a downgrade last.

use super::check::{SNAPSHOT_BYTES, SNAPSHOT_TABLE_BYTES_MAX, Snapshot};
use super::edit::Editor;
use super::extensions::{self, Extension};
use super::features;
use super::header::{Header, V3_LEN};
use super::{downgrade, rewidth};
use block::{Context, Error, Result, Storage};

/// What to change; `None` leaves it as it is. Size and encryption are others' work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendOptions {
    /// 2 (QEMU's `compat=0.10`) or 3 (`compat=1.1`).
    pub version: Option<u32>,
    /// Whether writers may postpone refcounts; version 3 only.
    pub lazy_refcounts: Option<bool>,
    /// Bits of a refcount: a power of two up to 64; 16 in version 2.
    pub refcount_bits: Option<u32>,
    /// The backing file's name: only what it is already, or an error.
    pub backing: Option<String>,
    /// The backing file's format: likewise.
    pub backing_format: Option<String>,
    /// Name of the external data file, for an image that has one; empty for none recorded.
    pub data_file: Option<String>,
    /// Whether the external data file is a raw image too: can be switched off only.
    pub data_file_raw: Option<bool>,
}

impl AmendOptions {
    /// The version that the image will have.
    fn version_of(&self, header: &Header) -> u32 {
        self.version.unwrap_or(header.version)
    }

    /// Checks what can be known from the header alone: nothing has been written when this refuses.
    ///
    /// # Errors
    ///
    /// `Invalid` for what cannot be or contradicts itself, naming the option.
    pub fn validate(&self, header: &Header) -> Result<()> {
        let refused = |text: &str| Err(Error::invalid(text));
        let version = self.version_of(header);
        if !matches!(version, 2 | 3) {
            return Err(Error::invalid(format!(
                "version {version} is not known: 2 or 3"
            )));
        }
        if let Some(bits) = self.refcount_bits {
            if !bits.is_power_of_two() || bits > 64 {
                return Err(Error::invalid(format!(
                    "refcount_bits is {bits}: it must be a power of two from 1 to 64"
                )));
            }
            if version < 3 && bits != 16 {
                return refused("refcount_bits other than 16 need compat=1.1");
            }
        }
        if version < 3 && self.lazy_refcounts == Some(true) {
            return refused("lazy_refcounts=on needs compat=1.1");
        }
        if version < 3 && header.version >= 3 {
            let mut after = header.clone();
            if let Some(bits) = self.refcount_bits {
                after.refcount_order = bits.trailing_zeros();
            }
            downgrade::check(&after)?;
        }
        let backing = |wanted: &Option<String>, is: Option<&str>| {
            wanted.as_deref().is_none_or(|w| w == is.unwrap_or(""))
        };
        let format = header.backing_format();
        if !backing(&self.backing, header.backing.as_deref())
            || !backing(&self.backing_format, format.as_deref())
        {
            return refused("the backing file cannot be amended: use diskplane rebase");
        }
        let has_data_file = header.incompatible & features::DATA_FILE != 0;
        if self.data_file.is_some() && !has_data_file {
            return refused("data_file can only be set for images that have an external data file");
        }
        if self.data_file_raw == Some(true) && header.autoclear & features::DATA_FILE_RAW == 0 {
            return refused("data_file_raw=on can only be said when an image is created");
        }
        Ok(())
    }
}

/// Changes all that `options` say but a downgrade, which comes last: see [`super::downgrade`](fn@super::downgrade).
///
/// # Errors
///
/// `Invalid` as [`AmendOptions::validate`], before anything is written; `Unsupported` for a refcount that does
/// not fit the new width; what [`Editor::open`] refuses, and what the host fails with. Whatever it
/// is, the image is sound and has at worst leaks.
pub fn amend(storage: &dyn Storage, name: &str, options: &AmendOptions) -> Result<()> {
    let header = Header::read(storage)?;
    options.validate(&header).context(|| name)?;
    if options.version_of(&header) > header.version {
        upgrade(&mut Editor::open(storage, name)?)?;
    }
    if let Some(bits) = options.refcount_bits {
        rewidth::change(storage, name, bits)?;
    }
    let mut editor = Editor::open(storage, name)?;
    let before = editor.header().clone();
    let mut header = before.clone();
    match options.lazy_refcounts {
        Some(true) => header.compatible |= features::LAZY_REFCOUNTS,
        Some(false) => header.compatible &= !features::LAZY_REFCOUNTS,
        None => {}
    }
    if options.data_file_raw == Some(false) {
        header.autoclear &= !features::DATA_FILE_RAW;
    }
    if let Some(data_file) = &options.data_file {
        header
            .extensions
            .retain(|e| e.kind != extensions::DATA_FILE_NAME);
        if !data_file.is_empty() {
            header.extensions.push(Extension {
                kind: extensions::DATA_FILE_NAME,
                data: block::name::bytes(data_file).into_owned(),
            });
        }
    }
    if header != before {
        editor.set_header(header)?;
        editor.commit()?;
    }
    Ok(())
}

/// Makes a version 2 image one of version 3.
fn upgrade(editor: &mut Editor) -> Result<()> {
    let mut header = editor.header().clone();
    if header.nb_snapshots > 0 {
        let table = snapshot_table(editor, &header).context(|| editor.name().to_owned())?;
        let cluster = header.cluster_size();
        if let Some(new) = table.new {
            let at = editor.allocate((new.len() as u64).div_ceil(cluster))?;
            let mut bytes = new;
            bytes.resize(bytes.len().next_multiple_of(cluster as usize), 0);
            editor.write(at, &bytes)?;
            editor.free(header.snapshots_offset, table.old_len.div_ceil(cluster))?;
            header.snapshots_offset = at;
        }
    }
    header.version = 3;
    header.header_length = V3_LEN;
    header.unknown_fields = vec![0; V3_LEN as usize - 105];
    if header.extension(extensions::FEATURE_NAMES).is_none() {
        header.extensions.push(Extension {
            kind: extensions::FEATURE_NAMES,
            data: features::standard_table(),
        });
    }
    editor.set_header(header)?;
    editor.commit()
}

struct Table {
    /// With the extra data that version 3 demands; `None` where the old one has them.
    new: Option<Vec<u8>>,
    /// Bytes of the old one.
    old_len: u64,
}

/// Reads the snapshot table, which is at most 64 MiB, and makes its entries version 3's.
fn snapshot_table(editor: &Editor, header: &Header) -> Result<Table> {
    let (mut new, mut at, mut changed) = (Vec::new(), 0u64, false);
    for nth in 0..header.nb_snapshots {
        at = at.next_multiple_of(8);
        let broken = || {
            Error::corrupt(format!(
                "snapshot table: entry {nth} ends behind {SNAPSHOT_TABLE_BYTES_MAX} bytes: run diskplane check"
            ))
        };
        let offset = header.snapshots_offset.checked_add(at).ok_or_else(broken)?;
        let fixed = editor.read(offset, SNAPSHOT_BYTES)?;
        let snapshot = Snapshot::parse(&fixed).ok_or_else(broken)?;
        if at + snapshot.len() > SNAPSHOT_TABLE_BYTES_MAX {
            return Err(broken());
        }
        // The bound is above.
        let bytes = editor.read(offset, snapshot.len() as usize)?;
        changed |= snapshot.sound_extra_len() != snapshot.extra_len;
        snapshot.rewrite(&bytes, header.size, &mut new);
        at += snapshot.len();
    }
    Ok(Table {
        new: changed.then_some(new),
        old_len: at,
    })
}
