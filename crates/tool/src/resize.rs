//! Another size for a disk that nobody uses: `qemu-img resize`'s work.
//!
//! What is new reads as zeros (but of a luks disk, whose zeros are encrypted, as random bytes), also where a backing file is longer than the image was, and also in the part of
//! the last cluster that lay behind the old end. Until the very last write, of the new size, nobody sees any of
//! it: a crash leaves the disk as it was.
//!
//! ```text
//!   grow      1 L1 table, large enough · 2 zeros and preallocated clusters behind the end · 3 size
//!   shrink    1 everything at once · 2 the file's tail is cut off
//! ```

use crate::prealloc::{Preallocation, fill_host};
use crate::work::Stop;
use block::{Context, Error, Result, Storage};
use disk::blocking::{Driver, Member};
use image::qcow2::{Header, OpenOptions, Qcow2, edit::Editor, features, resize};
use image::{ExtentKind, Format, luks, qed, vdi, vhd, vhdx};
use std::sync::Arc;

/// How to resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeOptions {
    /// Bytes of the disk; a multiple of 512, but of a raw disk and a luks disk any number.
    pub size: u64,
    /// Data may be lost: the disk may become smaller.
    pub shrink: bool,
    /// What the new part gets.
    pub preallocation: Preallocation,
}

/// Gives the first of `members`, an image of `format` that nobody uses, another size. The others are its backing
/// chain. Returns the size that it had.
///
/// # Errors
///
/// `Invalid` and `Unsupported` for what cannot be, before anything is written; what the host fails
/// with. The disk has its old size then, and is sound.
pub fn resize(members: &[Member], format: Format, options: &ResizeOptions) -> Result<u64> {
    resize_known(members, format, options, false)
}

/// As [`resize`]; with `keeps_id` images above it go on to know it as their parent.
pub(crate) fn resize_known(
    members: &[Member],
    format: Format,
    options: &ResizeOptions,
    keeps_id: bool,
) -> Result<u64> {
    let member = members
        .first()
        .ok_or_else(|| Error::invalid("a chain without an image"))?;
    let file = member
        .files
        .first()
        .ok_or_else(|| Error::invalid("an image without a file cannot be resized"))?;
    let name = file.name();
    let old = match format {
        Format::Qcow2 => Header::read(&**file)?.size,
        Format::Qed => qed::Header::read(&**file)?.image_size,
        Format::Vhd
        | Format::Vhdx
        | Format::Vdi
        | Format::Vmdk
        | Format::Qcow
        | Format::Luks
        | Format::Parallels
        | Format::Bochs
        | Format::Cloop
        | Format::Dmg
        | Format::Null => member.image.size(),
        Format::Raw => file.len()?,
    };
    if matches!(
        format,
        Format::Qed | Format::Vhd | Format::Vhdx | Format::Vdi
    ) && options.size < old
    {
        return Err(Error::unsupported(format!(
            "{name}: a {format} image cannot shrink: convert it into a smaller one"
        )));
    }
    if matches!(format, Format::Vmdk | Format::Qcow) {
        return Err(Error::unsupported(format!(
            "{name}: a {format} image cannot be resized: convert it into another one"
        )));
    }
    permit(old, options).context(|| &name)?;
    match format {
        Format::Raw => raw(&**file, format, 0, old, options).context(|| &name)?,
        Format::Luks => {
            let header = luks::header(&**file)?;
            raw(&**file, format, header.payload_offset, old, options).context(|| &name)?;
        }
        Format::Parallels | Format::Bochs | Format::Cloop | Format::Dmg => {
            return Err(Error::unsupported(format!(
                "{name}: {format} images are for reading only: convert it into another format"
            )));
        }
        Format::Qcow2 if options.size < old => shrink(member, &**file, &name, options)?,
        Format::Qcow2 => grow(members, file, &name, old, options)?,
        Format::Qed => grow_qed(members, &**file, old, options).context(|| &name)?,
        Format::Vhd => grow_vhd(members, &**file, old, options).context(|| &name)?,
        Format::Vhdx => grow_vhdx(members, &**file, old, options, keeps_id).context(|| &name)?,
        Format::Vdi => grow_vdi(&**file, options).context(|| &name)?,
        Format::Vmdk | Format::Qcow | Format::Null => {
            return Err(Error::invalid(format!(
                "{name}: {format} has the size that it is given"
            )));
        }
    }
    Ok(old)
}

fn permit(old: u64, options: &ResizeOptions) -> Result<()> {
    if options.size >= old {
        return Ok(());
    }
    if !options.shrink {
        return Err(Error::invalid(format!(
            "{} bytes are less than the {old} that it has: say --shrink if what lies behind may be lost",
            options.size
        )));
    }
    if options.preallocation != Preallocation::Off {
        return Err(Error::invalid(
            "preallocation is for a disk that grows: it cannot be combined with --shrink",
        ));
    }
    Ok(())
}

/// The disk is what the file has from byte `base` on.
fn raw(
    file: &dyn Storage,
    format: Format,
    base: u64,
    old: u64,
    options: &ResizeOptions,
) -> Result<()> {
    let new = options.size;
    if options.preallocation == Preallocation::Metadata {
        return Err(Error::invalid(format!(
            "preallocation=metadata: {format} has no metadata; it can be off, falloc or full"
        )));
    }
    if file.is_fixed() && new != old {
        return Err(Error::unsupported(format!(
            "a device, and a disk of a server, is as long as it is, {old} bytes: it can be resized only where it is made"
        )));
    }
    file.set_len(base + new)?;
    if new > old {
        // A signal ends the process.
        let stop = Stop::default();
        fill_host(options.preallocation, file, base + old, new - old, &stop)?;
    }
    file.sync()
}

fn grow_vhd(
    members: &[Member],
    file: &dyn Storage,
    old: u64,
    options: &ResizeOptions,
) -> Result<()> {
    may_grow("vhd", members, old, options)?;
    vhd::grow(file, options.size)
}

fn grow_vhdx(
    members: &[Member],
    file: &dyn Storage,
    old: u64,
    options: &ResizeOptions,
    keeps_id: bool,
) -> Result<()> {
    may_grow("vhdx", members, old, options)?;
    vhdx::grow(file, options.size, keeps_id)
}

/// Refuses what an image whose new part is of blocks that are not there cannot be.
fn may_grow(format: &str, members: &[Member], old: u64, options: &ResizeOptions) -> Result<()> {
    if options.preallocation != Preallocation::Off {
        return Err(Error::unsupported(format!(
            "{format} images are not preallocated when they grow: leave --preallocation out"
        )));
    }
    let below = members.get(1).map_or(0, |parent| parent.image.size());
    if below > old && options.size > old {
        return Err(Error::unsupported(format!(
            "the parent has {below} bytes, more than the {old} of the disk: they would become visible"
        )));
    }
    Ok(())
}

fn grow_vdi(file: &dyn Storage, options: &ResizeOptions) -> Result<()> {
    if options.preallocation != Preallocation::Off {
        return Err(Error::unsupported(
            "vdi images are not preallocated when they grow: leave --preallocation out",
        ));
    }
    vdi::grow(file, options.size)
}

fn has_data_file(header: &Header) -> bool {
    header.incompatible & features::DATA_FILE != 0
}

fn data_file(member: &Member) -> Result<&dyn Storage> {
    let file = member.files.get(1);
    file.map(AsRef::as_ref)
        .ok_or_else(|| Error::invalid("its external data file is not open"))
}

fn shrink(member: &Member, file: &dyn Storage, name: &str, options: &ResizeOptions) -> Result<()> {
    let mut editor = Editor::open(file, name)?;
    resize::shrink(&mut editor, options.size)?;
    if has_data_file(editor.header()) {
        let data = data_file(member)?;
        data.set_len(options.size)?;
        data.sync()?;
    }
    cut_tail(&mut editor, file).context(|| name)
}

/// Cuts off what the file of a closed qcow2 image has behind the last cluster in use.
pub(crate) fn cut_file(file: &dyn Storage) -> Result<()> {
    let name = file.name();
    let mut editor = Editor::open(file, &name)?;
    cut_tail(&mut editor, file).context(|| name)
}

/// Cuts off what the file has behind the last cluster in use.
fn cut_tail(editor: &mut Editor, file: &dyn Storage) -> Result<()> {
    let end = editor.used_end()?;
    if end < file.len()? {
        file.set_len(end)?;
        file.sync()?;
    }
    Ok(())
}

fn grow(
    members: &[Member],
    file: &Arc<dyn Storage>,
    name: &str,
    old: u64,
    options: &ResizeOptions,
) -> Result<()> {
    let new = options.size;
    let header = {
        let mut editor = Editor::open(&**file, name)?;
        resize::grow_table(&mut editor, new)?;
        editor.header().clone()
    };
    let mut preallocation = options.preallocation;
    if header.autoclear & features::DATA_FILE_RAW != 0 && preallocation == Preallocation::Off {
        // Otherwise the file would not show what the disk reads as.
        preallocation = Preallocation::Metadata;
    }
    let old_image = members.first().and_then(|first| first.image.encryption());
    let open = OpenOptions {
        size: Some(new),
        cipher: old_image.and_then(|encryption| encryption.cipher.clone()),
        ..OpenOptions::default()
    };
    let image = Qcow2::open(&**file, &open)?;
    let mut members = members.to_vec();
    if let Some(first) = members.first_mut() {
        first.image = Arc::new(image);
        if has_data_file(&header) {
            let data = data_file(first)?;
            // What it has behind its end, from a shrink that a crash cut off, must not come back.
            if data.len()? > old {
                data.set_len(old)?;
            }
            data.set_len(new)?;
        }
    }
    let mut driver = Driver::new(members, false)?;
    clear(&mut driver, old, new)?;
    if preallocation != Preallocation::Off {
        driver.preallocate(old, new - old, |file, host, len| {
            fill_host(preallocation, file, host.0, len, &Stop::default())
        })?;
    }
    driver.close()?;
    resize::set_size(&mut Editor::open(&**file, name)?, new)
}

/// What is behind the old end is zeros already: tables and clusters are filled whole. But a backing file that is longer than
/// the disk was would show there.
fn grow_qed(
    members: &[Member],
    file: &dyn Storage,
    old: u64,
    options: &ResizeOptions,
) -> Result<()> {
    if options.preallocation != Preallocation::Off {
        return Err(Error::unsupported(
            "a QED image has no preallocation: only off is possible",
        ));
    }
    qed::may_grow(file, options.size)?;
    if options.size > old && members.len() > 1 {
        let image = qed::Qed::open(
            file,
            &qed::OpenOptions {
                size: Some(options.size),
                ..qed::OpenOptions::default()
            },
        )?;
        let mut members = members.to_vec();
        if let Some(first) = members.first_mut() {
            first.image = Arc::new(image);
        }
        let mut driver = Driver::new(members, false)?;
        clear(&mut driver, old, options.size)?;
        driver.close()?;
    }
    qed::grow(file, options.size)
}

/// Makes the range read as zeros, without a write where it does.
fn clear(driver: &mut Driver, from: u64, to: u64) -> Result<()> {
    let mut at = from;
    while at < to {
        let extent = driver.extent_at(at, to - at)?;
        match extent.kind {
            ExtentKind::Unallocated | ExtentKind::Zero { .. } if extent.depth == 0 => {}
            ExtentKind::Unallocated => {}
            // A backing file's zeros are not for ever.
            _ => driver.write_zeroes(at, extent.len, false)?,
        }
        at += extent.len;
    }
    Ok(())
}
