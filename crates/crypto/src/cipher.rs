//! Sectors through a cipher.
//!
//! A disk is encrypted in sectors of 512 bytes, each by itself: block after block of 16 bytes in one of the
//! modes, begun with an initial vector that the sector's number gives. All blocks of a sector that
//! do not depend on each other go to the cipher in one call, which works on many at a time.

use crate::{Ivgen, MasterKey, Mode, Suite, suite::Algorithm};
use aes::{Aes128, Aes192, Aes256};
use block::{Error, Result};
use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit, consts::U16};
use serpent::Serpent;
use std::fmt;
use twofish::Twofish;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Bytes of a sector: what is encrypted by itself.
pub const SECTOR: usize = 512;
/// Blocks of a sector.
const BLOCKS: usize = SECTOR / 16;

type Block = Array<u8, U16>;

/// A block cipher with its key.
enum Keyed {
    Aes128(Box<Aes128>),
    Aes192(Box<Aes192>),
    Aes256(Box<Aes256>),
    Serpent(Box<Serpent>),
    Twofish(Box<Twofish>),
}

/// Each of them wipes itself when it is dropped (a test sees to that).
impl ZeroizeOnDrop for Keyed {}

impl Keyed {
    fn new(algorithm: Algorithm, key: &[u8]) -> Result<Self> {
        let made = match (algorithm, key.len() * 8) {
            (Algorithm::Aes(_), 128) => Aes128::new_from_slice(key).map(|c| Self::Aes128(c.into())),
            (Algorithm::Aes(_), 192) => Aes192::new_from_slice(key).map(|c| Self::Aes192(c.into())),
            (Algorithm::Aes(_), _) => Aes256::new_from_slice(key).map(|c| Self::Aes256(c.into())),
            (Algorithm::Serpent(_), _) => {
                Serpent::new_from_slice(key).map(|c| Self::Serpent(c.into()))
            }
            (Algorithm::Twofish(_), _) => {
                Twofish::new_from_slice(key).map(|c| Self::Twofish(c.into()))
            }
        };
        made.map_err(|_| {
            Error::invalid(format!(
                "a key of {} bytes does not fit {}",
                key.len(),
                algorithm.family()
            ))
        })
    }

    fn encrypt(&self, blocks: &mut [Block]) {
        match self {
            Self::Aes128(c) => c.encrypt_blocks(blocks),
            Self::Aes192(c) => c.encrypt_blocks(blocks),
            Self::Aes256(c) => c.encrypt_blocks(blocks),
            Self::Serpent(c) => c.encrypt_blocks(blocks),
            Self::Twofish(c) => c.encrypt_blocks(blocks),
        }
    }

    fn decrypt(&self, blocks: &mut [Block]) {
        match self {
            Self::Aes128(c) => c.decrypt_blocks(blocks),
            Self::Aes192(c) => c.decrypt_blocks(blocks),
            Self::Aes256(c) => c.decrypt_blocks(blocks),
            Self::Serpent(c) => c.decrypt_blocks(blocks),
            Self::Twofish(c) => c.decrypt_blocks(blocks),
        }
    }
}

/// Encrypts and decrypts sectors. Its keys are wiped when it is dropped; `Debug` shows none of them.
pub struct SectorCipher {
    data: Keyed,
    /// XTS: of the tweaks. ESSIV: of the initial vectors.
    second: Option<Keyed>,
    /// XTS with ESSIV has three keys.
    essiv: Option<Keyed>,
    suite: Suite,
}

impl ZeroizeOnDrop for SectorCipher {}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SectorCipher").field(&self.suite).finish()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Encrypt,
    Decrypt,
}

impl SectorCipher {
    /// With the whole key of a disk or of a key slot: two keys for XTS.
    pub fn new(suite: &Suite, key: &MasterKey) -> Result<Self> {
        let key = key.bytes();
        if key.len() != suite.key_len() {
            return Err(Error::invalid(format!(
                "a key of {} bytes where {} in mode {} takes {}",
                key.len(),
                suite.algorithm,
                suite.mode.name(),
                suite.key_len()
            )));
        }
        let (data, second) = match suite.mode {
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                (data, Some(Keyed::new(suite.algorithm, tweak)?))
            }
            _ => (key, None),
        };
        let essiv = match suite.ivgen {
            Ivgen::Essiv(hash) => {
                // The hash of the whole key, and by its length the cipher's variant.
                let digest = hash.digest(&[key]);
                let salt = digest.get(..hash.len()).unwrap_or_default();
                Some(Keyed::new(suite.algorithm, salt)?)
            }
            _ => None,
        };
        Ok(Self {
            data: Keyed::new(suite.algorithm, data)?,
            second,
            essiv,
            suite: *suite,
        })
    }

    /// What it is made of.
    pub fn suite(&self) -> &Suite {
        &self.suite
    }

    /// Encrypts whole sectors, the first of which has number `sector`.
    ///
    /// # Panics
    ///
    /// In debug builds, when `bytes` is not a multiple of [`SECTOR`].
    pub fn encrypt(&self, sector: u64, bytes: &mut [u8]) {
        self.each(sector, bytes, Direction::Encrypt);
    }

    /// Decrypts whole sectors, the first of which has number `sector`.
    ///
    /// # Panics
    ///
    /// In debug builds, when `bytes` is not a multiple of [`SECTOR`].
    pub fn decrypt(&self, sector: u64, bytes: &mut [u8]) {
        self.each(sector, bytes, Direction::Decrypt);
    }

    fn each(&self, first: u64, bytes: &mut [u8], direction: Direction) {
        debug_assert!(bytes.len().is_multiple_of(SECTOR), "whole sectors only");
        let (blocks, _) = Block::slice_as_chunks_mut(bytes);
        for (number, sector) in (first..).zip(blocks.chunks_exact_mut(BLOCKS)) {
            match self.suite.mode {
                Mode::Xts => self.xts(number, sector, direction),
                Mode::Cbc if direction == Direction::Encrypt => self.cbc_encrypt(number, sector),
                Mode::Cbc => self.cbc_decrypt(number, sector),
                Mode::Ctr => self.ctr(number, sector),
                Mode::Ecb => match direction {
                    Direction::Encrypt => self.data.encrypt(sector),
                    Direction::Decrypt => self.data.decrypt(sector),
                },
            }
        }
    }

    /// A sector's initial vector.
    fn vector(&self, sector: u64) -> Block {
        let number = match self.suite.ivgen {
            Ivgen::Plain => sector & u64::from(u32::MAX),
            Ivgen::Plain64 | Ivgen::Essiv(_) => sector,
        };
        let mut vector = Block::from(u128::from(number).to_le_bytes());
        if let Some(essiv) = &self.essiv {
            essiv.encrypt(std::slice::from_mut(&mut vector));
        }
        vector
    }

    /// IEEE 1619: each block is masked, before and after, with the vector encrypted by the second key and
    /// multiplied by x once for each block before.
    fn xts(&self, number: u64, sector: &mut [Block], direction: Direction) {
        let mut tweak = self.vector(number);
        if let Some(second) = &self.second {
            second.encrypt(std::slice::from_mut(&mut tweak));
        }
        let mut tweaks = [0u128; BLOCKS];
        let mut next = u128::from_le_bytes(tweak.into());
        for tweak in &mut tweaks {
            *tweak = next;
            // x^128 = x^7 + x^2 + x + 1
            next = (next << 1) ^ ((next >> 127) * 0x87);
        }
        mask(sector, &tweaks);
        match direction {
            Direction::Encrypt => self.data.encrypt(sector),
            Direction::Decrypt => self.data.decrypt(sector),
        }
        mask(sector, &tweaks);
        tweaks.zeroize();
    }

    fn cbc_encrypt(&self, number: u64, sector: &mut [Block]) {
        let mut last = self.vector(number);
        for block in sector {
            xor(block, &last);
            self.data.encrypt(std::slice::from_mut(block));
            last = *block;
        }
    }

    fn cbc_decrypt(&self, number: u64, sector: &mut [Block]) {
        let mut before = [Block::default(); BLOCKS];
        before.copy_from_slice(sector);
        self.data.decrypt(sector);
        let vector = self.vector(number);
        for (block, last) in sector
            .iter_mut()
            .zip(std::iter::once(&vector).chain(&before))
        {
            xor(block, last);
        }
    }

    /// The vector counts up as one big-endian number.
    fn ctr(&self, number: u64, sector: &mut [Block]) {
        let mut counter = u128::from_be_bytes(self.vector(number).into());
        let mut stream = [Block::default(); BLOCKS];
        for block in &mut stream {
            *block = Block::from(counter.to_be_bytes());
            counter = counter.wrapping_add(1);
        }
        self.data.encrypt(&mut stream);
        for (block, key) in sector.iter_mut().zip(&stream) {
            xor(block, key);
        }
        Block::slice_as_flattened_mut(&mut stream).zeroize();
    }
}

fn mask(sector: &mut [Block], tweaks: &[u128; BLOCKS]) {
    for (block, tweak) in sector.iter_mut().zip(tweaks) {
        let value = u128::from_le_bytes((*block).into()) ^ tweak;
        *block = Block::from(value.to_le_bytes());
    }
}

fn xor(block: &mut Block, with: &Block) {
    for (to, from) in block.iter_mut().zip(with) {
        *to ^= from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hash;

    fn key(bytes: &[u8]) -> MasterKey {
        let mut key = MasterKey::zeroed(bytes.len());
        key.bytes_mut().copy_from_slice(bytes);
        key
    }

    fn all_suites() -> Vec<Suite> {
        let mut suites = Vec::new();
        for name in Algorithm::NAMES.split(", ") {
            for mode in Mode::NAMES.split(", ") {
                for ivgen in [Ivgen::Plain, Ivgen::Plain64, Ivgen::Essiv(Hash::Sha256)] {
                    let suite = Suite {
                        algorithm: Algorithm::parse(name.trim()).unwrap(),
                        mode: Mode::parse(mode).unwrap(),
                        ivgen,
                        hash: Hash::Sha256,
                    };
                    if suite.validate().is_ok() {
                        suites.push(suite);
                    }
                }
            }
        }
        suites
    }

    #[test]
    fn xts_is_that_of_ieee_1619() {
        // Vector 4 of annex B: AES-128, data unit 0, 512 bytes 00 01 … ff 00 … ff.
        let suite = Suite {
            algorithm: Algorithm::Aes(128),
            ..Suite::default()
        };
        let keys: [u8; 32] = [
            0x27, 0x18, 0x28, 0x18, 0x28, 0x45, 0x90, 0x45, 0x23, 0x53, 0x60, 0x28, 0x74, 0x71,
            0x35, 0x26, 0x31, 0x41, 0x59, 0x26, 0x53, 0x58, 0x97, 0x93, 0x23, 0x84, 0x62, 0x64,
            0x33, 0x83, 0x27, 0x95,
        ];
        let cipher = SectorCipher::new(&suite, &key(&keys)).unwrap();
        let mut sector: Vec<u8> = (0..512).map(|n| n as u8).collect();
        cipher.encrypt(0, &mut sector);
        assert_eq!(sector[..4], [0x27, 0xa7, 0x47, 0x9b]);
        assert_eq!(sector[508..], [0x31, 0x9d, 0x05, 0x68]);
    }

    #[test]
    fn every_suite_decrypts_what_it_encrypted_and_sectors_differ() {
        let suites = all_suites();
        assert_eq!(suites.len(), 9 * 4 * 3 - 3 * 3 * 3);
        let plain: Vec<u8> = (0..3 * SECTOR).map(|n| (n / 7) as u8).collect();
        for suite in suites {
            let bytes: Vec<u8> = (0..suite.key_len() as u8).collect();
            let cipher = SectorCipher::new(&suite, &key(&bytes)).unwrap();
            let first = (1 << 32) - 1;
            let mut text = plain.clone();
            cipher.encrypt(first, &mut text);
            assert!(text.iter().zip(&plain).filter(|(a, b)| a == b).count() < 64);
            // A sector by itself is what it is among others.
            let mut one = plain[SECTOR..2 * SECTOR].to_vec();
            cipher.encrypt(first + 1, &mut one);
            assert_eq!(one, text[SECTOR..2 * SECTOR], "{suite:?}");
            let mut zeros = vec![0; 2 * SECTOR];
            cipher.encrypt(first - 1, &mut zeros);
            let alike = zeros[..SECTOR] == zeros[SECTOR..];
            assert_eq!(alike, suite.mode == Mode::Ecb, "{suite:?}");
            cipher.decrypt(first, &mut text);
            assert_eq!(text, plain, "{suite:?}");
        }
    }

    #[test]
    fn plain_sees_32_bits_only() {
        for (ivgen, alike) in [(Ivgen::Plain, true), (Ivgen::Plain64, false)] {
            let suite = Suite {
                ivgen,
                ..Suite::default()
            };
            let cipher = SectorCipher::new(&suite, &key(&[3; 64])).unwrap();
            let mut sectors = [[0; SECTOR]; 2];
            cipher.encrypt(5, &mut sectors[0]);
            cipher.encrypt(5 + (1 << 32), &mut sectors[1]);
            assert_eq!(sectors[0] == sectors[1], alike);
        }
    }

    #[test]
    fn keys_are_wiped_and_do_not_show() {
        fn wiped<T: ZeroizeOnDrop>(_: &T) {}
        let cipher = SectorCipher::new(&Suite::default(), &key(&[0xa5; 64])).unwrap();
        wiped(&cipher);
        wiped(&cipher.data);
        match &cipher.data {
            Keyed::Aes128(c) => wiped(&**c),
            Keyed::Aes192(c) => wiped(&**c),
            Keyed::Aes256(c) => wiped(&**c),
            Keyed::Serpent(c) => wiped(&**c),
            Keyed::Twofish(c) => wiped(&**c),
        }
        wiped(&key(&[1]));
        let shown = format!("{cipher:?}").to_lowercase();
        assert!(!shown.contains("a5") && !shown.contains("165"), "{shown}");
    }

    #[test]
    fn a_key_of_another_length_is_refused() {
        let error = SectorCipher::new(&Suite::default(), &key(&[0; 32])).unwrap_err();
        assert!(error.to_string().contains("takes 64"), "{error}");
    }
}
