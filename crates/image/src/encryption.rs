//! How the data of an image are encrypted: what the disk layer needs to know.

use block::{GuestOffset, HostOffset};
use crypto::{Algorithm, SectorCipher, luks};
use std::sync::Arc;

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
