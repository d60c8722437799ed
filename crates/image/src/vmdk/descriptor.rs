//! The descriptor: text that says what an image is made of (specification: "The Descriptor File").
//!
//! ```text
//!   # Disk DescriptorFile
//!   version=1
//!   CID=9fe29d99                      changes with each opening in which the disk is written
//!   parentCID=ffffffff                the CID that the parent had, or none
//!   createType="twoGbMaxExtentSparse"
//!   parentFileNameHint="base.vmdk"
//!   RW 4194304 SPARSE "disk-s001.vmdk"
//!   RW 4194304 FLAT "disk-f002.vmdk" 0
//!   ddb.adapterType = "ide"           what the machine is to see
//! ```
//!
//! It is a file of its own, or lies in the first sectors of a sparse file. Everything that is not understood in it is
//! kept: of a descriptor that is there only the eight digits of its CID are ever changed.

use block::{Error, Result, limits, plain};
use std::fmt;
use std::ops::Range;

/// Bytes of a descriptor at most.
pub const DESCRIPTOR_BYTES_MAX: u64 = 1 << 20;
/// Extents of an image at most: a disk of 2 TiB in files of 2 GiB has so many.
pub const EXTENTS_MAX: usize = 1024;
/// The `parentCID` of an image without a parent.
pub const NO_PARENT: u32 = u32::MAX;

/// Characters of a wrong line that an error shows.
const SHOWN_CHARS: usize = 60;

/// The line that most descriptors begin with.
pub(crate) const FIRST_LINE: &str = "# Disk DescriptorFile";

/// What a machine may do with an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read and write.
    Rw,
    /// Read.
    RdOnly,
    /// Nothing.
    NoAccess,
}

/// How an extent keeps its part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentType {
    /// As it is.
    Flat,
    /// In grains, found through tables; or, in old files, as `VmfsSparse`.
    Sparse,
    /// Nowhere: it reads as zeros.
    Zero,
    /// As it is, from the beginning of the file (ESX).
    Vmfs,
    /// In grains (ESX's redo logs, magic `COWD`).
    VmfsSparse,
    /// In grains of 4 KiB (ESX's space-efficient disks).
    SeSparse,
}

impl ExtentType {
    const NAMES: [(ExtentType, &'static str); 6] = [
        (ExtentType::Flat, "FLAT"),
        (ExtentType::Sparse, "SPARSE"),
        (ExtentType::Zero, "ZERO"),
        (ExtentType::Vmfs, "VMFS"),
        (ExtentType::VmfsSparse, "VMFSSPARSE"),
        (ExtentType::SeSparse, "SESPARSE"),
    ];

    /// Its name in a descriptor.
    pub fn name(self) -> &'static str {
        let found = Self::NAMES.iter().find(|(kind, _)| *kind == self);
        found.map_or("", |(_, name)| name)
    }
}

impl fmt::Display for ExtentType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A line of the extent description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// What may be done with it.
    pub access: Access,
    /// Sectors of 512 bytes of the disk.
    pub sectors: u64,
    /// How it keeps them.
    pub kind: ExtentType,
    /// Its file; empty for [`ExtentType::Zero`].
    pub file: String,
    /// The sector of the file that is its first, of [`ExtentType::Flat`].
    pub offset: u64,
}

/// What a descriptor says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// `CID`: names the contents.
    pub cid: u32,
    /// Where its digits are in the text: 1 to 8 of them.
    pub cid_at: Range<usize>,
    /// `parentCID`: the `CID` that the parent must have; [`NO_PARENT`] without one.
    pub parent_cid: u32,
    /// `createType`; empty where there is none.
    pub create_type: String,
    /// `parentFileNameHint`.
    pub parent: Option<String>,
    /// The extents in the order of the disk.
    pub extents: Vec<ExtentLine>,
    /// What follows in the disk data base and elsewhere: keys and values, in order.
    pub others: Vec<(String, String)>,
}

impl Descriptor {
    /// Whether `start`, the first bytes of a file, are those of a descriptor: the usual first line, or, behind comments and
    /// blank lines, `version=` 1 to 3 (QEMU's rule).
    pub fn shows(start: &[u8]) -> bool {
        if start.starts_with(FIRST_LINE.as_bytes()) {
            return true;
        }
        let first = start
            .split(|b| *b == b'\n')
            .map(|line| line.trim_ascii())
            .find(|line| !line.is_empty() && !line.starts_with(b"#"));
        matches!(first, Some(b"version=1" | b"version=2" | b"version=3")) && start.contains(&b'\n')
    }

    /// Reads a descriptor. It ends at the first byte 0.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] and `Unsupported`, naming the line.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > DESCRIPTOR_BYTES_MAX {
            return Err(Error::corrupt(format!(
                "the descriptor has {} bytes, the most is {DESCRIPTOR_BYTES_MAX}",
                bytes.len()
            )));
        }
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        let bytes = bytes.get(..end).unwrap_or_default();
        let mut found = Found::default();
        let mut at = 0;
        for (nth, line) in bytes.split(|b| *b == b'\n').enumerate() {
            found
                .line(line, at)
                .map_err(|error| error.within(format!("descriptor, line {}", nth + 1)))?;
            at += line.len() + 1;
        }
        found.end()
    }

    /// Whether there is a parent.
    pub fn has_parent(&self) -> bool {
        self.parent.is_some()
    }

    /// The value of a key that is none of the others' (as `ddb.adapterType`), whatever its case.
    pub fn value(&self, key: &str) -> Option<&str> {
        let mut all = self.others.iter();
        let found = all.find(|(name, _)| name.eq_ignore_ascii_case(key));
        found.map(|(_, value)| value.as_str())
    }
}

/// What was read so far.
#[derive(Debug, Default)]
struct Found {
    cid: Option<(u32, Range<usize>)>,
    parent_cid: Option<u32>,
    create_type: Option<String>,
    parent: Option<String>,
    extents: Vec<ExtentLine>,
    others: Vec<(String, String)>,
}

fn corrupt(text: impl Into<String>) -> Error {
    Error::corrupt(text.into())
}

impl Found {
    /// Takes in the line that begins at byte `at`.
    fn line(&mut self, line: &[u8], at: usize) -> Result<()> {
        let text = line.trim_ascii();
        if text.is_empty() || text.starts_with(b"#") {
            return Ok(());
        }
        // Names of files may be anything.
        let text = &block::name::of_bytes(text);
        let (word, rest) = text.split_once([' ', '\t']).unwrap_or((text, ""));
        let access = match word {
            "RW" => Some(Access::Rw),
            "RDONLY" => Some(Access::RdOnly),
            "NOACCESS" => Some(Access::NoAccess),
            _ => None,
        };
        if let Some(access) = access {
            if self.extents.len() == EXTENTS_MAX {
                return Err(corrupt(format!("more than {EXTENTS_MAX} extents")));
            }
            self.extents.push(extent(access, rest)?);
            return Ok(());
        }
        let Some((key, value)) = text.split_once('=') else {
            let start: String = text.chars().take(SHOWN_CHARS).collect();
            return Err(corrupt(format!(
                "'{}' is neither key=value nor an extent",
                plain(&start)
            )));
        };
        let (key, value) = (key.trim(), value.trim());
        let value = match value.strip_prefix('"') {
            Some(quoted) => quoted
                .strip_suffix('"')
                .filter(|inner| !inner.contains('"'))
                .ok_or_else(|| corrupt(format!("{}: its value has no end", plain(key))))?,
            None => value,
        };
        // `value` is a part of `text`, which is `line` without what surrounds it.
        let before = (value.as_ptr() as usize).wrapping_sub(text.as_ptr() as usize);
        let before = text.get(..before).map_or(0, block::name::len);
        let from = at + line.len() - line.trim_ascii_start().len() + before;
        self.set(key, value, from)
    }

    fn set(&mut self, key: &str, value: &str, from: usize) -> Result<()> {
        let twice = || corrupt(format!("{}: it is there already", plain(key)));
        let hex = || {
            let digits = (1..=8).contains(&value.len());
            let number = u32::from_str_radix(value, 16).ok();
            number
                .filter(|_| digits && !value.starts_with('+'))
                .ok_or_else(|| corrupt(format!("{}: not 1 to 8 hexadecimal digits", plain(key))))
        };
        match key.to_ascii_lowercase().as_str() {
            "version" => {
                if !matches!(value, "1" | "2" | "3") {
                    return Err(Error::unsupported(format!(
                        "version {}: 1 to 3 are known",
                        plain(value)
                    )));
                }
            }
            "cid" => {
                let cid = (hex()?, from..from + value.len());
                if self.cid.replace(cid).is_some() {
                    return Err(twice());
                }
            }
            "parentcid" => {
                if self.parent_cid.replace(hex()?).is_some() {
                    return Err(twice());
                }
            }
            "createtype" => {
                if self.create_type.replace(value.to_owned()).is_some() {
                    return Err(twice());
                }
            }
            "parentfilenamehint" => {
                check_name(value)?;
                if self.parent.replace(value.to_owned()).is_some() {
                    return Err(twice());
                }
            }
            _ => self.others.push((key.to_owned(), value.to_owned())),
        }
        Ok(())
    }

    fn end(self) -> Result<Descriptor> {
        let lacks = |key: &str| corrupt(format!("the descriptor has no {key}"));
        let (cid, cid_at) = self.cid.ok_or_else(|| lacks("CID"))?;
        Ok(Descriptor {
            cid,
            cid_at,
            parent_cid: self.parent_cid.ok_or_else(|| lacks("parentCID"))?,
            create_type: self.create_type.unwrap_or_default(),
            parent: self.parent,
            extents: self.extents,
            others: self.others,
        })
    }
}

/// What follows the access in a line of the extent description.
fn extent(access: Access, rest: &str) -> Result<ExtentLine> {
    let (sectors, rest) = word(rest);
    let sectors: u64 = match sectors.parse() {
        Ok(sectors) if (1..=limits::DISK_BYTES_MAX / 512).contains(&sectors) => sectors,
        _ => {
            return Err(corrupt(format!(
                "extent: '{}' is no number of sectors",
                plain(sectors)
            )));
        }
    };
    let (kind, rest) = word(rest);
    let known = ExtentType::NAMES.iter().find(|(_, name)| *name == kind);
    let Some((kind, _)) = known.copied() else {
        return Err(Error::unsupported(format!(
            "extent type '{}': FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE and SESPARSE are known",
            plain(kind)
        )));
    };
    let mut line = ExtentLine {
        access,
        sectors,
        kind,
        file: String::new(),
        offset: 0,
    };
    if kind == ExtentType::Zero {
        return Ok(line);
    }
    let quoted = rest.trim_start().strip_prefix('"');
    let Some((file, rest)) = quoted.and_then(|rest| rest.split_once('"')) else {
        return Err(corrupt("extent: its file's name is not in quotes"));
    };
    check_name(file)?;
    file.clone_into(&mut line.file);
    let (offset, more) = word(rest);
    if kind == ExtentType::Flat {
        line.offset = match offset.parse() {
            Ok(offset) if offset <= limits::DISK_BYTES_MAX / 512 - sectors => offset,
            _ => {
                return Err(corrupt(format!(
                    "extent: '{}' is no sector of a file that it could begin with",
                    plain(offset)
                )));
            }
        };
    } else if !offset.is_empty() || !more.trim().is_empty() {
        return Err(corrupt(format!("extent: a {kind} extent has no offset")));
    }
    Ok(line)
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || block::name::len(name) > limits::FILE_NAME_BYTES_MAX {
        return Err(corrupt(format!(
            "a name of {} bytes: it has 1 to {}",
            block::name::len(name),
            limits::FILE_NAME_BYTES_MAX
        )));
    }
    Ok(())
}

/// The first word of `text`, and what follows.
fn word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once([' ', '\t']).unwrap_or((text, ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use block::ErrorKind;

    const HEAD: &str = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n";

    #[test]
    fn reads_what_programs_write() {
        let text = format!(
            "{HEAD}createType=\"custom\"\r\nisNativeSnapshot=\"no\"\n\n# Extent description\n\
             RW 4192256 SPARSE \"a b-s001.vmdk\"\nRDONLY 63 ZERO\nRW 8 FLAT \"/x/y-f.vmdk\" 128\n\
             RW 16 VMFS \"v.vmdk\"\nparentFileNameHint=\"../base.vmdk\"\nddb.adapterType = \"ide\"\n\0junk = \""
        );
        let read = Descriptor::parse(text.as_bytes()).unwrap();
        assert_eq!((read.cid, read.parent_cid), (0xffff_fffe, NO_PARENT));
        assert_eq!(text.get(read.cid_at.clone()), Some("fffffffe"));
        assert_eq!(read.create_type, "custom");
        assert_eq!(read.parent.as_deref(), Some("../base.vmdk"));
        assert_eq!(read.value("DDB.adaptertype"), Some("ide"));
        let extents: Vec<_> = read
            .extents
            .iter()
            .map(|e| (e.access, e.sectors, e.kind, e.file.as_str(), e.offset))
            .collect();
        assert_eq!(
            extents,
            [
                (
                    Access::Rw,
                    4_192_256,
                    ExtentType::Sparse,
                    "a b-s001.vmdk",
                    0
                ),
                (Access::RdOnly, 63, ExtentType::Zero, "", 0),
                (Access::Rw, 8, ExtentType::Flat, "/x/y-f.vmdk", 128),
                (Access::Rw, 16, ExtentType::Vmfs, "v.vmdk", 0),
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (line, why) in [
            ("nonsense", "line 5: 'nonsense' is neither"),
            (
                "RW x SPARSE \"a\"",
                "line 5: extent: 'x' is no number of sectors",
            ),
            ("RW 0 SPARSE \"a\"", "'0' is no number of sectors"),
            ("RW 99999999999999999999 ZERO", "is no number of sectors"),
            ("RW 8 SPARSE a", "not in quotes"),
            ("RW 8 SPARSE \"\"", "a name of 0 bytes"),
            ("RW 8 SPARSE \"a\" 0", "has no offset"),
            ("RW 8 FLAT \"a\"", "'' is no sector"),
            ("RW 8 FLAT \"a\" -1", "'-1' is no sector"),
            ("RW 8 VMFSRDM \"a\"", "extent type 'VMFSRDM'"),
            ("CID=1", "CID: it is there already"),
            ("parentCID=+1", "not 1 to 8 hexadecimal"),
            ("parentCID=123456789", "not 1 to 8 hexadecimal"),
            ("createType=\"a", "its value has no end"),
            ("version=4", "version 4: 1 to 3"),
        ] {
            let error = Descriptor::parse(format!("{HEAD}{line}\n").as_bytes()).unwrap_err();
            assert!(error.to_string().contains(why), "{line}: {error}");
        }
        for (text, why) in [("version=1\n", "no CID"), ("CID=1\n", "no parentCID")] {
            let error = Descriptor::parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let many = HEAD.to_owned() + &"RW 8 ZERO\n".repeat(EXTENTS_MAX + 1);
        let error = Descriptor::parse(many.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("1024 extents"), "{error}");
        let long = vec![b'\n'; DESCRIPTOR_BYTES_MAX as usize + 1];
        assert!(Descriptor::parse(&long).is_err());
    }

    #[test]
    fn a_descriptor_shows_itself() {
        for (start, shows) in [
            (&b"# Disk DescriptorFile\nversion=1\n"[..], true),
            (b"# Disk DescriptorFile", true),
            (b"# other\n \r\nversion=3\r\nCID=1", true),
            (b"version=1\n", true),
            (b"version=4\n", false),
            (b"version=1", false),
            (b"# Disk\nfoo\nversion=1\n", false),
            (b"", false),
        ] {
            assert_eq!(Descriptor::shows(start), shows, "{start:?}");
        }
    }
}
