//! Whether a file has all that its image uses, asked at next to no cost before something is changed.

use super::image::Image;
use super::source::{FileSource, Source};
use super::tally::Severity;
use super::{CheckOptions, Fact, Finding, Report, check};
use ::image::qcow2::Header;
use ::image::qcow2::check::Block;
use block::{Error, Result, Storage};

/// Refuses the qcow2 image in `storage` where its file ends before, or within, tables or clusters of its disk: whoever makes the file
/// longer has them read as zeros from then on, and nothing tells it any more.
///
/// Tables are looked through only where the file ends within a cluster, or its refcounts count clusters behind its end (a crash leaves
/// such too). It is for commands; a server that did so would refuse the disk of a guest which had not flushed when the power failed.
///
/// # Errors
///
/// `Corrupt` for such an image; else as [`check`].
pub fn refuse_cut_off(storage: &dyn Storage) -> Result<()> {
    let source = FileSource::new(storage)?;
    let image = Image::load(&source, true)?;
    if !may_be_cut_off(&source, &image)? {
        return Ok(());
    }
    refuse(storage, &check(storage, &CheckOptions::default())?)
}

/// Refuses the qcow2 image in `storage` where its external data file `data` ends before data of the disk: as [`refuse_cut_off`].
///
/// Tables are looked through only where the data file is shorter than the disk.
///
/// # Errors
///
/// As [`refuse_cut_off`].
pub fn refuse_short_data_file(storage: &dyn Storage, data: &dyn Storage) -> Result<()> {
    let len = data.len()?;
    if len >= Header::read(storage)?.size {
        return Ok(());
    }
    let options = CheckOptions {
        data_file_len: Some(len),
        ..CheckOptions::default()
    };
    refuse(data, &check(storage, &options)?)
}

/// Refuses an image of which the check found something cut off; `file` is what ends too early.
fn refuse(file: &dyn Storage, report: &Report) -> Result<()> {
    match report.cut_off {
        0 => Ok(()),
        _ => Err(Error::corrupt(format!("{}: {}", file.name(), lost(report)))),
    }
}

/// What is lost of an image whose file is cut off, to follow its name.
pub(super) fn lost(report: &Report) -> String {
    let lost = |finding: &&Finding| {
        finding.severity == Severity::CutOff || matches!(finding.fact, Some(Fact::Beyond { .. }))
    };
    let first = report.findings.iter().find(lost);
    let first = first.map_or(String::new(), |finding| format!(" ({})", finding.text));
    format!(
        "is cut off: the file ends before {} of its tables and clusters end{first}; 'diskplane check' shows all, 'diskplane convert \
         --salvage' copies what is left",
        report.cut_off
    )
}

/// Whether the file ends within a cluster, or clusters behind its end are in use.
fn may_be_cut_off(source: &dyn Source, image: &Image) -> Result<bool> {
    let layout = image.layout;
    if !image.end.is_multiple_of(layout.cluster()) {
        return Ok(true);
    }
    let block = image.clusters >> layout.block_bits();
    let after = usize::try_from(block).map_or(usize::MAX, |block| block.saturating_add(1));
    if image.table.iter().skip(after).any(|entry| *entry != 0) {
        return Ok(true);
    }
    let at = match image.block(block) {
        Block::At(at) if at.saturating_add(layout.cluster()) <= image.end => at,
        Block::None => return Ok(false),
        // Its counts are not to be had.
        _ => return Ok(true),
    };
    // From the word on that counts the first one: it may count some before, too.
    let index = image.clusters & ((1 << layout.block_bits()) - 1);
    let skip = (index << layout.refcount_order) / 8;
    // At most 2 MiB.
    let mut counts = vec![0; (layout.cluster() - skip) as usize];
    source.read(at + skip, &mut counts)?;
    Ok(counts.iter().any(|byte| *byte != 0))
}
