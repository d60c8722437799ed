//! Measuring disks: load generators and comparisons with peers.
//!
//! - [`driver`]: a guest's side of vhost-user-blk, also for tests that need one that misbehaves.
//! - [`load`]: keeps requests in flight at a server or a file and reports what came back, as a guest's
//!   driver (vhost-user-blk), an NBD client or a plain program would see it.
//! - [`jobfile`]: fio's job files as loads; [`fio`]: fio itself, where it is installed, in place of [`load`].
//! - [`flame`]: flame graphs of a server under load, through perf.
//! - [`breakdown`]: where the time of single requests goes, by the client's clock and the server's.
//! - [`image`]: requests to an image in this process, without a server.
//! - [`experiment`]: the background's studies, with what they found beside what is found here.
//! - [`ffsb`]: load on a file system, as the studies of virtual disks made it.
//! - [`record`]: what every measurement leaves; [`compare`]: two runs of them; [`report`]: pages and charts.
//! - [`simulated`]: block devices that are models: a rotating disk, a flash drive, RAID0.
//! - [`versus`]: compares servers under such loads, in turn, and holds the ratios against bars.
//!
//! A figure is worth what its surroundings are: reports carry everything that was asked for, and comparisons
//! are ratios taken in turn (A B A B …) in one run.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod breakdown;
pub mod compare;
pub mod driver;
pub mod equal;
pub mod experiment;
pub mod ffsb;
pub mod fio;
pub mod flame;
pub mod image;
pub mod jobfile;
pub mod load;
pub mod machine;
pub mod metric;
pub mod peer;
pub mod record;
pub mod report;
mod sampling;
pub mod simulated;
mod single;
pub mod statistics;
mod turns;
pub mod versus;
