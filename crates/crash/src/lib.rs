//! Crash safety by enumeration.
//!
//! A workload runs on simulated disks ([`io::SimDisk`]), which record every operation that reaches them. Between
//! any two barriers of that log the machine may lose power, and the disks may then hold any part of what no
//! barrier covers. [`states`] enumerates what they may hold, [`judge`] opens each such state and asks
//! whether a guest could find it: nothing worse than leaked clusters, every byte that a completed
//! flush covered, and no sector that holds what was never written there.
//!
//! | module | what it brings |
//! |---|---|
//! | [`spec`] | an image in words: `cluster_size=4k refcount_bits=1 backing` |
//! | [`script`] | a workload in words: `storm 60; flush; close; storm 20` |
//! | [`world`] | the disks of a machine, and how they are opened |
//! | [`run`] | a workload carried out: by the blocking driver, or through queues in virtual time |
//! | [`injection`] | errors to inject, in words |
//! | [`whole`] | operations on whole images in the middle of a workload |
//! | [`model`] | what a guest may find |
//! | [`states`] | what disks may hold after a crash |
//! | [`judge`] | whether that is sound |
//! | [`mutant`] | images that break the rules, to see that they are caught |
//! | [`vmdk`] | VMDK images of few sectors, of one file and of several |
//! | [`cases`] | workloads × images × ways to drive them; [`cases::Case::replay`] prints how to see a failure again |
//!
//! A failure prints its seed, its state, and the command that shows it again. Where a test fails with its seed only:
//! `cargo run -p crash -- replay CASE --seed N`; `list` names the cases, `soak` runs them with new seeds.
//!
//! For tests only: what is taken for granted panics, and nothing of it is in any other build.

pub mod cases;
pub mod injection;
pub mod judge;
pub mod model;
pub mod mutant;
mod queues;
pub mod random;
pub mod run;
pub mod script;
pub mod spec;
pub mod states;
pub mod vmdk;
pub mod whole;
mod workloads;
pub mod world;

pub use cases::Case;
pub use injection::Injection;
pub use random::Random;
