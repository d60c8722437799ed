//! QED, QEMU's format of 2010 (source: QEMU's `docs/interop/qed_spec.rst`, called *specification* here).
//!
//! ```text
//!   header │ … clusters: L1 table, L2 tables, data, in the order in which they were needed …
//!
//!   guest cluster ─▶ L1 table ─▶ L2 table ─▶ host cluster
//!                    in memory   slices in frames (see `crate::metadata`)
//! ```
//!
//! There are no refcounts: a cluster is what one entry refers to, and new ones come from the end of the file. So
//! nothing is ever freed; a discard punches its hole in place.
//!
//! **The need-check bit.** QEMU writes entries without waiting for what they refer to, and sets this bit meanwhile: an
//! image found with it is to be checked. Flushes here keep the order instead (see `flush`), at one barrier for
//! writes into clusters that read as zeros and two for others, so that the bit is never needed: whatever a
//! crash leaves has leaked clusters at worst. An image that has the bit is readable, and written to only after a check
//! (`tool::check`) has cleared it.
//!
//! * `header`, `create`, `resize`, `rebase`: the format of a closed image. `open`. Everything else:
//!   `crate::appended`, where entries behind the end of the file are judged too.

mod create;
mod header;
mod open;
pub mod rebase;
mod resize;
#[cfg(test)]
mod tests;

pub use create::{CreateOptions, create};
pub use header::{
    BACKING_NAME_MAX, CLUSTER_BYTES, F_BACKING_FILE, F_BACKING_FORMAT_NO_PROBE, F_NEED_CHECK,
    HEADER_LEN, Header, MAGIC, TABLE_CLUSTERS, disk_bytes_max,
};
pub use open::OpenOptions;
pub use resize::{clear_need_check, grow, may_grow};

use crate::Description;
use crate::appended::{Head, Over};
use block::size;

/// An open QED image.
pub type Qed = Over<Header>;

impl Head for Header {
    fn describe(&self) -> Description {
        let mut facts = vec![("table size", size::human(self.table_bytes()))];
        if self.needs_check() {
            facts.push(("need check", true.to_string()));
        }
        Description {
            backing: self.backing.clone(),
            backing_format: self.backing_format().map(str::to_owned),
            facts,
            ..Description::new("qed", self.image_size, u64::from(self.cluster_size))
        }
    }

    fn disk_bytes(&self) -> u64 {
        self.image_size
    }
}
