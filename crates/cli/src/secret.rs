//! Passphrases: where they come from, and which image they are for.
//!
//! `--object secret,id=ID,file=FILE|data=TEXT[,format=raw|base64]` as QEMU's tools have it, named by
//! `--key-secret ID`; or `--key-file FILE` and `--key-fd N`. All bytes count, a newline at the end too.
//!
//! What is read is kept in memory that is wiped. Nothing here prints any of it: not even a wrong
//! argument is shown as it was given.

use anyhow::{Context, Result, bail};
use clap::Args;
use crypto::{PASSPHRASE_BYTES_MAX, Passphrase};
use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt, fs,
    io::Read as _,
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, OnceLock},
};
use zeroize::Zeroizing;

/// An argument that may hold a passphrase: not shown by `Debug`.
#[derive(Clone)]
pub struct Hidden(String);

impl FromStr for Hidden {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// `--object`.
#[derive(Args, Clone, Debug, Default)]
pub struct Objects {
    /// A passphrase for an option that names ID; TEXT can be seen by others on this machine
    #[arg(
        long,
        value_name = "secret,id=ID,file=FILE|data=TEXT[,format=raw|base64]"
    )]
    pub object: Vec<Hidden>,
    /// All of them, once they are read: a pipe gives what it holds but once.
    #[arg(skip)]
    read: OnceLock<Vec<(String, Arc<Passphrase>)>>,
}

/// The passphrases of a chain.
#[derive(Args, Clone, Debug, Default)]
pub struct Keys {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub objects: Objects,
    /// Passphrase of the encrypted image, by the ID of an --object; may be given once for each encrypted image
    /// of the chain, from the top; the last holds for those below too
    #[arg(long, value_name = "ID", conflicts_with_all = ["key_file", "key_fd"])]
    pub key_secret: Vec<String>,
    /// As --key-secret, with all bytes of FILE as the passphrase
    #[arg(long, value_name = "FILE", conflicts_with = "key_fd")]
    pub key_file: Vec<PathBuf>,
    /// As --key-secret, with what is read from descriptor N
    #[arg(long, value_name = "N")]
    pub key_fd: Vec<u32>,
}

impl Keys {
    /// All of them, in their order.
    pub fn read(&self) -> Result<Vec<Arc<Passphrase>>> {
        let mut keys = Vec::new();
        for id in &self.key_secret {
            keys.push(self.objects.find(id)?);
        }
        for path in &self.key_file {
            keys.push(Arc::new(from_file(path, false)?));
        }
        for number in &self.key_fd {
            let path = format!("/proc/self/fd/{number}");
            let key = from_file(Path::new(&path), false).context("--key-fd")?;
            keys.push(Arc::new(key));
        }
        Ok(keys)
    }

    /// The first, where there is one.
    pub fn first(&self) -> Result<Option<Arc<Passphrase>>> {
        Ok(self.read()?.into_iter().next())
    }
}

impl Objects {
    /// Whether there is a secret that `id` names.
    pub fn has(&self, id: &str) -> Result<bool> {
        for object in &self.object {
            if Secret::parse(&object.0)?.id == id {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Reads all of them, whether they are used or not, as QEMU does.
    ///
    /// # Errors
    ///
    /// For what is no secret, what cannot be read, and a second one of the same ID.
    pub fn read_all(&self) -> Result<()> {
        let mut all: Vec<(String, Arc<Passphrase>)> = Vec::new();
        for object in &self.object {
            let secret = Secret::parse(&object.0)?;
            if all.iter().any(|(id, _)| *id == secret.id) {
                return Err(Wrong::Twice(secret.id).into());
            }
            let passphrase = secret.read_named()?;
            all.push((secret.id, Arc::new(passphrase)));
        }
        // Whoever was first read the same.
        let _ = self.read.set(all);
        Ok(())
    }

    /// The passphrase that `id` names.
    pub fn find(&self, id: &str) -> Result<Arc<Passphrase>> {
        if let Some(all) = self.read.get() {
            if let Some((_, passphrase)) = all.iter().find(|(known, _)| known == id) {
                return Ok(Arc::clone(passphrase));
            }
        } else {
            for object in &self.object {
                let secret = Secret::parse(&object.0)?;
                if secret.id == id {
                    return secret.read_named().map(Arc::new);
                }
            }
        }
        bail!("there is no secret '{id}': say --object secret,id={id},file=FILE")
    }
}

/// What a secret has.
const KEYS: [&str; 7] = ["qom-type", "id", "file", "data", "format", "keyid", "iv"];

/// An object as it was given.
struct Secret {
    id: String,
    source: Source,
    base64: bool,
}

enum Source {
    File(PathBuf),
    Data(Zeroizing<String>),
}

/// What is wrong with an object. Nothing of its data is shown.
#[derive(Debug, thiserror::Error)]
pub enum Wrong {
    /// Of another kind.
    #[error("--object: only secrets are known: secret,id=ID,file=FILE")]
    Kind(String),
    /// It has no ID.
    #[error("--object secret: say id=ID and file=FILE or data=TEXT")]
    NoId,
    /// Its ID is none.
    #[error(
        "--object secret: an ID has letters, digits, '-', '.' and '_', and begins with a letter"
    )]
    BadId,
    /// It has neither a file nor data.
    #[error("--object secret: say file=FILE or data=TEXT")]
    Empty,
    /// It has a file and data.
    #[error("--object secret: give one file or data")]
    Both,
    /// Something of it is no pair; what that may be, where it is none of a passphrase.
    #[error("--object secret: something is not key=value (a comma is written twice)")]
    NoPair(Option<String>),
    /// It has no such key.
    #[error("--object secret: it has id, file, data and format (a comma is written twice)")]
    Key(String),
    /// Its format is neither `raw` nor `base64`.
    #[error("--object secret: format must be raw or base64")]
    Form(String),
    /// It is encrypted itself.
    #[error("--object secret: {0} (a secret that is encrypted itself) is not supported")]
    Encrypted(&'static str),
    /// Another one has its ID.
    #[error("--object: there are two with id={0}")]
    Twice(String),
    /// It is JSON that is none.
    #[error("--object: {0}")]
    Json(String),
}

impl Secret {
    fn parse(text: &str) -> Result<Self, Wrong> {
        if text.starts_with('{') {
            return Self::from_json(text);
        }
        let pieces: Vec<Zeroizing<String>> = crate::options::split(text)
            .into_iter()
            .map(Zeroizing::new)
            .collect();
        let mut pairs = Vec::new();
        for (nth, piece) in pieces.iter().enumerate() {
            match piece.split_once('=') {
                Some((key, value)) => pairs.push((key, value)),
                None if nth == 0 => pairs.push(("qom-type", piece.as_str())),
                None => {
                    // What is wrong may be a part of the passphrase: it is not shown.
                    let known = KEYS.contains(&piece.as_str()).then(|| piece.to_string());
                    return Err(Wrong::NoPair(known));
                }
            }
        }
        Self::of(&pairs)
    }

    /// An object as QEMU's JSON has it.
    fn from_json(text: &str) -> Result<Self, Wrong> {
        let parsed: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|error| {
                Wrong::Json(match error.is_eof() {
                    true => "JSON parse error, premature EOI".to_owned(),
                    // Its words may have some of the passphrase.
                    false => format!("JSON parse error at column {}", error.column()),
                })
            })?;
        let mut pairs = Vec::new();
        for (key, value) in parsed {
            let serde_json::Value::String(value) = value else {
                return Err(Wrong::Json(format!(
                    "Invalid parameter type for '{key}', expected: string"
                )));
            };
            pairs.push((key, Zeroizing::new(value)));
        }
        let pairs = pairs
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_str()));
        Self::of(&pairs.collect::<Vec<_>>())
    }

    fn of(pairs: &[(&str, &str)]) -> Result<Self, Wrong> {
        let said = |name: &str| {
            let found = pairs.iter().rev().find(|(key, _)| *key == name);
            found.map(|(_, value)| *value)
        };
        match said("qom-type") {
            Some("secret") => {}
            other => return Err(Wrong::Kind(other.unwrap_or_default().to_owned())),
        }
        let id = said("id").ok_or(Wrong::NoId)?;
        let letters = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if !id.starts_with(|c: char| c.is_ascii_alphabetic()) || !id.chars().all(letters) {
            return Err(Wrong::BadId);
        }
        if let Some((key, _)) = pairs.iter().find(|(key, _)| !KEYS.contains(key)) {
            return Err(Wrong::Key((*key).to_owned()));
        }
        let base64 = match said("format") {
            None | Some("raw") => false,
            Some("base64") => true,
            Some(other) => return Err(Wrong::Form(other.to_owned())),
        };
        for key in ["keyid", "iv"] {
            if said(key).is_some() {
                return Err(Wrong::Encrypted(key));
            }
        }
        let source = match (said("file"), said("data")) {
            (Some(_), Some(_)) => return Err(Wrong::Both),
            (Some(path), None) => Source::File(path.into()),
            (None, Some(data)) => Source::Data(Zeroizing::new(data.to_owned())),
            (None, None) => return Err(Wrong::Empty),
        };
        let id = id.to_owned();
        Ok(Self { id, source, base64 })
    }

    fn read_named(&self) -> Result<Passphrase> {
        self.read().with_context(|| format!("secret '{}'", self.id))
    }

    fn read(&self) -> Result<Passphrase> {
        match &self.source {
            Source::File(path) => from_file(path, self.base64),
            Source::Data(data) => passphrase(Zeroizing::new(data.as_bytes().to_vec()), self.base64),
        }
    }
}

fn from_file(path: &Path, base64: bool) -> Result<Passphrase> {
    let read = || -> Result<Passphrase> {
        // Room for all of it at once: what grows leaves copies behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(PASSPHRASE_BYTES_MAX + 2));
        let most = PASSPHRASE_BYTES_MAX as u64 + 1;
        fs::File::open(path)?.take(most).read_to_end(&mut bytes)?;
        passphrase(bytes, base64)
    };
    read().with_context(|| path.display().to_string())
}

fn passphrase(bytes: Zeroizing<Vec<u8>>, base64: bool) -> Result<Passphrase> {
    let bytes = match base64 {
        true => decode(&bytes).context("it is not base64")?,
        false => bytes,
    };
    Ok(Passphrase::new(bytes)?)
}

/// RFC 4648, section 4; white space is left out.
fn decode(text: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let mut out = Zeroizing::new(Vec::with_capacity(text.len()));
    let (mut bits, mut count, mut padding) = (0u32, 0, 0);
    for byte in text.iter().filter(|b| !b.is_ascii_whitespace()) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                padding += 1;
                continue;
            }
            _ => bail!("there is a character that does not belong there"),
        };
        if padding > 0 {
            bail!("something follows its end");
        }
        bits = bits << 6 | u32::from(value);
        count += 1;
        if count == 4 {
            out.extend_from_slice(&bits.to_be_bytes()[1..]);
            (bits, count) = (0, 0);
        }
    }
    match (count, padding) {
        (0, 0) => {}
        (2, 2) => out.push((bits >> 4) as u8),
        (3, 1) => out.extend_from_slice(&((bits >> 2) as u16).to_be_bytes()),
        _ => bail!("its length is wrong"),
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(texts: &[&str]) -> Objects {
        let object = texts.iter().map(|t| t.parse().unwrap()).collect();
        Objects {
            object,
            ..Objects::default()
        }
    }

    #[test]
    fn secrets_are_found_by_their_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "from a file\n").unwrap();
        let by_file = format!("secret,id=f,file={}", file.path().display());
        let all = objects(&[
            "secret,id=a,data=open,, sesame",
            "secret,id=b,data=b3BlbiwgIHNlc2FtZQ==,format=base64",
            &by_file,
        ]);
        for id in ["a", "b", "f"] {
            all.find(id).unwrap();
        }
        let missing = || all.find("c").unwrap_err().to_string();
        assert!(missing().contains("no secret 'c'"), "{}", missing());
        all.read_all().unwrap();
        // What was read is not read again.
        fs::remove_file(file.path()).unwrap();
        all.find("f").unwrap();
        assert!(missing().contains("no secret 'c'"), "{}", missing());
        let twice = objects(&["secret,id=a,data=x", "secret,id=a,data=y"]);
        let error = twice.read_all().unwrap_err().to_string();
        assert!(error.contains("two with id=a"), "{error}");
        assert!(!format!("{all:?}").contains("sesame"));
    }

    #[test]
    fn what_is_wrong_is_said_without_it() {
        for (text, why) in [
            ("tls-creds,id=a,data=hidden", "only secrets"),
            ("secret,data=hidden", "say id=ID"),
            ("secret,id=a", "say file=FILE"),
            ("secret,id=1,data=hidden", "begins with a letter"),
            ("secret,id=a,data=x,hidden", "a comma is written twice"),
            ("secret,id=a,data=x,hidden=y", "a comma is written twice"),
            ("secret,id=a,data=hidden,file=b", "one file or data"),
            ("secret,id=a,data=hidden,keyid=b", "keyid"),
            ("secret,id=a,data=hidden,format=hex", "raw or base64"),
            ("secret,id=a,data=hidden?,format=base64", "not base64"),
            ("secret,id=a,data=,format=raw", "empty"),
            (
                "secret,id=a,file=/nowhere/hidden.key",
                "/nowhere/hidden.key",
            ),
        ] {
            let error = format!("{:#}", objects(&[text]).find("a").unwrap_err());
            assert!(error.contains(why), "{text}: {error}");
            assert!(
                !error.replace("/nowhere/hidden", "").contains("hidden"),
                "{error}"
            );
        }
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (text, want) in [
            ("", Some("")),
            ("Zg==", Some("f")),
            ("Zm8=", Some("fo")),
            ("Zm9v", Some("foo")),
            ("Zm9v\nYmFy\n", Some("foobar")),
            ("Zm9", None),
            ("Z===", None),
            ("Zg==Zg==", None),
            ("Zm9v!", None),
        ] {
            let found = decode(text.as_bytes()).ok();
            let found = found.as_ref().map(|b| b.as_slice());
            assert_eq!(found, want.map(str::as_bytes), "{text}");
        }
    }
}
