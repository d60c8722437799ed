//! Image formats: pure state machines that map guest ranges and never do I/O.
//!
//! [`Image`] is the contract between a format and the disk layer; read its
//! documentation first.

#![forbid(unsafe_code)]

mod appended;
pub mod bochs;
pub mod cloop;
mod contract;
pub mod dmg;
mod encryption;
mod head;
mod inflate;
pub mod luks;
mod metadata;
mod null;
pub mod parallels;
mod probe;
pub mod qcow;
pub mod qcow2;
pub mod qed;
mod raw;
mod sequential;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
mod words;

pub use bochs::Bochs;
pub use cloop::Cloop;
pub use contract::{
    Allocation, Compressed, DataFile, Description, Extent, ExtentKind, FileId, Fill, FlushRun,
    Foreseen, Freed, Image, Key, Load, MetaWrite, Need, PackedPlace, Parent, Plan, Prewrite,
    Reserve, Stage, Step, Ticket, ZeroMode, ZeroPlan,
};
pub use dmg::Dmg;
pub use encryption::{Encryption, Method};
pub use null::Null;
pub use parallels::Parallels;
pub use probe::{Format, PROBE_BYTES, probe, probe_bytes};
pub use raw::Raw;
pub use sequential::{Pack, Sequential};
