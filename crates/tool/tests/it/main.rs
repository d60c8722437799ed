//! Whole-image operations, on files and on the simulated disk.
//!
//! One program: the linker takes longer than most of the tests.

#[path = "../common/mod.rs"]
mod common;

mod changing;
mod compare;
mod convert;
mod differential;
mod qed;
mod simulated;
mod vdi;
mod vhd;
mod vhdx;
