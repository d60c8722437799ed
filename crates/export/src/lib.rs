//! Exports: what clients speak to block requests and back.
//!
//! An export is a listener on a control thread and sessions on the I/O threads of [`worker`]; each
//! session owns a [`disk::DiskQueue`]. [`vhost_user`] serves virtual machines over shared memory,
//! [`nbd`] anybody over a socket. [`control`] tells whoever watches how they do.

pub mod control;
pub mod nbd;
mod socket;
pub mod vhost_user;
pub mod worker;
