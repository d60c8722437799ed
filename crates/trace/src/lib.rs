//! Where the time of requests goes.
//!
//! Each queue of a disk notes, for every request that ends, when it reached each stage of its way:
//!
//! ```text
//!   arrived ─ring─▶ taken ─parse─▶ parsed ─map─▶ mapped ─submit─▶ submitted ─device─▶ device done
//!           ─commit─▶ completed ─complete─▶ told ─notify─▶ notified
//! ```
//!
//! - [`Stage`], [`Stamps`], [`Entry`]: the words. The stages of an entry add up to its whole time, exactly.
//! - [`Ring`]: the last so many entries of a queue, written by its thread with plain stores and read by anybody at any time.
//! - [`Slowest`]: the slowest requests since the queue began.
//! - [`Histograms`]: counts per operation and stage; [`Totals`]: their sums.
//! - [`Breakdown`]: where time went in a run, as the study in [`breakdown`] does it.
//! - [`chrome`]: entries as a file that Perfetto and Chrome open.
//! - [`control`]: what a server and who watches it say to each other.

//!
//! # Probes
//!
//! Static tracepoints (USDT, provider `diskplane`) for `bpftrace`, `perf` and SystemTap: a no-op each until somebody attaches.
//! QUEUE is a number that only that queue has, TAG its request's; operation and status are numbered as [`Operation`] and [`Status`]
//! list them.
//!
//! | probe | arguments |
//! |---|---|
//! | `kicked` | number of the virtqueue, or of the NBD session |
//! | `taken` | QUEUE, TAG, nanoseconds of the monotonic clock |
//! | `parsed` | QUEUE, TAG, operation, offset, bytes |
//! | `mapped` | QUEUE, TAG; not where it ended in memory |
//! | `submitted` | QUEUE, TAG; likewise |
//! | `device_done` | QUEUE, TAG; also for the parts of a copy-on-write |
//! | `completed` | QUEUE, TAG, status |
//! | `notified` | QUEUE, operation, offset, bytes, nanoseconds in all |

#![forbid(unsafe_code)]

pub mod breakdown;
mod buckets;
mod cell;
pub mod chrome;
pub mod control;
mod entry;
mod histogram;
mod ring;
mod slowest;
mod stage;
mod totals;

pub use breakdown::Breakdown;
pub use buckets::Buckets;
pub use entry::{Entry, Operation, Status};
pub use histogram::{Counter, Histograms, Snapshot};
pub use ring::{RING_ENTRIES_DEFAULT, RING_ENTRIES_MAX, Read, Ring};
pub use slowest::{SLOWEST_MAX, Slowest};
pub use stage::{STAGES, Stage, Stamps, Times};
pub use totals::Totals;
