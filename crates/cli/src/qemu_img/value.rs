//! What qemu-img prints of structured values: JSON, and the same for people.
//!
//! QEMU keeps an object's members in a hash table of 512 buckets and prints them bucket by bucket. Scripts compare whole
//! outputs, so the order is kept: [`bucket`] is where a name falls.

use serde_json::{Map, Value};
use std::{cmp::Reverse, fmt::Write as _};

/// Buckets of QEMU's tables.
const BUCKETS: u32 = 512;

/// In which bucket QEMU keeps `name` (`qdict` of its `qobject`, with the hash of gdbm).
fn bucket(name: &str) -> u32 {
    let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
    let mut value = 0x238F_13AFu32.wrapping_mul(len);
    for (at, byte) in (0u32..).zip(name.bytes()) {
        value = value.wrapping_add(u32::from(byte) << (at * 5 % 24));
    }
    1_103_515_243u32.wrapping_mul(value).wrapping_add(12345) % BUCKETS
}

/// The members of an object in QEMU's order.
fn members(object: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut members: Vec<_> = object.iter().collect();
    // In a bucket the member that was put in last comes first. The only two that share one among all that is printed
    // are `children`, which comes last, and `backing-filename-format`.
    members.sort_by_key(|(name, _)| (bucket(name), Reverse(*name)));
    members
}

/// `value` as QEMU's pretty JSON, with a line's end.
pub fn json(value: &Value) -> String {
    let mut text = String::new();
    put(&mut text, value, 0);
    text.push('\n');
    text
}

/// `object` as QEMU's JSON in one line.
pub fn compact(object: &Map<String, Value>) -> String {
    let mut text = "{".to_owned();
    for (nth, (name, value)) in members(object).into_iter().enumerate() {
        text.push_str(if nth > 0 { ", " } else { "" });
        string(&mut text, name);
        text.push_str(": ");
        match value {
            Value::Object(object) => text.push_str(&compact(object)),
            Value::String(value) => string(&mut text, value),
            other => text.push_str(&other.to_string()),
        }
    }
    text + "}"
}

fn put(text: &mut String, value: &Value, depth: usize) {
    let line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.extend(std::iter::repeat_n("    ", depth));
    };
    match value {
        Value::Object(object) => {
            text.push('{');
            for (nth, (name, value)) in members(object).into_iter().enumerate() {
                text.push_str(if nth > 0 { "," } else { "" });
                line(text, depth + 1);
                string(text, name);
                text.push_str(": ");
                put(text, value, depth + 1);
            }
            line(text, depth);
            text.push('}');
        }
        Value::Array(values) => {
            text.push('[');
            for (nth, value) in values.iter().enumerate() {
                text.push_str(if nth > 0 { "," } else { "" });
                line(text, depth + 1);
                put(text, value, depth + 1);
            }
            line(text, depth);
            text.push(']');
        }
        Value::String(value) => string(text, value),
        other => text.push_str(&other.to_string()),
    }
}

/// A JSON string as QEMU writes it: all that is not ASCII as `\uXXXX`.
pub fn string(text: &mut String, value: &str) {
    text.push('"');
    for c in block::name::shown(value).chars() {
        match c {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(text, "\\u{unit:04X}");
                }
            }
        }
    }
    text.push('"');
}

/// The members of `object` for people, indented by `depth` steps.
pub fn human(object: &Map<String, Value>, depth: usize) -> String {
    let mut text = String::new();
    for (name, value) in members(object) {
        entry(
            &mut text,
            &format!("{}:", name.replace('-', " ")),
            value,
            depth,
        );
    }
    text
}

fn entry(text: &mut String, name: &str, value: &Value, depth: usize) {
    text.extend(std::iter::repeat_n("    ", depth));
    text.push_str(name);
    match value {
        Value::Object(object) => {
            text.push('\n');
            text.push_str(&human(object, depth + 1));
        }
        Value::Array(values) => {
            text.push('\n');
            for (nth, value) in values.iter().enumerate() {
                entry(text, &format!("[{nth}]:"), value, depth + 1);
            }
        }
        Value::String(value) => {
            text.push(' ');
            text.push_str(&block::plain(value));
            text.push('\n');
        }
        other => {
            text.push_str(&format!(" {other}\n"));
        }
    }
}

/// `bytes` as QEMU shows sizes: three significant digits and a binary unit.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // From 1000 of a unit on the next one is taken.
    let scaled = bytes as f64 * 1024.0 / 1000.0;
    let exponent = match scaled {
        0.0 => 0,
        scaled => scaled.log2().floor() as usize,
    };
    let unit = (exponent / 10).min(UNITS.len() - 1);
    let number = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let name = UNITS.get(unit).copied().unwrap_or_default();
    format!("{} {name}B", significant(number))
}

/// C's `%0.3g`.
fn significant(number: f64) -> String {
    let text = format!("{number:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if exponent >= 3 {
        let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
        return format!("{mantissa}e+{exponent:02}");
    }
    let fixed = format!("{number:.*}", usize::try_from(2 - exponent).unwrap_or(0));
    match fixed.contains('.') {
        true => fixed.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => fixed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sizes_are_shown_as_qemu_does() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (2560, "2.5 KiB"),
            (197_120, "192 KiB"),
            (1_265_664, "1.21 MiB"),
            (10 << 20, "10 MiB"),
            (1 << 40, "1 TiB"),
            ((1 << 63) - 512, "8 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn members_have_the_order_of_qemus_hash_table() {
        let value = json!({
            "virtual-size": 1, "filename": "é\"", "format": "raw", "children": [], "actual-size": 2,
            "dirty-flag": false,
        });
        assert_eq!(
            json(&value),
            "{\n    \"children\": [\n    ],\n    \"virtual-size\": 1,\n    \"filename\": \"\\u00E9\\\"\",\n    \
             \"format\": \"raw\",\n    \"actual-size\": 2,\n    \"dirty-flag\": false\n}\n"
        );
    }
}
