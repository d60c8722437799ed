//! Changes of a closed image's header.

use super::header::{F_NEED_CHECK, Header, disk_bytes_max};
use crate::metadata::read_short;
use block::{Context, Error, Result, Storage, align_up, size};

/// Writes the header's fields, in one sector; what follows them stays as it is.
pub(super) fn write_header(storage: &dyn Storage, header: &Header) -> Result<()> {
    let mut sector = read_short(storage, 0, 512)?;
    for (to, from) in sector.iter_mut().zip(header.to_bytes()) {
        *to = from;
    }
    storage.write_at(0, &sector)?;
    storage.sync()
}

/// Whether the disk of the closed image in `storage` can get `bytes`.
///
/// Fails with `Invalid` when that is too large, and `Unsupported` when it is to shrink or was not closed cleanly.
pub fn may_grow(storage: &dyn Storage, bytes: u64) -> Result<()> {
    grown(storage, bytes).context(|| storage.name()).map(drop)
}

/// Makes the disk of the closed image in `storage` `bytes` long (rounded up to whole sectors), which is not less
/// than it is. Its tables have room for the largest disk from the beginning. Fails as [`may_grow`], or with what
/// writing failed with.
pub fn grow(storage: &dyn Storage, bytes: u64) -> Result<()> {
    let header = grown(storage, bytes).context(|| storage.name())?;
    write_header(storage, &header).context(|| storage.name())
}

/// The header of the larger disk.
fn grown(storage: &dyn Storage, bytes: u64) -> Result<Header> {
    let mut header = Header::read_unnamed(storage)?;
    if header.needs_check() {
        return Err(Error::unsupported(
            "it was not closed cleanly (need-check bit): run diskplane check --repair all",
        ));
    }
    if bytes < header.image_size {
        return Err(Error::unsupported("a QED image cannot shrink"));
    }
    let most = disk_bytes_max(u64::from(header.cluster_size), u64::from(header.table_size));
    if bytes > most {
        return Err(Error::invalid(format!(
            "a disk of {} is too large for the image's tables: the most is {}",
            size::human(bytes),
            size::human(most)
        )));
    }
    header.image_size = align_up(bytes, 512);
    header.autoclear_features = 0;
    Ok(header)
}

/// Clears the need-check bit of the closed image in `storage`, whose check found nothing but leaks.
pub fn clear_need_check(storage: &dyn Storage) -> Result<()> {
    let mut header = Header::read(storage)?;
    header.features &= !F_NEED_CHECK;
    write_header(storage, &header).context(|| storage.name())
}
