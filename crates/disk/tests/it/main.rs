//! A served disk: queues, chains, formats beside QEMU's, faults, encryption.
//!
//! One program: the linker takes longer than most of the tests.

#[path = "../common/mod.rs"]
mod common;
#[path = "../peer/mod.rs"]
mod peer;

mod ahead;
mod bitmaps;
mod chain;
mod data_file;
mod differential;
mod encrypted;
mod faults;
mod hostile;
mod luks;
mod packed;
mod queue;
mod scripted;
mod simulated;
mod trace;
mod vdi;
mod vhd;
mod vhd_chain;
mod vhdx;
mod vhdx_chain;
mod vmdk;
