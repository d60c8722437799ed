//! Another backing file, or nothing above it: what commit and rebase change of a closed image.
//!
//! Each is one edit ([`super::edit`]): a crash leaves the image as it was or as it shall be. Both change nothing of
//! what the guest reads only if the caller has seen to that before: that the new backing file reads the same where
//! the image has nothing, or that the backing file has everything that the image has.

use super::edit::Editor;
use super::extensions::{self, Extension};
use super::features;
use super::snapshot::walk::{count, free_table, read_l1, read_l2, table_of, write_table};
use block::{Context, Error, Result, Storage, limits};

/// Makes `backing`, a name and the format that is recorded beside it, the backing file of the image in `storage`,
/// which nobody else may use; `None`: it gets none.
///
/// # Errors
///
/// `Invalid` for a name that is empty, too long or has a zero byte, for names that do not fit the header, and for an
/// image whose data file is raw too; as [`Editor::open`] and [`Editor::commit`].
pub fn set_backing(storage: &dyn Storage, backing: Option<(&str, &str)>) -> Result<()> {
    let name = storage.name();
    let mut editor = Editor::open(storage, &name)?;
    let mut header = editor.header().clone();
    header
        .extensions
        .retain(|extension| extension.kind != extensions::BACKING_FORMAT);
    header.backing = None;
    if let Some((file, format)) = backing {
        let refused = |text: String| Err(Error::invalid(text).within(&name));
        if !block::name::fits(file, limits::FILE_NAME_BYTES_MAX) {
            return refused(format!(
                "a backing file's name of {} bytes: it has 1 to {}, none of them 0",
                block::name::len(file),
                limits::FILE_NAME_BYTES_MAX
            ));
        }
        if header.autoclear & features::DATA_FILE_RAW != 0 {
            return refused(
                "its data file is raw too (data_file_raw): it cannot have a backing file".into(),
            );
        }
        header.backing = Some(file.to_owned());
        header.extensions.push(Extension {
            kind: extensions::BACKING_FORMAT,
            data: format.as_bytes().to_vec(),
        });
    }
    editor.set_header(header)?;
    editor.commit()
}

/// Takes everything out of the active disk of the image in `storage`, which nobody else may use: it reads as its
/// backing file then. Snapshots stay, and so do bitmaps and keys. Data in an external file are only forgotten.
///
/// # Errors
///
/// `Corrupt` for tables that cannot be followed; as [`Editor::open`] and [`Editor::commit`].
pub fn empty(storage: &dyn Storage) -> Result<()> {
    let name = storage.name();
    let mut editor = Editor::open(storage, &name)?;
    forget(&mut editor).context(|| &name)?;
    editor.commit()?;
    // What that edit wrote lies behind all that it freed. A second one brings it to the front, and the file can be
    // cut.
    let mut editor = Editor::open(storage, &name)?;
    replace_l1(&mut editor).context(|| &name)?;
    editor.commit()
}

/// Gives up all that the active L1 table leads to.
fn forget(editor: &mut Editor<'_>) -> Result<()> {
    let header = editor.header().clone();
    let l1 = read_l1(editor, header.l1_table_offset, header.l1_size)?;
    for (index, raw) in l1.iter().enumerate() {
        let Some(table) = table_of(editor, index, *raw)? else {
            continue;
        };
        if !editor.layout().data_file {
            let l2 = read_l2(editor, table)?;
            count(editor, table, &l2, -1)?;
        }
        editor.free(table, 1)?;
    }
    replace_l1(editor)
}

/// Puts an L1 table without entries in place of the active one.
fn replace_l1(editor: &mut Editor<'_>) -> Result<()> {
    let mut header = editor.header().clone();
    let entries = header.l1_size;
    free_table(editor, header.l1_table_offset, u64::from(entries) * 8)?;
    // At most 32 MiB, as the header's parser found.
    header.l1_table_offset = write_table(editor, &vec![0; entries as usize])?;
    editor.set_header(header)
}
