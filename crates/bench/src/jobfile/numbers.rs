//! Numbers, times and lists as fio writes them.

use crate::load::shape::Sizes;
use std::time::Duration;

/// A value for reads, writes and trims, parted by commas, of which a part that is left out is the one before it.
pub(super) fn each<T: Clone>(
    text: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Option<[Option<T>; 2]> {
    let mut parts = text.split(',').map(str::trim);
    let one = |part: &str| match part {
        "" => Some(None),
        part => parse(part).map(Some),
    };
    let reads = one(parts.next()?)?;
    let writes = match parts.next() {
        None => reads.clone(),
        Some(part) => one(part)?,
    };
    // That of trims, of which there are none.
    if let Some(part) = parts.next() {
        one(part)?;
    }
    parts.next().is_none().then_some([reads, writes])
}

/// `4k-64k`, as `bsrange` has it.
pub(super) fn range(text: &str) -> Option<Sizes> {
    let (least, most) = text.split_once('-')?;
    Some(Sizes::Range(size(least)?, size(most)?))
}

/// `4k/60:8k/20:16k`, as `bssplit` has it: those without a percentage share what is left of 100.
pub(super) fn split(text: &str) -> Option<Sizes> {
    let mut parts = Vec::new();
    for part in text.split(':') {
        let (bytes, percent) = match part.split_once('/') {
            Some((bytes, "")) => (bytes, None),
            Some((bytes, percent)) => (bytes, Some(percent.parse::<u8>().ok()?)),
            None => (part, None),
        };
        parts.push((size(bytes)?, percent));
    }
    let given: u32 = parts
        .iter()
        .map(|part| u32::from(part.1.unwrap_or(0)))
        .sum();
    let open = parts.iter().filter(|part| part.1.is_none()).count() as u32;
    let left = 100_u32.checked_sub(given)?;
    if open == 0 && left > 0 {
        return None;
    }
    // What does not divide goes to the first of them.
    let mut more = left.checked_rem(open).unwrap_or(0);
    let shared = parts.into_iter().map(|(bytes, percent)| {
        let percent = percent.unwrap_or_else(|| {
            let own = left / open + u32::from(more > 0);
            more = more.saturating_sub(1);
            own as u8
        });
        (bytes, percent)
    });
    Some(Sizes::Split(shared.collect()))
}

/// A number with fio's suffixes where `kb_base` is 1024, its default: `k`, `ki` and `kb` are 1024, `kib` is 1000, as fio 3.33
/// takes them.
pub(super) fn size(text: &str) -> Option<u64> {
    let text = text.to_ascii_lowercase();
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok();
    }
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let (letter, rest) = match suffix.chars().next() {
        None | Some('b') if suffix.len() <= 1 => return Some(number),
        Some(letter) => (letter, &suffix[letter.len_utf8()..]),
        None => return None,
    };
    let power = "kmgtp".find(letter)? as u32 + 1;
    let base: u64 = match rest {
        "" | "b" | "i" => 1024,
        "ib" => 1000,
        _ => return None,
    };
    number.checked_mul(base.checked_pow(power)?)
}

/// A time with fio's suffixes, of `unit` without one.
pub(super) fn time(text: &str, unit: &str) -> Option<Duration> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let us: u64 = match if suffix.is_empty() { unit } else { suffix } {
        "us" | "usec" => 1,
        "ms" | "msec" => 1000,
        "s" | "sec" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return None,
    };
    // A year is for ever.
    let us = number.checked_mul(us)?;
    (us <= 365 * 86_400_000_000).then(|| Duration::from_micros(us))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        let sizes = |text| each(text, size);
        assert_eq!(sizes("4k"), Some([Some(4096), Some(4096)]));
        assert_eq!(sizes("4k,8k,16k"), Some([Some(4096), Some(8192)]));
        assert_eq!(sizes(",8k"), Some([None, Some(8192)]));
        assert_eq!(sizes("4k,8k,x"), None);
        assert_eq!(sizes("4k,8k,1k,1k"), None);
        assert_eq!(range("4k-64k"), Some(Sizes::Range(4096, 65536)));
        assert_eq!(range("4k"), None);
        let parts = |text| match split(text) {
            Some(Sizes::Split(parts)) => Some(parts),
            _ => None,
        };
        assert_eq!(
            parts("4k/30:8k/:1k"),
            Some(vec![(4096, 30), (8192, 35), (1024, 35)])
        );
        assert_eq!(
            parts("4k/90:8k:1k:2k"),
            Some(vec![(4096, 90), (8192, 4), (1024, 3), (2048, 3)])
        );
        assert_eq!(parts("4k"), Some(vec![(4096, 100)]));
        for wrong in ["4k/90", "4k/90:8k/20", "4k/x", "", "4k/300"] {
            assert_eq!(parts(wrong), None, "{wrong}");
        }
    }

    /// As `fio --size=… --bs=8` wrote them.
    #[test]
    fn numbers_are_fios() {
        for (text, bytes) in [
            ("4k", Some(4096)),
            ("4ki", Some(4096)),
            ("4KB", Some(4096)),
            ("4kib", Some(4000)),
            ("1m", Some(1 << 20)),
            ("0x1000", Some(4096)),
            ("4096b", Some(4096)),
            ("512", Some(512)),
            ("4x", None),
            ("", None),
            ("k", None),
            ("99999999999p", None),
        ] {
            assert_eq!(size(text), bytes, "{text}");
        }
        for (text, unit, us) in [
            ("5", "s", Some(5_000_000)),
            ("5", "us", Some(5)),
            ("20ms", "s", Some(20_000)),
            ("1m", "us", Some(60_000_000)),
            ("1w", "s", None),
            ("99999999d", "s", None),
        ] {
            assert_eq!(time(text, unit), us.map(Duration::from_micros), "{text}");
        }
    }
}
