//! Headers of requests (`doc/proto.md`, "Compact request message", "Extended request message").
//!
//! ```text
//!   0 magic · 4 command flags · 6 type · 8 cookie · 16 offset · 24 length (4 bytes; extended: 8)
//! ```

use crate::proto::{EXTENDED_REQUEST_MAGIC, Fields, REQUEST_MAGIC, Style};

/// Bytes of the longest header.
pub const HEADER_BYTES_MAX: usize = 32;

/// A request's header, taken apart but not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Command flags.
    pub flags: u16,
    /// Type.
    pub kind: u16,
    /// What the replies repeat.
    pub cookie: u64,
    /// First byte of the export.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// The first word is not a request's: what follows cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMagic;

impl Header {
    /// Bytes of a header.
    pub fn size(style: Style) -> usize {
        if style == Style::Extended { 32 } else { 28 }
    }

    /// Whether that command flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn magic(style: Style) -> u32 {
        match style {
            Style::Extended => EXTENDED_REQUEST_MAGIC,
            _ => REQUEST_MAGIC,
        }
    }

    /// Takes a header off the front of `input`; `None` when it is not all there.
    pub fn parse(style: Style, input: &[u8]) -> Option<Result<Header, BadMagic>> {
        let mut fields = Fields(input);
        if fields.u32()? != Self::magic(style) {
            return Some(Err(BadMagic));
        }
        Some(Ok(Header {
            flags: fields.u16()?,
            kind: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            len: match style {
                Style::Extended => fields.u64()?,
                _ => u64::from(fields.u32()?),
            },
        }))
    }

    /// Writes the header to the front of `to`; how many bytes it has, [`Header::size`]. The length of a compact one has
    /// 32 bits: whoever sends it sees to that.
    pub fn put(&self, style: Style, to: &mut [u8; HEADER_BYTES_MAX]) -> usize {
        let len = match style {
            Style::Extended => self.len,
            // Its lower half comes last, which is cut off: so the upper one has the number.
            _ => self.len << 32,
        };
        let fields: [&[u8]; 6] = [
            &Self::magic(style).to_be_bytes(),
            &self.flags.to_be_bytes(),
            &self.kind.to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
            &len.to_be_bytes(),
        ];
        let bytes = fields.into_iter().flatten();
        to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
        Self::size(style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for style in [Style::Simple, Style::Structured, Style::Extended] {
            let header = Header {
                flags: 0x0102,
                kind: 0x0304,
                cookie: 0x1112_1314_1516_1718,
                offset: 0x2122_2324_2526_2728,
                len: 0x3132_3334,
            };
            let mut bytes = [0; HEADER_BYTES_MAX];
            let size = header.put(style, &mut bytes);
            assert_eq!(size, Header::size(style));
            assert_eq!(Header::parse(style, &bytes[..size]), Some(Ok(header)));
            assert_eq!(Header::parse(style, &bytes[..size - 1]), None);
        }
        let mut bytes = [0; HEADER_BYTES_MAX];
        let header = Header {
            flags: 1,
            kind: 1,
            cookie: 2,
            offset: 3,
            len: 4,
        };
        header.put(Style::Simple, &mut bytes);
        let hex: String = bytes[..28].iter().map(|b| format!("{b:02x}")).collect();
        let expected = "25609513 0001 0001 0000000000000002 0000000000000003 00000004";
        assert_eq!(hex, expected.replace(' ', ""));
    }
}
