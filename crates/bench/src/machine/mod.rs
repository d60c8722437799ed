//! The machine that measurements run on: what it is, what else it does meanwhile, and what they leave on it.

pub(crate) mod device;
pub(crate) mod disk;
pub(crate) mod file;
pub(crate) mod given;
pub mod host;
pub(crate) mod initrd;
pub(crate) mod interrupts;
pub(crate) mod mount;
pub(crate) mod others;
pub(crate) mod pre_exec;
pub mod process;

pub use disk::folder_below;
pub use host::Host;
