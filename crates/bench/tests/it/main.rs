//! The load generators against servers.

mod common;
mod load;
mod verify;
