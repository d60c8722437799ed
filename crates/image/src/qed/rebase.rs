//! Another backing file, or nothing above it: what commit and rebase change of a closed image.
//!
//! The new name goes where the old one is not, and is durable before the header's sector leads to it. An L1 table
//! can lose its entries in any order: each leads to data that the backing file has too by then.

use super::header::{F_BACKING_FILE, F_BACKING_FORMAT_NO_PROBE, Header};
use super::resize::write_header;
use block::{Context, Error, Result, Storage, limits};

/// Where a name can be, before and behind where the longest one in the other place is.
const PLACES: [u64; 2] = [512, 2048];

/// Makes `backing`, a name and whether it is raw (all that an image records), the backing file of the closed image in
/// `storage`; `None`: it gets none.
///
/// # Errors
///
/// `Invalid` for a name that is empty, too long or has a zero byte; `Unsupported` for an image that was not closed
/// cleanly; what the host fails with. The image has its old backing file then.
pub fn set_backing(storage: &dyn Storage, backing: Option<(&str, bool)>) -> Result<()> {
    change(storage, backing).context(|| storage.name())
}

fn change(storage: &dyn Storage, backing: Option<(&str, bool)>) -> Result<()> {
    let mut header = closed(storage)?;
    let old = match header.features & F_BACKING_FILE {
        0 => 0..0,
        _ => {
            let at = u64::from(header.backing_filename_offset);
            at..at + u64::from(header.backing_filename_size)
        }
    };
    header.features &= !(F_BACKING_FILE | F_BACKING_FORMAT_NO_PROBE);
    (header.backing_filename_offset, header.backing_filename_size) = (0, 0);
    if let Some((name, raw)) = backing {
        let most = limits::FILE_NAME_BYTES_MAX;
        if !block::name::fits(name, most) {
            return Err(Error::invalid(format!(
                "a backing file's name of {} bytes: it has 1 to {most}, none of them 0",
                block::name::len(name)
            )));
        }
        let bytes = block::name::bytes(name);
        let len = bytes.len() as u64;
        let head = u64::from(header.header_size) * u64::from(header.cluster_size);
        let behind = old.end.next_multiple_of(512);
        let is_free = |at: &u64| {
            let end = *at + len;
            *at >= PLACES[0] && end <= head && (end <= old.start || *at >= old.end)
        };
        let mut places = PLACES.into_iter().chain([behind]);
        let at = places.find(is_free).ok_or_else(|| {
            Error::unsupported(
                "the old backing file's name leaves no room for another one in the header",
            )
        })?;
        storage.write_at(at, &bytes)?;
        storage.sync()?;
        header.features |= F_BACKING_FILE;
        if raw {
            header.features |= F_BACKING_FORMAT_NO_PROBE;
        }
        // Both are below 4 GiB: within the header's clusters.
        header.backing_filename_offset = at as u32;
        header.backing_filename_size = len as u32;
    }
    header.autoclear_features = 0;
    write_header(storage, &header)
}

/// Takes everything out of the closed image in `storage`: it reads as its backing file then. What lies behind an L1
/// table that follows the header is cut off; of another one nothing refers to it.
///
/// # Errors
///
/// `Unsupported` for an image that was not closed cleanly; what the host fails with.
pub fn empty(storage: &dyn Storage) -> Result<()> {
    let run = || -> Result<()> {
        let header = closed(storage)?;
        let (l1, len) = (header.l1_table_offset, header.table_bytes());
        storage.write_zeroes(l1, len, false)?;
        storage.sync()?;
        if l1 == u64::from(header.header_size) * u64::from(header.cluster_size) {
            storage.set_len(l1 + len)?;
            storage.sync()?;
        }
        Ok(())
    };
    run().context(|| storage.name())
}

/// The header of an image that was closed cleanly.
fn closed(storage: &dyn Storage) -> Result<Header> {
    let header = Header::read_unnamed(storage)?;
    match header.needs_check() {
        false => Ok(header),
        true => Err(Error::unsupported(
            "it was not closed cleanly (need-check bit): run diskplane check --repair all",
        )),
    }
}
