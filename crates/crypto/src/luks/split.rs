//! Anti-forensic splitting: a key as many stripes, all of which are needed to have it back, so that
//! wiping any of them wipes it (LUKS1 specification, "Anti-forensic information splitter").
//!
//! ```text
//!   stripe:   r1      r2      …  r(n-1)   d ^ key        d = H(… H(H(r1) ^ r2) … ^ r(n-1))
//! ```

use crate::{Hash, MasterKey};
use block::Result;
use zeroize::Zeroizing;

/// Fills `material` (a multiple of the key's length) with the key's stripes.
pub(super) fn split(hash: Hash, key: &MasterKey, material: &mut [u8]) -> Result<()> {
    let len = key.bytes().len();
    let last = material.len().saturating_sub(len);
    let (random, tail) = material.split_at_mut(last);
    crate::random(random)?;
    let sum = sum(hash, len, random);
    for ((to, sum), key) in tail.iter_mut().zip(sum.iter()).zip(key.bytes()) {
        *to = sum ^ key;
    }
    Ok(())
}

/// The key of `len` bytes that `material` was split from.
pub(super) fn merge(hash: Hash, len: usize, material: &[u8]) -> MasterKey {
    let last = material.len().saturating_sub(len);
    let (random, tail) = material.split_at(last);
    let sum = sum(hash, len, random);
    let mut key = MasterKey::zeroed(len);
    for ((to, sum), from) in key.bytes_mut().iter_mut().zip(sum.iter()).zip(tail) {
        *to = sum ^ from;
    }
    key
}

fn sum(hash: Hash, len: usize, stripes: &[u8]) -> Zeroizing<Vec<u8>> {
    let mut sum = Zeroizing::new(vec![0; len]);
    for stripe in stripes.chunks_exact(len.max(1)) {
        for (to, from) in sum.iter_mut().zip(stripe) {
            *to ^= from;
        }
        // Each part of a digest's length is replaced by the digest of its number and itself.
        for (number, part) in (0u32..).zip(sum.chunks_mut(hash.len())) {
            let digest = hash.digest(&[&number.to_be_bytes(), part]);
            for (to, from) in part.iter_mut().zip(digest.iter()) {
                *to = *from;
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_split_is_merged_and_needs_every_stripe() {
        for (hash, len) in [
            (Hash::Sha256, 64),
            (Hash::Sha1, 32),
            (Hash::Sha512, 16),
            (Hash::Ripemd160, 48),
        ] {
            let key = MasterKey::random(len).unwrap();
            let mut material = vec![0; len * 40];
            split(hash, &key, &mut material).unwrap();
            assert_eq!(merge(hash, len, &material).bytes(), key.bytes());
            for byte in [0, len * 20 + 3, len * 40 - 1] {
                material[byte] ^= 1;
                assert_ne!(merge(hash, len, &material).bytes(), key.bytes());
                material[byte] ^= 1;
            }
        }
    }
}
