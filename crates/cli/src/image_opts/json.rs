//! JSON as QEMU takes it in place of options: strings may stand between single quotes, and a name stands once.

use anyhow::{Result, anyhow, bail};
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;
use std::collections::BTreeMap;
use std::fmt;

/// Puts the members of the object `text` into `options`, those of objects within with a dot between.
///
/// # Errors
///
/// In QEMU's words, for what is no object.
pub fn parse(text: &str, options: &mut BTreeMap<String, String>) -> Result<()> {
    if text.trim().is_empty() {
        bail!("Could not parse the JSON options: Expecting a JSON value");
    }
    // Nesting is bounded by the parser.
    let value = serde_json::from_str::<Value>(&plain(text)).map_err(|error| {
        let why = match error.classify() {
            Category::Eof => "JSON parse error, premature EOI".to_owned(),
            _ if error.to_string().starts_with(DUPLICATE) => {
                format!("JSON parse error, {DUPLICATE}")
            }
            _ => format!("JSON parse error, {error}"),
        };
        anyhow!("Could not parse the JSON options: {why}")
    })?;
    match value {
        Value::Object(_) => flatten(options, "", value),
        _ => bail!("Invalid JSON object given"),
    }
}

/// What is said of a name that is there twice.
const DUPLICATE: &str = "duplicate key";

/// A value, all but structures as the text that options have for it.
enum Value {
    Object(Vec<(String, Value)>),
    List(Vec<Value>),
    Text(String),
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, on: bool) -> Result<Value, E> {
        Ok(Value::Text(if on { "on" } else { "off" }.to_owned()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Text(number.to_string()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Text(number.to_string()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Text(number.to_string()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Text(String::new()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Value::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members: Vec<(String, Value)> = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        while let Some((name, value)) = map.next_entry::<String, Value>()? {
            if !seen.insert(name.clone()) {
                return Err(de::Error::custom(DUPLICATE));
            }
            members.push((name, value));
        }
        Ok(Value::Object(members))
    }
}

/// `text` with double quotes around strings.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', Some(_)) => match chars.next() {
                Some('\'') => plain.push('\''),
                Some(next) => plain.extend([c, next]),
                None => plain.push(c),
            },
            ('"' | '\'', None) => {
                quote = Some(c);
                plain.push('"');
            }
            (_, Some(open)) if c == open => {
                quote = None;
                plain.push('"');
            }
            ('"', Some(_)) => plain.push_str("\\\""),
            _ => plain.push(c),
        }
    }
    plain
}

/// Puts `value` under `key`, members of objects with a dot between.
fn flatten(options: &mut BTreeMap<String, String>, key: &str, value: Value) -> Result<()> {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                let key = match key {
                    "" => name,
                    key => format!("{key}.{name}"),
                };
                flatten(options, &key, value)?;
            }
        }
        Value::Text(text) => {
            options.insert(key.to_owned(), text);
        }
        // As QEMU does: by their numbers.
        Value::List(values) => {
            for (nth, value) in values.into_iter().enumerate() {
                flatten(options, &format!("{key}.{nth}"), value)?;
            }
        }
    }
    Ok(())
}
