//! [`block::Storage`] on a [`File`].

use super::{File, GateHeld};
use block::faults::Event;
use block::{Context, Error, Range, Result, Storage, Zeroed};
use std::os::fd::{AsFd, BorrowedFd};

impl File {
    fn at(&self, what: &str, offset: u64, len: u64) -> String {
        format!(
            "{}: {what} {len} bytes at byte {offset}",
            self.path().display()
        )
    }
}

impl Storage for File {
    fn name(&self) -> String {
        self.path().display().to_string()
    }

    fn len(&self) -> Result<u64> {
        File::len(self)
    }

    fn is_fixed(&self) -> bool {
        File::is_fixed(self)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let len = buf.len() as u64;
        let got = self
            .read_up_to(offset, buf)
            .context(|| self.at("reading", offset, len))?;
        if got < buf.len() {
            return Err(Error::corrupt(format!(
                "{}: the file ends at byte {}",
                self.at("reading", offset, len),
                offset + got as u64
            )));
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let _turn = self.turn(buf.len());
        self.write_all(offset, buf, GateHeld::No)
            .context(|| self.at("writing", offset, buf.len() as u64))
    }

    fn sync(&self) -> Result<()> {
        self.sync_data()
            .context(|| format!("{}: syncing", self.path().display()))
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.resize(len)
            .context(|| format!("{}: resizing to {len} bytes", self.path().display()))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<Zeroed> {
        let _turn = self.turn(usize::try_from(len).unwrap_or(usize::MAX));
        let zeroed = self
            .allocate_range(offset, len, GateHeld::No)
            .context(|| self.at("allocating", offset, len))?;
        Ok(if zeroed { Zeroed::Yes } else { Zeroed::No })
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let end = self.len()?;
        let len = len.min(end.saturating_sub(offset));
        self.zero_range(offset, len, unmap, false, false, GateHeld::No)
            .context(|| self.at("zeroing", offset, len))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.discard_range(offset, len, GateHeld::No)
            .context(|| self.at("discarding", offset, len))
    }

    fn range_at(&self, offset: u64) -> Result<Option<Range>> {
        let len = self.len()?;
        if offset >= len {
            return Ok(None);
        }
        let (end, kind) = self
            .sparse_run(offset, len)
            .context(|| self.at("mapping", offset, len - offset))?;
        Ok(Some(Range {
            offset,
            len: end - offset,
            kind,
        }))
    }

    fn event(&self, event: Event) {
        if let Some(faults) = &self.faults {
            faults.event(event);
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        (self.sim.is_none() && !self.needs_threads()).then(|| self.as_fd())
    }
}
