//! The Network Block Device protocol (NetworkBlockDevice/nbd, `doc/proto.md`, `doc/uri.md`).
//!
//! ```text
//!   proto      its numbers, and big-endian access to bytes        server (crate export) and clients
//!   request    headers of requests                                both
//!   reply      headers of replies, as a client takes them apart   clients
//!   uri        names of exports
//!   socket     a connection: nothing waits for ever
//!   handshake  from a socket to an export that takes requests
//!   connection requests of many threads in flight on one connection
//!   client     a disk at a server: `io::Remote`
//! ```
//!
//! What comes from a server is bounded and checked as what comes from a file is: a length that cannot be, a reply to
//! what nobody asked, an answer without an end are errors that say so.

#![forbid(unsafe_code)]

mod client;
mod connection;
pub mod handshake;
pub mod proto;
pub mod reply;
pub mod request;
pub mod socket;
pub mod uri;

pub use client::{Client, Options};
pub use uri::{Uri, is_name};
