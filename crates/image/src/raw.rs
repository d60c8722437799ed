//! Raw: the file's bytes are the disk's bytes.
//!
//! ```text
//!   guest offset  0 ─────────────────────────────── size
//!   file offset   0 ───────────── end of the file ┆ reads as zeros, grows when written
//! ```
//!
//! There is no metadata, so nothing is ever missing, nothing waits to be
//! committed and a flush is one barrier.

use crate::contract::{
    Description, Extent, ExtentKind, FileId, FlushRun, Freed, Image, Load, Plan, Reserve, Stage,
    Step, Ticket, ZeroMode, ZeroPlan,
};
use block::{Error, ErrorKind, GuestOffset, HostOffset, Result, Storage, Zeroed, align_up, limits};

/// Unit in which guests address a disk; a file of another length reads as zeros up to the next.
const SECTOR: u64 = 512;

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    size: u64,
    /// Where in the file the disk begins.
    begin: u64,
}

impl Raw {
    /// A disk as large as `file`, rounded up to whole sectors of 512 bytes as QEMU does.
    /// Fails when the file's length cannot be asked or is no size of a disk.
    pub fn open(file: &dyn Storage) -> Result<Self> {
        Self::with_size(file.len()?).map_err(|e| e.within(file.name()))
    }

    /// A disk of `bytes`, rounded up to whole sectors.
    pub fn with_size(bytes: u64) -> Result<Self> {
        if bytes > limits::DISK_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a disk of {bytes} bytes is too large, the most is {}",
                limits::DISK_BYTES_MAX
            )));
        }
        Ok(Self {
            size: align_up(bytes, SECTOR),
            begin: 0,
        })
    }

    /// A disk in a part of `file`: from byte `begin` on, of `bytes` bytes, or up to the file's end.
    ///
    /// # Errors
    ///
    /// `Invalid` for a part that the file has not, or that does not consist of sectors.
    pub fn part(file: &dyn Storage, begin: u64, bytes: Option<u64>) -> Result<Self> {
        let len = file.len()?;
        let wrong = |message: String| Err(Error::invalid(message).within(file.name()));
        if !begin.is_multiple_of(SECTOR) || bytes.is_some_and(|b| !b.is_multiple_of(SECTOR)) {
            return wrong(format!(
                "offset and size of a part of a raw image must be multiples of {SECTOR} bytes"
            ));
        }
        let Some(rest) = align_up(len, SECTOR).checked_sub(begin) else {
            return wrong(format!(
                "offset ({begin}) must be below the file's size ({len})"
            ));
        };
        let bytes = bytes.unwrap_or(rest);
        if bytes > rest {
            return wrong(format!(
                "offset ({begin}) and size ({bytes}) together go beyond the file's size ({len})"
            ));
        }
        Ok(Self {
            begin,
            ..Self::with_size(bytes)?
        })
    }
}

/// The first stage of a format without metadata: a barrier behind the guest's data.
pub(crate) fn barrier_only(run: &mut FlushRun) {
    run.clear();
    run.stages.push(Stage { first: 0, end: 0 });
}

/// The refusal of formats that have no compressed clusters.
pub(crate) fn not_compressed(format: &str) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("{format} images have no compressed clusters"),
    )
}

impl Image for Raw {
    fn describe(&self) -> Description {
        Description {
            format: "raw",
            size: self.size,
            cluster_size: 1,
            backing: None,
            backing_format: None,
            data_file: None,
            read_only_because: None,
            facts: match self.begin {
                0 => Vec::new(),
                begin => vec![("offset", format!("{begin} bytes into the file"))],
            },
        }
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<Extent>> {
        Ok(Step::Done(Extent {
            len,
            kind: ExtentKind::Data {
                file: FileId::IMAGE,
                offset: HostOffset(self.begin + at.0),
            },
        }))
    }

    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        Ok(Step::Done(Plan::InPlace {
            file: FileId::IMAGE,
            offset: HostOffset(self.begin + at.0),
            len,
        }))
    }

    fn commit(&self, _: Ticket) {}

    fn abort(&self, _: Ticket) {}

    fn plan_zero(&self, at: GuestOffset, len: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        Ok(Step::Done(ZeroPlan::Host {
            file: FileId::IMAGE,
            offset: HostOffset(self.begin + at.0),
            len,
        }))
    }

    fn loaded(&self, _: &Load, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn load_failed(&self, _: &Load) {}

    fn reserved(&self, _: &Reserve, _: Zeroed) {}

    fn reserve_failed(&self, _: &Reserve) {}

    fn decompress(&self, _: &[u8], _: &mut [u8]) -> Result<()> {
        Err(not_compressed("raw"))
    }

    fn flush_begin(&self, run: &mut FlushRun) -> Result<()> {
        barrier_only(run);
        Ok(())
    }

    fn flush_end(&self, _: &mut FlushRun, _: bool) {}

    fn is_dirty(&self) -> bool {
        false
    }

    fn take_freed(&self, _: &mut Vec<Freed>) {}

    fn release(&self, _: &Freed, _: Zeroed) {}

    fn close(&self, _: &[&dyn Storage]) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_sectors() {
        for (bytes, size) in [(0, 0), (1, 512), (512, 512), (1000, 1024)] {
            assert_eq!(Raw::with_size(bytes).unwrap().size(), size);
        }
        let max = limits::DISK_BYTES_MAX;
        assert_eq!(Raw::with_size(max).unwrap().size(), max);
        let error = Raw::with_size(max + 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }

    #[test]
    fn every_byte_is_where_the_guest_says() {
        let raw = Raw::with_size(1 << 20).unwrap();
        let offset = HostOffset(4097);
        let file = FileId::IMAGE;
        assert_eq!(
            raw.map(GuestOffset(4097), 77).unwrap(),
            Step::Done(Extent {
                len: 77,
                kind: ExtentKind::Data { file, offset }
            })
        );
        assert_eq!(
            raw.plan_write(GuestOffset(4097), 77).unwrap(),
            Step::Done(Plan::InPlace {
                file,
                offset,
                len: 77
            })
        );
        for mode in [ZeroMode::Discard, ZeroMode::Zero { unmap: true }] {
            assert_eq!(
                raw.plan_zero(GuestOffset(4097), 77, mode).unwrap(),
                Step::Done(ZeroPlan::Host {
                    file,
                    offset,
                    len: 77
                })
            );
        }
    }

    #[test]
    fn a_flush_is_one_barrier() {
        let raw = Raw::with_size(512).unwrap();
        let mut run = FlushRun::default();
        for _ in 0..2 {
            raw.flush_begin(&mut run).unwrap();
            assert_eq!(run.stages, [Stage { first: 0, end: 0 }]);
            assert!(run.writes.is_empty());
            raw.flush_end(&mut run, true);
        }
    }
}
