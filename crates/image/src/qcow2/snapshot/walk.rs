//! What the operations on snapshots share: L1 and L2 tables, and the refcounts of what they refer to.

use crate::qcow2::check::Target;
use crate::qcow2::edit::Editor;
use crate::qcow2::entry::COPIED;
use crate::qcow2::open::words_of;
use block::{Error, Result};

/// Reads the L1 table at `offset`, as [`Editor::read_l1`].
pub(in crate::qcow2) fn read_l1(editor: &Editor, offset: u64, entries: u32) -> Result<Vec<u64>> {
    let l1 = editor.read_l1(offset, entries)?;
    // No two entries have the same table: a file made for the purpose could keep us busy for days.
    let tables = l1.iter().filter(|raw| **raw != 0).count() as u64;
    let clusters = editor.storage().len()? >> editor.layout().cluster_bits;
    if tables > clusters {
        return Err(Error::corrupt(format!(
            "L1 table at {offset:#x}: refers to {tables} L2 tables, but the file has {clusters} \
             clusters: run diskplane check"
        )));
    }
    Ok(l1)
}

/// The L2 table that an L1 entry refers to.
pub(in crate::qcow2) fn table_of(editor: &Editor, index: usize, raw: u64) -> Result<Option<u64>> {
    let Some(entry) = editor.layout().l1_entry(raw) else {
        return Ok(None);
    };
    if let Some(fault) = entry.faults.iter().next() {
        return Err(Error::corrupt(format!(
            "L1 entry {index} is {raw:#x}: {}: run diskplane check",
            fault.text()
        )));
    }
    Ok(Some(entry.table).filter(|table| *table != 0))
}

/// Reads the L2 table at `offset`.
pub(in crate::qcow2) fn read_l2(editor: &Editor, offset: u64) -> Result<Vec<u64>> {
    // At most 2 MiB.
    let len = editor.layout().cluster() as usize;
    if offset
        .checked_add(len as u64)
        .is_none_or(|end| end > i64::MAX as u64)
        || offset >= editor.storage().len()?
    {
        return Err(Error::corrupt(format!(
            "L2 table at {offset:#x} lies behind the end of the file: run diskplane check"
        )));
    }
    Ok(words_of(&editor.read(offset, len)?))
}

/// The clusters that an L2 entry refers to: first cluster's offset, how many, and whether it is compressed.
fn reference(
    editor: &Editor,
    table: u64,
    index: usize,
    entry: &[u64],
) -> Result<Option<(u64, u64, bool)>> {
    let layout = editor.layout();
    let raw = entry.first().copied().unwrap_or(0);
    let bitmap = entry.get(1).copied().unwrap_or(0);
    let judged = layout.l2_entry(raw, bitmap);
    if let Some(fault) = judged.faults.iter().next() {
        return Err(Error::corrupt(format!(
            "L2 table at {table:#x}: entry {index} {}: run diskplane check",
            fault.text()
        )));
    }
    let mask = layout.cluster() - 1;
    Ok(match judged.target {
        Target::Nothing | Target::Refused => None,
        Target::Cluster { offset, .. } => Some((offset, 1, false)),
        Target::Compressed { offset, len } => {
            let first = offset & !mask;
            let end = (offset + len + mask) & !mask;
            Some((first, (end - first) >> layout.cluster_bits, true))
        }
    })
}

/// Changes the refcounts of all that the L2 table `l2`, read from `table`, refers to.
pub(in crate::qcow2) fn count(
    editor: &mut Editor,
    table: u64,
    l2: &[u64],
    delta: i64,
) -> Result<()> {
    let layout = editor.layout();
    // Neighbours together.
    let mut run = (0, 0);
    for (index, entry) in l2.chunks(layout.entry_words()).enumerate() {
        let Some((first, clusters, _)) = reference(editor, table, index, entry)? else {
            continue;
        };
        if run.1 > 0 && run.0 + (run.1 << layout.cluster_bits) == first {
            run.1 += clusters;
            continue;
        }
        if run.1 > 0 {
            editor.adjust(run.0, run.1, delta)?;
        }
        run = (first, clusters);
    }
    match run.1 {
        0 => Ok(()),
        clusters => editor.adjust(run.0, clusters, delta),
    }
}

/// Takes the COPIED flags off; says whether there were any.
pub(in crate::qcow2) fn share(editor: &Editor, l2: &mut [u64]) -> bool {
    let mut changed = false;
    for entry in l2.chunks_mut(editor.layout().entry_words()) {
        if let Some(raw) = entry.first_mut()
            && *raw & COPIED != 0
        {
            *raw &= !COPIED;
            changed = true;
        }
    }
    changed
}

/// Makes the COPIED flags what the refcounts say; says whether that changed any.
fn flag(editor: &mut Editor, table: u64, l2: &mut [u64]) -> Result<bool> {
    let layout = editor.layout();
    let exclusive = editor.refcount(table)? == 1;
    let mut changed = false;
    for (index, entry) in l2.chunks_mut(layout.entry_words()).enumerate() {
        let copied = match reference(editor, table, index, entry)? {
            Some((at, _, false)) => exclusive && editor.refcount(at)? == 1,
            _ => false,
        };
        if let Some(raw) = entry.first_mut() {
            let new = layout.with_copied(*raw, copied);
            changed |= new != *raw;
            *raw = new;
        }
    }
    Ok(changed)
}

/// Makes all COPIED flags of the active tables what the refcounts say. Tables in which that changes
/// something get a new place, and `l1` is changed accordingly.
pub(in crate::qcow2) fn flag_all(editor: &mut Editor, l1: &mut [u64]) -> Result<()> {
    let layout = editor.layout();
    for (index, raw) in l1.iter_mut().enumerate() {
        let Some(table) = table_of(editor, index, *raw)? else {
            continue;
        };
        let mut l2 = read_l2(editor, table)?;
        *raw = match flag(editor, table, &mut l2)? {
            true => {
                editor.free(table, 1)?;
                write_table(editor, &l2)? | COPIED
            }
            false => layout.with_copied(table, editor.refcount(table)? == 1),
        };
    }
    Ok(())
}

/// Writes a table of 64-bit entries to new clusters; returns where. 0 for an empty one.
pub(in crate::qcow2) fn write_table(editor: &mut Editor, table: &[u64]) -> Result<u64> {
    let bytes: Vec<u8> = table.iter().flat_map(|word| word.to_be_bytes()).collect();
    write_bytes(editor, bytes)
}

/// Writes `bytes` to new clusters, the last filled with zeros; returns where. 0 for none.
pub(in crate::qcow2) fn write_bytes(editor: &mut Editor, mut bytes: Vec<u8>) -> Result<u64> {
    if bytes.is_empty() {
        return Ok(0);
    }
    // L1 tables have 32 MiB at most, snapshot tables 64.
    let cluster = editor.layout().cluster() as usize;
    bytes.resize(bytes.len().next_multiple_of(cluster), 0);
    let at = editor.allocate((bytes.len() / cluster) as u64)?;
    editor.write(at, &bytes)?;
    Ok(at)
}

/// Frees a table of `bytes` bytes at `offset`.
pub(in crate::qcow2) fn free_table(editor: &mut Editor, offset: u64, bytes: u64) -> Result<()> {
    let clusters = bytes.div_ceil(editor.layout().cluster());
    match clusters {
        0 => Ok(()),
        clusters => editor.free(offset, clusters),
    }
}
