//! Hashes, and keys from passphrases (PBKDF2, RFC 8018).

use block::{Error, Result};
use pbkdf2::pbkdf2_hmac;
use ripemd::Ripemd160;
use rustix::time::{ClockId, clock_gettime};
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use std::fmt;
use zeroize::Zeroizing;

/// A hash that a LUKS header may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
}

/// Longest digest in bytes.
pub(crate) const DIGEST_MAX: usize = 64;

impl Hash {
    /// The names of all.
    pub const NAMES: &str = "sha1, sha224, sha256, sha384, sha512, ripemd160";

    /// By its name.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "sha1" => Self::Sha1,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            "ripemd160" => Self::Ripemd160,
            _ => {
                return Err(Error::unsupported(format!(
                    "hash '{}' is not supported: there is {}",
                    name.escape_default(),
                    Self::NAMES
                )));
            }
        })
    }

    /// Bytes of a digest.
    pub fn len(self) -> usize {
        match self {
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// Never.
    pub fn is_empty(self) -> bool {
        false
    }

    /// The digest of `parts` one after the other, in the first [`Hash::len`] bytes.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Zeroizing<[u8; DIGEST_MAX]> {
        fn run<D: Digest>(parts: &[&[u8]], out: &mut [u8; DIGEST_MAX]) {
            let mut hash = D::new();
            for part in parts {
                hash.update(part);
            }
            for (to, from) in out.iter_mut().zip(hash.finalize()) {
                *to = from;
            }
        }
        let mut out = Zeroizing::new([0; DIGEST_MAX]);
        match self {
            Self::Sha1 => run::<Sha1>(parts, &mut out),
            Self::Sha224 => run::<Sha224>(parts, &mut out),
            Self::Sha256 => run::<Sha256>(parts, &mut out),
            Self::Sha384 => run::<Sha384>(parts, &mut out),
            Self::Sha512 => run::<Sha512>(parts, &mut out),
            Self::Ripemd160 => run::<Ripemd160>(parts, &mut out),
        }
        out
    }

    /// Fills `out` with a key made from `secret` in so many iterations.
    pub(crate) fn derive(self, secret: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2_hmac::<Sha1>(secret, salt, iterations, out),
            Self::Sha224 => pbkdf2_hmac::<Sha224>(secret, salt, iterations, out),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(secret, salt, iterations, out),
            Self::Sha384 => pbkdf2_hmac::<Sha384>(secret, salt, iterations, out),
            Self::Sha512 => pbkdf2_hmac::<Sha512>(secret, salt, iterations, out),
            Self::Ripemd160 => pbkdf2_hmac::<Ripemd160>(secret, salt, iterations, out),
        }
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
        })
    }
}

/// How many iterations take this machine about `time_ms` milliseconds for a key of `key_len` bytes; 1 to
/// `u32::MAX`. Measures for a tenth of that, 100 ms at most, of this thread's own time.
pub fn iterations_for(hash: Hash, key_len: usize, time_ms: u32) -> u32 {
    let wanted_ns = u128::from(time_ms) * 1_000_000;
    let enough_ns = (wanted_ns / 10).clamp(1_000_000, 100_000_000);
    let mut key = vec![0; key_len];
    let mut iterations = 1u32 << 10;
    loop {
        let before = thread_ns();
        hash.derive(b"passphrase", &[0x5a; 32], iterations, &mut key);
        let took_ns = (thread_ns() - before).max(1);
        if took_ns >= enough_ns || iterations >= 1 << 30 {
            let fit = u128::from(iterations) * wanted_ns / took_ns;
            return u32::try_from(fit).unwrap_or(u32::MAX).max(1);
        }
        iterations *= 2;
    }
}

/// What this thread has computed for, in nanoseconds.
fn thread_ns() -> u128 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u128::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000
        + u128::try_from(time.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn hashes_are_the_published_ones() {
        for (hash, want) in [
            (Hash::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (
                Hash::Sha256,
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            ),
            (Hash::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
        ] {
            let digest = hash.digest(&[b"a", b"bc"]);
            assert_eq!(hex(&digest[..hash.len()]), want, "{hash}");
        }
        for hash in Hash::NAMES.split(", ") {
            let parsed = Hash::parse(hash).unwrap();
            assert_eq!(parsed.to_string(), hash);
            let digest = parsed.digest(&[b"abc"]);
            assert!(digest[parsed.len()..].iter().all(|b| *b == 0));
            assert_ne!(digest[parsed.len() - 4..parsed.len()], [0; 4]);
        }
    }

    #[test]
    fn keys_are_those_of_rfc_6070() {
        let mut key = [0; 20];
        Hash::Sha1.derive(b"password", b"salt", 4096, &mut key);
        assert_eq!(hex(&key), "4b007901b765489abead49d926f721d065a429c1");
    }

    #[test]
    fn more_time_is_more_iterations() {
        let short = iterations_for(Hash::Sha256, 32, 10);
        let long = iterations_for(Hash::Sha256, 32, 1000);
        // A hundredfold, were the measurement exact.
        assert!(long / 10 > short, "{short} {long}");
    }
}
