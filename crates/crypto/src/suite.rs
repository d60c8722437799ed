//! Which cipher, which mode, which numbering of sectors, which hash: the names.
//!
//! ```text
//!   header's cipher name   cipher mode             hash        key bytes
//!   aes                    xts-plain64             sha256      64 (XTS takes two keys)
//!   serpent                cbc-essiv:sha256        sha1        32
//! ```
//!
//! QEMU's options name the cipher with its key's bits (`aes-256`), and the parts of the mode one by one.

use crate::Hash;
use block::{Error, Result};
use std::fmt;

/// A block cipher with its key length. All have blocks of 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// AES.
    Aes(u16),
    /// Serpent.
    Serpent(u16),
    /// Twofish.
    Twofish(u16),
}

/// How blocks of a sector depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Not at all.
    Ecb,
    /// Each on the one before.
    Cbc,
    /// Each on its place in the sector, by a second key.
    Xts,
    /// A stream from a counter.
    Ctr,
}

/// How a sector's number becomes its initial vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ivgen {
    /// Its lower 32 bits.
    Plain,
    /// All its 64 bits.
    Plain64,
    /// Encrypted with the hash of the key.
    Essiv(Hash),
}

/// Everything that encrypts a disk, but for the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suite {
    /// The cipher.
    pub algorithm: Algorithm,
    /// Its mode.
    pub mode: Mode,
    /// The initial vectors.
    pub ivgen: Ivgen,
    /// The hash of PBKDF2 and of the split keys.
    pub hash: Hash,
}

impl Default for Suite {
    /// What QEMU takes: `aes-256`, `xts`, `plain64`, `sha256`.
    fn default() -> Self {
        Self {
            algorithm: Algorithm::Aes(256),
            mode: Mode::Xts,
            ivgen: Ivgen::Plain64,
            hash: Hash::Sha256,
        }
    }
}

fn unsupported(what: &str, name: &str, there_is: &str) -> Error {
    Error::unsupported(format!(
        "{what} '{}' is not supported: there is {there_is}",
        name.escape_default()
    ))
}

impl Algorithm {
    /// The names of all, as QEMU has them.
    pub const NAMES: &str = "aes-128, aes-192, aes-256, serpent-128, serpent-192, serpent-256, \
                             twofish-128, twofish-192, twofish-256";

    /// By QEMU's name, `aes-256`.
    pub fn parse(name: &str) -> Result<Self> {
        let known = name.split_once('-').and_then(|(family, bits)| {
            let bits = bits.parse().ok()?;
            Self::of(family, bits)
        });
        known.ok_or_else(|| unsupported("cipher", name, Self::NAMES))
    }

    /// By family and bits of the key.
    fn of(family: &str, bits: u16) -> Option<Self> {
        match (family, bits) {
            ("aes", 128 | 192 | 256) => Some(Self::Aes(bits)),
            ("serpent", 128 | 192 | 256) => Some(Self::Serpent(bits)),
            ("twofish", 128 | 192 | 256) => Some(Self::Twofish(bits)),
            _ => None,
        }
    }

    /// The name in a LUKS header: without the key's length.
    pub fn family(self) -> &'static str {
        match self {
            Self::Aes(_) => "aes",
            Self::Serpent(_) => "serpent",
            Self::Twofish(_) => "twofish",
        }
    }

    /// Bytes of a key.
    pub fn key_len(self) -> usize {
        let (Self::Aes(bits) | Self::Serpent(bits) | Self::Twofish(bits)) = self;
        usize::from(bits) / 8
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.family(), self.key_len() * 8)
    }
}

impl Mode {
    /// The names of all.
    pub const NAMES: &str = "xts, cbc, ctr, ecb";

    /// By its name.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "ecb" => Ok(Self::Ecb),
            "cbc" => Ok(Self::Cbc),
            "xts" => Ok(Self::Xts),
            "ctr" => Ok(Self::Ctr),
            _ => Err(unsupported("cipher mode", name, Self::NAMES)),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }
}

impl Ivgen {
    /// The names of all.
    pub const NAMES: &str = "plain64, plain, essiv";

    /// By its name; `hash` is that of `essiv`.
    pub fn parse(name: &str, hash: Hash) -> Result<Self> {
        match name {
            "plain" => Ok(Self::Plain),
            "plain64" => Ok(Self::Plain64),
            "essiv" => Ok(Self::Essiv(hash)),
            _ => Err(unsupported("IV generator", name, Self::NAMES)),
        }
    }

    /// Its name without the hash.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv(_) => "essiv",
        }
    }
}

impl Suite {
    /// Reads the three names of a LUKS header, and the length of its key in bytes.
    pub fn parse(cipher: &str, mode: &str, hash: &str, key_len: u32) -> Result<Self> {
        let hash = Hash::parse(hash)?;
        let (mode, ivgen) = mode.split_once('-').ok_or_else(|| {
            Error::corrupt(format!(
                "cipher mode '{}' has no IV generator, as in xts-plain64",
                mode.escape_default()
            ))
        })?;
        let mode = Mode::parse(mode)?;
        let ivgen = match ivgen.split_once(':') {
            Some((name @ "essiv", hash)) => Ivgen::parse(name, Hash::parse(hash)?)?,
            // QEMU takes a hash beside the other generators too, and leaves it alone.
            Some((name, _)) => Ivgen::parse(name, hash)?,
            None if ivgen == "essiv" => {
                return Err(Error::corrupt(
                    "cipher mode: essiv has no hash, as in essiv:sha256",
                ));
            }
            None => Ivgen::parse(ivgen, hash)?,
        };
        // At most 64 bytes are valid, so this cannot overflow where it matters.
        let bits = u64::from(key_len) * 8 / if mode == Mode::Xts { 2 } else { 1 };
        let algorithm = u16::try_from(bits)
            .ok()
            .filter(|bits| u64::from(*bits) == bits.next_multiple_of(8).into())
            .and_then(|bits| Algorithm::of(cipher, bits))
            .ok_or_else(|| {
                Error::unsupported(format!(
                    "cipher '{}' with a key of {key_len} bytes in mode {} is not supported: there is {}",
                    cipher.escape_default(),
                    mode.name(),
                    Algorithm::NAMES
                ))
            })?;
        let suite = Self {
            algorithm,
            mode,
            ivgen,
            hash,
        };
        suite.validate()?;
        Ok(suite)
    }

    /// Refuses what does not go together.
    pub fn validate(&self) -> Result<()> {
        if let Ivgen::Essiv(hash) = self.ivgen
            && !matches!(hash.len(), 16 | 24 | 32)
        {
            return Err(Error::unsupported(format!(
                "essiv with {hash}: no {} cipher has a key of {} bytes; sha256 fits",
                self.algorithm.family(),
                hash.len()
            )));
        }
        // QEMU ends in an assertion here.
        if !(self.key_len() * crate::luks::STRIPES as usize).is_multiple_of(crate::SECTOR) {
            return Err(Error::unsupported(format!(
                "{} in mode {}: its key material is not whole sectors; mode xts or another length of key fits",
                self.algorithm,
                self.mode.name()
            )));
        }
        Ok(())
    }

    /// Bytes of the master key.
    pub fn key_len(&self) -> usize {
        match self.mode {
            Mode::Xts => self.algorithm.key_len() * 2,
            _ => self.algorithm.key_len(),
        }
    }

    /// The mode as a LUKS header has it: `xts-plain64`, `cbc-essiv:sha256`.
    pub fn mode_name(&self) -> String {
        match self.ivgen {
            Ivgen::Essiv(hash) => format!("{}-essiv:{hash}", self.mode.name()),
            ivgen => format!("{}-{}", self.mode.name(), ivgen.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for (cipher, mode, hash, key_len, name) in [
            ("aes", "xts-plain64", "sha256", 64, "aes-256"),
            ("aes", "xts-plain", "sha1", 32, "aes-128"),
            ("aes", "cbc-essiv:sha256", "sha512", 16, "aes-128"),
            ("serpent", "ecb-plain64", "ripemd160", 32, "serpent-256"),
            ("twofish", "ctr-plain64", "sha384", 32, "twofish-256"),
            ("twofish", "xts-plain64", "sha224", 48, "twofish-192"),
        ] {
            let suite = Suite::parse(cipher, mode, hash, key_len).unwrap();
            assert_eq!(suite.algorithm.to_string(), name);
            assert_eq!(Algorithm::parse(name).unwrap(), suite.algorithm);
            assert_eq!(suite.algorithm.family(), cipher);
            assert_eq!(suite.mode_name(), mode);
            assert_eq!(suite.hash.to_string(), hash);
            assert_eq!(suite.key_len(), key_len as usize);
        }
    }

    #[test]
    fn refuses_by_name() {
        for (cipher, mode, hash, key_len, why) in [
            ("cast5", "cbc-plain64", "sha256", 16, "cipher 'cast5'"),
            ("aes", "xts-plain64", "sha256", 65, "key of 65 bytes"),
            ("aes", "xts-plain64", "sha256", 0, "key of 0 bytes"),
            (
                "aes",
                "xts-plain64",
                "sha256",
                u32::MAX,
                "key of 4294967295",
            ),
            ("aes", "lrw-plain64", "sha256", 32, "cipher mode 'lrw'"),
            ("aes", "xts", "sha256", 64, "no IV generator"),
            ("aes", "xts-tcw", "sha256", 64, "IV generator 'tcw'"),
            ("aes", "cbc-essiv", "sha256", 32, "essiv has no hash"),
            ("aes", "cbc-essiv:sha1", "sha256", 32, "sha256 fits"),
            ("aes", "cbc-essiv:md5", "sha256", 16, "hash 'md5'"),
            ("aes", "xts-plain64", "whirlpool", 64, "hash 'whirlpool'"),
            ("aes", "cbc-plain64", "sha256", 24, "not whole sectors"),
            ("a\x1bs", "cbc-plain64", "sha256", 16, "cipher 'a\\u{1b}s'"),
        ] {
            let error = Suite::parse(cipher, mode, hash, key_len).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
