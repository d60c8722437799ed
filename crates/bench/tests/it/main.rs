//! The load generators against servers.

mod breakdown;
mod common;
mod jobs;
mod load;
mod verify;
