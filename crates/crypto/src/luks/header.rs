//! The header and its key slots.
//!
//! ```text
//!     0 magic "LUKS\xba\xbe"    104 payload offset, sectors       208 + 48 n  slot n:
//!     6 version (16 bits)       108 key bytes                       0 active or not
//!     8 cipher name             112 master key digest               4 iterations
//!    40 cipher mode             132 master key salt                 8 salt
//!    72 hash                    164 master key iterations          40 material's offset, sectors
//!                               168 uuid                           44 stripes
//! ```

use super::{ALIGN, DIGEST_LEN, HEADER_LEN, ITERATIONS_MAX, SALT_LEN, SLOTS, STRIPES};
use crate::{SECTOR, Suite};
use block::{Error, Result, Storage};

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;
/// Where the slots begin.
pub(super) const SLOTS_AT: usize = 208;
/// Bytes of a slot.
pub(super) const SLOT_LEN: usize = 48;

/// A key slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Whether it holds the master key.
    pub active: bool,
    /// Iterations of PBKDF2 from passphrase to slot key; 0 where it is not active.
    pub iterations: u32,
    pub(super) salt: [u8; SALT_LEN],
    /// Where its material is: bytes from the header's beginning.
    pub key_offset: u64,
    /// Parts that the master key is split into.
    pub stripes: u32,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Cipher, mode and hash.
    pub suite: Suite,
    /// Where the materials end: bytes from the header's beginning.
    pub payload_offset: u64,
    pub(super) digest: [u8; DIGEST_LEN],
    pub(super) salt: [u8; SALT_LEN],
    /// Iterations of PBKDF2 from master key to its digest.
    pub iterations: u32,
    /// The volume's name.
    pub uuid: String,
    /// Its key slots.
    pub slots: [Slot; SLOTS],
}

fn wrong(field: &str, byte: usize, what: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("LUKS header: {field} at byte {byte} {what}"))
}

/// Bytes at fixed places of the header.
struct Fields<'a>(&'a [u8; HEADER_LEN]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        for (to, from) in out.iter_mut().zip(self.0.iter().skip(at)) {
            *to = *from;
        }
        out
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }

    /// A name padded with zeros.
    fn name(&self, field: &str, at: usize, len: usize) -> Result<&str> {
        let bytes = self.0.get(at..at + len).unwrap_or_default();
        let end = bytes
            .iter()
            .position(|b| *b == 0)
            .ok_or_else(|| wrong(field, at, "is not ended by a zero byte"))?;
        let name = std::str::from_utf8(bytes.get(..end).unwrap_or_default());
        name.map_err(|_| wrong(field, at, "is no text"))
    }
}

impl Slot {
    fn parse(fields: &Fields<'_>, index: usize) -> Result<Self> {
        let at = SLOTS_AT + index * SLOT_LEN;
        let field = |name: &str| format!("key slot {index}: {name}");
        let active = match fields.u32(at) {
            ACTIVE => true,
            INACTIVE => false,
            other => {
                let what = format!("is {other:#x}, neither active nor inactive");
                return Err(wrong(&field("state"), at, what));
            }
        };
        let iterations = fields.u32(at + 4);
        if active && iterations == 0 {
            return Err(wrong(&field("iterations"), at + 4, "is 0"));
        }
        let stripes = fields.u32(at + 44);
        if stripes != STRIPES {
            let what = format!("is {stripes}, where all have {STRIPES}");
            return Err(wrong(&field("stripes"), at + 44, what));
        }
        Ok(Self {
            active,
            iterations,
            salt: fields.bytes(at + 8),
            key_offset: u64::from(fields.u32(at + 40)) * SECTOR as u64,
            stripes,
        })
    }

    /// As it is in the header.
    pub(super) fn encode(&self) -> [u8; SLOT_LEN] {
        let state = if self.active { ACTIVE } else { INACTIVE };
        let mut out = [0; SLOT_LEN];
        put(&mut out, 0, &state.to_be_bytes());
        put(&mut out, 4, &self.iterations.to_be_bytes());
        put(&mut out, 8, &self.salt);
        put(&mut out, 40, &sectors(self.key_offset).to_be_bytes());
        put(&mut out, 44, &self.stripes.to_be_bytes());
        out
    }
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(field) = out.get_mut(at..at + bytes.len()) {
        field.copy_from_slice(bytes);
    }
}

/// Byte offsets of headers came from 32 bits of sectors.
fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR as u64).unwrap_or(u32::MAX)
}

impl Header {
    /// Reads the header at `offset` of `storage`; with its materials it takes no more than `len` bytes.
    ///
    /// Fails with `Corrupt` (field and byte) or `Unsupported` (the name of what is lacking).
    pub fn read(storage: &dyn Storage, offset: u64, len: u64) -> Result<Self> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| storage.len().is_ok_and(|there| end > there)) {
            return Err(Error::corrupt(format!(
                "LUKS header: its {len} bytes at {offset:#x} end behind the file's end ({:#x})",
                storage.len()?
            )));
        }
        if len < HEADER_LEN as u64 {
            return Err(Error::corrupt(format!(
                "LUKS header: it has {len} bytes, where {HEADER_LEN} are needed"
            )));
        }
        let mut bytes = [0; HEADER_LEN];
        storage.read_at(offset, &mut bytes)?;
        let header = Self::parse(&bytes)?;
        for (index, slot) in header.slots.iter().enumerate() {
            if slot.key_offset + header.material_len() as u64 > len {
                return Err(wrong(
                    &format!("key slot {index}: material's offset"),
                    SLOTS_AT + index * SLOT_LEN + 40,
                    format_args!(
                        "is {:#x}: it ends behind the header's {len} bytes",
                        slot.key_offset
                    ),
                ));
            }
        }
        Ok(header)
    }

    /// Parses a header.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self> {
        let fields = Fields(bytes);
        if fields.bytes::<6>(0) != MAGIC {
            return Err(wrong("magic", 0, "is not that of LUKS"));
        }
        let version = u16::from_be_bytes(fields.bytes(6));
        if version != 1 {
            return Err(Error::unsupported(format!(
                "LUKS header: version at byte 6 is {version}, known is 1"
            )));
        }
        let suite = Suite::parse(
            fields.name("cipher name", 8, 32)?,
            fields.name("cipher mode", 40, 32)?,
            fields.name("hash", 72, 32)?,
            fields.u32(108),
        )
        .map_err(|error| error.within("LUKS header"))?;
        let slots: Result<Vec<Slot>> = (0..SLOTS).map(|n| Slot::parse(&fields, n)).collect();
        let slots = slots?
            .try_into()
            .map_err(|_| Error::corrupt("LUKS header: key slots"))?;
        let header = Self {
            suite,
            payload_offset: u64::from(fields.u32(104)) * SECTOR as u64,
            digest: fields.bytes(112),
            salt: fields.bytes(132),
            iterations: fields.u32(164),
            uuid: fields.name("uuid", 168, 40)?.to_owned(),
            slots,
        };
        header.validate()?;
        Ok(header)
    }

    pub(super) fn validate(&self) -> Result<()> {
        if self.iterations == 0 {
            return Err(wrong("master key iterations", 164, "is 0"));
        }
        // What a passphrase that fits no slot costs.
        let active = self.slots.iter().filter(|slot| slot.active);
        let total: u64 = active
            .map(|slot| u64::from(slot.iterations) + u64::from(self.iterations))
            .sum();
        if total > ITERATIONS_MAX {
            return Err(Error::unsupported(format!(
                "LUKS header: its key slots ask for {total} iterations of PBKDF2, the most is {ITERATIONS_MAX}"
            )));
        }
        if self.payload_offset < ALIGN {
            let what = format!("is {:#x}: inside the header", self.payload_offset);
            return Err(wrong("payload offset", 104, what));
        }
        let len = self.material_len() as u64;
        for (index, slot) in self.slots.iter().enumerate() {
            let misplaced = |what: String| {
                let field = format!("key slot {index}: material's offset");
                Err(wrong(&field, SLOTS_AT + index * SLOT_LEN + 40, what))
            };
            let at = slot.key_offset;
            if at < ALIGN {
                return misplaced(format!("is {at:#x}: inside the header"));
            }
            if at + len > self.payload_offset {
                return misplaced(format!(
                    "is {at:#x}: its {len} bytes reach into the payload at {:#x}",
                    self.payload_offset
                ));
            }
            let overlaps =
                |other: &Slot| at < other.key_offset + len && other.key_offset < at + len;
            if let Some(other) = self.slots.iter().take(index).position(overlaps) {
                return misplaced(format!("is {at:#x}: it overlaps that of key slot {other}"));
            }
        }
        Ok(())
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        put(&mut out, 0, &MAGIC);
        put(&mut out, 6, &1u16.to_be_bytes());
        put(&mut out, 8, self.suite.algorithm.family().as_bytes());
        put(&mut out, 40, self.suite.mode_name().as_bytes());
        put(&mut out, 72, self.suite.hash.to_string().as_bytes());
        put(&mut out, 104, &sectors(self.payload_offset).to_be_bytes());
        let key_len = u32::try_from(self.suite.key_len()).unwrap_or(u32::MAX);
        put(&mut out, 108, &key_len.to_be_bytes());
        put(&mut out, 112, &self.digest);
        put(&mut out, 132, &self.salt);
        put(&mut out, 164, &self.iterations.to_be_bytes());
        put(&mut out, 168, self.uuid.as_bytes());
        for (index, slot) in self.slots.iter().enumerate() {
            put(&mut out, SLOTS_AT + index * SLOT_LEN, &slot.encode());
        }
        out
    }

    /// Bytes of a slot's material: at most 64 times [`STRIPES`].
    pub fn material_len(&self) -> usize {
        self.suite.key_len() * STRIPES as usize
    }

    /// Whether slot `index` holds the key; not, where there is none.
    pub fn is_active(&self, index: usize) -> bool {
        self.slots.get(index).is_some_and(|slot| slot.active)
    }

    /// How many slots hold the key.
    pub fn active_slots(&self) -> usize {
        self.slots.iter().filter(|slot| slot.active).count()
    }
}
