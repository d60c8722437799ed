//! Persistent dirty bitmaps (specification: "Bitmaps", and "Bitmaps extension").
//!
//! ```text
//!   header extension ──▶ directory ──▶ table ──▶ data: bit n stands for bytes n·granularity …
//!   and autoclear bit 0   an entry      64-bit    clusters; 0 without an offset is all
//!   that says it is       each          entries   zeros, 1 all ones
//!   to be trusted
//! ```
//!
//! * `directory`: which bitmaps there are. `table`: their bits on disk; `stored`: read piece by piece. `bits`: in memory.
//! * `ops`: what is done to the bitmaps of an image that nobody has open.
//! * `track`: the enabled bitmaps of an image that is open for writing.
//!
//! # Which are used
//!
//! | entry | |
//! |---|---|
//! | extension without the autoclear bit | none: whoever changed the image last did not know bitmaps |
//! | `in_use` | inconsistent: listed, kept, and can only be removed |
//! | extra data (nobody knows any), `extra_data_compatible` | used, the extra data kept |
//! | extra data otherwise | kept; enabled, it keeps the image from being written |
//! | unknown flags or types, broken limits | the image can be read, not written |
//!
//! # Crashes
//!
//! Operations write new versions of what they change beside the old ones and switch over with the header: see
//! `super::edit`. In an image in use, the enabled bitmaps are marked `in_use` on disk, behind a barrier, before
//! anything is written for the guest; what the marks say about the bitmap holds from then on until it is closed.

mod bits;
mod directory;
mod ops;
mod stored;
mod table;
#[cfg(test)]
mod tests;
mod track;

pub use bits::Bits;
pub use directory::{Directory, Entry};
pub use ops::{Bitmaps, granularity_default, list, load, open, resize};
pub use stored::{Source, Stored};
pub(super) use track::{Ready, Tracker};
