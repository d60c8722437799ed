//! Which formats there are, and which of them a file shows unmistakably.
//!
//! Only a format's magic counts. That a file looks like nothing known does not make it raw:
//! a guest writes what it likes at the start of a raw disk, another format's header included,
//! so raw has to be said by the user or by the image that names the file.

use crate::{bochs, cloop, dmg, luks, parallels, qcow, vdi, vhd, vhdx, vmdk};
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
    /// Growing disk images of Bochs, for reading.
    Bochs,
    /// Images of the compressed loop driver, for reading.
    Cloop,
    /// Apple's disk images, for reading.
    Dmg,
}

impl Format {
    /// Formats that a file can have, as messages list them.
    pub const NAMES: &'static str =
        "raw, qcow2, qcow, qed, vhd, vhdx, vdi, vmdk, luks, parallels, bochs, cloop or dmg";

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
            Format::Bochs => "bochs",
            Format::Cloop => "cloop",
            Format::Dmg => "dmg",
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

    /// Whether it has metadata that a check judges. Of what qcow, Bochs, cloop and Apple's images have QEMU checks nothing either.
    pub fn has_check(self) -> bool {
        !matches!(
            self,
            Format::Raw
                | Format::Null
                | Format::Luks
                | Format::Qcow
                | Format::Bochs
                | Format::Cloop
                | Format::Dmg
        )
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
            "bochs" => Ok(Format::Bochs),
            "cloop" => Ok(Format::Cloop),
            "dmg" => Ok(Format::Dmg),
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
    if bochs::shows(start) {
        return Some(Format::Bochs);
    }
    if start.starts_with(cloop::MAGIC) {
        return Some(Format::Cloop);
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

/// Bytes of the last sector of an Apple disk image, from its start: magic, version 4, its own size.
const DMG_TRAILER: &[u8] = b"koly\0\0\0\x04\0\0\x02\0";

/// Whether `file` ends as an Apple disk image.
fn has_dmg_trailer(file: &dyn Storage) -> Result<bool> {
    let Some(at) = dmg::trailer(file)? else {
        return Ok(false);
    };
    let mut bytes = [0; DMG_TRAILER.len()];
    let fits = file.len()?.saturating_sub(at) >= bytes.len() as u64;
    if fits {
        file.read_at(at, &mut bytes)?;
    }
    Ok(bytes == DMG_TRAILER)
}

/// The format whose magic `file` shows; `None` where it shows none.
///
/// # Errors
///
/// [`ErrorKind::Invalid`] for what may be a fixed VHD image, or an Apple disk image whose name does not end in `.dmg`: they
/// show themselves only at the file's end, where a raw disk may hold such bytes too; and what reading the file fails with.
pub fn probe(file: &dyn Storage) -> Result<Option<Format>> {
    let mut start = [0; PROBE_BYTES];
    // At most the array's.
    let there = file.len()?.min(PROBE_BYTES as u64) as usize;
    let start = start.get_mut(..there).unwrap_or_default();
    if start.is_empty() {
        return Ok(None);
    }
    file.read_at(0, start)?;
    if let Some(found) = probe_bytes(start) {
        return Ok(Some(found));
    }
    let doubtful = if has_dmg_trailer(file)? {
        if file.name().ends_with(".dmg") {
            return Ok(Some(Format::Dmg));
        }
        Format::Dmg
    } else if vhd::fixed_footer(file)? {
        Format::Vhd
    } else {
        return Ok(None);
    };
    let what = match doubtful {
        Format::Dmg => "it ends with the trailer of an Apple disk image",
        _ => "its last sector is the footer of a fixed VHD image",
    };
    Err(Error::invalid(format!(
        "{}: {what}, but a raw disk may hold such bytes too: say -f {doubtful} or -f raw",
        file.name()
    )))
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
    fn formats_of_others_are_known_by_all_of_their_magic() {
        let bochs = testkit::bochs::image(false, 512, &[1; 512]);
        let mut undoable = bochs.clone();
        undoable[48] = b'X';
        let cloop = testkit::cloop::image(512, &[1; 512], testkit::cloop::stored);
        let dmg = testkit::dmg::image(
            &[(testkit::dmg::RAW, 1, vec![1; 512])],
            testkit::dmg::Tables::List,
        );
        let mut early = dmg.clone();
        early.resize(early.len() + 1024, 0);
        for (bytes, want) in [
            (&bochs, Some(Format::Bochs)),
            (&undoable, None),
            (&cloop, Some(Format::Cloop)),
            (&cloop[..cloop::MAGIC.len() - 1].to_vec(), None),
            (&early, None),
            (&b"koly".to_vec(), None),
        ] {
            assert_eq!(probe(&MemFile::of(bytes.clone())).unwrap(), want);
        }
        // It is called something else: QEMU takes it as raw, and nobody guesses here.
        let error = probe(&MemFile::of(dmg)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(
            error.to_string().contains("say -f dmg or -f raw"),
            "{error}"
        );
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
            Format::Bochs,
            Format::Cloop,
            Format::Dmg,
            Format::Vmdk,
        ] {
            assert_eq!(format.qemu_name().parse::<Format>().unwrap(), format);
            assert_eq!(format.name().parse::<Format>().unwrap(), format);
        }
        let error = "dmgs".parse::<Format>().unwrap_err().to_string();
        assert_eq!(
            error,
            format!("format 'dmgs' is not supported: {}", Format::NAMES)
        );
    }
}
