//! Names of files as text.
//!
//! To the host a file's name is bytes, and images store names as bytes too: most are UTF-8, and some are not (a disk that came from
//! a system with another encoding). Names go through text all the same: between options, in messages, behind the words of a
//! command line. So each byte that is not part of UTF-8 is a character there, one of U+10FF80 to U+10FFFF, which nobody uses
//! (Python's `surrogateescape` is the same, with characters that Rust's text cannot have). A name that does use them has
//! each of their bytes written so: two names never become the same text, and [`path`] is what [`text`] was made of.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

/// What a byte from 0x80 on is counted from.
const BASE: u32 = 0x10_ff00;

fn stands_for(c: char) -> Option<u8> {
    // Of the last plane's last characters the lowest byte is the one.
    (u32::from(c) >= BASE + 0x80).then_some(u32::from(c) as u8)
}

fn escape(bytes: &[u8]) -> impl Iterator<Item = char> + '_ {
    bytes
        .iter()
        .filter_map(|byte| char::from_u32(BASE + u32::from(*byte)))
}

/// The name as text.
pub fn text(name: impl AsRef<OsStr>) -> String {
    of_bytes(name.as_ref().as_bytes())
}

/// The name of these bytes as text.
pub fn of_bytes(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            match stands_for(c) {
                None => text.push(c),
                Some(_) => text.extend(escape(c.encode_utf8(&mut [0; 4]).as_bytes())),
            }
        }
        text.extend(escape(chunk.invalid()));
    }
    text
}

/// The bytes of the name, or of a message with names in it, that is `text`.
pub fn bytes(text: &str) -> Cow<'_, [u8]> {
    if !text.chars().any(|c| stands_for(c).is_some()) {
        return Cow::Borrowed(text.as_bytes());
    }
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        match stands_for(c) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    Cow::Owned(bytes)
}

/// How many bytes the name has.
pub fn len(text: &str) -> usize {
    bytes(text).len()
}

/// Whether an image can have it for the name of another file, where there is room for `most` bytes.
pub fn fits(text: &str, most: usize) -> bool {
    !text.is_empty() && len(text) <= most && !text.contains('\0')
}

/// Whether all of it is UTF-8.
pub fn is_utf8(text: &str) -> bool {
    !text.chars().any(|c| stands_for(c).is_some()) || std::str::from_utf8(&bytes(text)).is_ok()
}

/// The file that has the name which is `text`.
pub fn path(text: &str) -> PathBuf {
    OsString::from_vec(bytes(text).into_owned()).into()
}

/// `text` for people, as [`std::path::Path::display`] shows names: U+FFFD where something is no UTF-8.
pub fn shown(text: &str) -> Cow<'_, str> {
    match bytes(text) {
        Cow::Borrowed(_) => Cow::Borrowed(text),
        Cow::Owned(bytes) => Cow::Owned(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_name_is_a_text_of_its_own() {
        let names: [&[u8]; 9] = [
            b"",
            b"base.qcow2",
            "gr\u{fc}n".as_bytes(),
            b"gr\xfcn",
            b"\xff\xfe",
            b"\xe2\x82",
            b"\xe2\x82\xac",
            // What a byte would become.
            "\u{10ffff}".as_bytes(),
            "\u{10ff7f}".as_bytes(),
        ];
        let texts: HashSet<String> = names.iter().map(|name| of_bytes(name)).collect();
        assert_eq!(texts.len(), names.len());
        for name in names {
            assert_eq!(&*bytes(&of_bytes(name)), name);
        }
        assert_eq!(text("gr\u{fc}n"), "gr\u{fc}n");
        assert_eq!(path(&of_bytes(b"a\xff")).as_os_str().as_bytes(), b"a\xff");
        assert_eq!(shown(&of_bytes(b"a\xff.raw")), "a\u{fffd}.raw");
    }

    #[test]
    fn every_byte_comes_back() {
        for byte in 0..=u8::MAX {
            let name = [b'a', byte, b'b', byte];
            assert_eq!(*bytes(&of_bytes(&name)), name);
        }
    }
}
