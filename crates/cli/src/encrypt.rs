//! Encryption on the command line: the options of a new image, and what `info` shows.

use crate::secret::Keys;
use anyhow::{Result, anyhow, bail};
use crypto::{
    Algorithm, Hash, Ivgen, Mode, Passphrase, Suite,
    luks::{FormatOptions, ITER_TIME_MS_DEFAULT, Volume},
};
use image::{Encryption, Method};
use serde::Serialize;
use std::sync::Arc;

/// The options of `create -o`, with what they may be.
pub const OPTIONS: [(&str, &str); 8] = [
    ("encrypt.format", "luks: encrypt the guest's data"),
    (
        "encrypt.key-secret",
        "ID of the --object secret with the passphrase [--key-file]",
    ),
    (
        "encrypt.cipher-alg",
        "aes-256, aes-192, aes-128, or serpent or twofish with the same lengths [aes-256]",
    ),
    ("encrypt.cipher-mode", "xts, cbc, ctr or ecb [xts]"),
    ("encrypt.ivgen-alg", "plain64, plain or essiv [plain64]"),
    ("encrypt.ivgen-hash-alg", "hash of essiv [sha256]"),
    (
        "encrypt.hash-alg",
        "sha1, sha224, sha256, sha384, sha512 or ripemd160 [sha256]",
    ),
    (
        "encrypt.iter-time",
        "milliseconds that unlocking is to take on this machine [2000]",
    ),
];

/// What `-o encrypt.…` said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    luks: bool,
    key_secret: Option<String>,
    algorithm: Option<Algorithm>,
    mode: Option<Mode>,
    ivgen: Option<String>,
    ivgen_hash: Option<Hash>,
    hash: Option<Hash>,
    iter_time_ms: Option<u32>,
    /// The first of them, to be named where `encrypt.format` is missing.
    said: Option<String>,
}

impl Options {
    /// Takes the option `key` (with `encrypt.` before it).
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        let wrong = |error: block::Error| anyhow!("-o {key}={value}: {error}");
        self.said.get_or_insert_with(|| key.to_owned());
        match key {
            "encrypt.format" => match value {
                "luks" => self.luks = true,
                "aes" => bail!(
                    "-o encrypt.format=aes: it is not safe, nobody makes it any more: say luks"
                ),
                _ => bail!("-o encrypt.format={value}: it must be luks"),
            },
            "encrypt.key-secret" => self.key_secret = Some(value.to_owned()),
            "encrypt.cipher-alg" => self.algorithm = Some(Algorithm::parse(value).map_err(wrong)?),
            "encrypt.cipher-mode" => self.mode = Some(Mode::parse(value).map_err(wrong)?),
            "encrypt.ivgen-alg" => {
                Ivgen::parse(value, Hash::Sha256).map_err(wrong)?;
                self.ivgen = Some(value.to_owned());
            }
            "encrypt.ivgen-hash-alg" => self.ivgen_hash = Some(Hash::parse(value).map_err(wrong)?),
            "encrypt.hash-alg" => self.hash = Some(Hash::parse(value).map_err(wrong)?),
            "encrypt.iter-time" => self.iter_time_ms = Some(iter_time(value)?),
            _ => bail!("-o {key}: there is no such option"),
        }
        Ok(())
    }

    /// Has the image encrypted, whatever the options say.
    pub fn want(&mut self) {
        self.luks = true;
    }

    /// Whether the image is to be encrypted.
    pub fn is_wanted(&self) -> bool {
        self.luks
    }

    /// Whether they say which passphrase.
    pub fn names_secret(&self) -> bool {
        self.key_secret.is_some()
    }

    /// The passphrase of a new image. `None` where it is not to be encrypted.
    pub fn passphrase(&self, keys: &Keys) -> Result<Option<Arc<Passphrase>>> {
        if !self.luks {
            if let Some(key) = &self.said {
                bail!("-o {key}: say encrypt.format=luks too");
            }
            return Ok(None);
        }
        let found = match &self.key_secret {
            Some(id) => Some(keys.objects.find(id)?),
            None => keys.first()?,
        };
        match found {
            Some(passphrase) => Ok(Some(passphrase)),
            None => bail!(
                "an encrypted image needs a passphrase: say --key-file FILE or -o encrypt.key-secret=ID"
            ),
        }
    }

    /// Makes the header of a new image that is to be encrypted. Computes for some seconds.
    pub fn volume(&self, passphrase: &Passphrase) -> Result<Volume> {
        Ok(Volume::format(&self.volume_options()?, passphrase)?)
    }

    /// Bytes that the header of such an image takes; 0 where it is not to be encrypted.
    pub fn len(&self) -> Result<u64> {
        match self.luks {
            true => Ok(self.volume_options()?.volume_len()),
            false => Ok(0),
        }
    }

    fn volume_options(&self) -> Result<FormatOptions> {
        let default = Suite::default();
        let essiv_hash = self.ivgen_hash.unwrap_or(Hash::Sha256);
        let suite = Suite {
            algorithm: self.algorithm.unwrap_or(default.algorithm),
            mode: self.mode.unwrap_or(default.mode),
            ivgen: match &self.ivgen {
                Some(name) => Ivgen::parse(name, essiv_hash)?,
                None => default.ivgen,
            },
            hash: self.hash.unwrap_or(default.hash),
        };
        suite.validate()?;
        Ok(FormatOptions {
            suite,
            iter_time_ms: self.iter_time_ms.unwrap_or(ITER_TIME_MS_DEFAULT),
        })
    }
}

/// The value of `encrypt.iter-time`.
pub fn iter_time(value: &str) -> Result<u32> {
    value
        .parse()
        .ok()
        .filter(|ms| *ms > 0)
        .ok_or_else(|| anyhow!("-o encrypt.iter-time={value}: it must be 1 or more milliseconds"))
}

/// The encryption of an image, with the fields of `qemu-img info`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Shown {
    format: &'static str,
    #[serde(flatten)]
    luks: Option<Luks>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Luks {
    cipher_alg: String,
    cipher_mode: &'static str,
    ivgen_alg: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ivgen_hash_alg: Option<String>,
    hash_alg: String,
    uuid: String,
    detached_header: bool,
    payload_offset: u64,
    master_key_iters: u32,
    slots: Vec<Slot>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Slot {
    active: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    iters: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stripes: Option<u32>,
    key_offset: u64,
}

impl Shown {
    /// What there is to show.
    pub fn of(encryption: &Encryption) -> Self {
        let header = match &encryption.method {
            Method::Aes => {
                return Self {
                    format: "aes",
                    luks: None,
                };
            }
            Method::Luks(header) | Method::Volume(header) => header,
        };
        let suite = &header.suite;
        let slots = header.slots.iter().map(|slot| Slot {
            active: slot.active,
            iters: slot.active.then_some(slot.iterations),
            stripes: slot.active.then_some(slot.stripes),
            key_offset: slot.key_offset,
        });
        Self {
            format: "luks",
            luks: Some(Luks {
                cipher_alg: suite.algorithm.to_string(),
                cipher_mode: suite.mode.name(),
                ivgen_alg: suite.ivgen.name(),
                ivgen_hash_alg: match suite.ivgen {
                    Ivgen::Essiv(hash) => Some(hash.to_string()),
                    _ => None,
                },
                hash_alg: suite.hash.to_string(),
                uuid: header.uuid.clone(),
                detached_header: false,
                payload_offset: header.payload_offset,
                master_key_iters: header.iterations,
                slots: slots.collect(),
            }),
        }
    }

    /// As rows of a table.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![("encrypted", self.format.to_owned())];
        let Some(luks) = &self.luks else {
            return rows;
        };
        let hash = luks.ivgen_hash_alg.iter().map(|hash| format!(":{hash}"));
        rows.push((
            "cipher",
            format!(
                "{} {}-{}{}",
                luks.cipher_alg,
                luks.cipher_mode,
                luks.ivgen_alg,
                hash.collect::<String>()
            ),
        ));
        rows.push(("hash", luks.hash_alg.clone()));
        rows.push(("uuid", luks.uuid.clone()));
        for (number, slot) in luks.slots.iter().enumerate() {
            if let Some(iters) = slot.iters {
                let text = format!("{number}: {iters} iterations, at {:#x}", slot.key_offset);
                rows.push(("key slot", text));
            }
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_by_name() {
        for (key, value, why) in [
            ("encrypt.format", "aes", "say luks"),
            ("encrypt.format", "luks2", "it must be luks"),
            ("encrypt.cipher-alg", "cast5-128", "there is aes-128"),
            ("encrypt.cipher-mode", "gcm", "there is xts"),
            ("encrypt.ivgen-alg", "plain32", "there is plain64"),
            ("encrypt.hash-alg", "md5", "there is sha1"),
            ("encrypt.iter-time", "0", "1 or more"),
            ("encrypt.detached-header", "on", "no such option"),
        ] {
            let error = Options::default().set(key, value).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(key), "{error}");
        }
        let mut options = Options::default();
        options.set("encrypt.cipher-mode", "cbc").unwrap();
        let error = options
            .passphrase(&Keys::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("encrypt.format=luks"), "{error}");
        options.set("encrypt.format", "luks").unwrap();
        let error = options
            .passphrase(&Keys::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("--key-file"), "{error}");
    }
}
