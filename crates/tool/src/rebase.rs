//! Putting an image onto another backing file: `qemu-img rebase`'s work, in its safe mode.
//!
//! ```text
//!   1 where the image has nothing, and old and new backing file differ, it gets what the old one has
//!   2 all of that is durable      3 the image names the new backing file, all at once
//! ```
//!
//! Until step 3 the image is an overlay of its old backing file that has a copy of some of it: whatever cuts the work
//! off, it reads as before. What both backing files have in the same place of the same file is not read.

use crate::source::Source;
use crate::work::Work;
use block::{Error, Result, Storage, is_zero};
use disk::chain::Chain;
use image::{ExtentKind, Format, Pack, qcow2, qed, vhd, vhdx, vmdk};

/// Bytes that are compared at once, unless a cluster is larger.
const PIECE_BYTES: u64 = 1 << 20;

/// What was done. Bytes of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that were copied from the old backing file, as data.
    pub copied: u64,
    /// Bytes that were made zeros, since the old backing file has zeros there.
    pub zeroed: u64,
    /// Clusters of `copied` that were compressed, and bytes that they take in the file.
    pub compressed_clusters: u64,
    /// See above.
    pub compressed_bytes: u64,
}

/// What an image is to say of its new backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Its name and its format: qcow2 and QED.
    Named(String, Format),
    /// Names, unique id and time.
    Vhd(vhd::NewParent),
    /// Names and DataWriteGuid.
    Vhdx(vhdx::Locator),
    /// Its name and its CID.
    Vmdk(String, u32),
}

/// Whether images of `format` can get another backing file.
pub fn can_rebase(format: Format) -> bool {
    matches!(
        format,
        Format::Qcow2 | Format::Qed | Format::Vhd | Format::Vhdx | Format::Vmdk
    )
}

/// Makes what `backing` says the backing file of the closed image of `format` in `file`, its first one, which nobody
/// else may use; `None`: it gets none.
///
/// # Errors
///
/// `Invalid` for a name that cannot be, and for what images of another format say; `Unsupported` for other formats; what
/// the host fails with.
pub fn set_backing(file: &dyn Storage, format: Format, backing: Option<&Link>) -> Result<()> {
    match (format, backing) {
        (Format::Qcow2, None) => qcow2::rebase::set_backing(file, None),
        (Format::Qcow2, Some(Link::Named(name, below))) => {
            qcow2::rebase::set_backing(file, Some((name, below.qemu_name())))
        }
        (Format::Qed, None) => qed::rebase::set_backing(file, None),
        // All that an image says of its backing file's format is that it is raw.
        (Format::Qed, Some(Link::Named(name, below))) => {
            qed::rebase::set_backing(file, Some((name, *below == Format::Raw)))
        }
        (Format::Vhd, None) => vhd::set_parent(file, None),
        (Format::Vhd, Some(Link::Vhd(parent))) => vhd::set_parent(file, Some(parent)),
        (Format::Vhdx, None) => vhdx::set_parent(file, None),
        (Format::Vhdx, Some(Link::Vhdx(parent))) => vhdx::set_parent(file, Some(parent)),
        (Format::Vmdk, None) => vmdk::set_parent(file, None),
        (Format::Vmdk, Some(Link::Vmdk(name, cid))) => vmdk::set_parent(file, Some((name, *cid))),
        (format, Some(_)) if can_rebase(format) => Err(Error::invalid(format!(
            "{}: what it is to say of its backing file is of another format than {format}",
            file.name()
        ))),
        (format, _) => Err(Error::unsupported(format!(
            "{}: a {format} image cannot get another backing file",
            file.name()
        ))),
    }
}

/// Gives `overlay`, open for writing, all that would be lost or come to light on top of `base` (`None`: on top of
/// nothing), clusters compressed where it is to `compress` and that makes them smaller. It is closed afterwards, and may be
/// given its new backing file.
///
/// # Errors
///
/// What reading and writing fail with; `Unsupported` where it takes no compressed clusters; `Interrupted`. The overlay
/// reads as before then.
pub fn copy_differences(
    overlay: &Chain,
    base: Option<&Chain>,
    compress: bool,
    work: &mut Work<'_>,
) -> Result<Report> {
    let mut driver = overlay.driver()?;
    let mut packer = compress.then(|| driver.packer()).transpose()?;
    let mut packed = Vec::new();
    let cluster = (overlay.layers.first()).map_or(1, |layer| layer.unit_bytes());
    let below = overlay.layers.get(1..).unwrap_or_default().to_vec();
    let below = Chain {
        cut_off: overlay.cut_off,
        ..Chain::new(below, true)
    };
    let nothing = || Source::join(&[]);
    let mut old = match below.layers.is_empty() {
        true => nothing()?,
        false => Source::new(&below)?,
    };
    let mut new = base.map_or_else(nothing, Source::new)?;
    let size = driver.size();
    let unit = match compress {
        true => cluster,
        false => cluster.max(4096),
    };
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut report = Report {
        size,
        ..Report::default()
    };
    let mut run = || -> Result<()> {
        let mut at = 0;
        while at < size {
            work.reached(at)?;
            let own = driver.extent_at(at, size - at)?;
            if own.depth == 0 && own.kind != ExtentKind::Unallocated {
                at += own.len;
                continue;
            }
            let here = old.run(at, own.len)?;
            let there = new.run(at, here.len)?;
            let mut len = here.len.min(there.len);
            let same = match (&here.place, &there.place) {
                _ if here.zero && there.zero => true,
                (Some(a), Some(b)) => (a.identity, a.offset) == (b.identity, b.offset),
                _ => false,
            };
            if same {
                at += len;
                continue;
            }
            // Up to the end of a cluster, where the image has nothing: what is written there comes whole.
            len = ((at + len).next_multiple_of(unit) - at).min(own.len);
            len = len.min(PIECE_BYTES.max(unit) - at % unit);
            // At most 2 MiB.
            before.resize(len as usize, 0);
            after.resize(len as usize, 0);
            old.read(at, &mut before)?;
            new.read(at, &mut after)?;
            let mut done = 0;
            while done < len {
                let part = (unit - (at + done) % unit).min(len - done);
                let range = done as usize..(done + part) as usize;
                let bytes = before.get(range.clone()).unwrap_or_default();
                if Some(bytes) != after.get(range) {
                    // An image on nothing has nothing to hide: it leaves zeros out where it has no cluster, and what
                    // comes to lie below would show through.
                    match is_zero(bytes) && !below.layers.is_empty() {
                        true => {
                            driver.write_zeroes(at + done, part, true)?;
                            report.zeroed += part;
                        }
                        false => {
                            // Of a cluster that is there in part the rest would be lost.
                            let whole = (at + done).is_multiple_of(unit)
                                && (part == unit || at + done + part == size);
                            let packer = packer.as_mut().filter(|_| whole);
                            let smaller = packer.is_some_and(|packer| {
                                pack(&mut **packer, bytes, unit, &mut packed)
                            });
                            if smaller {
                                driver.write_packed(at + done, &packed)?;
                                report.compressed_clusters += 1;
                                report.compressed_bytes += packed.len() as u64;
                            } else {
                                driver.write(at + done, bytes)?;
                            }
                            report.copied += part;
                        }
                    }
                    work.moved(part)?;
                }
                done += part;
            }
            at += len;
        }
        Ok(())
    };
    let copied = run();
    // What was copied harms nothing, and need not be lost.
    let closed = driver.close();
    copied?;
    closed?;
    (work.progress)(size);
    Ok(report)
}

/// Packs a cluster of `unit` bytes, of which `bytes` are within the disk.
fn pack(packer: &mut dyn Pack, bytes: &[u8], unit: u64, packed: &mut Vec<u8>) -> bool {
    if bytes.len() as u64 == unit {
        return packer.pack(bytes, packed);
    }
    let mut whole = bytes.to_vec();
    // At most 2 MiB.
    whole.resize(unit as usize, 0);
    packer.pack(&whole, packed)
}
