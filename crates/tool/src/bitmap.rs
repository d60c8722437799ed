//! Persistent bitmaps of an image: what is done to them, in an order, at once.

use block::{Error, Result, Storage, plain};
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
/// Memory: a piece and the table of two bitmaps, and the image's directory of bitmaps.
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
                let mut bits = match source {
                    Some(other) => bitmap::open(other, from)?,
                    None => bitmaps.stored(from)?,
                };
                bitmaps.merge(name, &mut bits)?;
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

/// The bitmaps of the image in `storage`, in their order. Memory: a piece of a bitmap, and its table.
///
/// # Errors
///
/// `Corrupt` for what breaks the specification, or what reading fails with.
pub fn list(storage: &dyn Storage) -> Result<Vec<Listed>> {
    let entries = bitmap::list(storage)?.into_iter().map(|entry| {
        let dirty_bytes = match entry.in_use() || entry.incompatible() {
            true => None,
            false => Some(bitmap::open(storage, entry.raw_name())?.dirty_bytes()?),
        };
        Ok(Listed { entry, dirty_bytes })
    });
    entries.collect()
}

/// Removes all bitmaps of the image in `storage`, which nobody else may use. All of them are gone afterwards, or none.
/// Returns how many there were.
///
/// # Errors
///
/// As [`list`], and what writing fails with.
pub fn remove_all(storage: &dyn Storage) -> Result<usize> {
    let entries = bitmap::list(storage)?;
    if entries.is_empty() {
        return Ok(0);
    }
    let mut bitmaps = Bitmaps::open(storage)?;
    for entry in &entries {
        bitmaps.remove(entry.raw_name())?;
    }
    bitmaps.commit()?;
    Ok(entries.len())
}

/// What becomes of bitmaps that are not sound when all are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Nothing is copied.
    Refuse,
    /// They are left out.
    Skip,
}

/// The bitmaps of the image in `source` that can be copied, and the names of those that cannot: whoever wrote the
/// image did not close it, or they have extra data that nobody knows.
///
/// # Errors
///
/// `Corrupt` for one that cannot, where `broken` refuses it, and for a directory that breaks the specification.
pub fn to_copy(source: &dyn Storage, broken: Broken) -> Result<(Vec<Entry>, Vec<String>)> {
    let (mut sound, mut left_out) = (Vec::new(), Vec::new());
    for entry in bitmap::list(source)? {
        match (entry.in_use() || entry.incompatible(), broken) {
            (false, _) => sound.push(entry),
            (true, Broken::Skip) => left_out.push(entry.name()),
            (true, Broken::Refuse) => {
                return Err(Error::corrupt(format!(
                    "{}: bitmap '{}' is inconsistent (the image was not closed): say --skip-broken-bitmaps to \
                     leave it out, or remove it with diskplane bitmap --remove",
                    source.name(),
                    plain(&entry.name())
                )));
            }
        }
    }
    Ok((sound, left_out))
}

/// Copies bitmaps `entries` of the image in `source` to the image in `target`, which nobody else may use, with their
/// granularity and state. All of them are there afterwards, or none. Memory: as [`apply`].
///
/// # Errors
///
/// `Invalid` for a name that the target has already, and whatever else [`Bitmaps`] refuses.
pub fn copy(source: &dyn Storage, entries: &[Entry], target: &dyn Storage) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let mut bitmaps = Bitmaps::open(target)?;
    for entry in entries {
        let name = entry.raw_name();
        bitmaps.add(name, Some(entry.granularity()))?;
        bitmaps.merge(name, &mut bitmap::open(source, name)?)?;
        bitmaps.set_enabled(name, entry.auto())?;
    }
    bitmaps.commit()
}
