//! Locking the master key into a slot, and unlocking it.

use super::{Header, ITERATIONS_MAX, ITERATIONS_MIN, SLOTS, Slot, split};
use crate::{MasterKey, Passphrase, SectorCipher, kdf::iterations_for};
use block::{Error, ErrorKind, Result, Storage};
use zeroize::Zeroizing;

impl Header {
    /// Finds the slot that `passphrase` opens: its number and the master key. `offset` is where in
    /// `storage` the header is. Computes for up to [`ITERATIONS_MAX`] iterations.
    ///
    /// Fails with `Denied` when it opens none.
    pub fn unlock(
        &self,
        storage: &dyn Storage,
        offset: u64,
        passphrase: &Passphrase,
    ) -> Result<(usize, MasterKey)> {
        for index in 0..SLOTS {
            if let Some(key) = self.try_slot(storage, offset, index, passphrase)? {
                return Ok((index, key));
            }
        }
        Err(Error::new(
            ErrorKind::Denied,
            match self.active_slots() {
                0 => "none of its 8 key slots is active: its key is lost, and with it the data"
                    .to_owned(),
                1 => {
                    "wrong passphrase: it does not open the one key slot that is active".to_owned()
                }
                n => {
                    format!("wrong passphrase: it opens none of the {n} key slots that are active")
                }
            },
        ))
    }

    /// The master key, where the slot is active and `passphrase` opens it.
    pub(super) fn try_slot(
        &self,
        storage: &dyn Storage,
        offset: u64,
        index: usize,
        passphrase: &Passphrase,
    ) -> Result<Option<MasterKey>> {
        let Some(slot) = self.slots.get(index).filter(|slot| slot.active) else {
            return Ok(None);
        };
        let mut material = Zeroizing::new(vec![0; self.material_len()]);
        storage.read_at(offset + slot.key_offset, &mut material)?;
        // The sectors of a material are numbered from 0.
        self.slot_cipher(slot, passphrase)?
            .decrypt(0, &mut material);
        let key = split::merge(self.suite.hash, self.suite.key_len(), &material);
        let digest = self.digest_of(&key);
        let differ = digest.iter().zip(&self.digest);
        let differ = differ.fold(0, |all, (a, b)| all | (a ^ b));
        Ok((differ == 0).then_some(key))
    }

    fn slot_cipher(&self, slot: &Slot, passphrase: &Passphrase) -> Result<SectorCipher> {
        let mut key = MasterKey::zeroed(self.suite.key_len());
        self.suite.hash.derive(
            passphrase.bytes(),
            &slot.salt,
            slot.iterations,
            key.bytes_mut(),
        );
        SectorCipher::new(&self.suite, &key)
    }

    /// The digest by which a master key is known.
    pub(super) fn digest_of(&self, key: &MasterKey) -> [u8; super::DIGEST_LEN] {
        let mut digest = [0; super::DIGEST_LEN];
        self.suite
            .hash
            .derive(key.bytes(), &self.salt, self.iterations, &mut digest);
        digest
    }

    /// Locks `key` into slot `index`, in memory: the slot as it is to be, and its material.
    pub(super) fn seal(
        &self,
        index: usize,
        key: &MasterKey,
        passphrase: &Passphrase,
        iter_time_ms: u32,
    ) -> Result<(Slot, Vec<u8>)> {
        let mut slot = self.slots.get(index).copied().ok_or_else(|| {
            Error::invalid(format!("there is no key slot {index}: they are 0 to 7"))
        })?;
        slot.active = true;
        slot.iterations = iterations(&self.suite, self.suite.key_len(), iter_time_ms)?;
        crate::random(&mut slot.salt)?;
        let mut material = vec![0; self.material_len()];
        split::split(self.suite.hash, key, &mut material)?;
        self.slot_cipher(&slot, passphrase)?
            .encrypt(0, &mut material);
        Ok((slot, material))
    }
}

/// Iterations for a key of `len` bytes that take about `time_ms`; within what is opened again later.
pub(super) fn iterations(suite: &crate::Suite, len: usize, time_ms: u32) -> Result<u32> {
    if time_ms == 0 {
        return Err(Error::invalid("iter-time is 0: it must be 1 ms or more"));
    }
    let count = iterations_for(suite.hash, len, time_ms).max(ITERATIONS_MIN);
    // Eight slots must fit, and the digest's.
    let most = ITERATIONS_MAX / (2 * SLOTS as u64);
    if u64::from(count) > most {
        return Err(Error::invalid(format!(
            "iter-time {time_ms} ms asks for {count} iterations of PBKDF2 on this machine, the most is {most}"
        )));
    }
    Ok(count)
}
