//! Changing keys, so that no crash loses the last one.
//!
//! ```text
//!   add:    material, salt, iterations ─ barrier ─ "active"           ─ barrier
//!   erase:  "inactive" ─ barrier ─ salt, iterations, material over and over, a barrier after each
//! ```
//!
//! The word that makes a slot active or not lies in one sector: it is written whole or not at all.

use super::header::{SLOT_LEN, SLOTS_AT};
use super::{Header, SALT_LEN, SLOTS, Slot};
use crate::{MasterKey, Passphrase};
use block::{Error, ErrorKind, Result, Storage};

/// How often a material is overwritten with random bytes. What a device keeps of it elsewhere (in its
/// spare blocks, say) is out of reach.
const WIPES: usize = 8;

/// Which slots to erase.
#[derive(Clone, Copy, Debug)]
pub enum Erase<'a> {
    /// The one of this number.
    Slot(usize),
    /// All that this passphrase opens.
    Opened(&'a Passphrase),
}

fn denied(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Denied, message)
}

impl Header {
    /// Locks `key` into slot `index` (the first that is free when not given) for `passphrase`. The
    /// number of the slot; the change is durable then.
    ///
    /// Fails with `Denied` for a slot that is active and when none is free.
    pub fn add_key(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        key: &MasterKey,
        passphrase: &Passphrase,
        index: Option<usize>,
        iter_time_ms: u32,
    ) -> Result<usize> {
        if self.digest_of(key) != self.digest {
            return Err(denied("the key is not that of this volume"));
        }
        let free = self.slots.iter().position(|slot| !slot.active);
        let index = match index {
            Some(index) if self.slot(index)?.active => {
                return Err(denied(format!(
                    "key slot {index} is active: erase it first, or take another"
                )));
            }
            Some(index) => index,
            None => free.ok_or_else(|| {
                denied("all 8 key slots are active: erase one first (encrypt.state=inactive)")
            })?,
        };
        let (slot, material) = self.seal(index, key, passphrase, iter_time_ms)?;
        let mut after = self.clone();
        if let Some(changed) = after.slots.get_mut(index) {
            *changed = slot;
        }
        // What nobody would open again is not written.
        after.validate()?;
        storage.write_at(offset + slot.key_offset, &material)?;
        let asleep = Slot {
            active: false,
            ..slot
        };
        self.store(storage, offset, index, asleep)?;
        self.store(storage, offset, index, slot)?;
        Ok(index)
    }

    /// Erases key slots: marks them inactive and then wipes what was in them. Their numbers.
    ///
    /// Fails with `Denied` where no slot would be left, unless `force` is set: the disk cannot be read any
    /// more then.
    pub fn erase_keys(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        which: Erase<'_>,
        force: bool,
    ) -> Result<Vec<usize>> {
        let mut erased = Vec::new();
        match which {
            Erase::Slot(index) if !self.slot(index)?.active => {
                return Err(denied(format!("key slot {index} is not active")));
            }
            Erase::Slot(index) => erased.push(index),
            Erase::Opened(passphrase) => {
                for index in 0..SLOTS {
                    if self.try_slot(storage, offset, index, passphrase)?.is_some() {
                        erased.push(index);
                    }
                }
                if erased.is_empty() {
                    return Err(denied(
                        "the old passphrase opens no key slot: nothing erased",
                    ));
                }
            }
        }
        if erased.len() == self.active_slots() && !force {
            return Err(denied(format!(
                "no key slot would be left ({}), and the disk could never be read again: add another key \
                 first, or say --force",
                match erased.as_slice() {
                    [one] => format!("{one} is the only active one"),
                    _ => "the passphrase opens all that are active".to_owned(),
                }
            )));
        }
        for index in &erased {
            let slot = self.slot(*index)?;
            self.store(
                storage,
                offset,
                *index,
                Slot {
                    active: false,
                    ..slot
                },
            )?;
        }
        for index in &erased {
            self.wipe(storage, offset, *index)?;
        }
        Ok(erased)
    }

    fn wipe(&mut self, storage: &dyn Storage, offset: u64, index: usize) -> Result<()> {
        let slot = Slot {
            active: false,
            iterations: 0,
            salt: [0; SALT_LEN],
            ..self.slot(index)?
        };
        self.store(storage, offset, index, slot)?;
        let mut noise = vec![0; self.material_len()];
        for _ in 0..WIPES {
            crate::random(&mut noise)?;
            storage.write_at(offset + slot.key_offset, &noise)?;
            storage.sync()?;
        }
        Ok(())
    }

    fn slot(&self, index: usize) -> Result<Slot> {
        self.slots
            .get(index)
            .copied()
            .ok_or_else(|| Error::invalid(format!("there is no key slot {index}: they are 0 to 7")))
    }

    /// Writes a slot's fields, durably; where its state changes, nothing but that.
    fn store(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        index: usize,
        slot: Slot,
    ) -> Result<()> {
        let Some(kept) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let at = offset + (SLOTS_AT + index * SLOT_LEN) as u64;
        let bytes = slot.encode();
        let (state, _) = bytes.split_at(4);
        match kept.active == slot.active {
            true => storage.write_at(at, &bytes)?,
            false => storage.write_at(at, state)?,
        }
        storage.sync()?;
        *kept = slot;
        Ok(())
    }
}
