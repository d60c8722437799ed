//! Bitmap tables, and the data that they refer to: reading them, and writing new ones.

use super::bits::{Bits, Content, bytes_needed};
use super::directory::Entry;
use crate::qcow2::check::{Layout, bitmap_data};
use crate::qcow2::close::read_short;
use crate::qcow2::edit::Editor;
use block::{Context, Error, Result, Storage};

/// A table entry: the cluster reads as ones.
const ONES: u64 = 1;

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

/// Reads the bits of `entry`. Memory: those bits, at most 512 MiB, and the table.
pub(super) fn load(
    storage: &dyn Storage,
    layout: &Layout,
    size: u64,
    entry: &Entry,
) -> Result<Bits> {
    entry.check_usable()?;
    load_bits(storage, layout, size, entry).context(|| format!("bitmap '{}'", entry.name()))
}

fn load_bits(storage: &dyn Storage, layout: &Layout, size: u64, entry: &Entry) -> Result<Bits> {
    let needed = entries_needed(layout, size, entry.granularity_bits);
    if needed != u64::from(entry.entries) {
        return Err(Error::corrupt(format!(
            "its table has {} entries, the disk's size needs {needed}",
            entry.entries
        )));
    }
    let bits = Bits::new(size, u32::from(entry.granularity_bits))?;
    for (index, raw) in (0..).zip(read_table(storage, layout, entry)?) {
        match bitmap_data(layout, raw) {
            None => {
                return Err(Error::corrupt(format!(
                    "its table entry {index} at {:#x} is {raw:#x}",
                    entry.table + index * 8
                )));
            }
            Some(0) if raw & ONES != 0 => bits.fill(index, layout.cluster()),
            Some(0) => {}
            Some(data) => {
                let bytes = read_short(storage, data, layout.cluster() as usize)
                    .context(|| format!("its data at {data:#x}"))?;
                bits.take_in(index, &bytes);
            }
        }
    }
    Ok(bits)
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

/// Writes `bits` as the bitmap's, into clusters that are free now, where they differ from what is on disk;
/// `entry` says afterwards where they are. An entry whose table is 0 has none yet. Without `bits` none is set.
pub(super) fn store(editor: &mut Editor<'_>, entry: &mut Entry, bits: Option<&Bits>) -> Result<()> {
    let layout = editor.layout();
    let size = bits.map_or(editor.header().size, Bits::size);
    let needed = entries_needed(&layout, size, entry.granularity_bits);
    let mut old = match entry.table {
        0 => Vec::new(),
        _ => read_table(editor.storage(), &layout, entry)?,
    };
    let anew = old.len() as u64 != needed;
    if anew {
        if entry.table != 0 {
            free(editor, entry)?;
        }
        old = vec![0; needed as usize];
    }
    let mut table = old.clone();
    let mut cluster = vec![0; layout.cluster() as usize];
    for (index, raw) in (0..).zip(&mut table) {
        let before = bitmap_data(&layout, *raw).unwrap_or(0);
        let content = bits.map_or(Content::Zeros, |bits| bits.put_out(index, &mut cluster));
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
