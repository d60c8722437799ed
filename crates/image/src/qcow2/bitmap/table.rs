//! Bitmap tables, and the data that they refer to: reading them, and writing new ones.

use super::bits::{Bits, Content, PIECE, bytes_needed};
use super::directory::Entry;
use super::stored::Source;
use crate::qcow2::check::{Layout, bitmap_data};
use crate::qcow2::edit::Editor;
use block::{Context, Error, Result, Storage};

/// A table entry: the cluster reads as ones.
pub(super) const ONES: u64 = 1;

/// Entries of the table of a bitmap on a disk of `size` bytes.
pub(super) fn entries_needed(layout: &Layout, size: u64, granularity_bits: u8) -> u64 {
    bytes_needed(size, u32::from(granularity_bits)).div_ceil(layout.cluster())
}

/// The table of `entry`, as it is on disk. Memory: 8 MiB.
pub(super) fn read_table(
    storage: &dyn Storage,
    layout: &Layout,
    entry: &Entry,
) -> Result<Vec<u64>> {
    let len = u64::from(entry.entries) * 8;
    let end = entry.table.checked_add(len);
    if end.is_none_or(|end| end > storage.len().unwrap_or(0)) {
        return Err(Error::corrupt(format!(
            "its table at {:#x} of {} entries ends behind the file's end",
            entry.table, entry.entries
        )));
    }
    // So many clusters of data are 512 MiB at most: the table has 8 MiB.
    debug_assert!(len << layout.cluster_bits <= 8 << 29);
    let mut bytes = vec![0; len as usize];
    storage
        .read_at(entry.table, &mut bytes)
        .context(|| format!("its table at {:#x}", entry.table))?;
    Ok(crate::qcow2::open::words_of(&bytes))
}

/// Gives the clusters of `entry` back. What a damaged image does not count is left alone: a bitmap can
/// always be removed.
pub(super) fn free(editor: &mut Editor<'_>, entry: &Entry) -> Result<()> {
    let layout = editor.layout();
    let clusters = (u64::from(entry.entries) * 8).div_ceil(layout.cluster());
    let table = read_table(editor.storage(), &layout, entry).unwrap_or_default();
    for raw in table {
        free_data(editor, bitmap_data(&layout, raw).unwrap_or(0))?;
    }
    for nth in 0..clusters {
        free_data(editor, entry.table + (nth << layout.cluster_bits))?;
    }
    Ok(())
}

fn free_data(editor: &mut Editor<'_>, at: u64) -> Result<()> {
    match at != 0 && editor.refcount(at)? > 0 {
        true => editor.free(at, 1),
        false => Ok(()),
    }
}

/// Writes what `sources` have set as the bitmap's bits, for a disk of `size` bytes, into clusters that are free now, where
/// they differ from what is on disk; `entry` says afterwards where they are. An entry whose table is 0 has none yet. Memory: a
/// piece of the bits, and two tables.
pub(super) fn store(
    editor: &mut Editor<'_>,
    entry: &mut Entry,
    size: u64,
    sources: &mut [&mut dyn Source],
) -> Result<()> {
    let layout = editor.layout();
    let needed = entries_needed(&layout, size, entry.granularity_bits);
    let mut old = match entry.table {
        0 => Vec::new(),
        _ => read_table(editor.storage(), &layout, entry)?,
    };
    let anew = old.len() as u64 != needed;
    if anew {
        // What is there stays readable until the edit is in force.
        if entry.table != 0 {
            free(editor, entry)?;
        }
        old = vec![0; needed as usize];
    }
    let mut table = old.clone();
    let mut cluster = vec![0; layout.cluster() as usize];
    let of_piece = (PIECE / 8) >> layout.cluster_bits;
    for (nth, entries) in (0..).zip(table.chunks_mut(of_piece as usize)) {
        let piece = Bits::piece(nth, size, u32::from(entry.granularity_bits));
        for source in &mut *sources {
            source.mark_in(&piece)?;
        }
        for (index, raw) in (0..).zip(entries) {
            let before = bitmap_data(&layout, *raw).unwrap_or(0);
            let content = piece.put_out(index, &mut cluster);
            let same = match content {
                Content::Zeros => *raw == 0,
                Content::Ones if *raw == ONES => true,
                _ => before != 0 && editor.read(before, cluster.len())? == cluster,
            };
            if same {
                continue;
            }
            *raw = match content {
                Content::Zeros => 0,
                Content::Ones => ONES,
                Content::Mixed => {
                    let at = editor.allocate(1)?;
                    editor.write(at, &cluster)?;
                    at
                }
            };
            free_data(editor, before)?;
        }
    }
    if !anew && table == old {
        return Ok(());
    }
    let clusters = (needed * 8).div_ceil(layout.cluster());
    let at = editor.allocate(clusters)?;
    let mut bytes: Vec<u8> = table.iter().flat_map(|raw| raw.to_be_bytes()).collect();
    bytes.resize((clusters << layout.cluster_bits) as usize, 0);
    editor.write(at, &bytes)?;
    if !anew {
        for nth in 0..clusters {
            free_data(editor, entry.table + (nth << layout.cluster_bits))?;
        }
    }
    entry.table = at;
    entry.entries =
        u32::try_from(needed).map_err(|_| Error::invalid("a bitmap table of 2^32 entries"))?;
    Ok(())
}
