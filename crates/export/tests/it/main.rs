//! Servers of vhost-user-blk and NBD, with clients of our own and of others.
//!
//! One program: the linker takes longer than most of the tests.

#[path = "../nbd_common/mod.rs"]
mod nbd_common;
#[path = "../vhost_common/mod.rs"]
mod vhost_common;

mod inflight;
mod nbd_clients;
mod nbd_peers;
mod trace;
mod vhost;
