//! Images that are written in one go, from their first cluster to their last, compressed where their format has it.

use crate::{qcow, qcow2, vmdk};
use block::Result;
use std::fmt::Debug;

/// A new image under way. Clusters come in order; those left out read as the backing file, or as zeros.
pub trait Sequential: Debug + Send {
    /// Bytes of a cluster.
    fn cluster_size(&self) -> u64;

    /// Clusters of the disk.
    fn clusters(&self) -> u64;

    /// Whether what is left out reads as a backing file.
    fn has_backing(&self) -> bool;

    /// What packs clusters for it; any number of them may share the work.
    ///
    /// # Errors
    ///
    /// Where there is no memory for it.
    fn packer(&self) -> Result<Box<dyn Pack>>;

    /// Puts cluster `guest` there as it is, or as the format has it.
    ///
    /// # Errors
    ///
    /// For clusters that are out of order, or of another size; what writing fails with.
    fn put_data(&mut self, guest: u64, bytes: &[u8]) -> Result<()>;

    /// Puts cluster `guest` there as a packer made it.
    ///
    /// # Errors
    ///
    /// As [`Sequential::put_data`].
    fn put_compressed(&mut self, guest: u64, packed: &[u8]) -> Result<()>;

    /// Makes cluster `guest` read as zeros whatever the backing file has.
    ///
    /// # Errors
    ///
    /// As [`Sequential::put_data`].
    fn put_zero(&mut self, guest: u64) -> Result<()>;

    /// Writes what is left. The image is complete and durable afterwards.
    ///
    /// # Errors
    ///
    /// What writing fails with.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Packs clusters, one after the other. What it gives depends on its input alone.
pub trait Pack: Send {
    /// Packs `cluster` into `out`, whose contents are lost. `false` when it is to be stored as it is.
    fn pack(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> bool;
}

/// The same methods, of formats' own types.
macro_rules! sequential {
    ($writer:ty, $packer:expr) => {
        impl Sequential for $writer {
            fn cluster_size(&self) -> u64 {
                <$writer>::cluster_size(self)
            }

            fn clusters(&self) -> u64 {
                <$writer>::clusters(self)
            }

            fn has_backing(&self) -> bool {
                <$writer>::has_backing(self)
            }

            fn packer(&self) -> Result<Box<dyn Pack>> {
                $packer(self)
            }

            fn put_data(&mut self, guest: u64, bytes: &[u8]) -> Result<()> {
                <$writer>::put_data(self, guest, bytes)
            }

            fn put_compressed(&mut self, guest: u64, packed: &[u8]) -> Result<()> {
                <$writer>::put_compressed(self, guest, packed)
            }

            fn put_zero(&mut self, guest: u64) -> Result<()> {
                <$writer>::put_zero(self, guest)
            }

            fn finish(self: Box<Self>) -> Result<()> {
                <$writer>::finish(*self)
            }
        }
    };
}

/// The same of formats' own packers.
macro_rules! packer {
    ($compressor:ty) => {
        impl Pack for $compressor {
            fn pack(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> bool {
                <$compressor>::pack(self, cluster, out)
            }
        }
    };
}

sequential!(qcow2::ImageWriter<'_>, |writer: &qcow2::ImageWriter<'_>| {
    qcow2_packer(writer.compression())
});
sequential!(qcow::ImageWriter<'_>, |_: &qcow::ImageWriter<'_>| {
    qcow2_packer(qcow2::Compression::Zlib)
});
sequential!(
    vmdk::StreamWriter<'_>,
    |_: &vmdk::StreamWriter<'_>| -> Result<Box<dyn Pack>> {
        Ok(Box::new(vmdk::Compressor::default()))
    }
);
packer!(qcow2::Compressor);
packer!(vmdk::Compressor);

fn qcow2_packer(compression: qcow2::Compression) -> Result<Box<dyn Pack>> {
    Ok(Box::new(qcow2::Compressor::new(compression)?))
}
