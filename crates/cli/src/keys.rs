//! `diskplane amend -o encrypt.…`: the key slots of an encrypted image.
//!
//! ```text
//!   encrypt.state=active,encrypt.new-secret=ID[,encrypt.keyslot=N][,encrypt.iter-time=MS]   --key-file FILE
//!   encrypt.state=inactive,encrypt.old-secret=ID
//!   encrypt.state=inactive,encrypt.keyslot=N
//! ```
//!
//! As in QEMU; of a luks image the options are called so without `encrypt.` too. Adding one needs a passphrase that opens the image; erasing one does not.

use crate::{encrypt, secret::Objects};
use anyhow::{Result, anyhow, bail};
use block::Storage;
use crypto::Passphrase;
use crypto::luks::{Erase, ITER_TIME_MS_DEFAULT, SLOTS};
use image::Format;
use image::qcow2::{Header, crypt};

/// What is to become of a key slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    active: Option<bool>,
    new_secret: Option<String>,
    old_secret: Option<String>,
    slot: Option<usize>,
    iter_time_ms: Option<u32>,
}

impl Change {
    /// From options and their values. `None` where there are none.
    pub fn parse(wishes: &[(String, String)]) -> Result<Option<Self>> {
        if wishes.is_empty() {
            return Ok(None);
        }
        let mut change = Self::default();
        for (key, value) in wishes {
            match key.as_str() {
                "encrypt.state" => {
                    change.active = Some(match value.as_str() {
                        "active" => true,
                        "inactive" => false,
                        _ => bail!("-o {key}={value}: it must be active or inactive"),
                    });
                }
                "encrypt.new-secret" => change.new_secret = Some(value.clone()),
                "encrypt.old-secret" => change.old_secret = Some(value.clone()),
                "encrypt.keyslot" => {
                    let slot = value.parse().ok().filter(|slot| *slot < SLOTS);
                    let slot =
                        slot.ok_or_else(|| anyhow!("-o {key}={value}: it must be 0 to 7"))?;
                    change.slot = Some(slot);
                }
                "encrypt.iter-time" => change.iter_time_ms = Some(encrypt::iter_time(value)?),
                _ => bail!("-o {key}: there is no such option to amend"),
            }
        }
        change.validate()?;
        Ok(Some(change))
    }

    fn validate(&self) -> Result<()> {
        let refuse = |option: &str| bail!("-o {option} does not go with this encrypt.state");
        match self.active {
            None => bail!("-o encrypt.…: say encrypt.state=active or encrypt.state=inactive too"),
            Some(true) if self.old_secret.is_some() => refuse("encrypt.old-secret"),
            Some(true) if self.new_secret.is_none() => {
                bail!("-o encrypt.state=active: say encrypt.new-secret=ID too")
            }
            Some(false) if self.new_secret.is_some() => refuse("encrypt.new-secret"),
            Some(false) if self.iter_time_ms.is_some() => refuse("encrypt.iter-time"),
            Some(false) if self.old_secret.is_some() == self.slot.is_some() => {
                bail!(
                    "-o encrypt.state=inactive: say what to erase, encrypt.old-secret=ID or encrypt.keyslot=N"
                )
            }
            _ => Ok(()),
        }
    }

    /// Carries it out; durable when this returns. `old` opens the image, where a key is added; with `force` that takes the place
    /// of the one in its slot.
    pub fn apply(
        &self,
        storage: &dyn Storage,
        format: Format,
        objects: &Objects,
        old: Option<&Passphrase>,
        force: bool,
    ) -> Result<()> {
        let name = storage.name();
        let named = |error: block::Error| error.within(&name);
        let (offset, mut luks) = match format {
            Format::Luks => (0, image::luks::header(storage)?),
            _ => crypt::luks_header(storage, &Header::read(storage)?).map_err(named)?,
        };
        if let Some(id) = &self.new_secret {
            let new = objects.find(id)?;
            let old = old.ok_or_else(|| {
                anyhow!(
                    "{name}: a new key needs a passphrase that opens the image: say --key-file FILE"
                )
            })?;
            let (_, key) = luks.unlock(storage, offset, old).map_err(named)?;
            if let (true, Some(slot)) = (force, self.slot)
                && luks.is_active(slot)
            {
                luks.erase_keys(storage, offset, Erase::Slot(slot), force)
                    .map_err(named)?;
            }
            let iter_time_ms = self.iter_time_ms.unwrap_or(ITER_TIME_MS_DEFAULT);
            luks.add_key(storage, offset, &key, &new, self.slot, iter_time_ms)
                .map_err(named)?;
            return Ok(());
        }
        let old = match &self.old_secret {
            Some(id) => Some(objects.find(id)?),
            None => None,
        };
        if let (true, None, Some(slot)) = (force, &old, self.slot)
            && !luks.is_active(slot)
        {
            return Ok(());
        }
        let which = match (&old, self.slot) {
            (Some(passphrase), _) => Erase::Opened(passphrase),
            (None, Some(slot)) => Erase::Slot(slot),
            (None, None) => bail!("-o encrypt.state=inactive: say what to erase"),
        };
        luks.erase_keys(storage, offset, which, force)
            .map_err(named)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_does_not_go_together() {
        for (text, why) in [
            ("keyslot=1", Some("say encrypt.state")),
            ("state=on", Some("active or inactive")),
            ("state=active", Some("new-secret=ID")),
            ("state=active,new-secret=a", None),
            ("state=active,new-secret=a,keyslot=7,iter-time=5", None),
            ("state=active,new-secret=a,keyslot=8", Some("0 to 7")),
            ("state=active,new-secret=a,old-secret=b", Some("old-secret")),
            ("state=active,new-secret=a,iter-time=0", Some("1 or more")),
            ("state=inactive", Some("what to erase")),
            (
                "state=inactive,keyslot=1,old-secret=b",
                Some("what to erase"),
            ),
            ("state=inactive,keyslot=1", None),
            ("state=inactive,old-secret=b", None),
            ("state=inactive,keyslot=1,new-secret=b", Some("new-secret")),
            ("state=inactive,keyslot=1,iter-time=5", Some("iter-time")),
        ] {
            let wishes: Vec<_> = text
                .split(',')
                .filter_map(|pair| pair.split_once('='))
                .map(|(key, value)| (format!("encrypt.{key}"), value.to_owned()))
                .collect();
            match (Change::parse(&wishes), why) {
                (Ok(_), None) => {}
                (Ok(_), Some(why)) => panic!("{text}: accepted, though {why}"),
                (Err(error), why) => {
                    let error = error.to_string();
                    assert!(
                        why.is_some_and(|why| error.contains(why)),
                        "{text}: {error}"
                    );
                }
            }
        }
        assert_eq!(Change::parse(&[]).unwrap(), None);
    }
}
