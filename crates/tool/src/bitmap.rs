//! Persistent bitmaps of an image: what is done to them, in an order, at once.

use block::{Result, Storage};
use image::qcow2::bitmap::{self, Bitmaps, Entry};

/// One thing to do to a bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make it, without a bit set, enabled.
    Add {
        /// Bytes that a bit stands for; by the cluster size where not given.
        granularity: Option<u64>,
    },
    /// Remove it.
    Remove,
    /// Clear its bits.
    Clear,
    /// From the next use of the image on, note the disk's changes in it.
    Enable,
    /// Note nothing more.
    Disable,
    /// Set the bits that this bitmap has set.
    Merge {
        /// Its name.
        source: Vec<u8>,
    },
}

/// Does `actions`, in their order, to the bitmap `name` of the image in `storage`, which nobody else may use. All of
/// them are in force afterwards, or none. Bitmaps to merge are of the image in `source`, or of the same image.
///
/// Memory: two bitmaps, each at most 512 MiB, and the image's directory of bitmaps.
///
/// # Errors
///
/// Whatever an action is refused for ([`Bitmaps`] says for what), and what the host fails with.
pub fn apply(
    storage: &dyn Storage,
    name: &[u8],
    actions: &[Action],
    source: Option<&dyn Storage>,
) -> Result<()> {
    let mut bitmaps = Bitmaps::open(storage)?;
    for action in actions {
        match action {
            Action::Add { granularity } => bitmaps.add(name, *granularity)?,
            Action::Remove => bitmaps.remove(name)?,
            Action::Clear => bitmaps.clear(name)?,
            Action::Enable => bitmaps.set_enabled(name, true)?,
            Action::Disable => bitmaps.set_enabled(name, false)?,
            Action::Merge { source: from } => {
                let bits = match source {
                    Some(other) => bitmap::load(other, from)?,
                    None => bitmaps.bits(from)?,
                };
                bitmaps.merge(name, &bits)?;
            }
        }
    }
    bitmaps.commit()
}

/// A bitmap, and what it says.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The bitmap.
    pub entry: Entry,
    /// Bytes of the disk that it has set; `None` where it cannot be used.
    pub dirty_bytes: Option<u64>,
}

/// The bitmaps of the image in `storage`, in their order. Memory: one bitmap, at most 512 MiB.
///
/// # Errors
///
/// `Corrupt` for what breaks the specification, or what reading fails with.
pub fn list(storage: &dyn Storage) -> Result<Vec<Listed>> {
    let entries = bitmap::list(storage)?.into_iter().map(|entry| {
        let dirty_bytes = match entry.in_use() || entry.incompatible() {
            true => None,
            false => Some(bitmap::load(storage, entry.raw_name())?.dirty_bytes()),
        };
        Ok(Listed { entry, dirty_bytes })
    });
    entries.collect()
}
