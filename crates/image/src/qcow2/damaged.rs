//! Corruption that is found while an image is written to.
//!
//! A change that would go over metadata, or through an entry that cannot be right, is refused, and so is
//! every change from then on, as in QEMU: what else is wrong nobody knows. The next flush sets the corrupt bit
//! (specification: incompatible feature bit 1; version 2 has none), so that nobody writes to the image before it is
//! repaired. What was committed before is still written: it was right then. Reading goes on.

use super::state::State;
use super::{Qcow2, features};
use block::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicU8, Ordering};

/// Changes are allowed.
const OPEN: u8 = 0;
/// It is open for reading only.
const READ_ONLY: u8 = 1;
/// Corruption was found, and a flush has to say so.
const FOUND: u8 = 2;
/// The header says so.
const MARKED: u8 = 3;

/// What bars changes of an image that has just been opened.
pub(super) fn barred(read_only: bool) -> AtomicU8 {
    AtomicU8::new(if read_only { READ_ONLY } else { OPEN })
}

impl Qcow2 {
    /// Refuses changes of an image that is open for reading only, or was found to be corrupt.
    #[inline]
    pub(super) fn check_writable(&self) -> Result<()> {
        match self.barred.load(Ordering::Relaxed) {
            OPEN => Ok(()),
            barred => Err(self.why_barred(barred)),
        }
    }

    #[cold]
    fn why_barred(&self, barred: u8) -> Error {
        let name = &self.name;
        if barred != READ_ONLY {
            return Error::corrupt(format!(
                "{name}: was found to be corrupt and is not written to any more: run diskplane check --repair all"
            ));
        }
        let why = match self.read_only.as_deref() {
            None | Some("") => format!("{name}: is open for reading only"),
            Some(why) => format!("{name}: is open for reading only: {why}"),
        };
        Error::new(ErrorKind::ReadOnly, why)
    }

    /// Notes why a change could not be planned, if that is the image's fault.
    #[cold]
    pub(super) fn note_failure(&self, error: &Error) {
        let (from, to) = (Ordering::AcqRel, Ordering::Acquire);
        if error.kind() == ErrorKind::Corrupt
            && self.barred.compare_exchange(OPEN, FOUND, from, to).is_ok()
        {
            tracing::error!(image = self.name, %error, "the image is corrupt: no more changes to it");
            self.ahead.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the header is to say that the image is corrupt, and does not yet.
    pub(super) fn mark_wanted(&self) -> bool {
        self.header.version >= 3 && self.barred.load(Ordering::Acquire) == FOUND
    }

    /// Whether a flush should begin for that.
    pub(super) fn mark_soon(&self, st: &State) -> bool {
        !st.covered.running && self.mark_wanted()
    }

    /// The header says so now.
    pub(super) fn marked(&self) {
        self.barred.store(MARKED, Ordering::Release);
    }

    /// Incompatible feature bits to set in the header.
    pub(super) fn mark(&self) -> u64 {
        match self.barred.load(Ordering::Acquire) {
            FOUND | MARKED if self.header.version >= 3 => features::CORRUPT,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Driver, MemFile};
    use super::super::{CreateOptions, Header, OpenOptions, features};
    use crate::{Foreseen, Image, ZeroMode};
    use block::ErrorKind;

    const CLUSTER: u64 = 4096;
    const COPIED: u64 = 1 << 63;

    /// An image whose first clusters are written, and where its L2 table is.
    fn written(version: u32) -> (MemFile, u64) {
        let options = CreateOptions {
            size: 64 * CLUSTER,
            cluster_size: CLUSTER,
            version,
            ..CreateOptions::default()
        };
        let mut driver = Driver::create(&options, &OpenOptions::default());
        driver.write(0, &vec![0x11; 4 * CLUSTER as usize]).unwrap();
        let l1 = driver.image.header().l1_table_offset;
        let file = driver.file.clone();
        driver.close();
        let l2 = file.word(l1) & !COPIED;
        (file, l2)
    }

    fn open(file: &MemFile) -> Driver {
        Driver::open(file.clone(), &OpenOptions::default())
    }

    /// Entries of guest cluster 1 that a change must not follow: over metadata, between clusters, with reserved bits.
    fn damages(file: &MemFile, l2: u64) -> Vec<(u64, u64)> {
        let header = Header::read(file).unwrap();
        let block = file.word(header.refcount_table_offset);
        let entry = l2 + 8;
        let host = file.word(entry) & !COPIED;
        vec![
            (entry, header.l1_table_offset | COPIED),
            (entry, header.refcount_table_offset | COPIED),
            (entry, block | COPIED),
            (entry, l2 | COPIED),
            (entry, host | COPIED | 512),
            (entry, host | COPIED | 1 << 57),
        ]
    }

    #[test]
    fn a_change_that_meets_corruption_is_the_last_one() {
        let (sound, l2) = written(3);
        for (at, word) in damages(&sound, l2) {
            let file = MemFile::of(sound.bytes());
            file.patch(at as usize, &word.to_be_bytes());
            let damaged = file.bytes();
            let mut driver = open(&file);
            driver.write(40 * CLUSTER, &[0x77; 512]).unwrap();
            let discard = driver.zero(CLUSTER, CLUSTER, ZeroMode::Discard);
            assert_eq!(discard.unwrap_err().kind(), ErrorKind::Corrupt, "{at:#x}");
            for refused in [
                driver.write(0, &[1; 512]),
                driver.write(50 * CLUSTER, &[1; 512]),
                driver.zero(0, CLUSTER, ZeroMode::Discard),
                driver.zero(3 * CLUSTER, 512, ZeroMode::Zero { unmap: false }),
            ] {
                let error = refused.unwrap_err().to_string();
                assert!(error.contains("found to be corrupt"), "{error}");
            }
            assert_eq!(file.word(72), 0);
            // Whoever does not flush is asked to.
            assert_eq!(driver.image.foresee(), Some(Foreseen::Commit));
            assert!(driver.image.is_dirty());
            driver.flush().unwrap();
            assert_eq!(file.word(72), features::CORRUPT);
            assert!(!driver.image.is_dirty() && driver.image.foresee().is_none());
            // Reading goes on, and what was written before is there.
            assert_eq!(driver.read(40 * CLUSTER, 512).unwrap(), [0x77; 512]);
            assert_eq!(driver.read(3 * CLUSTER, 512).unwrap(), [0x11; 512]);
            driver.close();
            assert_eq!(file.word(72), features::CORRUPT);
            // Nothing was written over what was there.
            let l1 = Header::read(&file).unwrap().l1_table_offset as usize;
            assert_eq!(file.bytes()[l1..l1 + 8], damaged[l1..l1 + 8]);
            assert_eq!(file.word(l2 + 8), MemFile::of(damaged).word(l2 + 8));
            let why = open(&file).image.describe().read_only_because.unwrap();
            assert!(why.contains("marked corrupt"), "{why}");
        }
    }

    #[test]
    fn version_2_has_no_bit_to_say_so() {
        let (file, l2) = written(2);
        file.patch(l2 as usize + 8, &(l2 | COPIED).to_be_bytes());
        let mut driver = open(&file);
        let before = file.bytes();
        assert!(driver.write(CLUSTER, &[1; 512]).is_err());
        assert!(driver.write(0, &[1; 512]).is_err());
        assert!(!driver.image.is_dirty() && driver.image.foresee().is_none());
        driver.flush().unwrap();
        driver.close();
        assert!(file.bytes() == before);
    }

    #[test]
    fn a_mark_that_could_not_be_written_is_written_later() {
        let (file, l2) = written(3);
        file.patch(l2 as usize + 8, &(l2 | COPIED).to_be_bytes());
        let mut driver = open(&file);
        assert!(driver.write(CLUSTER, &[1; 512]).is_err());
        file.fail_after(Some(0));
        driver.flush().unwrap_err();
        file.fail_after(None);
        assert!(driver.image.is_dirty());
        driver.close();
        assert_eq!(file.word(72), features::CORRUPT);
    }

    #[test]
    fn readers_mark_nothing() {
        let (file, l2) = written(3);
        file.patch(l2 as usize + 8, &(l2 | 512 | COPIED).to_be_bytes());
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let before = file.bytes();
        let mut driver = Driver::open(file.clone(), &options);
        assert!(driver.read(CLUSTER, 512).is_err());
        let error = driver.write(CLUSTER, &[1; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
        assert!(!driver.image.is_dirty());
        driver.close();
        assert!(file.bytes() == before);
    }
}
