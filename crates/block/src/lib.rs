//! The vocabulary of diskplane.
//!
//! Every other crate speaks in these words: a guest's [`Op`] on a range of
//! [`GuestOffset`]s becomes extents at [`HostOffset`]s of files; memory is
//! described by [`IoVec`]s; what went wrong is an [`Error`] for people and a
//! [`GuestError`] for guests. Nothing here does I/O or allocates on a data path.

#![deny(unsafe_op_in_unsafe_fn)]

mod error;
pub mod faults;
pub mod limits;
pub mod name;
mod offset;
mod op;
mod prefetch;
pub mod size;
mod storage;
mod text;
mod vector;
mod zeros;

pub use error::{Context, Error, ErrorKind, GuestError, Result};
pub use offset::{GuestOffset, HostOffset, align_down, align_up};
pub use op::Op;
pub use prefetch::prefetch;
pub use storage::{Range, RangeKind, Storage, Zeroed};
pub use text::{plain, steers};
pub use vector::{IoVec, clip, total_len};
pub use zeros::is_zero;
