//! Operations on whole images: what a person or a script does to a disk that no guest uses.
//!
//! Everything here is off the data path: it blocks, over [`block::Storage`], on a thread that may wait.
//! Formats are parsed and judged by crate `image`; this crate walks and counts.

#![forbid(unsafe_code)]

pub mod bitmap;
mod buffer;
pub mod check;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod measure;
pub mod prealloc;
pub mod rebase;
pub mod resize;
pub mod source;
pub mod work;
