//! How the data of an image are encrypted: what the disk layer needs to know.

use block::Result;
use block::{GuestOffset, HostOffset};
use crypto::{Algorithm, Ivgen, MasterKey, Mode, Passphrase, SectorCipher, Suite, luks};
use std::sync::Arc;

/// Bytes of a key of [`Method::Aes`].
const AES_KEY_LEN: usize = 16;

/// Which way an image is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// LUKS. Sectors are numbered by their place in the file.
    Luks(Box<luks::Header>),
    /// LUKS, of the whole disk. Sectors are numbered by their place on the disk.
    Volume(Box<luks::Header>),
    /// AES-128 in CBC mode with the passphrase itself as the key (QEMU's first way, for reading only).
    /// Sectors are numbered by their place on the disk.
    Aes,
}

/// The encryption of an image's data. Metadata and compressed clusters are as in other images.
#[derive(Debug)]
pub struct Encryption {
    /// Which way.
    pub method: Method,
    /// `None` when the image was opened without its passphrase: its data cannot be read then.
    pub cipher: Option<Arc<SectorCipher>>,
}

impl Encryption {
    /// That of an image of QEMU's first way; unlocked where the passphrase is given.
    pub(crate) fn aes(passphrase: Option<&Passphrase>) -> Result<Self> {
        let suite = Suite {
            algorithm: Algorithm::Aes(128),
            mode: Mode::Cbc,
            ivgen: Ivgen::Plain64,
            ..Suite::default()
        };
        let cipher = |passphrase| {
            SectorCipher::new(&suite, &MasterKey::of_passphrase(passphrase, AES_KEY_LEN))
        };
        Ok(Self {
            method: Method::Aes,
            cipher: passphrase.map(cipher).transpose()?.map(Arc::new),
        })
    }

    /// Why it keeps an image from being written.
    pub(crate) fn read_only_because(&self) -> Option<String> {
        match (&self.method, &self.cipher) {
            (Method::Aes, _) => Some(
                "its encryption is AES (crypt_method 1), which is not safe: nobody writes it any more"
                    .into(),
            ),
            (_, None) => Some("it is encrypted, and was opened without its passphrase".into()),
            _ => None,
        }
    }

    /// The number that a sector's encryption depends on: of guest byte `guest`, stored at `host`.
    pub fn sector(&self, guest: GuestOffset, host: HostOffset) -> u64 {
        match self.method {
            Method::Luks(_) => host.0 / crypto::SECTOR as u64,
            Method::Volume(_) | Method::Aes => guest.0 / crypto::SECTOR as u64,
        }
    }

    /// Its name for people.
    pub fn name(&self) -> &'static str {
        match self.method {
            Method::Luks(_) | Method::Volume(_) => "LUKS",
            Method::Aes => "AES",
        }
    }

    /// Cipher and mode for people, as in `aes-256 xts-plain64`.
    pub fn suite(&self) -> String {
        match &self.method {
            Method::Luks(header) | Method::Volume(header) => {
                format!("{} {}", header.suite.algorithm, header.suite.mode_name())
            }
            Method::Aes => format!("{} cbc-plain64", Algorithm::Aes(128)),
        }
    }
}
