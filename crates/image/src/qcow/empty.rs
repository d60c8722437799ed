//! Nothing above the backing file: what a commit changes of a closed image.

use super::header::Header;
use block::{Context, Result, Storage};

/// Takes everything out of the closed image in `storage`: it reads as its backing file then. The L1 table can lose its
/// entries in any order: each leads to data that the backing file has too by then. What lies behind a table that comes
/// first is cut off; of another one nothing refers to it.
///
/// # Errors
///
/// As [`Header::read`]; what the host fails with.
pub fn empty(storage: &dyn Storage) -> Result<()> {
    let run = || -> Result<()> {
        let header = Header::read_unnamed(storage)?;
        let (l1, end) = (header.l1_table_offset, header.l1_end());
        storage.write_zeroes(l1, end - l1, false)?;
        storage.sync()?;
        // QEMU leaves pieces of 512 bytes behind it; here nothing comes into the table's last sector.
        let name_end = header.backing_file_offset + u64::from(header.backing_file_size);
        if name_end <= l1 {
            storage.set_len(end)?;
            storage.sync()?;
        }
        Ok(())
    };
    run().context(|| storage.name())
}
