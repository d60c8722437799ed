//! Sizes as people write and read them: `20G`, `64K`, `1.5 GiB`.

use crate::{Error, Result};

const UNITS: [(char, u32); 6] = [
    ('K', 10),
    ('M', 20),
    ('G', 30),
    ('T', 40),
    ('P', 50),
    ('E', 60),
];

/// Parses a size in bytes: a number with an optional binary unit `k K M G T P E`
/// (and `KiB`, `MiB`, … likewise), or `b`/`B` for bytes; fractions are allowed
/// with a unit (`1.5G`), as in qemu-img.
pub fn parse(text: &str) -> Result<u64> {
    let wrong = || {
        Error::invalid(format!(
            "'{text}' is not a size: give bytes, or a number with K, M, G, T, P or E (20G)"
        ))
    };
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits_end);
    let shift = match unit.trim_end_matches("iB") {
        "" | "b" | "B" if !unit.ends_with("iB") => 0,
        one if one.len() == 1 => {
            let letter = one.chars().next().map(|c| c.to_ascii_uppercase());
            UNITS
                .iter()
                .find(|(name, _)| Some(*name) == letter)
                .ok_or_else(wrong)?
                .1
        }
        _ => return Err(wrong()),
    };
    let too_large = || Error::invalid(format!("'{text}' does not fit 64 bits"));
    match number.split_once('.') {
        None => {
            let value: u64 = number.parse().map_err(|_| wrong())?;
            value.checked_mul(1 << shift).ok_or_else(too_large)
        }
        Some((whole, fraction)) => {
            if shift == 0 || whole.is_empty() || fraction.is_empty() || fraction.len() > 15 {
                return Err(wrong());
            }
            let whole: u64 = whole.parse().map_err(|_| wrong())?;
            let numerator: u128 = fraction.parse().map_err(|_| wrong())?;
            let denominator = 10u128.pow(fraction.len() as u32);
            let part = (numerator << shift) / denominator;
            let bytes = (u128::from(whole) << shift) + part;
            u64::try_from(bytes).map_err(|_| too_large())
        }
    }
}

/// `bytes` for people, in the largest binary unit that keeps it at or above
/// one: `20 GiB`, `1.5 MiB`, `512 B`.
pub fn human(bytes: u64) -> String {
    for (name, shift) in UNITS.iter().rev() {
        let unit = 1u64 << shift;
        if bytes >= unit {
            if bytes.is_multiple_of(unit) {
                return format!("{} {name}iB", bytes / unit);
            }
            // Three significant digits say enough; exact figures are in --json.
            let value = bytes as f64 / unit as f64;
            let decimals = match value {
                v if v < 10.0 => 2,
                v if v < 100.0 => 1,
                _ => 0,
            };
            let text = format!("{value:.decimals$}");
            let text = if text.contains('.') {
                text.trim_end_matches('0').trim_end_matches('.')
            } else {
                &text
            };
            return format!("{text} {name}iB");
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_qemu_img_parses() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("64K", 65536),
            ("64k", 65536),
            ("64KiB", 65536),
            ("20G", 20 << 30),
            ("1.5M", 3 << 19),
            ("0.5T", 1 << 39),
            ("15E", 15 << 60),
        ] {
            assert_eq!(parse(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in [
            "",
            "G",
            "-1",
            "1Q",
            "1.5",
            ".5G",
            "1.G",
            "16E",
            "1 G",
            "1GG",
            "1iB",
            "0x10",
            "99999999999999999999",
            "1.0000000000000000001G",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shows_sizes_as_people_say_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (65536, "64 KiB"),
            (20 << 30, "20 GiB"),
            (3 << 19, "1.5 MiB"),
            (1025, "1 KiB"),
            (123_456_789, "118 MiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
