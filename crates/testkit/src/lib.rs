//! What diskplane's integration tests share: the peers that they compare with, servers, and real guests.
//!
//! | module | what it brings |
//! |---|---|
//! | [`temp`] | a folder that is gone when the test is over |
//! | [`command`] | run a program to its end; a failure shows the command, its status and what it printed |
//! | [`qemu`] | `qemu-img`, `qemu-io`, `qemu-storage-daemon` and `qemu-nbd` as the other opinion |
//! | [`server`] | a server under test: started, known to be ready, stopped clean or killed |
//! | [`guest`] | a virtual machine that uses a served disk |
//! | [`report`] | what it found |
//! | [`allocations`] | an allocator that counts |
//! | [`forge`] | qcow2 images byte by byte, sound or not |
//! | [`rich`] | sound qcow2 images with something of everything, and damage as a program |
//! | [`rng`] | numbers from a seed |
//! | [`memory`] | a sparse file in memory that counts what is done to it |
//!
//! Everything here is for tests: what a test takes for granted (a tool is installed, a file can be made)
//! panics with the reason where it does not hold, and what a test may want to see fail is offered a second
//! time as `try_…`, which returns a [`Failure`].
//!
//! ```no_run
//! use testkit::{Disk, Guest, Serve, TempDir, qemu};
//!
//! let dir = TempDir::new();
//! let image = dir.path("disk.qcow2");
//! qemu::create("qcow2", &image, "1G");
//! let server = Serve::new(testkit::diskplane("target/debug/diskplane"), &image)
//!     .vhost_user(dir.path("vm.sock"))
//!     .queues(2)
//!     .start();
//! let report = Guest::new("fs-ext4,verify")
//!     .disk(Disk::vhost_user(dir.path("vm.sock")).queues(2))
//!     .run_on(&server);
//! assert_eq!(report.value("vda.write_cache"), "write back");
//! server.stop();
//! qemu::check("qcow2", &image);
//! ```

pub mod allocations;
pub mod bochs;
pub mod chromium;
pub mod cloop;
pub mod command;
pub mod dmg;
pub mod forge;
pub mod guest;
pub mod memory;
mod process;
pub mod qcow;
pub mod qemu;
pub mod report;
pub mod rich;
pub mod rng;
pub mod scattered;
pub mod server;
pub mod temp;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

use std::path::PathBuf;

pub use command::{Failure, Output};
pub use guest::{Disk, Guest, guest_folder};
pub use report::Report;
pub use rng::Rng;
pub use server::{Serve, Server};
pub use temp::TempDir;

/// The diskplane binary to test: `DISKPLANE_BIN` where that is set (a release build, a sanitized build),
/// otherwise the one that cargo built for the test, which only the test itself can name:
/// `testkit::diskplane(env!("CARGO_BIN_EXE_diskplane"))`.
pub fn diskplane(built_by_cargo: impl Into<PathBuf>) -> PathBuf {
    std::env::var_os("DISKPLANE_BIN").map_or_else(|| built_by_cargo.into(), PathBuf::from)
}
