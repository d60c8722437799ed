//! GUIDs, as Microsoft lays them out: the first three of their five numbers are little-endian.

use block::Result;
use std::fmt;

/// A GUID as it is on disk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Guid(pub [u8; 16]);

/// The order in which the bytes are shown.
const SHOWN: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Guid {
    /// None: of a log without entries.
    pub const NONE: Self = Self([0; 16]);

    /// The GUID whose digits are shown as `digits`.
    pub(super) const fn new(digits: u128) -> Self {
        let shown = digits.to_be_bytes();
        let mut bytes = [0; 16];
        let mut at = 0;
        while at < 16 {
            bytes[SHOWN[at]] = shown[at];
            at += 1;
        }
        Self(bytes)
    }

    /// A new one (RFC 4122, version 4).
    ///
    /// # Errors
    ///
    /// When the kernel gives no random numbers.
    pub fn random() -> Result<Self> {
        let mut id = [0; 16];
        crypto::random(&mut id)?;
        id[7] = id[7] & 0x0f | 0x40;
        id[8] = id[8] & 0x3f | 0x80;
        Ok(Self(id))
    }

    /// The one at byte `at` of a structure; none behind its end.
    pub(super) fn at(bytes: &[u8], at: usize) -> Self {
        let field = bytes.get(at..at.saturating_add(16));
        Self(field.and_then(|f| f.try_into().ok()).unwrap_or_default())
    }

    /// The one that `text` shows, in braces or without, in digits of either case.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_matches(|c| c == '{' || c == '}');
        let groups: Vec<&str> = text.split('-').collect();
        let lens: Vec<usize> = groups.iter().map(|group| group.len()).collect();
        let hex = text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit());
        if lens != [8, 4, 4, 4, 12] || !hex {
            return None;
        }
        let digits = u128::from_str_radix(&groups.concat(), 16).ok()?;
        Some(Self::new(digits))
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, from) in SHOWN.iter().enumerate() {
            if [4, 6, 8, 10].contains(&at) {
                f.write_str("-")?;
            }
            write!(f, "{:02x}", self.0[*from])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_and_bytes_belong_together() {
        let bat = Guid::new(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
        assert_eq!(bat.0[..8], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42]);
        let shown = bat.to_string();
        assert_eq!(shown, "2dc27766-f623-4200-9d64-115e9bfd4a08");
        let braces = format!("{{{}}}", shown.to_uppercase());
        assert_eq!(Guid::parse(&braces), Some(bat));
        for text in [
            "",
            "{}",
            "2dc27766-f623-4200-9d64-115e9bfd4a0",
            "+dc27766-f623-4200-9d64-115e9bfd4a08",
        ] {
            assert_eq!(Guid::parse(text), None, "{text}");
        }
    }
}
