//! The names of a parent (specification: "Parent Locator"), and how XenServer's tools write them.
//!
//! | code | what | as |
//! |---|---|---|
//! | `MACX` | a file URL, `file://./base.vhd` | UTF-8; XenServer escapes nothing in it |
//! | `W2ru` | a path that starts at the image's directory, `.\base.vhd` | UTF-16, little-endian |
//! | `W2ku` | an absolute path; XenServer puts the relative one here too | UTF-16, little-endian |

use super::header::{Header, LOCATORS, Locator};
use block::{Context, Error, Result, Storage, name};
use std::ops::Range;

/// Bytes of the longest name that is read: paths of 4096 UTF-16 units.
pub const NAME_BYTES_MAX: u32 = 8192;

const MACX: [u8; 4] = *b"MACX";
const W2RU: [u8; 4] = *b"W2ru";
const W2KU: [u8; 4] = *b"W2ku";

impl Locator {
    /// Whether its name is one that is read here.
    fn is_path(&self) -> bool {
        [MACX, W2RU, W2KU].contains(&self.code)
    }

    /// Where its name is in the file, if it is one that is read here.
    pub(super) fn name_at(&self) -> Option<Range<u64>> {
        let end = self.offset.checked_add(u64::from(self.len))?;
        let can_be = self.is_path() && self.len <= NAME_BYTES_MAX;
        can_be.then_some(self.offset..end)
    }
}

/// The names that the locators of `header` have, relative ones first; and why others could not be read.
///
/// # Errors
///
/// What reading the file fails with.
pub(super) fn names(
    file: &dyn Storage,
    header: &Header,
    file_bytes: u64,
) -> Result<(Vec<String>, Vec<String>)> {
    let (mut names, mut faults): (Vec<String>, Vec<String>) = Default::default();
    for (index, locator) in header.locators.iter().enumerate() {
        if !locator.is_path() {
            // None, or of a kind that only its own system can follow.
            continue;
        }
        let at = format!(
            "parent locator {index} ({})",
            String::from_utf8_lossy(&locator.code)
        );
        let end = locator.offset.checked_add(u64::from(locator.len));
        if locator.len > NAME_BYTES_MAX || u64::from(locator.len) > locator.space_bytes() {
            faults.push(format!(
                "{at}: has {} bytes in a space of {}: the most is {NAME_BYTES_MAX}",
                locator.len,
                locator.space_bytes()
            ));
            continue;
        }
        if end.is_none_or(|end| end > file_bytes) {
            faults.push(format!(
                "{at}: has {} bytes from byte {:#x} on, but the file ends at byte {file_bytes:#x}",
                locator.len, locator.offset
            ));
            continue;
        }
        let mut bytes = vec![0; locator.len as usize];
        file.read_at(locator.offset, &mut bytes).context(|| &at)?;
        match decode(locator.code, &bytes) {
            Some(name) if !names.contains(&name) => names.push(name),
            Some(_) => {}
            None => faults.push(format!("{at}: is no name of a file")),
        }
    }
    names.sort_by_key(|name| name.starts_with('/'));
    Ok((names, faults))
}

fn decode(code: [u8; 4], bytes: &[u8]) -> Option<String> {
    let name = if code == MACX {
        let text = block::name::of_bytes(bytes);
        text.trim_end_matches('\0')
            .strip_prefix("file://")?
            .to_owned()
    } else {
        let units = bytes.as_chunks::<2>().0.iter();
        let units = units.map(|unit| u16::from_le_bytes(*unit));
        let text: String = char::decode_utf16(units).collect::<Result<_, _>>().ok()?;
        let text = text.trim_end_matches('\0').replace('\\', "/");
        // A drive is what a Windows path begins with, and no file system here has.
        let bytes = text.as_bytes();
        match bytes.get(1) == Some(&b':') && bytes.first().is_some_and(u8::is_ascii_alphabetic) {
            true => text.get(2..).unwrap_or_default().to_owned(),
            false => text,
        }
    };
    (!name.is_empty() && !name.contains('\0')).then_some(name)
}

/// What is known of the parent of a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewParent {
    /// Its name, relative to the image's directory or absolute.
    pub name: String,
    /// Its absolute name.
    pub absolute: String,
    /// Its unique id; [`super::UniqueId::NONE`] for a raw one.
    pub unique_id: super::UniqueId,
    /// When it was changed last, seconds since 2000.
    pub timestamp: u32,
}

impl NewParent {
    /// Puts it into a header, and lays its names out from `at` on. Returns them as they are on disk.
    ///
    /// # Errors
    ///
    /// [`block::ErrorKind::Invalid`] for a name that is too long.
    pub(super) fn put(&self, header: &mut Header, at: u64) -> Result<Vec<u8>> {
        header.parent_id = self.unique_id;
        header.parent_timestamp = self.timestamp;
        let file_name = self.absolute.rsplit('/').next().unwrap_or_default();
        header.parent_name = name::shown(file_name).into_owned();
        let relative = match self.name.starts_with('/') {
            true => None,
            false => Some(format!("./{}", self.name.trim_start_matches("./"))),
        };
        let windows = |name: &str| -> Vec<u8> {
            let name = name.replace('/', "\\");
            name.encode_utf16().flat_map(u16::to_le_bytes).collect()
        };
        let url = format!("file://{}", relative.as_ref().unwrap_or(&self.absolute));
        let mut entries = vec![(MACX, name::bytes(&url).into_owned())];
        // Windows has no such names.
        if name::is_utf8(&self.absolute) {
            entries.push((W2KU, windows(&self.absolute)));
            entries.extend(relative.map(|name| (W2RU, windows(&name))));
        }
        let mut bytes: Vec<u8> = Vec::new();
        debug_assert!(entries.len() <= LOCATORS);
        for (locator, (code, name)) in header.locators.iter_mut().zip(entries) {
            let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
            if len > NAME_BYTES_MAX {
                return Err(Error::invalid(format!(
                    "the parent's name has {len} bytes: the most is {NAME_BYTES_MAX}"
                )));
            }
            let offset = at + bytes.len() as u64;
            bytes.extend_from_slice(&name);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            *locator = Locator {
                code,
                // In bytes, as all programs have it but the specification.
                space: len.next_multiple_of(512),
                len,
                offset,
            };
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_paths_of_this_system() {
        let wide =
            |text: &str| -> Vec<u8> { text.encode_utf16().flat_map(u16::to_le_bytes).collect() };
        for (code, bytes, name) in [
            (MACX, b"file://./base.vhd".to_vec(), Some("./base.vhd")),
            (
                MACX,
                b"file:///sr/base.vhd\0".to_vec(),
                Some("/sr/base.vhd"),
            ),
            (MACX, b"./base.vhd".to_vec(), None),
            (
                MACX,
                b"file://\xff".to_vec(),
                Some(name::of_bytes(b"\xff").as_str()),
            ),
            (MACX, b"file://a\0b".to_vec(), None),
            (W2RU, wide(".\\sub\\base.vhd"), Some("./sub/base.vhd")),
            (W2KU, wide("C:\\vm\\base.vhd\0"), Some("/vm/base.vhd")),
            (W2KU, vec![0, 0xd8], None),
            (W2KU, vec![], None),
        ] {
            assert_eq!(decode(code, &bytes).as_deref(), name, "{bytes:?}");
        }
    }
}
