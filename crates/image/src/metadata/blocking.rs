//! Flush runs: how they are put together, and carried out with blocking I/O.

use crate::{FileId, FlushRun, MetaWrite};
use block::{Context, Error, HostOffset, Result, Storage};

/// Describes the bytes from `start` on as a write to `host` of `file`.
pub(crate) fn extend(run: &mut FlushRun, file: FileId, host: u64, start: usize) {
    let len = run.bytes.len() - start;
    let stage = run.stages.last().map_or(0, |s| s.end);
    if let Some(last) = run.writes.get_mut(stage..).and_then(|w| w.last_mut())
        && last.file == file
        && last.offset.0 + last.len as u64 == host
        && last.start + last.len == start
    {
        last.len += len;
        return;
    }
    run.writes.push(MetaWrite {
        file,
        offset: HostOffset(host),
        start,
        len,
    });
}

/// Whether writes were pushed since the last stage was sealed.
pub(crate) fn open_stage(run: &FlushRun) -> bool {
    run.writes.len() > run.stages.last().map_or(0, |s| s.end)
}

/// Carries a flush out with blocking I/O. `files` by [`FileId`].
pub(crate) fn carry_out(files: &[&dyn Storage], run: &FlushRun) -> Result<()> {
    for stage in &run.stages {
        for write in run.writes.get(stage.first..stage.end).unwrap_or_default() {
            let bytes = run.bytes.get(write.start..write.start + write.len);
            let file = files.get(usize::from(write.file.0));
            file.ok_or_else(|| Error::invalid("an image was closed without all of its files"))?
                .write_at(write.offset.0, bytes.unwrap_or_default())
                .context(|| format!("write metadata at {}", write.offset))?;
        }
        for file in files {
            file.sync()?;
        }
    }
    Ok(())
}

/// Reads `len` bytes at `offset`; what lies behind the end of the file is zeros.
pub(crate) fn read_short(storage: &dyn Storage, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let there = storage.len()?.saturating_sub(offset);
    let there = usize::try_from(there).unwrap_or(len).min(len);
    if let Some(part) = bytes.get_mut(..there).filter(|p| !p.is_empty()) {
        storage.read_at(offset, part)?;
    }
    Ok(bytes)
}
