//! Writing a new, empty image.
//!
//! ```text
//!   cluster 0   header, backing file's name
//!           1 … L1 table, all zeros
//! ```
//!
//! The header is written last, behind a barrier: until then the file shows no format.

use super::header::{
    CLUSTER_BYTES, F_BACKING_FILE, F_BACKING_FORMAT_NO_PROBE, HEADER_LEN, Header, TABLE_CLUSTERS,
    disk_bytes_max,
};
use block::{Context, Error, Result, Storage, align_up, size};

/// What a new image is to be. The default is QEMU's: clusters of 64 KiB, tables of 4 clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the virtual disk, rounded up to whole sectors of 512.
    pub size: u64,
    /// Bytes of a cluster: a power of two from 4 KiB to 64 MiB.
    pub cluster_size: u64,
    /// Clusters of a table: a power of two up to 16.
    pub table_size: u64,
    /// Name of the backing file as it is to be stored, and whether it is raw. The image records no other format.
    pub backing: Option<(String, bool)>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_size: 64 << 10,
            table_size: 4,
            backing: None,
        }
    }
}

impl CreateOptions {
    /// Checks the rules of the format. Errors name the option and what it may be.
    pub fn validate(&self) -> Result<()> {
        let (cluster, table) = (self.cluster_size, self.table_size);
        if !cluster.is_power_of_two() || !CLUSTER_BYTES.contains(&cluster) {
            return Err(Error::invalid(format!(
                "cluster_size is {cluster}: it must be a power of two from 4K to 64M"
            )));
        }
        if !table.is_power_of_two() || !TABLE_CLUSTERS.contains(&table) {
            return Err(Error::invalid(format!(
                "table_size is {table}: it must be a power of two from 1 to 16 (clusters)"
            )));
        }
        let most = disk_bytes_max(cluster, table);
        if self.size > most {
            return Err(Error::invalid(format!(
                "a disk of {} is too large for clusters of {} and tables of {table}: the most is {}",
                size::human(self.size),
                size::human(cluster),
                size::human(most)
            )));
        }
        if let Some((name, _)) = &self.backing {
            let most = (cluster as usize - HEADER_LEN).min(block::limits::FILE_NAME_BYTES_MAX);
            if !block::name::fits(name, most) {
                return Err(Error::invalid(format!(
                    "the backing file's name has {} bytes: 1 to {most} without a zero byte are possible",
                    block::name::len(name)
                )));
            }
        }
        Ok(())
    }

    fn header(&self) -> Header {
        let (name, raw) = match &self.backing {
            Some((name, raw)) => (name.as_str(), *raw),
            None => ("", false),
        };
        let mut features = 0;
        if !name.is_empty() {
            features |= F_BACKING_FILE;
        }
        if raw {
            features |= F_BACKING_FORMAT_NO_PROBE;
        }
        // All were checked: sizes are at most 64 MiB, the name has some thousand bytes at most.
        Header {
            cluster_size: self.cluster_size as u32,
            table_size: self.table_size as u32,
            header_size: 1,
            features,
            compat_features: 0,
            autoclear_features: 0,
            l1_table_offset: self.cluster_size,
            image_size: align_up(self.size, 512),
            backing_filename_offset: if name.is_empty() {
                0
            } else {
                HEADER_LEN as u32
            },
            backing_filename_size: block::name::len(name) as u32,
            backing: None,
        }
    }
}

/// Makes an image of what `storage` holds, which is lost. Fails with `Invalid` where the options are not
/// possible, and with what writing failed with.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    options.validate()?;
    write(storage, options).context(|| storage.name())
}

fn write(storage: &dyn Storage, options: &CreateOptions) -> Result<()> {
    let header = options.header();
    let end = header.l1_table_offset + header.table_bytes();
    // What is behind the new end reads as zeros.
    storage.set_len(0)?;
    storage.set_len(end)?;
    let mut first = header.to_bytes().to_vec();
    if let Some((name, _)) = &options.backing {
        first.extend_from_slice(&block::name::bytes(name));
    }
    first.resize(first.len().next_multiple_of(512), 0);
    storage.sync()?;
    storage.write_at(0, &first)?;
    storage.sync()
}
