//! Encrypted images (specification: "Data encryption", "Full disk encryption header pointer").
//!
//! ```text
//!   crypt_method 1   AES: the passphrase is the key; nothing in the file says whether it is right
//!   crypt_method 2   LUKS: extension 0x0537be77 ─▶ offset (64 bits), length (64 bits)
//!                    whole clusters with header and key slots; the payload offset means nothing
//! ```
//!
//! Data clusters are encrypted sector by sector, metadata and compressed clusters are not. So a
//! cluster of zeros in the file does not read as zeros: see [`Qcow2::encrypted`] for what follows.

use super::{Header, OpenOptions, Qcow2, extensions};
use crate::encryption::{Encryption, Method};
use crate::{Step, ZeroPlan};
use block::{Error, Result, Storage};
use crypto::{SectorCipher, luks};
use std::sync::Arc;

/// `crypt_method` without encryption.
pub const CRYPT_NONE: u32 = 0;
/// `crypt_method` of QEMU's first encryption.
pub const CRYPT_AES: u32 = 1;
/// `crypt_method` of LUKS.
pub const CRYPT_LUKS: u32 = 2;
/// Most bytes of a LUKS header with its key slots: twice what the largest keys take is never reached.
const LUKS_BYTES_MAX: u64 = 64 << 20;

/// Where the LUKS header is: offset and length in bytes.
///
/// Fails with `Corrupt` where the extension is missing or wrong.
pub fn luks_place(header: &Header) -> Result<(u64, u64)> {
    let wrong = |what: String| {
        Error::corrupt(format!(
            "header extension {:#010x} (LUKS header): {what}",
            extensions::CRYPTO_HEADER
        ))
    };
    let data = header
        .extension(extensions::CRYPTO_HEADER)
        .ok_or_else(|| wrong("it is missing, but crypt_method is 2".into()))?;
    let (Some(offset), Some(len), 16) = (
        super::read_u64(data, 0),
        super::read_u64(data, 8),
        data.len(),
    ) else {
        return Err(wrong(format!("it has {} bytes, not 16", data.len())));
    };
    if offset == 0 || !offset.is_multiple_of(header.cluster_size()) {
        return Err(wrong(format!(
            "offset {offset:#x} is not that of a cluster"
        )));
    }
    if len > LUKS_BYTES_MAX {
        return Err(wrong(format!(
            "length {len} is more than {LUKS_BYTES_MAX} bytes"
        )));
    }
    Ok((offset, len))
}

/// As [`luks_place`], for any image.
pub(super) fn luks_range(header: &Header) -> Result<Option<(u64, u64)>> {
    (header.crypt_method == CRYPT_LUKS)
        .then(|| luks_place(header))
        .transpose()
}

/// The LUKS header of an image, and where it is.
///
/// Fails with `Invalid` where the image has none.
pub fn luks_header(storage: &dyn Storage, header: &Header) -> Result<(u64, luks::Header)> {
    if header.crypt_method != CRYPT_LUKS {
        return Err(Error::invalid("is not encrypted with LUKS: it has no keys"));
    }
    let (offset, len) = luks_place(header)?;
    Ok((offset, luks::Header::read(storage, offset, len)?))
}

/// The encryption of an image; unlocked where a passphrase or the cipher is given. `None` where it has none.
pub(super) fn open(
    storage: &dyn Storage,
    header: &Header,
    options: &OpenOptions,
) -> Result<Option<Encryption>> {
    let passphrase = match options.cipher {
        Some(_) => None,
        None => options.passphrase.as_deref(),
    };
    let (method, cipher) = match header.crypt_method {
        CRYPT_NONE => return Ok(None),
        CRYPT_AES => {
            let aes = Encryption::aes(passphrase)?;
            let cipher = options.cipher.clone().or(aes.cipher);
            return Ok(Some(Encryption { cipher, ..aes }));
        }
        _ => {
            let (offset, luks) = luks_header(storage, header)?;
            let cipher = match passphrase {
                Some(passphrase) => {
                    let (_, key) = luks.unlock(storage, offset, passphrase)?;
                    Some(SectorCipher::new(&luks.suite, &key)?)
                }
                None => None,
            };
            (Method::Luks(luks.into()), cipher)
        }
    };
    let cipher = options.cipher.clone().or(cipher.map(Arc::new));
    Ok(Some(Encryption { method, cipher }))
}

impl Qcow2 {
    /// Whether data are encrypted. Then clusters of zeros in the file are not zeros to the guest: the rest of
    /// a new cluster must be written, zeroing means writing, and data must be durable before
    /// the entry that points at them, whatever was there before.
    pub(super) fn encrypted(&self) -> bool {
        self.encryption.is_some()
    }

    /// `plan`, but for zeros that would be put into the file as they are.
    pub(super) fn plan_encrypted_zeroes(&self, plan: Step<ZeroPlan>) -> Step<ZeroPlan> {
        match plan {
            Step::Done(ZeroPlan::Host { len, .. }) if self.encrypted() => {
                Step::Done(ZeroPlan::Write { len })
            }
            plan => plan,
        }
    }
}
