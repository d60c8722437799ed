//! Text from a file, for people.

/// Whether `c` could steer a terminal, begin a line of its own, or turn around the direction in which what follows
/// is read. All that do are below U+10000, but for bytes of [`crate::name`].
pub fn steers(c: char) -> bool {
    let turns =
        matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    // Bytes of a name (`name`) that are control characters to a terminal without UTF-8.
    let is_raw = matches!(c, '\u{10ff80}'..='\u{10ff9f}');
    c.is_control() || turns || is_raw
}

/// `text` with a `?` for each character that [`steers`]: names in images are made by anybody.
pub fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if steers(c) { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_steers_a_terminal() {
        assert_eq!(
            plain("base\x1b[2J.raw\n\u{9b}1m\u{202e}ä"),
            "base?[2J.raw??1m?ä"
        );
        let raw = crate::name::of_bytes(b"a\x9b2J\xff");
        assert_eq!(*crate::name::bytes(&plain(&raw)), *b"a?2J\xff");
    }
}
