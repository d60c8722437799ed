//! Encryption of disks: LUKS headers, key slots, and the ciphers of sectors.
//!
//! ```text
//!   passphrase ─PBKDF2─▶ slot key ─decrypts─▶ material ─merged─▶ master key ─▶ SectorCipher
//!                                             (key slot)        checked by its digest
//! ```
//!
//! * [`Suite`]: which cipher, mode, sector numbering and hash, by the names that LUKS and QEMU give them.
//! * [`SectorCipher`]: encrypts and decrypts sectors of 512 bytes. Used by the data path; allocates nothing.
//! * [`luks`]: the header and its eight key slots.
//! * [`Passphrase`], [`MasterKey`]: memory that is wiped when it is dropped and never printed.
//!
//! Ciphers and hashes are RustCrypto's; modes, key slots and headers are here.

#![forbid(unsafe_code)]

mod cipher;
mod kdf;
pub mod luks;
mod secret;
mod suite;

pub use cipher::{SECTOR, SectorCipher};
pub use kdf::{Hash, iterations_for};
pub use secret::{MasterKey, PASSPHRASE_BYTES_MAX, Passphrase};
pub use suite::{Algorithm, Ivgen, Mode, Suite};

/// Fills `bytes` from the kernel's random numbers.
pub fn random(bytes: &mut [u8]) -> block::Result<()> {
    getrandom::fill(bytes).map_err(|error| {
        block::Error::new(
            block::ErrorKind::Io,
            format!("the kernel gives no random numbers: {error}"),
        )
    })
}
