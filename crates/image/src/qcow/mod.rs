//! qcow of version 1, QEMU's copy-on-write format before qcow2 (source: QEMU's `block/qcow.c`, the only description).
//!
//! ```text
//!   header │ backing file's name │ L1 table │ clusters, L2 tables and compressed bytes, in the order in which they were needed …
//!
//!   guest cluster ─▶ L1 table ─▶ L2 table ─▶ host cluster, or compressed bytes
//!                    in memory   slices in frames (see `crate::metadata`)
//! ```
//!
//! There are no refcounts, no zeros but those that are written, and nothing says that an image was closed: what new clusters
//! need, and what a crash leaves of them, is that of QED (`crate::appended`). QEMU writes entries before what they refer to;
//! flushes here keep the order.
//!
//! The L1 table begins where the name ends, so it shares a sector with the header; both are written as one then.
//!
//! Clusters may be compressed (raw deflate with a window of 4 KiB). One that is written to gets a cluster of its own, and its
//! bytes are leaked, as in QEMU.
//!
//! Encrypted images (AES, with the passphrase as the key) are only read, as those of qcow2: that encryption is not safe.
//!
//! * `header`, `create`, `empty`: the format of a closed image. `open`, and `close` here. `stream`: a new image in one go,
//!   compressed.

mod create;
mod empty;
mod header;
mod open;
mod stream;
#[cfg(test)]
mod tests;

pub use create::{CreateOptions, create};
pub use empty::empty;
pub use header::{BACKING_NAME_MAX, HEADER_LEN, Header, L1_ENTRIES_MAX, MAGIC};
pub use open::OpenOptions;
pub use stream::ImageWriter;

use crate::appended::{Head, Over};
use crate::{Description, qcow2};
use block::{Result, size};

/// An open image.
pub type Qcow = Over<Header>;

impl Head for Header {
    fn describe(&self) -> Description {
        Description {
            backing: self.backing.clone(),
            facts: vec![("table size", size::human(self.table_bytes()))],
            ..Description::new("qcow", self.disk_bytes(), self.cluster_size())
        }
    }

    fn disk_bytes(&self) -> u64 {
        self.disk_bytes()
    }

    fn unpack(&self, input: &[u8], output: &mut [u8]) -> Result<()> {
        qcow2::unpack(qcow2::Compression::Zlib, input, output)
    }
}
