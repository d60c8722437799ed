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
    Description, Extent, ExtentKind, FileId, Image, Plan, Step, ZeroMode, ZeroPlan,
};
use block::{Error, GuestOffset, HostOffset, Result, Storage, align_up, limits};

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

impl Image for Raw {
    fn describe(&self) -> Description {
        Description {
            facts: match self.begin {
                0 => Vec::new(),
                begin => vec![("offset", format!("{begin} bytes into the file"))],
            },
            ..Description::new("raw", self.size, 1)
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

    fn plan_zero(&self, at: GuestOffset, len: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        Ok(Step::Done(ZeroPlan::Host {
            file: FileId::IMAGE,
            offset: HostOffset(self.begin + at.0),
            len,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FlushRun, Stage};
    use block::ErrorKind;

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
