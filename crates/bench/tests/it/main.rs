//! The load generators against servers.

mod breakdown;
mod common;
mod jobs;
mod libblkio;
mod load;
mod verify;
