//! Which formats there are, and which of them a file shows unmistakably.
//!
//! Only a format's magic counts. That a file looks like nothing known does not make it raw:
//! a guest writes what it likes at the start of a raw disk, another format's header included,
//! so raw has to be said by the user or by the image that names the file.

use crate::{luks, parallels, qcow, vdi, vhd, vhdx, vmdk};
use block::{Error, ErrorKind, Result, Storage};
use serde::Serialize;
use std::{fmt, str::FromStr};

/// An image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes as they are.
    Raw,
    /// `null:SIZE`: zeros, without a file.
    Null,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// QEMU's copy-on-write format, version 1.
    Qcow,
    /// QEMU's enhanced disk format of 2010.
    Qed,
    /// VMware's format: a descriptor, and files with the disk in grains or as it is.
    Vmdk,
    /// Virtual PC's, Hyper-V's and XenServer's format; QEMU calls it `vpc`.
    Vhd,
    /// Hyper-V's format since 2012.
    Vhdx,
    /// VirtualBox's format.
    Vdi,
    /// A disk that is encrypted as a whole.
    Luks,
    /// Parallels' expandable images, for reading.
    Parallels,
}

impl Format {
    /// Formats that a file can have, as messages list them.
    pub const NAMES: &'static str =
        "raw, qcow2, qcow, qed, vhd, vhdx, vdi, vmdk, luks or parallels";

    /// The name, as after `-f`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Null => "null",
            Format::Qcow2 => "qcow2",
            Format::Qcow => "qcow",
            Format::Qed => "qed",
            Format::Vhd => "vhd",
            Format::Vhdx => "vhdx",
            Format::Vdi => "vdi",
            Format::Luks => "luks",
            Format::Parallels => "parallels",
            Format::Vmdk => "vmdk",
        }
    }

    /// The name that QEMU has for it: what images record of their backing files.
    pub fn qemu_name(self) -> &'static str {
        match self {
            Format::Vhd => "vpc",
            _ => self.name(),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Format {
    /// The format that an image records of what it lies on: a format's name, or that of a driver of QEMU for files as
    /// they are.
    ///
    /// # Errors
    ///
    /// As of parsing a name.
    pub fn recorded(name: &str) -> Result<Self> {
        match name {
            "file" | "host_device" => Ok(Format::Raw),
            _ => name.parse(),
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            "qcow" => Ok(Format::Qcow),
            "qed" => Ok(Format::Qed),
            "vhd" | "vpc" => Ok(Format::Vhd),
            "vhdx" => Ok(Format::Vhdx),
            "vdi" => Ok(Format::Vdi),
            "luks" => Ok(Format::Luks),
            "parallels" => Ok(Format::Parallels),
            "vmdk" => Ok(Format::Vmdk),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "format '{}' is not supported: {}",
                    text.escape_default(),
                    Self::NAMES
                ),
            )),
        }
    }
}

/// Bytes from the start of a file that [`probe_bytes`] wants to see.
pub const PROBE_BYTES: usize = 512;

const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The format whose magic `start`, the first bytes of a file, shows.
pub fn probe_bytes(start: &[u8]) -> Option<Format> {
    if start.starts_with(&vhd::COOKIE) {
        return Some(Format::Vhd);
    }
    if start.starts_with(&vhdx::SIGNATURE) {
        return Some(Format::Vhdx);
    }
    if start
        .get(vdi::MAGIC_AT..)
        .is_some_and(|s| s.starts_with(&vdi::MAGIC))
    {
        return Some(Format::Vdi);
    }
    let is_parallels =
        |magic: &[u8]| start.starts_with(magic) && start.get(16..20) == Some(&[2, 0, 0, 0]);
    if is_parallels(&parallels::MAGIC_OLD) || is_parallels(&parallels::MAGIC_EXT) {
        return Some(Format::Parallels);
    }
    if start.starts_with(&luks::MAGIC) {
        return Some(Format::Luks);
    }
    if start.starts_with(&vmdk::MAGIC) || start.starts_with(&vmdk::COWD_MAGIC) {
        return Some(Format::Vmdk);
    }
    if vmdk::Descriptor::shows(start) {
        return Some(Format::Vmdk);
    }
    if start.starts_with(&crate::qed::MAGIC) {
        return Some(Format::Qed);
    }
    // Version 1 has the same magic, but is another format.
    if start.starts_with(&qcow::MAGIC) {
        return Some(Format::Qcow);
    }
    let is_qcow2 = start.starts_with(&QCOW2_MAGIC) && start.len() >= 8;
    is_qcow2.then_some(Format::Qcow2)
}

/// Bytes at the start of a cloop image: it is a shell script that mounts itself (QEMU's `block/cloop.c`).
const CLOOP_MAGIC: &[u8] =
    b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";

/// Where a Bochs image has its strings, each up to a NUL (QEMU's `block/bochs.h`).
const BOCHS_MAGIC: [(usize, &[u8]); 3] = [
    (0, b"Bochs Virtual HD Image\0"),
    (32, b"Redolog\0"),
    (48, b"Growing\0"),
];

/// Bytes of the last sector of an Apple disk image, from its start: magic, version 4, its own size (QEMU's `block/dmg.c`).
const DMG_TRAILER: &[u8] = b"koly\0\0\0\x04\0\0\x02\0";

/// What QEMU reads and nobody here does, where `start`, the first bytes of a file, shows it: taken as a raw disk it would be
/// converted to a copy of its tables.
fn unread(start: &[u8]) -> Option<&'static str> {
    let has = |(at, magic): &(usize, &[u8])| start.get(*at..).is_some_and(|s| s.starts_with(magic));
    if BOCHS_MAGIC.iter().all(has) {
        return Some("bochs");
    }
    start.starts_with(CLOOP_MAGIC).then_some("cloop")
}

/// Whether the last sector of `file` is that of an Apple disk image.
fn dmg_trailer(file: &dyn Storage) -> Result<bool> {
    let Some(at) = file.len()?.checked_sub(512) else {
        return Ok(false);
    };
    let mut bytes = [0; 512];
    file.read_at(at, &mut bytes)?;
    Ok(bytes.starts_with(DMG_TRAILER))
}

/// The format whose magic `file` shows; `None` where it shows none.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for what may be a fixed VHD image, which shows itself only in its last sector, or a raw disk
/// with such bytes at its end; [`ErrorKind::Unsupported`] for an image of a format that only QEMU reads; and what
/// reading the file fails with.
pub fn probe(file: &dyn Storage) -> Result<Option<Format>> {
    let mut start = [0; PROBE_BYTES];
    // At most the array's.
    let there = file.len()?.min(PROBE_BYTES as u64) as usize;
    let start = start.get_mut(..there).unwrap_or_default();
    if start.is_empty() {
        return Ok(None);
    }
    file.read_at(0, start)?;
    let found = probe_bytes(start);
    let other = match unread(start) {
        None if found.is_none() && dmg_trailer(file)? => Some("dmg"),
        other => other,
    };
    if let Some(other) = other {
        return Err(Error::unsupported(format!(
            "{}: an image in format {other}, which diskplane does not read: have QEMU's own qemu-img convert it to qcow2, \
             or say -f raw to take its bytes as they are",
            file.name()
        )));
    }
    if found.is_none() && vhd::fixed_footer(file)? {
        return Err(Error::invalid(format!(
            "{}: its last sector is the footer of a fixed VHD image, but a raw disk may hold such bytes too: say -f \
             vhd or -f raw",
            file.name()
        )));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::testing::MemFile;

    #[test]
    fn only_unmistakable_magic_counts() {
        for (start, format) in [
            (&b"QFI\xfb\0\0\0\x03"[..], Some(Format::Qcow2)),
            (b"QFI\xfb\0\0\0\x02", Some(Format::Qcow2)),
            (b"QFI\xfb\0\0\0\x01", Some(Format::Qcow)),
            (b"QFI\xfb\0\0\0", None),
            (b"QED\0\0\0\x01\0", Some(Format::Qed)),
            (b"vhdxfile\0", Some(Format::Vhdx)),
            (b"vhdxfil\0\0", None),
            (b"QED \0\0\x01\0", None),
            (b"\0\0\0\0\0\0\0\0", None),
            (b"conectix", Some(Format::Vhd)),
            (b"conectis", None),
            (b"LUKS\xba\xbe\0\x01", Some(Format::Luks)),
            // Neither QEMU nor anybody here opens it, and a guest's disk may be one.
            (b"LUKS\xba\xbe\0\x02", None),
            (b"WithoutFreeSpace\x02\0\0\0", Some(Format::Parallels)),
            (b"WithouFreSpacExt\x02\0\0\0", Some(Format::Parallels)),
            (b"WithouFreSpacExt\x03\0\0\0", None),
            (b"KDMV\x01\0\0\0", Some(Format::Vmdk)),
            (b"COWD\x01\0\0\0", Some(Format::Vmdk)),
            (b"# Disk DescriptorFile\n", Some(Format::Vmdk)),
            (b"# a script\nversion=1\n", Some(Format::Vmdk)),
            (b"# a script\necho version=1\n", None),
            (b"", None),
            (b"QFI\xfb\0\0\0\x03 and so on, with other bytes where a VDI image has its signature", Some(Format::Qcow2)),
        ] {
            assert_eq!(probe_bytes(start), format, "{start:?}");
        }
        let mut vdi = [0; PROBE_BYTES];
        let end = vdi::MAGIC_AT + vdi::MAGIC.len();
        vdi[vdi::MAGIC_AT..end].copy_from_slice(&vdi::MAGIC);
        assert_eq!(probe_bytes(&vdi), Some(Format::Vdi));
        assert_eq!(probe_bytes(&vdi[..end - 1]), None);
    }

    #[test]
    fn formats_that_only_qemu_reads_are_named_and_not_taken_as_raw() {
        let mut bochs = vec![0; 1024];
        for (at, magic) in BOCHS_MAGIC {
            bochs[at..at + magic.len()].copy_from_slice(magic);
        }
        let mut undoable = bochs.clone();
        undoable[48] = b'X';
        let mut dmg = vec![0; 1024];
        dmg[512..512 + DMG_TRAILER.len()].copy_from_slice(DMG_TRAILER);
        let mut early = dmg.clone();
        early.push(0);
        for (bytes, name) in [
            (bochs, Some("bochs")),
            (undoable, None),
            (CLOOP_MAGIC.to_vec(), Some("cloop")),
            (CLOOP_MAGIC[..CLOOP_MAGIC.len() - 1].to_vec(), None),
            (dmg, Some("dmg")),
            (early, None),
            (b"koly".to_vec(), None),
        ] {
            let file = MemFile::of(bytes);
            match (probe(&file), name) {
                (Ok(found), None) => assert_eq!(found, None),
                (Err(error), Some(name)) => {
                    assert_eq!(error.kind(), ErrorKind::Unsupported);
                    let text = error.to_string();
                    assert!(text.contains(&format!("in format {name}, ")), "{text}");
                }
                (found, name) => panic!("{found:?} where {name:?} was expected"),
            }
        }
    }

    #[test]
    fn names_are_those_after_f() {
        for format in [
            Format::Raw,
            Format::Qcow2,
            Format::Qcow,
            Format::Qed,
            Format::Vhd,
            Format::Vhdx,
            Format::Vdi,
            Format::Luks,
            Format::Parallels,
            Format::Vmdk,
        ] {
            assert_eq!(format.qemu_name().parse::<Format>().unwrap(), format);
            assert_eq!(format.name().parse::<Format>().unwrap(), format);
        }
        let error = "dmg".parse::<Format>().unwrap_err().to_string();
        assert_eq!(
            error,
            format!("format 'dmg' is not supported: {}", Format::NAMES)
        );
    }
}
