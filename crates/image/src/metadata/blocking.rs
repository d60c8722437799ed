//! Flush runs: how they are put together, and carried out with blocking I/O.

use crate::{FileId, FlushRun, MetaWrite};
use block::{Context, HostOffset, Result, Storage};

/// Describes the bytes from `start` on as a write to `host`.
pub(crate) fn extend(run: &mut FlushRun, host: u64, start: usize) {
    let len = run.bytes.len() - start;
    let stage = run.stages.last().map_or(0, |s| s.end);
    if let Some(last) = run.writes.get_mut(stage..).and_then(|w| w.last_mut())
        && last.offset.0 + last.len as u64 == host
        && last.start + last.len == start
    {
        last.len += len;
        return;
    }
    run.writes.push(MetaWrite {
        file: FileId::IMAGE,
        offset: HostOffset(host),
        start,
        len,
    });
}

/// Whether writes were pushed since the last stage was sealed.
pub(crate) fn open_stage(run: &FlushRun) -> bool {
    run.writes.len() > run.stages.last().map_or(0, |s| s.end)
}

/// Carries a flush out with blocking I/O.
pub(crate) fn carry_out(storage: &dyn Storage, run: &FlushRun) -> Result<()> {
    for stage in &run.stages {
        for write in run.writes.get(stage.first..stage.end).unwrap_or_default() {
            let bytes = run.bytes.get(write.start..write.start + write.len);
            storage
                .write_at(write.offset.0, bytes.unwrap_or_default())
                .context(|| format!("write metadata at {}", write.offset))?;
        }
        storage.sync()?;
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
