//! A new header with its first key.

use super::slot::iterations;
use super::{
    ALIGN, DIGEST_LEN, Header, ITER_TIME_MS_DEFAULT, ITERATIONS_MIN, SALT_LEN, SLOTS, STRIPES, Slot,
};
use crate::{MasterKey, Passphrase, Suite};
use block::{Result, Storage, align_up};

/// What a new volume is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FormatOptions {
    /// Cipher, mode and hash.
    pub suite: Suite,
    /// Milliseconds that unlocking its first slot is to take on this machine.
    pub iter_time_ms: u32,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self {
            suite: Suite::default(),
            iter_time_ms: ITER_TIME_MS_DEFAULT,
        }
    }
}

impl FormatOptions {
    /// Bytes that header and materials of such a volume take.
    pub fn volume_len(&self) -> u64 {
        ALIGN + SLOTS as u64 * self.slot_len()
    }

    /// Bytes that the material of a slot takes.
    fn slot_len(&self) -> u64 {
        align_up(self.suite.key_len() as u64 * u64::from(STRIPES), ALIGN)
    }
}

/// A new header with the material of its one active slot, to be written. Nothing in it is
/// secret: the key is in there encrypted only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The header.
    pub header: Header,
    material: Vec<u8>,
}

impl Volume {
    /// Makes a header with a new random master key, which `passphrase` opens. Computes for about as
    /// long as the options say.
    pub fn format(options: &FormatOptions, passphrase: &Passphrase) -> Result<Self> {
        let suite = options.suite;
        suite.validate()?;
        let key = MasterKey::random(suite.key_len())?;
        let each = options.slot_len();
        let mut salt = [0; SALT_LEN];
        crate::random(&mut salt)?;
        let mut next = ALIGN;
        let slots = [(); SLOTS].map(|()| {
            let key_offset = next;
            next += each;
            Slot {
                active: false,
                iterations: 0,
                salt: [0; SALT_LEN],
                key_offset,
                stripes: STRIPES,
            }
        });
        // As QEMU: an eighth of the time for the digest.
        let digest_iterations = iterations(&suite, DIGEST_LEN, options.iter_time_ms)? / 8;
        let mut header = Header {
            suite,
            payload_offset: next,
            digest: [0; DIGEST_LEN],
            salt,
            iterations: digest_iterations.max(ITERATIONS_MIN),
            uuid: uuid()?,
            slots,
        };
        header.digest = header.digest_of(&key);
        let (slot, material) = header.seal(0, &key, passphrase, options.iter_time_ms)?;
        if let Some(first) = header.slots.first_mut() {
            *first = slot;
        }
        Ok(Self { header, material })
    }

    /// Bytes that header and materials take.
    pub fn len(&self) -> u64 {
        self.header.payload_offset
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Writes it at `offset` of `storage`, where zeros are; the caller syncs.
    pub fn write(&self, storage: &dyn Storage, offset: u64) -> Result<()> {
        self.write_material(storage, offset)?;
        storage.write_at(offset, &self.header.encode())
    }

    /// Writes all of it but the header, as [`Volume::write`].
    pub fn write_material(&self, storage: &dyn Storage, offset: u64) -> Result<()> {
        match self.header.slots.first() {
            Some(slot) => storage.write_at(offset + slot.key_offset, &self.material),
            None => Ok(()),
        }
    }
}

/// A random UUID (RFC 9562, version 4).
fn uuid() -> Result<String> {
    let mut bytes = [0; 16];
    crate::random(&mut bytes)?;
    let number = u128::from_be_bytes(bytes);
    let number = number & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{number:032x}");
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32];
    let parts = parts.map(|range| hex.get(range).unwrap_or_default().to_owned());
    Ok(parts.join("-"))
}
