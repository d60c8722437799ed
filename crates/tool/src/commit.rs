//! Putting what an overlay has into an image below it: `qemu-img commit`'s work.
//!
//! ```text
//!   1 the image below is made as large as the overlay      2 what lies above it is copied into it
//!   3 all of that is durable                               4 the overlay is emptied
//! ```
//!
//! Until step 4 the overlay has all of its data and hides what comes to be below it: whatever cuts the work off, the
//! overlay reads as before, and the work can be done again. In step 4 too: what it loses the image below has by then.
//! qcow2 loses all in one edit, then a second one and a cut of the file give the space back; QED's L1 table is zeroed in
//! place, and the file cut; so are the tables of VHD, VHDX and VMDK (`image::vhd::link` and the like).
//!
//! VHDX and VMDK images know the one below by a mark that changes when that is written. Here it does not: the chain could not
//! be read any more where the work is cut off. What the overlay reads as is the same, before and after; other overlays of the
//! image below read something else from then on, as those of any other format.

use crate::prealloc::Preallocation;
use crate::resize::{self, ResizeOptions};
use crate::work::Work;
use block::{Error, Result, Storage};
use disk::blocking::{Driver, Member};
use disk::chain::{Chain, Layer};
use image::{ExtentKind, FileId, Format, qcow, qcow2, qed, vhd, vhdx, vmdk};

/// Bytes that are copied at once.
const PIECE_BYTES: u64 = 1 << 20;

/// What was done. Bytes of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes of the overlay's disk.
    pub size: u64,
    /// Bytes that were copied as data.
    pub copied: u64,
    /// Bytes that were made zeros.
    pub zeroed: u64,
    /// The base's size before, where it had to grow.
    pub grown_from: Option<u64>,
}

/// Copies what `above`, images each on the next, have above the last one's backing file into that, which `open`
/// opens for writing (it is opened a second time where it has to grow), so that it keeps its identity where [`keeps_id`] says
/// so. Afterwards what was copied is durable.
///
/// # Errors
///
/// What reading and writing fail with; `Interrupted`. The chain reads as before then.
pub fn commit(
    above: &[Layer],
    open: &dyn Fn() -> Result<Chain>,
    work: &mut Work<'_>,
) -> Result<Report> {
    let size = above.first().map_or(0, |layer| layer.image.size());
    let mut report = Report {
        size,
        ..Report::default()
    };
    let mut base = open()?;
    let first = base.layers.first();
    let (old, format) = first.map_or((0, Format::Null), |layer| {
        (layer.image.size(), layer.format)
    });
    if old < size && first.is_some_and(|layer| layer.part.is_some()) {
        let file = first.map_or(String::new(), |layer| layer.path.display().to_string());
        return Err(Error::unsupported(format!(
            "{file}: the part of it (offset, size) that is the image below has {old} bytes, the overlay {size}: a part of a file \
             does not grow"
        )));
    }
    if old < size {
        let options = ResizeOptions {
            size,
            shrink: false,
            preallocation: Preallocation::Off,
        };
        resize::resize_known(&base.members(), format, &options, keeps_id(above))?;
        report.grown_from = Some(old);
        drop(base);
        base = open()?;
    }
    let below = base.members();
    let mut members: Vec<Member> = Chain::new(above.to_vec(), true).members();
    members.extend(below.iter().cloned());
    let mut copying = Copying {
        above: above.len(),
        reading: Driver::new(members, true)?.with_cut_off(base.cut_off),
        writing: Driver::new(below, false)?.with_cut_off(base.cut_off),
        report,
    };
    let copied = copying.run(work);
    // What was copied may as well be durable.
    let closed = copying.writing.close();
    copied?;
    closed?;
    (work.progress)(size);
    Ok(copying.report)
}

struct Copying {
    /// Images above the base.
    above: usize,
    reading: Driver,
    writing: Driver,
    report: Report,
}

impl Copying {
    fn run(&mut self, work: &mut Work<'_>) -> Result<()> {
        let mut buffer = Vec::new();
        let mut at = 0;
        while at < self.report.size {
            work.reached(at)?;
            let found = self.reading.extent_at(at, self.report.size - at)?;
            let mut len = found.len;
            match found.kind {
                _ if found.depth >= self.above => {}
                // An image between that ends before: zeros, which the base may not have.
                ExtentKind::Zero { .. } | ExtentKind::Unallocated => {
                    self.writing.write_zeroes(at, len, true)?;
                    self.report.zeroed += len;
                }
                _ => {
                    len = len.min(PIECE_BYTES);
                    // At most 1 MiB.
                    buffer.resize(len as usize, 0);
                    self.reading.read(at, &mut buffer)?;
                    self.writing.write(at, &buffer)?;
                    self.report.copied += len;
                    work.moved(len)?;
                }
            }
            at += len;
        }
        Ok(())
    }
}

/// Whether the image below `above` must be opened so that it keeps its identity: the one above knows it by what it holds.
pub fn keeps_id(above: &[Layer]) -> bool {
    let parent = above.last().and_then(|layer| layer.image.parent());
    parent.is_some_and(|parent| !parent.unique_ids.is_empty())
}

/// Whether an image of `format` can be emptied.
pub fn can_empty(format: Format) -> bool {
    matches!(
        format,
        Format::Qcow2 | Format::Qcow | Format::Qed | Format::Vhd | Format::Vhdx | Format::Vmdk
    )
}

/// Takes everything out of `overlay`, an image that is open for writing and that nobody uses any more: its backing
/// file has it.
///
/// # Errors
///
/// `Unsupported` for a format whose images cannot be emptied; what the host fails with. The overlay reads
/// as before then: whatever it has lost is below it.
pub fn empty(overlay: &Layer) -> Result<()> {
    let file = overlay.files.first();
    let file = file.ok_or_else(|| Error::invalid("an image without a file"))?;
    match overlay.format {
        Format::Qcow2 => qcow2::rebase::empty(&**file)?,
        Format::Qcow => return qcow::empty(&**file),
        Format::Qed => return qed::rebase::empty(&**file),
        Format::Vhd => return vhd::empty(&**file),
        Format::Vhdx => return vhdx::empty(&**file),
        Format::Vmdk => {
            let files: Vec<&dyn Storage> = overlay.files.iter().map(|file| &**file as _).collect();
            return vmdk::empty(&vmdk::Parts::read(&**file)?, &files);
        }
        format => {
            return Err(Error::unsupported(format!(
                "{}: a {format} image cannot be emptied",
                overlay.path.display()
            )));
        }
    }
    if let Some(data) = overlay.files.get(usize::from(FileId::DATA.0)) {
        // The host may keep the space: nothing refers to it any more.
        let storage: &dyn Storage = &**data;
        let _ = storage.write_zeroes(0, storage.len()?, true);
    }
    resize::cut_file(&**file)
}
