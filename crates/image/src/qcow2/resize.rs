//! Another size of the virtual disk: what of that is metadata of a closed image.
//!
//! *Growing* takes two steps. The L1 table is made large enough ([`grow_table`]); a disk of the old size
//! does not mind. Then, with the image opened as if it had the new size ([`super::OpenOptions::size`]), whatever
//! must be zeros or allocated there is made so, and at last the header gets the size ([`set_size`]): until then
//! nobody sees any of it.
//!
//! *Shrinking* is one commit: what lies behind the new end is not referred to any more. A second one drops refcount blocks
//! that count nothing any more.

use super::bitmap;
use super::check::{Layout, Target};
use super::edit::Editor;
use super::entry::{COPIED, OFFSET_MASK};
use super::header::{Header, L1_BYTES_MAX};
use super::open::words_of;
use block::{Context, Error, Result, limits, size};

/// Refuses to resize what QEMU does not resize either.
///
/// # Errors
///
/// `Invalid` for a size that is not possible, `Unsupported` for an image that cannot have another one.
pub fn check(header: &Header, new: u64) -> Result<()> {
    if !new.is_multiple_of(512) || new > limits::DISK_BYTES_MAX {
        return Err(Error::invalid(format!(
            "a size of {new} bytes: it must be a multiple of 512 up to {}",
            limits::DISK_BYTES_MAX
        )));
    }
    let most = (L1_BYTES_MAX / 8).saturating_mul(header.l1_entry_bytes());
    if new > most {
        return Err(Error::invalid(format!(
            "a disk of {} is too large for clusters of {}: the most is {}",
            size::human(new),
            size::human(header.cluster_size()),
            size::human(most)
        )));
    }
    if header.nb_snapshots > 0 && header.version < 3 {
        return Err(Error::unsupported(
            "a version 2 image with snapshots cannot be resized: amend -o compat=1.1 first",
        ));
    }
    Ok(())
}

/// Gives the image an L1 table that is large enough for a disk of `new` bytes.
///
/// # Errors
///
/// As [`check`], and what the host fails with; the image is as it was then.
pub fn grow_table(editor: &mut Editor, new: u64) -> Result<()> {
    let mut header = editor.header().clone();
    check(&header, new).context(|| editor.name().to_owned())?;
    let old_size = std::mem::replace(&mut header.size, new);
    let needed = header.l1_entries_needed();
    header.size = old_size;
    if u64::from(header.l1_size) >= needed {
        return Ok(());
    }
    let cluster = header.cluster_size();
    let old_len = u64::from(header.l1_size) * 8;
    let l1 = editor.read_l1(header.l1_table_offset, header.l1_size)?;
    let mut bytes: Vec<u8> = l1.iter().flat_map(|raw| raw.to_be_bytes()).collect();
    // At most 32 MiB, as `check` found.
    bytes.resize((needed * 8).next_multiple_of(cluster) as usize, 0);
    let at = editor.allocate(bytes.len() as u64 / cluster)?;
    editor.write(at, &bytes)?;
    if header.l1_size > 0 {
        editor.free(header.l1_table_offset, old_len.div_ceil(cluster))?;
    }
    header.l1_table_offset = at;
    header.l1_size = entries(needed)?;
    editor.set_header(header)?;
    editor.commit()
}

/// Writes the size into the header.
///
/// # Errors
///
/// As [`grow_table`].
pub fn set_size(editor: &mut Editor, new: u64) -> Result<()> {
    let mut header = editor.header().clone();
    bitmap::resize(editor, &mut header, new)?;
    header.size = new;
    editor.set_header(header)?;
    editor.commit()
}

/// Cuts the disk at `new` bytes, giving back the clusters behind. The part of the last cluster behind the
/// end stays as it is.
///
/// # Errors
///
/// As [`grow_table`]; `Corrupt` for tables that cannot be followed.
pub fn shrink(editor: &mut Editor, new: u64) -> Result<()> {
    let mut header = editor.header().clone();
    check(&header, new).context(|| editor.name().to_owned())?;
    let (cluster, old_len) = (header.cluster_size(), u64::from(header.l1_size) * 8);
    let old_l1 = editor.read_l1(header.l1_table_offset, header.l1_size)?;
    header.size = new;
    let needed = header.l1_entries_needed();
    let layout = editor.layout();
    let table_entries = cluster / 8 / layout.entry_words() as u64;
    let first = new.div_ceil(cluster);
    let mut l1 = old_l1.clone();
    for (index, raw) in (0u64..).zip(&mut l1).skip((first / table_entries) as usize) {
        let at = *raw & OFFSET_MASK;
        if at == 0 {
            continue;
        }
        if layout.within(at) != 0 {
            return Err(Error::corrupt(format!(
                "{}: L1 entry {index} is {raw:#x}, no cluster: run diskplane check",
                editor.name()
            )));
        }
        let from = first.saturating_sub(index * table_entries);
        let kept = cut_table(editor, layout, at, from)?;
        if let Some(kept) = kept {
            *raw = kept;
        }
    }
    let cut = l1.len() as u64 > needed;
    l1.truncate(needed as usize);
    let mut bytes: Vec<u8> = l1.iter().flat_map(|raw| raw.to_be_bytes()).collect();
    if cut || l1 != old_l1 {
        if !bytes.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(cluster as usize), 0);
            let at = editor.allocate(bytes.len() as u64 / cluster)?;
            editor.write(at, &bytes)?;
            editor.free(header.l1_table_offset, old_len.div_ceil(cluster))?;
            header.l1_table_offset = at;
        } else if header.l1_size > 0 {
            editor.free(header.l1_table_offset, old_len.div_ceil(cluster))?;
            header.l1_table_offset = 0;
        }
        header.l1_size = entries(needed)?;
    }
    bitmap::resize(editor, &mut header, new)?;
    editor.set_header(header)?;
    editor.commit()?;
    // Apart from that: only now it is known which are left with nothing.
    match editor.drop_idle_blocks()? {
        true => editor.commit(),
        false => Ok(()),
    }
}

/// Gives up what the L2 table at `at` refers to from entry `from` on. Returns its L1 entry, or `None` where
/// it stays as it is.
fn cut_table(editor: &mut Editor, layout: Layout, at: u64, from: u64) -> Result<Option<u64>> {
    let words = layout.entry_words();
    let mut table = words_of(&editor.read(at, layout.cluster() as usize)?);
    let start = usize::try_from(from)
        .unwrap_or(usize::MAX)
        .saturating_mul(words);
    let mut changed = false;
    for entry in table.get_mut(start..).unwrap_or_default().chunks_mut(words) {
        let (raw, bitmap) = match *entry {
            [raw] => (raw, 0),
            [raw, bitmap] => (raw, bitmap),
            _ => continue,
        };
        changed |= raw != 0 || bitmap != 0;
        let parsed = layout.l2_entry(raw, bitmap);
        if !parsed.faults.none() {
            return Err(Error::corrupt(format!(
                "{}: L2 table at {at:#x}: an entry is {raw:#x}: run diskplane check",
                editor.name()
            )));
        }
        match parsed.target {
            // Data in another file are not counted in this one.
            _ if layout.data_file => {}
            Target::Nothing | Target::Refused => {}
            Target::Cluster { offset, .. } => editor.free(offset, 1)?,
            Target::Compressed { offset, len } => {
                let bits = layout.cluster_bits;
                let (first, last) = (offset >> bits, (offset + len - 1) >> bits);
                editor.free(first << bits, last - first + 1)?;
            }
        }
        entry.fill(0);
    }
    if from == 0 {
        editor.free(at, 1)?;
        return Ok(Some(0));
    }
    if !changed {
        return Ok(None);
    }
    let new = editor.allocate(1)?;
    let bytes: Vec<u8> = table.iter().flat_map(|raw| raw.to_be_bytes()).collect();
    editor.write(new, &bytes)?;
    editor.free(at, 1)?;
    Ok(Some(new | COPIED))
}

fn entries(count: u64) -> Result<u32> {
    u32::try_from(count).map_err(|_| Error::invalid(format!("an L1 table of {count} entries")))
}
