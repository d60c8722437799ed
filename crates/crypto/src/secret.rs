//! Memory for passphrases and keys: wiped when it is dropped, never copied, never printed.

use block::{Error, Result};
use std::fmt;
use zeroize::{ZeroizeOnDrop, Zeroizing};

/// Longest passphrase in bytes.
pub const PASSPHRASE_BYTES_MAX: usize = 1 << 20;

/// What a user unlocks a key slot with. Neither `Clone` nor `Display`; `Debug` shows nothing of it.
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// Takes the bytes of a passphrase: UTF-8 without a zero byte, as QEMU wants it, not empty, at most
    /// [`PASSPHRASE_BYTES_MAX`].
    ///
    /// Fails with `Invalid`; the error says nothing of the bytes.
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Result<Self> {
        let what = match bytes.len() {
            0 => "it is empty",
            len if len > PASSPHRASE_BYTES_MAX => "it has more than 1 MiB",
            _ if bytes.contains(&0) => "it has a zero byte, where QEMU would end it",
            _ if std::str::from_utf8(&bytes).is_err() => "it is not UTF-8, which QEMU demands",
            _ => return Ok(Self(bytes)),
        };
        Err(Error::invalid(format!(
            "not usable as a passphrase: {what}"
        )))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl ZeroizeOnDrop for Passphrase {}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

/// The key that a disk's sectors are encrypted with.
pub struct MasterKey(Zeroizing<Vec<u8>>);

impl MasterKey {
    /// `len` bytes of zeros, to be filled.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self(Zeroizing::new(vec![0; len]))
    }

    /// `len` random bytes.
    pub fn random(len: usize) -> Result<Self> {
        let mut key = Self::zeroed(len);
        crate::random(key.bytes_mut())?;
        Ok(key)
    }

    /// The first `len` bytes of a passphrase, padded with zeros: the key of QEMU's first encryption.
    pub fn of_passphrase(passphrase: &Passphrase, len: usize) -> Self {
        let mut key = Self::zeroed(len);
        for (to, from) in key.bytes_mut().iter_mut().zip(passphrase.bytes()) {
            *to = *from;
        }
        key
    }

    /// The key's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl ZeroizeOnDrop for MasterKey {}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MasterKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_show() {
        let secret = Passphrase::new(Zeroizing::new(b"open sesame".to_vec())).unwrap();
        let key = MasterKey::random(32).unwrap();
        assert_eq!(format!("{secret:?} {key:?}"), "Passphrase(…) MasterKey(…)");
        assert_ne!(key.bytes(), [0; 32]);
    }

    #[test]
    fn refuses_what_qemu_would_read_otherwise() {
        for (bytes, why) in [
            (vec![], "empty"),
            (b"open\0sesame".to_vec(), "zero byte"),
            (vec![b'x', 0xff], "UTF-8"),
            (vec![b'x'; PASSPHRASE_BYTES_MAX + 1], "1 MiB"),
        ] {
            let error = Passphrase::new(Zeroizing::new(bytes)).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(why) && !text.contains("open"), "{text}");
        }
    }
}
