//! The parent locator ([MS-VHDX] 2.6.2.6): pairs of texts that say which file a differencing image lies over.
//!
//! ```text
//!   0 type  18 pairs │ 20 … of 12 bytes: 0 key's offset  4 value's offset  8 key's length  10 value's length │ texts
//! ```
//!
//! | key | value |
//! |---|---|
//! | `parent_linkage`, `parent_linkage2` | the parent's DataWriteGuid: one of the two, where both are there |
//! | `relative_path` | `..\base.vhdx`, from the image's directory |
//! | `volume_path` | `\\?\Volume{…}\vm\base.vhdx` |
//! | `absolute_win32_path` | `\\?\c:\vm\base.vhdx` |
//!
//! The paths are tried in this order. Of a volume or a drive nothing is known here: what is behind it is the path.

use super::guid::Guid;
use crate::words::{read_u16_le, read_u32_le};
use block::{Error, Result};

/// The type that the specification knows.
const VHDX: Guid = Guid::new(0xb04a_efb7_d19e_4a81_b789_25b8_e944_5913);

/// Pairs that are read.
const PAIRS_MAX: u16 = 256;

/// Bytes of a path that is read: 4096 UTF-16 units.
pub const NAME_BYTES_MAX: usize = 8192;

/// Keys with paths, the best first.
const PATHS: [&str; 3] = ["relative_path", "volume_path", "absolute_win32_path"];

/// Keys with the parent's identity.
const LINKAGES: [&str; 2] = ["parent_linkage", "parent_linkage2"];

/// What an image says of its parent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locator {
    /// All pairs in the file's order.
    pub pairs: Vec<(String, String)>,
}

impl Locator {
    /// That of a new image over the parent that is called `name` from the image's directory, or absolutely where
    /// `name` begins so, and `absolute` from everywhere.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Invalid`] for a name that the format cannot hold.
    pub fn new(parent: Guid, name: &str, absolute: &str) -> Result<Self> {
        let windows = |name: &str| -> Result<String> {
            if name.contains('\\') || name.encode_utf16().count() * 2 > NAME_BYTES_MAX {
                return Err(Error::invalid(format!(
                    "the parent's name '{}' has a backslash, or more than {NAME_BYTES_MAX} bytes in UTF-16: the format \
                     cannot hold it",
                    name.escape_default()
                )));
            }
            if !block::name::is_utf8(name) {
                return Err(Error::unsupported(format!(
                    "the parent's name '{}' is not UTF-8: the format cannot hold it; give the file another name",
                    block::name::shown(name).escape_default()
                )));
            }
            Ok(name.replace('/', "\\"))
        };
        let mut pairs = vec![(LINKAGES[0].to_owned(), format!("{{{parent}}}"))];
        if !name.starts_with('/') {
            let relative = match name.starts_with("../") {
                true => name.to_owned(),
                false => format!("./{}", name.trim_start_matches("./")),
            };
            pairs.push((PATHS[0].to_owned(), windows(&relative)?));
        }
        pairs.push((PATHS[2].to_owned(), windows(absolute)?));
        Ok(Self { pairs })
    }

    /// Reads an item.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] for one that contradicts itself, [`block::ErrorKind::Unsupported`] for another type
    /// of locator.
    pub(super) fn parse(item: &[u8]) -> Result<Self> {
        let kind = Guid::at(item, 0);
        if kind != VHDX {
            return Err(Error::unsupported(format!(
                "its type is {kind}: known is {VHDX}, of a parent in a VHDX file"
            )));
        }
        let count = read_u16_le(item, 18).unwrap_or(0);
        if count > PAIRS_MAX {
            return Err(Error::unsupported(format!(
                "has {count} pairs at byte 18: the most that is read is {PAIRS_MAX}"
            )));
        }
        let mut pairs: Vec<(String, String)> = Vec::new();
        for index in 0..usize::from(count) {
            let at = 20 + index * 12;
            let text = |what: &str, offset: usize, len: usize| -> Result<String> {
                let start = read_u32_le(item, offset).unwrap_or(0) as usize;
                let len = usize::from(read_u16_le(item, len).unwrap_or(0));
                let bytes = item.get(start..start + len).filter(|b| !b.is_empty());
                let bytes = bytes.filter(|_| start > 0 && len <= NAME_BYTES_MAX);
                let text = bytes.and_then(|bytes| {
                    let (units, rest) = bytes.as_chunks::<2>();
                    let units = units.iter().map(|unit| u16::from_le_bytes(*unit));
                    let text: std::result::Result<String, _> = char::decode_utf16(units).collect();
                    text.ok().filter(|_| rest.is_empty())
                });
                text.ok_or_else(|| {
                    Error::corrupt(format!(
                        "pair {index}: its {what}, of {len} bytes at byte {start:#x}, is no UTF-16 text of up to \
                         {NAME_BYTES_MAX} bytes within the item's {}",
                        item.len()
                    ))
                })
            };
            let key = text("key", at, at + 8)?;
            let value = text("value", at + 4, at + 10)?;
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(Error::corrupt(format!(
                    "has key '{}' twice",
                    key.escape_default()
                )));
            }
            pairs.push((key, value));
        }
        Ok(Self { pairs })
    }

    /// The item's bytes.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Invalid`] for what the format cannot hold.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let too_long = || Error::invalid("the parent's names do not fit into a parent locator");
        let count = u16::try_from(self.pairs.len()).map_err(|_| too_long())?;
        let mut bytes = VHDX.0.to_vec();
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&count.to_le_bytes());
        let mut texts: Vec<u8> = Vec::new();
        let texts_at = bytes.len() + self.pairs.len() * 12;
        for (key, value) in &self.pairs {
            let mut place = |text: &str| -> Result<(u32, u16)> {
                let offset = u32::try_from(texts_at + texts.len()).map_err(|_| too_long())?;
                let before = texts.len();
                texts.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
                let len = u16::try_from(texts.len() - before).map_err(|_| too_long())?;
                Ok((offset, len))
            };
            let (key, value) = (place(key)?, place(value)?);
            bytes.extend_from_slice(&key.0.to_le_bytes());
            bytes.extend_from_slice(&value.0.to_le_bytes());
            bytes.extend_from_slice(&key.1.to_le_bytes());
            bytes.extend_from_slice(&value.1.to_le_bytes());
        }
        bytes.append(&mut texts);
        Ok(bytes)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self.pairs.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }

    /// Which DataWriteGuid the parent may have.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Corrupt`] where none is said, or one is no GUID.
    pub fn linkages(&self) -> Result<Vec<Guid>> {
        let mut found = Vec::new();
        for key in LINKAGES {
            let Some(text) = self.get(key) else { continue };
            found.push(Guid::parse(text).ok_or_else(|| {
                Error::corrupt(format!(
                    "parent locator: {key} is '{}', no GUID",
                    text.escape_default()
                ))
            })?);
        }
        match self.get(LINKAGES[0]) {
            Some(_) => Ok(found),
            None => Err(Error::corrupt(format!(
                "parent locator: has no {}: which file is its parent cannot be known",
                LINKAGES[0]
            ))),
        }
    }

    /// The paths as this system has them, the best first.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for name in PATHS.iter().filter_map(|key| path(self.get(key)?)) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// A path of this system in place of one of Windows: without what names a volume or a drive.
fn path(text: &str) -> Option<String> {
    let text = text.trim_end_matches('\0');
    let text = text.strip_prefix(r"\\?\").unwrap_or(text);
    let bytes = text.as_bytes();
    let drive = bytes.get(1) == Some(&b':') && bytes.first().is_some_and(u8::is_ascii_alphabetic);
    let text = if drive {
        text.get(2..)?
    } else if text.starts_with("Volume{") {
        text.find('\\').and_then(|at| text.get(at..))?
    } else {
        text
    };
    let name = text.replace('\\', "/");
    (!name.is_empty() && !name.contains('\0')).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_paths_of_this_system() {
        for (text, name) in [
            (r".\base.vhdx", Some("./base.vhdx")),
            (
                r"..\..\path2\sub3\parent.vhdx",
                Some("../../path2/sub3/parent.vhdx"),
            ),
            (
                r"\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\path2\sub3\parent.vhdx",
                Some("/path2/sub3/parent.vhdx"),
            ),
            (r"\\?\d:\path2\parent.vhdx", Some("/path2/parent.vhdx")),
            (r"\vm\base.vhdx", Some("/vm/base.vhdx")),
            ("c:", None),
            ("Volume{", None),
            ("", None),
            ("a\0b", None),
        ] {
            assert_eq!(path(text).as_deref(), name, "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let parent = Guid::new(0x83ed_0ec3_24c8_49a6_a959_5e4b_f128_8bfb);
        let locator = Locator::new(parent, "sub/bäse.vhdx", "/vm/sub/bäse.vhdx").unwrap();
        let again = Locator::parse(&locator.to_bytes().unwrap()).unwrap();
        assert_eq!(again, locator);
        assert_eq!(again.linkages().unwrap(), [parent]);
        assert_eq!(again.names(), ["./sub/bäse.vhdx", "/vm/sub/bäse.vhdx"]);
        assert_eq!(again.get("relative_path"), Some(r".\sub\bäse.vhdx"));
        assert!(Locator::new(parent, r"a\b", "/a").is_err());
    }

    /// Every field out of range is refused, and nothing panics.
    #[test]
    fn items_that_lie_are_refused() {
        let locator = Locator::new(Guid::random().unwrap(), "base", "/base").unwrap();
        let good = locator.to_bytes().unwrap();
        for (at, field) in [
            (0, &[1u8, 2, 3, 4][..]),
            (18, &[0xff, 0xff]),
            (18, &[255, 0]),
            (20, &[0; 4]),
            (20, &[0xff; 4]),
            (24, &[0xff, 0xff, 0, 0]),
            (28, &[0, 0]),
            (28, &[0xff, 0xff]),
            (30, &[3, 0]),
            (32, &good[20..32]),
        ] {
            let mut bytes = good.clone();
            bytes[at..at + field.len()].copy_from_slice(field);
            assert!(Locator::parse(&bytes).is_err(), "{at} {field:?}");
        }
        for len in 0..good.len() {
            let _ = Locator::parse(&good[..len]);
        }
        let nothing = Locator::default();
        assert!(nothing.linkages().is_err() && nothing.names().is_empty());
        let bad = Locator {
            pairs: vec![("parent_linkage".into(), "{x}".into())],
        };
        assert!(bad.linkages().is_err());
    }
}
